"""The environment of fragment trees: counted, on vocabularies small enough to list everything."""

import itertools
import json
from collections import Counter

import pytest
import torch
from gfn.containers import Trajectories
from gfn.samplers import Sampler
from rdkit import Chem

import sculpt
from sculpt.actions.paths import path_ratios
from sculpt.gflownet import exact
from sculpt.gflownet.environments import describe
from sculpt.gflownet.estimators import NetworkPolicy
from sculpt.gflownet.model import GFlowNet
from sculpt.molecules.chemistry import Vocabulary
from sculpt.molecules.network import FragmentNetwork
from sculpt.molecules.trees import FragmentTrees

TINY = [["C", [0, 0]], ["N", [0, 0, 0]], ["c1ccccc1", [0, 1, 3, 4]]]
SMALL = {
    "chains": (TINY, 3),
    "rings": ([["F", [0]], ["c1ccccc1", [0, 1, 2, 3, 4, 5]]], 4),
    "stars": ([["Cl", [0]], ["N", [0, 0, 0]], ["c1ncncn1", [0, 2, 4]]], 4),
    "rectangles": ([["F", [0]], ["c1cnccn1", [0, 1, 3, 4]], ["C1CC1", [0, 1]]], 4),
}


def listed(vocabulary, slots, hetero_bonds=True):
    env = FragmentTrees(vocabulary, slots, hetero_bonds)
    graph = exact.dag(env)
    return env, graph, graph.states[graph.allowed[:, -1]]


def random_walk(env, n, stop=0.0, generator=None):
    """Uniform actions; stops only where it must, or with probability ``stop``."""
    states = env.s0.expand(n, -1).clone()
    going = torch.arange(n)
    while len(going):
        mask = env.states_from_tensor(states[going]).forward_masks.clone()
        inner = mask[:, :-1].any(-1)
        mask[:, -1] &= ~inner | (torch.rand(len(going), generator=generator) < stop)
        mask[mask[:, -1] & (torch.rand(len(going), generator=generator) < stop), :-1] = False
        actions = torch.multinomial(mask.double(), 1, generator=generator)
        go = actions[:, 0] != env.n_actions - 1
        going = going[go]
        states[going] = env.step(env.states_from_tensor(states[going]), env.actions_from_tensor(actions[go])).tensor
    return states


def policy(env, beta=32.0, seed=0, **sizes):
    torch.manual_seed(seed)
    network = FragmentNetwork(env.vocabulary, env.slots, env.hetero_bonds, **({"width": 32, "depth": 2, "heads": 2} | sizes))
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return GFlowNet(env, NetworkPolicy(network.eval(), env.n_actions), condition={"beta": beta}, name=f"policy-{seed}")


@pytest.mark.parametrize("name", SMALL)
def test_every_writing_of_a_tree_is_a_state_and_their_number_is_known(name):
    env, _, x = listed(*SMALL[name])
    trees = env.trees(x)
    count = Counter(trees.tolist())
    assert torch.equal(env.writings(x), torch.tensor([float(count[t]) for t in trees.tolist()], dtype=torch.float64))


@pytest.mark.parametrize("name", SMALL)
def test_trees_are_molecules_where_no_molecule_can_be_cut_in_two_ways(name):
    env, _, x = listed(*SMALL[name])
    trees, smiles = env.trees(x).tolist(), env.decode(x)
    assert len(set(trees)) == len(set(smiles)) == len(set(zip(trees, smiles, strict=True)))


def test_all_molecules_that_the_fragments_can_make_are_reached():
    vocabulary, slots = SMALL["stars"]
    env, _, x = listed(vocabulary, slots)
    # Grow molecules with no regard to order or symmetry, one bond at a time.
    V = env.vocabulary
    grown = [((f,), ()) for f in range(len(V))]
    found = set()
    while grown:
        fragments, bonds = grown.pop()
        found.add(Chem.MolToSmiles(V.assemble(fragments, bonds)))
        if len(fragments) == slots:
            continue
        taken = {(p, i) for p, i, _, _ in bonds} | {(c, j) for _, _, c, j in bonds}
        for p, f in itertools.product(range(len(fragments)), range(len(V))):
            for i, j in itertools.product(range(len(V[fragments[p]][1])), range(len(V[f][1]))):
                if (p, i) not in taken:
                    grown.append(((*fragments, f), (*bonds, (p, i, len(fragments), j))))
    assert set(env.decode(x)) == found


