"""Samples of the base models, drawn once: cards, classifiers and the benchmark all need thousands of them."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser
from sculpt.entries import read_json
from sculpt.files import replace_file
from sculpt.weights import read_tensors

CHUNK, STEPS = 250, 32


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
            chunk = model.sample(CHUNK, steps=STEPS, generator=torch.Generator().manual_seed(k), progress=False).x
            replace_file(path.with_suffix(".json"), json.dumps({"seconds": time.process_time() - started}).encode())
            # Bytes are what a picture is; half precision is finer than that.
            replace_file(path, save({"x": chunk.half().contiguous()}))
            print(f"{model.name}: samples {k * CHUNK} to {(k + 1) * CHUNK}", flush=True)
        x.append(read_tensors(path)["x"].float())
        seconds += read_json(path.with_suffix(".json"), "set of samples")["seconds"]
    offset = first - first // CHUNK * CHUNK
    return torch.cat(x)[offset : offset + n], seconds * n / (CHUNK * len(x))
