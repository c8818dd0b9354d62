"""Every training scheduler against its diffusers twin: the same step from the same noise, in canonical coordinates."""

import math

import diffusers
import pytest
import torch

from sculpt.diffusion.diffusers.schedules import schedule_of

VP_TYPES = ("epsilon", "sample", "v_prediction")
PLAIN = {"clip_sample": False}
FIRST_ORDER = {"solver_order": 1, "timestep_spacing": "leading"}
LEADING = {"timestep_spacing": "leading"}

# Canonical steps from s to r, v = s^2 and u = r^2, with S = (D - z) / v.
STEPS = {
    "ode": lambda z, s, r, D, xi: D + r / s * (z - D),
    "ancestral": lambda z, s, r, D, xi: z + (s**2 - r**2) * (D - z) / s**2 + r * (1 - r**2 / s**2).sqrt() * xi,
    "exploding": lambda z, s, r, D, xi: z + (s**2 - r**2) * (D - z) / s**2 + (s**2 - r**2).sqrt() * xi,
    "renoise": lambda z, s, r, D, xi: D + r * xi,
}

# Class, arguments, whether its state is z (else the network's input), the step it takes, prediction types.
TWINS = [
    ("DDPMScheduler", PLAIN, False, "ancestral", VP_TYPES),
    ("DDPMParallelScheduler", PLAIN, False, "ancestral", VP_TYPES),
    ("DDIMScheduler", PLAIN, False, "ode", VP_TYPES),
    ("DDIMParallelScheduler", PLAIN, False, "ode", VP_TYPES),
    ("CogVideoXDDIMScheduler", {}, False, "ode", VP_TYPES),
    ("PNDMScheduler", {"skip_prk_steps": True}, False, "ode", ("epsilon", "v_prediction")),
    ("DPMSolverMultistepScheduler", FIRST_ORDER, False, "ode", VP_TYPES),
    ("DPMSolverMultistepScheduler", FIRST_ORDER | {"algorithm_type": "sde-dpmsolver++"}, False, "ancestral", VP_TYPES),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}, False, "ode", VP_TYPES),
    ("UniPCMultistepScheduler", FIRST_ORDER, False, "ode", VP_TYPES),
    ("DEISMultistepScheduler", FIRST_ORDER, False, "ode", VP_TYPES),
    ("SASolverScheduler", LEADING | {"predictor_order": 1, "tau_func": lambda t: 0}, False, "ode", VP_TYPES),
    ("EulerDiscreteScheduler", LEADING, True, "ode", VP_TYPES),
    ("EulerAncestralDiscreteScheduler", LEADING, True, "ancestral", ("epsilon", "v_prediction")),
    ("HeunDiscreteScheduler", LEADING, True, "ode", VP_TYPES),
    ("KDPM2DiscreteScheduler", LEADING, True, "ode", ("epsilon", "v_prediction")),
    ("KDPM2AncestralDiscreteScheduler", LEADING, True, "ode", ("epsilon", "v_prediction")),
    ("LMSDiscreteScheduler", LEADING, True, "ode", VP_TYPES),
    ("EDMEulerScheduler", {}, True, "ode", ("epsilon", "v_prediction")),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 1}, True, "ode", ("epsilon", "v_prediction")),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, False, "ode", (None,)),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, False, "renoise", (None,)),
    ("FlowMatchHeunDiscreteScheduler", {}, False, "ode", (None,)),
    ("FlowMatchLCMScheduler", {}, False, "renoise", (None,)),
    *(
        (
            name,
            FIRST_ORDER | {"use_flow_sigmas": True, "flow_shift": 3.0},
            False,
            "ode",
            ("flow_prediction", "epsilon", "sample"),
        )
        for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
    ),
]
CASES = [
    pytest.param(
        name, kwargs | ({"prediction_type": prediction} if prediction else {}), in_z, step, id=f"{name}-{prediction}-{step}"
    )
    for name, kwargs, in_z, step, predictions in TWINS
    for prediction in predictions
]


def make(name, **kwargs):
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    return getattr(diffusers, name)(**kwargs)


def next_level(scheduler, schedule, i):
    """Where the scheduler's first stage from its i-th time leads."""
    t = scheduler.timesteps[i]
    if not hasattr(scheduler, "sigmas"):
        return schedule.sigma(t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps)
    midpoints = getattr(scheduler, "sigmas_interpol", None)  # the two KDPM2 count theirs differently
    ahead = i if "Ancestral" in type(scheduler).__name__ and midpoints is not None else i + 1
    sigma = (scheduler.sigmas if midpoints is None else midpoints)[ahead].double()
    flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas")
    return sigma / (1 - sigma) if flow else sigma


