"""More tiny parts, for the survey only: kinds that are rarely used, or built in ways that nothing else is."""

import diffusers
import transformers
from pipelines import (
    SIZE,
    causal,
    clip,
    ddim,
    flow,
    image,
    sd3_parts,
    seeded,
    t5,
    tokenizer,
    unet,
    vae,
    vision,
    wan_vae,
)
from pipelines import flux_parts as flux

LATENT = {"in_channels": 4, "out_channels": 4}
PIXELS = {"height": 16, "width": 16, "max_sequence_length": 12}


def network(name, seed=0, **config):
    return seeded(lambda: getattr(diffusers, name)(**config), seed)


def with_t5(transformer, **more):
    return {
        "transformer": transformer,
        "vae": vae(shift_factor=None),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
        "scheduler": ddim(),
    } | more


def latte():
    size = SIZE | {
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "patch_size": 2,
        "video_length": 2,
        "caption_channels": 16,
    }
    made = network(
        "LatteTransformer3DModel", cross_attention_dim=16, norm_type="ada_norm_single", norm_elementwise_affine=False, **size
    )
    return with_t5(made), {"height": 16, "width": 16, "video_length": 2, "clean_caption": False}


def lumina():
    size = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
    }
    made = network("LuminaNextDiT2DModel", cross_attention_dim=16, **size)
    return with_t5(made, text_encoder=causal("Gemma2"), tokenizer=tokenizer(512), scheduler=flow()), {
        "height": 16,
        "width": 16,
        "max_sequence_length": 300,
    }


def allegro():
    size = (
        SIZE
        | LATENT
        | {"cross_attention_dim": 16, "caption_channels": 16, "sample_height": 4, "sample_width": 4, "sample_frames": 2}
    )
    made = network("AllegroTransformer3DModel", **size | {"attention_head_dim": 24, "cross_attention_dim": 48})
    blocks = {
        "down_block_types": ("AllegroDownBlock3D",) * 4,
        "up_block_types": ("AllegroUpBlock3D",) * 4,
        "layers_per_block": 1,
    }
    coder = network(
        "AutoencoderKLAllegro", block_out_channels=(8, 8, 8, 8), norm_num_groups=2, temporal_compression_ratio=4, **blocks
    )
    return with_t5(made, vae=coder), {
        "height": 32,
        "width": 32,
        "num_frames": 8,
        "max_sequence_length": 12,
        "clean_caption": False,
    }


def cogview3():
    size = (
        SIZE
        | LATENT
        | {"text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8, "sample_size": 8}
    )
    made = network("CogView3PlusTransformer2DModel", **size)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return with_t5(made, scheduler=scheduler), PIXELS


def sana_video():
    size = (
        SIZE
        | LATENT
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
    )
    made = network("SanaVideoTransformer3DModel", **size | {"attention_head_dim": 12})
    return with_t5(made, text_encoder=causal("Gemma2"), tokenizer=tokenizer(512), vae=wan_vae(), scheduler=flow()), {
        "height": 32, "width": 32, "frames": 5, "max_sequence_length": 12, "use_resolution_binning": False, "complex_human_instruction": None,
    }  # fmt: skip


def skyreels():
    size = SIZE | LATENT | {"text_dim": 16, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 32}
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    made = network("SkyReelsV2Transformer3DModel", **size)
    parts = with_t5(made, text_encoder=t5(umt5=True), vae=wan_vae(), scheduler=scheduler)
    return parts, {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 12}


def hunyuan_image():
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    made = network(
        "HunyuanImageTransformer2DModel", text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4), **LATENT, **size
    )
    coder = network(
        "AutoencoderKLHunyuanImage", in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.5,
    )  # fmt: skip
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    texts = {
        "text_encoder": causal("Qwen2", "ForCausalLM"),
        "tokenizer": tokenizer(512),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(),
    }
    return {"transformer": made, "vae": coder, "scheduler": flow(), "guider": guider, "ocr_guider": None, **texts}, {
        "height": 16,
        "width": 16,
    }


def bria():
    size = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 16}
    made = network("BriaTransformer2DModel", joint_attention_dim=16, axes_dims_rope=[2, 2, 4], **size)
    return with_t5(made, scheduler=flow(), vae=vae()), PIXELS


def ovis():
    size = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "in_channels": 16,
        "out_channels": 16,
    }
    made = network("OvisImageTransformer2DModel", joint_attention_dim=16, axes_dims_rope=(2, 2, 4), **size)
    return with_t5(made, scheduler=flow(), vae=vae(), text_encoder=causal("Qwen3"), tokenizer=tokenizer(512)), {
        "height": 16,
        "width": 16,
    }


def prx():
    made = network(
        "PRXTransformer2DModel", in_channels=4, context_in_dim=16, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4]
    )
    return with_t5(made, scheduler=flow(), text_encoder=causal("Gemma2"), tokenizer=tokenizer(64)), {
        "height": 16, "width": 16, "use_resolution_binning": False,
    }  # fmt: skip


