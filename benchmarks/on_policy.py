"""Learning from the student's own text: do its continuations get more like the teacher's?

    python -m benchmarks.run on_policy --model DIR --train FILE --evaluate FILE

A student cut from the teacher to half of its parameters first learns from the data by forward KL. From there
as many steps again, of the same rows in the same order: on the data, or in a share of the steps (GKD's
lambda) on what the student says itself. Then both go on from the beginnings of held-out documents, and the
teacher scores what was said: mean log-probability of a token, in nats, higher is likelier. A student that
repeats itself is likely too, so the share of bigrams that are new (``distinct``) and of 4-grams that the
same text has said before (``repeated``) stand beside it, and bits per byte of the held-out text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import compresskit as ck
from benchmarks.run import RESULTS, append_record, settings_of

OFF, HALF, ALL = None, {"fraction": 0.5}, {"fraction": 1.0}
ARMS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "forward_kl, data": ("forward_kl", OFF),
    "reverse_kl, data": ("reverse_kl", OFF),
    "reverse_kl, lambda 0.5": ("reverse_kl", HALF),
    "reverse_kl, lambda 1": ("reverse_kl", ALL),
    "jsd, lambda 0.5": ({"method": "jsd", "beta": 0.5}, HALF),
    "jsd, lambda 1": ({"method": "jsd", "beta": 0.5}, ALL),
    "forward_kl, lambda 0.5": ("forward_kl", HALF),
}


def begun(place: Path, options: argparse.Namespace) -> Path:
    """The student before the comparison: cut, and taught on the data."""
    cut = ck.Prune("cut", options={"parameters": 0.5, "trim": "width"})
    first = ck.Distill(
        teacher=str(options.model),
        loss="forward_kl",
        steps=options.first_steps,
        learning_rate=options.first_rate,
        **shared(options),
    )
    data = ck.DataSpec(source=options.train)
    ck.run(
        ck.Recipe(model=str(options.model), data=data, stages=(cut, first)), place / "student", measures=()
    )
    return place / "student"


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of every training."""
    names = ("batch_size", "context_length")
    return {name: getattr(options, name) for name in names} | {"checkpoint_every": 0}


def taught(student: Path, arm: str, seed: int, out: Path, options: argparse.Namespace) -> Path:
    """The student after an arm's steps."""
    loss, policy = ARMS[arm]
    stage = ck.Distill(
        teacher=str(options.model),
        loss=loss,
        on_policy=None if policy is None else {**policy, "max_new_tokens": options.new_tokens},
        steps=options.steps,
        learning_rate=options.learning_rate,
        **shared(options),
    )
    data = ck.DataSpec(source=options.train)
    ck.run(ck.Recipe(model=str(student), data=data, stages=(stage,), seed=seed), out, measures=())
    return out


def prompts(options: argparse.Namespace) -> Tensor:
    """The first tokens of held-out documents, (documents, prompt tokens)."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lines = Path(options.evaluate).read_text(encoding="utf-8").splitlines()
    rows = (tokenizer(json.loads(line)["text"], verbose=False)["input_ids"] for line in lines)
    whole = [ids[: options.prompt_tokens] for ids in rows if len(ids) >= options.prompt_tokens]
    return torch.tensor(whole[-options.prompts :])


def measured(directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """What the teacher thinks of the continuations of a model, how varied they are, and its bits per byte."""
    model, teacher = (AutoModelForCausalLM.from_pretrained(d).eval() for d in (directory, options.model))
    start = prompts(options)
    found: dict[str, float] = {}
    for way, sampled in (("greedy", False), ("sampled", True)):
        torch.manual_seed(1)
        ids = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=sampled,
            top_k=0,
            max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens,  # as many tokens of each
            pad_token_id=0,
        )
        with torch.inference_mode():
            log_p = teacher(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        said = ids[:, start.shape[1] :].tolist()
        found[f"{way}_log_probability"] = float(log_p[:, start.shape[1] - 1 :].mean())
        found[f"{way}_distinct"] = distinct(said)
        found[f"{way}_repeated"] = mean(repeated(row) for row in said)
    (record,) = ck.bench(directory, data=options.evaluate, measures=("quality",), documents=options.documents)
    found["bits_per_byte"] = float(record.values["bits_per_byte"])
    return found


def distinct(rows: list[list[int]]) -> float:
    """Different bigrams of all rows together, as a share of their bigrams."""
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    return len(set(pairs)) / len(pairs)


def repeated(row: list[int], n: int = 4) -> float:
    """Share of the n-grams of a row that it has said before."""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Learning from the student's own text.")
    parser.add_argument("--model", type=Path, required=True, help="the teacher")
    parser.add_argument("--train", required=True)
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--first-steps", type=int, default=150)
    parser.add_argument("--first-rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run every arm with every seed, and append a record."""
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        student = begun(place, options)
        values: dict[str, Any] = {"teacher": measured(options.model, options)}
        values["student before"] = measured(student, options)
        print(json.dumps(values, indent=1), flush=True)
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for seed in range(options.seeds):
            for arm in ARMS:
                out = taught(student, arm, seed, place / f"{list(ARMS).index(arm)}-{seed}", options)
                runs[arm].append(measured(out, options))
                print(arm, seed, runs[arm][-1], flush=True)
    for arm, rows in runs.items():
        values[arm] = {"by_seed": rows}
        for name in rows[0]:
            values[arm][f"{name}_mean"] = mean(row[name] for row in rows)
            values[arm][f"{name}_stdev"] = stdev(row[name] for row in rows) if len(rows) > 1 else 0.0
    settings = settings_of(options, ("model", "train", "evaluate", "results"), ("train", "evaluate"))
    print(
        append_record(
            "on-policy",
            values,
            subject=options.model.name,
            results=options.results,
            settings=settings,
            repetitions=options.seeds,
        )
    )


if __name__ == "__main__":
    main()
