"""`compresskit report`: what was gained and what it cost."""

from __future__ import annotations

from pathlib import Path

import click

from compresskit.cli.common import check_writable, quiet_libraries
from compresskit.errors import Fault, InputError

WRITERS = {".html": "html", ".md": "markdown", ".json": "json"}


@click.command()
@click.argument("directories", nargs=-1, required=True, metavar="DIR...")
@click.option("-o", "--out", default="report.html", show_default=True, help="report.html, .md or .json.")
def report(directories: tuple[str, ...], out: str) -> None:
    """Write the report of each DIR, an artifact or a file of records. Measures nothing."""
    quiet_libraries(verbose=False)
    from compresskit import api

    suffix = Path(out).suffix
    if suffix not in WRITERS:
        raise InputError(Fault(f"--out {out}", "a name ending in .html, .md or .json", suffix, "Change it."))
    check_writable(out)
    built = api.report(*directories)
    Path(out).write_text(getattr(built, WRITERS[suffix])(), encoding="utf-8")
    click.echo(built.table())
    click.echo(f"report: {Path(out).absolute()}")
