"""Nothing is lost: whatever goes wrong at whichever operation on the disk, a reader finds the old content or the new, and a job goes on."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoints import save_pipeline
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_models import exact_model, three_rings
from faults import HEAD, Scenario, Trial, debris, forked, hashes
from gflownet_models import network_policy, perfect
from gfn.gym import HyperGrid
from molecule_models import molecule_model

import sculpt
import sculpt.files
import sculpt.training
from sculpt.actions.networks import GridNetwork
from sculpt.classifier.fit import Descent
from sculpt.diffusion.backbones import VectorNetwork
from sculpt.files import create_file, remove_debris, replace_file, replacing, settled
from sculpt.library import Library
from sculpt.molecules import SEH, Molecules
from sculpt.molecules.seh import STUDENT
from sculpt.samples import Samples
from sculpt.training import Training, read_state

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("pretrained", "pretrained/digits")]

import base_samples
import judge
import recipes

ROOT = Path(__file__).parents[1] / "pretrained"
CLOCK = itertools.count(0, 1000)
STILL = types.SimpleNamespace(monotonic=lambda: next(CLOCK), process_time=lambda: 0.0)
"""A clock by which every state is saved at once, and nothing costs anything."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(module):
    return [(name, value.tolist()) for name, value in module.state_dict().items()]


# Checkpoints


def grid(seed):
    env = HyperGrid(ndim=2, height=5, validate_modes=False)
    return sculpt.GFlowNet(env, network_policy(env, seed), name="grid")


@functools.cache
def classifier(seed):
    torch.manual_seed(seed)
    return sculpt.Classifier(VectorNetwork(2, width=4, depth=1), ["a", "b"], 2).eval()


def others(root):
    """Files that are nobody's business."""
    (root / "training").mkdir()
    (root / "training" / "state.safetensors").write_bytes(b"state")
    (root / "README.md").write_text("notes\n")


def with_old_classifier(root):
    others(root)
    classifier(0).save_pretrained(root)


def of_classifier(root):
    found = sculpt.load(root)
    return tensors(found), found.config, sorted(path.name for path in root.iterdir())


def of_policy(root):
    model = sculpt.load(root / "grid")
    return tensors(model.policy), model.key


def pipeline(root):
    with replacing(root) as new:
        torch.manual_seed(1)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        unet = UNet2DModel(8, 1, 1, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, **blocks)
        DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(new)


def with_old_pipeline(root):
    """Of other sizes, with a file more in a part."""
    others(root)
    save_pipeline(root)
    (root / "unet" / "more").mkdir()
    (root / "unet" / "more" / "notes.txt").write_text("old\n")


def other_pipeline(root):
    with replacing(root) as new:
        save_pipeline(new, seed=1)


def with_pending_pipeline(root):
    """A process was killed after its commit."""
    with_old_pipeline(root)
    with mock.patch.object(sculpt.files, "_finish"):
        pipeline(root)


def of_pipeline(root):
    model = sculpt.load(root)
    return tensors(model.model), sorted(model.scheduler.config.items()), sorted(map(str, (root / "unet").rglob("*")))


CHECKPOINTS = [
    Scenario("first checkpoint of a GFlowNet", lambda root: grid(1).save_pretrained(root / "grid"), of_policy),
    Scenario(
        "GFlowNet over another",
        lambda root: grid(1).save_pretrained(root / "grid"),
        of_policy,
        lambda root: grid(0).save_pretrained(root / "grid"),
    ),
    Scenario("classifier over another", lambda root: classifier(1).save_pretrained(root), of_classifier, with_old_classifier),
    Scenario("diffusers pipeline over another", pipeline, of_pipeline, with_old_pipeline),
    Scenario("reading what a killed process saved", of_pipeline, of_pipeline, with_pending_pipeline),
    Scenario("saving over what a killed process saved", other_pipeline, of_pipeline, with_pending_pipeline),
]


# Trainings


@functools.cache
def tables():
    return perfect(HyperGrid(ndim=2, height=5, validate_modes=False), 2)


@functools.cache
def rings():
    return [exact_model(mixture, name=name) for mixture, name in zip(three_rings()[:2], "pq", strict=True)]


def fit_policies(root):
    torch.manual_seed(0)
    network = GridNetwork(2, 5, 4, width=4)
    options = {"samples": 32, "steps": 4, "batch_size": 4, "network": network, "progress": False}
    sculpt.fit(tables(), checkpoint=root, descent=Descent(patience=None), **options)


