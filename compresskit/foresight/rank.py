"""One rank of a trial: ``python -m compresskit.foresight.rank JOB``; not for use by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compresskit.training.setting import launched_processes, this_rank
from compresskit.training.worker import as_rank

PEAK = "peak-{}.json"
STEPS = 3
"""The first makes the optimiser's states; the others are looked at."""


def main(path: Path) -> None:
    """Train as the job in ``path`` says and write beside it what was held."""
    _try(json.loads(path.read_text(encoding="utf-8")), path.parent)
    if launched_processes() is not None:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def _try(job: dict[str, Any], scratch: Path) -> None:
    from compresskit.foresight.measure import counting
    from compresskit.modeling import open_model, resolve_device
    from compresskit.recipe import recipe_from
    from compresskit.stage import StageContext

    recipe, cache = recipe_from(job["recipe"], {}), Path(job["cache"])
    stage: Any = replace(recipe.stages[job["stage"]], **job["changes"])  # type: ignore[type-var]
    source = open_model(
        recipe.model,
        tokenizer=recipe.tokenizer,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        build_dir=cache / "built",
        seed=recipe.seed,
    )
    context = StageContext(
        out=scratch / "out",
        scratch=scratch / "work",
        original=source.directory,
        data=recipe.data,
        seed=recipe.seed,
        device=recipe.device,
        cache=cache,
        trust_remote_code=recipe.trust_remote_code,
    )
    for folder in (context.out, context.scratch):
        folder.mkdir(exist_ok=True)
    with counting(resolve_device(recipe.device).type) as counted:
        stage.run(source, context)
    found = {name: count for name, count in asdict(counted).items() if name != "storages"}
    (scratch / PEAK.format(this_rank())).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    JOB = Path(sys.argv[1])
    if launched_processes() is None:
        main(JOB)
    else:
        as_rank(lambda: main(JOB))
