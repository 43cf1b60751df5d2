"""Tiny models of every family, made once."""

from __future__ import annotations

from tests.modeling.conftest import model

__all__ = ["model"]
