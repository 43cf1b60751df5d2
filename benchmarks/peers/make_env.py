"""Make the environment of a peer: a virtual environment of its own, filled by pip.

    python benchmarks/peers/make_env.py llmcompressor DIR

The peer's python is then DIR/bin/python. Peers cannot share one environment, with each other or with
compresskit: each needs a transformers of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# Versions that were run; the records name them too.
PEERS = {
    "trl": ("trl==1.16.0", "transformers==5.23.*", "torch==2.13.*"),
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers>=5.15,<5.18", "torch>=2.11,<=2.14"),
}


def main() -> None:
    """Make one environment; pip's own settings (PIP_INDEX_URL, pip.conf) hold."""
    parser = argparse.ArgumentParser(description="Make the environment of a peer.")
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    python = options.directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(options.directory)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[options.peer]], check=True)
    print(python)


if __name__ == "__main__":
    main()
