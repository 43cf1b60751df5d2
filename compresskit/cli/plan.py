"""`compresskit plan`: what a recipe will do."""

from __future__ import annotations

import json
from typing import Any

import click

from compresskit.cli._foresight import asks_machine, machine_options, show_foresight
from compresskit.cli.common import execute, plan_options, quiet_libraries
from compresskit.cli.run import recipe_with


@click.command()
@click.argument("recipe", type=click.Path(), required=False)
@click.option(
    "--schema", is_flag=True, help="Print the JSON Schema of a recipe, each method's fields included."
)
@machine_options
@plan_options
def plan(recipe: str | None, schema: bool, **given: Any) -> None:
    """Show what RECIPE, a YAML file, will do: every fault, bytes and memory. Loads no weights.

    With --gpus or --here instead: what its training stages take there in every way that is legal, memory and
    time, and which is best. Then a config.json is enough of a model.
    """
    if schema:
        quiet_libraries(verbose=given["verbose"])
        from compresskit.schema import recipe_schema

        click.echo(json.dumps(recipe_schema(), indent=1))
        return
    if recipe is None:
        raise click.UsageError("missing argument 'RECIPE'")
    if asks_machine(given):
        show_foresight(recipe_with(recipe, given), given)
        return
    execute(recipe_with(recipe, given), {**given, "dry_run": True})
