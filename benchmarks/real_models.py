"""Pipelines of the real architectures at their real size, as directories: with random weights, or with none at all."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
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
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from esd_peft.worlds import WORLDS
from world_training import make_scheduler

CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP = {"hidden_act": "gelu"}  # by which the checkpoint's layout is known
CLIP_H = OPEN_CLIP | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = OPEN_CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "SD 2.1": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
}
EULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN3_4B = QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "tie_word_embeddings": True}
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"  # in place of a template
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


SD3 = {
    "SD 3.5 medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "SD 3.5 large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
}


def _tokenizer(length: int = 77) -> CLIPTokenizer:
    """The emoji pipeline's, whose words are enough for the real one's default method: CLIP's vocabulary does not ship."""
    tokenizer = CLIPTokenizer.from_pretrained(WORLDS["emoji"].pipeline / "tokenizer", model_max_length=length)
    tokenizer.chat_template = CHAT
    return tokenizer


def _clip(sizes: dict[str, Any], projects: bool = False) -> nn.Module:
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, projection_dim=sizes["hidden_size"], **sizes)
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def _t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """T5-XXL's encoder, and a tokenizer of letters: prompts are padded to the same length with any."""
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz")]
    sizes = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5Tokenizer(vocab=pieces, extra_ids=0), T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))


def _vae(channels: int = 4, **options: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        **options,
    )


def _sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(**UNETS["SD 1.5"])
    parts = {"unet": unet, "vae": _vae(), "text_encoder": _clip(CLIP_L), "tokenizer": _tokenizer()}
    return StableDiffusionPipeline(**parts, scheduler=make_scheduler(), **NO_CHECKER)


def _sd21() -> DiffusionPipeline:
    unet = UNet2DConditionModel(**UNETS["SD 2.1"])
    parts = {"unet": unet, "vae": _vae(), "text_encoder": _clip(CLIP_H), "tokenizer": _tokenizer()}
    return StableDiffusionPipeline(**parts, scheduler=make_scheduler("v_prediction"), **NO_CHECKER)


def _sdxl() -> DiffusionPipeline:
    unet = UNet2DConditionModel(**UNETS["SDXL"])
    texts = {"text_encoder": _clip(CLIP_L), "text_encoder_2": _clip(CLIP_G, projects=True)}
    tokens = {"tokenizer": _tokenizer(), "tokenizer_2": _tokenizer()}
    with torch.device("cpu"):
        scheduler = EulerDiscreteScheduler(**EULER)
    vae = _vae(scaling_factor=0.13025)
    return StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=scheduler, add_watermarker=False, **texts, **tokens)


def _sd3(sizes: dict[str, Any]) -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(qk_norm="rms_norm", **sizes)
    tokenizer, encoder = _t5()
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIP_L, projects=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(CLIP_G, projects=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


def _flux() -> DiffusionPipeline:
    tokenizer, encoder = _t5()
    shift = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(CLIP_L),
        tokenizer=_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )


def _pixart() -> DiffusionPipeline:
    tokenizer, encoder = _t5()
    sizes = {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}
    with torch.device("cpu"):
        scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", algorithm_type="dpmsolver++")
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(scaling_factor=0.13025),
        transformer=PixArtTransformer2DModel(**sizes),
        scheduler=scheduler,
    )


def _sana() -> DiffusionPipeline:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    with torch.device("cpu"):
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)
    return SanaPipeline(
        tokenizer=_gemma_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config()),  # whose defaults are Gemma 2 2B
        vae=AutoencoderDC(
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(),
        scheduler=scheduler,
    )


def _gemma_tokenizer() -> GemmaTokenizer:
    """Return a tokenizer of 400 tokens in which Sana's instruction to Gemma has as many tokens as words and punctuation
    marks, about 200.
    """
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁")
    letters = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return letters.train_new_from_iterator(["\n".join(instruction)], 400, show_progress=False)


def _z_image() -> DiffusionPipeline:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(Qwen3Config(**QWEN3_4B)),
        tokenizer=_tokenizer(512),
    )


def _klein() -> DiffusionPipeline:
    sizes = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560}
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(guidance_embeds=False, **sizes),
        scheduler=scheduler,
        vae=AutoencoderKLFlux2(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B)),
        tokenizer=_tokenizer(512),
        is_distilled=True,
    )


def _qwen_image() -> DiffusionPipeline:
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(text_config=text | heads | {"rope_parameters": rope}, vision_config={"out_hidden_size": 3584})
    with torch.device("cpu"):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02)
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(),
        scheduler=scheduler,
        vae=AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=_tokenizer(1058),
    )


def _wan() -> DiffusionPipeline:
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=256384, feed_forward_proj="gated-gelu", **sizes))
    with torch.device("cpu"):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        transformer=WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        scheduler=scheduler,
        vae=AutoencoderKLWan(),
        text_encoder=encoder,
        tokenizer=_tokenizer(512),
    )


MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "SD 1.5": _sd15,
    "SD 2.1": _sd21,
    "SDXL": _sdxl,
    "SD 3.5 medium": lambda: _sd3(SD3["SD 3.5 medium"]),
    "SD 3.5 large": lambda: _sd3(SD3["SD 3.5 large"]),
    "FLUX.1": _flux,
    "PixArt-Σ": _pixart,
    "Sana": _sana,
    "Z-Image": _z_image,
    "FLUX.2 klein 4B": _klein,
    "Qwen-Image": _qwen_image,
    "Wan 2.1 1.3B": _wan,
}


def make_model(name: str, path: Path, weights: bool = True, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The pipeline directory of one of `MODELS`; without `weights` it has its configs and tokenizers only.

    Weights are normal noise, small enough that activations stay finite.
    """
    with torch.device("meta"):
        pipe = MODELS[name]()
    pipe.save_config(path)
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            if module is not None:
                module.save_pretrained(path / part)
        elif weights:
            module = _randomized(module.to(dtype))
            module.save_pretrained(path / part, max_shard_size="4GB")
        elif hasattr(module, "save_config"):
            module.save_config(path / part)
        else:
            module.config.save_pretrained(path / part)
    return path


@torch.no_grad()
def _randomized(module: nn.Module) -> nn.Module:
    """With the same few million random numbers over and over: drawing each anew takes minutes for FLUX."""
    module = module.to_empty(device="cpu")
    noise = 0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    for tensor in module.parameters():
        flat = tensor.view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
    for key, buffer in module.named_buffers():
        if "position_ids" in key:
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module