@pytest.mark.parametrize("name", SMALL)
def test_each_state_has_one_parent_and_backward_steps_undo_forward_steps(name):
    env, graph, _ = listed(*SMALL[name])
    states = env.states_from_tensor(graph.states.clone())
    inner = torch.arange(len(graph.states)) != graph.start
    assert torch.equal(states.backward_masks.sum(-1), inner.long())
    assert torch.bincount(graph.target, minlength=len(graph.states)).max() == 1
    child = env.states_from_tensor(graph.states[graph.target])
    assert torch.equal(child.backward_masks.int().argmax(-1), graph.action)
    parent = env.backward_step(child, env.actions_from_tensor(graph.action[:, None])).tensor
    assert torch.equal(parent, graph.states[graph.source])


def test_masks_never_leave_a_dead_end():
    env = FragmentTrees()
    x = random_walk(env, 300, stop=0.1, generator=torch.Generator().manual_seed(0))
    masks = env.states_from_tensor(x).forward_masks
    assert masks[:, -1].all() and (x[:, 0] > 0).all()
    assert not env.states_from_tensor(env.s0[None]).forward_masks[0, -1]


def test_heteroatoms_are_not_joined_unless_asked_for():
    pattern = Chem.MolFromSmarts("[N,O,S;X1,X2,X3,X4]-[F,Cl,Br,I,O,N]")
    vocabulary = [["C", [0, 0]], ["O", [0, 0]], ["N", [0, 0, 0]], ["Cl", [0]], ["O=[SH2]=O", [1, 1]]]
    env, _, x = listed(vocabulary, 3, hetero_bonds=False)
    sulphonyl = Chem.MolFromSmarts("S(=O)(=O)-[N,O,Cl]")
    hits = [m for m in env.molecules(x) if m.HasSubstructMatch(pattern) and not m.HasSubstructMatch(sulphonyl)]
    assert not hits
    assert any(m.HasSubstructMatch(sulphonyl) for m in env.molecules(x))
    free, _, y = listed(vocabulary, 3, hetero_bonds=True)
    assert len(y) > len(x) and any(m.HasSubstructMatch(pattern) for m in free.molecules(y))


@pytest.mark.parametrize("hetero_bonds", [False, True])
def test_random_assemblies_of_the_default_vocabulary_are_valid_molecules(hetero_bonds):
    env = FragmentTrees(hetero_bonds=hetero_bonds)
    x = random_walk(env, 2000, stop=0.05, generator=torch.Generator().manual_seed(1))
    for smiles in env.decode(x):  # assembling has sanitised them already
        again = Chem.MolFromSmiles(smiles)
        assert again is not None and Chem.MolToSmiles(again) == smiles


def test_the_default_vocabulary_is_large_and_fits_four_points():
    vocabulary = Vocabulary.read()
    assert len(vocabulary) >= 80 and max(len(sites) for _, sites in vocabulary) == 4


def test_symmetries_of_the_default_vocabulary_keep_all_attachment_points():
    """Else two names of one molecule were counted as two trees."""
    for molecule, (smiles, sites) in zip(Vocabulary.read().molecules, Vocabulary.read(), strict=True):
        points, H = set(sites), [atom.GetTotalNumHs() for atom in molecule.GetAtoms()]
        images = [
            t for t in molecule.GetSubstructMatches(molecule, uniquify=False) if all(H[a] == H[b] for a, b in enumerate(t))
        ]
        whole = [{a: t[a] for a in points} for t in images if {t[a] for a in points} == points]
        for t in images:
            part = {a: t[a] for a in points if t[a] in points}
            assert not part or any(part.items() <= full.items() for full in whole), smiles


# Policies


@pytest.fixture(scope="module")
def tiny():
    torch.set_default_dtype(torch.float64)
    env, graph, x = listed(TINY, 3)
    yield env, graph, x
    torch.set_default_dtype(torch.float32)


def test_a_tree_is_scored_exactly_as_step_by_step(tiny):
    env, graph, x = tiny
    model = policy(env)
    p = exact.terminal_distribution(model)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    log_p = model.policy.module.log_p(x, torch.full((len(x),), 32.0)).detach()
    assert (log_p.exp() - p[graph.allowed[:, -1]]).abs().max() < 1e-14
    assert (path_ratios([model], x)[:, 0] - log_p).abs().max() < 1e-10


