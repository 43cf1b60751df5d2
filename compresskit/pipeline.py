"""The one loop: run each stage, check every promise made so far, publish the artifact.

Everything happens in a hidden sibling of the output directory. A finished stage is renamed into place
there, so the same command started again after a kill continues at the first unfinished stage.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from compresskit.artifact import (
    RECORDS,
    STAGES,
    Artifact,
    check_output,
    inherited_promises,
    is_artifact,
    open_artifact,
    write_json,
)
from compresskit.assembly import KEY, STATE, assemble
from compresskit.errors import Fault, OutputError, PromiseError
from compresskit.formats import export
from compresskit.formats.checkpoint import ADAPTER
from compresskit.modeling import ModelSource, open_model
from compresskit.modeling.promise import standing_promises
from compresskit.planned import Plan, PlannedStage
from compresskit.progress import with_progress
from compresskit.stage import (
    Json,
    Promise,
    StageContext,
    promise_from_json,
    result_to_json,
)
from compresskit.training.agreement import require_same, require_shared
from compresskit.training.ranks import Ranks, accompanied

SOURCE = "0-source"
LOCK = "lock"
MATTER = "matter.json"
"""The key of the work, however it is carried out; ``KEY`` is that of the plan that is at it."""
TAKEN, PUBLISHED = "place of work", "artifact"
"""What rank 0 tells the others it has."""
POLL_S = 0.2

Measure = Callable[[Mapping[str, Path]], Mapping[str, Json]]
"""Called once with every stage's name and checkpoint, as users load it; returns what to keep of each."""


def run(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    keep_stages: bool = False,
    measure: Measure | None = None,
) -> Artifact:
    """Run every stage of ``plan`` and publish the artifact.

    In a launch of several processes every one calls it, with an ``out`` that all of them see; rank 0 does
    what is not training.

    Args:
        plan: of a recipe, with no faults.
        out: directory to write; must not exist, or be an artifact when ``overwrite`` is set.
        overwrite: replace an artifact of another run.
        keep_stages: leave each stage's checkpoint in ``out/stages``.
        measure: measures all checkpoints, the model before the first stage among them, just before the
            artifact is published: side by side, so that a machine whose load drifts drifts for all of them.

    Returns:
        The artifact. If ``out`` holds that of this very plan, model and data, and ``overwrite`` is not set,
        it is returned as it is.

    Raises:
        PlanError: ranks of a launch have other recipes, models, data or packages.
        OutputError: ``out`` is not ours, the disk is too small, another process works there, or not all ranks
            see it.
        PromiseError: a stage broke what an earlier one had won, or had no effect.
        RunError: a stage had to stop; finished stages stay on disk and a restart continues.
    """
    out = Path(out).absolute()
    work = out.with_name(f".{out.name}.work")
    with accompanied() as ranks:
        key = plan.resume_key if ranks is None else _shared_key(plan, out, work, ranks, overwrite=overwrite)
        is_done = not overwrite and _is_done(key, out)
        if ranks is not None:  # rank 0 may have finished before this one looks
            is_done = bool(ranks.told("finished before", "yes" if is_done else ""))
        if is_done:
            _require_kept(out, measured=measure is not None, stages=keep_stages)
            return open_artifact(out)
        if ranks is not None and ranks.rank > 0:
            return _follow(plan, key, out, work, ranks)
        check_output(out, overwrite=overwrite)
        with _workplace(plan, key, work, out):
            if ranks is not None:
                ranks.told(TAKEN, "")
            models, states = _run_stages(plan, work)
            if measure is not None:
                _measure(models, work, measure)
            assemble(plan, models[-1], states, work, out, keep_stages)
            if ranks is not None:
                ranks.told(PUBLISHED, "")  # the others may still look at the work
    return open_artifact(out)


def _clear(work: Path) -> None:
    """Empty ``work``, the key first: what a kill leaves half removed must not be taken for finished work."""
    for name in (KEY, MATTER):
        (work / name).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _require_kept(out: Path, *, measured: bool, stages: bool) -> None:
    """Raise OutputError if the finished artifact lacks what the same run is now asked to keep beside it."""
    wanted = {"measurements": (measured, f"{RECORDS}/{SOURCE}.json"), "stages": (stages, STAGES)}
    missing = [name for name, (asked, path) in wanted.items() if asked and not (out / path).exists()]
    if missing:
        raise OutputError(
            Fault(
                str(out),
                f"a new directory, since {' and '.join(missing)} were asked for",
                f"the finished artifact of the same run without {' and '.join(missing)}",
                "Measure it with `compresskit bench`, or add --overwrite to run again.",
            )
        )


