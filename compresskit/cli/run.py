"""`compresskit run`: every stage of a recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from compresskit.cli.common import execute, launch_options, parse_set, run_options
from compresskit.recipe import Recipe, load_recipe


def recipe_with(path: str, given: dict[str, Any]) -> Recipe:
    """The recipe in ``path`` with what was typed beside it."""
    overrides = parse_set(given["settings"])
    overrides.update({k: given[k] for k in ("seed", "dtype", "device") if given[k] is not None})
    recipe = load_recipe(path, overrides)
    if given["exports"]:
        recipe = replace(recipe, export=given["exports"])
    return replace(recipe, trust_remote_code=True) if given["trust_remote_code"] else recipe


@click.command()
@click.argument("recipe", type=click.Path())
@run_options
@launch_options
@click.option("--nproc", type=click.IntRange(1), help="Processes on each machine. [the recipe's]")
def run(recipe: str, **given: Any) -> None:
    """Run every stage of RECIPE, a YAML file.

    Fields of a stage are set as --set stages[0].steps=20.
    """
    execute(recipe_with(recipe, given), given)
