"""How far what a cache gives back is from what the teacher says, on some of the rows.

Shapes: B = rows, T = tokens of a row, C = tokens of a chunk, V = vocabulary, O = outcomes of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresskit.distill.cache.keep import Keep, layer_out, told
from compresskit.distill.cache.rows import Roll, row_hashes
from compresskit.distill.cache.store import Store
from compresskit.distill.divergences import target_of
from compresskit.kernels.reference.linear_divergence import LEAST_LOG, Outcomes
from compresskit.training.objective import Hidden, TeacherProvider
from compresskit.training.order import stack

SAMPLE_ROWS = 32
SAMPLE_TOKENS = 4096


def faithfulness(
    store: Store, roll: Roll, keep: Keep, teacher: TeacherProvider, device: torch.device
) -> dict[str, Any]:
    """Compare the cache with the teacher on rows spread evenly over it.

    Returns:
        ``tokens`` compared; means over them: ``entries`` kept of one, ``kept_mass``, the probability of the
        ids that are kept, ``total_variation`` from the teacher's distribution, and ``kl``, KL(teacher ||
        cache) in nats, where the probability of all other ids is spread evenly over them; None where the
        cache gives such ids no probability at all.
    """
    sums, temperature = torch.zeros(4, dtype=torch.float64), float(getattr(keep, "temperature", 1.0))
    places = np.unique(np.linspace(0, len(roll) - 1, SAMPLE_ROWS).astype(int))
    tokens = 0
    for place in places.tolist():
        batch = {name: tensor.to(device) for name, tensor in stack([roll.row(place)]).items()}
        labels_BT = batch["labels"]
        live = teacher.signal(batch).says
        assert isinstance(live, Hidden)
        says = keep.says(store.read(row_hashes(batch)), layer_out(labels_BT), live.head)
        truth, given = (target_of(said, labels_BT) for said in (live, says))
        count = int(roll.tokens_R[place])
        both = (told(target, count, temperature, device.type) for target in (truth, given))
        for true, kept in zip(*both, strict=True):
            sums += _compared(true, kept)
        tokens += count
        if tokens >= SAMPLE_TOKENS:
            break
    entries, mass, variation, kl = (sums / tokens).tolist()
    return {
        "tokens": tokens,
        "entries": entries,
        "kept_mass": mass,
        "total_variation": variation,
        "kl": kl if np.isfinite(kl) else None,
    }


def _compared(truth: Outcomes, given: Outcomes) -> Tensor:
    """Sums over tokens of the four means of :func:`faithfulness`."""
    p_CV = truth.log_p_CO.exp()
    if given.ids_CK is None:
        entries, mass, given_CV = float(p_CV.numel()), float(p_CV.sum()), given.log_p_CO.exp()
        log_given_CV = given.log_p_CO
    else:
        known_CK = given.log_p_CO[:, : given.ids_CK.shape[1]] > LEAST_LOG
        entries = float(known_CK.sum())
        mass = float((p_CV.gather(-1, given.ids_CK) * known_CK).sum())
        given_CV = _spread(given, given.ids_CK, known_CK, p_CV.shape[1])
        log_given_CV = given_CV.log()
    kl = torch.where(p_CV > 0, p_CV * (truth.log_p_CO - log_given_CV), 0.0).sum()
    variation = (p_CV - given_CV).abs().sum() / 2
    return torch.tensor([entries, mass, float(variation), float(kl)], dtype=torch.float64)


def _spread(given: Outcomes, ids_CK: Tensor, known_CK: Tensor, vocabulary: int) -> Tensor:
    """Probabilities of all ids (C, V), of those that are not listed alike."""
    listed_CK = given.log_p_CO[:, : ids_CK.shape[1]].exp() * known_CK
    if not given.has_rest:
        return listed_CK.new_zeros(len(ids_CK), vocabulary).scatter_add_(-1, ids_CK, listed_CK)
    each_C1 = given.log_p_CO[:, -1:].exp() / max(vocabulary - ids_CK.shape[1], 1)
    return each_C1.repeat(1, vocabulary).scatter_(-1, ids_CK, listed_CK)
