"""How PyTorch shares out a GPU's memory, which it asks the environment once."""

import os
import sys


def avoid_gaps() -> None:
    """Let PyTorch's allocator for GPUs extend what it holds instead of taking ever new pieces, which leaves gaps; call it
    before the GPU is first used. What the user has set for the allocator stays."""
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
