"""A frozen base or a large text encoder in host memory, each layer on the device only while it computes.

That is slow: of the base it is the last resort.
"""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import DiffusionPipeline
from torch import nn

LARGE = 6 * 2**30  # bytes from which a text encoder (T5-XXL) stays in host memory, its layers on the GPU one by one


def offload_base(denoiser: nn.Module, device: torch.device) -> None:
    """Move `denoiser` to `device` in place, but for the frozen weights, which accelerate brings there layer by layer.

    A layer's weights stay until the backward pass has used them; with gradient checkpointing that is one block at a time.
    The very first layer stays: by it pipelines tell which device they are on.
    """
    first = next(denoiser.parameters())
    for module in denoiser.modules():
        own = [*module.parameters(recurse=False)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        if any(parameter.requires_grad or parameter is first for parameter in own):
            for parameter in own:
                parameter.data = parameter.data.to(device)
        elif own:
            add_hook_to_module(module, AlignDevicesHook(execution_device=device, offload=True), append=True)


def streamed_bytes(module: nn.Module) -> int:
    """Return the bytes of `module` on the device at a time: the first layer and one other."""
    layers = [sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in module.modules()]
    layers = [size for size in layers if size]
    return layers[0] + max(layers[1:], default=0)


def bring_encoders(pipe: DiffusionPipeline, device: torch.device) -> None:
    """The pipeline's text encoders to the device, layer by layer as they compute where they are large."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            if _bytes(part) > LARGE:
                offload_base(part.requires_grad_(False), device)
            else:
                part.to(device)


def encoder_bytes(pipe: DiffusionPipeline) -> int:
    """Bytes of all text encoders on a GPU while prompts are encoded (`bring_encoders`)."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(streamed_bytes(part) if _bytes(part) > LARGE else _bytes(part) for part in parts)


def _bytes(module: nn.Module) -> int:
    """Return the size of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
