r"""What strings are worth, computed in processes of their own: the rewards of a batch, and those of MOSES.

A string that is no molecule has the reward ``FLOOR``, and no molecule has less. So :math:`R^\beta` is a target for all strings.
"""

import math
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save
from tokens import decode
from torch import Tensor

from sculpt.files import replace_file
from sculpt.molecules import QED, SA, SEH
from sculpt.weights import read_tensors

REWARDS = {"seh": SEH, "sa": SA, "qed": QED}
FLOOR = 0.01
CHUNK = 128

_rewards = {}


def _start(names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    _rewards.update({name: REWARDS[name]() for name in names})


def _rate(name: str, smiles: list[str]) -> list[float]:
    return _rewards[name].rate(smiles)[0].tolist()


class Workers:
    """Processes that compute rewards; none of them touches a GPU."""

    def __init__(self, *names: str, count: int = 1):
        self.names, self.count = names, count
        # An untouched interpreter each: a fork would copy the threads' locks and the GPU's handles.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, context, initializer=_start, initargs=(names,))
        for _ in range(count):  # they start now, and take their time
            self.pool.submit(_rate, names[0], [])

    def begin(self, x: Tensor, name: str | None = None) -> list[Future]:
        smiles = decode(x)
        return [self.pool.submit(_rate, name or self.names[0], smiles[i : i + CHUNK]) for i in range(0, len(x), CHUNK)]

    @staticmethod
    def end(begun: list[Future]) -> Tensor:
        """The rewards, NaN for what is no molecule."""
        return torch.tensor([reward for part in begun for reward in part.result()])

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def log_reward(R: Tensor) -> Tensor:
    return R.nan_to_num(FLOOR).clamp(min=FLOOR).log()


# Of MOSES


def order(n: int) -> Tensor:
    """The rows of MOSES in the order in which they are scored: a random one."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def score(x: Tensor, folder: Path, rows: int, minutes: float, workers: int) -> None:
    """The rewards of so many rows of MOSES, or of those that fit into the time; a killed run goes on where it stopped."""
    x, until = x[order(len(x))[:rows]], time.monotonic() + 60 * minutes
    have, step = {name: known(name, folder) for name in REWARDS}, 16 * CHUNK * workers
    with Workers(*REWARDS, count=workers) as pool:
        done, saved = min(map(len, have.values())), time.monotonic()
        waiting = {name: pool.begin(x[done : done + step], name) for name in REWARDS}
        while done < len(x):
            begun, done = waiting, min(done + step, len(x))
            waiting = {name: pool.begin(x[done : done + step], name) for name in REWARDS if done < len(x)}
            for name, part in begun.items():
                R = pool.end(part)
                have[name] = torch.cat([have[name][: done - len(R)], R])
            late = time.monotonic() > until
            if late or done == len(x) or time.monotonic() > saved + 20:
                for name, R in have.items():
                    folder.mkdir(parents=True, exist_ok=True)
                    replace_file(folder / f"{name}.safetensors", save({"R": R}))
                saved = time.monotonic()
                print("scores", f"{done:,} of {len(x):,} molecules", flush=True)
            if late:
                break


def known(name: str, folder: Path) -> Tensor:
    """The rewards of the first rows, as far as they are computed."""
    path = folder / f"{name}.safetensors"
    return read_tensors(path)["R"] if path.is_file() else torch.zeros(0)


def log_mean_power(log_R: Tensor, beta: float) -> float:
    r""":math:`\log E[R^\beta]` under MOSES: where the policy's log Z begins."""
    return float(torch.logsumexp(beta * log_R.double(), 0)) - math.log(len(log_R))
