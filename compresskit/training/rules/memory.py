"""What does not combine: what saves memory. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule
from compresskit.training.setting import Setting

NOISE = "noise"
ADAPTS = ("none", "memory", NOISE)
COUNT = ("qat", "sparse_train")
"""Kinds of stages whose layers observe, or move masks, by the number of passes."""


def _grows(s: Setting) -> bool:
    return s.fields.adapt_batch == NOISE


RULES: tuple[Rule, ...] = (
    Rule(
        "adapt-batch-name",
        "adapt_batch",
        lambda s: s.fields.adapt_batch not in ADAPTS,
        " or ".join(ADAPTS),
        "{adapt_batch!r}",
        "Choose one of these.",
    ),
    Rule(
        "adapt-batch-engine",
        "adapt_batch",
        lambda s: (
            s.fields.adapt_batch == "memory"
            and (
                s.strategy not in ("single", "ddp")
                or s.fields.pipeline_stages > 1
                or s.fields.synchronise != "every_step"
                or getattr(getattr(s.fields, "teacher_placement", None), "method", "") == "shard"
            )
        ),
        "none where ranks exchange weights or states in the middle of a pass, or step alone",
        "{adapt_batch}, for which all of them must be able to break a pass off",
        "Set micro_batch_size to what fits, or use strategy ddp alone.",
    ),
    Rule(
        "adapt-batch-counts",
        "adapt_batch",
        lambda s: s.fields.adapt_batch in ADAPTS[1:] and getattr(s.fields, "kind", "") in COUNT,
        "none in a stage whose layers count the passes of a step",
        "{adapt_batch}",
        "Leave adapt_batch out; finetune, distill and qlora can adapt it.",
    ),
    Rule(
        "adapt-batch-noise-engine",
        "adapt_batch",
        lambda s: (
            _grows(s)
            and (
                s.strategy not in ("single", "ddp", "fsdp")
                or s.on_mesh
                or s.fields.pipeline_stages > 1
                or s.fields.synchronise != "every_step"
            )
        ),
        "none, or memory, where the gradient of one pass on one rank is never whole",
        "{adapt_batch} with strategy {strategy}",
        "Use one process, or strategy ddp or fsdp, without replicas, tensor_parallel, pipeline_stages and "
        "synchronise.",
    ),
    Rule(
        "adapt-batch-noise-passes",
        "micro_batch_size",
        lambda s: _grows(s) and s.fields.batch_size < 2 * s.micro_batch_size,
        "at most half of batch_size={batch_size}: noise is measured between passes of a step",
        "{micro_batch_size}",
        "Set micro_batch_size to half of batch_size / processes, or less.",
    ),
    Rule(
        "adapt-batch-largest",
        "largest_batch_size",
        lambda s: _grows(s) and (s.fields.largest_batch_size or 0) < 2 * s.fields.batch_size,
        "at least twice batch_size={batch_size}, which adapt_batch noise begins with",
        "{largest_batch_size}",
        "Set largest_batch_size to what the steps at the end may have.",
    ),
    Rule(
        "largest-batch-without-noise",
        "largest_batch_size",
        lambda s: not _grows(s) and s.fields.largest_batch_size is not None,
        "none without adapt_batch noise",
        "{largest_batch_size}",
        "Set adapt_batch to noise, or leave largest_batch_size out.",
    ),
    Rule(
        "adapt-batch-sentences",
        "adapt_batch",
        lambda s: s.fields.adapt_batch == "memory" and s.fields.learns_sentences,
        "none where sentences of one pass are compared with each other",
        "{adapt_batch}",
        "Set micro_batch_size to what fits.",
    ),
    Rule(
        "offload-split-layers",
        "offload_activations",
        lambda s: s.fields.offload_activations and s.fields.tensor_parallel > 1,
        "false beside tensor_parallel, whose layers keep parts that are not moved",
        "true",
        "Use activation_checkpointing, or strategy fsdp without tensor_parallel.",
    ),
    Rule(
        "checkpoint-part-of-nothing",
        "activation_checkpointing",
        lambda s: (
            not s.fields.activation_checkpointing
            and (s.fields.checkpoint_blocks > 1 or s.fields.checkpoint_operators)
        ),
        "true beside checkpoint_blocks or checkpoint_operators",
        "false",
        "Set activation_checkpointing to true, or leave the other fields out.",
    ),
    Rule(
        "checkpoint-blocks-qat",
        "checkpoint_blocks",
        lambda s: (
            getattr(s.fields, "kind", "") == "qat"
            and s.fields.activation_checkpointing
            and s.fields.checkpoint_blocks != 1
        ),
        "1 in qat, whose observers count the passes of all layers alike",
        "{checkpoint_blocks}",
        "Leave checkpoint_blocks out, or set checkpoint_operators.",
    ),
)
