"""What each engine wrote of a run, read by the names of parameters, one whole tensor at a time.

Files are mapped, not read: of a checkpoint no more than the tensor that is asked for is in memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from compresskit.errors import EngineError, Fault
from compresskit.training.carried import Carried, kind_of
from compresskit.training.mesh.parts import PART

COUNTERS = ("step", "mu_product")
"""States that are one number for a parameter, whatever its shape."""


class Source(Protocol):
    """A checkpoint of any engine."""

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The parameter or buffer of that name and whole shape, on the CPU; None if there is none."""
        ...

    def states(self, name: str, shape: torch.Size) -> dict[str, Any]:
        """The optimiser's states of the parameter of that name; empty where it has none.

        Raises:
            EngineError: nothing tells which states are of that name.
        """
        ...


def open_source(checkpoint: Path, carried: Carried, names: Sequence[str]) -> Source:
    """What ``checkpoint`` holds.

    Args:
        checkpoint: complete, of a run that single processes, DDP, FSDP, a mesh or DeepSpeed carried out.
        carried: how it was.
        names: of the parameters in the order of the optimiser that was saved, where its file has numbers.

    Raises:
        EngineError: a package that is needed to read it is missing.
    """
    kind = kind_of(carried)
    if kind == "fsdp":
        return Distributed(checkpoint)
    if kind == "deepspeed":
        return Zero(checkpoint)
    return Parts(checkpoint, names) if kind == "mesh" else Files(checkpoint, names)


class Files:
    """One process and DDP: safetensors, and the state dict of the optimiser."""

    def __init__(self, checkpoint: Path, names: Sequence[str]) -> None:
        self._files = {name: path for path in checkpoint.glob("*.safetensors") for name in _names_in(path)}
        self._states = _mapped(checkpoint / "optimizer.pt")["state"]
        self._numbers = {name: number for number, name in enumerate(names)}
        self._place = checkpoint

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """See :meth:`Source.tensor`."""
        if name not in self._files:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def states(self, name: str, shape: torch.Size) -> dict[str, Any]:
        """See :meth:`Source.states`."""
        if not self._states:
            return {}  # of an optimiser that has none
        return dict(self._states.get(_number_of(name, self._numbers, self._place), {}))


class Distributed:
    """FSDP2: torch.distributed.checkpoint, read without its process group."""

    def __init__(self, checkpoint: Path) -> None:
        self._weights, self._optimizer = (
            FileSystemReader(checkpoint / name) for name in ("pytorch_model_fsdp_0", "optimizer_0")
        )
        self._known = {
            reader: reader.read_metadata().state_dict_metadata for reader in (self._weights, self._optimizer)
        }

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """See :meth:`Source.tensor`."""
        key = f"model.{name}"
        return self._read(self._weights, [key]).get(key)

    def states(self, name: str, shape: torch.Size) -> dict[str, Any]:
        """See :meth:`Source.states`."""
        prefix = f"optimizer.state.{name}."
        keys = [key for key in self._known[self._optimizer] if key.startswith(prefix)]
        found = self._read(self._optimizer, keys)
        return {key.removeprefix(prefix): value for key, value in found.items()}

    def _read(self, reader: FileSystemReader, keys: Sequence[str]) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        for key in keys:
            kept = self._known[reader].get(key)
            if isinstance(kept, TensorStorageMetadata):
                wanted[key] = torch.empty(kept.size, dtype=kept.properties.dtype)
            elif kept is not None:
                wanted[key] = None
        if wanted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process reads alone, as it is told to
                load(wanted, storage_reader=reader, no_dist=True)
        return wanted


class Parts:
    """A mesh: a file for each part, in which shards lie within splits of layers."""

    def __init__(self, checkpoint: Path, names: Sequence[str]) -> None:
        paths = checkpoint.glob("part-*.pt")
        self._grid = {(_at("shard", p), _at("tensor", p)): _mapped(p) for p in paths}
        self._numbers = {name: number for number, name in enumerate(names)}
        self._place = checkpoint

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """See :meth:`Source.tensor`."""
        if name not in self._grid[0, 0]["model"]:
            return None
        if name not in self._numbers:  # a buffer, of which every rank has all
            whole: Tensor = self._grid[0, 0]["model"][name]
            return whole
        return self._joined({place: part["model"][name] for place, part in self._grid.items()}, shape)

    def states(self, name: str, shape: torch.Size) -> dict[str, Any]:
        """See :meth:`Source.states`."""
        number = str(_number_of(name, self._numbers, self._place))
        found = {}
        for key, (how, _, value) in self._grid[0, 0]["states"][number].items():
            found[key] = value
            if how == PART:
                parts = {place: part["states"][number][key][2] for place, part in self._grid.items()}
                found[key] = self._joined(parts, shape)
        return found

    def _joined(self, parts: Mapping[tuple[int, int], Tensor], shape: torch.Size) -> Tensor:
        """The whole of what every part has of one tensor."""
        shards, splits = (1 + max(place) for place in zip(*parts, strict=True))
        columns = []
        for split in range(splits):
            pieces = [parts[shard, split] for shard in range(shards)]
            columns.append(pieces[0] if shards == 1 else torch.cat(pieces))
        column = columns[0]
        split_at = next((i for i, size in enumerate(shape) if column.shape[i] != size), None)
        return column if split_at is None else torch.cat(columns, split_at)