def fit_points(root):
    torch.manual_seed(0)
    network = VectorNetwork(2, width=4, depth=1)
    options = {"samples": 12, "sample_steps": 2, "steps": 3, "batch_size": 4, "network": network, "progress": False}
    sculpt.fit(rings(), checkpoint=root, descent=Descent(patience=None), **options)


def of_training(root):
    """The state, and the classifier or that it is not finished."""
    if not (root / "training" / "state.safetensors").exists():
        raise ValueError("There is no state.")
    note, parts = read_state(root / "training")
    state = sorted((part, name, value.tolist()) for part, of in parts.items() for name, value in of.items())
    try:
        return note, state, of_classifier(root)
    except ValueError as error:
        assert "is not finished" in str(error)
        return note, state


TRAININGS = [
    Scenario("fit of GFlowNets", fit_policies, of_training, steps=[(Training, "save")]),
    Scenario("fit of diffusion models", fit_points, of_training, steps=[(Training, "save")]),
]


# Results


@functools.cache
def points(seed):
    return Samples(randn(6, 2, seed=seed), randn(6, seed=seed + 1).log_softmax(0))


@functools.cache
def policies():
    return molecule_model(0, "p"), molecule_model(1, "q")


@functools.cache
def molecules(seed):
    made = policies()[seed].sample(6, generator=torch.Generator().manual_seed(0), progress=False)
    assert isinstance(made, Molecules)
    return made


def of_bytes(root):
    return [path.read_bytes() for path in sorted(root.iterdir()) if not path.name.startswith(".")]


def of_samples(root):
    samples = Samples.load(root / "samples.safetensors")
    return samples.x.tolist(), samples.log_weights.tolist()


def shards_of_points(root):
    model, _ = rings()
    sculpt.generate(model, 6, root / "library", shard=2, steps=2, progress=False)


def shards_of_molecules(root):
    sculpt.generate(policies()[0], 6, root / "library", shard=2, rewards=["sa"], progress=False)


def of_library(root):
    library = Library(root / "library")
    tables = [{name: values.tolist() for name, values in table.items()} for table in library.tables()]
    return library.settings, library.missing, tables


def saves(make, name, load=of_bytes):
    """Samples over other samples."""
    return Scenario(name, lambda root: make(1).save(root / name), load, lambda root: make(0).save(root / name))


LIBRARIES = [(Library, "claim"), (Library, "write")]
RESULTS = [
    saves(points, "samples.safetensors", of_samples),
    saves(points, "samples.npz"),
    saves(points, "samples.png"),
    saves(molecules, "molecules.csv"),
    saves(molecules, "molecules.parquet"),
    Scenario("library of points", shards_of_points, of_library, steps=LIBRARIES),
    Scenario("library of molecules", shards_of_molecules, of_library, steps=LIBRARIES),
]


# Recipes


def recipe(path, **constants):
    """A recipe of ``pretrained/`` made small."""
    name = f"small_{path.replace('/', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{path}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    for constant, value in constants.items():
        setattr(sys.modules[name], constant, value)
    return sys.modules[name]


def of_folder(name, load=sculpt.load):
    """Every byte of it, and it can be loaded."""

    def read(root):
        with settled(root / name) as folder:
            files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        if not {"config.json", "model_index.json"} & files.keys():
            raise ValueError("There is no checkpoint yet.")
        load(root / name)
        return files

    return read


def train_grid(root):
    recipe("grid/recipe", BATCH=8, time=STILL).train("circle3", 2, root)


def fit_grid(root):
    torch.manual_seed(0)
    sets = {"pair": {"models": ["circle1", "circle2"], "observations": 2, "odds": False}}
    options = {"steps": 1, "batch_size": 4, "samples": 16, "network": GridNetwork(2, 32, 4, width=4)}
    module = recipe("grid/recipe", SETS=sets, time=STILL)
    module.classifier_card = lambda classifier, models, folder, seconds: recipes.card(folder, f"{seconds}", "", {})
    module.fit_classifier("pair", root, **options)


