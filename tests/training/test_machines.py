"""Which machines take part: what is typed, and what Slurm's variables say."""

from __future__ import annotations

import pytest

from compresskit.errors import InputError
from compresskit.training.machines import (
    MAX_RESTARTS,
    Machines,
    first_host,
    machines_of,
    max_restarts,
    unused_machines,
)

STEP = {
    "SLURM_JOB_ID": "8195",
    "SLURM_STEP_ID": "2",
    "SLURM_NNODES": "3",
    "SLURM_NTASKS": "3",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_typed_is_this_process_alone() -> None:
    assert machines_of({"nnodes": None, "max_restarts": None}, 2, {}) is None
    assert machines_of({"max_restarts": 3}, 2, {}) is None, "processes of a stage restart without an agent"


def test_what_is_typed_counts_and_the_recipe_says_how_many_processes() -> None:
    typed = {"nnodes": 2, "node_rank": 1, "rdzv": "node-a:29400", "max_restarts": 3, "rdzv_timeout": 60}
    expected = Machines(
        nnodes=2, node_rank=1, rdzv="node-a:29400", processes=4, max_restarts=3, rdzv_timeout_s=60
    )
    assert machines_of(typed, 4, {}) == expected
    assert machines_of({"nproc": 8}, 4, {}) == Machines(processes=8)
    assert machines_of({"rdzv": "[fd00::1]:1", "nnodes": 2, "node_rank": 0}, 1, {}) == Machines(
        nnodes=2, rdzv="[fd00::1]:1"
    )


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"nnodes": 2}, ["--node-rank", "0 to 1", "--rdzv", "node-a:29400"]),
        ({"nnodes": 2, "node_rank": 2, "rdzv": "a:1"}, ["--node-rank", "less than 2", "got 2"]),
        ({"node_rank": 1}, ["--node-rank", "less than 1"]),
        ({"nnodes": 2, "node_rank": 0, "rdzv": "node-a"}, ["--rdzv", "HOST:PORT", "got node-a"]),
    ],
)
def test_what_makes_no_launch_is_refused_all_together(typed: dict[str, int | str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        machines_of(typed, 1, {})
    for word in words:
        assert word in str(caught.value)


def test_a_launch_of_another_tool_has_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machines_of({}, 1, STEP) is None
    with pytest.raises(InputError, match="--max-restarts, --nproc"):
        machines_of({"max_restarts": 1, "nproc": 2}, 1, {})
    assert machines_of({"nproc": 2}, 1, {"COMPRESSKIT_NOTES": "x"}) is None, "our own processes"


def test_a_step_of_slurm_needs_no_options() -> None:
    expected = Machines(nnodes=3, node_rank=1, rdzv="gpu07:29403", processes=2, run_id="slurm-8195-2")
    assert machines_of({}, 2, STEP) == expected
    assert machines_of({"nproc": 4, "max_restarts": 1}, 2, STEP) == Machines(
        nnodes=3,
        node_rank=1,
        rdzv="gpu07:29403",
        processes=4,
        max_restarts=1,
        run_id="slurm-8195-2",
    )
    part = STEP | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu09,x"}
    found = machines_of({}, 1, part)
    assert found is not None
    assert (found.nnodes, found.rdzv) == (2, "gpu09:29403")
    typed = {"nnodes": 2, "node_rank": 0, "rdzv": "a:1"}
    assert machines_of(typed, 1, STEP) == Machines(nnodes=2, rdzv="a:1"), "what is typed wins"


def test_slurm_outside_of_a_step_and_several_tasks_a_machine() -> None:
    batch = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    assert machines_of({}, 1, batch) is None
    assert "3 machines" in str(unused_machines(batch))
    assert unused_machines(STEP) is None
    assert machines_of({}, 1, STEP | {"SLURM_NNODES": "1", "SLURM_NTASKS": "1"}) is None
    with pytest.raises(InputError, match="ntasks-per-node=1"):
        machines_of({}, 1, STEP | {"SLURM_NTASKS": "24"})


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login", "gpu07"),
        ("login,gpu[07-09]", "login"),
        ("r[1-2]n[3,5]-ib", "r1n3-ib"),
        ("gpu[3],x", "gpu3"),
    ],
)
def test_the_first_host_of_a_list(names: str, first: str) -> None:
    assert first_host(names) == first


@pytest.mark.parametrize("said", ["-1", "many", "1.5"])
def test_restarts_are_a_whole_number(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_RESTARTS, said)
    with pytest.raises(InputError, match="a whole number"):
        max_restarts()
    monkeypatch.setenv(MAX_RESTARTS, "2")
    assert max_restarts() == 2
