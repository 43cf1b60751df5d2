"""`compresskit prune`: a one-stage recipe."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, one_stage_recipe, run_options, stage_options
from compresskit.sparse.stage import Prune


@click.command()
@click.argument("model")
@click.option("--data", help="Text or dialogues to calibrate on. [stdlib:]")
@stage_options(Prune)
@run_options
def prune(model: str, data: str | None, **given: Any) -> None:
    """Zero the weights of MODEL that a method finds least useful."""
    execute(one_stage_recipe("prune", Prune, model, given, data=data), given)
