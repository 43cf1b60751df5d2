"""One pass through a model, block by block: measure, change, and let the next block see the change.

Each block is loaded once. Its layers are measured and changed in steps (see
:mod:`compresskit.calibration.chain`), each on what the changed layers before it make, and the results of the
changed block are the next block's inputs. At any time one block, the statistics of one step and one set of
hidden states are in memory, and what later steps use, which may be in files.

Shapes: T = tokens, D = hidden size, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compresskit.calibration.activations import Activations
from compresskit.calibration.chain import Plan, Step, build_of, find_steps, whole
from compresskit.calibration.collect import Collector, Enough
from compresskit.calibration.refine import Refine, Refining
from compresskit.calibration.relay import Relay
from compresskit.calibration.replay import Replay, Replays
from compresskit.calibration.rows import Batches, Documents, Row
from compresskit.calibration.statistics import LayerStats
from compresskit.errors import DataError, Fault, InputError, StatisticError
from compresskit.modeling.anatomy import Anatomy
from compresskit.modeling.streaming import StreamedModel, return_memory
from compresskit.progress import Progress
from compresskit.registry import nearest

Visit = Callable[[str, Tensor, LayerStats], Tensor | None]
"""``visit(layer, weight_OI, stats)`` returns the new weight (O, I), None where it stays as it is; it must not
change ``weight_OI``."""

Prepare = Callable[[int, StreamedModel, Mapping[str, LayerStats]], Mapping[str, LayerStats]]
"""``prepare(index, streamed, stats)`` may change block ``index`` without changing what it computes, through
``streamed``; it returns the statistics of the same layers as they are after that."""

Run = Callable[[int, Row], Any]
"""``run(batch, row)`` runs one batch as far as it goes and returns the hidden states."""


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk found.

    Attributes:
        relative_error: for each layer visited the squared norm of the change of its output over that of its
            former output, both on the inputs its statistics are of: those that reach it when the steps
            before are changed. See ``LayerStats.relative_error``; None without data.
        num_tokens: calibration tokens, padding not counted.
        warnings: which blocks were measured in one step, and why; which components were not refined.
    """

    relative_error: Mapping[str, float | None]
    num_tokens: int
    warnings: tuple[str, ...] = ()


def walk(
    streamed: StreamedModel,
    rows: Sequence[Row] | None,
    visit: Visit,
    needs: frozenset[str] = frozenset(),
    *,
    layers: Collection[str] | None = None,
    prepare: Prepare | None = None,
    refine: Refine | None = None,
    true_sequential: bool = True,
    title: str = "Calibrating",
    spill: Path | None = None,
) -> Walked:
    """Visit linear layers in order of execution, each with statistics of its inputs.

    Args:
        streamed: the model; its changed weights go where it writes. Not closed.
        rows: each with ``input_ids`` (T,) and, if it has them, ``attention_mask`` (0 is padding),
            ``token_type_ids`` and ``position_ids``; where these start again at 0 another document begins,
            and documents never see each other. None visits without data: no statistics, no error.
        visit: see :data:`Visit`; the weight it gets is in its stored dtype on the model's device.
        needs: names of ``statistics.STATISTICS`` to collect.
        layers: names of the layers to visit; None is every linear layer inside the blocks.
        prepare: see :data:`Prepare`; called once in each block up to the last with a layer to visit, after
            the statistics of its layers were collected and before any of them is visited: the block has a
            single step. Not without data.
        refine: see :mod:`compresskit.calibration.refine`. Not without data.
        true_sequential: measure each layer on what the changed layers before it make, also within its block;
            else all layers of a block are measured before any of them is changed.
        title: of the progress bar.
        spill: a file to keep hidden states in, where rows * T values of a layer's inputs are too many for
            memory; what steps keep goes into files beside it, of longer names.

    Returns:
        The errors, layer by layer.

    Raises:
        DataError: there are no rows, or all is padding.
        InputError: ``layers`` names no linear layer of this model.
        StatisticError: a layer outside the blocks never ran on the rows.
        ModelError: weights cannot be read, or the model's blocks cannot run one by one.
    """
    linears = streamed.source.anatomy.linears
    chosen = [name for name in linears if linears[name].block] if layers is None else list(layers)
    if unknown := [name for name in chosen if name not in linears]:
        cure = f"Near names: {nearest(unknown[0], linears)}."
        raise InputError(Fault("layers", "linear layers of the model", ", ".join(unknown), cure))
    chosen_set = set(chosen)
    ordered = [name for name in linears if name in chosen_set]
    if rows is None:
        return _walk_without_data(streamed, visit, ordered, title)
    documents = Documents(rows)
    if not documents.num_tokens:
        got = "none" if not len(rows) else "padding only"
        raise DataError(Fault("calibration rows", "tokens", got, "Give more calibration data."))
    batches = list(Batches(documents))
    state = _Walk(
        streamed,
        batches,
        visit,
        needs,
        ordered,
        prepare=prepare,
        refining=None if refine is None else Refining(streamed, batches, refine, spill),
        true_sequential=true_sequential,
        spill=spill,
    )
    with closing(state):
        return Walked(state.run(title), documents.num_tokens, state.warnings)


