"""One rank of a launch: a whole command, or ``python -m compresskit.training.worker JOB``."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from compresskit.errors import CompressKitError
from compresskit.training.launch import die_with_parent, note_failure, noted_in


def as_rank(work: Callable[[], None]) -> None:
    """Do ``work`` as one rank of a launch; if it fails, tell why, and end this process.

    An ordinary exit would wait for collectives that the other ranks never join. A launch of ours has the
    failure noted where it looks for it, and tells it once; in another one each rank tells its own.
    """
    if noted_in() is not None:
        die_with_parent()
    # torch's own FSDP and deepspeed call collectives by names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        from compresskit.training.ranks import accompanied

        with accompanied():
            work()
    except BaseException as error:
        note_failure(error)
        is_ours = isinstance(error, CompressKitError)
        if noted_in() is None:
            print(f"error: {error}" if is_ours else traceback.format_exc(), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, CompressKitError) else 1)


def main(path: Path) -> None:
    """Carry out the job in ``path``."""
    import torch.distributed as dist

    from compresskit.training.job import TrainJob, carry_out

    carry_out(TrainJob.from_json(path.read_text(encoding="utf-8")))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
