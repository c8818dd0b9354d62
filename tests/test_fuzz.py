"""Noise as input: formulas in text, SMILES and the command's arguments are read right, or refused by an error that sculpt raised itself."""

import contextlib
import dis
import io
import json
import os
import random
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from checkpoints import save_pipeline
from gflownet_models import ENVIRONMENTS, network_policy
from molecule_models import molecule_classifier, molecule_model
from rdkit import Chem

import sculpt
from sculpt.apps import cli
from sculpt.apps.formulas import DEEPEST, FUNCTIONS, LONGEST, TextFormula
from sculpt.chain import Chain
from sculpt.diffusion.chains import NoisyChain
from sculpt.model import BaseModel
from sculpt.molecules import QED, SA, SEH
from sculpt.molecules.seh import STUDENT


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Without the type checker of the tests, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PACKAGE = str(Path(sculpt.__file__).parent)
NAMES = ("a", "b", "c")


def clear(error):
    """Whether sculpt raised this itself, on purpose, and says something."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return code.co_filename.startswith(PACKAGE) and raised and len(str(error)) > 20


# Formulas ---------------------------------------------------------------------------------------------------------------------


class Named(BaseModel):
    """Only its name counts."""

    device, shape = torch.device("cpu"), (2,)

    def __init__(self, name):
        self.name = self.key = name

    def check_composable(self, other):
        pass

    def stream(self, n, road, settings):
        raise NotImplementedError


MODELS = {name: Named(name) for name in NAMES}
WORDS = [
    *NAMES,
    *FUNCTIONS,
    *"|&-+*/%^~@()[]{},.:;=!<>'\"\\# \t\n",
    "0",
    "1",
    "2",
    "1e400",
    "1_0",
    "0x1f",
    "1j",
    "١",
    "²",
    "é",
    "∞",
    "\0",
]
WORDS += [
    "\ud800",
    "\u202e",
    "𝒶",
    "ﬁ",
    "if",
    "else",
    "lambda",
    "not",
    "in",
    "is",
    "None",
    "True",
    "nan",
    "inf",
    "await",
    "**",
    ":=",
    "f'{a}'",
]
WORDS += [
    "labels",
    "odds=",
    "weights=",
    "powers=",
    "exponent=",
    "models=",
    "...",
    "__import__",
    "a.b",
    "a[0]",
    "\x0c",
    "b''",
    "1" * 400,
]


def model_text(r, depth):
    """A formula as the grammar has it, with arguments that fit more often than not."""
    if depth <= 0 or r.random() < 0.3:
        return r.choice(NAMES)
    if r.random() < 0.6:
        return f"({model_text(r, depth - 1)}{r.choice([' | ', ' & ', ' - ', '&', '-'])}{model_text(r, depth - 1)})"
    models = [model_text(r, depth - 2) for _ in range(r.randint(1, 4))]
    listed, numbers = f"[{', '.join(models)}]", [number_text(r) for _ in models]
    labels = [str(r.randrange(len(models))) for _ in range(r.randint(1, 3))]
    return r.choice(
        [
            f"mixture({', '.join(models)}{r.choice(['', f', weights=[{chr(44).join(numbers)}]'])})",
            f"harmonic_mean({', '.join(models[:2])}, {number_text(r)})",
            f"contrast({', '.join(models)}, odds={number_text(r)})",
            f"posterior({listed}, [{', '.join(labels)}]{r.choice(['', f', odds=[{chr(44).join(numbers)}]'])})",
            f"product({listed}, [{', '.join(numbers)}])",
            f"power_mean({listed}, {number_text(r)}{r.choice(['', f', ({chr(44).join(numbers)},)'])})",
            f"{r.choice(FUNCTIONS)}({', '.join(r.sample([*models, *numbers, listed], r.randint(0, 3)))})",
        ]
    )


def number_text(r):
    if r.random() < 0.8:
        return r.choice(["1", "0.5", "2"])
    return r.choice(
        [
            "1",
            "0.5",
            "-1",
            "2",
            "0",
            "1e-3",
            "-0.25",
            "+3",
            "--1",
            "1e6",
            "1e999",
            "-1e-320",
            "10",
            "1e30",
            str(r.uniform(-3, 3)),
        ]
    )


def noisy(r, text, words):
    """The text with a few characters taken out, put in, doubled or exchanged."""
    for _ in range(r.choice([0, 1, 1, 2, 3, 8])):
        i, j = sorted(r.choices(range(len(text) + 1), k=2))
        text = r.choice(
            [
                text[:i] + text[i + 1 :],
                text[:i] + r.choice(words) + text[i:],
                text[:j] + text[i:j] + text[j:],
                text[:i] + text[j:],
                text[:i] + r.choice(words) + text[j:],
            ]
        )[:2000]
    return text


def formula_text(r):
    kind = r.random()
    if kind > 0.7:
        return model_text(r, r.randint(0, 5))
    if kind < 0.1:
        return "".join(r.choices(WORDS, k=r.randint(0, 20)))
    if kind < 0.12:
        part = r.choice(
            ["(", "[", "-", "- ", "~", "not ", "a & ", "a & (", "mixture(", "a.", "a[", "a if a else ", "lambda:", "{"]
        )
        return part * r.choice([10, DEEPEST, 1000, LONGEST]) + r.choice(["", "a", "1", ")"])
    return noisy(r, model_text(r, r.randint(0, 5)), WORDS)


def fuzz_formulas(n, seed):
    r, found, slowest = random.Random(seed), Counter(), 0.0
    TextFormula("mixture(a)").compose(MODELS)  # what is imported when it is first used
    for _ in range(n):
        text, began = formula_text(r), time.process_time()
        try:
            formula = TextFormula(text, NAMES)
            model = formula.compose(MODELS)
            assert isinstance(model, BaseModel) and set(formula.names) <= set(NAMES) and str(model).isprintable()
            found["composed"] += 1
        except (ValueError, TypeError) as error:
            assert clear(error), (text, error)
            found["refused"] += 1
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 1, slowest
    return found, slowest


@pytest.mark.filterwarnings("ignore")
def test_whatever_a_formula_says_it_is_composed_or_refused_by_a_clear_error():
    found, _ = fuzz_formulas(3_000, 0)
    assert min(found["composed"], found["refused"]) > 300


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_million_formulas_are_composed_or_refused_by_a_clear_error():
    began = time.perf_counter()
    print("formulas", fuzz_formulas(1_000_000, 1), f"{time.perf_counter() - began:.0f} s")


# SMILES -----------------------------------------------------------------------------------------------------------------------

ODD = [
    "*",
    "N->[Cu]",
    "[Pt]",
    "C~C",
    "C$C",
    "[U]",
    "",
    " ",
    ">>",
    "[H]",
    "[2H]",
    "[Zz]",
    "[CH8]",
    "C:C",
    "\ud800",
    "\0",
    "é",
    "[Cu]<-N",
    "|$;$|",
]
TOKENS = [*"CNOPSFBIcnops()[]=#$:~.-+/\\@123456789%*H", "Cl", "Br", "[nH]", "[O-]", "[N+]", "%12", "[C@@H]", "->", "<-", *ODD]


def smiles_texts():
    """Fragments of the vocabulary, and drugs that hold most of what SMILES can say."""
    own = [smiles for smiles, _ in json.loads((Path(PACKAGE) / "molecules" / "vocabulary.json").read_text())]
    return [
        *own,
        "CC(=O)Oc1ccccc1C(=O)O",
        "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
        "CC(C)Cc1ccc(cc1)[C@@H](C)C(=O)O",
        "[Na+].[Cl-]",
        "C1CC1",
    ]


def molecule_of(r, texts):
    kind = r.random()
    if kind < 0.03:
        return r.choice([None, 3, b"CC", "C" * 500, Chem.MolFromSmiles("C" * 30)])
    text = ".".join(r.choices(texts, k=2)) if kind < 0.1 else r.choice(ODD) if kind < 0.15 else r.choice(texts)
    text = text if kind > 0.8 else noisy(r, text, TOKENS)[:300]
    if kind < 0.3:
        with contextlib.suppress(UnicodeEncodeError):
            return Chem.MolFromSmiles(text, sanitize=kind < 0.25)
    return text


def fuzz_molecules(n, seed, batch=128):
    r, found, slowest, texts = random.Random(seed), Counter(), 0.0, smiles_texts()
    rewards = [SEH(STUDENT), SA(), QED()]
    for _ in range(0, n, batch):
        molecules = [molecule_of(r, texts) for _ in range(batch)]
        for reward in rewards:
            began = time.process_time()
            values, odd = reward.rate(molecules)
            slowest = max(slowest, (time.process_time() - began) / batch)
            assert values.isfinite().logical_not().nonzero().flatten().tolist() == sorted(odd), (molecules, odd)
            assert all(odd.values()) and reward.invalid == len(odd)
            found[type(reward).__name__] += batch - len(odd)
        found["molecules"] += batch
    return found, slowest


def test_whatever_a_molecule_is_rewards_are_numbers_or_nan_with_a_reason():
    found, _ = fuzz_molecules(1024, 0)
    assert 0.2 < found["SEH"] / found["molecules"] <= found["QED"] / found["molecules"] < 0.9


@pytest.mark.slow
def test_a_hundred_thousand_molecules_have_rewards_or_a_reason():
    began = time.perf_counter()
    print("molecules", fuzz_molecules(100_096, 1), f"{time.perf_counter() - began:.0f} s")


# The command --------------------------------------------------------------------------------------------------------------------

LETTERS = [*"abcxyz019-=.,:&|()[]'\"{}<>*?~$%#@! ", "²", "é", "⊗", "\ud800", "\0", "\n", "--", "nan", "1e999", "ﬁ", "None"]
VALUES = [
    "",
    "0",
    "1",
    "-1",
    "2",
    "2.5",
    "²",
    "9" * 30,
    "9" * 5000,
    "1e3",
    "nan",
    "inf",
    "-inf",
    "None",
    "True",
    "a",
    "b",
    "c",
    "a & b",
]
VALUES += [
    "seh",
    "cpu",
    "cuda",
    "cuda:99",
    "meta",
    "mps",
    "xla",
    "nonsense",
    "float16",
    "float64",
    "out.npz",
    "out.png",
    "out/",
    "folder",
    ".",
]
VALUES += [
    "models",
    "models/a",
    "models/a/unet",
    "models/none",
    "owner/name",
    "a=models/b",
    "a=",
    "=b",
    "a.beta=3",
    "beta=[[[",
    "seh=3",
]
VALUES += [
    "x" * 5000,
    "\ud800",
    "a\0b",
    "\n",
    "--",
    "-",
    "if=models/a",
    "a=models/ab",
    "models/ab",
    "device=3",
    "~/x",
    "~nobody/x",
]
OPTIONS = [
    "-n",
    "-o",
    "-h",
    "--help",
    "--version",
    "--traceback",
    "--model",
    "--with",
    "--dtype",
    "--device",
    "--seed",
    "--classifier",
    "--correct",
]
OPTIONS += [
    "--correct-densities",
    "--particles",
    "--batch-size",
    "--anchor",
    "--strength",
    "--reject",
    "--steps",
    "--beta",
    "--no-classifier",
]
OPTIONS += [
    "--rewards",
    "--shards",
    "--shard",
    "--observations",
    "--odds",
    "--samples",
    "--output",
    "--se",
    "--cor",
    "--nonsense",
    "--seed=3",
]
RIGHT = [
    ["sample", "a & b", "--model", "a=models/a", "--model", "b=models/b", "-n", "3", "--steps", "4", "-o", "out.npz"],
    ["sample", "a & b", "--model", "a=models/a", "--model", "b=models/b", "--classifier", "models/ab", "--steps", "4", "-o", "out.png"],
    ["sample", "a - b", "--model", "a=models/a", "--model", "b=models/b", "--classifier", "models/ab", "--correct", "--particles", "8",
     "-n", "3", "--anchor", "a", "--strength", "1.5", "--steps", "4", "-o", "out.safetensors"],
    ["sample", "a & b", "--model", "a=models/a", "--model", "b=models/b", "--classifier", "models/ab", "--reject", "--dtype", "float32",
     "--device", "cpu", "--seed", "3", "--batch-size", "4", "--steps", "4", "-o", "shards/"],
    ["sample", "(p | q) - p", "--model", "p=models/p", "--model", "q=models/q", "-n", "3", "--particles", "8", "-o", "out.npz"],
    ["sample", "product([p, q], [1, 0.5])", "--model", "p=models/p", "--model", "q=models/q", "--shard", "2", "-o", "index/"],
    ["sample", "p & q", "--model", "p=models/p", "--model", "q=models/q", "--reject", "-n", "3", "-o", "out.npz"],
    ["fit", "--model", "a=models/a", "--model", "b=models/b", "-o", "fitted", "--steps", "2", "--batch-size", "4", "--samples", "20"],
    ["fit", "--model", "p=models/p", "--model", "q=models/q", "-o", "fitted", "--observations", "3", "--odds", "--seed", "1"],
    ["molecules", "seh & sa", "--beta", "32", "-n", "4", "--rewards", "sa,qed", "-o", "out.csv"],
    ["molecules", "hot - seh", "--model", "hot=pretrained/molecules/seh", "--beta", "hot=9", "--beta", "seh=3", "--no-classifier",
     "--rewards", "qed", "-o", "out.sdf"],
    ["molecules", "seh", "--beta", "32", "-n", "4", "--shards", "--shard", "2", "--rewards", "sa", "-o", "library"],
    ["inspect", "models/a"],
    ["inspect", "pretrained/molecules/seh", "--with", "beta=32"],
    ["demo", "discs", "-o", "demo", "--seed", "1"],
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with tiny models of every family, and classifiers of some of them."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate("ab"):
        save_pipeline(home / "models" / name, seed)
    env = ENVIRONMENTS["grid-2d"]()
    for seed, name in enumerate("pq"):
        sculpt.GFlowNet(env, network_policy(env, seed), name=name).save_pretrained(home / "models" / name)
    shelf = home / "pretrained" / "molecules"
    for seed, name in enumerate(("seh", "sa")):
        molecule_model(seed, name).save_pretrained(shelf / name)
    models = [sculpt.load(home / "models" / name) for name in "ab"]
    sculpt.fit(models, steps=2, batch_size=4, samples=20, checkpoint=home / "models" / "ab", progress=False)
    molecule_classifier(*(sculpt.load(shelf / name, beta=32) for name in ("seh", "sa"))).save_pretrained(shelf / "seh-sa")
    return home


@pytest.fixture
def command(home, tmp_path, monkeypatch):
    """The command in a copy of that directory, with small populations and trainings; numbers of several digits and paths to elsewhere
    become others, and what no shell can pass is left out."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    fit = sculpt.fit
    least = {"steps": 2, "samples": 20, "batch_size": 4}
    monkeypatch.setattr(sculpt, "fit", lambda *models, **options: fit(*models, **(options | least), progress=False))
    monkeypatch.setattr(Chain, "particles", lambda chain, n: max(n, 8))
    monkeypatch.setattr(NoisyChain, "particles", lambda chain, n: max(n, 8))
    monkeypatch.setattr(cli.molecules, "_shelves", lambda part: [Path("pretrained") / part])
    monkeypatch.setattr(cli.molecules, "POLICIES", dict.fromkeys(cli.molecules.POLICIES, "molecules"))
    for part in cli.demo.PARTS:
        monkeypatch.setitem(
            sys.modules, f"sculpt.apps.demos.{part}", SimpleNamespace(run=lambda output, seed: print(output, seed))
        )

    def run(arguments):
        for left in set(os.listdir()) - {"models", "pretrained"}:
            shutil.rmtree(left) if os.path.isdir(left) else os.remove(left)
        if files() != before:  # an output by the name of a model
            for folder in ("models", "pretrained"):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(home / folder, folder)
        return cli.main(
            [
                re.sub(r"(?<!\d)\d{2,18}(?!\d)", "7", re.sub(r"\.\.+", ".", one)).lstrip("/")
                for one in arguments
                if "\0" not in one
            ]
        )

    def files():
        return {path: path.stat().st_size for path in sorted(Path().rglob("*/*")) if path.is_file()}

    before = files()
    return run


