"""What every CUDA kernel takes of a multiprocessor, for each architecture: registers, stack, spills. No GPU.

python -m benchmarks.run kernels.registers
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, append_record
from compresskit.kernels.cuda.compile import usage, version
from compresskit.kernels.cuda.variants import TARGETS, variants


def taken(target: str) -> dict[str, Any]:
    """Kernel with its defines -> what it takes, or why it could not be compiled."""
    found: dict[str, Any] = {}
    for stem, defines in variants():
        name = " ".join([stem, *(f"{key}={value}" for key, value in defines.items())])
        try:
            (found[name],) = (asdict(one) for one in usage(stem, defines, target).values())
        except Exception as error:  # told, and the next one compiled
            found[name] = str(error)[:300]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    values = {target: taken(target) for target in TARGETS}
    for name in next(iter(values.values())):
        said = [one[name] for one in values.values()]
        registers = [one["registers"] if isinstance(one, dict) else one for one in said]
        print(f"{name:<56} {registers}")
    path = append_record(
        "kernels-registers",
        values,
        subject="registers and spills of CUDA kernels, as the assembler says",
        results=options.results,
        settings={"nvrtc": version()},
    )
    print(path)


if __name__ == "__main__":
    main()
