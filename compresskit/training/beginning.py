"""What a run begins with, told the same wherever it is and however the run is carried out.

Samples stand for weights: models are large, and others of the same shapes differ nearly everywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, PlanError

LOOKED_AT = 1024
"""Numbers of a tensor."""
STEP = 2_654_435_761
"""A prime, so that numbers of all rows and columns are looked at."""
DECISIVE = ("*.safetensors", "config.json", "*.py")
"""Files of a checkpoint that say what its model computes."""
PIECES, PIECE_BYTES = 256, 1024
"""Of a file."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of an object without a name of its own: another one in each process."""
NAMELESS = " object at 0x"


@runtime_checkable
class Known(Protocol):
    """A ``TeacherProvider`` that can tell which teacher it has before that is loaded, if it ever is."""

    @property
    def identity(self) -> str:
        """The same for the same teacher wherever it lies, and for no other."""
        ...


def began_with(model: nn.Module, teacher: object) -> dict[str, str]:
    """The weights that are trained, and the teacher; asked before an engine divides either."""
    return {"weights": digest_of_weights(model), "teacher": words_of_teacher(teacher)}


def words_of_teacher(teacher: object) -> str:
    """Which one it is: by its own word, else by its words and a sample of the weights that it holds.

    Args:
        teacher: a ``TeacherProvider``, or None.
    """
    if isinstance(teacher, Known):
        return teacher.identity
    parts = (("itself", teacher), *_fields(teacher))
    live = {name: part for name, part in parts if isinstance(part, nn.Module | Tensor)}
    digests = {name: digest_of_weights(live[name]) for name in sorted(live)}
    return f"{ADDRESS.sub('', repr(teacher))} {digests}"


def identity_of(provider: Any, *, beside: Sequence[str] = ()) -> str:
    """Of a dataclass: its fields, but for those ``beside``, and its checkpoint wherever that lies."""
    told = {f.name: getattr(provider, f.name) for f in fields(provider) if f.repr and f.name not in beside}
    if "directory" in told:
        told["directory"] = digest_of_files(Path(told["directory"]))
    return f"{type(provider).__name__} {json.dumps(told, sort_keys=True, default=str)}"


def digest_of_weights(model: nn.Module | Tensor) -> str:
    """SHA-256 of names, shapes and a sample of values, whatever their type and device; nothing is copied."""
    digest = hashlib.sha256(type(model).__name__.encode())
    tensors = {"": model} if isinstance(model, Tensor) else model.state_dict()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(_sample(tensor.detach()).cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    """Numbers spread over ``tensor``, all of a small one."""
    count = tensor.numel()
    if count <= LOOKED_AT:
        return tensor.reshape(-1)
    places = torch.arange(LOOKED_AT, device=tensor.device) * STEP % count
    return tensor[torch.unravel_index(places, tensor.shape)]  # a flat view of it could be a copy


def digest_of_files(directory: Path) -> str:
    """SHA-256 of a checkpoint: names and sizes of its files, and a sample of their bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in DECISIVE for path in directory.glob(kind)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in _places(size):
                file.seek(place)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _places(size: int) -> Sequence[int]:
    """Where pieces of a file of so many bytes begin; together they are all of a small one."""
    if size <= PIECES * PIECE_BYTES:
        return range(0, size, PIECE_BYTES)
    return [i * (size - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES)]


def words_of(told: Mapping[str, object]) -> dict[str, str]:
    """Each in its own words; where it lies in memory does not count.

    Raises:
        PlanError: one has fields and does not tell them: another would be taken for the same.
    """
    cure = "Make it a frozen dataclass, or give it a __repr__ that tells all that it is made with."
    faults = [
        Fault(f"training: {name}", "a repr that tells its fields", ADDRESS.sub("", repr(value)), cure)
        for name, value in told.items()
        if NAMELESS in repr(value) and (type(value).__repr__ is not object.__repr__ or any(_fields(value)))
    ]
    if faults:
        raise PlanError(*faults)
    return {name: ADDRESS.sub("", repr(value)) for name, value in told.items()}


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Of an object, whether it keeps them in a dictionary or in slots."""
    slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
    yield from getattr(value, "__dict__", {}).items()
    yield from ((name, getattr(value, name)) for name in slots if hasattr(value, name))
