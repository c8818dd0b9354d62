"""Every pipeline class of diffusers: what becomes of it, for those that can be built offline from the tiny parts of the tests.

``python tests/bench/pipelines.py [NAME ...]`` prints a table. A class is built from the parts of one of the kinds in ``tests/pipelines.py``
that fit its constructor, called by itself first, and then made a base model of, whose answers are compared with the pipeline's own steps.
"""

import contextlib
import inspect
import io
import signal
import sys
import typing
import warnings
from pathlib import Path

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from more_pipelines import MORE
from pipelines import KINDS, image, mask
from test_pipelines import off, own_run

import sculpt

IMAGES = {"image", "control_image", "init_image", "reference_image", "map_image", "style_image", "subject_image"}
MOST = 40
"""seconds for a class: some make pictures of a size of their own choice"""


def classes() -> dict[str, type]:
    """That can be imported, by name; experimental copies and loaders of others left out."""
    found = {}
    for name in sorted(dir(diffusers)):
        with contextlib.suppress(Exception):
            cls = getattr(diffusers, name)
            if (
                isinstance(cls, type)
                and issubclass(cls, diffusers.DiffusionPipeline)
                and cls is not diffusers.DiffusionPipeline
            ):
                found[name] = cls
    return found


def fits(value, hint) -> bool:
    """Whether a part is of the class that a constructor is annotated with, as far as that can be told."""
    if isinstance(hint, type):
        return isinstance(value, hint) or not issubclass(hint, (diffusers.ModelMixin, diffusers.SchedulerMixin))
    options = typing.get_args(hint)
    return not options or any(fits(value, option) for option in options)


def parts(cls: type, families: dict[str, tuple[dict, dict]]):
    """Parts and call options of the first kind that fits the constructor; otherwise the reason."""
    own = {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name not in ("self", "args", "kwargs")}
    with contextlib.suppress(Exception):
        hints = typing.get_type_hints(cls.__init__)
    hints = locals().get("hints", {})
    needed = [name for name, p in own.items() if p.default is p.empty]
    lacking = {}
    for kind, (components, call) in families.items():
        components = dict(components)
        if (
            (wanted := hints.get("scheduler")) is not None
            and not fits(components.get("scheduler"), wanted)
            and isinstance(wanted, type)
        ):
            with contextlib.suppress(Exception):
                components["scheduler"] = wanted()  # its own, with its defaults
        have = components | dict.fromkeys(
            ("safety_checker", "feature_extractor", "image_encoder", "image_noising_scheduler", "watermarker")
        )
        lacking[kind] = [
            name for name in needed if name not in have or (have[name] is not None and not fits(have[name], hints.get(name)))
        ]
        if not lacking[kind]:
            chosen = {name: have[name] for name in own if name in have and (name in needed or have[name] is not None)}
            if "requires_safety_checker" in own:
                chosen["requires_safety_checker"] = False
            return kind, chosen, call
    kind = min(lacking, key=lambda kind: len(lacking[kind]))
    return None, ", ".join(lacking[kind]), {}


def calls_of(cls: type, call: dict):
    """Options that the pipeline's call takes, first without pictures that it can do without, then with them."""
    takes, side = inspect.signature(cls.__call__).parameters, call.get("height", 16)
    filled = {name: value for name, value in {"prompt": "a dog", **call}.items() if name in takes and name not in IMAGES}
    pictures = {name: image(side=side) for name in IMAGES} | {
        "mask_image": mask(side),
        "mask": mask(side),
        "last_image": image(1, side),
    }
    pictures |= {
        name: [image(k, side) for k in range(call.get("num_frames", 4))]
        for name in ("video", "conditioning_frames", "control_video")
    }
    pictures |= {
        "class_labels": [7],
        "source_prompt": "a cat",
        "strength": 0.8,
        "_auto_resize": False,
        "max_area": 256,
        "image_embeds": torch.zeros(1, 8),
    }
    for optional in (False, True):
        more = {
            name: pictures[name]
            for name, p in takes.items()
            if name in pictures
            and name not in filled
            and (p.default is p.empty or optional or name in ("_auto_resize", "max_area"))
        }
        yield filled | more


def families() -> dict[str, tuple[dict, dict]]:
    """The parts of every kind, and what it is called with."""
    found = {}
    for kind, build in KINDS.items():
        pipe, call = build()
        found[kind] = {**dict(pipe.components), **{k: v for k, v in pipe.config.items() if k == "boundary_ratio"}}, call
    for kind, build in MORE.items():
        try:
            found[kind] = build()
        except Exception as error:
            print(f"the parts of {kind} cannot be built: {type(error).__name__}: {error!s:.200}")
    return found


def row(name: str, cls: type, known: dict) -> tuple[str, str]:
    """What becomes of a class, in a word and a sentence."""
    kind, chosen, call = parts(cls, known)
    if kind is None:
        return "not built", f"no tiny {chosen}"
    failures = []
    for options in calls_of(cls, call):
        try:
            own = KINDS[kind]()[0].components if kind in KINDS else MORE[kind]()[0]  # parts of its own
            fresh = {n: own[n] if own.get(n) is not None and n != "scheduler" else v for n, v in chosen.items()}
            pipe = cls(**fresh)
            pipe.set_progress_bar_config(disable=True)
            steps, _ = own_run(pipe, options)
            break
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    else:
        return "not built", f"{kind}: {failures[0]}"
    if not steps:
        return "not built", f"{kind}: it never steps"
    try:
        generator = (
            {"generator": torch.Generator().manual_seed(0)} if "generator" in inspect.signature(cls.__call__).parameters else {}
        )
        model = sculpt.Diffusion.from_pipeline(pipe, **options, **generator)
    except Exception as error:
        return ("refused" if isinstance(error, ValueError) else "ERROR"), f"{kind}: {' '.join(str(error).split())[:260]}"
    with contextlib.suppress(Exception):
        worst = max(off(model, pipe.scheduler, step) for step in steps[1:])
        return ("works" if worst < 1e-5 else "WRONG"), f"{kind}: {worst:.0e}"
    return "works", f"{kind}: {model._learned.error:.0e} (its own check)"


class TooLong(BaseException):
    """Nobody takes this for an error of a pipeline."""


def too_long(*_):
    raise TooLong


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, too_long)
    diffusers.utils.logging.set_verbosity(100)
    known, table = families(), []
    for name, cls in classes().items():
        if names and name not in names:
            continue
        signal.alarm(MOST)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                result, why = row(name, cls, known)
        except TooLong:
            result, why = "not built", f"takes more than {MOST} s"
        finally:
            signal.alarm(0)
        table.append(result)
        print(f"| {name} | {result} | {why} |", flush=True)
    print({result: table.count(result) for result in sorted(set(table))})


if __name__ == "__main__":
    main(sys.argv[1:])
