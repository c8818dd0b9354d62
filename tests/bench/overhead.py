"""The time outside networks: what a composed run of two prompts takes beside the calls of their network.

python tests/bench/overhead.py                      a transformer of fifty million parameters, on the CPU
python tests/bench/overhead.py --device cuda        one of the size of Stable Diffusion 3, in bfloat16
"""

import argparse
import time
import warnings

import diffusers
import torch

import sculpt

SIZES = {
    "cpu": (
        {"num_layers": 8, "num_attention_heads": 8, "sample_size": 32, "caption_projection_dim": 512, "pos_embed_max_size": 32},
        77,
    ),
    "cuda": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "sample_size": 128,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        333,
    ),
}
ALONE = sculpt.Tracked(particles=1)


class Watch:
    """The time that a network takes, call by call, on the device's own clock."""

    def __init__(self, network, device):
        self.cuda, self.calls = device == "cuda", []
        network.register_forward_pre_hook(lambda *_: self.calls.append([self.now()]))
        network.register_forward_hook(lambda *_: self.calls[-1].append(self.now()))

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share_outside(self, run):
        """Of a run: the seconds that it takes, and the share of them that is not the network's."""
        self.calls.clear()
        start = self.now()
        run()
        end = self.now()
        if self.cuda:
            torch.cuda.synchronize()
        spent = (lambda a, b: a.elapsed_time(b) / 1000) if self.cuda else (lambda a, b: b - a)
        whole = spent(start, end)
        return whole, 1 - sum(spent(*call) for call in self.calls) / whole, len(self.calls)


def models(device):
    config, tokens = SIZES[device]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        network = diffusers.SD3Transformer2DModel(attention_head_dim=64, **config).to(dtype)
        text = [torch.randn(1, tokens, 4096, dtype=dtype) for _ in range(2)]
        pooled = [torch.randn(1, 2048, dtype=dtype) for _ in range(2)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return network, [
        sculpt.Diffusion(network, scheduler, condition={"encoder_hidden_states": t, "pooled_projections": p}, name=name)
        for t, p, name in zip(text, pooled, "ab", strict=True)
    ]


def loop(unet, scheduler, x):
    """A pipeline's loop."""
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=SIZES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    network, (a, b) = models(options.device)
    watch, solver = Watch(network, options.device), a.scheduler
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    place = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    print(f"{size:,.0f} million parameters, {tuple(a.shape)}, {network.dtype}, {place}, {options.steps} steps\n")
    print("| run | batch | seconds a step | calls a step | outside networks |\n|---|---|---|---|---|")
    unet = (a & b).as_unet()
    for n in options.batches:
        noise = torch.randn(n, *a.shape, device=options.device)
        runs = {
            "one model": lambda n=n: a.sample(n, steps=options.steps, progress=False),
            "a & b": lambda n=n: (a & b).sample(n, ALONE, steps=options.steps, progress=False),
            "a & b, a solver": lambda n=n: (a & b).sample(n, ALONE, solver=solver, steps=options.steps, progress=False),
            "a & b, as_unet": lambda noise=noise: loop(unet, solver, noise),
        }
        for name, run in runs.items():
            solver.set_timesteps(options.steps, device=options.device)
            with torch.no_grad():
                watch.share_outside(run)  # the first one warms up
                solver.set_timesteps(options.steps, device=options.device)
                seconds, outside, calls = watch.share_outside(run)
            print(f"| {name} | {n} | {seconds / options.steps:.4f} | {calls / options.steps:g} | {outside:.1%} |", flush=True)


if __name__ == "__main__":
    main()
