"""Where a trainer gets a cached teacher's signal; the teacher itself runs before training, if at all."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compresskit.distill.cache.build import build, size_of
from compresskit.distill.cache.choose import keep_of
from compresskit.distill.cache.fingerprint import fingerprint
from compresskit.distill.cache.keep import Keep, layer_out
from compresskit.distill.cache.parts import checksum
from compresskit.distill.cache.rows import Roll, enrolled, row_hashes
from compresskit.distill.cache.store import Store, agree, check_parts, locked, read_report
from compresskit.distill.placements.cache import HIDDEN, SAMPLED, TOP_K
from compresskit.distill.teacher import Replica
from compresskit.errors import DataError, Fault, PlanError
from compresskit.modeling import ModelSource, resolve_device
from compresskit.training.beginning import identity_of
from compresskit.training.isolation import isolation_fault, sees_across
from compresskit.training.objective import IGNORED, Head, Prepared, Signal, softcap_in
from compresskit.training.order import Rows

VERSION = 1
SPIKES = (
    "Losses against draws are higher than against the whole teacher, by as much as draws are less spread; "
    "their gradients are the same on average."
)
FOLDER = "teacher"
FILES = "files"
"""Inside ``FOLDER``: what is remembered of teachers' files."""


@dataclass(kw_only=True)
class Cached:
    """A ``TeacherProvider`` that reads what the teacher said.

    Attributes:
        directory: of the teacher's checkpoint.
        vocabulary: how many ids it shares with the student.
        trust_remote_code: whether code in the directory may run.
        keep: ``top_k``, ``sampled`` or ``hidden``.
        k: ids kept of a token, or draws of it.
        precision: of hidden states on disk, ``bf16`` or ``model``, as the teacher computes.
        temperature: of distributions.
        dir: folder of the cache; None is one of its own in the cache folder.
    """

    hidden: ClassVar[None] = None

    directory: str
    vocabulary: int
    trust_remote_code: bool = False
    keep: str = TOP_K
    k: int = 64
    precision: str = "bf16"
    temperature: float = 1.0
    dir: str | None = None
    _store: Store | None = field(default=None, init=False, repr=False)

    @property
    def identity(self) -> str:
        """See ``Known``."""
        return identity_of(self, beside=("dir",))

    def prepare(self, rows: Sequence[Rows], cache: Path, device: str) -> Prepared:
        """Open the cache of these rows; made first where it is not there, by one process of many.

        Raises:
            DataError: another cache is there, or this one is damaged.
            OutputError: there is no room for it.
            PlanError: the teacher lets documents of one row see each other.
        """
        home = cache / FOLDER
        roll = enrolled(rows)
        if not len(roll):
            raise DataError(Fault("training data", "a row with a supervised token", "none", "Give more."))
        facts = self._facts(roll, fingerprint(Path(self.directory), home / FILES))
        folder = Path(self.dir).expanduser() if self.dir else home / checksum(json.dumps(facts).encode())
        agree(folder, facts)
        report = read_report(folder)
        if report is None:
            with locked(folder):
                report = read_report(folder)
                if report is None:
                    self._build(folder, roll, resolve_device(device))
                    report = read_report(folder)
        assert report is not None
        check_parts(folder, report)
        self._store = Store(folder, report, self._keep.entry_columns)
        return Prepared(*self._told(report))

    def load(self) -> None:
        """Read the output projection, where distributions are made of hidden states."""
        _ = self._head

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """What the teacher said about a batch of ``input_ids``, ``position_ids`` and ``labels``, each (B, T).

        Raises:
            DataError: a row is not in the cache.
            ValueError: no cache is open.
        """
        if self._store is None:
            raise ValueError("a cached teacher is prepared before it is asked")
        labels_BT = inputs["labels"]
        told_B = (labels_BT[:, 1:] != IGNORED).any(-1).cpu().numpy()
        columns = self._store.read(row_hashes(inputs)[told_B])
        return Signal(self._keep.says(columns, layer_out(labels_BT), self._on(labels_BT.device)))

    @cached_property
    def _source(self) -> ModelSource:
        return ModelSource(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _keep(self) -> Keep:
        asked: dict[str, Any] = {"keep": self.keep, "k": self.k, "precision": self.precision}
        return keep_of(self._source, self.vocabulary, self.temperature, **asked)

    @cached_property
    def _head(self) -> Head | None:
        if self.keep != HIDDEN:
            return None
        source, name = self._source, self._source.anatomy.head
        weight_VE = source.tensor(f"{name}.weight").to(source.compute_dtype)
        bias = f"{name}.bias"
        bias_V = source.tensor(bias).to(source.compute_dtype) if bias in source else None
        return Head(weight_VE, bias_V, softcap_in(source.config)).cut(self.vocabulary)

    def _on(self, device: torch.device) -> Head | None:
        """The output projection there; it stays there."""
        head = self._head
        if head is not None and head.weight_VD.device != device:
            bias = None if head.bias_V is None else head.bias_V.to(device)
            head = Head(head.weight_VD.to(device), bias, head.softcap)
            self.__dict__["_head"] = head
        return head

    def _facts(self, roll: Roll, teacher: str) -> dict[str, Any]:
        """Everything that decides the contents of the cache; plain data."""
        fields: dict[str, Any] = asdict(self._keep)  # type: ignore[call-overload]
        kept = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in fields.items()}
        facts = {"version": VERSION, "teacher": teacher, "data": roll.digest, "rows": len(roll)}
        return facts | {"context_length": int(roll.width_R.max()), "keep": self.keep, **kept}

    def _build(self, folder: Path, roll: Roll, device: torch.device) -> None:
        teacher = Replica(
            directory=self.directory, vocabulary=self.vocabulary, trust_remote_code=self.trust_remote_code
        )
        if roll.is_packed and sees_across(teacher.hidden):
            raise PlanError(isolation_fault("teacher", "a model"))
        build(folder, roll, self._keep, teacher, device)
        del teacher
        gc.collect()  # its modules refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _told(self, report: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The figures of a cache, and a sentence."""
        found, size = report["faithfulness"], size_of(report)
        figures = {"keep": self.keep, "rows": report["rows"], "tokens": report["tokens"], "bytes": size}
        compared = {name: value for name, value in found.items() if name != "tokens"}
        figures |= compared | {"compared_tokens": found["tokens"]}
        said = {
            TOP_K: f"{self.k} ids of each token, {found['kept_mass']:.2%} of the teacher's probability",
            SAMPLED: f"{self.k} draws of each token, {found['entries']:.1f} different ids",
            HIDDEN: "hidden states, which tell of all ids",
        }[self.keep]
        far = f"{found['kl']:.2g} nats" if found["kl"] is not None else ""
        far = far or f"{found['total_variation']:.3f} in total variation, 0 on average over draws,"
        notes = (
            f"The teacher's cache keeps {said}: {far} a token from the teacher itself, on "
            f"{found['tokens']:,} tokens; {size / 1e6:,.1f} MB on disk, "
            f"{size / report['tokens']:,.1f} bytes a token.",
        )
        return figures, notes + ((SPIKES,) if self.keep == SAMPLED else ())
