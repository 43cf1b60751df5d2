"""Accelerators and links by name, for machines that are not at hand; and this machine, looked at.

Peaks are of dense matrix products and links of one direction, as the makers' data sheets state them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from compresskit.errors import Fault, InputError
from compresskit.registry import nearest

GB = 10**9
TERA = 10**12
RESERVED_FRACTION = 0.08
"""Of a device's memory: what its driver takes and what the allocator cannot use."""
CPU_LINK_BYTES_S = 4 * GB
"""Between processes of one machine through its memory, with gloo."""
HOST_LINK_BYTES_S = 25 * GB
"""Between an accelerator and the host's memory: PCIe 4.0 x16, as it is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process's share of a CPU.

    Attributes:
        name: for people.
        kind: ``cuda`` or ``cpu``.
        peak_flops: floating-point operations a second, by the type products run in.
        memory_bytes: of its own.
        memory_bytes_s: read or written a second.
        link_bytes_s: to the other accelerators of its machine, a second, in one direction.
        efficiency: share of the peak that training reaches.
    """

    name: str
    kind: str
    peak_flops: Mapping[str, float]
    memory_bytes: int
    memory_bytes_s: float
    link_bytes_s: float
    efficiency: float = 0.4


def _gpu(
    name: str, narrow: float, fp32: float, memory_gb: int, memory_gb_s: float, link_gb_s: float
) -> Device:
    peaks = {"fp32": fp32 * TERA, "bf16": narrow * TERA, "fp16": narrow * TERA}
    return Device(
        name=name,
        kind="cuda",
        peak_flops=peaks,
        memory_bytes=memory_gb * GB,
        memory_bytes_s=memory_gb_s * GB,
        link_bytes_s=link_gb_s * GB,
    )


