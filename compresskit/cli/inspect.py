"""`compresskit inspect`: what a model or an artifact is, layer by layer, and what its zeros are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from compresskit.cli.common import quiet_libraries


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file of an artifact and compare its SHA-256.")
@click.option("--time", "timed", is_flag=True, help="Measure what leaving zeros out gains on this device.")
@click.option("--device", default="auto", show_default=True, help="To measure on: cpu, cuda or cuda:N.")
@click.option("--trust-remote-code", is_flag=True, help="Let code in DIRECTORY run.")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON on the last line.")
def inspect(directory: Path, verify: bool, as_json: bool, **given: Any) -> None:
    """Show what DIRECTORY, a model or an artifact, is: of each layer zeros, their pattern, bits, and what
    its zeros are worth; of an artifact its stages, promises and warnings too."""
    quiet_libraries(verbose=False)
    from compresskit.artifact import is_artifact, open_artifact
    from compresskit.measure.inspect import inspect_layers
    from compresskit.reports.artifact import require_whole, write_artifact
    from compresskit.reports.layers import write_layers

    manifest: dict[str, Any] = {}
    if verify or is_artifact(directory):
        artifact = open_artifact(directory)
        manifest = dict(artifact.manifest)
        click.echo(write_artifact(artifact))
        if verify:
            require_whole(artifact)
            click.echo(f"all {len(manifest['files'])} files are as they were written")
        click.echo()
    found = inspect_layers(directory, **given)
    click.echo(write_layers(found))
    if as_json:
        click.echo(json.dumps({**manifest, "inspection": found.to_json()}))