class Zero:
    """DeepSpeed: flat groups of all parameters, of which each rank wrote its part."""

    def __init__(self, checkpoint: Path) -> None:
        if find_spec("deepspeed") is None:
            cure = "Install it with `pip install compresskit[deepspeed]`."
            raise EngineError(Fault(str(checkpoint), "the package deepspeed", "no such package", cure))
        folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
        models = [_mapped(p, trusted=True) for p in _in_order(folder, "*_model_states.pt")]
        ranks = [_mapped(p, trusted=True) for p in _in_order(folder, "*_optim_states.pt")]
        kept = [rank["optimizer_state_dict"] for rank in ranks]
        self._module, divided = models[0]["module"], "fp32_flat_groups" in kept[0]
        shapes = {n: torch.Size(s) for group in models[0]["param_shapes"] for n, s in group.items()}
        weights, states = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if divided
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        self._weights = [rank[weights] for rank in kept]
        self._states = [rank[states]["state"] for rank in kept]
        self._places: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in shapes}
        for rank, own in enumerate(kept):
            found = _equal_parts(shapes, self._weights[rank], len(kept)) if divided else _slices(own)
            for name, group, start, numel in found:
                self._places[name].append((rank, group, start, numel))

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """See :meth:`Source.tensor`."""
        if name not in self._places:
            kept: Tensor | None = self._module.get(name)
            return kept
        return _rejoined([(self._weights[r][g], start, n) for r, g, start, n in self._places[name]], shape)

    def states(self, name: str, shape: torch.Size) -> dict[str, Any]:
        """See :meth:`Source.states`."""
        rank, group, *_ = self._places[name][0]
        found = {}
        for key, value in self._states[rank].get(group, {}).items():
            found[key] = value
            if is_of_each(key, value):
                parts = [(self._states[r][g][key], start, n) for r, g, start, n in self._places[name]]
                found[key] = _rejoined(parts, shape)
        return found


def _number_of(name: str, numbers: Mapping[str, int], checkpoint: Path) -> int:
    """By which the optimiser saved the states of ``name``: without them it would begin anew in silence."""
    if name not in numbers:
        cure = "Go back to the strategy and processes it was written by, or choose another directory."
        got = f"{len(numbers)} other names" if numbers else "none"
        raise EngineError(Fault(str(checkpoint), f"a name {name} of states of the optimiser", got, cure))
    return numbers[name]


def is_of_each(key: str, value: Any) -> bool:
    """Whether a state of the optimiser has a number for each weight."""
    return isinstance(value, Tensor) and value.dim() > 0 and key not in COUNTERS


def _rejoined(parts: Sequence[tuple[Tensor, int, int]], shape: torch.Size) -> Tensor:
    """A whole tensor from flat ones, of each so many numbers from a place on; behind its end is padding."""
    return torch.cat([flat[start : start + n] for flat, start, n in parts])[: shape.numel()].view(shape)


def _slices(own: Mapping[str, Any]) -> Iterator[tuple[str, int, int, int]]:
    """Of ZeRO-1 and ZeRO-2, what a rank has: name, group, where it begins there, how much it is."""
    for group, mapping in enumerate(own["param_slice_mappings"]):
        for name, place in mapping.items():
            yield name, group, place.start, place.numel


def _equal_parts(
    shapes: Mapping[str, torch.Size], flats: Sequence[Tensor], ranks: int
) -> Iterator[tuple[str, int, int, int]]:
    """The same of ZeRO-3, which divides each parameter among all ranks and pads the last part."""
    group = start = 0
    for name, shape in shapes.items():
        numel = -(-shape.numel() // ranks)
        if start == flats[group].numel():
            group, start = group + 1, 0
        yield name, group, start, numel
        start += numel


def _mapped(path: Path, *, trusted: bool = False) -> Any:
    """A file of torch, its tensors mapped; ``trusted`` where classes of DeepSpeed are in it."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=not trusted)


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _at(dimension: str, path: Path) -> int:
    """Which rank of ``dimension`` wrote ``path``; 0 where there is none."""
    found = re.search(rf"{dimension}(\d+)", path.stem)
    return int(found[1]) if found else 0


def _in_order(folder: Path, pattern: str) -> list[Path]:
    """Files of ranks, by their numbers."""
    return sorted(folder.glob(pattern), key=lambda path: _at("zero_pp_rank_", path))