def _is_done(key: str, out: Path) -> bool:
    """Whether ``out`` is the artifact of this very plan, model and data, which have that resume key."""
    return is_artifact(out) and _key_of(out / RECORDS) == key


@contextmanager
def _workplace(plan: Plan, key: str, work: Path, out: Path) -> Iterator[None]:
    """Take ``work`` for this process alone; what another plan left there is thrown away.

    A plan that differs only in how its training is carried out is no other: it goes on with what is there.
    After an error all stays there; else it is removed, as long as no other process can have taken it.
    """
    if not work.exists():
        plan.check_disk(work)
    work.mkdir(exist_ok=True)
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(work / LOCK)):
                raise BlockingIOError("another process has ended here, and a third begun")
        except OSError as error:
            raise OutputError(
                Fault(
                    str(out),
                    "a place of its own",
                    "another compresskit process at work",
                    "Wait for it to end.",
                )
            ) from error
        plan.check_disk(work)
        if _key_of(work) != key:
            matter = plan.work_key
            if _read(work / MATTER) != matter:
                _clear(work)
            write_json(work / MATTER, matter)
            write_json(work / KEY, key)
        yield
        _clear(work)
        (work / LOCK).unlink()
    with suppress(OSError):  # no longer ours: another process may be at work there
        work.rmdir()


def _run_stages(plan: Plan, work: Path) -> tuple[list[ModelSource], list[dict[str, Json]]]:
    """Run what is not finished yet; returns every checkpoint, the source first, and what each stage did."""
    model = plan.source
    models = [model]
    made: list[tuple[Promise, ModelSource]] = [(p, model) for p in _first_promises(plan)]
    states: list[dict[str, Json]] = []
    for stage in plan.stages:
        done = work / stage.name
        if not (done / STATE).is_file():
            _run_one(stage, model, made, plan, work)
        state = _read_state(done)
        model = open_model(done, trust_remote_code=plan.recipe.trust_remote_code)
        if stage.reshapes:
            made = [(p, model) for p in standing_promises(stage.forecast.after.anatomy)]
        made += [(promise_from_json(p), model) for p in state["result"]["promises"]]
        states.append(state)
        models.append(model)
    return models, states


def _first_promises(plan: Plan) -> list[Promise]:
    """What holds before the first stage: the structure, and what the makers of the model promised."""
    return [*standing_promises(plan.source.anatomy), *inherited_promises(plan.source.directory)]


def _run_one(
    stage: PlannedStage, model: ModelSource, made: list[tuple[Promise, ModelSource]], plan: Plan, work: Path
) -> None:
    """Run one stage into a partial directory, check it, and rename it into place."""
    partial, scratch = work / f"{stage.name}.partial", work / f"{stage.name}.scratch"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    scratch.mkdir(exist_ok=True)
    context = stage_context(stage, plan, partial, scratch, tuple(p for p, _ in made))
    started = time.monotonic()
    result = stage.stage.run(model, context)
    after = open_model(partial, trust_remote_code=plan.recipe.trust_remote_code)
    _require_effect(stage, model, after)
    if stage.reshapes:
        made = [(p, after) for p in standing_promises(stage.forecast.after.anatomy)]
    checks = check_promises([*made, *((p, after) for p in result.promises)], after, stage.name)
    write_json(
        partial / STATE,
        {"name": stage.name, "kind": stage.stage.kind, "result": result_to_json(result), "checks": checks},
    )
    write_json(scratch / "seconds.json", time.monotonic() - started)
    partial.rename(work / stage.name)


def stage_context(
    stage: PlannedStage, plan: Plan, out: Path, scratch: Path, promises: tuple[Promise, ...]
) -> StageContext:
    """What ``stage`` is run with; the seed is the recipe's plus the stage's place in the chain."""
    recipe = plan.recipe
    return StageContext(
        out=out,
        scratch=scratch,
        original=plan.source.directory,
        data=recipe.data,
        promises=promises,
        seed=recipe.seed + stage.index,
        dtype=recipe.dtype,
        device=recipe.device,
        cache=plan.cache,
        trust_remote_code=recipe.trust_remote_code,
    )


def check_promises(
    made: list[tuple[Promise, ModelSource]], now: ModelSource, stage: str
) -> dict[str, dict[str, int]]:
    """Check every promise against ``now``.

    Returns:
        For each kind of promise, how many were checked and how many hold (all of them).

    Raises:
        PromiseError: any is broken; every broken layer is named, group by group.
    """
    counts: dict[str, dict[str, int]] = {}
    faults = []
    for promise, then in with_progress(made, f"checking {stage}", unit="promises"):
        broken = promise.broken(then, now)
        count = counts.setdefault(promise.kind, {"checked": 0, "kept": 0})
        count["checked"] += 1
        count["kept"] += not broken
        if broken:
            faults.append(
                Fault(
                    f"stage {stage}, {promise.layer}",
                    f"the promise '{promise.kind}' kept",
                    "; ".join(broken),
                    "This is a fault of the stage, not of the recipe: please report it.",
                )
            )
    if faults:
        raise PromiseError(*faults)
    return counts


