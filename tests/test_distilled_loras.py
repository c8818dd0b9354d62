"""Compositions of a pipeline's models as checkpoints: a LoRA in the network that they share, which diffusers reads."""

import pytest
import torch

import sculpt
from sculpt import Diffusion
from sculpt.diffusion.diffusers.loras import LoraStudent, _layers
from sculpt.identity import digest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft.tuners.lora import Linear as LinearLora
from test_pipelines import built, own_run, with_loras

pytestmark = pytest.mark.filterwarnings("ignore")

S = torch.tensor(1.0, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(kind="SD 1.5", **changes):
    pipe, call = built(kind)
    dog = Diffusion.from_pipeline(pipe, **{**call, "prompt": "a dog", "guidance_scale": 1.0, **changes})
    return pipe, call, dog, dog.with_condition(prompt="a cat")


def quick(composition, **options):
    """Half a second of training: next to nothing is learned, everything runs."""
    data = 0.3 * torch.randn(40, *composition.leaves[0].shape, generator=generator()) + 0.5
    defaults = {"data": data, "steps": 3, "batch_size": 2, "sample_steps": 2, "compare": 2, "lora": 2, "progress": False}
    return sculpt.distill(composition, **(defaults | options))


@pytest.mark.parametrize("kind", ["SD 1.5", "SD3"])
def test_a_student_of_prompts_is_a_lora_that_another_pipeline_reads(kind, tmp_path):
    pipe, call, dog, cat = pair(kind)
    z, key, (_, image) = torch.randn(2, *dog.shape, generator=generator()), dog.key, own_run(pipe, {**call, "prompt": "a dog"})
    learns = {name: parameter.requires_grad for name, parameter in dog.networks[0].named_parameters()}
    with torch.no_grad():
        before = dog.denoise(z, S)
    both = quick(dog & cat, checkpoint=tmp_path / "both")
    network = both.networks[0]
    with torch.no_grad():
        learned, after = both.denoise(z, S), dog.denoise(z, S)
        assert torch.equal(before, after) and not torch.equal(before, learned) and dog.key == key != both.key
    # The pipeline itself goes on as before, and nothing of its own has learned or was left frozen.
    assert torch.equal(own_run(pipe, {**call, "prompt": "a dog"})[1], image)
    own = {name.replace(".base_layer", ""): p for name, p in network.named_parameters() if "lora" not in name}
    assert {name: p.requires_grad for name, p in own.items()} == learns and all(p.grad is None for p in own.values())
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    both.sample(1, steps=3, generator=generator(), progress=False)
    handle.remove()
    assert len(calls) == 3 and (both & cat).sample(1, steps=2, progress=False).x.shape == (1, *dog.shape)

    other, _ = built(kind)
    other.load_lora_weights(tmp_path / "both", adapter_name="both")
    again = Diffusion.from_pipeline(other, **{**call, "prompt": "a dog", "guidance_scale": 1.0}).with_adapters({"both": 1.0})
    with torch.no_grad():
        assert torch.equal(again.denoise(z, S), learned)
    card = (tmp_path / "both" / "README.md").read_text()
    assert "pipe.load_lora_weights('both', adapter_name='both')" in card and "prompt='a dog'" in card
    with pytest.raises(ValueError, match="holds a LoRA, which belongs into its pipeline: pipe.load_lora_weights"):
        sculpt.load(tmp_path / "both")


def test_a_student_begins_as_its_anchor_with_the_adapters_that_are_on():
    pipe, _, dog, _ = pair()
    with_loras(pipe, pipe.unet)
    ink, oil = dog.with_adapters({"ink": 0.8}), dog.with_adapters({"oil": 1.2})
    z = torch.randn(2, *dog.shape, generator=generator())
    data = torch.randn(30, *dog.shape, generator=generator())
    with torch.no_grad():
        wanted = ink.denoise(z, S)
        first = ink.student(ink & oil, None, data=data).student
        assert torch.equal(first.denoise(z, S), wanted) and not torch.equal(dog.denoise(z, S), wanted)
        second = ink.student(ink & oil, None, data=data).student
        assert torch.equal(ink.denoise(z, S), wanted) and second.key == first.key  # of one seed
    assert [call.switches.adapters(pipe.unet) for call in second._calls()] == [["distilled2", "ink"]]


def test_a_student_of_guided_prompts_is_one_call_a_step():
    _, _, dog, cat = pair(guidance_scale=4.0)
    assert dog.extrapolated and cat.extrapolated
    both = quick(dog & cat)
    assert not both.extrapolated and len(both._calls()) == 1


def test_a_killed_student_goes_on_and_ends_with_the_same_bits(tmp_path):
    def run(folder, stop=None):
        _, _, dog, cat = pair()
        if stop is None:
            return quick(dog & cat, checkpoint=folder, steps=6)
        loss, calls = LoraStudent.loss, []

        def killed(self, seed):
            calls.append(seed)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return loss(self, seed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoraStudent, "loss", killed)
            with pytest.raises(KeyboardInterrupt):
                quick(dog & cat, checkpoint=folder, steps=6)
        return None

    through = run(tmp_path / "through")
    run(tmp_path / "killed", stop=3)
    assert run(tmp_path / "killed").key == through.key


def found(network):
    """All that a caller can see of a network: layers, weights, what learns, and the adapters that are on."""
    layers = {name: (type(layer), layer.training, id(layer)) for name, layer in network.named_modules()}
    on = {name: (layer._active_adapter, layer.disable_adapters, dict(layer.scaling)) for name, layer in _layers(network)}
    weights = {name: (id(p), p.requires_grad, p.grad, p.detach().clone()) for name, p in network.named_parameters()}
    said = sorted(getattr(network, "peft_config", None) or {}), bool(network._hf_peft_config_loaded)
    return layers, on, {name: value[:3] for name, value in weights.items()}, said, digest({n: w[3] for n, w in weights.items()})


def failing(monkeypatch, cls, name, error, after=0):
    """Let a method fail once it has been called so often."""
    method, calls = getattr(cls, name), []

    def failed(self, *args, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return method(self, *args, **options)

    monkeypatch.setattr(cls, name, failed)


FAILURES = {
    "a key is pressed in a step": (LoraStudent, "loss", KeyboardInterrupt(), 3),
    "a loss fails at once": (LoraStudent, "loss", RuntimeError("no memory"), 0),
    "samples cannot be drawn": (LoraStudent, "prepare", RuntimeError("no memory"), 0),
    "half of the layers have it": (LinearLora, "update_layer", RuntimeError("no memory"), 20),
    "the model cannot be measured": (LoraStudent, "measure", KeyboardInterrupt(), 0),
    "the disk is full": (LoraStudent, "save", OSError("no space left"), 0),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["bare", "with adapters"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_student_that_is_stopped_leaves_its_pipeline_as_it_was_and_the_same_call_goes_on(failure, loaded, tmp_path):
    def composed():
        pipe, _, dog, cat = pair()
        if loaded:
            with_loras(pipe, pipe.unet).set_adapters(["oil"], [0.3])
            dog = dog.with_adapters({"ink": 0.8})
        next(pipe.unet.parameters()).requires_grad_(False)
        return pipe, dog & cat

    pipe, both = composed()
    before, key, (cls, name, error, after) = found(pipe.unet), both.key, FAILURES[failure]
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, cls, name, error, after)
        with pytest.raises(type(error)):
            quick(both, checkpoint=tmp_path / "stopped", steps=6)
    assert found(pipe.unet) == before and both.key == key
    _, other = composed()
    through = quick(other, checkpoint=tmp_path / "through", steps=6)
    again = quick(both, checkpoint=tmp_path / "stopped", steps=6)
    assert again.key == through.key and [c.switches.adapters(pipe.unet) for c in again._calls()] == [
        ["distilled", "ink"] if loaded else ["distilled"]
    ]


@pytest.mark.slow
def test_a_lora_learns_what_it_is_shown():
    _, _, dog, cat = pair()
    shown = torch.linspace(-1, 1, dog.shape[-1]).expand(dog.shape)
    data = shown + 0.05 * torch.randn(100, *dog.shape, generator=generator())
    z = shown + torch.randn(32, *dog.shape, generator=generator(1))
    student = quick(dog & cat, data=data, steps=100, batch_size=4, learning_rate=1e-2, lora=8)
    with torch.no_grad():
        first, last = ((model.denoise(z, S) - shown).square().mean() for model in (dog, student))
    assert last < first / 2
