"""Kernels in C for the CPU, compiled by the system's compiler when they are first needed."""

from __future__ import annotations


def refusal(op: str) -> str:
    """Why ``op`` cannot run in C on this machine, as a phrase; empty where it can."""
    from compresskit.kernels.cpu import library

    return library.refusal(op)
