"""Small random pipelines of the transformer families and SDXL, from their real classes."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from esd_peft.models import FAMILIES
from train_shapes import CONTEXT, make_tokenizer

WORDS = ["a", "an", "picture", "of", "circle", "red", "square", "shape", "style", "the", "in", "photo", "with", "and"]


def clip(width: int, projects: bool = False, **more):
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
        **more,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=vocab + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Characters, so that prompts and their templates differ in how many tokens they have."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(["<|endoftext|>", *characters])}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


def qwen3(vocabulary: int, layers: int) -> Qwen3Config:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, eos_token_id=0, **heads
    )


def vae(channels: int, levels: int = 2, **more) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * (levels - 1) + (16,),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        **more,
    )


def sdxl(scheduler: type = EulerDiscreteScheduler, **options) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=40,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    euler = scheduler(**({} if "EDM" in scheduler.__name__ else betas), **options)
    tokens = {"tokenizer": make_tokenizer(), "tokenizer_2": make_tokenizer()}
    texts = {"text_encoder": clip(16), "text_encoder_2": clip(24, projects=True)}
    return StableDiffusionXLPipeline(vae=vae(4), unet=unet, scheduler=euler, add_watermarker=False, **tokens, **texts)


def sd3(with_t5: bool = True, **scheduler) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    tokenizer, encoder = t5(48) if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(16, projects=True),
        tokenizer=make_tokenizer(),
        text_encoder_2=clip(24, projects=True),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=24,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    tokenizer, encoder = t5(48)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae(4, levels=4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(24),
        tokenizer=make_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=32,
        patch_size=2,
        caption_channels=48,
        use_additional_conditions=False,
    )
    tokenizer, encoder = t5(48)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", algorithm_type="dpmsolver++")
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae(4, levels=4), transformer=transformer, scheduler=scheduler
    )


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=16,
    )
    coder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"▁{word}" for word in WORDS)]
    tokenizer = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(config), vae=coder, transformer=transformer, scheduler=scheduler
    )


def flux2_parts(guidance_embeds: bool, text_width: int) -> dict:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * text_width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    coder = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    coder.bn.running_mean.normal_()
    coder.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": coder, "scheduler": scheduler}


def klein() -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(qwen3(len(tokenizer), layers=27))  # of which the pipeline takes 9, 18 and 27
    return Flux2KleinPipeline(tokenizer=tokenizer, text_encoder=encoder, **flux2_parts(False, 16))


def flux2() -> Flux2Pipeline:
    """With a tokenizer by itself: the processor that it is part of needs torchvision, which this package does not. It
    begins what has no template with a token, as Mistral's does; its template leaves out the system's message, which is
    long."""
    tokenizer = qwen_tokenizer()
    begins = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begins[0]} $A", special_tokens=[begins])
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}[INST]{{ m.content[0].text }}[/INST]{% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    text = MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=30, **sizes, **heads)  # it takes 10, 20 and 30
    vision = PixtralVisionConfig(num_hidden_layers=1, image_size=32, patch_size=16, **sizes)
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return Flux2Pipeline(tokenizer=tokenizer, text_encoder=encoder, **flux2_parts(True, 16))


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer = qwen_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_key_value_heads": 1, "rope_parameters": rope} | sizes
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5, 2, 2, 3]
        ),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
    )


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    tokenizer, encoder = t5(48)
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(4, levels=4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def wan(expand_timesteps: bool = False) -> WanPipeline:
    """2.1, or with `expand_timesteps` 2.2 TI2V, whose VAE makes 16 x 16 pixels of a latent."""
    tokenizer, _ = t5(48)
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    patched = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5, 2, 2, 3],
        **(patched | {"decoder_base_dim": 8} if expand_timesteps else {}),
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=48,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
    parts = {"text_encoder": encoder, "vae": vae, "scheduler": scheduler, "transformer": transformer}
    return WanPipeline(tokenizer=tokenizer, **parts, expand_timesteps=expand_timesteps)


def z_image(shift: float = 6.0) -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6]
    )
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(qwen3(len(tokenizer), layers=2)),
        vae=vae(4, levels=4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


ENCODERS = {
    ChromaPipeline: "_get_t5_prompt_embeds",
    FluxPipeline: "_get_t5_prompt_embeds",
    Flux2KleinPipeline: "_get_qwen3_prompt_embeds",
    Flux2Pipeline: "_get_mistral_3_small_prompt_embeds",
    WanPipeline: "_get_t5_prompt_embeds",
}

MAKERS = {
    "sdxl": sdxl,
    "sdxl turbo": lambda: sdxl(EulerAncestralDiscreteScheduler, timestep_spacing="trailing"),
    "sdxl, edm": lambda: sdxl(EDMDPMSolverMultistepScheduler),
    "sd3": sd3,
    "sd3 without T5": lambda: sd3(with_t5=False),
    "sd3, dynamic shift": lambda: sd3(use_dynamic_shifting=True),
    "flux dev": flux,
    "flux schnell": lambda: flux(guidance_embeds=False),
    "pixart": pixart,
    "sana": sana,
    "z-image": z_image,
    "flux.2 klein": klein,
    "qwen-image": qwen_image,
    "chroma": chroma,
    "wan": wan,
    "wan 2.2 ti2v": lambda: wan(expand_timesteps=True),
    "flux.2 dev": flux2,
}


def draw_small(monkeypatch, side: int = 8) -> None:
    """Pipelines whose own default is 1024² draw smaller, and those that pad prompts to 512 tokens pad to 64.

    Both are too many for a test.
    """
    for kind in FAMILIES:
        if kind.default_latent_size:
            monkeypatch.setattr(kind, "default_latent_size", (side, side))
    for pipeline, name in ENCODERS.items():
        is_static = isinstance(vars(pipeline)[name], staticmethod)
        short = _of_few_tokens(getattr(pipeline, name))
        monkeypatch.setattr(pipeline, name, staticmethod(short) if is_static else short)


def _of_few_tokens(encode):
    def short(*args, **options):
        return encode(*args, **options | {"max_sequence_length": min(64, options.get("max_sequence_length", 64))})

    return short


def save_family(name: str, path: Path) -> Path:
    """The pipeline directory of a family, in fp32, with random weights (biases and gates too, or much would be zero)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = MAKERS[name]()
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    pipe.save_pretrained(path)
    return path
