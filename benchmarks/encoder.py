"""An encoder of sentences cut to half of its blocks, taught by what it was, and quantised.

    python -m benchmarks.encoder --model DIR --train train.tsv --dev dev.tsv --held-out FILE [FILE ...]

``--train`` and ``--dev`` are tables with a column label and one of sentences, as of SST-2; of each line of
the held-out files the last column is a sentence, as of CoLA. The student learns embeddings and relations on
sentences of the first; no label is looked at. Each model is then asked two things. How near are its
embeddings of held-out sentences to the teacher's? And how well does a logistic regression on its frozen
embeddings, fitted on some rows of the first table, tell the classes of the second? With ``--keep`` the models
are left in a folder, and a second run with it only examines them.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer

import compresskit as ck
from benchmarks.run import append_record, settings_of
from compresskit.measure.size import file_bytes

TEACHER, CUT, DISTILLED, QUANTISED = "teacher", "cut", "distilled", "quantised"
BATCH = 64
PENALTY = 1e-4
"""Of the squared weights of the logistic regression."""
loads: Any = AutoModel


def made(place: Path, options: Any) -> tuple[dict[str, Path], dict[str, Any]]:
    """Where each model is, and what training told; those in ``place`` from a run before are taken."""
    data = ck.DataSpec(source=str(options.train), column="sentence", label="", documents=options.documents)
    teach = ck.Distill(
        teacher=str(options.model),
        loss=[{"method": "embedding_cosine"}, {"method": "pairwise", "weight": options.pairwise}],
        features={"method": "relation", "weight": options.relation} if options.relation else None,
        steps=options.steps,
        batch_size=options.batch_size,
        context_length=options.context_length,
        learning_rate=options.learning_rate,
        checkpoint_every=options.checkpoint_every,
    )
    stages: dict[str, tuple[str, Any]] = {
        CUT: (TEACHER, ck.Prune("cut", options={"layers": options.layers})),
        DISTILLED: (CUT, teach),
        QUANTISED: (DISTILLED, ck.Quantize(options.quantizer, scheme="w8a8")),
    }
    models, told = {TEACHER: options.model}, dict[str, Any]()
    for name, (before, stage) in stages.items():
        models[name] = place / name
        begun = time.monotonic()
        recipe = ck.Recipe(model=str(models[before]), data=data, stages=(stage,))
        artifact = ck.run(recipe, models[name], measures=())
        result = artifact.manifest["stages"][-1]["result"]
        told[name] = {"metrics": result["metrics"], "warnings": artifact.manifest["warnings"]}
        told[name]["seconds"] = round(time.monotonic() - begun, 1)
    return models, told


def embedded(directory: Path, texts: Sequence[str], tokenizer: Any, options: Any) -> Tensor:
    """Mean of the last states over the tokens of each text, of unit length, (N, D)."""
    model = loads.from_pretrained(directory, dtype=torch.float32).eval()
    found: dict[int, Tensor] = {}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=options.context_length,
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = model(**batch)[0]
        mask = batch["attention_mask"][..., None]
        found.update(zip(rows, (states * mask).sum(1) / mask.sum(1), strict=True))
    return normalize(torch.stack([found[i] for i in range(len(texts))]).clone(), dim=-1)


def probe_accuracy(train_ND: Tensor, labels_N: Tensor, dev_MD: Tensor, classes_M: Tensor) -> float:
    """Share of rows that a logistic regression on frozen embeddings tells right, fitted on others."""
    weight = torch.zeros(train_ND.shape[1] + 1, 2, requires_grad=True)
    ones = torch.ones(len(train_ND), 1)
    inputs = torch.cat([train_ND, ones], dim=1)
    search = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = cross_entropy(inputs @ weight, labels_N) + PENALTY * weight[:-1].square().sum()
        value.backward()
        return value

    search.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        guessed = (dev_MD @ weight[:-1] + weight[-1]).argmax(-1)
    return float((guessed == classes_M).double().mean())


def table(path: Path, most: int) -> tuple[list[str], Tensor]:
    """Sentences and labels of the last ``most`` rows, which are apart from the first that training reads."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[-most:]
    (column,) = (name for name in rows[0] if name != "label")
    return [row[column] for row in rows], torch.tensor([int(row["label"]) for row in rows])


def last_columns(paths: Sequence[Path]) -> list[str]:
    """The last column of each line of tables without a header."""
    return [
        line.rpartition("\t")[2] for path in paths for line in path.read_text(encoding="utf-8").splitlines()
    ]


def examined(models: dict[str, Path], options: Any) -> dict[str, dict[str, Any]]:
    """What each model makes of the held-out sentences, and how well its embeddings serve a probe."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, dev = table(options.train, options.probe_rows), table(options.dev, 1 << 30)
    held_out = last_columns(options.held_out)
    texts = [*train[0], *dev[0], *held_out]
    sizes = [len(train[0]), len(dev[0]), len(held_out)]
    values: dict[str, dict[str, Any]] = {}
    teachers: Tensor | None = None
    for name, directory in models.items():
        for_train, for_dev, for_held_out = embedded(directory, texts, tokenizer, options).split(sizes)
        teachers = for_held_out if teachers is None else teachers
        cosines = cosine_similarity(for_held_out, teachers, dim=-1).tolist()
        model, told = loads.from_pretrained(directory, output_loading_info=True)
        values[name] = {
            "cosine_to_teacher": mean(cosines),
            "cosine_to_teacher_quartiles": quantiles(cosines, n=4),
            "probe_accuracy": probe_accuracy(for_train, train[1], for_dev, dev[1]),
            "parameters": model.num_parameters(),
            "weights_bytes": file_bytes(directory)["weights_bytes"],
            "missing_keys": sorted(told["missing_keys"]),
            "unexpected_keys": sorted(told["unexpected_keys"]),
        }
        print(name, json.dumps(values[name], indent=1), flush=True)
    values["counts"] = {"probe_rows": sizes[0], "dev_rows": sizes[1], "held_out_sentences": sizes[2]}
    return values


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="An encoder cut to half of its blocks and taught.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--documents", type=int, default=20_000, help="sentences that training reads")
    parser.add_argument("--probe-rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--context-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--pairwise", type=float, default=1.0, help="weight of pairs")
    parser.add_argument("--relation", type=float, default=0.5, help="weight of relations; 0 for none")
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--checkpoint-every", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where models are left, or are found from a run before")
    return parser.parse_args()


def main() -> None:
    """Run it for one encoder and append a record."""
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        models, told = made(options.keep or Path(scratch), options)
        values = examined(models, options)
        for name, found in told.items():
            values[name] |= found
    settings = settings_of(options, ("model", "train", "dev", "held_out", "keep"))
    subject = "all-MiniLM-L6-v2" if options.model.name == "model" else options.model.name
    print(append_record("encoder", values, subject=subject, settings=settings, repetitions=1))


if __name__ == "__main__":
    main()
