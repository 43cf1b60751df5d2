"""The vocabulary every stage and the pipeline share: Stage, StageContext, StageResult, Promise.

A stage reads one checkpoint directory and writes the next. Between stages a checkpoint is an
ordinary dense Hugging Face directory; a quantised layer's weights already lie on their grid and
the grids themselves stand beside them (``compresskit.formats.grid``), so a later stage of any
kind can read it, and packing happens once, at the end.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault
from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from torch import Tensor

    from compresskit.formats.grid import Grid
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.modeling.source import ModelSource

Json = Any


class Weights(Protocol):
    """Read access to one checkpoint, one tensor at a time."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The parameter called ``name`` (qualified as in the module), on the CPU."""
        ...

    def weight_OI(self, layer: str) -> Tensor:
        """The weight (O, I) of linear layer ``layer``, whichever way its class stores it."""
        ...

    def grid(self, layer: str) -> Grid | None:
        """The grid that ``layer`` was quantised onto, if it was."""
        ...


class Promise(Protocol):
    """Something a stage won that every later stage must keep; a frozen dataclass of plain data."""

    kind: ClassVar[str]

    @property
    def layer(self) -> str:
        """The layer or parameter it is about."""
        ...

    def broken(self, made: Weights, now: Weights) -> tuple[str, ...]:
        """Say what is broken, group by group; nothing when the promise is kept.

        Args:
            made: the checkpoint of the stage that made the promise.
            now: the checkpoint to check.

        Returns:
            Sentences such as ``row 3, group 17: 1 zero of 2``; at most ten, the last one counting the rest.
        """
        ...


PROMISES: Registry[Promise] = Registry(
    "promise",
    {
        "zeros": "compresskit.sparse.promise:Zeros",
        "grid": "compresskit.quant.promise:OnGrid",
        "shape": "compresskit.modeling.promise:Shape",
        "tied": "compresskit.modeling.promise:Tied",
    },
)


def promise_to_json(promise: Promise) -> dict[str, Json]:
    """``promise`` as plain data; :func:`promise_from_json` is its inverse."""
    return {"kind": promise.kind, **asdict(promise)}  # type: ignore[call-overload]


