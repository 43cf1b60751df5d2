"""C++ that DeepSpeed has torch compile at first use, under a lock that goes when its process does.

torch's own lock is a file that means something by being there. Whoever is killed while it compiles leaves it
behind, and every process after that waits for ever, without a word.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from filelock import FileLock

OWN = "compresskit.lock"
FORGOTTEN_S = 300.0
"""torch's own lock counts as left behind when nothing beside it has been written for so long."""


@contextmanager
def compiled_despite_kills() -> Iterator[None]:
    """While it lasts ``torch.utils.cpp_extension`` compiles under a :class:`Baton`."""
    from torch.utils import cpp_extension

    with patch.object(cpp_extension, "FileBaton", Baton):
        yield


class Baton:
    """Stands for ``torch.utils.file_baton.FileBaton``; held by one living process at a time.

    Args:
        lock_file_path: torch's lock, in the folder where the extension is compiled. It is kept as well, for
            processes that know only of it; theirs are empty.
    """

    def __init__(self, lock_file_path: str, **_: Any) -> None:
        self._theirs = Path(lock_file_path)
        self._own = FileLock(self._theirs.with_name(OWN))

    def try_acquire(self) -> bool:
        """True, once nobody else compiles it; what is whole by then ninja does not compile again."""
        self._own.acquire()
        while self._in_use():
            time.sleep(0.1)
        self._theirs.write_text("compresskit")
        return True

    def _in_use(self) -> bool:
        try:
            empty = self._theirs.stat().st_size == 0
            newest = max(p.stat().st_mtime for p in self._theirs.parent.iterdir() if p.name != OWN)
        except FileNotFoundError:  # gone, or something beside it went
            return self._theirs.exists()
        return empty and time.time() - newest < FORGOTTEN_S

    def release(self) -> None:
        """Let the next one in, whichever lock it looks at."""
        self._theirs.unlink(missing_ok=True)
        self._own.release()
