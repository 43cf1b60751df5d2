"""The door to ``datasets``: a data set of the hub, read from its memory-mapped copy on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compresskit.data.columns import find_layout
from compresskit.data.lines import bad
from compresskit.data.readers import ROWS_AT_ONCE, Document, Row, contents_of
from compresskit.data.spec import DataSpec


def _builder(name: str) -> Any:
    """The builder of ``owner/name`` or ``owner/name:configuration``; fetches only its description."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset_builder(path, configuration or None)
    except Exception as error:  # the hub client's errors have no common base class
        lines = str(error).splitlines() or [type(error).__name__]
        raise bad(
            name,
            "a file that exists, or a data set that the hub answers for",
            lines[0],
            "Check the name and the network (or the copy in the hub's cache), or name a local file.",
        ) from error


def hub_identity(name: str) -> str:
    """What changes whenever the data set does: its configuration, version and revision."""
    builder = _builder(name)
    return f"{builder.dataset_name} {builder.config.name} {builder.info.version} {builder.hash}"


def hub_columns(name: str) -> dict[str, bool]:
    """Name of each column and whether it holds text; empty where the hub does not say beforehand."""
    return _is_text(_builder(name).info.features or {})


def _is_text(features: Mapping[str, Any]) -> dict[str, bool]:
    return {key: getattr(kind, "dtype", "") in ("string", "large_string") for key, kind in features.items()}


def hub_splits(name: str) -> tuple[str, ...]:
    """The names of the data set's splits; fetches the data."""
    return tuple(_fetched(name))


def _fetched(name: str) -> Any:
    builder = _builder(name)
    try:
        builder.download_and_prepare()
        return builder.as_dataset()
    except Exception as error:  # as above
        lines = str(error).splitlines() or [type(error).__name__]
        cure = "Check the network, the free disk space and the data set's page."
        raise bad(name, "a data set that can be fetched", lines[0], cure) from error


def hub_documents(spec: DataSpec, split: str) -> Iterator[Document]:
    """The place and the content of each document of one of the data set's own splits.

    Raises:
        DataError: offline, no such data set, split or column, or a column holds something else.
    """
    yield from contents_of(_rows(spec, split))


def _rows(spec: DataSpec, split: str) -> Iterator[Row]:
    name = spec.source
    table = _fetched(name)
    if split not in table:
        cure = "Name another configuration, or a local file."
        raise bad(name, f"a split called {split}", f"splits {', '.join(table)}", cure)
    rows = table[split]
    columns = _is_text(rows.features)
    layout = find_layout(name, columns, spec)
    if layout.text and not columns[layout.text]:
        cure = "Set data.column to one that holds text."
        raise bad(name, f"text in column {layout.text!r}", str(rows.features[layout.text]), cure)
    number = 0
    for batch in rows.select_columns(layout.wanted(columns)).iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{name} row {number}", dict(zip(batch, values, strict=True)), layout
