"""`compresskit demo`: the whole chain on the bundled model."""

from __future__ import annotations

from pathlib import Path

import click

RECIPE = """\
model: {model}
data: stdlib:
stages:
  - prune: {{method: wanda, pattern: "50%", samples: 32}}
  - distill: {{loss: forward_kl, steps: {steps}, batch_size: 8, learning_rate: 0.001, context_length: 256}}
  - quantize: {{method: rtn, scheme: w8a16}}
"""


@click.command()
@click.option("-o", "--out", default="demo-out", show_default=True, help="Directory to write.")
@click.option("--steps", default=60, show_default=True, help="Of distillation.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact of another run.")
def demo(out: str, steps: int, overwrite: bool) -> None:
    """Prune, distil and quantise the bundled model on the text of this Python's standard library."""
    from compresskit import api
    from compresskit.assets import teacher_path
    from compresskit.cli.common import quiet_libraries
    from compresskit.recipe import recipe_from
    from compresskit.yaml12 import parse_yaml

    quiet_libraries(verbose=False)
    data, _ = parse_yaml(RECIPE.format(model=teacher_path(), steps=steps), "demo")
    plan = api.plan(recipe_from(data, {}))
    click.echo(str(plan))
    artifact = api.run(plan, out, overwrite=overwrite, measures=api.MEASURES, documents=20)
    report = api.report(artifact)
    page = Path(out).absolute() / "report.html"
    page.write_text(report.html(), encoding="utf-8")
    click.echo(report.table())
    click.echo(f"artifact: {page.parent}\nreport: {page}")
