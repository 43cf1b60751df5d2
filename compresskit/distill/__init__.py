"""Distillation: what a student learns from a teacher. One loss a file; these tables are the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.distill.base import DistillLoss, FeatureLoss
    from compresskit.distill.sentence_base import SentenceLoss

LOSSES: Registry[DistillLoss] = Registry(
    "distillation loss",
    {
        "forward_kl": "compresskit.distill.forward_kl:ForwardKL",
        "reverse_kl": "compresskit.distill.reverse_kl:ReverseKL",
        "skewed_kl": "compresskit.distill.skewed_kl:SkewedKL",
        "skewed_reverse_kl": "compresskit.distill.skewed_kl:SkewedReverseKL",
        "jsd": "compresskit.distill.jsd:JSD",
        "total_variation": "compresskit.distill.total_variation:TotalVariation",
        "adaptive_kl": "compresskit.distill.adaptive_kl:AdaptiveKL",
        "taid": "compresskit.distill.taid:TAID",
        "uld": "compresskit.distill.uld:ULD",
    },
)

# What may be added to any of these: how far blocks are from the teacher's, in
# what they give or in what their attention is given.
FEATURE_LOSSES: Registry[FeatureLoss] = Registry(
    "feature loss",
    {
        "squarehead": "compresskit.distill.squarehead:SquareHead",
        "hidden_mse": "compresskit.distill.hidden_mse:HiddenMSE",
        "hidden_cosine": "compresskit.distill.hidden_cosine:HiddenCosine",
        "relation": "compresskit.distill.relation:Relation",
    },
)

# What a model without a next-token head learns instead: of a sentence's embedding, or of its class.
SENTENCE_LOSSES: Registry[SentenceLoss] = Registry(
    "sentence loss",
    {
        "embedding_cosine": "compresskit.distill.embedding_cosine:EmbeddingCosine",
        "embedding_mse": "compresskit.distill.embedding_mse:EmbeddingMSE",
        "pairwise": "compresskit.distill.pairwise:Pairwise",
        "class_logits": "compresskit.distill.class_logits:ClassLogits",
    },
)