def this_level(scheduler, schedule, i):
    """The level of the scheduler's i-th time, which has to be that of our clock."""
    s = schedule.sigma(scheduler.timesteps[i])
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[i].double()
        if type(schedule).__name__ == "Flow":
            # The multistep solvers hand the network a truncated time; the flow's own schedulers do not.
            assert abs(float(scheduler.timesteps[i]) - 1000 * float(sigma)) < (
                1 if scheduler.config.get("use_flow_sigmas") else 1e-3
            )
            return sigma / (1 - sigma)
        torch.testing.assert_close(s, sigma, rtol=3e-5, atol=0)
        return sigma
    return s


@pytest.mark.parametrize("i", [1, 4])
@pytest.mark.parametrize(("name", "kwargs", "in_z", "step"), CASES)
def test_a_canonical_step_is_the_schedulers_own_step(name, kwargs, in_z, step, i):
    scheduler = make(name, **kwargs)
    schedule = schedule_of(scheduler)
    scheduler.set_timesteps(10)
    i = 2 * i if "Heun" in name or "KDPM2" in name else i  # these list each time twice
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = i
    generator = torch.Generator().manual_seed(0)
    s, r = this_level(scheduler, schedule, i), next_level(scheduler, schedule, i)
    F = torch.randn(3, 2, 4, 4, generator=generator)
    z = (1 + s) * torch.randn(3, 2, 4, 4, generator=generator).double()
    t = scheduler.timesteps[i]
    # Float32 parts of the scheduler's own arithmetic bound the agreement; ours runs in float64.
    state = (z if in_z else schedule.scale(s) * z).float()
    if in_z:
        torch.testing.assert_close(scheduler.scale_model_input(state, t).double(), schedule.scale(s) * z, rtol=1e-5, atol=1e-5)
    seed = 7
    torch.manual_seed(seed)
    options = {} if step == "ode" else {"generator": torch.Generator().manual_seed(seed)}
    if name.startswith("LMS"):
        options["order"] = 1
    twin = scheduler.step(F, t, state, **options).prev_sample.double()
    xi = torch.randn(F.shape, generator=torch.Generator().manual_seed(seed)).double()
    D = schedule.denoised(z, s, F.double())
    ours = STEPS[step](z, s, r, D, xi)
    if in_z:
        twin, ours = twin / (1 + r), ours / (1 + r)
    else:
        ours = schedule.scale(r) * ours
    torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("t", "tolerance"), [(999, 1e-6), (700, 1e-6), (500, 1e-6), (100, 2e-5), (1, 2e-4)])
@pytest.mark.parametrize("prediction_type", VP_TYPES)
def test_a_ddpm_step_agrees_to_float32(t, tolerance, prediction_type):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small", prediction_type=prediction_type)
    schedule = schedule_of(scheduler)
    s, r = schedule.sigma(torch.tensor(t)), schedule.sigma(torch.tensor(t - 1))
    F, x = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(t))
    xi = torch.randn(5, 2, generator=torch.Generator().manual_seed(7))
    z = x.double() / schedule.scale(s)
    ours = schedule.scale(r) * STEPS["ancestral"](z, s, r, schedule.denoised(z, s, F.double()), xi.double())
    twin = scheduler.step(F, t, x, generator=torch.Generator().manual_seed(7)).prev_sample.double()
    assert (ours - twin).abs().max() < tolerance * max(1.0, twin.abs().max())


@pytest.mark.parametrize("i", [3, 200, 998])
def test_a_variance_exploding_step_is_the_schedulers_prediction_step(i):
    scheduler = diffusers.ScoreSdeVeScheduler(num_train_timesteps=1000)
    schedule = schedule_of(scheduler)
    s, r = scheduler.discrete_sigmas[i].double(), scheduler.discrete_sigmas[i - 1].double()
    F, z = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    xi = torch.randn(5, 2, generator=torch.Generator().manual_seed(7))
    F, z = F / s.float(), z * s.float()
    scheduler.set_timesteps(1000)
    t, generator = torch.tensor(i / 999 + 1e-5), torch.Generator().manual_seed(7)
    twin = scheduler.step_pred(F, t, z, generator=generator).prev_sample.double()
    D = schedule.denoised(z.double(), s, F.double())
    ours = STEPS["exploding"](z.double(), s, r, D, xi.double())
    torch.testing.assert_close(ours / s, twin / s, rtol=2e-5, atol=2e-5)
    assert schedule.time(s) == s.float() and (schedule.s_min, schedule.s_max) == (0.01, 1348.0)


ALL = [
    diffusers.DDPMScheduler(),
    diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"),
    diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
    ),
    diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    diffusers.UnCLIPScheduler(prediction_type="sample"),
    diffusers.DDPMScheduler(trained_betas=[0.001, 0.01, 0.1, 0.3, 0.6]),
    diffusers.EDMEulerScheduler(),
    diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.UniPCMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True),
    diffusers.ScoreSdeVeScheduler(),
]
IDS = [f"{i}-{type(scheduler).__name__}" for i, scheduler in enumerate(ALL)]


