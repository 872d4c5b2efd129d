from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="esd_peft",
    version="0.1.0",
    description="Erase a concept from a text-to-image diffusion model for good, and see that it is gone",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # the import name `kernels` belongs to a Hugging Face package: only kernels/esd_kernels is installed
    package_dir={"esd_kernels": "kernels/esd_kernels"},
    packages=[*find_packages(include=["esd_peft", "esd_peft.*"]), "esd_kernels"],
    package_data={
        "esd_peft": ["everyday.txt"],
        "esd_peft.shapes": ["*.safetensors", "*.json", "pipeline/*", "pipeline/*/*"],
    },
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "diffusers>=0.42",
        "transformers>=5.0",
        "peft>=0.18",
        "bitsandbytes>=0.48",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "pydantic>=2.10",
        "tyro>=1.0.3",
        "pyyaml>=6.0",
        "pillow>=10.0",
        "psutil>=5.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-cov>=6",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "types-tqdm",
            "types-psutil",
            "tensorboard>=2.15",
        ],
        "tensorboard": ["tensorboard>=2.15"],
        "wandb": ["wandb>=0.17"],
    },
)
