r"""The coloured-digit models: ``python pretrained/digits/recipe.py {trunk,cyan,...} [--steps n] [--more | --card n]``.

One network learns the five data sets together, told by a label which of them an image is from. Each model starts as that
network with its label built in, and is then trained on its own data set alone; ``--more`` trains a saved model further, and first
gives ``cyan``, which knows ten digits, more layers and attention. ``--wide`` starts from scratch instead, with a wider network. In
canonical coordinates, :math:`z = x_0 + s \varepsilon`, whatever the schedule and the prediction type,

.. math:: \text{loss} = w(s) \, |F(z, s) - F^*|^2, \qquad w(s) \propto (1 + s^{-2}) \, |\partial D / \partial F|^2

with F* the output that says :math:`D = x_0`: the plain v-prediction loss in every parametrisation. Colours are put on while training.
A killed run goes on where it stopped, bit for bit, unless its learning rate follows the clock (``--minutes``).
"""

import argparse
import copy
import functools
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import recipes
from coloured_mnist import CLASSES, DATA, LICENCE, coloured, draw_colours, mnist, proportions, rows
from recipes import table, written_cost, written_steps

from sculpt import plots
from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.adapter import Diffusion
from sculpt.diffusion.diffusers.schedules import Schedule, schedule_of
from sculpt.files import replacing, settled
from sculpt.model import randn
from sculpt.training import Row, Training, cosine, read_state

HERE = Path(__file__).parent
NETWORK = {"block_out_channels": (16, 32, 64, 96), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 32}
BATCH = 64
STEPS = {"trunk": 7000, "cyan": 2500, "zero-one": 1200, "zero-two": 1200, "red-green": 1200, "green": 800}
RATE = {"trunk": 2e-3}
FINE = 6e-4
LARGE = ("cyan",)
WIDE = {"block_out_channels": (16, 64, 96, 128), "layers_per_block": 2}
"""Where a digit gets its shape, at 16×16 and below, this is wider; the full resolution costs a CPU most and stays as it is."""
WIDE_STEPS, WIDE_BATCH, WIDE_RATE = 7000, 512, 1.5e-3
SHARES = {"cyan": 0.4, "zero-one": 0.15, "zero-two": 0.15, "red-green": 0.15, "green": 0.15}
"""Of the trunk's batches: ten digits are more to learn than two."""
FOCUS, SHAPE = 0.7, (0.7, 7.0)
"""Of the noise levels, this share lies where a digit gets its shape; the models of before this was found have runs without it."""


def scheduler(name: str) -> DDPMScheduler:
    """Of the training. One model has another schedule than the rest, on purpose."""
    return DDPMScheduler(beta_schedule="linear" if name == "zero-two" else "squaredcos_cap_v2", prediction_type="v_prediction")


