"""Kernels for NVIDIA GPUs: CUDA C++ sources, compiled by NVRTC when first needed, and their launchers."""

from __future__ import annotations


def refusal(op: str) -> str:
    """Why these kernels cannot be had on this machine, as a phrase; empty where they can.

    Args:
        op: any of them: they need the same.
    """
    from compresskit.kernels.cuda.launch import unavailable

    return unavailable()
