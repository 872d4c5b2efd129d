"""Small pipelines of each kind of model, from the real classes of diffusers and transformers, as yet untrained.

All share the autoencoder of the shapes pipeline, and its text encoder in the place of CLIP. The replacements of T5 and Qwen
are new, and so is every transformer; U-Nets start from the fitting weights of the shapes pipeline's.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from esd_peft.prompts.plan import TEMPLATES
from esd_peft.worlds.shapes import Shapes, world
from world_training import make_scheduler

PROMPT_LENGTH = 24  # tokens that the replacements of T5 and Qwen read
WIDTH = 128  # of text encoders and transformers, in 4 heads
_WORDS = sorted(
    {word.strip(",.") for text in (*TEMPLATES, *world.TEMPLATES) for word in text.replace("{}", "").lower().split()}
    | {name for names in world.ATTRIBUTES.values() for name in names}
    | {world.NOUN}
)
_HEADS = {"num_attention_heads": 4, "attention_head_dim": WIDTH // 4}
_AXES = (8, 12, 12)  # of a head, for the rotary embedding


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(Shapes.pipeline / "vae", dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0, _name_or_path="")  # which flow-matching pipelines ask for
    return vae


def _clip(kind: type = CLIPTextModel) -> dict[str, Any]:
    encoder = kind.from_pretrained(Shapes.pipeline / "text_encoder", dtype=torch.float32, projection_dim=WIDTH)
    if kind is CLIPTextModelWithProjection:
        torch.nn.init.eye_(encoder.text_projection.weight)
    encoder.config._name_or_path = ""
    return {"tokenizer": CLIPTokenizer.from_pretrained(Shapes.pipeline / "tokenizer"), "text_encoder": encoder}


def _numbered(parts: dict[str, Any], number: int) -> dict[str, Any]:
    return {f"{name}_{number}": part for name, part in parts.items()}


def _t5() -> dict[str, Any]:
    """Words of the world are one token each; all others are spelled."""
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789'-.,"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in _WORDS), ("▁", -2.0), *letters]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // 4, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4}
    return {"tokenizer": tokenizer, "text_encoder": T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))}


def _qwen() -> dict[str, Any]:
    """With Qwen's chat template; words of the world are one token each, with a space before them or without."""
    spelled = Tokenizer(models.BPE())
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    words = [*_WORDS, "user", "assistant", "think"]
    spelled.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    vocabulary = spelled.get_vocab()
    learned = [(left, right) for left, right in json.loads(spelled.to_str())["model"]["merges"]]
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(vocabulary, key=vocabulary.__getitem__)])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=learned)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "head_dim": WIDTH // 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {
        "tokenizer": tokenizer,
        "text_encoder": Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), eos_token_id=0, **sizes, **heads)),
    }


def _unet(**options: Any) -> UNet2DConditionModel:
    """Return a U-Net like that of the shapes pipeline, with its weights where they fit."""
    trained = UNet2DConditionModel.from_pretrained(Shapes.pipeline / "unet", dtype=torch.float32)
    unet = UNet2DConditionModel.from_config({**trained.config, **options, "_name_or_path": ""})
    own = unet.state_dict()
    fitting = {name: value for name, value in trained.state_dict().items() if name in own and own[name].shape == value.shape}
    unet.load_state_dict(fitting, strict=False)
    return unet


def v_prediction() -> StableDiffusionPipeline:
    """Stable Diffusion with v-prediction and zero terminal SNR (arXiv 2305.08891)."""
    settings = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = DDIMScheduler.from_config(make_scheduler("v_prediction").config, **settings)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=_vae(), unet=_unet(), scheduler=scheduler, **_clip(), **absent)


def sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders, a pooled embedding and the image's size as conditions."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 16}
    unet = _unet(cross_attention_dim=2 * WIDTH, projection_class_embeddings_input_dim=WIDTH + 6 * 16, **added)
    texts = _clip() | _numbered(_clip(CLIPTextModelWithProjection), 2)
    scheduler = EulerDiscreteScheduler.from_config(make_scheduler().config, timestep_spacing="linspace")
    return StableDiffusionXLPipeline(vae=_vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **texts)


def sd3() -> StableDiffusion3Pipeline:
    """Two CLIPs and T5, an MMDiT, flow matching."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        **_HEADS,
    )
    clips = _clip(CLIPTextModelWithProjection) | _numbered(_clip(CLIPTextModelWithProjection), 2)
    t5 = _t5()
    t5["text_encoder"] = T5EncoderModel(T5Config.from_dict(t5["text_encoder"].config.to_dict() | {"d_model": 2 * WIDTH}))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return StableDiffusion3Pipeline(transformer=transformer, vae=_vae(), scheduler=scheduler, **clips, **_numbered(t5, 3))


def flux() -> FluxPipeline:
    """CLIP's pooled embedding and T5's tokens, double and single layers, told a guidance scale."""
    sizes = {"in_channels": 32, "num_layers": 3, "num_single_layers": 3, "joint_attention_dim": WIDTH}
    transformer = FluxTransformer2DModel(
        **sizes, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=_AXES, **_HEADS
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=True)
    texts = _clip() | _numbered(_t5(), 2)
    return FluxPipeline(transformer=transformer, vae=_vae(), scheduler=scheduler, **texts)


def chroma() -> ChromaPipeline:
    """FLUX's layers with a mask, without pooled embedding and without guidance that it is told."""
    sizes = {"in_channels": 32, "num_layers": 3, "num_single_layers": 3, "joint_attention_dim": WIDTH}
    approximator = {"approximator_num_channels": 64, "approximator_hidden_dim": WIDTH, "approximator_layers": 2}
    transformer = ChromaTransformer2DModel(**sizes, **approximator, axes_dims_rope=_AXES, **_HEADS)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=True)
    return ChromaPipeline(transformer=transformer, vae=_vae(), scheduler=scheduler, **_t5())


def pixart() -> PixArtSigmaPipeline:
    """T5's tokens with a mask, a DiT with cross-attention, ε-prediction."""
    transformer = PixArtTransformer2DModel(
        in_channels=8,
        out_channels=16,
        num_layers=6,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
        **_HEADS,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, algorithm_type="dpmsolver++")
    return PixArtSigmaPipeline(transformer=transformer, vae=_vae(), scheduler=scheduler, **_t5())


def z_image() -> ZImagePipeline:
    """Qwen's tokens with a chat template, one stream of text and image tokens, flow matching."""
    transformer = ZImageTransformer2DModel(
        in_channels=8,
        dim=WIDTH,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=[*_AXES],
    )
    return ZImagePipeline(
        transformer=transformer, vae=_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), **_qwen()
    )


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "v-prediction": v_prediction,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "chroma": chroma,
    "pixart": pixart,
    "z-image": z_image,
}
