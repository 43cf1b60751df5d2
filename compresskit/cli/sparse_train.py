"""`compresskit sparse-train`: a one-stage recipe."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, launch_options, one_stage_recipe, run_options, stage_options
from compresskit.sparse.train import SparseTrain


@click.command()
@click.argument("model")
@click.option("--data", help="Text or dialogues to train on. [stdlib:]")
@stage_options(SparseTrain)
@run_options
@launch_options
def sparse_train(model: str, data: str | None, **given: Any) -> None:
    """Train MODEL while its weights become zero."""
    execute(one_stage_recipe("sparse_train", SparseTrain, model, given, data=data), given)
