"""Compile C at first use, once for all processes of a user.

A library lies in ``COMPRESSKIT_CACHE/kernels`` under the hash of everything that decides what it is: the
sources, the compiler and its version, the flags. Beside it lies the hash of its bytes: what a full disk or a
killed process left is seen, and compiled again. A lock lets one of several processes compile.

No library is linked to an OpenMP runtime. torch brings one of its own, and a second one in the process would
keep a second set of threads, or hang. The kernels are handed the entry point of torch's instead
(``compresskit.kernels.cpu.library``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
)
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_S = 300
TAIL_CHARACTERS = 500


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
        raise Unavailable(f"{error}; set COMPRESSKIT_CACHE to a folder that can be written") from error


def built(source: str, flags: Sequence[str] = ()) -> Path:
    """Where the library made of ``source`` lies; compiled if it is not there whole. See :func:`load`."""
    compiler, version = find_compiler(os.environ.get("CC", ""), os.environ.get("PATH", ""))
    command = (*compiler, *FLAGS, *flags)
    home = Path(os.environ.get("COMPRESSKIT_CACHE", "~/.cache/compresskit")).expanduser() / "kernels"
    path = home / f"{Path(source).stem}-{_key(source, command, version)}.so"
    if _is_whole(path):
        return path
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(f"{path}.lock"):
        if _is_whole(path):  # another process was first
            return path
        if path.exists():
            warnings.warn(f"The compiled kernel {path} is damaged; it is compiled again.", stacklevel=2)
        _compile(source, command, path)
    return path


@cache
def find_compiler(chosen: str, places: str) -> tuple[tuple[str, ...], str]:
    """The command of a C compiler and what it says of its version.

    Args:
        chosen: the command to use; empty for the first of :data:`COMPILERS`.
        places: the search path.

    Raises:
        Unavailable: there is none, or it does not run.
    """
    candidates = [shlex.split(chosen)] if chosen.strip() else [[name] for name in COMPILERS]
    for command in candidates:
        if shutil.which(command[0], path=places):
            try:
                said = subprocess.run(
                    [*command, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise Unavailable(f"the C compiler does not run ({error})") from error
            return tuple(command), said.stdout
    names = " or ".join(command[0] for command in candidates)
    raise Unavailable(f"there is no C compiler, {names}; install one, or name it by the variable CC")


def _key(source: str, command: Sequence[str], version: str) -> str:
    digest = hashlib.sha256("\0".join((source, version, *command)).encode())
    for path in sorted((*HERE.glob("*.h"), HERE / source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:40]


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the library is there with every byte that was compiled."""
    try:
        return _seal(path).read_text(encoding="ascii") == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _compile(source: str, command: Sequence[str], path: Path) -> None:
    """Compile into ``path``: beside it first, and renamed when it is whole."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        done = subprocess.run(
            [*command, "-o", str(part), source, "-lm"],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode or not part.is_file():
            raise Unavailable(
                f"{command[0]} cannot compile {source}: {done.stderr[-TAIL_CHARACTERS:].strip()}"
            )
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        part.replace(path)
        part.write_text(digest, encoding="ascii")
        part.replace(_seal(path))
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took longer than {TIMEOUT_S} s over {source}") from error
    finally:
        part.unlink(missing_ok=True)
