"""Which scheme each layer gets when a number of bits is all that was asked for.

Each layer alone is rounded to each candidate, and what the model then says is compared with what it said:
the Kullback-Leibler divergence, in nats per token, is the loss increase on text that the model predicts as
well as it can be predicted. From the least bits on, those bytes are bought first that save the most of it.

Paper: Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", ICCV 2019,
https://arxiv.org/abs/1905.03696, orders layers by sensitivity; here it is measured instead of approximated.

Shapes: T = tokens, V = vocabulary, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compresskit.calibration.sensitivity import Change
from compresskit.errors import Fault, SchemeError
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import Scheme, parse

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.quant.known import Known

Costs = Mapping[str, Mapping[Scheme, float]]
"""Layer -> candidate -> nats per token."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen, and what it was chosen by.

    Attributes:
        schemes: layer -> scheme.
        costs: what rounding each layer alone costs; 0, unmeasured, where it had no choice.
        bits: of a stored weight on average, scales included.
    """

    schemes: Mapping[str, Scheme]
    costs: Costs
    bits: float

    def __str__(self) -> str:
        """How many layers got each scheme: ``9 x w4a16-g128, 5 x w8a16: 5.31 bits``."""
        counts: dict[str, int] = {}
        for scheme in self.schemes.values():
            counts[str(scheme)] = counts.get(str(scheme), 0) + 1
        text = ", ".join(f"{count} x {scheme}" for scheme, count in sorted(counts.items()))
        return f"{text}: {self.bits:.2f} bits"


def candidate_faults(candidates: Sequence[str], target_bits: float | None, where: str) -> list[Fault]:
    """What is wrong with candidates and target, whatever the model."""
    place = f"{where}.candidates"
    faults: list[Fault] = []
    for text in candidates:
        if "," in text:
            cure = "Name each scheme by itself: on the command line, repeat the option."
            faults.append(Fault(place, "one scheme in each entry", repr(text), cure))
            continue
        try:
            scheme = parse(text, where=place)
        except SchemeError as error:
            faults += [fault for fault in error.faults if isinstance(fault, Fault)]
            continue
        if scheme.number == "nf4" or not scheme.symmetric:
            cure = "Choose among symmetric schemes, such as w4a16-g128 and w8a16."
            faults.append(Fault(place, "schemes that go together", text, cure))
        elif scheme.activation_bits:
            expected = "schemes that leave inputs alone, as what rounding those costs is not measured"
            cure = f"Name {text} as scheme, or in overrides, instead of among the candidates."
            faults.append(Fault(place, expected, text, cure))
    if not faults and len(candidates) < 2:
        cure = "Give two or more, or name the one as scheme."
        faults.append(Fault(place, "at least two schemes", str(len(candidates)), cure))
    if target_bits is not None and not 0 < target_bits <= 16:
        cure = "Give a number such as 4.5."
        faults.append(Fault(f"{where}.target_bits", "more than 0 and at most 16", str(target_bits), cure))
    return faults


def possible_faults(
    possible: Mapping[str, Sequence[Scheme]], known: Known, target_bits: float, where: str
) -> list[Fault]:
    """What keeps ``auto`` from choosing among what is ``possible`` for each layer.

    Args:
        possible: layer -> schemes; none where no candidate fits.
        known: of the model.
        target_bits: at most so many on average.
        where: prefix of each fault.

    Returns:
        A model without logits; the layers that nothing fits, all named, or else a target that is too low.
    """
    linears, faults = known.anatomy.linears, []
    if known.anatomy.head is None:
        cure = "Name a scheme instead of auto."
        faults.append(Fault(f"{where}.scheme", "a model with logits, for auto to compare", "none", cure))
    if lost := [f"{n} ({linears[n].in_features})" for n, schemes in possible.items() if not schemes]:
        got = f"in_features of {', '.join(lost)}"
        cure = "Add a candidate with a smaller group or none, such as w8a16, or add the layers to ignore."
        return [*faults, Fault(f"{where}.candidates", "a candidate that fits each layer", got, cure)]
    return faults + budget_faults(least_bits(known.anatomy, possible, known.scale_bits), target_bits, where)


def budget_faults(least_bits: float, target_bits: float, where: str) -> list[Fault]:
    """What is wrong with a target where the smallest candidates already take ``least_bits`` on average."""
    if least_bits <= target_bits:
        return []
    cure = f"Raise target_bits to at least {least_bits:.2f}, or add a candidate of fewer bits."
    got = f"{least_bits:.2f} with the smallest scheme of each layer"
    return [Fault(f"{where}.target_bits", f"at most {target_bits:g} bits", got, cure)]


def least_bits(anatomy: Anatomy, fits: Mapping[str, Sequence[Scheme]], scale_bits: int) -> float:
    """Bits of a stored weight on average where each layer gets the smallest scheme that fits it."""
    total = weights = 0.0
    for layer, schemes in fits.items():
        linear = anatomy.linears[layer]
        size = linear.out_features * linear.in_features
        total += size * min(s.bits_per_weight(linear.in_features, scale_bits) for s in schemes)
        weights += size
    return total / weights


def choose(
    costs: Costs, sizes: Mapping[str, tuple[int, int]], target_bits: float, scale_bits: int, *, where: str
) -> Chosen:
    """The schemes whose costs add up to the least that the greedy order finds within ``target_bits``.

    Args:
        costs: of every layer, for every candidate that fits it.
        sizes: layer -> (out_features, in_features).
        target_bits: at most so many on average over all weights of the layers.
        scale_bits: of the model's dtype: 16 or 32.
        where: the stage, to name in an error.

    Raises:
        SchemeError: the least bits are more than the target.
    """

    def bits_of(layer: str, scheme: Scheme) -> float:
        rows, inputs = sizes[layer]
        return rows * inputs * scheme.bits_per_weight(inputs, scale_bits)

    chosen = {n: min(of, key=lambda s, n=n: (bits_of(n, s), of[s])) for n, of in costs.items()}  # type: ignore[misc]
    spent = sum(bits_of(n, scheme) for n, scheme in chosen.items())
    weights = sum(rows * inputs for rows, inputs in sizes.values())
    if faults := budget_faults(spent / weights, target_bits, where):
        raise SchemeError(*faults)
    while True:
        steps = []
        for layer, scheme in chosen.items():
            for better, cost in costs[layer].items():
                saved, added = costs[layer][scheme] - cost, bits_of(layer, better) - bits_of(layer, scheme)
                if saved > 0 and added > 0 and spent + added <= target_bits * weights:
                    steps.append((saved / added, layer, better, added))
        if not steps:
            return Chosen(chosen, costs, spent / weights)
        _, layer, better, added = max(steps, key=lambda step: step[0])
        chosen[layer] = better
        spent += added


def rounding(dtypes: Mapping[str, torch.dtype]) -> Change[Scheme]:
    """The change that rounds a layer to a scheme.

    Args:
        dtypes: layer -> the type its weight is stored in, which rounds its scales.
    """

    def rounded(layer: str, weight_OI: Tensor, scheme: Scheme) -> Tensor:
        exact_OI = weight_OI.to(dtypes[layer])
        return grid_for(exact_OI, scheme).snap(exact_OI)

    return Change("rounding", "roundings", lambda layer, scheme: f"{scheme} of {dtypes[layer]}", rounded)