def test_trees_come_out_with_the_probabilities_of_the_policy(tiny):
    env, graph, _ = tiny
    model, n = policy(env), 20_000
    p = exact.terminal_distribution(model)
    noise = (p * (1 - p) * 2 / (torch.pi * n)).sqrt().sum()
    fast = model.policy.module.sample(torch.full((n,), 32.0), torch.Generator().manual_seed(0))
    slow = model.sample(n, generator=torch.Generator().manual_seed(0)).x
    for x in (fast, slow):
        assert exact.l1(exact.histogram(env, x), p) < 1.5 * noise


def one_by_one(model, states):
    network = model.policy.module.train()  # in training nothing is remembered
    beta = torch.full((1, 1), model.condition["beta"])
    out = torch.cat([network(state[None], beta) for state in states])
    network.eval()
    return out


@torch.no_grad()
def test_states_read_together_are_read_as_one_by_one(tiny):
    env, graph, _ = tiny
    model = policy(env)
    expected = one_by_one(model, graph.states)
    assert torch.equal(expected > -torch.inf, graph.allowed)
    finite = graph.allowed
    assert (model.log_pf(graph.states)[finite] - expected[finite]).abs().max() < 1e-12
    with torch.enable_grad():
        assert (model.log_pf(graph.states.flip(0)).flip(0)[finite] - expected[finite]).abs().max() < 1e-12