def drawn_digits(split="train"):
    """Every digit a few times, a bar whose length is the digit."""
    label = torch.arange(40) % 10
    grey = torch.zeros(40, 32, 32, dtype=torch.uint8)
    for i, digit in enumerate(label.tolist()):
        grey[i, 8 : 12 + 2 * digit, 10 + i // 20 : 16] = 255
    return grey, label


def digits():
    small = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4}
    base_samples.CHUNK, base_samples.STEPS, base_samples.time = 12, 2, STILL
    judge.mnist, judge.BATCH, judge.SPOILT = drawn_digits, 16, 8
    judge.reference.__globals__["_real"].cache_clear()
    return recipe("digits/recipe", NETWORK=small, BATCH=4, mnist=drawn_digits, time=STILL)


def quiet(made):
    """Every step is saved, and none looked at."""
    made.picture, made.evaluate = lambda *_: None, dict
    recipes.train(made, report=100, check=100)
    return made


def with_trunk(root):
    made = quiet(digits().Recipe("trunk", 1, root / "state"))
    made.training.save()


def with_digits(root):
    with_trunk(root)
    quiet(digits().Recipe("green", 1, root / "state")).finish(root / "green")


def train_digits(root):
    quiet(digits().Recipe("green", 2, root / "state")).finish(root / "green")


def more_digits(root):
    quiet(digits().Recipe("green", 2, root / "state", folder=root / "green")).finish(root / "green")


def with_judge(root):
    with_digits(root)
    torch.manual_seed(0)
    judge.Judge((8, 8)).save_pretrained(root / "judge")


def card_of_digits(root):
    digits().HERE = root
    digits().write_card(root / "green", 4, root / "state")


def train_judge(root):
    digits()
    judge.doubts = lambda *_: {}
    made = quiet(judge.Recipe(1, root / "state"))
    judge.finish(made.training, root / "judge")


@functools.cache
def pair():
    models, module = [], digits()
    for name in ("red-green", "green"):
        unet = module.network()
        with torch.no_grad():
            next(unet.parameters()).add_(0.01 * len(name))
        models.append(sculpt.Diffusion(unet, module.scheduler(name), name=name))
    return models


def fit_digits(root):
    digits()
    module = recipe("digits/classifiers", HERE=root, FRESH=12)
    for name in ("quality", "by_class"):
        function = getattr(module, name)
        setattr(module, name, functools.partial(getattr(function, "func", function), n=4))
    classifier, runs = module.fit("pair", pair(), root / "state", steps=1, n=12, batch=2)
    module.finish("pair", classifier, pair(), runs, root / "state")


def train_molecules(root):
    module = recipe("molecules/recipe", BATCH=4, REPLAY=8, FIRST=16)
    quiet(module.Recipe("qed", 2, root / "state")).finish(root / "qed", 16)


def with_policies(root):
    for name, policy in zip(("seh", "sa"), policies(), strict=True):
        policy.save_pretrained(root / name)


def fit_molecules(root):
    module = recipe("molecules/classifiers", HERE=root, SAMPLES=16, BATCH={"seh-sa": 4})
    module.distance = lambda *_: (0.0, 1.0)
    module.fit("seh-sa", 1, root / "state", more=False)


def train_student(root):
    module = recipe("molecules/student", HERE=root, STUDENT=root / "student", BATCH=4, RANDOM=24)
    teacher = SEH(STUDENT)
    drawn, sources = (vars(module).setdefault(f"all_{name}", getattr(module, name)) for name in ("drawn", "sources"))
    module.drawn = functools.partial(drawn, chunk=24)
    module.sources = lambda trees: itertools.islice(sources(trees), 1)
    module.write_molecules(root / "state", {}, teacher)
    pad, states = torch.nn.functional.pad, teacher.network.states
    teacher.network.states = lambda *graph: (pad(h, (0, 64 - h.shape[1])) for h in states(*graph))
    module.finish(quiet(module.Recipe(module.Molecules(root / "state", teacher), 2, root / "state")), teacher)


RECIPES = [
    Scenario("recipe of a grid policy", train_grid, of_folder("circle3")),
    Scenario("recipe of a grid classifier", fit_grid, of_folder("pair")),
    Scenario("recipe of digits", train_digits, of_folder("green"), with_trunk),
    Scenario("recipe of digits, --more", more_digits, of_folder("green"), with_digits, repeats=False),
    Scenario("recipe of digits, --card", card_of_digits, of_folder("green"), with_judge),
    Scenario("recipe of the judge", train_judge, of_folder("judge", judge.Judge.from_pretrained), with_judge),
    Scenario("recipe of a digits classifier", fit_digits, of_folder("pair"), with_judge),
    Scenario("recipe of a molecule policy", train_molecules, of_folder("qed", functools.partial(sculpt.load, beta=32))),
    Scenario("recipe of a molecule classifier", fit_molecules, of_folder("seh-sa"), with_policies),
    Scenario("recipe of the student", train_student, of_folder("student", SEH)),
]

