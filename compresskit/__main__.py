"""`python -m compresskit`, which is also what torchrun and accelerate launch start."""

from compresskit.cli import main

main()
