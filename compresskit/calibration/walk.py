"""One pass through a model, block by block: measure, change, and let the next block see the change.

Each block is loaded once. Its rows run twice: through the block as it is, to collect what the method needs,
and through the changed block, whose results are the next block's inputs. At any time one block, its changes
and one set of hidden states are in memory.

Shapes: T = tokens, D = hidden size, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compresskit.calibration.activations import Activations
from compresskit.calibration.collect import Collector, Hooks, Shift
from compresskit.calibration.relay import Relay
from compresskit.calibration.rows import Documents, Row
from compresskit.calibration.statistics import LayerStats
from compresskit.errors import DataError, Fault, InputError, StatisticError
from compresskit.modeling.streaming import StreamedModel
from compresskit.progress import Progress
from compresskit.registry import nearest

Visit = Callable[[str, Tensor, LayerStats], Tensor]
"""``visit(layer, weight_OI, stats)`` returns the new weight (O, I); it must not change ``weight_OI``."""

Prepare = Callable[[int, StreamedModel, Mapping[str, LayerStats]], Mapping[str, LayerStats]]
"""``prepare(index, streamed, stats)`` may change block ``index`` without changing what it computes, through
``streamed``; it returns the statistics of the same layers as they are after that."""


@dataclass(frozen=True, slots=True)
class Walked:
    """What a walk found.

    Attributes:
        relative_error: for each layer visited the squared norm of the change of its output over that of its
            former output, both on the inputs that reach it in the changed model; None without data.
        num_tokens: calibration tokens, padding not counted.
    """

    relative_error: Mapping[str, float | None]
    num_tokens: int


def walk(
    streamed: StreamedModel,
    rows: Sequence[Row] | None,
    visit: Visit,
    needs: frozenset[str] = frozenset(),
    *,
    layers: Collection[str] | None = None,
    prepare: Prepare | None = None,
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
            the statistics of its layers were collected and before any of them is visited. Not without data.
        title: of the progress bar.
        spill: a file to keep hidden states in, where rows * T * D values are too many for memory.

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
    hidden = Activations(spill)
    try:
        return Walked(
            _Walk(streamed, documents, visit, needs, ordered, hidden, prepare).run(title),
            documents.num_tokens,
        )
    finally:
        hidden.close()


def _walk_without_data(streamed: StreamedModel, visit: Visit, layers: Sequence[str], title: str) -> Walked:
    anatomy = streamed.source.anatomy
    stops = [None, *streamed.blocks]
    with Progress(title, len(layers), unit="layers") as progress:
        for index, block in enumerate(stops):
            here = [name for name in layers if anatomy.linears[name].block == block]
            if not here:
                continue
            with _entered(streamed, index - 1):
                for name in here:
                    weight = streamed.weight_OI(name)
                    streamed.set_weight(name, visit(name, weight, LayerStats(num_tokens=0, layer=name)))
                    progress.advance(note=name)
    return Walked(dict.fromkeys(layers), 0)


class _Walk:
    """The state of one walk with data."""

    def __init__(
        self,
        streamed: StreamedModel,
        rows: Sequence[Row],
        visit: Visit,
        needs: frozenset[str],
        layers: Sequence[str],
        hidden: Activations,
        prepare: Prepare | None,
    ) -> None:
        self.streamed, self.rows, self.visit, self.needs = streamed, rows, visit, needs
        self.prepare = prepare
        self.linears = {name: streamed.source.anatomy.linears[name] for name in layers}
        self.relay = Relay(streamed)
        self.hidden = hidden
        self.errors: dict[str, float | None] = {}

    def run(self, title: str) -> dict[str, float | None]:
        """Walk; the errors in the order the layers have in the model."""
        blocks = self.streamed.blocks
        here = [[n for n, linear in self.linears.items() if linear.block == block] for block in blocks]
        outside = [n for n, linear in self.linears.items() if linear.block is None]
        last = len(blocks) if outside else max((i + 1 for i, names in enumerate(here) if names), default=0)
        total = len(self.rows) * (last + sum(1 for names in here[:last] if names and self.needs))
        with Progress(title, total, unit="rows") as self.progress:
            front = self._front(outside)
            self._change(front, lambda i: self._embed(i), lambda i: self._embed(i))
            for index in range(last):
                with self.streamed.block(index):
                    if index == 0:
                        self.relay.learn(self.rows[0])
                    self._block(index, here[index])
            back = [name for name in outside if name not in front]
            if back:
                self._change(back, self._finish, self._finish)
        return {name: self.errors[name] for name in self.linears}

    def _block(self, index: int, names: list[str]) -> None:
        def through(row: int) -> Tensor:
            self.progress.advance(note=self.streamed.blocks[index])
            entering = self.hidden[row].to(self.streamed.device)
            return self.relay.through(index, self.rows[row], entering)

        def onward(row: int) -> None:
            self.hidden[row] = through(row)

        self._change(names, lambda row: _drop(through(row)), onward, index)

    def _change(
        self,
        names: list[str],
        watch: Callable[[int], None],
        proceed: Callable[[int], None],
        block: int | None = None,
    ) -> None:
        """Collect for ``names`` while ``watch`` runs the rows, visit them, then ``proceed`` with the rows."""
        module, device = self.streamed.module, self.streamed.device
        stats: dict[str, LayerStats] = {name: LayerStats(num_tokens=0, layer=name) for name in names}
        if names and self.needs:
            with Collector(module, [self.linears[n] for n in names], self.needs, device) as collector:
                self._each_row(watch, collector)
            stats = collector.finish(names)
        if self.prepare is not None and block is not None:
            stats = dict(self.prepare(block, self.streamed, stats))
        deltas = {name: self._visit(name, stats.pop(name)) for name in names}
        with Shift(module, deltas) as shift:
            self._each_row(proceed, shift)
        self.errors.update(shift.relative_error())

    def _visit(self, name: str, stats: LayerStats) -> Tensor:
        """Change one layer; new minus former weight (O, I) in the dtype computed in."""
        linear = self.linears[name]
        if self.needs and stats.num_tokens == 0 and linear.block is None:
            got = "a layer that the model never ran"
            raise StatisticError(Fault(name, "inputs to measure", got, f"Add {name} to ignore."))
        former = self.streamed.weight_OI(name)
        new = self.visit(name, former, stats)
        self.streamed.set_weight(name, new)
        return (new.to(former) - former).to(self.streamed.dtype)

    def _each_row(self, run: Callable[[int], None], hooks: Hooks) -> None:
        for row in range(len(self.rows)):
            mask = self.rows[row].get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            hooks.keep_T = mask.reshape(-1).bool().to(self.streamed.device) if padded else None  # type: ignore[union-attr]
            run(row)

    def _front(self, outside: list[str]) -> list[str]:
        """Of the layers outside the blocks, those that run before them (projections of embeddings)."""
        device = self.streamed.device
        watched = [self.linears[name] for name in outside]
        with Collector(self.streamed.module, watched, frozenset(), device) as collector:
            self.relay.embed(self.rows[0])
        return [name for name in outside if name in collector.seen]

    def _embed(self, row: int) -> None:
        self.hidden[row] = self.relay.embed(self.rows[row])

    def _finish(self, row: int) -> None:
        self.relay.finish(self.rows[row], self.hidden[row].to(self.streamed.device))


def _drop(value: Tensor) -> None:
    """Run for the hooks alone."""


def _entered(streamed: StreamedModel, index: int) -> AbstractContextManager[object]:
    """Block ``index`` in memory; nothing for -1, which is what is outside the blocks."""
    return streamed.block(index) if index >= 0 else nullcontext()
