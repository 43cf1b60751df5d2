"""The kernels in C, compiled for every kind of instructions that this processor has, against the reference.

Their exactness for every type and shape, by the fastest of them, is the layouts' own test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compresskit.errors import EngineError
from compresskit.kernels import dispatch
from compresskit.kernels.bitmap import VALUE_TYPES
from compresskit.kernels.cpu import library
from compresskit.kernels.cpu.build import Unavailable
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.rules import INPUT_TYPES
from tests.kernels.packed_cases import draw, exact, inputs_of, tolerance, weight

CPU = torch.device("cpu")
SHAPES = [(1, 1), (5, 13), (33, 200), (7, 1090)]
TOKENS = (0, 1, 2, 3, 7, 17, 65)
OPS = ("bitmap", "two_four")


def paths() -> tuple[str, ...]:
    try:
        return library.paths()
    except Unavailable:
        return ()


KERNELS = [("bitmap", dtype, path) for dtype in VALUE_TYPES for path in paths()]
KERNELS += [("two_four", torch.bfloat16, path) for path in paths()]
KERNELS += [("two_four", dtype, path) for dtype in VALUE_TYPES[:1] for path in paths()[-1:]]
"""How masks are read is the one thing in which the layouts differ."""

pytestmark = pytest.mark.skipif(not paths(), reason="no C compiler here")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is made empty is full of NaN."""
    empty = torch.empty

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        made: torch.Tensor = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", full)


def functions(name: str) -> tuple[Any, Any, Any]:
    """The kernels in C that multiply and expand, and the layout."""
    from importlib import import_module

    made = [
        getattr(import_module(f"compresskit.kernels.cpu.{name}_{op}"), f"{name}_{op}")
        for op in ("linear", "expand")
    ]
    return made[0], made[1], LAYOUTS[name]()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "dtype", "path"), KERNELS, ids=str)
def test_every_path_multiplies_exactly_up_to_rounding(
    name: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.CHOSEN_PATH, path)
    linear, _, layout = functions(name)
    for shape in SHAPES:
        packed = weight(shape, dtype, "2:4")
        tensors = layout.pack(packed, CPU)
        for dtype_in in INPUT_TYPES:
            bias = draw((shape[0],), 5).to(torch.float32 if shape[0] % 2 else dtype_in)
            for tokens in TOKENS:
                x, *alike = inputs_of(tokens, shape[1], dtype_in)
                got = linear(x, *tensors, bias)
                assert got.dtype == dtype_in
                error = (got.double() - exact(x, packed, bias)).abs()
                assert bool((error <= tolerance(x, packed, bias)).all()), (shape, dtype_in, tokens)
                for same in alike if tokens <= 64 else ():  # above it is torch that multiplies
                    assert torch.equal(linear(same, *tensors, bias), got.view(*same.shape[:-1], shape[0]))


@pytest.mark.parametrize("path", paths())
def test_every_path_scales_groups_of_any_width(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.CHOSEN_PATH, path)
    linear, expand, layout = functions("bitmap")
    for width, groups in ((256, 2), (1920, 3), (130, 13), (60, 5), (64, 64)):
        packed = weight((9, width), torch.int8, "2:4", groups)
        tensors = layout.pack(packed, CPU)
        for tokens in (1, 5, 65):
            x = draw((tokens, width), 4)
            error = (linear(x, *tensors, None).double() - exact(x, packed, None)).abs()
            assert bool((error <= tolerance(x, packed, None)).all()), (width, groups, tokens)
        reference = dispatch.reference("bitmap_expand")
        assert torch.equal(expand(*tensors, width, torch.float32), reference(*tensors, width, torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "dtype", "path"), KERNELS, ids=str)
def test_every_path_expands_to_the_bit(
    name: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.CHOSEN_PATH, path)
    _, expand, layout = functions(name)
    for shape in SHAPES:
        tensors = layout.pack(weight(shape, dtype, "2:4"), CPU)
        for out in INPUT_TYPES:
            expected = dispatch.reference(f"{name}_expand")(*tensors, shape[1], out)
            assert torch.equal(expand(*tensors, shape[1], out), expected), (shape, out)


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_every_size_are_read_and_rounded_right(
    dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of two bytes by a weight of one number; 1.5 makes halves to round."""
    monkeypatch.setenv(library.CHOSEN_PATH, path)
    linear, _, layout = functions("bitmap")
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for factor in (1.0, 1 / 3, 1.5):
        tensors = layout.pack(weight_of(torch.tensor([[factor]])), CPU)
        for first in range(0, len(every), 1 << 14):
            x = every[first : first + (1 << 14), None]
            wide = x.float() * torch.tensor(factor)
            for got, expected in (
                (linear(x, *tensors, None), wide.to(dtype)),
                (linear(x.float(), *tensors, None), wide),
            ):
                assert torch.equal(got.isnan(), expected.isnan())
                assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0))


def weight_of(dense: torch.Tensor) -> Any:
    from compresskit.kernels.bitmap import pack

    return pack(dense)


@pytest.mark.parametrize("name", OPS)
def test_threads_change_no_bit(name: str) -> None:
    linear, expand, layout = functions(name)
    before = torch.get_num_threads()
    try:
        for dtype in (torch.bfloat16, torch.int8):
            tensors = layout.pack(weight((700, 640), dtype, "2:4"), CPU)
            found = []
            for threads in (1, 2, 3, 3):
                torch.set_num_threads(threads)
                found.append([linear(draw((n, 640), 4).bfloat16(), *tensors, None) for n in (1, 9, 40)])
                found[-1].append(expand(*tensors, 640, torch.float32))
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_threads_leave_no_row_out_where_few_rows_have_all_the_values() -> None:
    """Rows are divided by their values, so that most shares have none."""
    linear, _, layout = functions("bitmap")
    dense = draw((500, 640), 2) * (torch.arange(500) % 50 == 0)[:, None]
    tensors = layout.pack(weight_of(dense), CPU)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        x = draw((3, 640), 4)
        torch.testing.assert_close(linear(x, *tensors, None), x @ dense.T, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    import ctypes
    from pathlib import Path

    assert library.parallel()
    linear, _, layout = functions("bitmap")
    linear(draw((1, 64), 4), *layout.pack(weight((16, 64), torch.float32), CPU), None)
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    runtimes = {
        name for name in loaded if any(part in Path(name).name for part in ("gomp", "iomp", "libomp"))
    }
    entries = [ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value for name in runtimes]
    assert library.parallel() in entries
    ours = [name for name in loaded if "bitmap_linear-" in name]
    assert ours
    assert not any(b"libgomp" in Path(name).read_bytes() for name in ours)


def test_a_path_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.CHOSEN_PATH, "neon")
    with pytest.raises(EngineError, match="COMPRESSKIT_CPU_PATH: expected one of portable"):
        library.path()
