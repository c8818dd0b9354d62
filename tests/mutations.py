"""What becomes of spoiled checkpoints: load thousands of them, and count right answers, clear errors and everything else.

    python tests/mutations.py gflownet --n 50000 --seed 0
    python tests/mutations.py gflownet --n 1 --seed 4711 --keep    # one case again, its folder is kept and named

A kind is a module ``mutated_KIND`` beside this one with ``FOLDERS`` (name -> function that writes a tiny one into an empty folder),
``SHIPPED`` (folders to copy, for one case in ten), ``load(folder)``, and ``use(loaded)``, so that nothing wrong hides in what loads.
A seed is a case. Workers are processes: one that takes too long or dies is replaced, and the case is counted.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import queue
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mutators import mutate

ROOT = Path(__file__).parents[1]
SECONDS, MEGABYTES, PATIENCE = 1.0, 200.0, 30.0
"""What reading may cost, and after how many seconds of waiting a case hangs."""
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
FAMILIAR = (str(ROOT / "sculpt"), str(ROOT / "tests"), str(Path(os.__file__).parent), sys.prefix)


@dataclass
class Case:
    """What became of one spoiled folder."""

    seed: int
    outcome: str
    """``fine``, ``clear`` (an error that says what is wrong), ``late`` (the same while it is used), ``ugly``, ``hang`` or ``killed``"""
    what: str = ""
    spoiled: list[str] = field(default_factory=list)
    seconds: float = 0.0
    megabytes: float = 0.0
    ran: list[str] = field(default_factory=list)
    """code of strangers"""

    @property
    def is_bad(self) -> bool:
        """Whether it has to be looked at."""
        return (
            self.outcome in ("ugly", "hang", "killed") or self.seconds > SECONDS or self.megabytes > MEGABYTES or bool(self.ran)
        )


class Bench:
    """Folders of one kind, spoiled and loaded one after the other in this process."""

    def __init__(self, kind: str):
        self.kind = importlib.import_module(f"mutated_{kind}")
        self.name, self.home = kind, Path(tempfile.mkdtemp(prefix="mutations-"))
        self.outside, self.events = self.home / "outside", collections.deque[str](maxlen=20)
        self.listening = False
        sys.addaudithook(self._hear)
        for name, make in self.kind.FOLDERS.items():
            (self.home / "whole" / name).mkdir(parents=True)
            make(self.home / "whole" / name)
            self.kind.use(
                self.kind.load(self.home / "whole" / name)
            )  # a whole one loads, and what it imports is not counted below
        for folder in self.kind.SHIPPED:
            self.kind.use(self.kind.load(folder))

    def _hear(self, event: str, arguments: Any) -> None:
        if self.listening and event in FORBIDDEN:
            self.events.append(f"{event} {arguments!s:.100}")

    def folder(self, seed: int) -> tuple[Path, list[str]]:
        """The folder of a case."""
        rng, folder = random.Random(f"{self.name} {seed}"), self.home / "case"
        shipped = seed % 10 == 9 and self.kind.SHIPPED
        source = rng.choice(self.kind.SHIPPED if shipped else [self.home / "whole" / name for name in self.kind.FOLDERS])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.outside, ignore_errors=True)
        self.outside.mkdir()
        (self.outside / "file").write_text("{}")
        shutil.copytree(source, folder)
        return folder, [source.name, *mutate(folder, self.outside, rng)]

    def case(self, seed: int) -> Case:
        """Spoil, load, use."""
        try:
            folder, spoiled = self.folder(seed)
        except Exception as error:
            return Case(seed, "ugly", f"the mutation itself failed: {error!r}")
        modules = set(sys.modules)
        self.events.clear()
        self.listening = True
        case = watch(partial(self.kind.load, folder), self.kind.use)
        case.seed, case.spoiled, self.listening = seed, spoiled, False
        case.ran = [*self.events, *_strangers(set(sys.modules) - modules)]
        if (self.home / "CANARY").exists() or sorted(path.name for path in self.outside.iterdir()) != ["file"]:
            case.ran.append("the folder outside was changed")
            shutil.rmtree(self.home / "CANARY", ignore_errors=True)
        return case

    def close(self) -> None:
        """Remove all folders."""
        shutil.rmtree(self.home, ignore_errors=True)


def watch(load: Callable[[], Any], use: Callable[[Any], Any] = str) -> Case:
    """What becomes of a load, and what it costs."""
    case, loaded = Case(0, "fine"), False
    before, started = _memory(reset=True), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load()
            case.seconds, case.megabytes, loaded = time.process_time() - started, _memory() - before, True
            use(model)
    except BaseException as error:  # SystemExit is among what must not happen
        if not loaded:
            case.seconds, case.megabytes = time.process_time() - started, _memory() - before
        case.outcome, case.what = _judge(error, loaded)
    return case


def _judge(error: BaseException, loaded: bool) -> tuple[str, str]:
    """Clear is a sentence that sculpt itself says."""
    frames = traceback.extract_tb(error.__traceback__)
    last, ours = frames[-1], next((f for f in reversed(frames) if f.filename.startswith(str(ROOT / "sculpt"))), frames[-1])
    text = str(error)
    if type(error) in (ValueError, ImportError, FloatingPointError) and last is ours and " " in text and 20 < len(text) < 3000:
        return ("late" if loaded else "clear"), text
    place = f"{Path(ours.filename).name}:{ours.lineno} {ours.name} < {Path(last.filename).name}:{last.lineno}"
    return "ugly", f"{'used: ' if loaded else ''}{type(error).__name__} at {place}: {text:.200}"


def _memory(reset: bool = False) -> float:
    """Megabytes: what is used, or since the last reset the most that was."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS" if reset else "VmHWM"].split()[0]) / 1024