@pytest.mark.parametrize("scheduler", ALL, ids=IDS)
def test_times_and_levels_are_inverse_to_each_other(scheduler):
    schedule = schedule_of(scheduler)
    s = torch.logspace(math.log10(schedule.s_min), math.log10(min(schedule.s_max, 1e3)), 400, dtype=torch.float64)
    t = schedule.time(s)
    assert t.dtype == torch.float32 and (t.double().diff() > 0).all()
    # A float32 time around 1000 is exact to 3e-5, and the cosine's log s rises by 3.5 over its last unit.
    torch.testing.assert_close(schedule.sigma(t), s, rtol=2e-4, atol=0)
    assert schedule.time(s[7]) == t[7] and schedule.sigma(t[7]).shape == ()


@pytest.mark.parametrize("scheduler", ALL, ids=IDS)
@pytest.mark.parametrize("batched", [True, False])
def test_outputs_and_denoised_samples_are_inverse_to_each_other(scheduler, batched):
    schedule = schedule_of(scheduler)
    s = torch.logspace(math.log10(schedule.s_min * 2), math.log10(min(schedule.s_max, 1e3)), 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    z, F = torch.randn(2, 6, 3, 2, dtype=torch.float64, generator=generator)
    s = s if batched else s[3]
    D = schedule.denoised(z, s, F)
    torch.testing.assert_close(schedule.output(z, s, D), F, rtol=1e-9, atol=1e-9)
    one = schedule.denoised(z[3:4], s[3] if batched else s, F[3:4])
    torch.testing.assert_close(one, D[3:4])
    assert schedule.denoised(z.float(), s, F.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "ends"),
    [
        ({}, (0.01, 157.4)),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, (0.0292, 14.61)),
        ({"beta_schedule": "squaredcos_cap_v2"}, (0.00642, 20291.0)),
    ],
)
def test_the_ranges_are_the_ones_of_the_betas(kwargs, ends):
    schedule = schedule_of(diffusers.DDPMScheduler(**kwargs))
    assert (schedule.s_min, schedule.s_max) == pytest.approx(ends, rel=1e-2)
    assert (
        schedule.time(torch.tensor(1e9, dtype=torch.float64)) == 999
        and schedule.time(torch.tensor(1e-9, dtype=torch.float64)) == 0
    )


def test_a_true_network_output_denoises_exactly_whatever_it_predicts():
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.tensor(0.7, dtype=torch.float64)
    alpha = (1 + s**2).rsqrt()
    sigma = s * alpha
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
    for prediction_type, F in outputs.items():
        schedule = schedule_of(diffusers.DDPMScheduler(prediction_type=prediction_type))
        torch.testing.assert_close(schedule.denoised(x0 + s * eps, s, F), x0)
    flow = schedule_of(diffusers.FlowMatchEulerDiscreteScheduler())
    torch.testing.assert_close(flow.denoised(x0 + s * eps, s, eps - x0), x0)
    score = schedule_of(diffusers.ScoreSdeVeScheduler())
    torch.testing.assert_close(score.denoised(x0 + s * eps, s, -eps / s), x0)


def test_zero_terminal_snr_ends_at_infinite_noise():
    for cls in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):  # the latter stores 2^-24 in place of the zero
        schedule = schedule_of(cls(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
        assert schedule.s_max == math.inf
        assert schedule.sigma(torch.tensor(999)) == math.inf
        t = torch.linspace(990, 998.99, 300, dtype=torch.float64)
        s = schedule.sigma(t)
        assert s.isfinite().all() and (s.diff() > 0).all()
        far = torch.tensor([2e4, 1e5], dtype=torch.float64)
        torch.testing.assert_close(schedule.sigma(schedule.time(far)), far, rtol=1e-3, atol=0)
    # From pure noise a predicted noise says nothing about the sample.
    assert schedule_of(diffusers.DDIMScheduler(rescale_betas_zero_snr=True)).s_max < math.inf


def test_shifts_and_solver_settings_do_not_change_the_path():
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    assert schedule_of(flow(shift=3.0)).identity == schedule_of(flow()).identity
    assert schedule_of(flow(shift=3.0)).sigma(torch.tensor(500.0)) == 1.0
    ddpm = diffusers.DDPMScheduler()
    for cls in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        assert schedule_of(cls.from_config(ddpm.config)).identity == schedule_of(ddpm).identity
    assert schedule_of(diffusers.DDPMScheduler(beta_end=0.03)).identity != schedule_of(ddpm).identity
    assert schedule_of(diffusers.DDPMScheduler(prediction_type="sample")).identity != schedule_of(ddpm).identity


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: object(), "object.*Supported"),
        (diffusers.LCMScheduler, "LCMScheduler.*Supported"),
        (lambda: diffusers.DDPMScheduler(prediction_type="rectified"), "rectified.*epsilon, sample"),
        (lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="v_prediction"), "v_prediction"),
        (lambda: diffusers.DDPMScheduler(trained_betas=[0.0, 0.0, 0.1]), "increase strictly"),
    ],
)
def test_a_scheduler_without_a_known_path_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        schedule_of(make())
