"""Which teacher a cache is of: its weights and its configuration by their bytes, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from compresskit.distill.cache.parts import checksum, file_checksum, write_whole
from compresskit.errors import OutputError
from compresskit.progress import Progress
from compresskit.training.beginning import DECISIVE

LARGE_BYTES = 1 << 32
"""From which reading all weights shows its progress."""


def fingerprint(directory: Path, memory: Path) -> str:
    """A hash of what a teacher computes with.

    Args:
        directory: of its checkpoint.
        memory: folder where checksums of files are remembered, by path, size and time of change: large
            teachers are not read again at each start.
    """
    files = sorted(path for pattern in DECISIVE for path in directory.glob(pattern))
    total = sum(path.stat().st_size for path in files)
    bar = Progress(f"Reading the teacher {directory.name}", total, unit="bytes")
    seen = bar.advance if total >= LARGE_BYTES else lambda count: None
    facts = [(path.name, _remembered(path, memory, seen)) for path in files]
    return checksum(repr(facts).encode())


def _remembered(path: Path, memory: Path, seen: object) -> str:
    state = path.stat()
    facts = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    note = memory / hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    if note.is_file() and len(found := note.read_text(encoding="ascii", errors="replace")) == 32:
        return found
    digest = file_checksum(path, seen)  # type: ignore[arg-type]
    try:
        memory.mkdir(parents=True, exist_ok=True)
        write_whole(note, digest.encode())
    except (OSError, OutputError):
        return digest  # it is only read again next time
    return digest
