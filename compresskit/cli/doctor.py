"""`compresskit doctor`: what this machine has and what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click

REQUIRED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "compressed-tensors", "click")
OPTIONAL = {
    "deepspeed": "training under ZeRO-1, 2 and 3 (--strategy deepspeed)",
    "bitsandbytes": "NF4 weights and 8-bit optimisers",
    "peft": "LoRA and other adapters",
    "torchao": "quantisation-aware training with torchao's own fake quantisers",
}


def installed(package: str) -> str | None:
    """The version of ``package``, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON on the last line.")
def doctor(as_json: bool) -> None:
    """Tell Python, torch, devices and optional parts, and what each missing one would give."""
    packages = {name: installed(name) for name in (*REQUIRED, *OPTIONAL)}
    click.echo(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} processors")
    for name in REQUIRED:
        click.echo(f"  {name} {packages[name] or 'MISSING: pip install ' + name}")
    devices = []
    if find_spec("torch"):
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        click.echo(
            f"cpu capability: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        )
    click.echo(f"accelerators: {', '.join(devices) or 'none; everything runs on the CPU'}")
    for name, gives in OPTIONAL.items():
        click.echo(
            f"  {name} {packages[name]}" if packages[name] else f"  {name} missing; it would give {gives}"
        )
    compiler = shutil.which("cc") or shutil.which("gcc")
    click.echo(f"C compiler: {compiler or 'none; with one, sparse weights are multiplied faster on the CPU'}")
    missing = [name for name in REQUIRED if packages[name] is None]
    if as_json:
        click.echo(json.dumps({"packages": packages, "devices": devices, "compiler": compiler}))
    if missing:
        raise SystemExit(2)
