"""Make and train the bundled teacher: ``python -m compresskit.assets.train_teacher --out DIR --steps N``.

One run makes the tokenizer, the rows and the weights from the training split of the ``stdlib:``
corpus, with the same loop as every stage that trains. Started again after a kill it goes on at the
last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compresskit.assets.teacher_model import (
    BOS,
    CONTEXT,
    EOS,
    add_special_tokens,
    new_teacher,
    train_tokenizer,
)
from compresskit.data.corpus import documents
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec
from compresskit.training.fields import TrainingFields
from compresskit.training.run import Run

SEED = 0


def teacher_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``out / "tokenizer"``, trained on the training split where it is not there yet."""
    folder = out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(documents(DataSpec(), "train")).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def with_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which also puts EOS after a text: for the rows of the training."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    add_special_tokens(core, end=True)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token=BOS, eos_token=EOS
    )


def train(out: Path, fields: TrainingFields) -> None:
    """Train the teacher; writes ``out / "weights.safetensors"`` (float32) and ``out / "outcome.json"``.

    Args:
        out: working folder: tokenizer, token cache, checkpoints, loss log.
        fields: how to train.
    """
    tokenizer = teacher_tokenizer(out)
    rows = {
        split: packed(
            DataSpec(), with_end(tokenizer), split=split, context_length=CONTEXT, cache=out / "cache"
        )
        for split in ("train", "validation")
    }
    model: LlamaForCausalLM = new_teacher(tokenizer, seed=SEED)

    def save(tensors: Mapping[str, Tensor]) -> None:
        tied = {"lm_head.weight"}  # one tensor with the embedding; transformers ties it again
        whole = {name: t.contiguous() for name, t in tensors.items() if name not in tied}
        save_file(whole, out / "weights.safetensors", metadata={"format": "pt"})

    outcome = Run(
        model,
        rows["train"],
        fields=fields,
        scratch=out / "run",
        validation=rows["validation"],
        seed=SEED,
        device="cpu",
        save=save,
        title="Training the teacher",
    ).train()
    facts = {
        "steps": outcome.steps,
        "first_loss_nats_per_token": outcome.first_loss,
        "final_loss_nats_per_token": outcome.final_loss,
        "validation_loss_nats_per_token": outcome.validation_loss,
        "training_tokens": rows["train"].num_tokens,
        "training_documents": rows["train"].num_documents,
        "batch_size": fields.batch_size,
        "learning_rate": fields.learning_rate,
        "weight_decay": fields.weight_decay,
        "warmup_fraction": fields.warmup_fraction,
        "precision": fields.precision,
        "torch": str(torch.__version__),
    }
    (out / "outcome.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--eval-every", type=int, default=200)
    given = parser.parse_args()
    fields = TrainingFields(
        steps=given.steps,
        learning_rate=given.learning_rate,
        batch_size=16,
        micro_batch_size=given.micro_batch_size,
        context_length=CONTEXT,
        warmup_fraction=0.05,
        lr_schedule="cosine",
        weight_decay=0.1,
        max_grad_norm=1.0,
        precision=given.precision,
        eval_every=given.eval_every,
        checkpoint_every=50,
    )
    train(given.out, fields)


if __name__ == "__main__":
    main()
