"""`compresskit demo`: the whole chain on the bundled model."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("-o", "--out", default="demo-out", show_default=True, help="Directory to write.")
@click.option("--steps", default=60, show_default=True, help="Of distillation.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact of another run.")
def demo(out: str, steps: int, overwrite: bool) -> None:
    """Prune, distil and quantise the bundled model on the text of this Python's standard library."""
    import compresskit as ck
    from compresskit.cli.common import quiet_libraries

    quiet_libraries(verbose=False)
    from compresskit import api
    from compresskit.assets import teacher_path

    recipe = ck.Recipe(
        model=str(teacher_path()),
        data=ck.DataSpec(source="stdlib:"),
        stages=(
            ck.Prune("wanda", pattern="60%", samples=32),
            ck.Distill(steps=steps, batch_size=8, learning_rate=1e-3, context_length=256, precision="bf16"),
            ck.Quantize("rtn", scheme="w8a16"),
        ),
    )
    plan = api.plan(recipe)
    click.echo(str(plan))
    artifact = api.run(plan, out, overwrite=overwrite, measures=api.MEASURES, documents=20)
    report = api.report(artifact)
    page = Path(out).absolute() / "report.html"
    page.write_text(report.html(), encoding="utf-8")
    click.echo(report.table())
    click.echo(f"artifact: {page.parent}\nreport: {page}")
