"""Options of `compresskit plan` that name a machine, and what they print."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from compresskit.cli.common import F, quiet_libraries
from compresskit.recipe import Recipe

if TYPE_CHECKING:
    from compresskit.foresight.forecast import Foresight
    from compresskit.foresight.verify import Verified

MACHINE = ("gpus", "nodes", "gpu", "gpu_memory", "link", "efficiency", "here", "verify")


def machine_options(function: F) -> F:
    """Where a recipe's training stages would run."""
    for option in reversed(
        [
            click.option("--gpus", type=int, metavar="N", help="Predict training on N GPUs of each node."),
            click.option("--nodes", type=int, metavar="N", help="Machines. [1]"),
            click.option("--gpu", metavar="NAME", help="v100, a100, h100, h200, b200, l4, l40s ... [h100]"),
            click.option("--gpu-memory", metavar="SIZE", help="Of one GPU, such as 80GB. [the GPU's own]"),
            click.option("--link", metavar="RATE", help="Of a node to the others. [400Gbit]"),
            click.option(
                "--efficiency", type=float, metavar="X", help="Share of a GPU's peak reached. [0.4]"
            ),
            click.option("--here", is_flag=True, help="Predict training on this machine."),
            click.option("--verify", is_flag=True, help="Also run a few steps here, and compare."),
        ]
    ):
        function = option(function)
    return function


def asks_machine(given: Mapping[str, Any]) -> bool:
    """Whether any of these options was typed.

    Raises:
        UsageError: they contradict each other.
    """
    if given["here"] and any(given[name] is not None for name in MACHINE[:6]):
        raise click.UsageError("--here is this machine: leave --gpus, --nodes, --gpu and the others out")
    if given["verify"] and not given["here"]:
        raise click.UsageError("--verify needs --here: steps are run on this machine")
    if not given["here"] and given["gpus"] is None and any(given[name] is not None for name in MACHINE[:6]):
        raise click.UsageError("missing --gpus: how many GPUs has a node?")
    return given["here"] or given["gpus"] is not None


def verified(foresight: Foresight) -> Iterator[Verified]:
    """A few steps of what is recommended for each stage, where anything is."""
    from compresskit.foresight.verify import verify

    for forecast in foresight.forecasts:
        if forecast.best is not None:
            yield verify(foresight, forecast, forecast.best)


def show_foresight(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Print what the training stages will take; with --verify also what a few steps took."""
    quiet_libraries(verbose=given["verbose"])
    from compresskit import api
    from compresskit.foresight.devices import machine
    from compresskit.foresight.forecast import here
    from compresskit.foresight.table import told

    if given["here"]:
        place = here(recipe)
    else:
        place = machine(
            gpus=given["gpus"],
            nodes=1 if given["nodes"] is None else given["nodes"],
            gpu=given["gpu"] or "h100",
            memory=given["gpu_memory"],
            link=given["link"],
            efficiency=given["efficiency"],
        )
    foresight = api.foresee(recipe, place)
    tried = tuple(verified(foresight)) if given["verify"] else ()
    if given["as_json"]:
        click.echo(json.dumps({**foresight.to_json(), "verified": [one.to_json() for one in tried]}))
        return
    click.echo(told(foresight))
    for one in tried:
        click.echo(f"verified {one}")
