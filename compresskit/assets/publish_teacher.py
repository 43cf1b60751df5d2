"""Write the trained teacher into the package: ``python -m compresskit.assets.publish_teacher --run DIR``.

Reads what ``train_teacher`` left in DIR, casts the weights to bfloat16, scores the result on the
held-out files and writes ``compresskit/assets/teacher``.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compresskit.assets import teacher_path
from compresskit.assets.curve import loss_svg, loss_table, thinned
from compresskit.assets.score import Score, gzip_bits_per_byte, score
from compresskit.assets.teacher_model import CONTEXT, new_teacher
from compresskit.data.corpus import documents
from compresskit.data.spec import DataSpec

OVERLAP = 128
TABLE_MARK = "decoding_table"  # of a character table under encodings/, near copies of which are trained on
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # the name in every release of transformers

CARD = Path(__file__).parent / "teacher_card.md"


def _trained(run: Path, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = new_teacher(tokenizer)
    missing, unexpected = model.load_state_dict(load_file(run / "weights.safetensors"), strict=False)
    if list(missing) not in ([], ["lm_head.weight"]) or unexpected:
        raise ValueError(f"{run} holds other weights: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.bfloat16()


def _write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    facts["tokenizer_class"] = TOKENIZER_CLASS
    (out / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)


def _scores(out: Path) -> tuple[Score, dict[str, float]]:
    texts = list(documents(DataSpec(), "validation"))
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)

    def scored(some: list[str]) -> Score:
        return score(model, tokenizer, some, context=CONTEXT, overlap=OVERLAP)

    prose = [text for text in texts if TABLE_MARK not in text]
    whole, without_tables = scored(texts), scored(prose)
    return whole, {
        "model_bits_per_byte": whole.bits_per_byte,
        "gzip_9_bits_per_byte": gzip_bits_per_byte(texts),
        "gzip_9_together_bits_per_byte": gzip_bits_per_byte(texts, together=True),
        "without_tables_num_bytes": without_tables.num_bytes,
        "without_tables_model_bits_per_byte": without_tables.bits_per_byte,
        "without_tables_gzip_9_bits_per_byte": gzip_bits_per_byte(prose),
        "without_tables_gzip_9_together_bits_per_byte": gzip_bits_per_byte(prose, together=True),
    }


def publish(run: Path, out: Path, python: str) -> None:
    """Write the teacher, its scores, its loss curve and its README into ``out``.

    Args:
        run: folder of ``train_teacher``.
        out: folder to write; files of the same name are replaced.
        python: version of the Python whose library it was trained on, for the README.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    model = _trained(run, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    _write_model(model, tokenizer, out)
    ours, figures = _scores(out)
    outcome: dict[str, Any] = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    lines = (run / "run" / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    held_out = {
        "documents": ours.documents,
        "num_bytes": ours.num_bytes,
        "num_tokens": ours.num_tokens,
        "nats_per_token": ours.nats_per_token,
        "overlap_tokens": OVERLAP,
        **figures,
    }
    curve = {"training": outcome, "held_out": held_out, "curve": thinned(records)}
    (out / "loss_curve.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    (out / "loss_curve.svg").write_text(loss_svg(records), encoding="utf-8")
    seconds = sum(_seconds(records))
    text = CARD.read_text(encoding="utf-8").format(
        parameters=model.num_parameters(),
        weight_bytes=(out / "model.safetensors").stat().st_size,
        context=CONTEXT,
        vocabulary=len(tokenizer),
        python=python,
        documents=outcome["training_documents"],
        tokens=outcome["training_tokens"],
        learning_rate=outcome["learning_rate"],
        warmup=outcome["warmup_fraction"],
        weight_decay=outcome["weight_decay"],
        batch_size=outcome["batch_size"],
        steps=outcome["steps"],
        seen=outcome["steps"] * outcome["batch_size"] * CONTEXT / 1e6,
        epochs=outcome["steps"] * outcome["batch_size"] * CONTEXT / outcome["training_tokens"],
        precision={"bf16": "bfloat16", "fp32": "float32"}[outcome["precision"]],
        minutes=seconds / 60,
        torch=outcome["torch"],
        table=loss_table(records),
        held_documents=ours.documents,
        held_bytes=ours.num_bytes,
        held_tokens=ours.num_tokens,
        overlap=OVERLAP,
        nats=ours.nats_per_token,
        **figures,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _seconds(records: list[dict[str, Any]]) -> list[float]:
    """The duration of each start of the run: the clock begins anew after a restart."""
    clock = [r["seconds"] for r in records if "seconds" in r]
    ends = [a for a, b in pairwise(clock) if b < a]
    return [*ends, *clock[-1:]]


def main() -> None:
    """Read the command line and publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=teacher_path())
    parser.add_argument("--python", default="3.11", help="version whose library was the corpus")
    given = parser.parse_args()
    publish(given.run, given.out, given.python)


if __name__ == "__main__":
    main()
