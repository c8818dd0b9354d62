"""The training loop: what it computes, and that a killed training ends with the bits of one that was not killed."""

import itertools
import math

import pytest
import torch
from torch import nn

import sculpt.files
import sculpt.training
from sculpt.training import Training, cosine, mean, read_state

STEPS = 12


class Buffer(nn.Module):
    """The last samples, of which every step replays some."""

    def __init__(self):
        super().__init__()
        self.register_buffer("x", torch.zeros(64, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


class Seen:
    """What is no module and grows: the number of each step so far."""

    def __init__(self):
        self.steps = []

    def state_dict(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state):
        self.steps = state["steps"].tolist()


class Recipe:
    """A regression whose network has dropout and running means, with a parameter beside it and samples to replay."""

    def __init__(self, folder=None, steps=STEPS, identity=None, **options):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.SiLU(), nn.Linear(8, 1))
        self.steps, self.shift, self.buffer, self.seen = steps, nn.ParameterList([torch.zeros(())]), Buffer(), Seen()
        groups = [{"params": network.parameters(), "lr": 1e-2}, {"params": self.shift.parameters(), "lr": 0.1}]
        options = {"rate": cosine(steps, 3, 0.02), "clip": 1.0, **options}
        identity = {"name": "regression", "steps": steps, "sizes": (16, 8), **(identity or {})}
        self.training = Training(network, torch.optim.AdamW(groups), folder, identity=identity, **options)
        self.resumed = self.training.resume(shift=self.shift, buffer=self.buffer, seen=self.seen)

    def loss(self, seed):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
        both = torch.cat([x, self.buffer.x[:8]])
        at = (int(self.buffer.count) + torch.arange(16)) % 64
        self.buffer.x[at] = x
        self.buffer.count += 16
        self.seen.steps.append(self.training.step)
        residual = self.training.network(both)[:, 0] + self.shift[0] - both.sum(-1)
        return residual.square().mean(), {"residual": residual.detach().abs().mean()}

    def run(self, n=STEPS):
        for row in itertools.islice(self.training.run(self.loss, self.steps), n):
            self.training.curve.append({"step": self.training.step, "loss": row["loss"]})

    def bits(self):
        parts = (self.training.network, self.training.average, self.shift, self.buffer, self.seen)
        state = {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.state_dict().items()}
        moments = self.training.optimizer.state_dict()["state"]
        return state | {f"{i}/{name}": value for i, part in moments.items() for name, value in part.items()}


def same(one, two):
    a, b = one.bits(), two.bits()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# A training that is killed


@pytest.mark.parametrize("killed_at", [1, 5, 11])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_killed_training_ends_with_the_same_bits_as_one_that_was_not_killed(tmp_path, killed_at, bfloat16):
    whole, first = Recipe(bfloat16=bfloat16), Recipe(tmp_path, bfloat16=bfloat16)
    whole.run()
    first.run(killed_at)
    first.training.save()
    first.run(1)  # and what came after the last save is lost
    again = Recipe(tmp_path, bfloat16=bfloat16)
    assert not first.resumed and again.resumed and again.training.step == killed_at
    assert not same(again, whole)
    again.run()
    assert same(again, whole) and again.training.curve == whole.training.curve and again.seen.steps == list(range(STEPS))


def test_a_loop_that_is_left_can_be_entered_again():
    whole, halves = Recipe(), Recipe()
    whole.run()
    halves.run(7)
    halves.run()
    assert same(whole, halves) and halves.training.step == STEPS
    assert list(halves.training.run(halves.loss, STEPS)) == []


def test_a_training_that_is_killed_while_it_saves_has_its_last_state(tmp_path, monkeypatch):
    recipe = Recipe(tmp_path)
    recipe.run(4)
    recipe.training.save()
    recipe.run(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(source, target):
            raise KeyboardInterrupt

        patch.setattr(sculpt.files.os, "replace", killed)
        recipe.training.save()
    assert Recipe(tmp_path).training.step == 4


def test_a_state_is_saved_no_more_often_than_asked_for(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sculpt.training.time, "monotonic", lambda: now[0])
    recipe = Recipe(tmp_path)
    for now[0], saved in ((10.0, 0), (31.0, 2), (60.0, 2), (61.0, 4)):
        recipe.run(1)
        recipe.training.save(every=30.0)
        assert (read_state(tmp_path)[0]["step"] if saved else 0) == saved


def test_a_training_without_a_folder_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe()
    recipe.run(1)
    recipe.training.save()
    assert not recipe.resumed and not list(tmp_path.iterdir())


# A state of another training


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"steps": 24}, "steps is 12 there and 24 here"),
        ({"identity": {"name": "other"}}, "name is 'regression' there and 'other' here"),
        ({"identity": {"sizes": (16, 4), "name": "x"}}, r"name is .*sizes is \[16, 8\] there and \[16, 4\] here"),
        ({"identity": {"rate": 0.1}}, "rate is None there and 0.1 here"),
    ],
)
def test_the_state_of_another_training_is_refused_by_what_differs(tmp_path, other, said):
    first = Recipe(tmp_path)
    first.run(1)
    first.training.save()
    with pytest.raises(ValueError, match=f"holds another training: {said}.*same settings.*another folder"):
        Recipe(tmp_path, **other)


