r"""The prompted scenes: ``python pretrained/shapes/recipe.py {vae,model} [--steps n | --minutes m] [--device cuda] [--bfloat16]``.

First the autoencoder: 3·32·32 numbers to 4·8·8 latents, and back. Its loss is the evidence bound with pixels that are sure up to
:math:`\sigma` = ``SURE``,

.. math:: \frac{|x - x'|^2}{2 \sigma^2} + KL.

Then, on its latents, a UNet with a text encoder, from nothing: a tokenizer of the grammar's words, and prompts that a scene's object was
named by, some of them left out for guidance. The loss is that of v-prediction. What is saved is a ``StableDiffusionPipeline`` as its users
save theirs. Scenes are drawn while training, on its device.

``--minutes`` asks for as many steps as fit: the speed is measured early, and again on the way, and the learning rate falls
with the way that is done. A killed run goes on where it stopped; on a CPU, with ``--steps``, bit for bit.
"""

import argparse
import copy
import hashlib
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path += [str(folder) for folder in Path(__file__).parents[:2]]

import judge
import measures
import recipes
import scenes
from recipes import table, written_cost
from scenes import PROMPTS, WORDS

from sculpt import plots
from sculpt.files import replacing, settled
from sculpt.training import Row, Training, mean

HERE = Path(__file__).parent
FOLDER = HERE / "model"
STEPS = {"vae": 6000, "model": 20_000}
BATCH = {"vae": 256, "model": 512}
RATE = {"vae": 2e-3, "model": 1e-3}
WARM_UP = 200
SURE = 0.03
EMPTY = 0.12
"""The share of prompts that is left out."""
WIDTH, LENGTH = 128, 10
"""Of the text encoder, and the tokens of a prompt: seven words, a beginning and an end, at most."""
START, END = "<|startoftext|>", "<|endoftext|>"


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    size = {"block_out_channels": (24, 48, 64), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(sample_size=32, mid_block_add_attention=False, **size, **blocks)


def tokenizer() -> CLIPTokenizer:
    """Every word of the grammar is one token. Pairs of pieces are merged until it is; earlier words do not notice."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(parts := _pieces(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
    letters = sorted({piece for word in WORDS for piece in _pieces(word, [])})
    tokens = list(dict.fromkeys([*letters, *(a + b for a, b in merges), START, END]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH)


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """As byte-pair encoding does it: the earliest merge that applies, wherever it does, until none applies."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in merges]:
        first, new = min(pairs, key=merges.index), []
        for part in parts:
            if new and (new[-1], part) == first:
                new[-1] += part
            else:
                new.append(part)
        parts = new
    return parts


def scheduler() -> DDIMScheduler:
    how = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **how)