def kandinsky5():
    size = {
        "in_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 8,
        "out_visual_dim": 4,
        "model_dim": 16,
        "ff_dim": 16,
    }
    made = network("Kandinsky5Transformer3DModel", num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4), **size)
    texts = {
        "text_encoder": causal("Qwen2", "ForCausalLM"),
        "tokenizer": tokenizer(512),
        "text_encoder_2": clip(),
        "tokenizer_2": tokenizer(),
    }
    return {"transformer": made, "vae": vae(shift_factor=None), "scheduler": flow(), **texts}, {
        "height": 16,
        "width": 16,
        "max_sequence_length": 300,
    }


def movq():
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    return network("VQModel", latent_channels=4, norm_num_groups=4, num_vq_embeddings=16, vq_embed_dim=4, **blocks)


def kandinsky22():
    embeds = {"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    made = unet(cross_attention_dim=8, out_channels=8, **embeds)
    embedded = __import__("torch").ones(1, 8)
    return {"unet": made, "scheduler": ddim(), "movq": movq()}, {
        "image_embeds": embedded,
        "negative_image_embeds": -embedded,
        "height": 64,
        "width": 64,
    }


def kandinsky22_prior():
    made = network(
        "PriorTransformer", num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=12
    )
    texts = {
        "text_encoder": clip(True),
        "tokenizer": tokenizer(),
        "image_encoder": vision(),
        "image_processor": transformers.CLIPImageProcessor(size=16, crop_size=16),
    }
    scheduler = diffusers.UnCLIPScheduler(
        prediction_type="sample", variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample=True
    )
    return {"prior": made, "scheduler": scheduler, **texts}, {}


def deep_floyd():
    made = unet(cross_attention_dim=16, in_channels=3, out_channels=6, encoder_hid_dim=16, encoder_hid_dim_type="text_proj")
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2")
    parts = {"text_encoder": t5(16), "tokenizer": tokenizer(77), "unet": made, "scheduler": scheduler, "watermarker": None}
    return parts, {"clean_caption": False}


def stable_video():
    blocks = {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    blocks |= {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "block_out_channels": (32, 64)}
    more = {
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "projection_class_embeddings_input_dim": 12,
        "addition_time_embed_dim": 4,
    }
    made = network("UNetSpatioTemporalConditionModel", sample_size=8, layers_per_block=1, **blocks, **more)
    coder = network("AutoencoderKLTemporalDecoder", down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32))
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_type="continuous", timestep_spacing="leading", use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0, interpolation_type="linear",
    )  # fmt: skip
    processor = transformers.CLIPImageProcessor(size=16, crop_size=16)
    parts = {"unet": made, "vae": coder, "scheduler": scheduler, "image_encoder": vision(), "feature_extractor": processor}
    return parts, {"image": image(), "height": 16, "width": 16, "num_frames": 2}


def dance():
    blocks = {"down_block_types": ("DownBlock1D", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1D")}
    size = {"sample_size": 64, "sample_rate": 64, "block_out_channels": (32, 32), "extra_in_channels": 16}
    return {"unet": network("UNet1DModel", **blocks, **size, use_timestep_embedding=False), "scheduler": ddim()}, {
        "audio_length_in_s": 1.0
    }


def ldm():
    made = network("UNet2DModel", sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                   down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    return {"unet": made, "vqvae": movq(), "scheduler": ddim()}, {}


def sd3_control():
    parts = sd3_parts()
    return parts | {"controlnet": seeded(lambda: diffusers.SD3ControlNetModel.from_transformer(parts["transformer"], num_extra_conditioning_channels=0, load_weights_from_transformer=False))}, {
        "max_sequence_length": 12, "control_image": image(),
    }  # fmt: skip


def flux_control():
    parts = flux()
    made = seeded(
        lambda: diffusers.FluxControlNetModel.from_transformer(
            parts["transformer"], num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        )
    )
    return parts | {"controlnet": made}, PIXELS | {"control_image": image()}


def cosmos2():
    size = LATENT | {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 8, 8),
    }
    made = network("CosmosTransformer3DModel", extra_pos_embed_type=None, **size)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return with_t5(made, vae=wan_vae(), scheduler=scheduler, safety_checker=lambda *a: True), {
        "height": 16,
        "width": 16,
        "max_sequence_length": 12,
    }


MORE = {
    "Latte": latte, "Lumina": lumina, "Allegro": allegro, "CogView3": cogview3, "SanaVideo": sana_video, "SkyReels": skyreels,
    "HunyuanImage": hunyuan_image, "Bria": bria, "Ovis": ovis, "PRX": prx, "Kandinsky5": kandinsky5, "Kandinsky2.2": kandinsky22,
    "Kandinsky2.2 prior": kandinsky22_prior, "DeepFloyd": deep_floyd, "SVD": stable_video,
    "Dance": dance, "LDM": ldm, "SD3 ControlNet": sd3_control, "Flux ControlNet": flux_control, "Cosmos2": cosmos2,
}  # fmt: skip
