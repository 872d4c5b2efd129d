"""Small random detectors of the real classes, made on the spot, as folders that their libraries load."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
)

from train_shapes import CONTEXT, make_tokenizer


def small_classifier(path: Path, labels: list[str]) -> Path:
    """A ResNet that answers something, with labels as ImageNet writes them ("church, church building")."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = dict(enumerate(labels))
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names,
                              label2id={label: i for i, label in names.items()})  # fmt: skip
        ResNetForImageClassification(config).save_pretrained(path)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(path)
    return path


def small_clip(path: Path) -> Path:
    """A CLIP of two small towers, with the embedded pipeline's tokenizer."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id}
        config = CLIPConfig(
            text_config=tower | text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=12
        )
        CLIPModel(config).save_pretrained(path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path