# All of them

SCENARIOS = {scenario.name: scenario for scenario in (*CHECKPOINTS, *TRAININGS, *RESULTS, *RECIPES)}


@pytest.fixture(autouse=True)
def still(monkeypatch):
    monkeypatch.setattr(sculpt.training, "time", STILL)
    monkeypatch.delenv("SCULPT_DATA", raising=False)
    with mock.patch.dict(vars(base_samples)), mock.patch.dict(vars(judge)):  # which other tests share
        yield


def check(trial, most=None):
    tally = trial.run(most)
    print(f"\n{HEAD}\n{tally}")
    assert not trial.disk.unsafe, f"moved before they were on the disk: {trial.disk.unsafe}"
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.resumed == tally.faults


@pytest.mark.parametrize(
    "name", [name for name in SCENARIOS if "recipe" not in name or name.endswith(("of digits", "student"))]
)
def test_a_sample_of_faults(name, tmp_path):
    check(Trial(SCENARIOS[name], tmp_path), most=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_fault_of_every_operation(name, tmp_path):
    check(Trial(SCENARIOS[name], tmp_path))


# Many at once


def saved(folder, tag):
    """A version of a folder: two files and one in a folder, all of which tell which it is."""
    with replacing(folder) as new:
        (new / "unet").mkdir()
        for path in (new / "unet" / "weights", new / "config", new / "weights"):
            path.write_text(tag * 1000)


def read(folder):
    with settled(folder):
        return {path.read_text() for path in (folder / "unet" / "weights", folder / "config", folder / "weights")}


def worker(folder, seed, turns, known):
    """Saves and loads in turn. Whatever is read is one version, whole."""
    for turn in range(turns):
        tag = f"{seed:02}{turn:02}"
        saved(folder, tag)
        (text,) = read(folder)
        assert len(text) == 4000 and len({text[i : i + 4] for i in range(0, 4000, 4)}) == 1
        replace_file(folder / "table.csv", tag.encode() * 1000)
        text = (folder / "table.csv").read_text()
        assert len(text) == 4000 and text == text[:4] * 1000
        classifier(seed).save_pretrained(folder / "classifier")
        assert tensors(sculpt.load(folder / "classifier")) in map(tensors, known)


def test_two_processes_of_eight_threads_save_and_load_one_folder(tmp_path, turns=3):
    def threads(first):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: worker(tmp_path / "folder", seed, turns, known), range(first, first + 8)))

    known = [classifier(seed) for seed in range(16)]
    process = os.fork()
    if not process:
        os._exit(forked(lambda: threads(8)))
    threads(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "classifier",
        "config",
        "table.csv",
        "unet",
        "weights",
    ]
    assert not debris(tmp_path)


def test_of_several_that_begin_a_file_one_is_first(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda k: create_file(tmp_path / "manifest", b"%02d" % k * 1000), range(64)))
    content = (tmp_path / "manifest").read_bytes()
    assert content == content[:2] * 1000 and not debris(tmp_path)


def test_readers_do_not_keep_a_writer_waiting(tmp_path):
    saved(tmp_path, "0")
    over = threading.Event()

    def reading():
        while not over.is_set():
            with settled(tmp_path):
                time.sleep(0.02)

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(reading) for _ in range(8)]
        began = time.monotonic()
        try:
            for tag in "123":
                saved(tmp_path, tag)
        finally:
            over.set()
        waited = time.monotonic() - began
        [reader.result() for reader in readers]
    assert read(tmp_path) == {"3" * 1000} and waited < 30  # without a gate they take turns for ever


def test_a_process_that_is_forked_meanwhile_locks_nothing(tmp_path):
    with settled(tmp_path), replacing(tmp_path / "other"):
        process = os.fork()
        if not process:
            time.sleep(60)
            os._exit(0)
    try:
        assert forked(lambda: saved(tmp_path, "1"), seconds=20) == 0
        assert forked(lambda: saved(tmp_path / "other", "1"), seconds=20) == 0
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


# Debris


