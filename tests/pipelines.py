"""Pipelines of diffusers with tiny parts that are made from nothing: every character is a token, every weight is random."""

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

VOCABULARY = ["<pad>", "</s>", "<unk>", "<s>", *map(chr, range(32, 127))]
SIZE = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def seeded(make, seed=0):
    """A network whose layers are all alive, those that a training starts at zero among them."""
    torch.manual_seed(seed)
    network = make().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return network.requires_grad_(False)


# Tokenizers and text encoders -------------------------------------------------------------------------------------------------------


def tokenizer(length=12, **options):
    """Of characters, with an end of the text."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **names, **options)
    fast.chat_template = TEMPLATE
    return fast


def clip(projection=False, width=8, length=12, seed=0):
    size = {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
    }
    ends = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPTextConfig(vocab_size=len(VOCABULARY), max_position_embeddings=length, **size, **ends)
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(lambda: cls(config), seed)


def t5(width=16, umt5=False):
    size = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    kind = "UMT5" if umt5 else "T5"
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(VOCABULARY), **size)
    return seeded(lambda: getattr(transformers, f"{kind}EncoderModel")(config))


def causal(kind="Llama", model="Model", width=16, layers=2, **more):
    """A language model as a text encoder."""
    size = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(VOCABULARY), "pad_token_id": 0} | more
    config = getattr(transformers, f"{kind}Config")(**size)
    return seeded(lambda: getattr(transformers, f"{kind}{model}")(config))


def vision(width=8):
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=width, **size)
    return seeded(lambda: transformers.CLIPVisionModelWithProjection(config))


# Autoencoders -----------------------------------------------------------------------------------------------------------------------


def vae(channels=4, **config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels}
    return seeded(lambda: diffusers.AutoencoderKL(**(blocks | size | {"scaling_factor": 0.5, "shift_factor": 0.1} | config)))


def wan_vae(cls=diffusers.AutoencoderKLWan, channels=4):
    size = {"base_dim": 4, "z_dim": channels, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    stats = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
    more = {"scale_factor_temporal": 2, "scale_factor_spatial": 2} if cls is diffusers.AutoencoderKLWan else {}
    return seeded(lambda: cls(**size, **stats, **more))


# UNets ------------------------------------------------------------------------------------------------------------------------------

UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}


def unet(**config):
    return seeded(lambda: diffusers.UNet2DConditionModel(**(UNET | {"cross_attention_dim": 8} | config)))


def ddim(**config):
    return diffusers.DDIMScheduler(**({"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1} | config))


def flow(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | config))


def image(seed=0, side=16):
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask(side=16):
    pixels = torch.zeros(side, side, dtype=torch.uint8)
    pixels[:, side // 2 :] = 255
    return Image.fromarray(pixels.numpy())


NO_CHECKER = {"safety_checker": None, "feature_extractor": None}


def sd_parts(**config):
    return {
        "vae": vae(shift_factor=None),
        "unet": unet(**config),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "scheduler": ddim(),
    }


def sd(cls=diffusers.StableDiffusionPipeline, scheduler=None, more=None, **config):
    parts = sd_parts(**config) | NO_CHECKER | (more or {}) | ({} if scheduler is None else {"scheduler": scheduler})
    return cls(**parts, requires_safety_checker=False), {}


def sd2():
    scheduler = ddim(prediction_type="v_prediction")
    return sd(scheduler=scheduler, use_linear_projection=True)


def xl_parts(**config):
    texts = {
        "text_encoder": clip(),
        "text_encoder_2": clip(projection=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
    }
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    made = unet(cross_attention_dim=16, **XL, **config)
    return {"vae": vae(shift_factor=None, force_upcast=True), "unet": made, "scheduler": scheduler, **texts}


def xl(cls=diffusers.StableDiffusionXLPipeline, more=None, **config):
    return cls(**xl_parts(**config), add_watermarker=False, **(more or {})), {}


def sd3_parts():
    size = {"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 16}
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8}
    made = seeded(lambda: diffusers.SD3Transformer2DModel(**size, **widths, **SIZE))
    encoders = {"text_encoder": clip(projection=True), "text_encoder_2": clip(projection=True), "text_encoder_3": t5(32)}
    tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer()}
    return {"transformer": made, "scheduler": flow(), "vae": vae(), **encoders, **tokenizers}


def sd3(cls=diffusers.StableDiffusion3Pipeline, **more):
    return cls(**sd3_parts(), **more), {"max_sequence_length": 12}


def controlnet(parts, **config):
    net = seeded(lambda: diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4)), 1)
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.1)
    return net


def sd_control():
    parts = sd_parts()
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet(parts), **NO_CHECKER, requires_safety_checker=False
    )
    return pipe, {"image": image(), "controlnet_conditioning_scale": 0.7}


def xl_control():
    parts = xl_parts()
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet(parts), add_watermarker=False)
    return pipe, {"image": image(), "controlnet_conditioning_scale": 0.7}


def ip_adapter():
    pipe, _ = sd(more={"image_encoder": vision(), "feature_extractor": transformers.CLIPImageProcessor(size=16, crop_size=16)})
    torch.manual_seed(0)
    state = {"image_proj": {}, "ip_adapter": {}}
    projection = {
        "proj.weight": torch.randn(4 * 8, 8),
        "proj.bias": torch.randn(32),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }
    state["image_proj"] = projection
    key = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            state["ip_adapter"] |= {f"{key}.to_{part}_ip.weight": torch.randn(width, 8) for part in "kv"}
            key += 2
    pipe.load_ip_adapter(state, subfolder="", weight_name="")
    pipe.set_ip_adapter_scale(0.6)
    return pipe, {"ip_adapter_image": image()}


def inpainting():
    return sd(diffusers.StableDiffusionInpaintPipeline, in_channels=9)[0], {
        "image": image(),
        "mask_image": mask(),
        "height": 16,
        "width": 16,
    }


def image_to_image():
    return sd(diffusers.StableDiffusionImg2ImgPipeline)[0], {"image": image(), "strength": 0.6}


def pix2pix():
    return sd(diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=8)[0], {"image": image()}


def ddpm():
    from checkpoints import tiny_unet

    return diffusers.DDPMPipeline(unet=tiny_unet(in_channels=3, out_channels=3), scheduler=diffusers.DDPMScheduler()), {}


def dit():
    classes = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
    size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    made = seeded(lambda: diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, **size, **classes))
    return diffusers.DiTPipeline(transformer=made, vae=vae(shift_factor=None), scheduler=ddim()), {}


# Transformers of images -------------------------------------------------------------------------------------------------------------


def flux_parts(guidance=True, **config):
    size = SIZE | {"in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 8}
    made = seeded(
        lambda: diffusers.FluxTransformer2DModel(**size, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance, **config)
    )
    texts = {"text_encoder": clip(), "tokenizer": tokenizer(), "text_encoder_2": t5(), "tokenizer_2": tokenizer()}
    return {"transformer": made, "scheduler": flow(use_dynamic_shifting=True), "vae": vae(), **texts}


def flux(cls=diffusers.FluxPipeline, **config):
    return cls(**flux_parts(**config)), {"height": 16, "width": 16, "max_sequence_length": 12}


def flux2():
    size = SIZE | {"in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 32, "timestep_guidance_channels": 8}
    made = seeded(lambda: diffusers.Flux2Transformer2DModel(**size, axes_dims_rope=(2, 2, 2, 2)))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    coder = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    parts = {
        "transformer": made,
        "scheduler": flow(),
        "tokenizer": tokenizer(512),
        "text_encoder": causal("Mistral", "ForCausalLM"),
    }
    parts["vae"] = seeded(lambda: diffusers.AutoencoderKLFlux2(**blocks, **coder))
    options = {"height": 16, "width": 16, "max_sequence_length": 300, "text_encoder_out_layers": (1, 2)}
    return diffusers.Flux2Pipeline(**parts), options


def qwen_image():
    size = SIZE | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    made = seeded(lambda: diffusers.QwenImageTransformer2DModel(**size))
    parts = {
        "transformer": made,
        "scheduler": flow(use_dynamic_shifting=True),
        "vae": wan_vae(diffusers.AutoencoderKLQwenImage),
    }
    pipe = diffusers.QwenImagePipeline(**parts, text_encoder=causal("Qwen2", "ForCausalLM"), tokenizer=tokenizer(512))
    return pipe, {"height": 16, "width": 16}


def pixart():
    size = SIZE | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 16}
    made = seeded(lambda: diffusers.PixArtTransformer2DModel(**size, norm_type="ada_norm_single"))
    parts = {
        "transformer": made,
        "vae": vae(shift_factor=None),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
        "scheduler": ddim(),
    }
    return diffusers.PixArtSigmaPipeline(**parts), {
        "max_sequence_length": 12,
        "use_resolution_binning": False,
        "height": 16,
        "width": 16,
    }


def sana():
    size = SIZE | {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    widths = {"cross_attention_dim": 16, "caption_channels": 16, "sample_size": 8}
    made = seeded(lambda: diffusers.SanaTransformer2DModel(**size, **widths))
    blocks = {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
    }
    coder = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    }
    parts = {"transformer": made, "text_encoder": causal("Gemma2"), "tokenizer": tokenizer(512), "scheduler": flow()}
    parts["vae"] = seeded(
        lambda: diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.5, **blocks, **coder)
    )
    options = {
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "max_sequence_length": 12,
    }
    return diffusers.SanaPipeline(**parts), options


def auraflow():
    size = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    widths = {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    }
    made = seeded(lambda: diffusers.AuraFlowTransformer2DModel(**size, **widths))
    parts = {
        "transformer": made,
        "vae": vae(shift_factor=None),
        "text_encoder": t5(umt5=True),
        "tokenizer": tokenizer(),
        "scheduler": flow(),
    }
    return diffusers.AuraFlowPipeline(**parts), {"height": 16, "width": 16, "max_sequence_length": 12}


def lumina2():
    size = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
    }
    widths = {"multiple_of": 8, "axes_dim_rope": (4, 4, 4), "axes_lens": (400, 16, 16), "cap_feat_dim": 16}
    made = seeded(lambda: diffusers.Lumina2Transformer2DModel(**size, **widths))
    parts = {
        "transformer": made,
        "scheduler": flow(),
        "vae": vae(),
        "text_encoder": causal("Gemma2"),
        "tokenizer": tokenizer(512),
    }
    options = {"height": 16, "width": 16, "cfg_normalization": False, "max_sequence_length": 300}
    return diffusers.Lumina2Pipeline(**parts), options


def hunyuan_dit():
    size = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "hidden_size": 16, **SIZE} | {"num_layers": 2}
    widths = {
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 4,
        "text_len": 77,
        "text_len_t5": 256,
    }
    made = seeded(lambda: diffusers.HunyuanDiT2DModel(**size, **widths, activation_fn="gelu-approximate"))
    bert = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(VOCABULARY),
    }
    encoder = seeded(lambda: transformers.BertModel(transformers.BertConfig(**bert)))
    texts = {"text_encoder": encoder, "tokenizer": tokenizer(77), "text_encoder_2": t5(), "tokenizer_2": tokenizer(256)}
    parts = {
        "transformer": made,
        "vae": vae(shift_factor=None),
        "scheduler": ddim(prediction_type="v_prediction"),
        **texts,
        **NO_CHECKER,
    }
    pipe = diffusers.HunyuanDiTPipeline(**parts, requires_safety_checker=False)
    return pipe, {"height": 16, "width": 16, "use_resolution_binning": False}


def cogview4():
    size = SIZE | {
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "sample_size": 8,
        "rope_axes_dim": (8, 8),
    }
    made = seeded(lambda: diffusers.CogView4Transformer2DModel(**size))
    parts = {
        "transformer": made,
        "vae": vae(shift_factor=None),
        "text_encoder": causal("Glm", partial_rotary_factor=0.5),
        "tokenizer": tokenizer(padding_side="left"),
    }
    return diffusers.CogView4Pipeline(**parts, scheduler=flow(use_dynamic_shifting=True)), {
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
    }


def chroma():
    size = SIZE | {"in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    more = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    made = seeded(lambda: diffusers.ChromaTransformer2DModel(**size, **more))
    parts = {"transformer": made, "scheduler": flow(), "vae": vae(), "text_encoder": t5(), "tokenizer": tokenizer()}
    return diffusers.ChromaPipeline(**parts), {"height": 16, "width": 16, "max_sequence_length": 12}


def hidream():
    size = SIZE | {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "caption_channels": [16, 16]}
    more = {
        "text_emb_dim": 16,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (16, 16),
        "llama_layers": (0, 1),
    }
    made = seeded(lambda: diffusers.HiDreamImageTransformer2DModel(**size, **more, force_inference_output=True))
    encoders = {
        "text_encoder": clip(True, length=128),
        "text_encoder_2": clip(True, length=128),
        "text_encoder_3": t5(),
        "text_encoder_4": causal("Llama", "ForCausalLM"),
    }
    tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer(), "tokenizer_4": tokenizer()}
    pipe = diffusers.HiDreamImagePipeline(transformer=made, scheduler=flow(), vae=vae(), **encoders, **tokenizers)
    pipe.default_sample_size = 8
    return pipe, {"height": 16, "width": 16, "max_sequence_length": 12}


def z_image():
    size = {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
    }
    made = seeded(lambda: diffusers.ZImageTransformer2DModel(**size, axes_dims=[4, 2, 2], axes_lens=[512, 16, 16]))
    parts = {"transformer": made, "scheduler": flow(), "vae": vae(), "text_encoder": causal("Qwen3"), "tokenizer": tokenizer()}
    return diffusers.ZImagePipeline(**parts), {"height": 16, "width": 16, "max_sequence_length": 12}


# Videos and sounds ------------------------------------------------------------------------------------------------------------------


def wan_transformer(seed=0):
    size = SIZE | {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 32}
    return seeded(lambda: diffusers.WanTransformer3DModel(**size), seed)


def wan(second=False):
    more = {"transformer_2": wan_transformer(1), "boundary_ratio": 0.8} if second else {}
    parts = {
        "transformer": wan_transformer(),
        "vae": wan_vae(),
        "text_encoder": t5(umt5=True),
        "tokenizer": tokenizer(),
        **more,
    }
    pipe = diffusers.WanPipeline(
        **parts,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    return pipe, {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 12} | (
        {"guidance_scale_2": 3.0} if second else {}
    )


def wan22():
    return wan(second=True)


def hunyuan_video():
    size = SIZE | {"in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16}
    more = {"pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4), "patch_size": 1}
    made = seeded(lambda: diffusers.HunyuanVideoTransformer3DModel(**size, **more))
    blocks = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    coder = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    texts = {
        "text_encoder": causal("Llama", layers=4),
        "tokenizer": tokenizer(600),
        "text_encoder_2": clip(length=80),
        "tokenizer_2": tokenizer(77),
    }
    parts = {
        "transformer": made,
        "vae": seeded(lambda: diffusers.AutoencoderKLHunyuanVideo(**blocks, **coder)),
        "scheduler": flow(),
    }
    options = {
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "max_sequence_length": 16,
        "prompt_template": {"template": "{}", "crop_start": 0},
    }
    return diffusers.HunyuanVideoPipeline(**parts, **texts), options


def ltx():
    size = SIZE | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16}
    made = seeded(lambda: diffusers.LTXVideoTransformer3DModel(**size))
    coder = {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    coder |= {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1), "patch_size": 1}
    coder |= {
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
    }
    parts = {
        "transformer": made,
        "vae": seeded(lambda: diffusers.AutoencoderKLLTXVideo(**coder)),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }
    options = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 12}
    return diffusers.LTXPipeline(**parts, scheduler=flow(use_dynamic_shifting=True)), options


def cogvideox():
    size = SIZE | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16, "max_text_seq_length": 12}
    frames = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "temporal_compression_ratio": 4}
    made = seeded(lambda: diffusers.CogVideoXTransformer3DModel(**size, **frames))
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    coder = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    parts = {
        "transformer": made,
        "vae": seeded(lambda: diffusers.AutoencoderKLCogVideoX(**blocks, **coder)),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return diffusers.CogVideoXPipeline(**parts, scheduler=scheduler), {
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "max_sequence_length": 12,
    }


def mochi():
    size = SIZE | {
        "in_channels": 4,
        "patch_size": 2,
        "pooled_projection_dim": 8,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 12,
    }
    made = seeded(lambda: diffusers.MochiTransformer3DModel(**size | {"num_layers": 2}))
    coder = {
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
    }
    coder |= {"latent_channels": 4, "latents_mean": None, "latents_std": None, "add_attention_block": (False,) * 5}
    parts = {
        "transformer": made,
        "vae": seeded(lambda: diffusers.AutoencoderKLMochi(**coder)),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }
    pipe = diffusers.MochiPipeline(**parts, scheduler=flow(shift=1.0, invert_sigmas=True), force_zeros_for_empty_prompt=False)
    return pipe, {"height": 32, "width": 32, "num_frames": 7, "max_sequence_length": 12}


def animatediff():
    adapter = {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2,
    }
    motion = seeded(lambda: diffusers.MotionAdapter(**adapter), 1)
    parts = sd_parts(cross_attention_dim=8)
    torch.manual_seed(0)
    return diffusers.AnimateDiffPipeline(**parts, motion_adapter=motion), {"num_frames": 4}


def text_to_video():
    """Its scheduler is given frames, and no videos."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    size = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 8}
    made = seeded(lambda: diffusers.UNet3DConditionModel(**blocks, **size))
    return diffusers.TextToVideoSDPipeline(**sd_parts() | {"unet": made}), {"height": 16, "width": 16, "num_frames": 2}


