"""CUDA sources to machine code through NVRTC: no toolkit, no GPU and no torch is needed to compile.

NVRTC comes with torch's own CUDA packages; ``cuda-bindings`` calls it. A compiled kernel is kept on disk, by
its source, its defines, NVRTC's version and the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compresskit.errors import EngineError, Fault
from compresskit.kernels.cache import content, kept, key_of

HERE = Path(__file__).parent
HEADERS = ("common.cuh", "tile.cuh")
OLDEST = (8, 0)
OWN_FEATURES = {(9, 0): "sm_90a"}
CURE = "Install compresskit[cuda], or choose another implementation."


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one kernel takes of a multiprocessor, as the assembler says.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread; other than 0 where an array is indexed at run time.
        spill_store_bytes, spill_load_bytes: of a thread, registers that did not fit.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a GPU of such compute capability, with the features that only this one has."""
    return OWN_FEATURES.get(capability, f"sm_{capability[0]}{capability[1]}")


def too_old(capability: tuple[int, int]) -> str:
    """Why no kernel runs on a GPU of such compute capability, as a phrase; empty where they do."""
    if capability >= OLDEST:
        return ""
    return f"the GPU is {architecture(capability)}, the CUDA kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"


def missing() -> str:
    """Why nothing can be compiled here, as a phrase; empty where it can."""
    try:
        version()
    except ImportError:
        return "cuda-bindings is not installed (compresskit[cuda])"
    except (EngineError, RuntimeError, OSError) as error:
        return f"NVRTC does not start: {_first_line(error)}"
    return ""


@cache
def version() -> str:
    """Of NVRTC, e.g. ``13.0``."""
    major, minor = _call("nvrtcVersion")
    return f"{major}.{minor}"


def cubin(stem: str, defines: Mapping[str, int], target: str) -> bytes:
    """Machine code of ``<stem>.cu`` for ``target``, from disk or made now.

    Args:
        stem: name of the source, or its path without the suffix.
        defines: names the source wants to be told, e.g. ``{"BF16": 1}``.
        target: of :func:`architecture`.

    Raises:
        EngineError: it cannot be compiled; the message has the compiler's words.
        OutputError: the cache cannot be written to.
    """
    key = key_of(_source(stem), *map(_source, HEADERS), *_options(defines, target), version())
    path = kept(f"{Path(stem).name}-{target}-{key}.cubin", lambda: translate(stem, defines, target)[0])
    code = content(path)
    return code if code is not None else translate(stem, defines, target)[0]


def usage(stem: str, defines: Mapping[str, int], target: str) -> dict[str, Usage]:
    """Kernel -> registers and spills, compiled anew; see :func:`cubin`."""
    return parsed_usage(translate(stem, defines, target)[1])


def parsed_usage(log: str) -> dict[str, Usage]:
    """What the assembler's words ``log`` say of each kernel."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        name, registers = re.match(r"'(\w+)'", part), re.search(r"Used (\d+) registers", part)
        if name and sizes and registers:
            stack, stores, loads = map(int, sizes.groups())
            found[name[1]] = Usage(
                registers=int(registers[1]),
                stack_bytes=stack,
                spill_store_bytes=stores,
                spill_load_bytes=loads,
            )
    return found


def translate(stem: str, defines: Mapping[str, int], target: str) -> tuple[bytes, str]:
    """Machine code and the compiler's words, past the cache; see :func:`cubin`."""
    texts, names = [[word.encode() for word in words] for words in (map(_source, HEADERS), HEADERS)]
    source = (_source(stem).encode(), f"{stem}.cu".encode())
    program = _call("nvrtcCreateProgram", *source, len(HEADERS), texts, names)
    options = [option.encode() for option in _options(defines, target)]
    try:
        _call("nvrtcCompileProgram", program, len(options), options)
    except EngineError as error:
        raise EngineError(Fault(f"{stem}.cu for {target}", "machine code", _log(program), CURE)) from error
    code = b" " * _call("nvrtcGetCUBINSize", program)
    _call("nvrtcGetCUBIN", program, code)
    log = _log(program)
    _call("nvrtcDestroyProgram", program)
    return code, log


def _options(defines: Mapping[str, int], target: str) -> list[str]:
    told = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    return [f"--gpu-architecture={target}", "--std=c++17", "--ptxas-options=-v", *told]


@cache
def _source(name: str) -> str:
    return (HERE / name).with_suffix(Path(name).suffix or ".cu").read_text()


def _log(program: Any) -> str:
    text: bytes = b" " * _call("nvrtcGetProgramLogSize", program)
    _call("nvrtcGetProgramLog", program, text)
    return text.rstrip(b"\0 ").decode(errors="replace")


def _call(name: str, *arguments: Any) -> Any:
    """One function of NVRTC; its result without the status, which must be success."""
    from cuda.bindings import nvrtc

    status, *results = getattr(nvrtc, name)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(Fault(f"NVRTC's {name}", "success", status.name, CURE))
    return results[0] if len(results) == 1 else results


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
