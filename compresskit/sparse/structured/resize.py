"""What to change in a configuration so that its model has other blocks; widths are found in ``keys``.

Which key that is, is found by trying: a key is the right one if the model it makes has so many blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.skeleton import skeleton_of

Changes = dict[str, Any]


def resized(config: Any, changes: Mapping[str, Any]) -> Any:
    """A new configuration of the same class with ``changes``; ``config`` stays as it is."""
    data = config.to_dict()
    aliases = {v: k for k, v in getattr(config, "attribute_map", {}).items()}
    for key, value in changes.items():
        data[key] = value
        data.pop(aliases.get(key, ""), None)
    return type(config).from_dict(data)


def with_blocks(
    config: Any, anatomy: Anatomy, directory: Path, keep: Sequence[int], *, trust_remote_code: bool = False
) -> Changes:
    """The changes that leave only the blocks ``keep`` of a model.

    Args:
        config: of the model.
        anatomy: of the model.
        directory: of the model, for errors and code of its own.
        keep: indices of blocks, ascending.
        trust_remote_code: whether that code may run.

    Returns:
        The number of blocks, and each list with one entry per block cut to those kept.

    Raises:
        ModelError: no key of the configuration sets the number of blocks.
    """
    data, count = config.to_dict(), len(anatomy.blocks)
    lists = {
        key: [value[i] for i in keep]
        for key, value in data.items()
        if isinstance(value, list | tuple) and len(value) == count and not _is_no_list_of_blocks(key)
    }

    def fits(after: Anatomy) -> bool:
        return len(after.blocks) == len(keep)

    keys = [k for k, v in data.items() if is_int(v) and v == count]
    depth = _search(config, keys, len(keep), lists, directory, fits, trust_remote_code)
    if depth is None:
        cure = "Cut another model."
        raise ModelError(Fault(f"{directory}: config.json", "a key for the number of blocks", "none", cure))
    return {**lists, depth: len(keep)}


def _search(
    config: Any,
    keys: Iterable[str],
    value: int,
    besides: Changes,
    directory: Path,
    fits: Callable[[Anatomy], bool],
    trust: bool,
) -> str | None:
    for key in keys:
        try:
            changed = resized(config, {**besides, key: value})
            after = anatomy_of(skeleton_of(changed, directory, trust_remote_code=trust))
        except Exception:
            continue
        if fits(after):
            return key
    return None


def _is_no_list_of_blocks(key: str) -> bool:
    """Lists that may happen to be as long as there are blocks."""
    return key == "architectures" or "token" in key


def is_int(value: Any) -> bool:
    """Whether ``value`` is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
