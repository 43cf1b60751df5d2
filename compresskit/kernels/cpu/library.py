"""The compiled kernels as Python calls them: which instructions, which types, whose threads.

Shapes: N = tokens, O = outputs, I = inputs, W = words of a row = ceil(I / 64), G = groups of scales.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import EngineError, Fault
from compresskit.kernels.cpu.build import PROCESS, Unavailable, function_of, load
from compresskit.kernels.dispatch import note
from compresskit.kernels.packed.base import SLACK_BYTES

EIGHT = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi2")
SIXTEEN = (*EIGHT, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
PATHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "portable": (),
        "avx2": EIGHT,
        "avx512": SIXTEEN,
        "avx512_vbmi2": (*SIXTEEN, "-mavx512vbmi2"),
        "avx512_bf16": (*SIXTEEN, "-mavx512vbmi2", "-mavx512bf16"),
    }
)
"""Instructions that a kernel may be compiled for, the fastest last -> flags; ``features.c`` counts them."""
CHOSEN_PATH = "COMPRESSKIT_CPU_PATH"
"""Environment variable that names one of them; for tests and comparisons."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
WORD = 64
LARGEST_BLOCK = 16
"""Tokens that the kernels take at once at most; the inputs of a block are filled up with zeros."""
LITTLE_BYTES = 1 << 16
"""Weights below this are not worth waking a thread for."""
OPS = {"bitmap_expand": "bitmap_linear", "two_four_expand": "two_four_linear"}
"""Op -> the file it is compiled from, where this is not its own name."""


