"""Where Triton is missing or cannot compile, `guided_mse` is the plain formula, and says so once."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from esd_kernels import fused_guided_mse, guided_mse, guided_mse_reference

WITHOUT = """
import sys, warnings
sys.modules["triton"] = None  # as where there is no build of it
import torch
from esd_kernels import guided_mse, guided_mse_reference

class OnAGPU(torch.Tensor):
    is_cuda = True

student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
expected = guided_mse_reference(student, teacher, 1.0)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert torch.equal(guided_mse(student, teacher, 1.0), expected)
    for _ in range(3):
        assert torch.equal(guided_mse(student.as_subclass(OnAGPU), teacher, 1.0).as_subclass(torch.Tensor), expected)
print([str(warning.message) for warning in said])
"""


def test_without_triton():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # asks for a kernel that is not there
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['guided_mse runs as plain PyTorch: triton is not installed']"


class OnAGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def test_where_triton_cannot_compile(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(fused_guided_mse, "_scale_kernel", {(1,): fail})
    fused_guided_mse.can_launch.cache_clear()
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    with pytest.warns(UserWarning, match=r"plain PyTorch on cpu.*C compiler") as said:
        loss = guided_mse(student.as_subclass(OnAGPU), teacher, 1.0)
    assert len(said) == 1
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), guided_mse_reference(student, teacher, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        guided_mse(student.as_subclass(OnAGPU), teacher, 1.0)
    fused_guided_mse.can_launch.cache_clear()


def test_launches_go_to_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which is the first one wherever the tensors are."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or torch.no_grad())
    with fused_guided_mse._on(torch.device("cuda:1")):
        pass
    assert entered == [torch.device("cuda:1")]
