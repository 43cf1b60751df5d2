"""`compresskit quantize`: a one-stage recipe."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, one_stage_recipe, run_options, stage_options
from compresskit.quant.stage import Quantize


@click.command()
@click.argument("model")
@click.option("--data", help="Text or dialogues to calibrate on. [stdlib:]")
@stage_options(Quantize)
@run_options
def quantize(model: str, data: str | None, **given: Any) -> None:
    """Put the weights of MODEL onto a grid of few bits."""
    execute(one_stage_recipe("quantize", Quantize, model, given, data=data), given)
