"""Weights from a GGUF file, dequantised by the `gguf` package."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esd_peft.errors import UserError, one_line
from esd_peft.models.transformer_file import dtype_beside

GGUF = ".gguf"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that a converter has reshaped: GGUF knows no more than four dimensions


def read_gguf(path: Path, option: str) -> dict[str, Tensor]:
    """Read the tensors of a GGUF file by name.

    Plain ones keep their dtype. Quantised ones are dequantised in fp32 and rounded once to `dtype_beside` of the others, as
    are these. Raises `UserError` without the `gguf` package, for an unreadable file, and for a type unknown to the package.
    """
    try:
        from gguf import GGUFReader, dequantize  # names, for a folder `gguf` at hand would be imported without an error
    except ImportError:
        raise UserError(f"{option} {path} needs a package that is not here; pip install gguf") from None
    try:
        reader = GGUFReader(path)
    except Exception as error:  # the package raises many kinds for a damaged file
        raise UserError(
            f"{option} {path} cannot be read as GGUF ({one_line(error)}); restore it, or name a .safetensors file"
        ) from None
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    dtypes = {_PLAIN[kind] for kind in kinds if kind in _PLAIN}
    common = None if kinds <= _PLAIN.keys() else dtype_beside(dtypes)
    weights = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        try:
            value = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        except NotImplementedError:
            raise UserError(
                f"{option} {path} stores {tensor.name} as {kind}, which the gguf package cannot dequantise; name a file of "
                "another type (Q8_0, Q6_K, Q4_K)"
            ) from None
        if shape := reader.get_field(_SHAPE + tensor.name):
            value = value.reshape(shape.contents())
        weights[tensor.name] = value.to(common or _PLAIN[kind])
    return weights
