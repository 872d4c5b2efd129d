"""Triton kernels for concept erasure, each with an eager reference of the same signature."""

from esd_kernels.guided_mse import guided_mse, guided_mse_reference

__all__ = ["guided_mse", "guided_mse_reference"]