def _walk_without_data(streamed: StreamedModel, visit: Visit, layers: Sequence[str], title: str) -> Walked:
    anatomy = streamed.source.anatomy
    with Progress(title, len(layers), unit="layers") as progress:

        def change(names: Iterable[str]) -> None:
            for name in names:
                weight = streamed.weight_OI(name)
                new = visit(name, weight, LayerStats(num_tokens=0, layer=name))
                if new is not None:
                    streamed.set_weight(name, new)
                return_memory()
                progress.advance(note=name)

        by_block = _by_block(anatomy, layers)
        with _table(streamed, anatomy.head, by_block[None]):
            change(by_block[None])
        for index, block in enumerate(streamed.blocks):
            if by_block[block]:
                with streamed.block(index):
                    change(by_block[block])
    return Walked(dict.fromkeys(layers), 0)


class _Walk:
    """The state of one walk with data."""

    def __init__(
        self,
        streamed: StreamedModel,
        batches: Sequence[Row],
        visit: Visit,
        needs: frozenset[str],
        layers: Sequence[str],
        *,
        prepare: Prepare | None,
        refining: Refining | None,
        true_sequential: bool,
        spill: Path | None,
    ) -> None:
        self.streamed, self.batches, self.visit, self.needs = streamed, batches, visit, needs
        self.prepare, self.refining = prepare, refining
        self.in_turn = true_sequential and prepare is None
        self.linears = {name: streamed.source.anatomy.linears[name] for name in layers}
        self.relay = Relay(streamed)
        self.hidden, self.replays = Activations(spill), Replays(streamed.module, spill, streamed.device)
        self.errors: dict[str, float | None] = {}
        self.plans: dict[Hashable, tuple[str, Plan]] = {}  # by build, with the block that it was made for
        self.in_one_step: dict[str, list[str]] = {}

    def close(self) -> None:
        """Remove all files."""
        self.hidden.close()
        self.replays.close()
        if self.refining is not None:
            self.refining.close()

    def run(self, title: str) -> dict[str, float | None]:
        """Walk; the errors in the order the layers have in the model."""
        blocks, anatomy = self.streamed.blocks, self.streamed.source.anatomy
        by_block = _by_block(anatomy, self.linears)
        front = self._front(by_block[None])
        back = [name for name in by_block[None] if name not in front]
        end = len(blocks) if back else max((i + 1 for i, b in enumerate(blocks) if by_block[b]), default=0)
        # What leaves the last block matters to the layers behind the blocks alone.
        onward = end if back else end - 1
        passes = [bool(names) for names in (front, back, *(by_block[b] for b in blocks[:end]))]
        count = 1 + sum(passes) + max(onward, 0)
        if self.refining is not None:
            count += self.refining.passes({block: by_block[block] for block in blocks[:end]})
        num_rows = sum(len(row["input_ids"]) for row in self.batches)
        with Progress(title, count * num_rows, unit="rows") as self.progress:
            with _table(self.streamed, anatomy.embeddings):
                self._change(whole(front), self._embed)
                self._proceed(self._embed)
            if self.refining is not None:
                self.refining.begin(self.relay, self.hidden, self.progress)
            for index in range(end):
                with self.streamed.block(index):
                    if index == 0:
                        first = {key: value[:1] for key, value in self.batches[0].items()}
                        self.relay.learn(first)
                        with _table(self.streamed, anatomy.embeddings):
                            self.relay.require_independence(first)
                        self.relay.compare(self.batches)
                    self._block(index, by_block[blocks[index]], index < onward)
            with _table(self.streamed, anatomy.head, back):
                self._change(whole(back), self._finish)
        return {name: self.errors[name] for name in self.linears}

    def _block(self, index: int, names: list[str], onward: bool) -> None:
        """Visit ``names`` of block ``index``, and run the batches on where ``onward``."""
        steps = self._steps(index, names)
        if self.refining is not None:
            self.refining.enter(index, names)
            # What is refined is another input than what a replay would have kept.
            steps = tuple(replace(step, keeps=()) for step in steps)
        prepare = None if self.prepare is None else partial(self.prepare, index, self.streamed)
        for at, step in enumerate(steps):
            is_last = not onward and at == len(steps) - 1
            run = partial(self._through, index, () if is_last else step.keeps, is_last)
            self._change(step, run, prepare, at, len(steps))
            if self.refining is not None:
                self.refining.after(step.layers)
        if onward:
            self._proceed(partial(self._through, index, (), True))
        self.replays.clear()

    def _steps(self, index: int, names: list[str]) -> tuple[Step, ...]:
        """The steps in which to visit ``names`` of block ``index``."""
        if not names:
            return () if self.prepare is None else (whole([]),)
        block, linears = self.streamed.blocks[index], self.streamed.source.anatomy.linears
        key = build_of(self.streamed.module.get_submodule(block)), tuple(n.removeprefix(block) for n in names)
        if key not in self.plans:
            longest = max(range(len(self.batches)), key=lambda n: self.batches[n]["input_ids"].shape[1])
            row = {name: value[:1] for name, value in self.batches[longest].items()}
            hidden = self.hidden[longest][:1].to(self.streamed.device)

            def probe(number: int) -> Tensor:
                return self.relay.through(index, row, hidden.flip(-1) if number else hidden)

            inside = [name for name in linears if linears[name].block == block]
            tokens = row["input_ids"].numel()
            plan = find_steps(self.streamed.module, block, inside, names, probe, tokens)
            self.plans[key] = block, plan
        former, plan = self.plans[key]
        if not self.in_turn:
            return (whole(names, once=all(step.once for step in plan.steps)),)
        if plan.reason:
            self.in_one_step.setdefault(plan.reason, []).append(block)
        return tuple(step.moved(former, block) for step in plan.steps)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each reason to measure blocks in one step, and one on what was not refined."""
        left_out = () if self.refining is None else self.refining.warnings
        return left_out + tuple(
            f"{len(blocks)} blocks, {blocks[0]} the first, were measured before any of their layers was"
            f" changed: {reason}."
            for reason, blocks in self.in_one_step.items()
        )

    def _change(
        self,
        step: Step,
        run: Run,
        prepare: Callable[[Mapping[str, LayerStats]], Mapping[str, LayerStats]] | None = None,
        at: int = 0,
        steps: int = 1,
    ) -> None:
        """Collect for the layers of ``step`` while ``run`` runs the batches, then visit them.

        It is number ``at`` of its block's ``steps``, which make up one unit of progress for each row.
        """
        stats: dict[str, LayerStats] = {}
        if step.layers:
            layers = [self.linears[name] for name in step.layers]
            module, device = self.streamed.module, self.streamed.device
            with Collector(module, layers, self.needs, device, once=step.once) as collector:
                for batch, row in enumerate(self.batches):
                    collector.begin(row["input_ids"].numel(), row.get("attention_mask"))
                    with suppress(Enough):
                        run(batch, row)
                    size = len(row["input_ids"])
                    self.progress.advance(size * (at + 1) // steps - size * at // steps)
            stats = collector.finish(step.layers)
            return_memory()
        if prepare is not None:
            stats = dict(prepare(stats))
        for name in step.layers:
            self._visit(name, stats.pop(name))

    def _visit(self, name: str, stats: LayerStats) -> None:
        linear = self.linears[name]
        if self.needs and stats.num_tokens == 0 and linear.block is None:
            got = "a layer that the model never ran"
            raise StatisticError(Fault(name, "inputs to measure", got, f"Add {name} to ignore."))
        former = self.streamed.weight_OI(name)
        new = self.visit(name, former, stats)
        self.errors[name] = None
        if new is not None:
            self.streamed.set_weight(name, new)
            self.errors[name] = stats.relative_error(former, new)
        return_memory()
        self.progress.advance(0, note=name)

    def _proceed(self, run: Run) -> None:
        """Run the batches on; what comes out enters the next block."""
        for batch, row in enumerate(self.batches):
            self.hidden[batch] = run(batch, row)
            self.progress.advance(len(row["input_ids"]))

    def _front(self, outside: list[str]) -> list[str]:
        """Of the layers ``outside`` the blocks, those that run before them (projections of embeddings)."""
        if not outside:
            return []
        streamed = self.streamed
        watched = [self.linears[name] for name in outside]
        with (
            _table(streamed, streamed.source.anatomy.embeddings),
            Collector(streamed.module, watched, frozenset(), streamed.device) as collector,
        ):
            self.relay.embed(self.batches[0])
        return [name for name in outside if name in collector.seen]

    def _embed(self, batch: int, row: Row) -> Tensor:
        return self.relay.embed(row)

    def _through(self, index: int, keeps: Sequence[Replay], is_last: bool, batch: int, row: Row) -> Tensor:
        with self.replays.during(batch, row["input_ids"].numel(), keeps, is_last=is_last):
            return self.relay.through(index, row, self.hidden[batch].to(self.streamed.device))

    def _finish(self, batch: int, row: Row) -> None:
        self.relay.finish(row, self.hidden[batch].to(self.streamed.device))


def _by_block(anatomy: Anatomy, layers: Iterable[str]) -> dict[str | None, list[str]]:
    """``layers`` by the block they are in; those outside the blocks under None."""
    found: dict[str | None, list[str]] = {block: [] for block in (None, *anatomy.blocks)}
    for name in layers:
        found[anatomy.linears[name].block].append(name)
    return found


def _table(
    streamed: StreamedModel, name: str | None, wanted: Sequence[str] = ("",)
) -> AbstractContextManager[object]:
    """Table ``name`` in memory, if there is such a table and anything is ``wanted`` of it."""
    return streamed.table(name) if name in streamed.tables and wanted else nullcontext()