class Job(ctypes.Structure):
    """As in ``job.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inputs", "outputs", "bias", "words", "values", "starts")),
        *((name, ctypes.c_void_p) for name in ("scales", "arranged")),
        *((name, ctypes.c_int64) for name in ("tokens", "outs", "ins", "words_per_row", "groups")),
        *((name, ctypes.c_int64) for name in ("input_type", "bias_type", "threads")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A packed weight, or some consecutive rows of it.

    Attributes:
        words_OW: int64, what says where values belong.
        values: all of them, of any shape; 64 bytes of their storage may be read from where a value begins.
        starts: int64 (O + 1,), or None where every row has 32 values for each word.
        scales_OG: fp32; (O, 0) where values have none.
        offset: of the first row's first value, where there are no starts.
    """

    words_OW: Tensor
    values: Tensor
    starts: Tensor | None
    scales_OG: Tensor
    offset: int = 0

    @property
    def readable_bytes(self) -> int:
        """From the first value on: those of the storage, of which ``values`` may be the beginning."""
        begin_bytes = int(self.values.storage_offset()) * self.values.itemsize
        return int(self.values.untyped_storage().nbytes()) - begin_bytes

    def with_slack(self) -> Rows:
        """The same, with values copied to where their slack is if it is that alone which is missing."""
        values, starts = self.values, self.starts
        if self.readable_bytes - values.nbytes >= SLACK_BYTES or starts is None or not len(starts):
            return self
        if len(values) != int(starts[-1]):
            return self
        return replace(self, values=pad(values, (0, SLACK_BYTES // values.itemsize)))

    def part(self, first: int, last: int) -> Rows:
        """The rows from ``first`` to before ``last``."""
        return Rows(
            words_OW=self.words_OW[first:last],
            values=self.values,
            starts=None if self.starts is None else self.starts[first : last + 1],
            scales_OG=self.scales_OG[first:last],
            offset=self.offset + first * self.words_OW.shape[1] * WORD // 2,
        )

    def job(self, **more: Any) -> Job:
        """The fields that are the weight's."""
        (outs, words), values = self.words_OW.shape, self.values
        start = values.data_ptr()
        if self.starts is None:
            start += self.offset * values.element_size()
        groups = self.scales_OG.shape[1]
        return Job(
            words=self.words_OW.data_ptr(),
            values=start,
            starts=None if self.starts is None else self.starts.data_ptr(),
            scales=self.scales_OG.data_ptr() if groups else None,
            outs=outs,
            words_per_row=words,
            groups=groups,
            threads=torch.get_num_threads() if values.nbytes > LITTLE_BYTES else 1,
            **more,
        )


def linear(op: str, inputs: Tensor, weight: Rows, bias_O: Tensor | None) -> Tensor:
    """``inputs @ weight.T + bias``, (..., O), by the kernel of ``op``; sums are taken in fp32."""
    width, outs = inputs.shape[-1], weight.words_OW.shape[0]
    _require(op, weight, width, inputs, bias_O)
    rows_NI = inputs.reshape(-1, width).contiguous()
    tokens = rows_NI.shape[0]
    out_NO = torch.empty(tokens, outs, dtype=inputs.dtype, device="cpu")
    filled = -(-tokens // LARGEST_BLOCK) * LARGEST_BLOCK
    numbers = filled * weight.words_OW.shape[1] * WORD
    arranged = torch.empty(numbers, dtype=torch.float32, device="cpu")  # whatever the user's defaults are
    bias_O = None if bias_O is None else bias_O.contiguous()
    job = weight.job(
        inputs=rows_NI.data_ptr(),
        outputs=out_NO.data_ptr(),
        bias=None if bias_O is None else bias_O.data_ptr(),
        arranged=arranged.data_ptr(),
        tokens=tokens,
        ins=width,
        input_type=TYPES[inputs.dtype],
        bias_type=0 if bias_O is None else TYPES[bias_O.dtype],
    )
    library(op, weight.values.dtype, path()).linear(ctypes.byref(job), entry_for(job.threads))
    return out_NO.view(*inputs.shape[:-1], outs)


def expand(op: str, weight: Rows, out_OI: Tensor) -> None:
    """Write the dense weight into ``out_OI``, contiguous, in its type."""
    _require(op, weight, out_OI.shape[1], out_OI, None)
    job = weight.job(outputs=out_OI.data_ptr(), ins=out_OI.shape[1], input_type=TYPES[out_OI.dtype])
    library(op, weight.values.dtype, path()).expand(ctypes.byref(job), entry_for(job.threads))


def _require(op: str, weight: Rows, width: int, numbers: Tensor, bias_O: Tensor | None) -> None:
    """Refuse what C would read or write past: it sees addresses alone.

    Args:
        op: to name.
        weight: whose parts have to agree.
        width: inputs of it.
        numbers: the inputs, or the dense weight that is written.
        bias_O: or None.

    Raises:
        ValueError: a tensor elsewhere, of another type, too short, or in strides.
    """
    words, values, starts, scales = weight.words_OW, weight.values, weight.starts, weight.scales_OG
    outs, count = words.shape
    parts = [part for part in (words, values, starts, scales) if part is not None]
    if not all(part.is_cpu for part in (*parts, numbers)) or (bias_O is not None and not bias_O.is_cpu):
        raise ValueError(f"{op}: all tensors have to be where the inputs are, on the CPU")
    if not all(part.is_contiguous() for part in parts):
        raise ValueError(f"{op}: parts of the weight are in strides")
    given = (numbers.dtype, numbers.dtype if bias_O is None else bias_O.dtype)
    if torch.int8 in given or not set(given) <= TYPES.keys() or values.dtype not in TYPES:
        raise ValueError(f"{op}: no kernel for inputs of {given[0]}, a bias of {given[1]}, {values.dtype}")
    if words.dtype != torch.int64 or scales.dtype != torch.float32 or len(scales) != outs:
        raise ValueError(f"{op}: words are {words.dtype}, scales {scales.dtype} of {tuple(scales.shape)}")
    groups = scales.shape[1]
    if -(-width // WORD) != count or (groups and width % groups):
        raise ValueError(f"{op}: {width} inputs, but {count} words of {WORD} a row and {groups} groups")
    if (groups > 0) != (values.dtype == torch.int8):
        raise ValueError(f"{op}: {groups} groups of scales beside values of {values.dtype}")
    if bias_O is not None and bias_O.shape != (outs,):
        raise ValueError(f"{op}: a bias of {tuple(bias_O.shape)} for {outs} outputs")
    last = weight.offset + outs * count * WORD // 2
    if starts is not None:
        if starts.dtype != torch.int64 or starts.shape != (outs + 1,):
            raise ValueError(f"{op}: starts are {starts.dtype} of {tuple(starts.shape)} for {outs} rows")
        last = int(starts[-1])
    if last > values.numel() or last * values.itemsize + SLACK_BYTES > weight.readable_bytes:
        raise ValueError(f"{op}: {last} values and {SLACK_BYTES} bytes after them, got {values.numel()}")


def library(op: str, values: torch.dtype, path: str) -> ctypes.CDLL:
    """The kernels of ``op`` for one type of values.

    Raises:
        Unavailable: they cannot be compiled.
    """
    found = attempt(op, values, path)
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@cache
def attempt(op: str, values: torch.dtype, path: str) -> ctypes.CDLL | str:
    """As :func:`library`, or why not: nothing is compiled again at every product."""
    name = OPS.get(op, op)
    try:
        found = load(f"{name}.c", (*PATHS[path], f"-DVALUE_TYPE={TYPES[values]}"))
        for function in (function_of(found, "linear"), function_of(found, "expand")):
            function.argtypes, function.restype = [ctypes.POINTER(Job), ctypes.c_void_p], None
    except Unavailable as error:
        return str(error)
    return found


def refusal(op: str) -> str:
    """Why ``op`` cannot run in C here; empty where it can."""
    try:
        library(op, torch.bfloat16, path())
    except Unavailable as error:
        return str(error)
    return ""


def path() -> str:
    """Which of :data:`PATHS` the kernels take: the one that ``COMPRESSKIT_CPU_PATH`` names, or the fastest.

    Raises:
        EngineError: the one named is not known, or not this processor's.
        Unavailable: nothing can be compiled.
    """
    chosen = os.environ.get(CHOSEN_PATH, "")
    if chosen and chosen not in paths():
        cure = "Take the variable away."
        raise EngineError(Fault(CHOSEN_PATH, f"one of {', '.join(paths())}", chosen, cure))
    return chosen or paths()[-1]


@cache
def paths() -> tuple[str, ...]:
    """Those of :data:`PATHS` that this processor has, the fastest last."""
    supports = function_of(load("features.c"), "supports")
    return tuple(name for number, name in enumerate(PATHS) if supports(number))


def entry_for(threads: int) -> int | None:
    """:func:`parallel` where there are several threads; a fork has none of those that it would wait for."""
    if threads == 1:
        return None
    if os.getpid() == PROCESS:
        return parallel()
    note("This process is a fork of another: the kernels in C run in one thread.")
    return None


@cache
def parallel() -> int | None:
    """The address of the entry of the OpenMP runtime that torch itself runs on; None where it has none.

    It is looked for from torch's own library on, so that it is this one whatever else the process has loaded.
    GCC's, LLVM's and Intel's runtimes all have an entry of this name.
    """
    home = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            return ctypes.cast(ctypes.CDLL(str(home / name)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    note("torch runs on no OpenMP here: the kernels in C run in one thread.")
    return None
