"""Ranks of one launch on this machine, each a process that runs one of the scripts here.

And what scripts that train with held zeros and with projections of their own have in common: each training by
each engine in the ranks, and the comparison of what they leave with one process.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from every_engine import NAMES
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresskit.training.launch import _free_port
from compresskit.training.outcome import TrainOutcome
from compresskit.training.watch import LossLog

TOLERANCE = 2e-5
"""Relative, of a loss at any of 10 steps: engines sum gradients in other orders, in fp32."""
Trained = tuple[TrainOutcome, tuple[str, ...]]
"""How a training ended, and the layers whose zeros it held."""
HERE = Path(__file__).parent
LIMIT_S = 900
"""Of one launch: several times what it takes on two idle cores, since tests may share them."""


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["compresskit.training.trainer", "transformers.models.llama.modeling_llama", "deepspeed"]
)
"""One process imports what takes a rank ten seconds; every rank is forked from it."""


@contextmanager
def two_ranks(script: ModuleType, place: Path) -> Iterator[None]:
    """``python SCRIPT PLACE`` as both ranks, while the body does what one process does; both end well."""
    with several_ranks(script, place, 2):
        yield


@contextmanager
def several_ranks(script: ModuleType, place: Path, count: int) -> Iterator[None]:
    """``python SCRIPT PLACE`` as so many ranks, while the body does what one process does; all end well."""
    port, ranks = str(_free_port()), list[BaseProcess]()
    logs = [place / f"rank{rank}.log" for rank in range(count)]
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (HERE, *HERE.parents[:2]))),
        }
        ranks.append(
            FORKS.Process(target=be_rank, args=([str(script.__file__), str(place)], environment, log))
        )
        ranks[-1].start()
    try:
        yield
        codes = _codes(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert codes == [0] * count, "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs)


def be_rank(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run a script with its arguments; what it says, and what it starts says, goes to ``log``."""
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


def _codes(ranks: Sequence[BaseProcess]) -> list[int | None]:
    """How they ended; once one has failed the others would wait for it in vain, and have no code."""
    end = time.monotonic() + LIMIT_S
    codes = [rank.exitcode for rank in ranks]
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
        codes = [rank.exitcode for rank in ranks]
    return codes


def train_everywhere(
    place: Path,
    runs: Collection[str],
    engines: Mapping[str, Mapping[str, Any]],
    train: Callable[..., Trained],
) -> None:
    """As one rank, each run by each engine; writes ``<run>-<engine>.json`` and ``.safetensors``."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for engine, changes in engines.items():
        for run in runs:
            name, saved = f"{run}-{engine}", dict[str, Tensor]()
            outcome, _ = train(place, run, place / f"{name}-s", saved, **changes)
            if torch.distributed.get_rank() == 0:
                save_file({k: t.clone() for k, t in saved.items()}, place / f"{name}.safetensors")
                (place / f"{name}.json").write_text(json.dumps(asdict(outcome)))
    torch.distributed.destroy_process_group()


def parts(scratch: Path, name: str) -> list[float]:
    """What each step's loss had of ``name``."""
    return [record["parts"][name] for record in LossLog(scratch / "losses.jsonl").read() if "parts" in record]


def assert_losses_agree(place: Path, run: str, engine: str, single: TrainOutcome) -> None:
    """Of each step and of the evaluation, with those of one process, whose scratch is ``<run>-one-s``."""
    mine, true = (place / f"{run}-{name}-s" for name in (engine, "one"))
    found, expected = (LossLog(scratch / "losses.jsonl").losses() for scratch in (mine, true))
    assert len(found) == len(expected) == single.steps
    assert found == pytest.approx(expected, rel=TOLERANCE)
    for name in single.final_parts:
        assert parts(mine, name) == pytest.approx(parts(true, name), rel=TOLERANCE)
    outcome = json.loads((place / f"{run}-{engine}.json").read_text())
    assert (outcome["engine"], outcome["processes"]) == (NAMES[engine.removesuffix("-again")], 2)
    assert outcome["validation_loss"] == pytest.approx(single.validation_loss, rel=TOLERANCE)
    assert outcome["final_parts"] == pytest.approx(dict(single.final_parts), rel=TOLERANCE)
    assert tuple(outcome["warnings"]) == single.warnings


def assert_model_alone(
    place: Path, run: str, engine: str, held: Sequence[str], true: Mapping[str, Tensor], unseen: str = "-"
) -> None:
    """That is saved, without projections, as near to ``true`` as fp32 allows, its zeros held.

    Args:
        place: where both are.
        run: its name.
        engine: its name.
        held: layers.
        true: what one process saved.
        unseen: end of the names of what no loss depends on: rounding alone moves it.
    """
    saved = load_file(place / f"{run}-{engine}.safetensors")
    assert saved.keys() == true.keys()
    assert not any("projection" in name for name in saved)
    for name, tensor in true.items():
        if not name.endswith(unseen):
            torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    for layer in held:
        assert not saved[f"{layer}.weight"][:, ::2].any()
