"""What the commands share: options made from a stage's fields, and the one way to run a recipe."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import click

from compresskit.errors import Fault, OutputError
from compresskit.exports import EXPORTS
from compresskit.fields import describe, documented, fit, is_sequence
from compresskit.recipe import Recipe, recipe_from
from compresskit.registry import spelt_out
from compresskit.training.machines import MAX_RESTARTS, machines_of, unused_machines
from compresskit.training.setting import launched_processes, this_rank
from compresskit.yaml12 import parse_yaml

if TYPE_CHECKING:
    from compresskit.artifact import Artifact

F = TypeVar("F", bound=Callable[..., Any])
RENAMED = {"processes": "--nproc", "overrides": "--override"}
HIDDEN = ("options", "data")
ALSO = f"Also as {', '.join(EXPORTS)}."
SETTING = "Any other field: a method's own, as docs/methods.md lists them, or data.KEY."
LAUNCH = ("nnodes", "node_rank", "rdzv", "nproc", "rdzv_timeout", "max_restarts")
# Imported by accelerate and transformers wherever they are installed, these warn of there being no GPU, of
# kernels built for another Python, and of kernels on a hub, which nothing here uses.
TALKATIVE = ("DeepSpeed", "torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def stage_options(cls: type[Any], *, skip: tuple[str, ...] = ()) -> Callable[[F], F]:
    """One option per field of the stage ``cls``, with the help its docstring gives and the names it takes."""

    def decorate(function: F) -> F:
        said, hints = documented(cls), get_type_hints(cls)
        for field in reversed(fields(cls)):
            if field.name not in HIDDEN + skip:
                text = spelt_out(said.get(field.name, "")).replace("``", "")
                function = _option(field, hints[field.name], text)(function)
        return function

    return decorate


def _option(field: Field[Any], hint: Any, text: str) -> Callable[[F], F]:
    flag = RENAMED.get(field.name, "--" + field.name.replace("_", "-"))
    default = None if field.default is MISSING else field.default
    shown = default if not isinstance(default, list | tuple) else " ".join(default)
    if shown not in (None, "", ()):
        text += f" [{shown}]"
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)
    many = is_sequence(hint) or any(map(is_sequence, get_args(hint)))
    return click.option(flag, field.name, default=None, multiple=many, metavar=_metavar(hint), help=text)


def _metavar(hint: Any) -> str:
    words = describe(hint)
    if words.startswith("text"):
        return "TEXT"
    if "mapping" in words and "list" in words:
        return "PATTERN=VALUE"
    if "text" in words:
        return "TEXT"
    return "N" if "whole number" in words else "X"


def plan_options(function: F) -> F:
    """The options of every command that reads a recipe: fields of it, and how results are shown."""
    for option in reversed(
        [
            click.option("--seed", metavar="N", help="Of the run. [0]"),
            click.option("--dtype", help="auto, float32, bfloat16 or float16. [auto]"),
            click.option("--device", help="auto, cpu, cuda or cuda:N. [auto]"),
            click.option("--trust-remote-code", is_flag=True, help="Let code in model directories run."),
            click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help=SETTING),
            click.option("--export", "exports", multiple=True, metavar="TARGET", help=ALSO),
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, last line."),
            click.option("-v", "--verbose", is_flag=True, help="Show what the libraries log."),
        ]
    ):
        function = option(function)
    return function


def run_options(function: F) -> F:
    """The options of every command that runs a recipe."""
    measure = "Figures of the report: size,quality,latency,memory, all or none. [size,quality]"
    for option in reversed(
        [
            click.option("-o", "--out", metavar="DIR", help="Directory to write."),
            plan_options,
            click.option("--measure", metavar="LIST", help=measure),
            click.option("--eval-documents", type=int, default=200, show_default=True, help="For quality."),
            click.option("--keep-stages", is_flag=True, help="Keep each stage's checkpoint."),
            click.option("--overwrite", is_flag=True, help="Replace an artifact of another run."),
            click.option("--dry-run", is_flag=True, help="Show the plan and do nothing else."),
        ]
    ):
        function = option(function)
    return function


def launch_options(function: F) -> F:
    """The options of every command that trains: the machines it runs on, which are no part of a recipe."""
    at_least = click.IntRange
    for option in reversed(
        [
            click.option("--nnodes", type=at_least(1), help="Machines; run the same command on each. [1]"),
            click.option("--node-rank", type=at_least(0), help="Number of this machine, from 0."),
            click.option("--rdzv", metavar="HOST:PORT", help="Where all meet: machine 0, a free port."),
            click.option("--rdzv-timeout", type=at_least(1), help="Seconds to wait for all machines. [600]"),
            click.option("--max-restarts", type=at_least(0), help="Of processes, after one is lost. [0]"),
        ]
    ):
        function = option(function)
    return function


def parse_set(pairs: tuple[str, ...]) -> dict[str, str]:
    """``("a=1", "b=x")`` as a mapping; raises UsageError for one without ``=``."""
    for pair in pairs:
        if "=" not in pair:
            raise click.UsageError(f"--set {pair}: expected KEY=VALUE")
    return dict((pair.partition("=")[0], pair.partition("=")[2]) for pair in pairs)


def one_stage_recipe(
    kind: str,
    cls: type[Any],
    model: str,
    given: Mapping[str, Any],
    *,
    first: tuple[Mapping[str, Any], ...] = (),
    **recipe_fields: Any,
) -> Recipe:
    """A recipe from what was typed.

    Args:
        kind: of the stage.
        cls: its class.
        model: path or hub id.
        given: option name -> text, as click hands it over; None was not typed.
        first: stages that make the student, as plain data.
        recipe_fields: ``data``, ``tokenizer`` ... of the recipe; None leaves the default.

    Returns:
        The recipe; its errors name the options.

    Raises:
        RecipeError: every fault together.
    """
    hints = get_type_hints(cls)
    where = f"stages[{len(first)}]"
    stage: dict[str, Any] = {}
    origins = {f"stages[{index}]": "--student" for index in range(len(first))}
    origins[where] = f"compresskit {kind.replace('_', '-')}"
    for name, text in given.items():
        if name in hints and text not in (None, ()):
            stage[name] = _typed(text, hints[name])
            origins[f"{where}.{name}"] = RENAMED.get(name, "--" + name.replace("_", "-"))
    data: dict[str, Any] = {"model": model, "stages": [*first, {kind: stage}]}
    for name, text in parse_set(given.get("settings", ())).items():
        value = parse_yaml(text, f"--set {name}")[0]
        if name.startswith("data."):
            data.setdefault("data", {})[name.removeprefix("data.")] = value
            origins[name] = f"--set {name}"
        else:
            _set_field(stage, name, value)
            origins[f"{where}.{name}"] = f"--set {name}"
    for name in ("dtype", "device", "trust_remote_code"):
        if given.get(name):
            data[name] = given[name]
            origins[name] = "--" + name.replace("_", "-")
    if given.get("exports"):
        data["export"] = list(given["exports"])
        origins["export"] = "--export"
    if given.get("seed") is not None:
        data["seed"] = parse_yaml(given["seed"], "--seed")[0]
        origins["seed"] = "--seed"
    for name, value in recipe_fields.items():
        if value is not None:
            fields_of = data.get(name, {})  # what --set data.column=... has put there already
            data[name] = {"source": value, **fields_of} if fields_of else value
            origins[name] = f"--{name}"
    return recipe_from(data, {**origins, "model": "MODEL"})


def _set_field(stage: dict[str, Any], name: str, value: Any) -> None:
    """Set ``steps``, or with ``allocation.spread`` a field of what ``allocation`` names."""
    outer, _, inner = name.partition(".")
    if not inner:
        stage[name] = value
        return
    named = stage.get(outer, {})
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    stage[outer] = {**({"method": named} if isinstance(named, str) else named), inner: value}


def _typed(text: Any, hint: Any) -> Any:
    """``text`` as it is where the field takes text, else read as a YAML scalar."""
    if isinstance(text, tuple):
        return [_typed(part, hint) for part in text]
    if not isinstance(text, str):
        return text
    if fit(text, hint)[0] and not (text.startswith("{") and fit({}, hint)[0]):
        return text
    return parse_yaml(text, "option")[0]


def execute(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Plan ``recipe``; unless ``--dry-run``, run it on all machines named, and tell what came out."""
    if given["dry_run"]:
        quiet_libraries(verbose=given["verbose"])
        from compresskit import api

        plan = api.plan(recipe)
        click.echo(json.dumps(plan.to_json()) if given["as_json"] else str(plan))
        return
    if not given["out"]:
        raise click.UsageError("missing option '-o' / '--out': the directory to write")
    typed = {name: given.get(name) for name in LAUNCH}
    processes = max((int(getattr(stage, "processes", 1)) for stage in recipe.stages), default=1)
    machines = machines_of(typed, processes, os.environ)
    if machines is not None:
        from compresskit.training.agent import run_on

        run_on(machines, sys.argv[1:], device=recipe.device)
        return
    if typed["max_restarts"]:
        os.environ[MAX_RESTARTS] = str(typed["max_restarts"])
    if note := unused_machines(os.environ):
        click.echo(f"note: {note}", err=True)
    if (launched_processes() or 1) > 1:
        from compresskit.training.worker import as_rank

        as_rank(lambda: _run(recipe, given))
        return
    _run(recipe, given)


