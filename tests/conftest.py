import os

# before any kernel is imported: Triton decides at import whether it compiles or interprets
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
