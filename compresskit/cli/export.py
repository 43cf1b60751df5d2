"""`compresskit export`: a checkpoint as other runtimes load it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compresskit.exports import EXPORTS


@click.command()
@click.argument("directory")
@click.option("--to", required=True, metavar="TARGET", help=f"{', '.join(EXPORTS)}.")
@click.option("-o", "--out", required=True, metavar="DIR", help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace an export or artifact there.")
@click.option("--trust-remote-code", is_flag=True, help="Let code in DIRECTORY run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, last line.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the libraries log.")
def export(
    directory: str, to: str, out: str, overwrite: bool, trust_remote_code: bool, as_json: bool, verbose: bool
) -> None:
    """Write the model in DIRECTORY as TARGET holds it.

    DIRECTORY is a dense checkpoint, a stage's with its grids, or a finished artifact: integers and scales
    stay what they are. `dense` unpacks a quantised model, each weight keeping its value.
    """
    from compresskit.cli.common import quiet_libraries

    quiet_libraries(verbose=verbose)
    from compresskit import api

    warnings = api.export(directory, to=to, out=out, overwrite=overwrite, trust_remote_code=trust_remote_code)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    files = [path for path in Path(out).rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    click.echo(f"{to}: {out}, {len(files)} files, {total:,} bytes")
    if as_json:
        click.echo(json.dumps({"out": str(Path(out).absolute()), "bytes": total, "warnings": list(warnings)}))
