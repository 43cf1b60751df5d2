"""A teacher server that one rank loses inside of a step, under every engine, in the ranks of one launch.

``python every_engine_lost.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment. The
models are in ``OUT``. Each rank asks a server of its own, so that one may fall silent for it alone. It writes
``OUT/<engine>-<rank>.json`` and ``OUT/<engine>.safetensors``. Imported, it gives what a run is.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from completions_server import NAME, serving
from every_engine import ENGINES as PLAIN
from every_engine import FIELDS, Counting
from safetensors.torch import save_file
from torch import Tensor

from compresskit.distill.divergences import Divergences
from compresskit.distill.served import Served
from compresskit.errors import RunError
from compresskit.modeling import load_model
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

VOCABULARY, STEPS, K = 48, 4, 8
LOSING = 1
"""The rank that loses its server."""
ENGINES: Mapping[str, dict[str, Any]] = {name: PLAIN[name] for name in ("ddp", "fsdp", "zero2", "zero3")}
ANSWERS = 10
"""After which a server is silent: a rank asks for 4 rows in each step, two at a time."""


def train(place: Path, scratch: Path, url: str, saved: dict[str, Tensor], **changes: Any) -> TrainOutcome:
    """Train the student, which drops states at random, with the server there."""
    server = {
        "url": url,
        "model": NAME,
        "top_k": K,
        "vocabulary": VOCABULARY,
        "retries": 1,
        "backoff_s": 0.01,
    }
    return Run(
        load_model(place / "student"),
        Counting(),
        fields=replace(FIELDS, steps=STEPS, **changes),
        scratch=scratch,
        objective=Divergences(),
        teacher=Served(server={**server, "retries": 1, "backoff_s": 0.01}),
        device="cpu",
        save=saved.update,
    ).train()


def main(place: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = int(os.environ["RANK"])
    with serving(place / "teacher") as (url, server):
        for engine, changes in ENGINES.items():
            scratch, saved, again = place / f"{engine}-s", dict[str, Tensor](), dict[str, Tensor]()
            train(place, place / f"{engine}-whole-s", url, saved, **changes)
            server.prompts.clear()
            server.lives = ANSWERS if rank == LOSING else None
            said: dict[str, Any] = {"url": url, "error": ""}
            try:
                train(place, scratch, url, {}, **changes)
            except RunError as error:
                said["error"] = str(error)
            server.lives = None
            said["resumed"] = asdict(train(place, scratch, url, again, **changes))
            (place / f"{engine}-{rank}.json").write_text(json.dumps(said))
            if rank == 0:
                for name, tensors in (("whole", saved), ("again", again)):
                    own = {k: t.clone() for k, t in tensors.items()}
                    save_file(own, place / f"{engine}-{name}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
