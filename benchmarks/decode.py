"""Tokens a second and peak memory of ``generate`` at batch 1: a random Llama, dense and with zeros.

    python -m benchmarks.run decode
    python -m benchmarks.run decode --hidden 64 --intermediate 128 --layers 2 --tokens 4

Each model is written as a bitmask directory and runs in a process of its own, several times in turn with the
others, so that a machine whose load drifts drifts for all of them. Tokens of the prompt are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, append_record
from compresskit.measure.record import spread

KINDS = ("dense", "2:4", "50%", "60%", "70%")
VOCABULARY = 32000
PROMPT = 16


def make(kind: str, place: Path, given: argparse.Namespace) -> None:
    """Write the model: random weights, of each linear layer in a block the pattern's share zero."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import compresskit as ck

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.hidden // 64),
        num_key_value_heads=max(1, given.hidden // 64),
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) and kind != "dense":
                module.weight.data.mul_(_kept(kind, module.weight))
    plain = place / "plain"
    model.save_pretrained(plain if kind != "dense" else place / "model")
    if kind != "dense":
        ck.export(plain, to="bitmask", out=place / "model")


def _kept(kind: str, weight: Any) -> Any:
    import torch

    if kind == "2:4":
        keep = torch.zeros(weight.shape[0], weight.shape[1] // 4, 4, dtype=torch.bool)
        order = torch.rand(keep.shape).argsort(-1)
        return keep.scatter_(-1, order[..., :2], value=True).view(weight.shape)
    return torch.rand(weight.shape) >= float(kind.rstrip("%")) / 100


def run(directory: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Generate, and say how fast and with how much memory."""
    import torch

    import compresskit as ck
    from compresskit.kernels.choice import table
    from compresskit.kernels.dispatch import passed_over, used
    from compresskit.modeling.sparse_linear import choices_of

    began = time.perf_counter()
    packed = "quantization_config" in json.loads((directory / "config.json").read_text())
    model: Any = ck.load(directory, device=given.device, resident=given.resident if packed else "")
    load_s = time.perf_counter() - began
    on_gpu = given.device != "cpu"
    prompt = torch.arange(1, PROMPT + 1, device=model.device)[None]

    def seconds(tokens: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    first = min(seconds(1) for _ in range(2))
    rates = [(given.tokens - 1) / max(1e-9, seconds(given.tokens) - first) for _ in range(given.repetitions)]
    return {
        "tokens_per_s": rates,
        "peak_bytes": _peak_bytes(),
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "disk_bytes": sum(p.stat().st_size for p in directory.glob("*.safetensors")),
        "load_s": load_s,
        "parameters": model.num_parameters(),
        "tensor_bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "choices": table(choices_of(model)),
        "kernels": used(),
        "passed_over": list(passed_over()),
    }


def _peak_bytes() -> int:
    """Of this process alone: what getrusage says survives exec."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Make the models, run each in turn, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resident", default="fastest")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "DIR", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        what, place, out = given.one[0], Path(given.one[1]), Path(given.one[2])
        answer = run(place, given) if what == "run" else make(what, place, given)
        out.write_text(json.dumps(answer))
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in given.kinds}
    with tempfile.TemporaryDirectory() as scratch:
        for index, kind in enumerate(given.kinds):
            _alone(kind, Path(scratch) / str(index))
        for _ in range(given.rounds):
            for index, kind in enumerate(given.kinds):
                found[kind].append(_alone("run", Path(scratch) / str(index) / "model"))
    values, quartiles = summed_up(found)
    settings = {name: value for name, value in vars(given).items() if name not in ("results", "one")}
    subject = f"a random Llama of {found[given.kinds[0]][0]['parameters'] / 1e9:.2f}B parameters"
    print(
        append_record(
            "decode",
            values,
            subject=subject,
            results=given.results,
            quartiles=quartiles,
            settings=settings,
            device=given.device,
            repetitions=given.rounds * given.repetitions,
        )
    )


def summed_up(found: Mapping[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and quartiles of the record: rates over all rounds, and what they are of the first kind's."""
    values: dict[str, Any] = {}
    quartiles: dict[str, Any] = {}
    for kind, answers in found.items():
        name = f"{kind}_tokens_per_s"
        quartiles[name] = spread([rate for answer in answers for rate in answer["tokens_per_s"]])
        values[name] = quartiles[name][1]
        base = values[next(iter(values))]
        kept = ("disk_bytes", "tensor_bytes", "load_s", "choices", "kernels", "passed_over")
        values[kind] = {
            "speedup": values[name] / base,
            "peak_bytes": max(answer["cuda_peak_bytes"] or answer["peak_bytes"] for answer in answers),
            **{one: answers[-1][one] for one in kept},
        }
        print(f"{kind:<6} {values[name]:8.2f} tokens/s  {values[kind]['speedup']:5.2f}x", flush=True)
    return values, quartiles


def _alone(what: str, place: Path) -> Any:
    """Do it in a process of its own."""
    out = place.parent / f"{place.name}.json"
    if what != "run":
        place.mkdir()
    words = [word for word in sys.argv[1:] if word]
    words += ["--one", what, str(place), str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.decode", *words], check=True, env=dict(os.environ))
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
