"""A training run that can be killed at any time: weights, their average and the optimiser in one file, a seed for every step."""

import abc
import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sculpt.files import replace_file


class Run(abc.ABC):
    """AdamW with warm-up and cosine decay, bfloat16 autocast if asked, averaged weights. A killed run goes on bit for bit.

    Each thread computes a share of every batch by itself; at this size two of torch's own threads are hardly faster than one.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        folder: Path,
        *,
        steps: int,
        batch_size: int,
        rate: float,
        decay: float = 0.999,
        weight_decay: float = 1e-4,
        device: str = "cpu",
        threads: int = 1,
        bfloat16: bool = False,
    ):
        self.name, self.folder, self.steps, self.rate, self.decay = name, folder, steps, rate, decay
        self.batch_size, self.threads, self.bfloat16 = batch_size, threads, bfloat16
        self.device = torch.device(device)
        self.network = network.to(self.device).train()
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.clock = clock_of(self.device)
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        if (folder / "state.safetensors").exists():
            self.load()

    @abc.abstractmethod
    def loss(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of a new batch, and what else to log of it. The generator is where the weights are."""

    @abc.abstractmethod
    def evaluate(self) -> dict[str, float]:
        """What the averaged weights are worth; called now and then, and at the end."""

    def part(self, i: int) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """Gradients of one thread's share of a batch, and what to log."""
        generator = torch.Generator(self.device).manual_seed(1_000_003 * (self.step + 1) + i)
        with torch.autocast(self.device.type, torch.bfloat16, self.bfloat16, cache_enabled=False):
            loss, row = self.loss(self.batch_size // self.threads, generator)
        if not loss.isfinite():
            raise FloatingPointError(f"The loss of {self.name} is {loss.item()} at step {self.step}; the last state is kept.")
        return torch.autograd.grad(loss, list(self.network.parameters())), {"loss": loss.item(), **row}

    def train_step(self) -> dict[str, float]:
        share = self.step / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        gradients, rows = zip(*self.pool.map(self.part, range(self.threads)), strict=True)
        for parameter, *parts in zip(self.network.parameters(), *gradients, strict=True):
            # Laid out as the parameter is: fused AdamW wants that, and cuDNN does not always do it.
            parameter.grad = torch.empty_like(parameter).copy_(sum(parts) / len(parts))
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # Short memory at first, then a window of about a tenth of the steps so far.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
            for mean, value in zip(self.average.buffers(), self.network.buffers(), strict=True):
                mean.copy_(value)
        return _mean(rows) | {"norm": float(norm)}

    def run(self, report: int = 100, check: int = 1000, keep: float = 120.0) -> None:
        """To the end; the state is kept every two minutes."""
        rows, saved = [], time.monotonic()
        while self.step < self.steps:
            started = self.clock()
            rows.append(self.train_step())
            self.seconds += self.clock() - started
            if self.step % report == 0:
                self.log(**{key: round(value, 4) for key, value in _mean(rows).items()})
                rows = []
            done = self.step == self.steps
            if done or time.monotonic() - saved > keep:
                self.save()
                saved = time.monotonic()
            if done or self.step % check == 0:
                self.log(average={key: round(value, 4) for key, value in self.evaluate().items()})

    def log(self, **row) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **row})
        print(self.name, line, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    # Files

    def tensors(self) -> dict[str, Tensor]:
        parts = {"network": self.network.state_dict(), "average": self.average.state_dict()}
        for i, state in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer.{i}"] = state
        return {f"{part}/{key}": value.cpu().contiguous() for part, values in parts.items() for key, value in values.items()}

    def save(self) -> None:
        """One file, replaced in one go: a kill leaves the old one or the new one."""
        note = json.dumps({"name": self.name, "step": self.step, "steps": self.steps, "seconds": self.seconds})
        replace_file(self.folder / "state.safetensors", save(self.tensors(), metadata={"training": note}))

    def load(self) -> None:
        note, parts = read_state(self.folder)
        if note["name"] != self.name:
            raise ValueError(f"{self.folder} holds the training of {note['name']}, not of {self.name}. Give another folder.")
        self.step, self.seconds = note["step"], note["seconds"]
        self.network.load_state_dict(parts["network"])
        self.average.load_state_dict(parts["average"])
        state = {int(key.partition(".")[2]): value for key, value in parts.items() if key.startswith("optimizer.")}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def clock_of(device: torch.device) -> Callable[[], float]:
    """The processor's time on a CPU; a GPU works beside that, and goes by the clock."""
    return time.process_time if device.type == "cpu" else time.monotonic


def written_steps(runs: Sequence[dict], usual: int) -> str:
    """How long each run was, and how large its batches where they were not as usual."""
    sizes = [run.get("batch", usual) for run in runs]
    parts = [f"{run['steps']:,}" + f" (of {size})" * (size != usual) for run, size in zip(runs, sizes, strict=True)]
    return f"{' and '.join(parts)} steps of {usual}"


def written_cost(runs: Sequence[dict]) -> str:
    """The minutes of all runs; a GPU's by the clock."""
    cost = {"CPU": 0.0, "GPU": 0.0}
    for run in runs:
        cost["CPU" if run.get("device", "cpu") == "cpu" else "GPU"] += run["seconds"] / 60
    return " and ".join(f"{minutes:.0f} {where} minutes" for where, minutes in cost.items() if minutes)


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def read_state(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The note and the tensors that a run has left."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / "state.safetensors", "pt") as file:
        note = json.loads(file.metadata()["training"])
        for key in file.keys():  # noqa: SIM118
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = file.get_tensor(key)
    return note, parts
