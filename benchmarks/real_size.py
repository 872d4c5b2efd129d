"""Two training iterations at Stable Diffusion 1.5's real size, with random weights: does it fit, and in what.

    python benchmarks/real_size.py --output benchmarks/results/real_size_cpu.json

Builds the exact architecture in a temporary directory (about 2.2 GB in fp16), runs `esd_peft.erase` on it and writes
seconds and peak memory by phase. Any option of the erase command may follow, `--dtype bfloat16` for example.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from esd_peft import EraseConfig, erase
from esd_peft.command_line import parse
from esd_peft.evaluation.table import result_table
from esd_peft.shapes.train import make_scheduler, make_tokenizer


def random_stable_diffusion(path: Path) -> None:
    """SD 1.5's UNet, VAE and text encoder with random weights; the tokenizer is a small one (no vocabulary ships)."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
    )
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sd15"
        random_stable_diffusion(model)
        defaults = EraseConfig(
            concept="circle",
            model=str(model),
            output=Path(folder) / "erased",
            num_inference_steps=2,
            trajectories=1,
            train_batch_size=1,
            max_train_steps=2,
            gradient_checkpointing=True,
            optimizer="AdamW8bit",
            eval_seeds=0,
        )
        file = Path(folder) / "config.yaml"
        file.write_text(defaults.to_yaml())
        result = erase(parse(EraseConfig, "erase", ["--config", str(file), *options]))
    print(result_table(result))
    for key in ("model", "output"):
        del result["config"][key]  # temporary names
    result["machine"] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
