"""Compile C at first use, once for all processes of a user.

What a library is called in the cache says everything that decides what it is: the sources, the compiler and
its version, the flags, and so the instructions of the processor.

No library is linked to an OpenMP runtime. torch brings one of its own, and a second one in the process would
keep a second set of threads, or hang. The kernels are handed the entry point of torch's instead
(``compresskit.kernels.cpu.library``).
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compresskit.errors import OutputError
from compresskit.kernels.cache import kept, key_of

HERE = Path(__file__).parent
FLAGS = ("-O2", "-ftree-vectorize", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_S = 300
TAIL_CHARACTERS = 500
PROCESS = os.getpid()
"""Where this was imported, which every layout does: a process of another number is a fork of it."""


class Unavailable(Exception):
    """Nothing can be compiled here; the message is a phrase that says why."""


def load(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library made of ``source``, compiled if need be.

    Args:
        source: name of a C file of this package.
        flags: of the compiler, besides :data:`FLAGS`.

    Raises:
        Unavailable: there is no compiler, it fails, or the cache cannot be written.
    """
    try:
        return ctypes.CDLL(str(built(source, flags)))
    except OSError as error:
        raise Unavailable(f"the system does not load it ({error})") from error


def function_of(library: ctypes.CDLL, name: str) -> Any:
    """The function ``name`` of ``library``.

    Raises:
        Unavailable: it has none, as where the flags in CC hide it.
    """
    try:
        return getattr(library, name)
    except AttributeError as error:
        raise Unavailable(f"what was compiled has no function {name}; see the flags in CC") from error


def built(source: str, flags: Sequence[str] = ()) -> Path:
    """Where the library made of ``source`` lies; compiled if it is not there whole. See :func:`load`."""
    compiler, version = find_compiler(os.environ.get("CC", ""), os.environ.get("PATH", ""))
    command = (*compiler, *FLAGS, "-Wno-psabi", *flags)
    texts = [path.read_text(encoding="ascii") for path in sorted((*HERE.glob("*.h"), HERE / source))]
    name = f"{Path(source).stem}-{key_of(source, platform.machine(), version, *command, *texts)}.so"
    try:
        return kept(name, lambda: _compile(source, command))
    except OutputError as error:
        raise Unavailable(str(error)) from error


@cache
def find_compiler(chosen: str, places: str) -> tuple[tuple[str, ...], str]:
    """The command of a C compiler and what it says of its version.

    Args:
        chosen: the command to use; empty for the first of :data:`COMPILERS`.
        places: the search path.

    Raises:
        Unavailable: there is none, or it does not run.
    """
    try:
        candidates = [shlex.split(chosen)] if chosen.strip() else [[name] for name in COMPILERS]
    except ValueError as error:
        raise Unavailable(f"the variable CC is no command ({error}): {chosen}") from error
    for command in candidates:
        if shutil.which(command[0], path=places):
            try:
                said = _run([*command, "--version"])
                said.check_returncode()
            except (OSError, subprocess.SubprocessError) as error:
                raise Unavailable(f"the C compiler does not run ({error})") from error
            return tuple(command), said.stdout
    names = " or ".join(command[0] for command in candidates)
    raise Unavailable(f"there is no C compiler, {names}; install one, or name it by the variable CC")


def _compile(source: str, command: Sequence[str]) -> bytes:
    """The library's bytes."""
    try:
        with tempfile.TemporaryDirectory(prefix="compresskit-") as scratch:
            made = Path(scratch) / "made.so"
            done = _run([*command, "-o", str(made), source, "-lm"])
            if done.returncode or not made.is_file():
                said = done.stderr[-TAIL_CHARACTERS:].strip()
                raise Unavailable(f"{command[0]} cannot compile {source}: {said}")
            return made.read_bytes()
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {TIMEOUT_S} s over {source}") from error
    except OSError as error:  # which is not one of the cache
        raise Unavailable(f"{source} cannot be compiled ({error})") from error


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``command`` in the folder of the sources; it can ask nobody, and may write in any encoding."""
    return subprocess.run(
        command,
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
