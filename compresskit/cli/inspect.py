"""`compresskit inspect`: what an artifact is and how it came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file and compare its SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on the last line.")
def inspect(directory: Path, verify: bool, as_json: bool) -> None:
    """Show what DIRECTORY, an artifact, is: its stages, promises, layers and warnings."""
    from compresskit.artifact import open_artifact
    from compresskit.errors import Fault, ModelError

    artifact = open_artifact(directory)
    manifest = artifact.manifest
    click.echo(f"{directory}: {manifest['recipe']['model']} after {len(manifest['stages'])} stages")
    for stage in manifest["stages"]:
        _echo_stage(stage)
    for warning in manifest["warnings"]:
        click.echo(f"warning: {warning}")
    click.echo("made with " + ", ".join(f"{name} {v}" for name, v in manifest["versions"].items()))
    if verify:
        if damaged := artifact.damaged():
            cure = "Make the artifact again from its recipe.yaml."
            raise ModelError(
                Fault(str(directory), "the bytes the manifest lists", f"others in {', '.join(damaged)}", cure)
            )
        click.echo(f"all {len(manifest['files'])} files are as they were written")
    if as_json:
        click.echo(json.dumps(manifest))


def _echo_stage(stage: dict[str, Any]) -> None:
    checks = ", ".join(f"{kind} {c['kept']}/{c['checked']}" for kind, c in stage["checks"].items())
    click.echo(f"\n{stage['name']}: promises kept: {checks}")
    for name, value in stage["result"]["metrics"].items():
        click.echo(f"  {name}: {value}")
    layers = stage["result"]["layers"]
    if layers:
        width = max(len(layer["name"]) for layer in layers)
        click.echo(f"  {'layer':<{width}}  zeros   bits  error")
    for layer in layers:
        error = layer["relative_error"]
        shown = "" if error is None else f"{error:.2e}"
        line = f"  {layer['name']:<{width}}  {layer['zero_fraction']:6.1%}  {layer['bits']:5.3g}  {shown}"
        click.echo(f"{line}  {layer['note']}".rstrip())
