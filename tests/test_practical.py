"""Networks as they are run where memory is short: offloaded, compiled, stored in eight bits, in half precision. Each is what it was before."""

import accelerate
import diffusers
import pytest
import torch
from test_inside import SD, SD3, STEPS, autoencoder, randn

import sculpt
from sculpt import Diffusion, Tracked

ALONE = Tracked(particles=1)


def sequential(network):
    accelerate.cpu_offload(network, execution_device="cpu", offload_buffers=True)
    return network


def whole(network):
    accelerate.cpu_offload_with_hook(network, execution_device="cpu")
    return network


def grouped(network):
    network.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    return network


def sliced(network):
    if not hasattr(network, "set_attention_slice"):
        pytest.skip(f"{type(network).__name__} has no attention slicing")
    network.set_attention_slice("max")
    return network


WAYS = {
    "sequential offload": sequential,
    "model offload": whole,
    "group offload": grouped,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "compiled in place": lambda network: network.compile(backend="eager") or network,
    "compiled, offloaded": lambda network: torch.compile(whole(network), backend="eager"),
    "attention slices": sliced,
}
KINDS = {"SD": SD, "SD3": SD3}


def models(kind, network, **options):
    return [
        Diffusion(network, kind.pipe.scheduler, condition=kind.condition(seed), name=f"prompt {seed}", **options)
        for seed in (1, 2)
    ]


def run(p, q, n=2, **options):
    options = {"steps": STEPS, "generator": torch.Generator().manual_seed(0), "progress": False, **options}
    return (p & q).sample(n, ALONE, **options).x


def off(x, expected):
    return float((x.float() - expected).norm() / expected.norm())


def slow(name, way):
    return [pytest.mark.slow] if name == "SD" and "compiled" in way else []


@pytest.mark.parametrize(("name", "way"), [pytest.param(name, way, marks=slow(name, way)) for name in KINDS for way in WAYS])
def test_a_model_is_the_same_however_its_weights_are_kept(name, way):
    kind = KINDS[name]()
    p, q = models(kind, kind.network)
    known, expected = (p.key, q.key), run(p, q)
    network = WAYS[way](KINDS[name]().network)
    p, q = models(kind, network)
    assert (p.key, q.key) == known and p.shape == kind.shape
    assert p.device == torch.device("cpu") and p.dtype == torch.float32
    assert off(run(p, q), expected) < 1e-5
    # And inside its pipeline
    x = kind.run((p & q).as_unet(), randn(2, *kind.shape))
    assert off(x, run(p, q, solver=kind.pipe.scheduler)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_within_its_own(name, dtype):
    kind = KINDS[name]()
    exact = run(*models(kind, kind.network))
    p, q = models(kind, KINDS[name]().network.to(dtype))
    assert p.dtype == dtype
    x = run(p, q)
    assert x.dtype == torch.float32
    # Every layer of every step rounds to a share eps.
    assert off(x, exact) < 10 * torch.finfo(dtype).eps
    noise = randn(2, *kind.shape)
    inside = kind.run((p & q).as_unet(), noise.to(dtype))
    assert off(inside, run(p, q, solver=kind.pipe.scheduler)) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_network_stored_in_eight_bits_computes_in_what_its_library_says(name, compute):
    kind = KINDS[name]()
    before = models(kind, kind.network)[0].key
    kind.network.to(compute).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    p, q = models(kind, kind.network)
    assert p.dtype == compute and p.key != before and p.key == models(kind, kind.network)[0].key
    z, s = randn(2, *kind.shape), torch.tensor(1.3, dtype=torch.float64)
    x, t = p.schedule.scale(s).float() * z, p.schedule.time(s).expand(2)
    prompt = {name: part.expand(2, *part.shape[1:]).to(compute) for name, part in kind.condition(1).items()}
    with torch.no_grad():
        F = kind.network(x.to(compute), timestep=t, **prompt).sample.float()
        torch.testing.assert_close(p.denoise(z, s), p.schedule.denoised(z, s, F), rtol=1e-5, atol=1e-5)
    assert run(p, q).isfinite().all()


def test_states_live_where_the_network_computes_and_not_where_its_weights_rest():
    network = SD().network
    accelerate.cpu_offload_with_hook(network, execution_device="cuda:0")
    assert network.conv_in.weight.device.type == "cpu"
    kind = SD()
    model = Diffusion.__new__(Diffusion)
    model.model, model._device = network, torch.device("cpu")
    assert model.device == torch.device("cuda:0")
    assert models(kind, kind.network)[0].device == torch.device("cpu")


def test_an_offloaded_or_compiled_autoencoder_defines_the_same_latents():
    spaces, decoded = [], []
    for keep in (lambda vae: vae, sequential, lambda vae: torch.compile(vae, backend="eager")):
        kind = SD()
        model = models(kind, kind.network, autoencoder=keep(autoencoder()))[0]
        spaces.append(model.space)
        decoded.append(model.decode(randn(2, 4, 8, 8)))
    assert spaces[0] == spaces[1] == spaces[2]
    torch.testing.assert_close(decoded[1], decoded[0])
    torch.testing.assert_close(decoded[2], decoded[0])


def test_plain_callables_get_single_precision():
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype))
        return x * t.reshape(-1, 1)

    p, q = (Diffusion(network, diffusers.DDPMScheduler(clip_sample=False), (3,), name=name) for name in "pq")
    (p & q).sample(4, sculpt.Tracked(particles=8), steps=4, progress=False)
    run(p, q)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_a_population_goes_through_the_network_in_parts():
    kind, sizes = SD3(), []
    p, q = models(kind, kind.network)
    expected = run(p, q, n=5)
    kind.network.proj_out.register_forward_hook(lambda _, args, output: sizes.append(len(output)))
    torch.testing.assert_close(run(p, q, n=5, batch_size=4), expected, rtol=1e-5, atol=1e-5)
    assert max(sizes) == 4 and sum(sizes) == 5 * 2 * STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading from a GPU to the CPU takes a GPU")
@pytest.mark.parametrize("way", ["sequential", "model", "group", "compiled", "eight bits"])
def test_on_a_gpu_states_live_there_while_weights_rest_elsewhere(way):
    kind = SD3()
    network = SD3().network
    if way == "eight bits":
        kind.network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = run(*models(kind, kind.network))
    if way == "sequential":
        accelerate.cpu_offload(network, execution_device="cuda", offload_buffers=True)
    elif way == "model":
        accelerate.cpu_offload_with_hook(network, execution_device="cuda")
    elif way == "group":
        network.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    elif way == "compiled":
        network = torch.compile(network.to("cuda"))
    else:
        network.to("cuda").enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    p, q = models(kind, network)
    assert p.device.type == "cuda" and p.dtype == torch.float32
    assert p.key == models(kind, kind.network)[0].key
    x = run(p, q)
    assert x.device.type == "cuda" and off(x.cpu(), expected) < 1e-3
