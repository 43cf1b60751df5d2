"""What is shipped with the package: a small teacher, trained on Python's standard library."""

from __future__ import annotations

from pathlib import Path


def teacher_path() -> Path:
    """The directory of the bundled teacher, a Llama that plain transformers loads."""
    return Path(__file__).parent / "teacher"