class Painter(nn.Module):
    """The text encoder and the UNet: latents, times and the numbers of prompts to a prediction."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        words = tokenizer()
        ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
        size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "projection_dim": WIDTH}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **size, **layers, **ends))
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(96, 144),
            layers_per_block=1,
            norm_num_groups=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=6,
        )
        tokens = words(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, z: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        if len(prompt) < len(self.tokens):
            told = self.text_encoder(self.tokens[prompt])[0]
        else:
            told = self.text_encoder(self.tokens)[0][prompt]
        return self.unet(z, t, told).sample.float()


class Plan:
    """The way of a training from 0 to 1: so many steps, or as many as fit into so many seconds. It is kept with the training's state.

    From the last measurement on, the way is even over the steps: (start, done) to (end, 1).
    """

    FIRST, EVERY = (20, 60), 0.05

    def __init__(self, steps: int | None, seconds: float | None):
        self.seconds = seconds
        self.spent = self.start = self.done = self.marked_step = self.marked_spent = 0.0
        self.end = float(steps) if seconds is None else math.inf
        self._clock = time.monotonic()

    @property
    def steps(self) -> int | None:
        return None if math.isinf(self.end) else int(self.end)

    def way(self, step: int) -> float:
        return self.done + (1 - self.done) * (step - self.start) / (self.end - self.start)

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (0.003 + 0.997 * (1 + math.cos(math.pi * self.way(step))) / 2)

    def over(self, step: int) -> bool:
        return step >= self.end

    def tick(self, step: int) -> None:
        """After every step."""
        now = time.monotonic()
        self.spent, self._clock = self.spent + now - self._clock, now
        if self.seconds is None:
            return
        due = step == self.FIRST[1] or (step > self.FIRST[1] and self.spent > self.marked_spent + self.EVERY * self.seconds)
        if due:
            self.done, self.start = self.way(step), float(step)
            each = (self.spent - self.marked_spent) / (step - self.marked_step)
            self.end = step + max(1.0, (self.seconds - self.spent) // each)
        if due or step == self.FIRST[0]:
            self.marked_step, self.marked_spent = float(step), self.spent

    NUMBERS = ("spent", "start", "done", "end", "marked_step", "marked_spent")

    def state_dict(self) -> dict[str, Tensor]:
        return {"numbers": torch.tensor([getattr(self, number) for number in self.NUMBERS], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for number, value in zip(self.NUMBERS, state["numbers"].tolist(), strict=True):
            setattr(self, number, value)


class Recipe(ABC):
    """How one of the two networks is trained."""

    name: str

    def __init__(self, network: nn.Module, state: Path, options: argparse.Namespace):
        self.device, self.batch = torch.device(options.device), options.batch or BATCH[self.name]
        minutes = options.minutes
        steps = None if minutes else options.steps or STEPS[self.name]
        self.plan = Plan(steps, 60 * minutes if minutes else None)
        optimizer = torch.optim.AdamW(
            network.to(self.device).parameters(), lr=RATE[self.name], betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        how = {"threads": options.threads, "bfloat16": options.bfloat16}
        identity = {"name": self.name, "steps": steps, "minutes": minutes, "batch": self.batch, **how}
        self.training = Training(network, optimizer, state / self.name, identity=identity, rate=self.plan.rate, clip=1.0, **how)
        self.training.resume(plan=self.plan)

    @abstractmethod
    def errors(self, network: nn.Module, size: int, generator: torch.Generator) -> tuple[Tensor, Row]:
        """The loss of a new batch, and what else to print of it."""

    @abstractmethod
    def evaluate(self) -> Row:
        """What the averaged weights are worth."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """The averaged weights, in half precision."""

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.errors(self.training.network, self.batch // self.training.threads, generator)

    def picture(self, pictures: Tensor) -> None:
        path = self.training.folder / f"samples-{self.training.step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.save(plots.image_grid(pictures.cpu(), 16), path)


class Autoencoder(Recipe):
    name = "vae"

    def __init__(self, state: Path, options: argparse.Namespace):
        super().__init__(autoencoder(), state, options)

    def errors(self, network: AutoencoderKL, size: int, generator: torch.Generator) -> tuple[Tensor, Row]:
        pictures = scenes.paint(scenes.draw(size, generator), generator)
        z, kl = encoded(network, pictures, generator)
        error = (network.decode(z).sample.float() - (2 * pictures - 1)).square().mean()
        bound = error + 2 * SURE**2 / pictures[0].numel() * kl.mean()
        return bound, {"error": error.detach(), "kl": kl.mean().detach()}

    @torch.no_grad()
    def evaluate(self, size: int = 500) -> Row:
        vae, generator = self.training.average, torch.Generator(self.device).manual_seed(7)
        x = scenes.draw(size, generator)
        pictures = scenes.paint(x, generator)
        back = decoded(vae, encoded(vae, pictures, generator)[0])
        reading = judge.read(back)
        self.picture(torch.cat([pictures[:16], back[:16], pictures[16:32], back[16:32]]))
        return {
            "off": float((back - pictures).square().mean().sqrt()),
            "read": float((reading.accepted & (reading.scenes == x).all(-1)).double().mean()),
        }

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        vae, generator = copy.deepcopy(self.training.average).half().float(), torch.Generator(self.device).manual_seed(8)
        pictures = scenes.paint(scenes.draw(2000, generator), generator)
        vae.register_to_config(scaling_factor=1 / float(encoded(vae, pictures, generator)[0].std()))
        with replacing(folder / "vae") as new:
            vae.cpu().half().save_pretrained(new)
        write_run(folder, self)


class Model(Recipe):
    name = "model"

    def __init__(self, state: Path, options: argparse.Namespace):
        with settled(options.folder):
            self.vae = read_vae(options.folder).to(options.device)
        self.scheduler = scheduler()
        self.kept = self.scheduler.alphas_cumprod.to(options.device)
        super().__init__(Painter(), state, options)

    def errors(self, network: Painter, size: int, generator: torch.Generator) -> tuple[Tensor, Row]:
        how = {"generator": generator, "device": self.device}
        with torch.no_grad():
            x = scenes.draw(size, generator)
            prompt = scenes.prompted(x, generator, EMPTY)
            z = self.vae.config.scaling_factor * encoded(self.vae, scenes.paint(x, generator), generator)[0]
            # Stratified: every batch sees the whole way.
            u = (torch.randperm(size, **how) + torch.rand(size, **how)) / size
            t = (u * len(self.kept)).long().clamp(max=len(self.kept) - 1)
            alpha, sigma = (part.sqrt()[:, None, None, None] for part in (self.kept[t], 1 - self.kept[t]))
            noise = torch.randn(z.shape, **how)
        error = (network(alpha * z + sigma * noise, t, prompt) - (alpha * noise - sigma * z)).square().mean((1, 2, 3))
        far = (error * (u > 0.7)).detach().sum() / (u > 0.7).sum()
        return error.mean(), {"far": far}

    @torch.no_grad()
    def sample(self, prompt: Tensor, generator: torch.Generator, steps: int = 24) -> Tensor:
        """Pictures by the averaged weights and DDIM."""
        z = torch.randn(len(prompt), 4, 8, 8, generator=generator, device=self.device)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps.tolist():
            v = self.training.average(z, torch.full((len(z),), t, device=self.device), prompt)
            z = self.scheduler.step(v, t, z).prev_sample
        return decoded(self.vae, z / self.vae.config.scaling_factor)

    @torch.no_grad()
    def evaluate(self, size: int = 256) -> Row:
        generator = torch.Generator(self.device).manual_seed(7)
        x = scenes.draw(size, generator)
        prompt = scenes.prompted(x, generator, EMPTY)
        pictures = self.sample(prompt, generator)
        self.picture(pictures[:64])
        reading = judge.read(pictures)
        asked = scenes.fits(prompt, reading.scenes).any(-1) & reading.accepted
        objects = (reading.scenes > 0).sum(-1).bincount(minlength=5).double() / size
        error, row = self.errors(self.training.average, size, generator)
        measured = {"accepted": float(reading.accepted.double().mean()), "asked": float(asked.double().mean())}
        return {
            "error": float(error),
            "far": float(row["far"]),
            **measured,
            "one": float(objects[1]),
            "three": float(objects[3]),
        }

    def save(self, folder: Path) -> None:
        painter = copy.deepcopy(self.training.average).cpu()
        parts = {"vae": copy.deepcopy(self.vae).cpu().half(), "unet": painter.unet.half(), "text_encoder": painter.text_encoder}
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer(), scheduler=scheduler(), **checker)
        with replacing(folder) as new:
            pipe.save_pretrained(new)
        write_run(folder, self)


def read_vae(folder: Path) -> AutoencoderKL:
    if not (folder / "vae" / "config.json").exists():
        raise ValueError(f"{folder / 'vae'} holds no autoencoder. Run recipe.py vae first.")
    saved = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae = autoencoder()  # of its own, without the folder that the saved one remembers
    vae.load_state_dict(saved.state_dict())
    vae.register_to_config(scaling_factor=saved.config.scaling_factor)
    return vae.eval().requires_grad_(False)


def encoded(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents of pictures in [0, 1], drawn and not scaled, and the divergence of each from a standard normal."""
    latent = vae.encode(2 * pictures - 1).latent_dist
    mean, log_var = latent.mean.float(), latent.logvar.float()
    z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=generator, device=mean.device)
    return z, 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum((1, 2, 3))