def promise_from_json(data: Mapping[str, Json]) -> Promise:
    """Rebuild a promise that :func:`promise_to_json` wrote."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    return PROMISES[data["kind"]](**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """What one stage did to one layer.

    Attributes:
        name: module name.
        zero_fraction: zeros of the weight after the stage, in [0, 1].
        bits: bits of one stored weight after the stage.
        relative_error: squared norm of the change of the layer's output, on the inputs it was calibrated on
            and without its bias, over that of the output; None where no calibration ran.
        note: anything a reader should know, e.g. ``damping raised to 0.1``.
    """

    name: str
    zero_fraction: float
    bits: float
    relative_error: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """What a stage hands back besides the checkpoint it wrote.

    Everything here is deterministic: it goes into the manifest, whose bytes are compared. Durations and
    other measurements belong in ``StageContext.scratch / "record.json"``.

    Attributes:
        promises: what every later stage must keep.
        layers: one record per layer touched.
        metrics: named figures, e.g. ``{"final_loss": 1.25, "steps": 200}``.
        warnings: full sentences; shown, and kept in manifest and report.
    """

    promises: tuple[Promise, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    metrics: Mapping[str, Json] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def result_to_json(result: StageResult) -> dict[str, Json]:
    """``result`` as plain data; :func:`result_from_json` is its inverse."""
    return {
        "promises": [promise_to_json(p) for p in result.promises],
        "layers": [asdict(layer) for layer in result.layers],
        "metrics": dict(result.metrics),
        "warnings": list(result.warnings),
    }


def result_from_json(data: Mapping[str, Json]) -> StageResult:
    """Rebuild a result that :func:`result_to_json` wrote."""
    return StageResult(
        promises=tuple(promise_from_json(p) for p in data["promises"]),
        layers=tuple(LayerRecord(**layer) for layer in data["layers"]),
        metrics=data["metrics"],
        warnings=tuple(data["warnings"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What the pipeline gives a stage.

    Attributes:
        out: an existing empty directory for the next checkpoint.
        scratch: a directory that survives a kill; training checkpoints and logs live here.
        original: the directory of the model before the first stage; the default teacher.
        data: the recipe's data, for a stage that names none.
        promises: all promises in force, in the order they were made.
        seed: of this stage.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        cache: directory of the token cache.
        trust_remote_code: whether code in model directories may run.
    """

    out: Path
    scratch: Path
    original: Path
    data: DataSpec
    promises: tuple[Promise, ...] = ()
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    cache: Path
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is known at plan time of the model a stage will be given, before that model exists.

    Attributes:
        anatomy: its blocks, linear layers and shapes.
        config: its transformers configuration.
        tokenizer: directory of its tokenizer.
        original: directory of the model before the first stage; the default teacher.
        weight_bytes: of one stored parameter that is not quantised.
        layer_bits: bits of one stored weight of each quantised layer, scales included.
        layer_schemes: of each quantised layer the scheme it has, or all of those it may get, as
            ``compresskit.quant.scheme.parse`` reads them.
        data: the recipe's data, for a stage that names none.
        device: ``cpu`` or ``cuda``.
        devices: accelerators of this machine, 0 for none.
        trust_remote_code: whether code in model directories may run.
    """

    anatomy: Anatomy
    config: Any
    tokenizer: Path
    original: Path
    weight_bytes: float
    layer_bits: Mapping[str, float] = field(default_factory=dict)
    layer_schemes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    data: DataSpec = field(default_factory=DataSpec)
    device: str = "cpu"
    devices: int = 0
    trust_remote_code: bool = False

    @classmethod
    def of(cls, source: ModelSource, *, data: DataSpec, device: str, devices: int = 0) -> Outlook:
        """What the first stage will be given: the model as it lies there.

        Args:
            source: of the recipe's model.
            data: the recipe's.
            device: ``cpu`` or ``cuda``.
            devices: accelerators of this machine, 0 for none.
        """
        return cls(
            anatomy=source.anatomy,
            config=source.config,
            tokenizer=source.directory,
            original=source.directory,
            weight_bytes=source.bytes / max(source.anatomy.num_parameters, 1),
            data=data,
            device=device,
            devices=devices,
            trust_remote_code=source.trust_remote_code,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the packed weights on disk."""
        total = self.anatomy.num_parameters * self.weight_bytes
        for name, bits in self.layer_bits.items():
            layer = self.anatomy.linears[name]
            total += layer.out_features * layer.in_features * (bits / 8 - self.weight_bytes)
        return round(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a stage will do, as far as that can be told before it runs.

    Attributes:
        after: the outlook of the next stage.
        layers: how many linear layers are touched.
        memory_bytes: estimated peak memory of one process beyond the bare interpreter with its libraries.
        scratch_bytes: of disk that it takes while it runs, besides its checkpoint and those of training.
        notes: sentences a user should read before starting, such as that zeros alone are no faster.
    """

    after: Outlook
    layers: int
    memory_bytes: int
    scratch_bytes: int = 0
    notes: tuple[str, ...] = ()


class Stage(Protocol):
    """A frozen, torch-free dataclass of what the user wants; heavy code is imported inside the verbs."""

    kind: ClassVar[str]
    trains: ClassVar[bool]

    @property
    def reshapes(self) -> bool:
        """Whether tensors change their shapes, so that earlier promises about them cannot be checked."""
        ...

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong with this stage for such a ``model``, before any weight is loaded."""
        ...

    def forecast(self, model: Outlook) -> Forecast:
        """What this stage will do to such a ``model``; called only when it has no faults."""
        ...

    def run(self, model: ModelSource, context: StageContext) -> StageResult:
        """Read ``model``, write the next checkpoint into ``context.out``."""
        ...