def _strangers(modules: set[str]) -> list[str]:
    """Modules that are nobody's we know, or that run when they are imported."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) or "" for name in modules}
    return [name for name, file in files.items() if (file and not file.startswith(FAMILIAR)) or name.endswith("__main__")]


# The runner


def _serve(kind: str) -> None:
    """A worker: seeds come in, cases go out, a line each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    bench = Bench(kind)
    out.write(f"{bench.home}\n")
    for line in sys.stdin:
        out.write(json.dumps(asdict(bench.case(int(line)))) + "\n")
    bench.close()


class Worker:
    """A process with a bench, started again when it has to be."""

    def __init__(self, kind: str):
        self.kind = kind
        self.start()

    def start(self) -> None:
        """A new process."""
        command = [sys.executable, str(Path(__file__)), self.kind, "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.home = self.process.stdout.readline().strip()
        if not self.home:
            raise SystemExit(f"The worker for {self.kind} does not start: run it by hand, {' '.join(command)}")

    def case(self, seed: int) -> Case:
        """What became of a case, whatever it was."""
        self.process.stdin.write(f"{seed}\n")
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return Case(**json.loads(line))
        outcome = "killed" if ready else "hang"
        self.stop()
        self.start()
        return Case(seed, outcome)

    def stop(self) -> None:
        """End it, and remove its folders."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)


def run(kind: str, seeds: range, workers: int = 1) -> list[Case]:
    """All cases; those that are bad are printed as they come."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    cases: list[Case] = []
    for seed in seeds:
        todo.put(seed)

    def work() -> None:
        worker = Worker(kind)
        while True:
            try:
                case = worker.case(todo.get_nowait())
            except queue.Empty:
                return worker.stop()
            cases.append(case)
            if case.is_bad:
                print(
                    f"seed {case.seed}: {case.outcome} {case.what} {case.seconds:.2f} s {case.megabytes:.0f} MB {case.ran} {case.spoiled}",
                    flush=True,
                )
            if len(cases) % 1000 == 0:
                print(summary(cases), flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return cases


def summary(cases: list[Case]) -> str:
    """The counts in one line."""
    outcomes = collections.Counter(case.outcome for case in cases)
    counts = ", ".join(f"{name} {outcomes[name]}" for name in ("fine", "clear", "late", "ugly", "hang", "killed"))
    slow, large, ran = (sum(map(is_so, cases)) for is_so in (
        lambda case: case.seconds > SECONDS, lambda case: case.megabytes > MEGABYTES, lambda case: bool(case.ran)))  # fmt: skip
    worst = f"at most {max(case.seconds for case in cases):.2f} s and {max(case.megabytes for case in cases):.0f} MB"
    return (
        f"{len(cases)} cases: {counts}, over {SECONDS:g} s {slow}, over {MEGABYTES:g} MB {large}, code executed {ran} ({worst})"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the folder of the one case and show its whole error")
    parser.add_argument("--messages", action="store_true", help="show how errors begin, and how often")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.kind)
        return 0
    if options.keep:
        bench = Bench(options.kind)
        folder, spoiled = bench.folder(options.seed)
        print(folder, spoiled, flush=True)
        bench.kind.use(bench.kind.load(folder))
        return 0
    cases = run(options.kind, range(options.seed, options.seed + options.n), options.workers)
    if options.messages:
        said = collections.Counter((case.outcome, case.what.replace(str(case.seed), "")[-100:]) for case in cases)
        for (outcome, what), count in said.most_common(100):
            print(f"{count:6d} {outcome} {what}")
    print(summary(cases))
    return int(any(case.is_bad for case in cases))


if __name__ == "__main__":
    sys.exit(main())