# NVIDIA's data sheets: V100 SXM2 (2018), A100 (2021), L4 and L40S (2023), H100 SXM (2023), H200 SXM (2024),
# HGX B200 (2024), GeForce RTX 4090 (Ada architecture paper, 2022). fp32 is without tensor cores: products are
# not rounded to TF32 unless somebody asks for it.
DEVICES: Mapping[str, Device] = {
    "v100": _gpu("V100 SXM2 32 GB", 125, 15.7, 32, 900, 150),
    "a100-40gb": _gpu("A100 SXM 40 GB", 312, 19.5, 40, 1555, 300),
    "a100": _gpu("A100 SXM 80 GB", 312, 19.5, 80, 2039, 300),
    "l4": _gpu("L4 24 GB", 121, 30.3, 24, 300, 32),
    "l40s": _gpu("L40S 48 GB", 362, 91.6, 48, 864, 32),
    "rtx4090": _gpu("RTX 4090 24 GB", 165, 82.6, 24, 1008, 32),
    "h100": _gpu("H100 SXM 80 GB", 989, 67, 80, 3350, 450),
    "h200": _gpu("H200 SXM 141 GB", 989, 67, 141, 4800, 450),
    "b200": _gpu("B200 SXM 180 GB", 2250, 75, 180, 7700, 900),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a stage would train.

    Attributes:
        device: of each process.
        gpus: processes of one node.
        nodes: machines.
        link_bytes_s: of one node to the others, a second, in one direction.
        here: whether it is this machine, whose packages can be looked for.
    """

    device: Device
    gpus: int
    nodes: int = 1
    link_bytes_s: float = 50 * GB
    here: bool = False

    @property
    def processes(self) -> int:
        """One for each device."""
        return self.gpus * self.nodes

    @property
    def usable_bytes(self) -> int:
        """Of one device's memory, for tensors."""
        return round(self.device.memory_bytes * (1 - RESERVED_FRACTION))


def machine(
    *,
    gpus: int,
    nodes: int = 1,
    gpu: str = "h100",
    memory: str | None = None,
    link: str | None = None,
    efficiency: float | None = None,
) -> Machine:
    """A machine from what was typed.

    Args:
        gpus: of one node.
        nodes: how many.
        gpu: a name of :data:`DEVICES`.
        memory: of one GPU, such as ``80GB``; None is the GPU's own.
        link: of one node to the others, such as ``400Gbit``; None is that.
        efficiency: share of the peak that training reaches; None is the device's.

    Raises:
        InputError: all that is wrong, together.
    """
    faults = [
        Fault(f"--{name}", "at least 1", str(count), "Raise it.")
        for name, count in (("gpus", gpus), ("nodes", nodes))
        if count < 1
    ]
    if gpu not in DEVICES:
        cure = f"Did you mean: {nearest(gpu, DEVICES)}? Any other is described by --gpu-memory beside one."
        faults.append(Fault("--gpu", f"one of {', '.join(DEVICES)}", repr(gpu), cure))
    if efficiency is not None and not 0 < efficiency <= 1:
        faults.append(Fault("--efficiency", "above 0 and at most 1", str(efficiency), "Give a share."))
    sizes: dict[str, float] = {}
    for name, text in (("gpu-memory", memory), ("link", link or "400Gbit")):
        if text is not None:
            try:
                sizes[name] = amount(text)
            except ValueError:
                expected = "an amount such as 80GB" if name == "gpu-memory" else "a rate such as 400Gbit"
                faults.append(Fault(f"--{name}", expected, repr(text), "Give a number and its unit."))
    if faults:
        raise InputError(*faults)
    device = DEVICES[gpu]
    if "gpu-memory" in sizes:
        device = replace(device, memory_bytes=round(sizes["gpu-memory"]))
    if efficiency is not None:
        device = replace(device, efficiency=efficiency)
    return Machine(device=device, gpus=gpus, nodes=nodes, link_bytes_s=sizes["link"])


DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def amount(text: str) -> float:
    """Bytes, or bytes a second, of ``80GB``, ``40GiB``, ``400Gbit`` or ``50GB/s``; a small b might be either.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([\d.]+)\s*([kKMGT]i?|)(B|bit)(?:/s)?", text.strip())
    if found is None:
        raise ValueError(text)
    number = float(found[1]) * {**DECIMAL, **BINARY}[found[2].lower()]
    if not number > 0:
        raise ValueError(text)
    return number / 8 if found[3] == "bit" else number


def _named(said: str) -> Device | None:
    """The device that a driver calls so; an L40S is no L4."""
    short = said.lower().replace(" ", "")
    known = max((name for name in DEVICES if name in short), key=len, default="")
    return DEVICES.get(known)


def this_machine(processes: int, device: str) -> Machine:
    """The machine this runs on, its speed tried for a moment.

    Args:
        processes: that share it where it has no GPU.
        device: ``cpu`` or ``cuda``.
    """
    import psutil
    import torch

    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        named = _named(about.name)
        speeds = dict(named.peak_flops) if named else {n: _tried_flops(n, "cuda") for n in ("fp32", "bf16")}
        speeds.setdefault("fp16", speeds["bf16"])
        found = Device(
            name=about.name,
            kind="cuda",
            peak_flops=speeds,
            memory_bytes=about.total_memory,
            memory_bytes_s=named.memory_bytes_s if named else 500 * GB,
            link_bytes_s=named.link_bytes_s if named else HOST_LINK_BYTES_S,
        )
        return Machine(device=found, gpus=torch.cuda.device_count(), here=True)
    flops = {name: _tried_flops(name, "cpu") / processes for name in ("fp32", "bf16")}
    found = Device(
        name=f"this CPU, a {processes}th of it" if processes > 1 else "this CPU",
        kind="cpu",
        peak_flops={**flops, "fp16": flops["bf16"]},
        memory_bytes=psutil.virtual_memory().total // processes,
        memory_bytes_s=10 * GB / processes,
        link_bytes_s=CPU_LINK_BYTES_S,
        efficiency=0.6,
    )
    return Machine(device=found, gpus=processes, here=True)


TRIED_WIDTH, TRIED_S = 1024, 0.2


def _tried_flops(precision: str, device: str) -> float:
    """Operations a second that a matrix product reaches here."""
    import torch

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    width = TRIED_WIDTH if device == "cpu" else 8 * TRIED_WIDTH
    factor = torch.ones(width, width, dtype=dtype, device=device)
    factor @ factor
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < TRIED_S:
        factor @ factor
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * width**3 * count / (time.perf_counter() - start)
