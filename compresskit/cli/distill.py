"""`compresskit distill`: a one-stage recipe, or two when the student is cut from the teacher."""

from __future__ import annotations

from typing import Any

import click

from compresskit.cli.common import execute, launch_options, one_stage_recipe, run_options, stage_options
from compresskit.distill.stage import Distill
from compresskit.options import choice_of
from compresskit.training.lesson import REPLICATE, SERVER
from compresskit.yaml12 import parse_yaml

CUT = "cut:"


@click.command()
@click.option("--teacher", help="Path or hub id. Needed unless it is behind a server.")
@click.option(
    "--student",
    required=True,
    help="Path or hub id; 'cut:layers=3,ffn=0.5', cut from the teacher; or a config.json, built anew.",
)
@click.option("--data", help="Text or dialogues to train on. [stdlib:]")
@stage_options(Distill, skip=("teacher",))
@run_options
@launch_options
def distill(teacher: str | None, student: str, data: str | None, **given: Any) -> None:
    """Train STUDENT to match TEACHER."""
    placement = parse_yaml(given["teacher_placement"] or REPLICATE, "--teacher-placement")[0]
    served = isinstance(placement, str | dict) and choice_of(placement).method == SERVER
    if teacher is None and (not served or student.startswith(CUT)):
        raise click.UsageError("Missing option '--teacher'.")
    given["teacher"] = teacher
    first: tuple[dict[str, Any], ...] = ()
    model, tokenizer = student, teacher if student.endswith(".json") else None
    if teacher is not None and student.startswith(CUT):
        model, first = teacher, ({"prune": {"method": "cut", **cut_options(student)}},)
    recipe = one_stage_recipe("distill", Distill, model, given, first=first, data=data, tokenizer=tokenizer)
    execute(recipe, given)


def cut_options(student: str) -> dict[str, Any]:
    """``cut:layers=3,ffn=0.5`` as the fields of the method ``cut``."""
    pairs = [pair.partition("=") for pair in student.removeprefix(CUT).split(",")]
    if not all(name and value for name, _, value in pairs):
        raise click.UsageError(f"--student {student}: expected cut:layers=3,ffn=0.5")
    return {name: parse_yaml(value, "--student")[0] for name, _, value in pairs}
