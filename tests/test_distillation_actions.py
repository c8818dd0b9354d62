"""A policy that learns to be a composition: exact where all samples can be counted, a base model in every respect, the same bits after a kill."""

import inspect
import json

import pytest
import torch
from gflownet_models import ENVIRONMENTS, Stairs, arbitrary, network_policy, perfect
from token_models import causal_models, densities, recurrent_models, sequences

import sculpt
from sculpt.actions.counting import Counted
from sculpt.actions.networks import GridNetwork
from sculpt.actions.students import PolicyStudent, Pool, centre, log_pi
from sculpt.actions.targets import Target
from sculpt.apps import cli
from sculpt.gflownet import exact
from sculpt.training import Training

GRID = {"steps": 300, "batch_size": 64, "samples": 512, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def total_variation(model, composition):
    ps = [exact.terminal_distribution(p) for p in composition.leaves]
    return exact.l1(exact.terminal_distribution(model), exact.target(composition.formula, ps)) / 2


def networks(env, m=2):
    return [sculpt.GFlowNet(env, network_policy(env, seed), name=f"p{seed}") for seed in range(m)]


@pytest.fixture(scope="module")
def grid():
    """Two policies, their harmonic mean, and the folder of its student."""
    return networks(ENVIRONMENTS["grid-2d"]())


@pytest.fixture(scope="module")
def distilled(grid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "both"
    return sculpt.distill(grid[0] & grid[1], checkpoint=folder, **GRID), folder


# What is exact


@pytest.mark.parametrize("env", ["grid-3d", "sets", "ebm", "bits", "stairs"])
def test_counted_densities_are_those_of_mass_pushed_through_the_dag(env):
    models = arbitrary(ENVIRONMENTS[env](), 2)
    graph, table = exact.dag(models[0]), Counted.of(models)
    expected = torch.stack([exact.terminal_distribution(model) for model in models], -1)
    torch.testing.assert_close(table(graph.states).exp(), expected)
    assert float(table.log_p.exp().sum(0).max()) == pytest.approx(1.0)


def test_what_no_model_makes_has_no_density_and_too_many_states_are_not_counted():
    p = causal_models(1, length=3)[0]
    table = Counted.of([p])
    assert table(torch.tensor([[3, 3, 3]])).item() == -torch.inf and len(table.x) == len(sequences(p)[0])
    assert Counted.of([p], limit=10) is None


@pytest.mark.parametrize(
    "write", [lambda p, q, r: (p & q) - r, lambda p, q, r: sculpt.product([p, q], [1, 0.5]), lambda p, q, r: p]
)
def test_the_target_is_the_formula_of_exact_densities_where_flows_do_not_balance(write):
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 3)
    composition = write(*models)
    target = Target(composition, seeded())
    x = exact.dag(models[0]).states
    ps = [exact.terminal_distribution(p).log() for p in composition.leaves]
    torch.testing.assert_close(target(x, seeded()), target.formula.value(torch.stack(ps, -1)))
    assert "exact" in target.said


def test_a_model_times_a_factor_is_distilled_too():
    p, _ = networks(ENVIRONMENTS["grid-2d"]())
    factor = sculpt.Factor(lambda x: 0.3 * x.sum(-1).float(), name="far")
    model = sculpt.distill(p * factor, **GRID)
    x, ps = exact.dag(p).states, exact.terminal_distribution(p)
    target = (ps.log() + 0.3 * x.sum(-1)).softmax(0)
    assert float((exact.terminal_distribution(model) - target).abs().sum()) / 2 < 0.02 < float((ps - target).abs().sum()) / 4


def test_without_a_table_the_target_is_an_average_over_paths_and_says_so(monkeypatch):
    monkeypatch.setattr(Counted, "of", classmethod(lambda *_: None))
    p, q = perfect(ENVIRONMENTS["grid-2d"](), 2)
    target = Target(p & q, seeded())
    assert "approximate" in target.said
    x = p.sample(50, generator=seeded()).x
    expected = exact.target((p & q).formula, [exact.terminal_distribution(model) for model in (p, q)])[exact.dag(p).index(x)]
    off = target(x, seeded()) - expected.log()
    torch.testing.assert_close(off, off.mean().expand(50))  # balanced flows: every path says the same


def test_balance_along_paths_is_the_density_of_a_policy_whose_flows_balance():
    model = perfect(ENVIRONMENTS["grid-3d"](), 1)[0]
    x = model.sample(100, generator=seeded()).x
    expected = exact.terminal_distribution(model).log()[exact.dag(model).index(x)]
    torch.testing.assert_close(log_pi(model, x, seeded()), expected)


def test_the_centre_has_the_least_huber_loss():
    delta = torch.randn(200, generator=seeded(), dtype=torch.float64) * 6
    around = torch.linspace(-3, 3, 601, dtype=torch.float64)
    losses = [torch.nn.functional.huber_loss(delta, c.expand(200), delta=5.0) for c in around]
    assert float(centre(delta)) == pytest.approx(float(around[torch.stack(losses).argmin()]), abs=0.011)


def test_a_pool_keeps_the_last_samples_and_draws_them_by_their_weights():
    pool = Pool(torch.zeros(1, 2, dtype=torch.long), 8)
    for i in range(3):
        x = torch.arange(4 * i, 4 * i + 4)[:, None].expand(4, 2)
        pool.add(x, torch.zeros(4, dtype=torch.float64), x[:, 0].double())
    assert sorted(pool.x[:, 0].tolist()) == [*range(4, 12)] and len(pool) == 8
    assert set(pool.x[pool.newest(100, 4, seeded()), 0].tolist()) == {8, 9, 10, 11}
    drawn = pool.x[pool.heaviest(20_000, seeded()), 0].bincount(minlength=12)[4:] / 20_000
    torch.testing.assert_close(drawn.double(), torch.softmax(-torch.arange(8.0), 0).double(), atol=0.02, rtol=0)


# What comes out


def test_a_distilled_grid_policy_is_the_composition_and_an_untrained_one_is_not(grid, distilled):
    both, (model, _) = grid[0] & grid[1], distilled
    untrained = PolicyStudent(both).learner
    assert total_variation(model, both) < 0.01 < 0.05 < total_variation(untrained, both)


@pytest.mark.parametrize("make", [perfect, pytest.param(arbitrary, marks=pytest.mark.slow)])
def test_computed_policies_have_students_too(make):
    p, q = make(ENVIRONMENTS["sets"](), 2)
    model = sculpt.distill(p - q, **GRID)
    assert total_variation(model, p - q) < 0.05


@pytest.mark.parametrize(
    "write", [lambda p, q: p & q, *(pytest.param(w, marks=pytest.mark.slow) for w in (lambda p, q: p - q, lambda p, q: p | q))]
)
def test_a_distilled_language_model_is_the_composition(write):
    p, q = causal_models(2)
    composition = write(p, q)
    model = sculpt.distill(composition, **GRID)
    x, target = sequences(p)[0], torch.softmax(composition.formula.value(densities([p, q])), 0)
    apart = [float((m.log_p(x).exp() - target).abs().sum()) / 2 for m in (model, p)]
    assert apart[0] < 0.05 < 0.1 < apart[1]
    assert not model.log_p(x).requires_grad


@pytest.mark.slow
def test_recurrent_language_models_learn_too():
    p, q = recurrent_models(2)
    model = sculpt.distill(p & q, **GRID | {"steps": 200})
    x, target = sequences(p)[0], torch.softmax((p & q).formula.value(densities([p, q])), 0)
    assert float((model.log_p(x).exp() - target).abs().sum()) / 2 < 0.06


def test_a_model_that_no_file_builds_again_is_refused_before_it_learns(tmp_path):
    p, q = recurrent_models(2)
    with pytest.raises(ValueError, match="no file can build again.*pass network="):
        sculpt.distill(p & q, checkpoint=tmp_path / "folder", **GRID)
    assert not (tmp_path / "folder" / "training").exists()


@pytest.mark.slow
def test_what_others_alone_can_write_is_not_impossible_for_the_student():
    p, q = causal_models(2)
    few = p.with_sampling("few", top_k=1)
    assert torch.isinf(few.log_p(sequences(p)[0])).any()
    student = PolicyStudent(few | q, samples=64)
    assert torch.isfinite(student.learner.log_p(sequences(p)[0]).detach()).all()
    model = sculpt.distill(few | q, **GRID)
    target = torch.softmax((few | q).formula.value(densities([few, q])), 0)
    assert float((model.log_p(sequences(p)[0]).exp() - target).abs().sum()) / 2 < 0.06


@pytest.mark.slow
def test_nested_compositions_are_distilled_with_their_inner_normalisers():
    models = networks(ENVIRONMENTS["grid-2d"](), 3)
    p, q, r = models
    composition = (p & q) | r
    model = sculpt.distill(composition, **GRID | {"steps": 400})
    inner = exact.target((p & q).formula, [exact.terminal_distribution(m) for m in (p, q)])
    target = (inner + exact.terminal_distribution(r)) / 2
    assert exact.l1(exact.terminal_distribution(model), target) / 2 < 0.08


# A base model in every respect


def test_its_folder_is_the_same_model_and_its_card_has_the_exact_distance(grid, distilled):
    model, folder = distilled
    again = sculpt.load(folder)
    assert again.key == model.key and again.name == str(grid[0] & grid[1])
    assert torch.equal(again.sample(50, generator=seeded()).x, model.sample(50, generator=seeded()).x)
    measured = json.loads((folder / "distillation.json").read_text())["measured"]
    assert measured["total variation, exact"] == pytest.approx(total_variation(model, grid[0] & grid[1]), abs=1e-6)
    ps = [exact.terminal_distribution(p) for p in grid]
    log_z = float((grid[0] & grid[1]).formula.value(torch.stack(ps, -1).log()).logsumexp(0))
    assert abs(measured["log Z"] - log_z) < 5 * measured["standard error of log Z"] < 0.1
    assert measured["effective share of exact weights"] > 0.9
    card = (folder / "README.md").read_text()
    assert "sculpt.load" in card and "total variation, exact" in card and "the composition's own log-density, exact" in card


def test_it_composes_again_on_every_road(grid, distilled):
    model, q = distilled[0], grid[1]
    ps = [exact.terminal_distribution(m) for m in (model, q)]
    for composition in (model & q, model - q, model | q):
        target = exact.target(composition.formula, ps)
        for road in (
            None,
            sculpt.Rejection(exact.ExactClassifier([model, q])),
            sculpt.Guided(exact.ExactClassifier([model, q])),
        ):
            if road is not None and composition.operator == "|":
                continue
            samples = composition.sample(4000, road, generator=seeded())
            assert exact.l1(exact.histogram(model, samples.x), target) < 0.25
    classifier = sculpt.fit([model, q], steps=5, batch_size=8, samples=50, progress=False)
    assert len((model & q).sample(8, classifier, generator=seeded())) == 8


@pytest.mark.slow
def test_a_network_of_ones_own_is_a_student_too(grid, tmp_path):
    both = grid[0] & grid[1]
    model = sculpt.distill(
        both, network=GridNetwork(2, 6, 3, encoding="table"), checkpoint=tmp_path, **GRID | {"learning_rate": 0.02}
    )
    assert total_variation(model, both) < 0.08 and isinstance(sculpt.load(tmp_path).policy.module, GridNetwork)


@pytest.mark.slow
def test_a_guided_road_is_learned_from_and_its_model_is_distilled_as_an_operand(grid):
    p, q = grid
    classifier = exact.ExactClassifier([p, q])
    model = sculpt.distill(p & q, sculpt.Guided(classifier), **GRID)
    assert total_variation(model, p & q) < 0.05
    guided = (p & q).guided(classifier)
    inner = exact.target((p & q).formula, [exact.terminal_distribution(m) for m in grid])
    again = sculpt.distill(guided | q, **GRID)
    assert exact.l1(exact.terminal_distribution(again), (inner + exact.terminal_distribution(q)) / 2) / 2 < 0.05


def test_torchgfns_sampler_draws_from_its_estimator(distilled):
    from gfn.samplers import Sampler

    model = distilled[0]
    torch.manual_seed(0)
    trajectories = Sampler(model.as_estimator()).sample_trajectories(model.env, n=4000)
    x = trajectories.terminating_states.tensor
    assert exact.l1(exact.histogram(model, x), exact.terminal_distribution(model)) < 0.25


def test_a_language_models_folder_knows_its_prompt_and_its_lengths(tmp_path):
    p, q = (model.with_prompt([0, 1]) for model in causal_models(2, length=3))
    model = sculpt.distill(p & q, checkpoint=tmp_path / "both", **GRID | {"steps": 5})
    again = sculpt.load(tmp_path / "both")
    assert again.key == model.key and again.prompt == (0, 1) and again.max_length == 3
    assert len((again & q).sample(5, generator=seeded())) == 5
    assert sculpt.load(tmp_path / "both", max_length=2).max_length == 2
    path = tmp_path / "both" / "sculpt.json"
    path.write_text(path.read_text().replace('"max_length": 3', '"max_length": "three"'))
    with pytest.raises(ValueError, match="sculpt.json: max_length is 'three', expected a whole number"):
        sculpt.load(tmp_path / "both")


def test_a_condition_becomes_a_part_of_the_model(tmp_path):
    models = [sculpt.load(f"pretrained/molecules/{name}", beta=32) for name in ("seh", "sa")]
    learner = models[0].learner("both")
    learner.save_pretrained(tmp_path)
    again = sculpt.load(tmp_path)
    assert again.condition == {"beta": 32.0} and again.key == learner.key and again.name == "both"
    x = models[0].sample(20, generator=seeded()).x
    torch.testing.assert_close(again.log_p(x), models[0].log_p(x))
    with pytest.raises(ValueError, match="conditional on nothing"):
        sculpt.load(tmp_path, beta=16)


# Files


@pytest.mark.parametrize("family", ["grid", "tokens"])
def test_a_killed_distillation_ends_with_the_same_bits(family, tmp_path, monkeypatch):
    models = networks(ENVIRONMENTS["grid-2d"]()) if family == "grid" else causal_models(2)
    options = {"steps": 40, "batch_size": 16, "samples": 40, "progress": False}
    whole, update = sculpt.distill(models[0] & models[1], **options), Training._update

    def killed(self, gradients):
        if self.step == 27:
            raise KeyboardInterrupt
        return update(self, gradients)

    monkeypatch.setattr("sculpt.distillation.Training.save", lambda self, every=0.0, save=Training.save: save(self))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_update", killed)
        sculpt.distill(models[0] & models[1], checkpoint=tmp_path, **options)
    with pytest.raises(ValueError, match="is not finished. Call sculpt.fit or sculpt.distill"):
        sculpt.load(tmp_path)
    resumed = sculpt.distill(models[0] & models[1], checkpoint=tmp_path, **options)
    assert resumed.key == whole.key == sculpt.load(tmp_path).key
    with pytest.raises(ValueError, match="another training: batch_size is 16 there and 8 here"):
        sculpt.distill(models[0] & models[1], checkpoint=tmp_path, **options | {"batch_size": 8})
    with pytest.raises(ValueError, match="composition is"):
        sculpt.distill(models[0] - models[1], checkpoint=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps has to be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size has to be a whole number"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate has to be a finite number"),
        ({"learning_rate": -1}, ValueError, "learning_rate has to be positive, got -1"),
        ({"samples": 0}, ValueError, "samples has to be at least 1"),
        ({"draws": 1}, ValueError, "draws has to be at least 2"),
        ({"particles": 8}, TypeError, "unexpected keyword argument 'particles'"),
        ({"network": GridNetwork(2, 6, 5)}, ValueError, r"answers one state with shape \(1, 5\), expected \(1, 3\)"),
    ],
)
def test_bad_options_are_refused(grid, options, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(sculpt.distill)(grid[0] & grid[1], progress=False, **options)


def test_what_cannot_be_distilled_says_why(grid):
    with pytest.raises(TypeError, match="Only base models compose"):
        inspect.unwrap(sculpt.distill)([*grid])
    p, q = arbitrary(Stairs(), 2)
    with pytest.raises(ValueError, match="cannot be traced back"):
        sculpt.distill(p & q, progress=False)


# The command


def test_the_command_distils_and_its_folder_is_sampled(grid, tmp_path, capsys):
    for model in grid:
        model.save_pretrained(tmp_path / model.name)
    models = [part for p in grid for part in ("--model", f"{p.name}={tmp_path / p.name}")]
    folder = str(tmp_path / "both")
    arguments = ["--steps", "20", "--batch-size", "16", "--samples", "50", "--learning-rate", "0.002", "--particles", "100"]
    assert cli.main(["distill", "p0 & p1", *models, "-o", folder, *arguments]) == 0
    out = capsys.readouterr().out
    assert "total variation, exact" in out and out.endswith(f"wrote {folder}\n")
    assert cli.main(["distill", "p0 & p1", *models, "-o", folder, *arguments]) == 0  # it is done, and not done again
    assert cli.main(["sample", "a", "--model", f"a={folder}", "-n", "5", "-o", str(tmp_path / "x.npz")]) == 0


@pytest.mark.parametrize(
    ("formula", "arguments", "message"),
    [
        ("p0 & r", (), "no such model"),
        ("p0 & p1", ("--anchor", "p1"), "--anchor: guided sampling only. Pass --classifier FOLDER"),
        ("p0 & p1", ("--classifier", "p0"), "is not a classifier"),
        ("p0 & p1", ("-o", "p0/config.json"), "is a file, expected a folder"),
        ("p0 & p1", ("--learning-rate", "-1"), "learning_rate has to be positive"),
    ],
)
def test_a_slip_in_the_command_is_one_line(grid, tmp_path, monkeypatch, capsys, formula, arguments, message):
    monkeypatch.chdir(tmp_path)
    for model in grid:
        model.save_pretrained(tmp_path / model.name)
    models = ["--model", "p0=p0", "--model", "p1=p1"]
    assert cli.main(["distill", formula, *models, "-o", "both", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
