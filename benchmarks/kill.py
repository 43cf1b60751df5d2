"""kill -9 at random moments: does the same command, started again, end with the same bytes?

    python -m benchmarks.kill --model DIR --data FILE --kills 10

Runs prune -> distil -> quantise once undisturbed; then, for each kill, starts the same command, sends
SIGKILL to its whole process group after a random share of the undisturbed time, starts it again, and
compares the digests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.run import append_record

RECIPE = """\
model: {model}
data: {data}
stages:
  - prune: {{method: wanda, pattern: "50%", samples: 16}}
  - distill: {{steps: {steps}, batch_size: 4, context_length: 128, checkpoint_every: 5}}
  - quantize: {{method: rtn, scheme: w8a8}}
"""


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start ``compresskit run`` in a process group of its own."""
    command = [sys.executable, "-m", "compresskit", "run", str(recipe), "-o", str(out)]
    command += ["--measure", "none"]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes], out: Path) -> str:
    """Wait for the end and return the digest."""
    from compresskit.artifact import open_artifact

    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(stderr.decode())
    artifact = open_artifact(out)
    if damaged := artifact.damaged():
        raise SystemExit(f"damaged files: {damaged}")
    return artifact.digest


def main() -> None:
    """Run it and append a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        recipe = Path(place) / "recipe.yaml"
        model, data = Path(options.model).absolute(), Path(options.data).absolute()
        recipe.write_text(RECIPE.format(model=model, data=data, steps=options.steps))
        began = time.monotonic()
        expected = finish(start(recipe, Path(place) / "whole"), Path(place) / "whole")
        seconds = time.monotonic() - began
        rows = []
        for kill in range(options.kills):
            out = Path(place) / f"killed-{kill}"
            process = start(recipe, out)
            moment = chance.uniform(0.05, 1.0) * seconds
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            stage = sorted(p.name for p in (Path(place) / f".{out.name}.work").glob("*-*"))
            digest = finish(start(recipe, out), out)
            rows.append({"kill_s": round(moment, 2), "found": stage, "same": digest == expected})
            print(rows[-1], flush=True)
    same = sum(row["same"] for row in rows)
    print(f"{same} of {len(rows)} ended with the bytes of the undisturbed run ({seconds:.1f} s)")
    values = {"same": same, "kills": len(rows), "undisturbed_s": round(seconds, 2), "runs": rows}
    print(append_record("kill", values, subject=json.dumps({"model": model.name, "steps": options.steps})))


if __name__ == "__main__":
    main()
