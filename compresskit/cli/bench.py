"""`compresskit bench`: measure checkpoints as users load them, or kernels by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compresskit.cli.common import check_writable, parse_measures, quiet_libraries


@click.command()
@click.argument("directories", nargs=-1, required=True, metavar="DIR... | kernels [RECORDS...]")
@click.option("-o", "--out", type=click.Path(), help="Write the records here as JSON.")
@click.option("--data", default="stdlib:", show_default=True, help="Text or dialogues to measure quality on.")
@click.option("--measure", metavar="LIST", help="size,quality,latency,memory or all. [all]")
@click.option("--eval-documents", type=int, default=200, show_default=True, help="For quality.")
@click.option("--run", "run_kernels", is_flag=True, help="With kernels: time them now, and keep the record.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON on the last line.")
def bench(
    directories: tuple[str, ...],
    out: str | None,
    data: str,
    measure: str | None,
    eval_documents: int,
    run_kernels: bool,
    as_json: bool,
) -> None:
    """Measure each DIR, any Hugging Face directory: size, quality, latency and memory. Or print the table of
    kernels for packed weights: of the files RECORDS, or of the project's newest."""
    quiet_libraries(verbose=False)
    if directories[0] == "kernels" and not Path("kernels").is_dir():
        from compresskit.measure.kernels import recorded, run

        click.echo(run() if run_kernels else recorded([Path(name) for name in directories[1:]]))
        return
    from compresskit import api
    from compresskit.artifact import write_json
    from compresskit.reports import build

    if out:
        check_writable(out)
    measures = parse_measures(measure, api.MEASURES)
    records = api.bench(*directories, data=data, measures=measures, documents=eval_documents)
    click.echo(build(records).table())
    plain = [record.to_json() for record in records]
    if out:
        write_json(Path(out), plain)
        click.echo(f"records: {out}")
    if as_json:
        click.echo(json.dumps(plain))
