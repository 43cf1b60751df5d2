"""`compresskit qlora`: a one-stage recipe."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, launch_options, one_stage_recipe, run_options, stage_options
from compresskit.quant.qlora import Qlora


@click.command()
@click.argument("model")
@click.option("--data", help="Text or dialogues to train on. [stdlib:]")
@stage_options(Qlora)
@run_options
@launch_options
def qlora(model: str, data: str | None, **given: Any) -> None:
    """Train adapters on MODEL frozen in few bits; keep them beside it, or merge them."""
    execute(one_stage_recipe("qlora", Qlora, model, given, data=data), given)
