"""`compresskit demo`: the whole chain on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compresskit.recipe import Recipe

STEPS = 60
"""Of distillation."""
DOCUMENTS = 20
"""That quality is measured on."""


@click.command()
@click.option("-o", "--out", default="demo-out", show_default=True, help="Directory to write.")
@click.option("--steps", default=STEPS, show_default=True, help="Of distillation.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact of another run.")
def demo(out: str, steps: int, overwrite: bool) -> None:
    """Prune, distil and quantise the bundled model on the text of this Python's standard library."""
    from compresskit.cli.common import quiet_libraries

    quiet_libraries(verbose=False)
    from compresskit import api

    plan = api.plan(chain(steps))
    click.echo(str(plan))
    artifact = api.run(plan, out, overwrite=overwrite, measures=api.MEASURES, documents=DOCUMENTS)
    report = api.report(artifact)
    page = Path(out).absolute() / "report.html"
    page.write_text(report.html(), encoding="utf-8")
    click.echo(report.table())
    click.echo(f"artifact: {page.parent}\nreport: {page}")


def chain(steps: int, **fields: Any) -> Recipe:
    """What the demo runs: ``steps`` of distillation, with further ``fields`` of that stage."""
    import compresskit as ck
    from compresskit.assets import teacher_path

    taught = ck.Distill(
        steps=steps, batch_size=8, learning_rate=1e-3, context_length=256, precision="bf16", **fields
    )
    stages = (ck.Prune("wanda", pattern="60%", samples=32), taught, ck.Quantize("rtn", scheme="w8a16"))
    return ck.Recipe(model=str(teacher_path()), data=ck.DataSpec(source="stdlib:"), stages=stages)
