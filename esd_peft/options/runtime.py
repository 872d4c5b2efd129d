"""Options that say where and in which number format a job computes."""

from typing import TYPE_CHECKING, Literal

from esd_peft.options.base import Options

if TYPE_CHECKING:  # importing it takes longer than everything else here
    import torch

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class RuntimeOptions(Options):
    """The device, the number format, the compiler, and where losses and images are logged."""

    device: str = "auto"
    """auto (a GPU, where there is one), cpu, cuda (NVIDIA's, and AMD's by ROCm), cuda:1, xpu (Intel's) or mps (Apple's)."""
    dtype: Dtype = "auto"
    """The number format in which the denoiser computes; auto: bfloat16 on a GPU, float32 on a CPU. Adapters always stay in
    float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the denoiser's blocks (torch.compile) for rollouts and training, which takes a minute or more; auto: on a
    GPU, from about 2000 calls of the denoiser on (a default run makes 65)."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where to log the loss, beside the terminal, and the images of --validation-prompt."""

    @property
    def torch_device(self) -> "torch.device":
        """The device, once `esd_peft.erasure.defaults.resolve` has named it."""
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The number format, once `esd_peft.erasure.defaults.resolve` has named it."""
        import torch

        return getattr(torch, self.dtype)
