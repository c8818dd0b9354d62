"""Samples of the base models, drawn once: cards, classifiers and the benchmark all need thousands of them.

``python pretrained/digits/base_samples.py {cyan,...} [-n samples] [--first k] [--device cuda]`` draws them beforehand; several processes
may draw side by side.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

import sculpt
from sculpt.diffusion.denoiser import Denoiser
from sculpt.entries import read_json
from sculpt.files import replace_file
from sculpt.weights import read_tensors

CHUNK, STEPS = 250, 32
HERE = Path(__file__).parent

torch.backends.cudnn.allow_tf32 = False  # what a GPU draws is what a CPU draws, up to rounding


def pool(model: Denoiser, n: int, state: Path, *, first: int = 0) -> tuple[Tensor, float]:
    """Samples ``first`` to ``first + n`` of a model's endless row of samples, and the CPU seconds that they took when they were drawn.

    They come in chunks of 250, each with a seed and a file of its own, so that an interrupted drawing goes on.
    """
    x, seconds = [], 0.0
    folder = state / "samples" / f"{model.name}-{model.key[:12]}-{STEPS}"
    for k in range(first // CHUNK, -(-(first + n) // CHUNK)):
        path = folder / f"{k:04d}.safetensors"
        if not path.exists():
            started = time.process_time()
            generator = torch.Generator().manual_seed(k)
            chunk = model.sample(CHUNK, steps=STEPS, batch_size=CHUNK, generator=generator, progress=False).x
            replace_file(path.with_suffix(".json"), json.dumps({"seconds": time.process_time() - started}).encode())
            # Bytes are what a picture is; half precision is finer than that.
            replace_file(path, save({"x": chunk.half().contiguous()}))
            print(f"{model.name}: samples {k * CHUNK} to {(k + 1) * CHUNK}", flush=True)
        x.append(read_tensors(path)["x"].float())
        seconds += read_json(path.with_suffix(".json"), "set of samples")["seconds"]
    offset = first - first // CHUNK * CHUNK
    return torch.cat(x)[offset : offset + n], seconds * n / (CHUNK * len(x))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("-n", type=int, default=4000, help="samples of each model")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, default=Path("train_state/digits"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        pool(sculpt.load(HERE / name, device=options.device), options.n, options.state, first=options.first)
