"""`compresskit finetune`: a one-stage recipe."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, launch_options, one_stage_recipe, run_options, stage_options
from compresskit.distill.finetune import Finetune


@click.command()
@click.argument("model")
@click.option("--data", help="Text or dialogues to train on. [stdlib:]")
@stage_options(Finetune)
@run_options
@launch_options
def finetune(model: str, data: str | None, **given: Any) -> None:
    """Train MODEL on text with cross-entropy, keeping its zeros."""
    execute(one_stage_recipe("finetune", Finetune, model, given, data=data), given)