def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures of latents that are not scaled."""
    return ((vae.decode(latents).sample + 1) / 2).clamp(0, 1)


def write_run(folder: Path, recipe: Recipe) -> None:
    """The card wants to know how it was trained."""
    past = recipes.read_runs(folder) if (folder / "training.json").exists() else []
    run = {"name": recipe.name, "steps": recipe.training.step, "batch": recipe.batch}
    run |= {"seconds": round(recipe.training.seconds), "device": recipe.device.type, "bfloat16": recipe.training.bfloat16}
    recipes.write_runs(folder, [*(one for one in past if one["name"] != recipe.name), run])


def train(
    recipe: Recipe, folder: Path, *, report: int = 100, check: float = 40.0, keep: float = 30.0, write: float = 60.0
) -> None:
    """Train to the end; every so many seconds evaluate, keep the state, and write the weights.

    So a training that runs out of time leaves what it has learned.
    """
    training, plan, rows = recipe.training, recipe.plan, []
    checks, writes = Timer(check), Timer(write)
    if not plan.over(training.step):
        for row in training.run(recipe.loss, sys.maxsize):
            plan.tick(training.step)
            rows.append(row)
            if training.step % report == 0:
                recipes.say(recipe, mean(rows) | {"of": plan.steps or 0, "rate": plan.rate(training.step)})
                rows = []
            if plan.over(training.step):
                break
            if checks.due:
                with checks:
                    judged(recipe)
            training.save(every=keep)
            if writes.due:
                with writes:
                    recipe.save(folder)
        training.save()
    recipe.save(folder)
    judged(recipe)


def judged(recipe: Recipe) -> None:
    training = recipe.training
    training.curve.append({"step": training.step, **recipe.evaluate()})
    recipes.say(recipe, training.curve[-1])


class Timer:
    """Something is due every so many seconds, and more seldom where it would take more than a twentieth of the time."""

    def __init__(self, every: float):
        self.every, self.last = every, time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() > self.last + self.every

    def __enter__(self) -> None:
        self.last = time.monotonic()

    def __exit__(self, *error: object) -> None:
        now = time.monotonic()
        self.every, self.last = max(self.every, 20 * (now - self.last)), now


# Cards


def write_card(folder: Path, n: int) -> None:
    """What the saved pipeline is worth, by the judge, and a picture."""
    with replacing(folder) as new:
        (new / "README.md").write_text(card(folder, n, new))


def card(folder: Path, n: int, pictures: Path) -> str:
    with settled(folder):
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        runs = {run["name"]: run for run in recipes.read_runs(folder)}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    x = scenes.draw(n, generator)
    prompt = scenes.prompted(x, generator)
    results, seconds = {}, 0.0
    for told, scale in (("no prompt", 1.0), ("prompts", 1.0), ("prompts, guidance 2", 2.0), ("prompts, guidance 4", 4.0)):
        asked, started = torch.zeros_like(prompt) if told == "no prompt" else prompt, time.process_time()
        results[told] = measures.measure(asked, measures.pictures(painter(pipe, scale, generator), asked))
        seconds = seconds or (time.process_time() - started) / n
        print(told, results[told], flush=True)
    for told, asked, seed in (("no prompt", torch.zeros_like(prompt), 1), ("prompts", prompt, 0)):
        floor = measures.floor(asked, torch.Generator().manual_seed(seed))
        results[f"exact draws, {told}"] = measures.Measures(1.0, 1.0, {}, floor)
    shown = ["", "a red thing", "a cross", "a thing at the left", "a blue circle", "a green triangle at the bottom right"]
    some = painter(pipe, 1.0, generator)([prompt for prompt in shown for _ in range(12)])
    plots.save(plots.image_grid(some, 12), pictures / "samples.png")
    back = decoded(pipe.vae, encoded(pipe.vae, scenes.paint(x, generator), generator)[0])
    right = judge.read(back)
    right = 100 * (right.accepted & (right.scenes == x).all(-1)).double().mean()
    names = list(results["exact draws, prompts"].distances)
    rows = [
        (
            told,
            f"{100 * one.accepted:.1f} %",
            f"{100 * one.asked:.1f} %",
            *(_written(one.distances.get(name)) for name in names),
        )
        for told, one in results.items()
    ]
    kinds = [
        (told, *(_percent(one.by_kind.get(kind)) for kind in measures.KIND_NAMES))
        for told, one in results.items()
        if one.by_kind
    ]
    beside = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    parts = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "text_encoder", "vae")}
    return recipes.card(
        folder,
        "Scenes of one to three coloured shapes, 32×32, from prompts that name one of a scene's objects: a latent diffusion model of our own, "
        f"saved as every text-to-image pipeline of diffusers is. Rows: {'; '.join(prompt or 'no prompt' for prompt in shown)}.\n\n![scenes](samples.png)",
        """
