"""Pipelines to spoil (see mutations.py): of pixels, of latents, of parts alone, in shards, with every family of schedulers, and with a prompt."""

import json
import math
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from checkpoints import save_parts, save_pipeline, tiny_unet

import sculpt

SHIPPED = [Path(sculpt.__file__).parents[1] / "pretrained" / "digits" / name for name in ("cyan", "zero-two")]


def scheduled(folder, scheduler, **config):
    save_parts(folder)
    scheduler(**config).save_pretrained(folder / "scheduler")


def shards(folder):
    save_parts(folder)
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    tiny_unet().save_pretrained(folder / "unet", max_shard_size="60KB")


def latents(folder):
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4, "patch_size": 2}
    classes = {"num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
    dit = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=4, **size, **classes)
    diffusers.DiTPipeline(dit, autoencoder(), diffusers.DDIMScheduler()).save_pretrained(folder)


def autoencoder():
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, **blocks)


def texts(projection=False):
    """A text encoder and tokenizer from nothing: every letter is a token."""
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=12)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPTextConfig(vocab_size=54, max_position_embeddings=12, **size, **ends)
    return tokenizer, (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5():
    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(ord("a"), ord("z") + 1))]
    tokenizer = transformers.T5Tokenizer(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=16
    )
    size = {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return tokenizer, transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(pieces), **size))


def prompted(folder):
    """As published ones have it, with a checker that is neither read nor needed."""
    tokenizer, encoder = texts()
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    size = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=2, **size, **blocks)
    scheduler = diffusers.DDPMScheduler(steps_offset=1, clip_sample=False)
    parts = {"vae": autoencoder(), "unet": unet, "scheduler": scheduler, "text_encoder": encoder, "tokenizer": tokenizer}
    pipe = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))


def three(folder):
    """Of three text encoders, with a transformer."""
    (tokenizer, encoder), (tokenizer_3, encoder_3) = texts(projection=True), t5()
    size = {"sample_size": 4, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "pos_embed_max_size": 4}
    widths = {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    transformer = diffusers.SD3Transformer2DModel(caption_projection_dim=8, **size, **widths)
    encoders = {"text_encoder": encoder, "text_encoder_2": encoder, "text_encoder_3": encoder_3}
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": tokenizer_3}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    diffusers.StableDiffusion3Pipeline(transformer, scheduler, autoencoder(), **encoders, **tokenizers).save_pretrained(folder)


FOLDERS = {
    "pipeline": save_pipeline,
    "parts": save_parts,
    "shards": shards,
    "latents": latents,
    "prompted": prompted,
    "three": three,
    "flow": partial(scheduled, scheduler=diffusers.FlowMatchEulerDiscreteScheduler),
    "EDM": partial(scheduled, scheduler=diffusers.EDMEulerScheduler),
    "exploding": partial(scheduled, scheduler=diffusers.ScoreSdeVeScheduler, num_train_timesteps=20),
    "betas": partial(
        scheduled, scheduler=diffusers.DPMSolverMultistepScheduler, trained_betas=[0.001 * k for k in range(1, 20)]
    ),
}


def load(folder):
    condition = {"prompt": "ab"} if (folder / "tokenizer").exists() else {}
    if (folder / "transformer").exists() and not condition:
        condition = {"class_labels": [1], "guidance_scale": 1.0}
    return sculpt.load(folder, **condition)


def use(model):
    assert isinstance(model.name, str) and str(model) and repr(model) and len(model.key) == 64
    if math.prod(model.shape) <= 4096:
        model.sample(2, steps=2, generator=torch.Generator().manual_seed(0), progress=False)
