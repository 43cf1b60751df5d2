"""A fork of a process whose OpenMP has begun: it has none of the threads, and must not wait for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from compresskit.kernels.cpu import build

FORKED = """
import os, sys, warnings
import torch
from compresskit.kernels.bitmap import pack
from compresskit.kernels.packed.bitmap import BitmapRows

warnings.simplefilter("error")
torch.set_num_threads(2)
large = torch.ones(1 << 20)
assert float((large + large).sum()) == 1 << 21  # torch starts its threads
torch.manual_seed(0)
weight = torch.randn(256, 512) * (torch.rand(256, 512) < 0.5)
layout, x = BitmapRows(), torch.randn(1, 512)
packed = layout.pack(pack(weight), torch.device("cpu"))
expected = x @ weight.T
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    after = [layout.linear(x, packed, None) for _ in range(2)]
assert [str(w.message)[:29] for w in caught] == ["This process is a fork of ano"], caught
assert all(torch.allclose(one, expected, atol=1e-3) for one in after), after
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C compiler here")
def test_a_fork_multiplies_in_one_thread() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKED], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            said = process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            pytest.fail("it waits for threads that are not there")
    assert process.returncode == 0, said
