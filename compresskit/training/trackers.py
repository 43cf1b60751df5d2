"""Experiment trackers, through Accelerate: what each step came to goes to the services a user named."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = "compresskit"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Tracker -> the package to install."""
FOLDER = "COMPRESSKIT_RUNS"
"""Where trackers that write files put them; ``runs`` in the working directory where it is not set."""


class Trackers:
    """The trackers of one run; only its main process has any.

    Args:
        names: of :data:`PACKAGES`; each is installed.
        run: what they show the run as.
        settings: scalars that describe it.
    """

    def __init__(self, names: Sequence[str], *, run: str, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder = Path(os.environ.get(FOLDER, "runs"))
        plain = {k: v for k, v in settings.items() if isinstance(v, str | int | float | bool)}
        self._trackers = []
        for name in names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            # Services have a project of many runs; files have a folder for each.
            tracker = (
                cls(run, logging_dir=folder) if cls.requires_logging_directory else cls(PROJECT, name=run)
            )
            tracker.start()
            tracker.store_init_configuration(plain)
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of ``step``."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def finish(self) -> None:
        """No more will come."""
        for tracker in self._trackers:
            tracker.finish()