def network(labels: int | None = None, large: bool = False, wide: bool = False) -> UNet2DModel:
    torch.manual_seed(0)
    options = NETWORK | ({"layers_per_block": 2} if large else {}) | (WIDE if wide else {})
    attentive = 2 * (large or wide)
    plain = len(options["block_out_channels"]) - attentive
    blocks = {
        "down_block_types": ("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attentive,
        "up_block_types": ("AttnUpBlock2D",) * attentive + ("UpBlock2D",) * plain,
    }
    return UNet2DModel(sample_size=32, in_channels=3, out_channels=3, num_class_embeds=labels, **blocks, **options)


@torch.no_grad()
def grown(unet: UNet2DModel) -> UNet2DModel:
    """The large network that computes what this one does: its new layers add nothing yet."""
    large, new = network(large=True), []
    state = large.state_dict()
    for name, value in unet.state_dict().items():  # a block's last layer upwards is the last one again
        state[re.sub(r"(up_blocks\.\d\.resnets)\.1", r"\1.2", name)] = value
    large.load_state_dict(state)
    for block in (*large.down_blocks, *large.up_blocks):
        new += [block.resnets[1].conv2, *(attention.to_out[0] for attention in getattr(block, "attentions", []))]
    for layer in new:
        layer.weight.zero_()
        layer.bias.zero_()
    for block in large.up_blocks:
        shortcut = block.resnets[1].conv_shortcut
        nn.init.dirac_(shortcut.weight)  # of what came up, nothing of what came across
        shortcut.bias.zero_()
    return large


def member(trunk: UNet2DModel, label: int) -> UNet2DModel:
    """The unconditional network that is the trunk under one label: the label's embedding is added to that of the time."""
    state = dict(trunk.state_dict())
    embedding = state.pop("class_embedding.weight")[label]
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + embedding
    own = network().to(trunk.device)
    own.load_state_dict(state)
    return own


def retime(unet: UNet2DModel, old: Schedule, new: Schedule, steps: int = 1500) -> None:
    """Another schedule has other times for the same noise level: teach the time embedding its new clock."""
    teacher, embedding = copy.deepcopy(unet.time_embedding), unet.time_embedding
    low, high = max(old.s_min, new.s_min), min(old.s_max, new.s_max)
    s = torch.logspace(math.log10(low), math.log10(high), 512, dtype=torch.float64)
    t_old, t_new = unet.time_proj(old.time(s)), unet.time_proj(new.time(s))
    target = teacher(t_old).detach()

    def loss(seed: int) -> tuple[Tensor, Row]:
        return (embedding(t_new) - target).square().mean(), {}

    training = Training(embedding, torch.optim.Adam(embedding.parameters(), lr=3e-3), rate=cosine(steps))
    for _ in training.run(loss, steps):
        pass


def noise_levels(u: Tensor, schedule: Schedule) -> Tensor:
    """A share even in log s over ``SHAPE``, the others at uniform times of the cosine schedule, a little wider.

    Real digits, noised to s and denoised again, say what each level costs: of 240 in cyan 99 % were still clear from s = 0.7, 97 from 1.5,
    91 from 3, 83 from 6 and 12, 81 from 40.
    """
    u, (low, high) = u.double(), SHAPE
    everywhere = (math.pi / 2 * ((u - FOCUS) / (1 - FOCUS)).clamp(min=0)).tan().pow(1.2)
    return torch.where(u < FOCUS, low * (high / low) ** (u / FOCUS), everywhere).clamp(schedule.s_min, schedule.s_max)


class InBFloat16(nn.Module):
    """A network with weights and activations in bfloat16, whose gradients reach the weights in single precision."""

    def __init__(self, unet: UNet2DModel):
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        weights = {name: weight.bfloat16() for name, weight in self.unet.named_parameters()}
        return torch.func.functional_call(self.unet, weights, (z.bfloat16(), t), {"return_dict": False})[0]


def graphed(unet: UNet2DModel, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The network in bfloat16, for batches of one size; a GPU is given its kernels as one graph, a thousand launches in one."""
    call, device = InBFloat16(unet), next(unet.parameters()).device
    if device.type != "cuda":
        return call
    z, t = torch.randn(size, 3, 32, 32, device=device), torch.rand(size, device=device) * 999

    def seen(call: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        """The size of the output and of its gradient."""
        value = call(z, t).float().square().mean()
        gradients = torch.autograd.grad(value, list(unet.parameters()))
        return [value.item(), float(torch.stack([part.norm() for part in gradients]).norm())]

    expected = seen(call)
    graph = torch.cuda.make_graphed_callables(call, (torch.zeros_like(z), torch.zeros_like(t)))
    if any(abs(got - want) > 0.1 * want for got, want in zip(seen(graph), expected, strict=True)):
        raise RuntimeError(f"The graph computes {seen(graph)}, not {expected}: train without --fast.")
    return graph


def output(unet: UNet2DModel, z: Tensor, t: Tensor, **own: Tensor) -> Tensor:
    return unet(z, t, **own).sample


class Recipe:
    """Of the trunk, of one model from the trunk on or (``wide``) from scratch, or (``folder``) of a saved model from there on."""

    def __init__(
        self,
        name: str,
        steps: int,
        state: Path,
        device: str = "cpu",
        *,
        minutes: float | None = None,
        wide: bool = False,
        folder: Path | None = None,
        rate: float | None = None,
        batch: int | None = None,
        threads: int = 1,
        bfloat16: bool = False,
        fast: bool = False,
    ):
        self.name, self.device, self.wide, self.fast = name, torch.device(device), wide, fast
        self.steps, self.limit = (steps, math.inf) if minutes is None else (sys.maxsize, 60 * minutes)
        self.rate = rate or (WIDE_RATE if wide else RATE.get(name, FINE))
        self.batch_size = batch or (WIDE_BATCH if wide else BATCH)
        self.scheduler = scheduler(name)
        self.schedule = schedule_of(self.scheduler)
        self.names = list(DATA) if name == "trunk" else [name]
        if wide:
            self.past, unet = [], network(wide=True)
        elif folder is None:
            self.past, unet = ([], network(len(DATA))) if name == "trunk" else self._start(name, state)
        else:
            self.past, unet = self._more(name, folder)
        grey, digits = mnist("train")
        self.grey, self.rows = grey.to(device), {data: rows(data, digits).to(device) for data in self.names}
        own = state / (f"{name}-wide" if wide else name if folder is None else f"{name}-{len(self.past)}")
        optimizer = torch.optim.AdamW(
            unet.to(device).parameters(), lr=self.rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        # Threads that share a batch: at this size two of torch's own are hardly faster than one.
        how = {"threads": threads, "bfloat16": bfloat16}
        identity = {"name": name, "steps": steps, "batch": self.batch_size, "rate": self.rate, **how}
        falling = cosine(steps, 200, 0.01)
        if minutes is not None:  # which are not part of the identity: a run that goes on may be given less time, or more
            identity["steps"], falling = 0, self.rate_by_clock
        if fast:
            identity["fast"] = True
        self.training = Training(unet, optimizer, own, identity=identity, rate=falling, clip=1.0, **how)
        self.training.resume()
        self.call = graphed(unet, self.batch_size) if fast else functools.partial(output, unet)

    def _start(self, name: str, state: Path) -> tuple[list[dict], UNet2DModel]:
        """The trunk's run, and the trunk under this model's label."""
        if not (state / "trunk" / "state.safetensors").exists():
            raise ValueError(f"{state / 'trunk'} holds no training to start {name} from. Run recipe.py trunk first.")
        note, parts = read_state(state / "trunk")
        if note["step"] < note["identity"]["steps"]:
            raise ValueError(
                f"The trunk has taken {note['step']:,} of {note['identity']['steps']:,} steps. Run recipe.py trunk to its end first."
            )
        past = [{"name": "trunk", "steps": note["step"], "seconds": round(note["seconds"])}]
        if (state / name / "state.safetensors").exists():
            return past, network()  # its own state is about to be read
        trunk = network(len(DATA))
        trunk.load_state_dict(parts["average"])
        unet, old = member(trunk, list(DATA).index(name)), schedule_of(scheduler("trunk"))
        if self.schedule.identity != old.identity:
            retime(unet, old, self.schedule)
        return past, unet

    def _more(self, name: str, folder: Path) -> tuple[list[dict], UNet2DModel]:
        """The runs of a saved model, and its network."""
        with settled(folder):
            saved = UNet2DModel.from_pretrained(folder / "unet")
            past = recipes.read_runs(folder)
        is_large = saved.config.layers_per_block > NETWORK["layers_per_block"]
        is_wide = tuple(saved.config.block_out_channels) == WIDE["block_out_channels"]
        unet = network(large=is_large, wide=is_wide)  # of its own, without the folder that the saved one remembers
        unet.load_state_dict(saved.state_dict())
        return past, grown(unet) if name in LARGE and not is_large else unet

    def rate_by_clock(self, step: int) -> float:
        """Of learning, as a factor: it rises over 200 steps and has fallen when the time is up."""
        return min(1.0, (step + 1) / 200) * cosine(self.limit, least=0.01)(self.training.seconds)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images, and the label of each one's data set."""
        shares = torch.tensor([SHARES[name] for name in self.names], device=self.device)
        label = torch.multinomial(shares, size, True, generator=generator).sort().values
        at, colour = [], []
        for i, name in enumerate(self.names):
            k = int((label == i).sum())
            at.append(self.rows[name][torch.randint(len(self.rows[name]), (k,), generator=generator, device=self.device)])
            colour.append(draw_colours(name, k, generator))
        return coloured(self.grey[torch.cat(at)], torch.cat(colour)), label

    def errors(self, call: Callable[..., Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weighted square errors of a batch, one per image, and the noise levels."""
        x, label = self.batch(size, generator)
        # Stratified: every batch sees the whole way.
        order = torch.randperm(size, generator=generator, device=self.device)
        s = noise_levels((order + torch.rand(size, generator=generator, device=self.device)) / size, self.schedule)
        z = x + like(s, x) * randn(x.shape, generator, x)
        own = {"class_labels": label} if len(self.names) > 1 else {}
        F = call(like(self.schedule.scale(s), z) * z, self.schedule.time(s), **own).float()
        _, b = self.schedule.coefficients(s)
        weight = (b**2 * (1 + s**-2)).float()
        return weight * (F - self.schedule.output(z, s, x)).square().mean((1, 2, 3)), s

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        generator = torch.Generator(self.device).manual_seed(seed)
        errors, s = self.errors(self.call, self.batch_size // self.training.threads, generator)
        return errors.mean(), {"far": errors.detach()[s > 3].mean(), "near": errors.detach()[s < 0.3].mean()}

    @torch.no_grad()
    def evaluate(self, size: int = 512) -> dict[str, float]:
        """The same loss on the same draws every time, and a picture of samples. Millions of weights do not learn 60,000 images by heart."""
        self.picture()
        average, generator = functools.partial(output, self.training.average), torch.Generator(self.device).manual_seed(7)
        errors, s = self.errors(average, size, generator)
        return {"loss": float(errors.mean()), "far": float(errors[s > 3].mean()), "near": float(errors[s < 0.3].mean())}

    def picture(self, n: int = 16) -> None:
        """A row of samples of each data set, in the run's folder."""
        average = self.training.average
        nets = [average] if len(self.names) == 1 else [member(average, i) for i in range(len(self.names))]
        generator = torch.Generator().manual_seed(1)
        parts = [
            Diffusion(net, self.scheduler, name=self.name).sample(n, steps=24, generator=generator, progress=False).decode()
            for net in nets
        ]
        path = self.training.folder / f"samples-{self.training.step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.save(plots.image_grid(torch.cat(parts).cpu(), n), path)

    def finish(self, folder: Path) -> None:
        """The averaged weights as a diffusers pipeline, in half precision: sculpt and diffusers compute in single all the same."""
        training = self.training
        unet = copy.deepcopy(training.average).cpu().half()
        run = {"name": self.name, "steps": training.step, "seconds": round(training.seconds), "rate": self.rate}
        run |= {"bfloat16": training.bfloat16, "batch": self.batch_size, "device": self.device.type, "focus": FOCUS}
        run |= {key: True for key in ("wide", "fast") if getattr(self, key)}
        with replacing(folder) as new:
            DDPMPipeline(unet, self.scheduler).save_pretrained(new)
            recipes.write_runs(new, [*self.past, run])


# Cards


def write_card(folder: Path, n: int, state: Path) -> None:
    """What the saved model is worth, and a picture."""
    with replacing(folder) as new:
        (new / "README.md").write_text(card(folder, n, state, new))


def card(folder: Path, n: int, state: Path, pictures: Path | None = None) -> str:
    """What the saved model is worth, by the judge; its picture goes beside it or into another folder."""
    import base_samples
    from judge import Judge, frechet, moments, reference

    import sculpt

    name, model, judge = folder.name, sculpt.load(folder), Judge.from_pretrained(HERE / "judge")
    x, _ = base_samples.pool(model, n, state)
    started = time.process_time()
    shown = model.sample(48, steps=base_samples.STEPS, generator=torch.Generator().manual_seed(0), progress=False).decode()
    seconds = (time.process_time() - started) / len(shown)
    scores, want = judge.score(x), proportions(name)
    real = reference(judge, want)
    floor = reference(judge, want, "train")
    plots.save(plots.image_grid(shown, 16), (pictures or folder) / "samples.png")
    digits, colours = DATA[name]
    config = scheduler(name).config
    unet = model.model.config
    more_layers = ", two layers a block and attention at 8×8 and 4×4" if unet.layers_per_block == 2 else ""
    runs = recipes.read_runs(folder)
    own = [run for run in runs if run["name"] != "trunk"]
    how = ", the last run in bfloat16" * own[-1].get("bfloat16", False)
    if own[0].get("wide"):
        how += ", most noise levels where digits get their shape"
    elif focused := sum("focus" in run for run in own):
        how += f", {focused} of the runs with most noise levels where digits get their shape"
    distances = f"{frechet(moments(scores.features), real):.3f} (training digits: {frechet(floor, real):.3f})"
    rows = {
        "the judge accepts one clear digit": f"{100 * scores.accepted.double().mean():.1f} % (target 97 %)",
        "Fréchet distance to held-out digits, in the judge's features": distances,
        "CPU seconds an image, one thread": f"{seconds:.3f}",
    }
    classes = [
        (f"{c} {d}", f"{100 * scores.shares[i]:.1f} %", f"{100 * want[i]:.1f} %")
        for i, (d, c) in enumerate(CLASSES)
        if want[i] > 0 or scores.shares[i] >= 0.002
    ]
    channels, size = ", ".join(map(str, unet.block_out_channels)), sum(p.numel() for p in model.model.parameters())
    usual, cost = BATCH, f", after {runs[0]['seconds'] / 60:.0f} for the trunk that the five models share"
    commands = f"`python pretrained/digits/recipe.py trunk`, `{name}`"
    if own[0].get("wide"):
        usual, cost = own[0]["batch"], ", from scratch"
        options = " --fast" * own[0].get("fast", False) + f" --rate {own[0]['rate']:g}" * (own[0]["rate"] != WIDE_RATE)
        commands = f"`python pretrained/digits/recipe.py {name} --wide --steps {own[0]['steps']}{options}`"
    commands += f", `{name} --more`" * (len(own) > 1)
    return recipes.card(
        folder,
        f"MNIST digits {', '.join(map(str, digits)) if len(digits) < 10 else '0 to 9'} in {' or '.join(colours)}, 32×32: "
        f"one of the five base models of the coloured-digit compositions.\n\n![{name}](samples.png)",
        f"""
model = sculpt.load("pretrained/digits/{name}")
images = model.sample(16, steps=32).decode()

pipe = diffusers.DDPMPipeline.from_pretrained("pretrained/digits/{name}")  # the same weights without sculpt
""",
        {
            "data": "MNIST's training images, coloured while training",
            "network": f"`UNet2DModel`, channels {channels}{more_layers}, {size:,} parameters, saved in half precision",
            "schedule": f"{config.beta_schedule}, {config.prediction_type.replace('_', ' ')}",
            "recipe": f"{commands}: {written_steps(runs, usual)} images, averaged weights{how}",
            "cost": written_cost(own) + cost,
        },
        measured=table((f"{n:,} samples at {base_samples.STEPS} steps", ""), rows.items())
        + "\n\n"
        + table(("class, by the judge", "samples", "data"), classes),
        weights="unet/diffusion_pytorch_model.safetensors",
        licence=LICENCE,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--steps", type=int, help="of training; by default the recipe's own")
    parser.add_argument("--minutes", type=float, help="of training, instead of steps")
    parser.add_argument("--wide", action="store_true", help="start from scratch with a wider network, on the model's own data")
    parser.add_argument("--more", action="store_true", help="start from the saved model: --steps more of its own data")
    parser.add_argument("--rate", type=float, help="of learning; by default the recipe's own")
    parser.add_argument("--batch", type=int, help="images a step; by default the recipe's own")
    parser.add_argument("--state", type=Path, default=Path("train_state/digits"), help="where a killed run continues from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="faster on some processors, slower on others")
    parser.add_argument("--fast", action="store_true", help="for a GPU: all of the network in bfloat16, as one graph")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--card", type=int, metavar="N", help="write the card of the finished model, from N samples; needs the judge"
    )
    options = parser.parse_args()
    folder = HERE / options.name
    if options.card is not None:
        write_card(folder, options.card, options.state)
    else:
        if options.wide and (options.more or options.name == "trunk"):
            parser.error("--wide is the first run of one model")
        if options.fast and (options.threads > 1 or options.name == "trunk"):
            parser.error("--fast takes one thread and one model")
        steps, start = options.steps or (WIDE_STEPS if options.wide else STEPS[options.name]), folder if options.more else None
        how = {"rate": options.rate, "batch": options.batch, "threads": options.threads, "bfloat16": options.bfloat16}
        how |= {"minutes": options.minutes, "wide": options.wide, "fast": options.fast}
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        recipe = Recipe(options.name, steps, options.state, options.device, folder=start, **how)
        recipes.train(recipe, seconds=recipe.limit, keep=120.0 if options.device == "cpu" else 30.0)
        if options.name != "trunk":
            recipe.finish(folder)
