"""Where a user's caches are: tokens, teachers' outputs, measured costs, compiled kernels, times."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "COMPRESSKIT_CACHE"


def cache_home() -> Path:
    """The folder that COMPRESSKIT_CACHE names, or ``~/.cache/compresskit``; it need not exist."""
    return Path(os.environ.get(VARIABLE, "~/.cache/compresskit")).expanduser()
