"""Loads compiled kernels into the CUDA driver and starts them on torch's current stream.

``start`` is the only function that touches a GPU; ``machine`` is all that launchers ask about one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import EngineError, Fault
from compresskit.kernels.cuda.compile import architecture, cubin, missing, too_old

RESERVED_BYTES = 1024
"""Of shared memory, kept back by the driver for each block."""
Argument = Tensor | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One GPU, as far as launchers need to know it.

    Attributes:
        capability: of CUDA's compute capability, major and minor.
        multiprocessors: how many there are.
        shared_bytes: shared memory of a multiprocessor.
        block_shared_bytes: the most that one block may have of it.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    block_shared_bytes: int

    @property
    def two_blocks_bytes(self) -> int:
        """Shared memory of a block where two share a multiprocessor."""
        return min(self.block_shared_bytes, self.shared_bytes // 2 - RESERVED_BYTES)


def unavailable() -> str:
    """Why CUDA kernels cannot be had on the current GPU, as a phrase; empty where they can."""
    if not torch.cuda.is_available():
        return "no GPU that CUDA knows of"
    if torch.version.hip:
        return "the GPU is AMD's"
    return too_old(torch.cuda.get_device_capability()) or missing()


@cache
def machine(index: int) -> Machine:
    """The GPU of this number."""
    return Machine(
        capability=(
            _attribute(index, "COMPUTE_CAPABILITY_MAJOR"),
            _attribute(index, "COMPUTE_CAPABILITY_MINOR"),
        ),
        multiprocessors=_attribute(index, "MULTIPROCESSOR_COUNT"),
        shared_bytes=_attribute(index, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        block_shared_bytes=_attribute(index, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
    )


def _attribute(index: int, name: str) -> int:
    """One of the driver's numbers on the GPU ``index``."""
    from cuda.bindings import driver

    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    number: int = _driver("cuDeviceGetAttribute", attribute, _driver("cuDeviceGet", index))
    return number


def start(
    stem: str,
    defines: Mapping[str, int],
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
) -> None:
    """Start the kernel ``stem`` of ``<stem>.cu`` on the GPU of its first argument.

    Args:
        stem: name of the source, and of its kernel; or the path of the source without the suffix.
        defines: what the source wants to be told.
        grid: blocks, in two dimensions.
        threads: of a block.
        shared_bytes: of a block.
        arguments: tensors as pointers, None as a null pointer, integers as 32 bits without a sign.

    Raises:
        ValueError: tensors on several devices, or in strides: a kernel sees addresses alone.
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if len({tensor.device for tensor in tensors}) > 1 or not all(t.is_contiguous() for t in tensors):
        places = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"{stem}: contiguous tensors on one device, got tensors on {places}")
    index = tensors[0].device.index or 0
    values = tuple(_value(argument) for argument in arguments)
    types = tuple(ctypes.c_uint32 if isinstance(a, int) else ctypes.c_void_p for a in arguments)
    with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
        stream = torch.cuda.current_stream().cuda_stream
        kernel = _loaded(stem, tuple(defines.items()), index, shared_bytes)
        _driver("cuLaunchKernel", kernel, *grid, 1, threads, 1, 1, shared_bytes, stream, (values, types), 0)


def _value(argument: Argument) -> int:
    if argument is None:
        return 0
    return argument if isinstance(argument, int) else argument.data_ptr()


@cache
def _loaded(stem: str, defines: tuple[tuple[str, int], ...], index: int, shared_bytes: int) -> Any:
    """The kernel on the GPU ``index``, allowed ``shared_bytes`` of shared memory and as much as there is."""
    from cuda.bindings import driver

    kernel = _module_function(stem, defines, index)
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    allowed: int = _driver("cuFuncGetAttribute", most, kernel)
    _driver("cuFuncSetAttribute", kernel, most, max(shared_bytes, allowed))
    if shared_bytes:  # rather than cache: what is read once is not to be cached
        share = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _driver("cuFuncSetAttribute", kernel, share, 100)
    return kernel


@cache
def _module_function(stem: str, defines: tuple[tuple[str, int], ...], index: int) -> Any:
    torch.cuda.current_stream().synchronize()  # makes the context of torch the current one
    code = cubin(stem, dict(defines), architecture(machine(index).capability))
    return _driver("cuModuleGetFunction", _driver("cuModuleLoadData", code), Path(stem).name.encode())


@cache
def _function(name: str) -> tuple[Any, Any]:
    """A function of the driver, which is begun, and its word for success."""
    from cuda.bindings import driver

    driver.cuInit(0)
    return getattr(driver, name), driver.CUresult.CUDA_SUCCESS


def _driver(name: str, *arguments: Any) -> Any:
    """One function of the CUDA driver; its result without the status, which must be success."""
    function, success = _function(name)
    status, *results = function(*arguments)
    if status != success:
        cure = "Choose another implementation, or report this."
        raise EngineError(Fault(f"CUDA's {name}", "success", status.name, cure))
    return results[0] if results else None
