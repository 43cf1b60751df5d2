"""Measured costs on disk: what changing one layer alone costs a model is measured once for all recipes.

One file for each model, calibration rows and kind of change, named by a hash of all that its figures depend
on, the device included: a figure that is read is the very one that would be measured. It holds layer ->
candidate -> nats per token and grows by a rename with each block that is measured, so that a run that is
killed keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor, nn

from compresskit.calibration.rows import INPUTS, Row
from compresskit.calibration.sensitivity import LOG_PROBABILITIES, MAX_TOKENS, C, Change, measure_costs
from compresskit.progress import say
from compresskit.timing import processor

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource

SOURCES = (".py", ".c", ".h", ".cu", ".cuh")
FOLDER = "costs"
DIGEST_BYTES = 20
NO_MATTER = ("_name_or_path", "transformers_version")
"""Keys of a configuration that change no figure."""
Figures = dict[str, dict[str, float]]
"""Layer -> a candidate's text -> nats per token."""


def costs_of(
    model: nn.Module,
    source: ModelSource,
    candidates: Mapping[str, Sequence[C]],
    rows: Sequence[Row],
    change: Change[C],
    *,
    cache: Path,
    scratch: Path,
) -> dict[str, dict[C, float]]:
    """What each candidate costs where only one layer is changed: read where it was measured before.

    Args:
        model: of ``source``, whole, in evaluation mode; its weights are as before when this returns.
        source: where it lies.
        candidates: layer -> what it could be changed to.
        rows: calibration rows.
        change: what the candidates are of.
        cache: folder of the user's caches.
        scratch: of the stage, whose ``record.json`` tells how many costs were measured and how many read.

    Raises:
        ModelError: the model has no logits.
    """
    store = Store(cache / FOLDER, key_of(model, source, rows, change.kind))
    texts = {layer: {change.text(layer, c): c for c in of} for layer, of in candidates.items()}
    known = store.read()
    missing = {n: [c for text, c in of.items() if text not in known.get(n, {})] for n, of in texts.items()}
    measured, total = sum(map(len, missing.values())), sum(map(len, texts.values()))
    if measured < total:
        say(f"{total - measured} of {total} costs were measured before: {store.path}")
    if measured:
        kept = store.add({})  # a folder that cannot be written is told of before hours are spent

        def keep(costs: Mapping[str, Mapping[C, float]]) -> None:
            nonlocal kept
            for layer, of in costs.items():
                known.setdefault(layer, {}).update({change.text(layer, c): cost for c, cost in of.items()})
            kept = kept and store.add(known)

        measure_costs(model, source.anatomy, missing, rows, change, keep)
    scratch.mkdir(parents=True, exist_ok=True)
    record = {"costs_measured": measured, "costs_read": total - measured}
    (scratch / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return {layer: {c: known[layer][change.text(layer, c)] for c in of} for layer, of in candidates.items()}


def key_of(model: nn.Module, source: ModelSource, rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """All that costs depend on besides layer and candidate, as plain data.

    Args:
        model: as it is measured, in memory: no weight is read again.
        source: whose code, if it brings any, counts too.
        rows: calibration rows.
        kind: of the change.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    config = {name: value for name, value in source.config.to_dict().items() if name not in NO_MATTER}
    code = sorted(source.directory.glob("*.py"))
    key = {
        "package": _package(),
        "change": kind,
        "weights": _digest(_weights(model)),
        "config": [type(model).__name__, config, getattr(model.config, "_attn_implementation", None)],
        "code": _digest(part for path in code for part in (path.name.encode(), path.read_bytes())),
        "rows": _digest(part for at in range(len(rows)) for part in _row(rows[at])),
        "read": [MAX_TOKENS, LOG_PROBABILITIES],
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": 0 if on_gpu else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "versions": [torch.__version__, torch.version.cuda if on_gpu else None, transformers.__version__],
    }
    found: dict[str, Any] = json.loads(json.dumps(key, default=str))
    return found


class Store:
    """The file of one key; several processes may fill it.

    Args:
        folder: of all such files; it need not exist.
        key: of :func:`key_of`.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.key = dict(key)
        self.path = folder / f"{_digest([_bytes(key)])}.json"

    def read(self, *, quietly: bool = False) -> Figures:
        """What was measured before; of a damaged file nothing, which is told unless ``quietly``."""
        try:
            return read_entry(self.path) if self.path.exists() else {}
        except (OSError, ValueError) as error:
            if not quietly:
                warnings.warn(f"{self.path} is damaged ({error}); costs are measured again.", stacklevel=3)
            return {}

    def add(self, figures: Mapping[str, Mapping[str, float]]) -> bool:
        """Keep ``figures`` beside what is there, on the disk when this returns.

        Returns:
            Whether they are kept; where the folder cannot be written they are not, with a warning.
        """
        try:
            self._write(figures)
        except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
            cure = "Make room, or set COMPRESSKIT_CACHE to another folder."
            warnings.warn(f"Measured costs are not kept in {self.path.parent}: {error}. {cure}", stacklevel=3)
            return False
        return True

    def _write(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.parent / ".lock"):
            every = self.read(quietly=True)
            for layer, costs in figures.items():
                every.setdefault(layer, {}).update(costs)
            body = {"key": self.key, "costs": every}
            part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
            try:
                with part.open("w", encoding="utf-8") as file:
                    json.dump({**body, "checksum": _digest([_bytes(body)])}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(self.path)
            finally:
                part.unlink(missing_ok=True)


def read_entry(path: Path) -> Figures:
    """The costs in ``path``.

    Raises:
        ValueError: it is damaged; the message says how.
        OSError: it cannot be read.
    """
    said = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(said, dict) or said.keys() != {"key", "costs", "checksum"}:
        raise ValueError("no file of costs")
    checksum = said.pop("checksum")
    if _digest([_bytes(said)]) != checksum or path.stem != _digest([_bytes(said["key"])]):
        raise ValueError("other contents than its checksum says")
    costs: Figures = said["costs"]
    return costs


@cache
def _package() -> str:
    """Digest of the code that figures come from: of all of this package, for a rounding is in ``formats``, a
    product in ``kernels``, and a list of rooms would miss the next one."""
    return _code(Path(__file__).parents[1])


def _code(place: Path) -> str:
    paths = sorted(path for path in place.rglob("*") if path.suffix in SOURCES)
    return _digest(
        part for path in paths for part in (str(path.relative_to(place)).encode(), path.read_bytes())
    )


def _weights(model: nn.Module) -> Iterator[bytes | memoryview]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from _tensor(name, tensor)


def _row(row: Row) -> Iterator[bytes | memoryview]:
    for name in INPUTS:
        if name in row:
            yield from _tensor(name, row[name])


def _tensor(name: str, tensor: Tensor) -> Iterator[bytes | memoryview]:
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _bytes(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _digest(parts: Any) -> str:
    """Of ``parts``, their order and their borders."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part)
    return digest.hexdigest()
