"""An artifact: a Hugging Face directory with a manifest that says how it came to be.

On disk: the model's own files, ``recipe.yaml`` (resolved, runnable), ``compresskit.json`` (the manifest:
recipe, versions, stages with their promises and checks, SHA-256 of every file) and ``records/`` (what was
measured; durations differ from run to run, so records are not part of the digest).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compresskit.errors import Fault, ModelError, OutputError
from compresskit.progress import with_progress
from compresskit.stage import Json, Promise, promise_from_json

MANIFEST = "compresskit.json"
EXPORT = "compresskit-export.json"
"""What `compresskit export` says of itself in a directory that it wrote."""
RECIPE = "recipe.yaml"
RECORDS = "records"
STAGES = "stages"
UNHASHED = (RECORDS, STAGES)
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact directory and its manifest."""

    directory: Path
    manifest: Mapping[str, Json]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, hence of every file that it lists."""
        return sha256_of(self.directory / MANIFEST)

    def damaged(self) -> tuple[str, ...]:
        """Names of files whose bytes are not those the manifest lists; reads everything."""
        return tuple(
            name
            for name, digest in self.manifest["files"].items()
            if not (self.directory / name).is_file() or sha256_of(self.directory / name) != digest
        )


def open_artifact(directory: str | Path) -> Artifact:
    """Read the manifest of ``directory``.

    Raises:
        ModelError: it has none, or one that cannot be read.
    """
    path = Path(directory) / MANIFEST
    try:
        return Artifact(Path(directory), json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(
            Fault(
                str(path),
                "the manifest of an artifact",
                str(error),
                "Give a directory that compresskit wrote.",
            )
        ) from error


def inherited_promises(directory: Path) -> tuple[Promise, ...]:
    """What the stages that made ``directory`` promised, if compresskit made it: a new run keeps that too."""
    if not is_artifact(directory):
        return ()
    manifest = open_artifact(directory).manifest
    promised = [p for stage in manifest["stages"] for p in stage["result"]["promises"]]
    return tuple(dict.fromkeys(promise_from_json(p) for p in [*manifest.get("inherited", ()), *promised]))


def is_artifact(directory: Path) -> bool:
    """Whether ``directory`` was written by compresskit."""
    return (directory / MANIFEST).is_file()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, data: Json) -> None:
    """Write ``data`` so that a reader finds the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def seal(directory: Path, manifest: Mapping[str, Json]) -> None:
    """Add every file's SHA-256 to ``manifest`` and write it into ``directory``."""
    paths = with_progress(list(_hashed_files(directory)), "hashing", unit="files")
    files = {str(p.relative_to(directory)): sha256_of(p) for p in paths}
    write_json(directory / MANIFEST, {**manifest, "files": files})


def _hashed_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.relative_to(directory).parts[0] not in (*UNHASHED, MANIFEST):
            yield path


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless an artifact or export may be written to ``out``."""
    parent = out.absolute().parent
    if not parent.is_dir():
        is_below_a_file = any(place.is_file() for place in (parent, *parent.parents))
        cure = "Choose another place." if is_below_a_file else f"Make {parent} first."
        got = "a file" if is_below_a_file else "none"
        raise OutputError(Fault(str(out), "a parent directory", got, cure))
    if not os.access(parent, os.W_OK):
        raise OutputError(Fault(str(out), "a writable parent directory", "none", "Choose another place."))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_export = (out / EXPORT).is_file()
    if not is_artifact(out) and not is_export:
        raise OutputError(
            Fault(
                str(out),
                "a new directory, or an artifact or export to replace",
                "something that compresskit did not write",
                "Choose another output directory.",
            )
        )
    if not overwrite:
        raise OutputError(
            Fault(
                str(out),
                "a new directory",
                "an export" if is_export else "an artifact of another run",
                "Add --overwrite to replace it.",
            )
        )


def publish(partial: Path, out: Path) -> None:
    """Make the finished directory ``partial`` appear as ``out``, whole; an older ``out`` is replaced."""
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(partial.rglob("*")):
        if path.is_file():  # safetensors makes its files readable for their owner alone
            path.chmod(0o666 & ~mask)
        _sync(path)
    _sync(partial)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