def _require_effect(stage: PlannedStage, before: ModelSource, after: ModelSource) -> None:
    """Raise PromiseError if ``stage`` changed neither a tensor, a shape nor a grid, nor left an adapter."""
    names = before.names()
    if (after.directory / ADAPTER).is_dir():
        return
    if names != after.names() or any(before.shape(n) != after.shape(n) for n in names):
        return
    layers = before.anatomy.linears
    if any((before.grid(layer) is None) != (after.grid(layer) is None) for layer in layers):
        return
    if all(before.tensor(n).equal(after.tensor(n)) for n in names):
        raise PromiseError(
            Fault(
                f"stage {stage.name}",
                "a changed model",
                "every tensor exactly as before",
                "Drop the stage, or ask more of it (a higher sparsity, more steps, other targets).",
            )
        )


def _measure(models: list[ModelSource], work: Path, measure: Measure) -> None:
    """Measure every checkpoint, a quantised one packed, and keep the records."""
    with tempfile.TemporaryDirectory(dir=work, prefix="packed-") as place:
        checkpoints = {}
        for index, model in enumerate(models):
            name = model.directory.name if index else SOURCE
            checkpoints[name] = model.directory
            if model.is_quantised:
                checkpoints[name] = Path(place) / name
                checkpoints[name].mkdir()
                export(model, checkpoints[name])
        found = measure(checkpoints)
    (work / RECORDS).mkdir(exist_ok=True)
    for name, records in found.items():
        write_json(work / RECORDS / f"{name}.json", records)


def _read_state(stage: Path) -> dict[str, Json]:
    state: dict[str, Json] = json.loads((stage / STATE).read_text(encoding="utf-8"))
    return state


def _shared_key(plan: Plan, out: Path, work: Path, ranks: Ranks, *, overwrite: bool) -> str:
    """The resume key of all ranks, once they have agreed on the plan and see one output directory.

    Copies of one model on several machines differ in the times of their files, and with them in their keys;
    after a restart another machine may have rank 0, and goes on with what the first one began.
    """
    require_same(ranks, "plan", plan.facts)
    if ranks.rank == 0:
        check_output(out, overwrite=True)
    require_shared(ranks, out.parent, "out")

    def begun(keys: Sequence[str]) -> str:
        places = [work] if overwrite else [work, out / RECORDS]
        return next((key for key in map(_key_of, places) if key in keys), keys[0])

    return ranks.judged("resume key", plan.resume_key, begun)


def _follow(plan: Plan, key: str, out: Path, work: Path, ranks: Ranks) -> Artifact:
    """The part of a rank above 0: join the stages that train, leave all else to rank 0.

    Between the two words of rank 0 all that is in ``work`` is of this run; before, it may be of another, and
    ``out`` an older artifact of the same key.
    """
    ranks.told(TAKEN, "")
    _wait_until(lambda: _key_of(work) == key, ranks)  # some file systems show it late
    model = plan.source
    made = _first_promises(plan)
    last = max((i for i, stage in enumerate(plan.stages) if stage.trains), default=-1)
    for index, stage in enumerate(plan.stages[: last + 1]):
        state = work / stage.name / STATE
        if stage.trains and not state.is_file():
            scratch = work / f"{stage.name}.scratch"
            _wait_until(scratch.exists, ranks)
            partial = work / f"{stage.name}.partial"
            stage.stage.run(model, stage_context(stage, plan, partial, scratch, tuple(made)))
        if index < last:
            _wait_until(state.is_file, ranks)
            model = open_model(state.parent, trust_remote_code=plan.recipe.trust_remote_code)
            made += [promise_from_json(p) for p in _read_state(state.parent)["result"]["promises"]]
    ranks.told(PUBLISHED, "")
    _wait_until(lambda: _is_done(key, out), ranks)
    return open_artifact(out)


def _key_of(directory: Path) -> Json:
    """The resume key that a place of work, or an artifact's records, were made with; None without one."""
    return _read(directory / KEY)


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None


def _wait_until(is_so: Callable[[], bool], ranks: Ranks) -> None:
    """Wait for rank 0; raise WorkerError when it, or another one, has failed or is lost."""
    while not is_so():
        ranks.check()
        time.sleep(POLL_S)
