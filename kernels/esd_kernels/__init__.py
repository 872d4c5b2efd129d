"""Triton kernels for concept erasure, each with an eager reference of the same signature."""

from esd_kernels.guided_mse import guided_mse, guided_mse_reference
from esd_kernels.unit_gradient import unit_gradient

__all__ = ["guided_mse", "guided_mse_reference", "unit_gradient"]