def stable_audio():
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    size = SIZE | {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_key_value_attention_heads": 2,
        "cross_attention_dim": 8,
    }
    more = {"time_proj_dim": 8, "global_states_input_dim": 16, "cross_attention_input_dim": 8}
    made = seeded(lambda: diffusers.StableAudioDiTModel(**size, **more))
    coder = {
        "encoder_hidden_size": 4,
        "downsampling_ratios": [1, 2],
        "channel_multiples": [1, 1],
        "decoder_channels": 4,
        "decoder_input_channels": 4,
    }
    parts = {
        "transformer": made,
        "vae": seeded(lambda: diffusers.AutoencoderOobleck(**coder, sampling_rate=16)),
        "text_encoder": t5(),
        "tokenizer": tokenizer(),
    }
    projection = seeded(lambda: StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=8, min_value=0, max_value=32))
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    return diffusers.StableAudioPipeline(**parts, projection_model=projection, scheduler=scheduler), {"audio_end_in_s": 1.5}


KINDS = {
    "SD 1.5": sd,
    "SD 2": sd2,
    "SDXL": xl,
    "SD3": sd3,
    "Flux": flux,
    "Flux2": flux2,
    "Qwen-Image": qwen_image,
    "PixArt-Sigma": pixart,
    "Sana": sana,
    "AuraFlow": auraflow,
    "Lumina2": lumina2,
    "HunyuanDiT": hunyuan_dit,
    "CogView4": cogview4,
    "Chroma": chroma,
    "HiDream": hidream,
    "Z-Image": z_image,
    "Wan 2.1": wan,
    "Wan 2.2": wan22,
    "HunyuanVideo": hunyuan_video,
    "LTX": ltx,
    "CogVideoX": cogvideox,
    "Mochi": mochi,
    "AnimateDiff": animatediff,
    "text-to-video": text_to_video,
    "Stable Audio": stable_audio,
    "SD ControlNet": sd_control,
    "SDXL ControlNet": xl_control,
    "IP-Adapter": ip_adapter,
    "inpainting": inpainting,
    "img2img": image_to_image,
    "InstructPix2Pix": pix2pix,
    "DDPM": ddpm,
    "DiT": dit,
}