def arguments(r):
    """The arguments of a command with a few mistakes, or none."""
    argv = list(r.choice(RIGHT))
    for _ in range(r.choice([0, 1, 1, 1, 1, 2, 2, 5])):
        argv = argv or [""]
        i, j = r.randrange(len(argv)), r.randrange(len(argv))
        if r.random() < 0.7:  # another value for an option, which mostly leaves the others as they were
            i, j = (r.choice([k for k, one in enumerate(argv) if k and not one.startswith("-")] or [0]) for _ in "ij")
            change = r.choice(["other", "noise", "swap"])
        else:
            change = r.choice(["option", "value", "other", "drop", "noise", "both", "swap"])
        if change == "option":
            argv.insert(i, r.choice(OPTIONS))
        elif change == "value":
            argv.insert(i, r.choice(VALUES))
        elif change == "noise":
            argv[i] = noisy(r, argv[i], LETTERS)
        elif change == "swap":
            argv[i], argv[j] = argv[j], argv[i]
        else:
            argv[i : i + 1] = {"other": [r.choice(VALUES)], "drop": [], "both": [r.choice(OPTIONS), r.choice(VALUES)]}[change]
    return argv


def fuzz_commands(command, n, seed):
    r, found, slowest = random.Random(seed), Counter(), (0.0, [])
    for _ in range(n):
        argv = arguments(r)
        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            try:
                code = command([*argv[:1], "--traceback", *argv[1:]])
            except SystemExit as end:  # argparse: help, or a wrong argument
                code = end.code
                assert "sculpt: error:" in said.getvalue() or code == 0 and said.getvalue(), argv
            except cli.EXPECTED as error:
                code = "refused"
                assert clear(error) or isinstance(error, OSError), f"{error!r:.200} of {shlex.join(argv):.2000}"
        assert code in (0, 2, "refused"), argv
        found[code] += 1
        slowest = max(slowest, (time.process_time() - began, argv))
    return found, slowest


def test_whatever_the_arguments_are_the_command_works_or_says_what_is_wrong(command):
    found, _ = fuzz_commands(command, 60, 0)
    assert min(found.values()) > 5


@pytest.mark.slow
def test_ten_thousand_commands_work_or_say_what_is_wrong(command):
    began = time.perf_counter()
    print("commands", fuzz_commands(command, 10_000, 1), f"{time.perf_counter() - began:.0f} s")
