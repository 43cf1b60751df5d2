"""What does not combine: copies of shards, and layers that are split among ranks. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule, swaps_layers
from compresskit.training.setting import Setting

INSTEAD = "Use strategy fsdp without tensor_parallel; replicas may be above 1."


def _splits(s: Setting) -> bool:
    return s.fields.tensor_parallel > 1


def _uneven(s: Setting) -> bool:
    """Whether FSDP's ranks do not fill a mesh, or nothing would be left to shard."""
    each = s.fields.replicas * s.fields.tensor_parallel
    return each > 1 and (s.processes % each != 0 or s.processes < 2 * each)


RULES: tuple[Rule, ...] = (
    Rule(
        "replicas-strategy",
        "replicas",
        lambda s: s.fields.replicas > 1 and s.fields.strategy != "fsdp",
        "strategy fsdp beside replicas",
        "strategy {strategy}",
        "Set strategy to fsdp, or replicas to 1; strategy ddp keeps a whole copy in every process.",
    ),
    Rule(
        "tensor-strategy",
        "tensor_parallel",
        lambda s: _splits(s) and s.fields.strategy not in ("fsdp", "tp"),
        "strategy tp or fsdp beside tensor_parallel",
        "strategy {strategy}",
        "Set strategy to tp if all processes are to split layers, to fsdp if some; or tensor_parallel to 1.",
    ),
    Rule(
        "tensor-is-all",
        "tensor_parallel",
        lambda s: s.fields.strategy == "tp" and s.fields.tensor_parallel != s.processes > 1,
        "tensor_parallel={processes}, the number of processes, with strategy tp",
        "{tensor_parallel}",
        "Set tensor_parallel to the number of processes, or strategy to fsdp.",
    ),
    Rule(
        "mesh-divides",
        "processes",
        lambda s: s.fields.strategy == "fsdp" and _uneven(s),
        "2 or more times replicas x tensor_parallel with strategy fsdp",
        "{processes} processes for replicas={replicas} and tensor_parallel={tensor_parallel}",
        "Change processes (--nproc), replicas or tensor_parallel; strategy tp splits layers alone.",
    ),
    Rule(
        "tensor-swapped-layers",
        "tensor_parallel",
        lambda s: _splits(s) and swaps_layers(s),
        "1 in a stage whose layers compute with rounded, frozen or masked weights",
        "{tensor_parallel}",
        INSTEAD,
    ),
    Rule(
        "tensor-matmul",
        "tensor_parallel",
        lambda s: _splits(s) and (s.fields.matmul != "float" or s.fields.precision == "fp8"),
        "1 beside matmul {matmul} and precision {precision}: products in 8 bits scale whole rows of a weight",
        "{tensor_parallel}",
        "Use matmul float and precision bf16, or strategy fsdp without tensor_parallel.",
    ),
    Rule(
        "tensor-on-policy",
        "tensor_parallel",
        lambda s: _splits(s) and getattr(s.fields, "on_policy", None) is not None,
        "1 beside on_policy: ranks that split layers would have to say the same",
        "{tensor_parallel}",
        INSTEAD,
    ),
    Rule(
        "tensor-sentences",
        "tensor_parallel",
        lambda s: _splits(s) and s.fields.learns_sentences,
        "1 where rows are sentences",
        "{tensor_parallel}",
        INSTEAD,
    ),
)
