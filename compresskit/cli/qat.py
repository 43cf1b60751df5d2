"""`compresskit qat`: a one-stage recipe."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, launch_options, one_stage_recipe, run_options, stage_options
from compresskit.quant.qat import Qat


@click.command()
@click.argument("model")
@click.option("--data", help="Text or dialogues to train on. [stdlib:]")
@stage_options(Qat)
@run_options
@launch_options
def qat(model: str, data: str | None, **given: Any) -> None:
    """Train MODEL while it computes as its quantised form will."""
    execute(one_stage_recipe("qat", Qat, model, given, data=data), given)