@torch.no_grad()
def test_what_is_remembered_from_step_to_step_changes_nothing():
    env = FragmentTrees(TINY, 5)
    model, other = policy(env), policy(env, beta=96.0)
    other.policy.module.load_state_dict(model.policy.module.state_dict())
    other.policy = model.policy  # one network under two exponents
    network, used = model.policy.module, 0
    find = type(network.memory).find
    s = env.s0.expand(40, -1).clone()
    g = torch.Generator().manual_seed(0)
    for t in range(2 * env.slots):
        s = s[torch.randint(len(s), (40,), generator=g)]  # resampled
        log_p = torch.empty(40, env.n_actions, dtype=torch.float64)
        for part in torch.arange(40).split(15):  # in chunks
            log_p[part] = model.log_pf(s[part]).double()
        used += int((find(network.memory, (t + 1) // 2, s.clone().index_fill_(1, torch.arange(t + t % 2, 10), 0)) >= 0).sum())
        if t in (3, 6):
            other.log_pf(s)  # another condition in between
        if t == 5:
            network.out.weight.mul_(1.5)  # other weights
        else:
            finite = log_p > -torch.inf
            assert (log_p[finite] - one_by_one(model, s)[finite]).abs().max() < 1e-5
        log_p[:, -1] = torch.where((log_p[:, :-1] > -torch.inf).any(-1), -torch.inf, 0.0)
        a = torch.multinomial(log_p.exp(), 1, generator=g)
        s, a = s[a[:, 0] < env.n_actions - 1], a[a[:, 0] < env.n_actions - 1]
        s = env.step(env.states_from_tensor(s), env.actions_from_tensor(a)).tensor
    assert used == 40 * 9 and not network.memory.depths  # nothing is left of it at the end


def test_trees_of_different_exponents_can_be_drawn_in_one_batch(tiny):
    env, _, x = tiny
    network = policy(env).policy.module
    beta = torch.rand(len(x)) * 96
    together = network.log_p(x, beta)
    apart = torch.cat([network.log_p(x[i : i + 1], beta[i : i + 1]) for i in range(len(x))])
    assert (together - apart).abs().max() < 1e-12


def test_dividing_by_the_writings_makes_trees_come_in_proportion_to_their_reward(tiny):
    env, graph, x = tiny
    g = torch.Generator().manual_seed(0)
    smiles = env.decode(x)
    R = {s: float(r) for s, r in zip(sorted(set(smiles)), torch.rand(len(set(smiles)), generator=g) + 0.1, strict=True)}
    log_R = torch.full((len(graph.states),), float("-inf"))
    log_R[graph.allowed[:, -1]] = torch.tensor([R[s] for s in smiles]).log() - env.writings(x).log()
    p = exact.terminal_distribution(exact.solve(env, log_R))[graph.allowed[:, -1]]
    total = sum(R.values())
    for s in R:
        share = sum(float(q) for q, t in zip(p, smiles, strict=True) if t == s)
        assert share == pytest.approx(R[s] / total, abs=1e-12)


def test_compositions_of_tree_policies_are_exact_on_both_roads(tiny):
    env, graph, _ = tiny
    models = [policy(env, seed=i) for i in range(2)]
    both = models[0] & models[1]
    target = exact.target(both.formula, [exact.terminal_distribution(model) for model in models])
    guided = both.guided(exact.ExactClassifier(models))
    assert exact.l1(exact.terminal_distribution(guided), target) < 1e-10
    n = 20_000
    tracked = both.sample(n, generator=torch.Generator().manual_seed(0))
    noise = (target * (1 - target) * 2 / (torch.pi * n)).sqrt().sum()
    assert exact.l1(exact.histogram(env, tracked.x), target) < 3 * noise


def test_torchgfn_samples_trees_and_walks_them_back():
    env = FragmentTrees()
    model = policy(env)
    conditions = torch.full((32, 1), 32.0)
    trajectories: Trajectories = Sampler(model.as_estimator()).sample_trajectories(
        env, n=32, conditions=conditions, save_logprobs=True
    )
    x = trajectories.terminating_states.tensor
    log_p = model.policy.module.log_p(x, conditions[:, 0])
    assert (trajectories.log_probs.sum(0) - log_p).abs().max() < 1e-4
    assert len(env.decode(x)) == 32


def test_a_checkpoint_brings_its_vocabulary(tmp_path):
    env = FragmentTrees(TINY, slots=4)
    model = policy(env, seed=3)
    model.save_pretrained(tmp_path)
    again = sculpt.load(tmp_path, beta=32.0)
    assert again.env.vocabulary == env.vocabulary and describe(again.env) == describe(env) and again.key == model.key
    x = model.sample(50, generator=torch.Generator().manual_seed(0)).x
    assert torch.equal(x, again.sample(50, generator=torch.Generator().manual_seed(0)).x)
    # The vocabulary stands in the files as it is, and in messages as a word.
    assert json.loads((tmp_path / "config.json").read_text())["environment"]["arguments"]["vocabulary"] == json.loads(
        json.dumps(TINY)
    )
    assert "3 fragments" in str(env.arguments)


def test_a_checkpoint_is_not_read_with_another_vocabulary_of_the_same_shape(tmp_path):
    policy(FragmentTrees([["C", [0, 0]], ["N", [0]]], slots=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other arguments"):
        sculpt.load(tmp_path, env=FragmentTrees([["CC", [0, 1]], ["N", [0]]], slots=3), beta=32.0)


def test_policies_on_other_vocabularies_do_not_compose():
    p, q = policy(FragmentTrees(TINY, 3)), policy(FragmentTrees(TINY[:2], 3))
    with pytest.raises(ValueError, match="cannot be composed: environment"):
        p & q


# What can be wrong with a vocabulary


@pytest.mark.parametrize(
    "fragments, message",
    [
        ([["C", [0]], ["c1cccc", [0]]], "Fragment 1 .* is no valid molecule"),
        ([["C", [1]]], "Attachment point 1 of fragment 0, 'C', is out of range: it has atoms 0 to 0"),
        ([["CC(C)(C)C", [1]]], "no free valence for it"),
        ([["C", [0] * 5]], "to hold 5 bond"),
        ([["C", []]], "no attachment point"),
        ([["C.C", [0]]], "falls apart"),
        ([["C", 0]], r"expected .smiles, .atom, ......"),
        (["C"], r"expected .smiles, .atom, ......"),
    ],
)
def test_a_vocabulary_that_cannot_work_is_refused(fragments, message):
    with pytest.raises(ValueError, match=message):
        FragmentTrees(fragments)


def test_a_vocabulary_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no vocabulary"):
        FragmentTrees(str(tmp_path / "missing.json"))
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="at least one fragment"):
        FragmentTrees(str(tmp_path / "empty.json"))


def test_the_start_is_no_molecule():
    env = FragmentTrees(TINY)
    with pytest.raises(ValueError, match="The initial state is no molecule"):
        env.decode(env.s0[None])
    with pytest.raises(ValueError, match="has no reward"):
        env.log_reward(env.states_from_tensor(env.s0[None]))
