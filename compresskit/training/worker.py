"""One rank of a launch: ``python -m compresskit.training.worker JOB``; not for use by hand."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from compresskit.training.launch import die_with_parent, note_failure


def main(path: Path) -> int:
    """Carry out the job in ``path``; a failure is noted beside it. Returns the exit status."""
    die_with_parent()
    # torch's own FSDP and deepspeed call collectives by names that torch has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        import torch.distributed as dist

        from compresskit.training.job import TrainJob, carry_out

        carry_out(TrainJob.from_json(path.read_text(encoding="utf-8")))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        note_failure(error, path.parent)
        return 1
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # An ordinary exit would wait for collectives that the other ranks never join.
        os._exit(status)