def _run(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Plan and run ``recipe`` in this process, which may be one of several."""
    quiet_libraries(verbose=given["verbose"])
    from compresskit import api

    plan = api.plan(recipe)
    is_main = this_rank() == 0
    if is_main:
        click.echo(str(plan), err=True)
    measures = parse_measures(given["measure"], api.DEFAULT_MEASURES)
    artifact = api.run(
        plan,
        given["out"],
        overwrite=given["overwrite"],
        keep_stages=given["keep_stages"],
        measures=measures,
        documents=given["eval_documents"],
    )
    if is_main:
        _tell(artifact, given["out"], measured=bool(measures), as_json=given["as_json"])


def _tell(artifact: Artifact, out: str, *, measured: bool, as_json: bool) -> None:
    """What came out: the figures, what was promised and kept, warnings, and where it is."""
    from compresskit import api

    if measured:
        click.echo(api.report(artifact).table())
    for kind, count in artifact.manifest["stages"][-1]["checks"].items():
        click.echo(f"kept at the end: {count['kept']} of {count['checked']} promises '{kind}'")
    for warning in artifact.manifest["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"artifact: {out}   sha256 of its manifest: {artifact.digest}")
    if as_json:
        click.echo(json.dumps({"artifact": str(Path(out).absolute()), "digest": artifact.digest}))


def check_writable(path: str) -> None:
    """Raise OutputError, before any work is done, unless a file may be written at ``path``."""
    parent = Path(path).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK) or Path(path).is_dir():
        raise OutputError(
            Fault(
                f"--out {path}", "a file in a directory that can be written", "none", "Choose another place."
            )
        )


def parse_measures(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """``all``, ``none`` or names between commas."""
    from compresskit.api import MEASURES

    if text is None:
        return default
    return {"all": MEASURES, "none": ()}.get(text, tuple(text.split(",")))


def quiet_libraries(*, verbose: bool) -> None:
    """Keep third parties' progress bars and log lines out of ours unless asked for."""
    if not verbose:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import transformers

    if verbose:
        transformers.logging.set_verbosity_info()  # type: ignore[no-untyped-call]
        logging.basicConfig(level=logging.INFO)
        return
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