def stopped(folder, with_signal):
    """A process that was stopped in the middle of saving."""
    ready, said = os.pipe()
    process = os.fork()
    if not process:
        with replacing(folder) as new:
            (new / "config").write_text("new")
            os.write(said, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.kill(process, with_signal)
    return process


def test_debris_goes_with_its_process_and_not_before(tmp_path):
    saved(tmp_path, "1")
    process = stopped(tmp_path, signal.SIGSTOP)
    read(tmp_path)
    saved(tmp_path, "2")
    assert len(debris(tmp_path)) == 3  # what it is about to save is its own
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert read(tmp_path) == {"2" * 1000} and not debris(tmp_path)


def test_debris_of_other_machines_goes_after_a_day(tmp_path):
    names = [".config.elsewhere.0123456789ab.part", "..saved.elsewhere.0123456789ab.part", ".config.part", "config.part"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove_debris(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    remove_debris(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".config.part", "config.part"}


# Folders of all kinds


def test_a_folder_may_be_a_link_and_have_links(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "unet").symlink_to(tmp_path / "outside")
    (tmp_path / "real" / "config").symlink_to(tmp_path / "outside" / "kept")
    (tmp_path / "real" / "weights").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    saved(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real") == {"1" * 1000}
    assert hashes(tmp_path / "outside").keys() == {"kept"} and (tmp_path / "outside" / "kept").read_text() == "kept"


def test_a_file_takes_the_place_of_a_folder_and_the_other_way_round(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "more").write_text("old")
    for name in ("unet", ".saved"):
        (tmp_path / name).write_text("old")
    monkeypatch.chdir(tmp_path)
    saved(".", "1")
    assert read(Path()) == {"1" * 1000} and not debris(tmp_path)


def test_a_link_in_the_place_of_what_is_saved_is_not_followed(tmp_path):
    saved(tmp_path / "folder", "1")
    saved(tmp_path / "outside", "2")
    (tmp_path / "folder" / ".saved").symlink_to(tmp_path / "outside")
    assert read(tmp_path / "folder") == {"1" * 1000} and read(tmp_path / "outside") == {"2" * 1000}
    saved(tmp_path / "folder", "3")
    assert read(tmp_path / "folder") == {"3" * 1000} and read(tmp_path / "outside") == {"2" * 1000}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file, expected a folder to save into"):
        grid(0).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("without", ["locks", "fcntl"])
def test_systems_without_locks_save_all_the_same(without, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    if without == "fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    for tag in "12":
        saved(tmp_path, tag)
        assert read(tmp_path) == {tag * 1000}
    replace_file(tmp_path / "config", b"")
    assert not debris(tmp_path)


def test_the_longest_name_can_be_saved(tmp_path):
    replace_file(tmp_path / ("字" * 85), b"1")
    saved(tmp_path / ("é" * 127), "1")
    assert len(list(tmp_path.iterdir())) == 2


# A disk that is full


def on_a_small_disk(folder, job):
    """Run a job in a process that sees a disk of a megabyte at ``folder``."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, skipped = 0x10000000, 0x00020000, 77

    def inside():
        if libc.unshare(new_user | new_mounts):
            os._exit(skipped)
        for name, text in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=1m"):
            os._exit(skipped)
        job()

    if (code := forked(inside)) == skipped:
        pytest.skip("This system lets no user mount a disk of his own.")
    assert code == 0


def fill(path, left):
    """Leave so many bytes."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - left)


def test_a_full_disk_leaves_the_old_files_and_nothing_else(tmp_path):
    def large(tag):
        with replacing(tmp_path / "folder") as new:
            (new / "unet").mkdir()
            for path in (new / "unet" / "weights", new / "config", new / "weights"):
                path.write_text(tag * 65_536)

    def job():
        large("1")
        replace_file(tmp_path / "file", b"1" * 65_536)
        before = hashes(tmp_path)
        for left in range(0, 4 * 65_536, 20_480):
            fill(tmp_path / "filler", left)
            for save in (lambda: large("2"), lambda: replace_file(tmp_path / "file", b"2" * 262_144)):
                with pytest.raises(OSError, match="No space left"):
                    save() if left < 3 * 65_536 else replace_file(tmp_path / "file", b"2" * 262_144)
            (tmp_path / "filler").unlink()
            assert hashes(tmp_path) == before and read(tmp_path / "folder") == {"1" * 65_536}
        large("2")
        replace_file(tmp_path / "file", b"2")
        assert read(tmp_path / "folder") == {"2" * 65_536} and not debris(tmp_path)

    on_a_small_disk(tmp_path, job)