def test_a_state_that_does_not_fit_the_network_is_refused(tmp_path):
    first = Recipe(tmp_path)
    first.training.save()
    network = nn.Linear(3, 2)
    other = Training(network, torch.optim.Adam(network.parameters()), tmp_path, identity=first.training.identity)
    with pytest.raises(
        ValueError, match="state.safetensors do not fit the network of this training: network/weight is missing, expected"
    ):
        other.resume()


@pytest.mark.parametrize("what", ["another file", "damaged note", "newer format"])
def test_what_is_no_state_of_a_training_is_refused(tmp_path, what):
    from safetensors.torch import save

    notes = {"another file": None, "damaged note": {"training": "{"}, "newer format": {"training": '{"format": 9}'}}
    (tmp_path / "state.safetensors").write_bytes(save({"x": torch.zeros(1)}, notes[what]))
    with pytest.raises(ValueError, match="format 9" if what == "newer format" else "not the state of a training"):
        Recipe(tmp_path)


# What it computes


def test_the_average_forgets_quickly_and_then_remembers_a_tenth_of_the_steps():
    recipe, d = Recipe(decay=0.6), []
    training = recipe.training
    expected = {name: value.clone() for name, value in training.network.state_dict().items()}
    for k, _ in enumerate(training.run(recipe.loss, STEPS), 1):
        d.append(min(0.6, (1 + k) / (10 + k)))
        for name, value in training.network.state_dict().items():
            expected[name] = d[-1] * expected[name] + (1 - d[-1]) * value if value.is_floating_point() else value.clone()
    assert d[0] == 2 / 11 and d[-1] == 13 / 22 and not training.average.training
    for name, value in training.average.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_threads_share_a_batch_and_their_gradients_are_averaged():
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    seeds = []

    def loss(seed):
        seeds.append(seed)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        return (network(x)[:, 0] - x.sum(-1)).square().mean(), {"first": float(x[0, 0])}

    training = Training(network, torch.optim.SGD(network.parameters(), 0.1), threads=2)
    row = next(training.run(loss, 1))
    moved = {name: start[name] - value for name, value in network.state_dict().items()}
    network.load_state_dict(start)
    parts = [torch.autograd.grad(loss(seed)[0], list(network.parameters())) for seed in sorted(seeds[:2])]
    assert len(set(seeds)) == 2
    for change, *gradients in zip(moved.values(), *parts, strict=True):
        torch.testing.assert_close(change, 0.1 * sum(gradients) / 2)
    firsts = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))[0, 0] for seed in set(seeds)]
    assert row["first"] == pytest.approx(float(sum(firsts) / 2))


def test_gradients_are_clipped_and_rates_follow_the_schedule():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    training = Training(
        network, torch.optim.SGD(network.parameters(), 0.5), rate=lambda step: 1.0 if step == 0 else 0.1, clip=2.0
    )
    ws = [float(network.weight.detach())]
    for row in training.run(lambda seed: ((100 * network.weight).sum(), {}), 2):
        assert float(row["norm"]) == pytest.approx(100)
        ws.append(float(network.weight.detach()))
    assert ws == pytest.approx([0.0, -1.0, -1.1])  # the gradient's norm is 2, times 0.5 and 0.05


def test_parameters_that_a_loss_does_not_use_stay_as_they_are():
    network = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    before = network["unused"].weight.clone()
    training = Training(network, torch.optim.AdamW(network.parameters(), 0.1, weight_decay=0.1))
    for _ in training.run(lambda seed: (network["used"](torch.ones(1, 2)).sum(), {}), 3):
        pass
    assert torch.equal(network["unused"].weight, before)


def test_a_loss_that_is_no_number_stops_the_training_and_leaves_its_state(tmp_path):
    recipe = Recipe(tmp_path)
    recipe.run(2)
    recipe.training.save()
    before = recipe.bits()
    with pytest.raises(FloatingPointError, match="loss is nan at step 2.*last saved state"):
        next(recipe.training.run(lambda seed: (recipe.loss(seed)[0] * math.nan, {}), STEPS))
    assert all(torch.equal(value, before[name]) for name, value in recipe.bits().items() if name[0] == "0" and "1." not in name)
    assert Recipe(tmp_path).training.step == 2


def test_a_cosine_rises_stays_and_falls():
    rate = cosine(100, warm_up=10, least=0.1, hold=0.6)
    assert [rate(k) for k in (0, 4, 9, 30, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert rate(80) == pytest.approx(0.55) and rate(100) == rate(120) == pytest.approx(0.1)
    plain = cosine(8)
    assert [plain(k) for k in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0])


def test_the_mean_of_rows_is_made_of_floats():
    rows = [{"loss": 1.0, "norm": torch.tensor(3.0)}, {"loss": 2.0, "norm": torch.tensor(5.0)}]
    assert mean(rows) == {"loss": 1.5, "norm": 4.0} and all(type(value) is float for value in mean(rows).values())
