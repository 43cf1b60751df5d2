"""Every export of the bundled model, loaded by its real consumer: what it computes, and how large it is.

    python -m benchmarks.exports [--encoder DIR]

Quantises the bundled language model with RTN, exports it to every target that holds the scheme, and compares
what the consumer computes with what plain transformers does of our own checkpoint; each row says which that
is: the dense one that the stage left, or, where the scheme rounds inputs, the packed artifact, which for the
target compressed-tensors is the same form once more. With ``--encoder`` (any BERT) the same for ONNX. Tokens
per second: one prompt at a time, no batch, median and quartiles of the rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

import compresskit as ck
from benchmarks.run import append_record

TEACHER = Path(ck.__file__).parent / "assets" / "teacher"
CASES = (
    ("dense", "gguf"),
    ("w8a16", "gguf"),
    ("w4a16-g32", "gguf"),
    ("w4a16-g32-asym", "gguf"),
    ("w8a16", "torchao"),
    ("w8a8", "torchao"),
    ("w4a16-g32", "torchao"),
    ("w8a8", "compressed-tensors"),
    ("w4a16-g32", "compressed-tensors"),
    ("nf4", "bitsandbytes"),
    ("w8a8", "dense"),
)
ENCODER_CASES = (("dense", "onnx"), ("w8a16", "onnx"), ("w8a8", "onnx"))
CONSUMERS = {
    "gguf": "llama_cpp_python",
    "onnx": "onnxruntime",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
}
TOKENS = 256
ROUNDS = 9

# Runs in a process of its own, which imports nothing of compresskit; prints one line of JSON.
CONSUMER = """
import json, sys, time
import numpy as np
directory, to, dtype, tokens, rounds, out = sys.argv[1:]
tokens, rounds = json.loads(tokens), int(rounds)
if to == "gguf":
    from llama_cpp import Llama
    threads = {"n_threads": 1, "n_threads_batch": 1}
    model = Llama(directory + "/model.gguf", n_ctx=512, logits_all=True, verbose=False, **threads)
    def run():
        model.reset()
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])
elif to == "onnx":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(directory + "/model.onnx", options)
    ids = np.array([tokens])
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    feed = {i.name: values[i.name] for i in session.get_inputs()}
    run = lambda: session.run(None, feed)[0][0]
else:
    import torch, transformers
    torch.set_num_threads(1)
    cls = transformers.AutoModelForCausalLM if to != "encoder" else transformers.AutoModel
    model = cls.from_pretrained(directory, dtype=dtype)
    ids = torch.tensor([tokens])
    def run():
        with torch.no_grad():
            return model(input_ids=ids)[0][0].float().numpy()
found = run()
times = []
for _ in range(rounds):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
np.save(out, found)
print(json.dumps([len(tokens) / seconds for seconds in times]))
if to == "gguf":
    model.close()
"""


def consume(directory: Path, to: str, dtype: str, tokens: list[int], out: Path) -> dict[str, float]:
    """Save what the consumer computes to ``out``; returns tokens per second over the rounds."""
    words = [str(directory), to, dtype, json.dumps(tokens), str(ROUNDS), str(out)]
    command = [sys.executable, "-c", CONSUMER, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    low, median, high = quantiles(json.loads(done.stdout.splitlines()[-1]), n=4, method="inclusive")
    return {"lower_quartile": low, "median": median, "upper_quartile": high}


def size(directory: Path) -> int:
    """Bytes of the weights in ``directory``."""
    kinds = (".safetensors", ".gguf", ".onnx", ".onnx.data")
    return sum(path.stat().st_size for path in directory.iterdir() if path.name.endswith(kinds))


def compare(model: Path, scheme: str, to: str, tokens: list[int], place: Path) -> dict[str, Any]:
    """Export, load and compare one case."""
    import numpy as np

    source = quantised(model, scheme, place)
    out, saved = place / f"{scheme}-{to}", place / "theirs.npy"
    warnings = ck.export(source, to=to, out=out)
    speed = consume(out, to, "auto", tokens, saved)
    # Our own: only the packed artifact rounds inputs; llama.cpp and onnxruntime do not compute in bfloat16.
    has_stage = scheme not in ("dense", "w8a8") or to == "dense"
    ours = source / "stages" / "1-quantize" if has_stage else source
    form = "the stage's dense checkpoint" if has_stage else "the packed artifact"
    form = "the model itself" if scheme == "dense" else form
    dtype = "float32" if to in ("gguf", "onnx") else "auto"
    reference = place / f"{scheme}-{has_stage}-{dtype}.npy"
    if not reference.exists():
        consume(ours, "encoder" if to == "onnx" else "dense", dtype, tokens, reference)
    theirs, own = np.load(saved), np.load(reference)
    name = CONSUMERS.get(to, "transformers")
    try:
        consumer = f"{name} {version(name)}"
    except PackageNotFoundError:
        consumer = name
    return {
        "scheme": scheme,
        "target": to,
        "consumer": consumer,
        "max_abs_difference": float(np.abs(theirs - own).max()),
        "compared_with": f"{form} in transformers, dtype {dtype}",
        "largest_output": float(np.abs(own).max()),
        "same_best_token": float((theirs.argmax(-1) == own.argmax(-1)).mean()),
        "weight_bytes": size(out),
        "source_bytes": size(model),
        "tokens_per_s": speed,
        "warnings": list(warnings),
    }


def quantised(model: Path, scheme: str, place: Path) -> Path:
    """The artifact of ``model`` in ``scheme``, made once."""
    out = place / scheme
    if scheme == "dense":
        return model
    if not out.exists():
        recipe = ck.Recipe(model=str(model), stages=(ck.Quantize("rtn", scheme=scheme),))
        ck.run(recipe, out, measures=(), keep_stages=True)
    return out


def main() -> None:
    """Run every case and append a record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        cases = [(TEACHER, case) for case in CASES]
        cases += [(options.encoder, case) for case in ENCODER_CASES if options.encoder]
        for index, (model, (scheme, to)) in enumerate(cases):
            place = Path(name) / ("encoder" if to == "onnx" else "teacher")
            place.mkdir(exist_ok=True)
            tokens = tokens_of(model, Path(argparse.__file__).read_text())
            rows.append(compare(model, scheme, to, tokens, place))
            print(f"{index + 1}/{len(cases)}", json.dumps(rows[-1]), flush=True)
    settings = {"tokens": TOKENS, "rounds": ROUNDS, "threads_of_consumer": 1, "method": "rtn"}
    subject = "bundled model" + (", sentence encoder" if options.encoder else "")
    print(append_record("exports", {"rows": rows}, subject=subject, settings=settings))


def tokens_of(model: Path, text: str) -> list[int]:
    """The first tokens of ``text``, special ones included."""
    from compresskit.modeling import load_tokenizer

    found: list[int] = load_tokenizer(model)(text, truncation=True, max_length=TOKENS).input_ids
    return found


if __name__ == "__main__":
    main()
