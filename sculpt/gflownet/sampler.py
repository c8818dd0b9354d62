r"""Rollouts: many trajectories at once, without torchgfn's ``Trajectories``.

Only active trajectories are touched, equal states are evaluated once, and all randomness is one inverse-cdf draw per step
from ``generator``. torchgfn's own ``Sampler`` takes the same policies through ``as_estimator``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from sculpt.formula import Formula, Nested
from sculpt.gflownet.model import NEG_INF, GFlowNet, distinct
from sculpt.gflownet.policy import ComposedPolicy, guide
from sculpt.particles import Diagnostics, Population, Samples

__all__ = ["backward_paths", "guide", "path_ratios", "rollout", "sample", "track"]


def draw(log_p: Float[Tensor, "u a"], rows: Int[Tensor, "b"], generator: torch.Generator | None = None) -> Int[Tensor, "b"]:
    """One action for each of ``rows``, by inverse cdf. Actions of probability zero are never drawn."""
    cdf = log_p.exp().cumsum(-1)
    device = log_p.device if generator is None else generator.device
    u = torch.rand(len(rows), generator=generator, dtype=torch.float64, device=device).to(log_p.device)
    # A hair under the last value of the cdf, where rounding would leave the list of actions.
    u = u * cdf[rows, -1] * (1 - 2.0**-50)
    return (cdf[rows] <= u[:, None]).sum(-1)


@torch.no_grad()
def rollout(model: GFlowNet, n: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """n trajectories, step by step: which of them are still going, their states, and the actions they take."""
    states, index = _starts(model, n), torch.arange(n, device=model.device)
    while len(index):
        unique, rows = distinct(states)
        actions = draw(model.log_pf(unique), rows, generator)
        yield index, states, actions
        go = actions != model.env.n_actions - 1
        index, states = index[go], model.step(states[go], actions[go])


@torch.no_grad()
def sample(
    model: GFlowNet,
    n: int,
    *,
    correct: bool | str = False,
    particles: int | None = None,
    threshold: float | None = None,
    resample: bool = True,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Samples:
    r"""n terminal states of a base model or a guided composition.

    An anchored composition keeps the weights of its paths as a diagnostic; with ``correct`` they select, and the result is
    exact for the terminal head, whatever h is in between:

    .. math::
        \log w_0 = \log h(s_0), \qquad
        \log w \mathrel{+}= \log h(s') - \log h(s) + \log P_{y_1}(s'|s) - \log P(s'|s)

    With :math:`P(s'|s) = P_{y_1}(s'|s) h(s') / N(s)` a step adds :math:`\log N(s) - \log h(s)`, h(s) as it was when s was entered.

    With ``correct="densities"`` each trajectory carries the base models' log-densities along, and they take the terminal head's
    place at the exit: exact whatever the classifier, where a state has one parent or the flows balance. Then it selects at the end alone,
    unless ``threshold`` says otherwise: by h, trajectories are thrown away on the word of a classifier that the densities overrule.
    """
    if n < 1:
        raise ValueError(f"The number of samples has to be at least 1, got n={n}.")
    policy = model.policy
    weighted = isinstance(policy, ComposedPolicy) and policy.form == "anchored"
    if correct and not weighted:
        raise ValueError(
            f"Only the anchored form of a guided composition can be corrected, got {model}. Leave correct out, or pass form='anchored'."
        )
    if correct not in (False, True, "densities"):
        raise ValueError(f"correct is True, False or 'densities', got {correct!r}.")
    if not correct and (particles is not None or not resample):
        raise ValueError(
            "particles and resample=False belong to a population with weights: add correct=True, or leave the classifier out."
        )
    if not weighted:
        road = "classifier, mixture form" if isinstance(policy, ComposedPolicy) else "base model"
        return _independent(model, n, Diagnostics(road, str(model)), batch_size, generator, progress)

    def propose(states, log_h):
        unique, rows = distinct(states)
        log_p, log_h_next = policy.scores(unique)
        log_N = torch.logsumexp(log_p + log_h_next, dim=-1)
        actions = draw(log_p + log_h_next - log_N[:, None], rows, generator)
        return log_N[rows] - log_h[:, 0], actions, log_h_next[rows, actions, None]

    def propose_by_densities(states, carry):
        log_h, ell = carry[:, 0], carry[:, 1:]
        unique, rows = distinct(states)
        log_p, log_h_next = (part[rows] for part in policy.scores(unique))
        ratio = _log_ratios(policy.models, unique)
        stop = log_p[:, -1] > NEG_INF
        log_h_next[stop, -1] = policy.log_h_of((ell + ratio[rows, -1])[stop])
        log_N = torch.logsumexp(log_p + log_h_next, dim=-1)
        dead = log_N == NEG_INF  # only the exit is left, and not all labels are possible there
        log_pi = torch.where(dead[:, None], log_p, log_p + log_h_next - log_N[:, None])
        actions = draw(log_pi, torch.arange(len(states), device=states.device), generator)
        entered = log_h_next.gather(1, actions[:, None])
        return torch.where(dead, NEG_INF, log_N - log_h), actions, torch.cat([entered, ell + ratio[rows, actions]], dim=1)

    N = _population_size(n, particles) if correct else n
    if threshold is None:
        threshold = 0.5 if correct is True else 0.0
    population = Population(N, threshold=threshold if correct else 0.0, generator=generator, device=model.device)
    log_h = policy.log_h(_starts(model, 1)).expand(N)
    population.reweight(log_h)
    diagnostics = Diagnostics("classifier, anchored form" + ", corrected" * bool(correct), str(model))
    carry, batch_size = log_h[:, None].clone(), batch_size or batch_of(model)
    if correct == "densities":
        policy.check_densities()
        diagnostics.road += " by densities"
        carry = torch.cat([carry, carry.new_zeros(N, len(policy.models))], dim=1)
        propose, batch_size = propose_by_densities, max(1, batch_size // len(policy.models))
    x = _particles(model, population, propose, carry, diagnostics, batch_size, progress)
    diagnostics.observe(population, acceptance=math.exp(min(0.0, population.log_z)), selected=bool(correct))
    if not correct:
        return model.result(x, None, diagnostics)
    samples = population.samples(x, n, diagnostics, model.result, resample)
    if correct == "densities" and (note := _disagreement(policy.models, samples.x[:64], generator)) is not None:
        diagnostics.notes.append(note)
    return samples


def _log_ratios(models: Sequence[GFlowNet], states: Shaped[Tensor, "u *s"]) -> Float[Tensor, "u a m"]:
    r""":math:`\log P_i(s'|s) - \log P_B^i(s|s')` of every action, up to a common term where the models share their backward policy."""
    log_p = torch.stack([model.log_pf(states) for model in models], dim=-1)
    if len({model.backward_key for model in models}) == 1:
        return log_p
    return log_p - torch.stack([_children_log_pb(model, states, log_p) for model in models], dim=-1)


def _independent(
    model: GFlowNet,
    n: int,
    diagnostics: Diagnostics,
    batch_size: int | None,
    generator: torch.Generator | None,
    progress: bool,
) -> Samples:
    x = _starts(model, n)
    with _bar(model, n, progress) as bar:
        for chunk in torch.arange(n, device=model.device).split(batch_size or batch_of(model)):
            for t, (index, states, actions) in enumerate(rollout(model, len(chunk), generator), 1):
                stop = actions == model.env.n_actions - 1
                x[chunk[index[stop]]] = states[stop]
                diagnostics.steps = max(diagnostics.steps, t)
                bar.set_postfix_str(f"step {t}", refresh=False)
                bar.update(int(stop.sum()))
    return model.result(x, None, diagnostics)


@torch.no_grad()
def track(
    formula: Formula,
    models: Sequence[GFlowNet],
    n: int,
    *,
    particles: int | None = None,
    threshold: float = 0.5,
    resample: bool = True,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Samples:
    r"""Any formula of the base models' densities, which each trajectory carries along: nothing is trained.

    .. math::
        \ell_i(s') = \ell_i(s) + \log P_i(s'|s) - \log P_B^i(s|s'), \qquad \pi(s'|s) \propto e^{\Phi(\ell(s'))} P_B(s|s'), \qquad
        \log w \mathrel{+}= \log \textstyle\sum_{s'} e^{\Phi(\ell(s'))} P_B(s|s') - \Phi(\ell(s))
    """
    first = models[0]
    shared = len({model.backward_key for model in models}) == 1
    # A common P_B only shifts the log-densities, and a formula of degree one takes a shift out of itself: then it cancels
    # in proposal and weight, and the children need not be visited.
    cancels = shared and _degree_one(formula)

    def propose(states, ell):
        unique, rows = distinct(states)
        log_p = torch.stack([model.log_pf(unique) for model in models], dim=-1)
        log_b = torch.zeros_like(log_p[..., 0]) if cancels else _children_log_pb(first, unique, log_p)
        others = [] if shared else [_children_log_pb(model, unique, log_p) for model in models[1:]]
        ratio = log_p - torch.stack([log_b, *others], dim=-1)  # one column serves all where it is shared
        each, action = (log_p > NEG_INF).any(-1)[rows].nonzero(as_tuple=True)
        phi = torch.full((len(states), log_p.shape[1]), NEG_INF, dtype=torch.float64, device=states.device)
        phi[each, action] = formula.value(ell[each] + ratio[rows[each], action]) + log_b[rows[each], action]
        log_N = torch.logsumexp(phi, dim=-1)
        dead = log_N == NEG_INF
        if dead.any():  # nothing is left to go on with: the weight is zero, and any way out will do
            phi[dead] = log_p[rows[dead]].logsumexp(-1)
        log_pi = phi - torch.where(dead, 0.0, log_N)[:, None]
        actions = draw(log_pi, torch.arange(len(states), device=states.device), generator)
        return torch.where(dead, NEG_INF, log_N - formula.value(ell)), actions, ell + ratio[rows, actions]

    N = _population_size(n, particles)
    ell = torch.zeros(N, len(models), dtype=torch.float64, device=first.device)
    population = Population(N, threshold=threshold, generator=generator, device=first.device)
    population.reweight(formula.value(ell))
    diagnostics = Diagnostics("tracked densities", formula.write([str(model) for model in models]))
    chunk = batch_size or max(1, batch_of(first) // len(models))
    x = _particles(first, population, propose, ell, diagnostics, chunk, progress)
    diagnostics.observe(population)
    samples = population.samples(x, n, diagnostics, first.result, resample)
    if (note := _disagreement(models, samples.x[:64], generator)) is not None:
        diagnostics.notes.append(note)
    return samples


def _particles(
    model: GFlowNet,
    population: Population,
    propose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    carry: Float[Tensor, "p k"],
    diagnostics: Diagnostics,
    batch_size: int,
    progress: bool,
) -> Shaped[Tensor, "p *s"]:
    """Run a population to its end, in chunks. Finished particles keep their place and their weight among those still going.

    ``propose(states, carry)`` gives the log-weight increments, the actions, and what to carry on.
    """
    states = _starts(model, population.n)
    going = torch.ones(population.n, dtype=torch.bool, device=model.device)
    with _bar(diagnostics.formula, population.n, progress) as bar:
        while going.any():
            increment = torch.zeros_like(population.log_w)
            for chunk in going.nonzero()[:, 0].split(batch_size):
                increment[chunk], actions, carry[chunk] = propose(states[chunk], carry[chunk])
                go = actions != model.env.n_actions - 1
                states[chunk[go]] = model.step(states[chunk[go]], actions[go])
                going[chunk[~go]] = False
            population.reweight(increment)
            diagnostics.steps += 1
            if (survivors := population.resample()) is not None:
                states, going, carry = states[survivors], going[survivors], carry[survivors]
            # How many have ended, of as many as there are; a resampling may turn it back.
            bar.set_postfix_str(f"step {diagnostics.steps}", refresh=False)
            bar.update(population.n - int(going.sum()) - bar.n)
    if population.lost:
        diagnostics.notes.append(f"{population.lost} particles were lost to numbers that are not finite")
    return states


def _bar(what: GFlowNet | str, n: int, progress: bool) -> tqdm:
    # Most trajectories end in the last few steps, so how many have ended tells nothing of the time that is left.
    form = "{desc}: {n_fmt} of {total_fmt} have ended{postfix} [{elapsed}]"
    return tqdm(total=n, desc=f"sampling {what}", disable=not progress, delay=2, leave=False, bar_format=form)


def _population_size(n: int, particles: int | None) -> int:
    """As many particles as samples, but never so few that weights mean nothing."""
    if particles is not None and particles < n:
        raise ValueError(f"Got particles={particles} for n={n} samples. The population has to be at least as large.")
    return max(n, 2048) if particles is None else particles


@torch.no_grad()
def path_ratios(
    models: Sequence[GFlowNet], x: Shaped[Tensor, "b *s"], generator: torch.Generator | None = None, *, made_by: int = 0
) -> Float[Tensor, "b m"]:
    r""":math:`\log u_i(x) = \sum \log P_i(s'|s) - \log P_B^i(s|s')` along one backward path from each x, drawn by the :math:`P_B` of the model that made it.

    The terminal log-probabilities of base models whose flows balance; otherwise they depend on the path.
    """
    return torch.cat([_path_ratios(models, part, generator, models[made_by]) for part in x.split(_paths_at_once(models[0]))])


def _paths_at_once(model: GFlowNet) -> int:
    return max(1, 8 * batch_of(model) // 64)


def _path_ratios(models, x, generator, first):
    children, parents, actions, owner = backward_paths(first, x, generator)
    ell = torch.zeros(len(x), len(models), dtype=torch.float64, device=x.device)
    if len(owner):
        unique, rows = distinct(children)
        ell.index_add_(0, owner, -torch.stack([model.log_pb(unique)[rows, actions] for model in models], dim=-1))
    # All states at once: a policy that reads a whole path in one pass does.
    unique, rows = distinct(torch.cat([x, parents]))
    actions = torch.cat([torch.full((len(x),), first.env.n_actions - 1, device=x.device), actions])
    log_pf = torch.stack([model.log_pf(unique)[rows, actions] for model in models], dim=-1)
    return ell.index_add(0, torch.cat([torch.arange(len(x), device=x.device), owner]), log_pf)


def backward_paths(
    model: GFlowNet, x: Shaped[Tensor, "b *s"], generator: torch.Generator | None = None
) -> tuple[Shaped[Tensor, "l *s"], Shaped[Tensor, "l *s"], Int[Tensor, "l"], Int[Tensor, "l"]]:
    """One path back from each x by the model's backward policy: child, parent, the action between them, and the row of x."""
    s0 = _starts(model, 1)
    index, states = torch.arange(len(x), device=x.device), x
    steps = [(states[:0], states[:0], index[:0], index[:0])]
    while True:
        inside = (states != s0).flatten(1).any(-1)
        index, states = index[inside], states[inside]
        if not len(index):
            return tuple(torch.cat(column) for column in zip(*steps, strict=True))
        actions = draw(model.log_pb(states), torch.arange(len(index), device=x.device), generator)
        wrapped = model.env.states_from_tensor(states.clone())
        parents = model.env.backward_step(wrapped, model.env.actions_from_tensor(actions[:, None])).tensor
        steps.append((states, parents, actions, index))
        states = parents


def _disagreement(models: Sequence[GFlowNet], x: Tensor, generator: torch.Generator | None, paths: int = 4) -> str | None:
    """How far the ratios of several paths to one state are apart: zero for converged base models."""
    try:
        ell = torch.stack([path_ratios(models, x, generator) for _ in range(paths)])
    except NotImplementedError:
        return None  # the environment cannot walk backwards
    spread = ell.std(0).mean(0).tolist()
    if max(spread) < 1e-9:
        return None
    parts = ", ".join(f"{model} {s:.2g}" for model, s in zip(models, spread, strict=True))
    verdict = "" if max(spread) < 0.2 else " An unconverged base model: expect an error of this size in the log-density."
    return f"path ratios to one state differ by (standard deviation, nats): {parts}.{verdict}"


def _children_log_pb(model: GFlowNet, states: Tensor, log_p: Tensor) -> Float[Tensor, "b a"]:
    """log P_B(s|s') per action; zero for the exit, which nothing else leads to."""
    out = torch.zeros_like(log_p[..., 0])
    rows, actions, children = model.children(states, (log_p > NEG_INF).any(-1))
    if len(rows):
        unique, index = distinct(children)
        out[rows, actions] = model.log_pb(unique)[index, actions]
    return out


def _degree_one(formula: Formula) -> bool:
    if isinstance(formula, Nested):
        return all(_degree_one(part) for part in (formula.outer, *formula.parts))
    return abs(formula.degree - 1) < 1e-12


def _starts(model: GFlowNet, n: int) -> Tensor:
    return model.env.s0.expand(n, *model.env.state_shape).clone()


def batch_of(model: GFlowNet) -> int:
    """How many trajectories at a time: at most 2²¹ numbers per table over actions."""
    return max(1, 2**21 // model.env.n_actions)
