# ruff: noqa: E402 (PyTorch comes after its hooks)
"""A CUDA device that is not there: tensors on it are CPU tensors in disguise, and whatever a GPU would refuse is refused.

    with emulated_cuda():
        erase(EraseConfig(concept="circle", device="cuda", ...))

An operation on tensors of different devices, or with a generator of another device, raises as it would on a GPU; all
others compute on the CPU, so that results can be compared with a run there. What it cannot see: whether a kernel works
(esd_kernels run interpreted, bitsandbytes' and PyTorch's are the CPU's), streams and waiting, how much memory there is,
and what CUDA has no implementation of. It changes PyTorch for good, so it belongs in a process of its own, which imports
it before PyTorch: that asks for its hooks once.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from ctypes import CDLL, RTLD_GLOBAL
from pathlib import Path


def _load_hooks() -> None:
    """Compile emulated_cuda.cpp, and load it, with which PyTorch's libraries come."""
    assert "torch" not in sys.modules, "import emulated_cuda first"
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    includes = [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    linking = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/emulated_cuda.so"
        source = str(Path(__file__).with_suffix(".cpp"))
        subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", *includes, source, *linking, "-o", library], check=True)
        CDLL(library, mode=RTLD_GLOBAL)


_load_hooks()
os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ACROSS = {"aten::copy_", "aten::_to_copy"}  # operations that may have one tensor here and one there
INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}  # by indices on the CPU


class OnCUDA(Tensor):
    """A tensor that says it is on the device; its values are `inner`'s, a CPU tensor's."""

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "OnCUDA":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        self.inner = inner.detach()

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, _context, _size, _stride):
        return OnCUDA(tensors["inner"])

    def tolist(self):
        return self.inner.tolist()

    def storage(self):  # by whose address files tell which tensors share it
        return self.inner.storage()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __repr__(self, **_) -> str:
        return f"OnCUDA({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The operation on the tensors inside; its results are on the device unless it was asked to bring them to the CPU."""
    leaves = [*_leaves(args), *_leaves(kwargs)]
    here = any(isinstance(x, OnCUDA) for x in leaves)
    named = [x.type for x in leaves if isinstance(x, torch.device)]
    on_device = "cuda" in named or (here and "cpu" not in named)
    if not here and not on_device:
        return function(*args, **kwargs)
    _refuse_what_a_gpu_refuses(function, args, leaves, here, on_device)
    inside, options = _inside(args), _inside(kwargs)
    if options.get("pin_memory"):
        options["pin_memory"] = False
    result = function(*inside, **options)
    if function._schema.name.endswith("_") and isinstance(args[0], Tensor):
        return args[0]
    if on_device:
        result = _outside(result)
    return return_and_correct_aliasing(function, args, kwargs, result) if here and on_device else result


def _leaves(given) -> list:
    """Return the items of nested containers. PyTorch's own functions for trees take longer than the operations."""
    if not isinstance(given, list | tuple | dict):
        return [given]
    return [leaf for value in (given.values() if isinstance(given, dict) else given) for leaf in _leaves(value)]


def _inside(given):
    """The same with the CPU's tensors and the CPU itself."""
    if isinstance(given, OnCUDA):
        return given.inner
    if isinstance(given, torch.device):
        return CPU
    if isinstance(given, dict):
        return {name: _inside(value) for name, value in given.items()}
    return type(given)(map(_inside, given)) if isinstance(given, list | tuple) else given


def _outside(made):
    """The same with the device's tensors."""
    if isinstance(made, list | tuple):
        return type(made)(map(_outside, made))
    return OnCUDA(made) if isinstance(made, Tensor) and not isinstance(made, OnCUDA) else made


def _refuse_what_a_gpu_refuses(function, args, leaves, here: bool, on_device: bool) -> None:
    name = function._schema.name
    if on_device and any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in leaves):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if not here or name in ACROSS:
        return
    strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnCUDA)]
    if function.name() in INDEXING or name in INDEXING:
        strangers = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor) and not isinstance(x, OnCUDA) and x.dim()]
    elif torch.Tag.pointwise in function.tags or name == "aten::fill_" or name.startswith("aten::_foreach"):
        strangers = [x for x in strangers if x.dim()]  # a number may come from anywhere
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu")


class Factories(TorchDispatchMode):
    """Tensors that are made on the device, and operations that meet one from outside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Inside:
    """A Triton kernel that is handed the tensors inside."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            if not all(isinstance(x, OnCUDA) for x in args if isinstance(x, Tensor)):
                raise RuntimeError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            self.kernel[grid](*tree_map_only(OnCUDA, lambda x: x.inner, args), **options)

        return launch


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """PyTorch with one GPU, and `esd_kernels` interpreted on it. For the rest of the process."""
    _pretend()
    with Factories():
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device="cuda") copies from the CPU
        yield


def _pretend() -> None:
    import accelerate.hooks

    from esd_kernels import fused_guided_mse

    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "is_bf16_supported": True, "mem_get_info": (79 * 2**30, 80 * 2**30), "memory_reserved": 0, "memory_allocated": 0,
        "reset_peak_memory_stats": None, "max_memory_reserved": 2**30, "synchronize": None, "empty_cache": None,
        "get_device_name": "emulated", "is_current_stream_capturing": False, "get_device_capability": (9, 0),
        "device": contextlib.nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps its parameters, as with a real GPU
    torch.Tensor.data = property(torch.Tensor.data.__get__, _set_data)
    accelerate.hooks.set_module_tensor_to_device = _set_module_tensor
    for name in ("_guided_mse_kernel", "_scale_kernel"):
        setattr(fused_guided_mse, name, Inside(getattr(fused_guided_mse, name)))


_plain_data = torch.Tensor.data


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """`parameter.data = value`, also where one of them is in disguise, which PyTorch itself refuses."""
    if isinstance(tensor, OnCUDA) == isinstance(value, OnCUDA) and not isinstance(value, OnCUDA):
        _plain_data.__set__(tensor, value)
    else:
        made = nn.Parameter(value.detach(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        gradient = tensor.grad
        torch.utils.swap_tensors(tensor, made)
        tensor.grad = gradient


def _set_module_tensor(module, name, device, value=None, **_) -> None:
    """accelerate's, which makes a parameter of the class of the one before: here that may be the disguise."""
    path, _, leaf = name.rpartition(".")
    module = module.get_submodule(path)
    old = getattr(module, leaf)
    moved = (old if value is None else value).to(device)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(moved, old.requires_grad)
    else:
        module._buffers[leaf] = moved
