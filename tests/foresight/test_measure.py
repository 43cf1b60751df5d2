"""The most bytes held while training, of tensors whose sizes are known."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresskit.foresight.live import Live
from compresskit.foresight.measure import counting

MB = 1 << 20


def steps(weight: Tensor, extras: tuple[int, ...]) -> None:
    """A step of SGD with momentum for each of ``extras``, before which so many MB are alive for a moment."""
    parameter = nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    for extra in extras:
        parameter.grad = torch.ones_like(parameter)
        moment = torch.zeros(extra * MB // 4)
        del moment
        optimizer.step()
        optimizer.zero_grad()


def test_the_peak_is_from_the_end_of_the_first_step_to_the_last() -> None:
    with counting("cpu") as counted:
        steps(torch.zeros(MB), (100, 8, 4))  # a weight of 4 MB, as much of gradient and of momentum
        after = torch.zeros(50 * MB)
    assert len(counted.step_ends) == 3
    assert counted.peak_bytes == pytest.approx((4 + 4 + 4 + 8) * MB, rel=0.001)
    assert counted.mapped_bytes < MB
    assert after.numel() == 50 * MB


def test_what_was_mapped_from_a_file_is_counted(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(MB)}, tmp_path / "weights.safetensors")
    with counting("cpu") as counted:
        steps(load_file(tmp_path / "weights.safetensors")["weight"], (0, 8))
    assert counted.peak_bytes == pytest.approx((4 + 4 + 4 + 8) * MB, rel=0.001)


def test_what_was_there_before_is_not_counted() -> None:
    there = torch.zeros(30 * MB)
    with counting("cpu") as counted:
        steps(torch.zeros(MB), (0, 8))
    assert counted.peak_bytes == pytest.approx((4 + 4 + 4 + 8) * MB, rel=0.001)
    assert there.numel() == 30 * MB


def test_memory_that_a_thread_gave_back_unseen_is_not_counted_for_ever() -> None:
    """The profiler records the thread that began it, and those of autograd; not those of collectives."""
    with counting("cpu") as counted:
        for _ in range(4):
            held = [torch.zeros(16 * MB)]
            letting_go = threading.Thread(target=held.clear)
            letting_go.start()
            letting_go.join()
        steps(torch.zeros(MB), (0, 8))
        again = torch.zeros(16 * MB)
    assert counted.peak_bytes == pytest.approx((4 + 4 + 4 + 8) * MB, rel=0.001)
    assert again.numel() == 16 * MB


def test_without_two_steps_there_is_nothing_to_tell() -> None:
    with counting("cpu") as counted:
        steps(torch.zeros(MB), (8,))
    assert counted.peak_bytes == 0


def test_live_counts_storages_once_and_forgets_them() -> None:
    known = torch.zeros(1000)
    with Live([known]) as live:
        view = known[:10]
        made = torch.zeros(250)
        again = made.view(25, 10)
        assert live.bytes == 1000
        del made
        assert live.bytes == 1000
        del again
        assert live.bytes == 0
        assert live.peak_bytes == 1000
        live.mark()
        assert live.peak_bytes == 0
    assert view.shape == (10,)