circle, square = (sculpt.load("pretrained/shapes/model", prompt=p, guidance_scale=1.0) for p in ("a red circle", "a blue square"))
images = (circle & square).sample(8, steps=32).decode()

pipe = diffusers.StableDiffusionPipeline.from_pretrained("pretrained/shapes/model")  # the same weights without sculpt
image = pipe("a red circle", guidance_scale=1.0).images[0]
""",
        {
            "data": f"drawn by `scenes.py`: {len(scenes.scenes()):,} scenes, {len(PROMPTS) - 1} prompts and the empty one",
            "networks": f"UNet {parts['unet']:,} parameters, text encoder {parts['text_encoder']:,}, autoencoder {parts['vae']:,} "
            "(4×8×8 latents); UNet and autoencoder are saved in half precision",
            "schedule": "squaredcos_cap_v2, v prediction",
            "recipe": "; ".join(
                f"`python pretrained/shapes/recipe.py {name}`: {run['steps']:,} steps of {run['batch']} scenes"
                + ", bfloat16" * run["bfloat16"]
                for name, run in runs.items()
            )
            + ", averaged weights",
            "cost": f"{written_cost(list(runs.values()))} by the clock; the device had other work, too",
            "CPU seconds an image, one thread, 32 steps": f"{seconds:.3f}",
            **{f"`{file}`": f"sha256 {hashlib.sha256((folder / file).read_bytes()).hexdigest()}" for file in beside},
        },
        measured=table((f"{n:,} samples at 32 steps", "accepted", "as asked", *names), rows)
        + "\n\nWithout guidance the model is as it learned to be. The judge accepts clear scenes of one to three objects. A picture is as asked if the prompt fits one of its objects. The other columns are "
        "total variations to the exact distribution, of accepted pictures; those of as many exact draws are about the least that can be expected.\n\n"
        + table(("as asked, by what the prompt names", *measures.KIND_NAMES), kinds)
        + f"\n\nOf {n:,} scenes that went through the autoencoder, the judge read {right:.1f} % rightly.",
        weights="unet/diffusion_pytorch_model.safetensors",
        licence="the project's; trained on what a program draws, no third-party data",
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _written(distance: float | None) -> str:
    return "" if distance is None else f"{distance:.3f}"


def painter(pipe: StableDiffusionPipeline, scale: float, generator: torch.Generator) -> Callable[[list[str]], Tensor]:
    how = {"guidance_scale": scale, "generator": generator, "num_inference_steps": 32, "output_type": "pt"}
    return lambda prompts: pipe(prompts, **how).images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--steps", type=int, help="of training; by default the recipe's own")
    parser.add_argument("--minutes", type=float, help="of training, instead of steps")
    parser.add_argument("--batch", type=int, help="scenes a step; by default the recipe's own")
    parser.add_argument("--state", type=Path, default=Path("train_state/shapes"), help="where a killed run continues from")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the pipeline is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="faster on a GPU and on some processors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--card", type=int, metavar="N", help="write the card of the finished model, from N samples each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if options.card is not None:
        write_card(options.folder, options.card)
    else:
        train({"vae": Autoencoder, "model": Model}[options.name](options.state, options), options.folder)
