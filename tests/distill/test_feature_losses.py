"""Feature losses against loops over tokens in float64, and which blocks they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresskit.distill import FEATURE_LOSSES
from compresskit.distill.features import WithFeatures
from compresskit.distill.mapping import mapping_faults, paired
from compresskit.modeling.attention import Attended
from compresskit.training.features import OUTPUT, Counted, Featured, Looks
from compresskit.training.objective import CrossEntropy, Head

B, T, D, E = 3, 7, 5, 8
OF_OUTPUTS = [name for name in FEATURE_LOSSES if FEATURE_LOSSES[name].takes == OUTPUT]
CROSS_ENTROPY = {"target": "compresskit.training.objective:CrossEntropy", "options": {}}


def squarehead(mine: list[float], theirs: list[float]) -> float:
    square = sum(t * t for t in theirs) / len(theirs)
    return sum((s - t) ** 2 for s, t in zip(mine, theirs, strict=True)) / len(theirs) / square


def hidden_mse(mine: list[float], theirs: list[float]) -> float:
    return sum((s - t) ** 2 for s, t in zip(mine, theirs, strict=True)) / len(theirs)


def hidden_cosine(mine: list[float], theirs: list[float]) -> float:
    dot = sum(s * t for s, t in zip(mine, theirs, strict=True))
    return 1 - dot / math.sqrt(sum(s * s for s in mine)) / math.sqrt(sum(t * t for t in theirs))


ORACLES: dict[str, Callable[[list[float], list[float]], float]] = {
    "squarehead": squarehead,
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels() -> Tensor:
    labels = torch.randint(0, 19, (B, T), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = -100
    labels[2, 3] = -100
    return labels


def counting(labels: Tensor) -> Counted:
    """Rows of one document each."""
    return Counted.of_text(labels, torch.arange(labels.shape[1]).expand(labels.shape))


def with_features(method: str, blocks: int = 2, **changes: Any) -> WithFeatures:
    pairs = [(i, i) for i in range(blocks)]
    return WithFeatures(objective=CROSS_ENTROPY, features=[{"method": method, "pairs": pairs}], **changes)


def total(loss: WithFeatures, mine: Sequence[Any], theirs: Sequence[Any], counted: Counted) -> Tensor:
    """What is added to the other loss."""
    return loss.feature_losses(mine, theirs, counted, {})[0]


@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_equals_a_loop_over_tokens(name: str) -> None:
    """Mean over blocks of sums over the tokens that predict a label; the rest does not count at all."""
    labels = some_labels()
    mine = [randn(B, T, E, seed=i).requires_grad_() for i in (1, 2)]
    theirs = [randn(B, T, E, seed=i) for i in (3, 4)]
    got = total(with_features(name), mine, theirs, counting(labels))
    true = 0.0
    for s, t in zip(mine, theirs, strict=True):
        for row in range(B):
            for at in range(T - 1):
                if labels[row, at + 1] != -100:
                    true += ORACLES[name](s[row, at].tolist(), t[row, at].tolist()) / len(mine)
    assert got.item() == pytest.approx(true, rel=1e-12)
    for gradient in torch.autograd.grad(got, mine):
        counted = torch.zeros(B, T, dtype=torch.bool)
        counted[:, :-1] = labels[:, 1:] != -100
        assert torch.equal(gradient.abs().sum(-1) > 0, counted)


@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_gradients_are_the_formulas(name: str) -> None:
    labels, theirs = some_labels(), (randn(B, T, E, seed=5),)
    loss = with_features(name, blocks=1)
    mine = randn(B, T, E, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: total(loss, (s,), theirs, counting(labels)), (mine,))


@pytest.mark.parametrize("name", OF_OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contract_of_every_feature_loss(name: str, dtype: torch.dtype) -> None:
    """A number for each token, zero for equal states, nothing changed, the same twice, strides no matter."""
    loss = FEATURE_LOSSES[name]()
    assert loss.weight == 1.0
    mine, theirs = randn(B, T, E, seed=7, dtype=dtype), randn(B, T, E, seed=8, dtype=dtype)
    before = [mine.clone(), theirs.clone()]
    got = loss(mine, theirs)
    assert got.shape == (B, T)
    assert (got > 0).all()
    assert torch.equal(got, loss(mine, theirs))
    assert all(torch.equal(a, b) for a, b in zip(before, (mine, theirs), strict=True))
    turned = loss(mine.transpose(0, 1).contiguous().transpose(0, 1), theirs)
    torch.testing.assert_close(turned, got)
    assert loss(mine, mine).abs().max() < (1e-12 if dtype == torch.float64 else 2e-2)
    zeros = torch.zeros_like(mine)
    assert loss(zeros, zeros).isfinite().all()
    assert loss(mine, zeros).isfinite().all()


def test_squarehead_is_a_share_of_the_teachers_state() -> None:
    """So it does not change when both grow, as an MSE does; a student that says nothing has 1."""
    loss = FEATURE_LOSSES["squarehead"]()
    mine, theirs = randn(B, T, E, seed=1), randn(B, T, E, seed=2)
    torch.testing.assert_close(loss(1000 * mine, 1000 * theirs), loss(mine, theirs))
    torch.testing.assert_close(loss(0 * mine, theirs), torch.ones(B, T, dtype=torch.float64))


def test_narrow_states_are_compared_in_float32() -> None:
    """The square of 300 is infinite in fp16."""
    big = torch.full((1, 3, 4), 300.0, dtype=torch.float16)
    loss = with_features("hidden_mse", blocks=1)
    got = total(loss, (big,), (-big,), counting(torch.zeros(1, 3, dtype=torch.int64)))
    assert got.item() == 2 * 600.0**2


def test_a_batch_without_supervised_tokens_is_zero() -> None:
    mine = randn(B, T, E).requires_grad_()
    labels = torch.full((B, T), -100)
    theirs = randn(B, T, E, seed=1)
    loss = total(with_features("squarehead", blocks=1), (mine,), (theirs,), counting(labels))
    assert loss.item() == 0
    loss.backward()
    assert not mine.grad.any()


def test_the_other_loss_is_left_as_it_was() -> None:
    loss = with_features("squarehead")
    hidden, head, labels = randn(B, T, D), Head(randn(19, D, seed=1)), some_labels()
    assert torch.equal(
        loss(hidden, head, labels, None)["loss"], CrossEntropy()(hidden, head, labels, None)["loss"]
    )
    assert isinstance(loss, Featured)
    assert not isinstance(CrossEntropy(), Featured)


SEVERAL: list[dict[str, Any]] = [
    {"method": "squarehead", "options": {"weight": 0.5}, "pairs": [(0, 1), (2, 3)]},
    {"method": "relation", "options": {"weight": 3.0, "of": ["qq", "vv"]}, "pairs": [(2, 3), (1, 1)]},
    {"method": "hidden_cosine", "options": {"weight": 2.0}, "pairs": [(2, 1), (0, 1)]},
    {"method": "squarehead", "pairs": [(1, 0)]},
]
WEIGHTS = {"squarehead_1": 0.5, "relation": 3.0, "hidden_cosine": 2.0, "squarehead_2": 1.0}


def made_by(blocks: int, width: int, seed: int) -> tuple[list[Tensor], list[Attended]]:
    """Outputs of blocks, and what their attention is given, of heads of four."""
    outputs = [randn(B, T, width, seed=seed + i).requires_grad_() for i in range(blocks)]
    given = [
        Attended(*(randn(B, T, 2, 4, seed=seed + 10 * i + k).requires_grad_() for k in (100, 101, 102)))
        for i in range(blocks)
    ]
    return outputs, given


def seen(made: tuple[list[Tensor], list[Attended]], looks: Looks) -> list[Any]:
    """What of it is looked at, as a model in training or a teacher's signal gives it."""
    return [*(made[0][i] for i in looks.outputs), *(made[1][i] for i in looks.attended)]


def leaves(made: tuple[list[Tensor], list[Attended]]) -> list[Tensor]:
    return [*made[0], *(tensor for given in made[1] for tensor in given)]


def alone(
    one: dict[str, Any],
    mine: tuple[list[Tensor], list[Attended]],
    theirs: tuple[list[Tensor], list[Attended]],
    counted: Counted,
    maps: Mapping[str, nn.Module],
) -> Tensor:
    """One of the losses by itself, pair by pair, before its weight."""
    loss: Any = FEATURE_LOSSES[one["method"]](**one.get("options", {}))
    found = []
    for s, t in one["pairs"]:
        if loss.takes == OUTPUT:
            state = maps[f"{s}_{t}"](mine[0][s]) if maps else mine[0][s]
            found.append(counted.total(loss(state, theirs[0][t])))
        else:
            found.append(counted.total(loss(mine[1][s], theirs[1][t], counted.sees_BTT)))
    return torch.stack(found).mean()


@pytest.mark.parametrize("widths", [None, (D, E)], ids=["one width", "projected"])
def test_a_sum_is_the_weighted_sum_of_each_alone(widths: tuple[int, int] | None) -> None:
    """In its value, in the parts it names, and in the gradients of blocks and projections."""
    mine, theirs = made_by(3, D if widths else E, seed=20), made_by(4, E, seed=40)
    counted = counting(some_labels())
    several = WithFeatures(objective=CROSS_ENTROPY, features=SEVERAL, widths=widths)
    assert (several.looks, several.looks_at_teacher) == (Looks((0, 1, 2), (1, 2)), Looks((0, 1, 3), (1, 3)))
    maps = {name: module.double() for name, module in several.projections().items()}
    assert list(maps) == (["0_1", "2_3", "2_1", "1_0"] if widths else [])
    learnt = [*leaves(mine), *(module.weight for module in maps.values())]
    both = seen(mine, several.looks), seen(theirs, several.looks_at_teacher)
    got, parts = several.feature_losses(*both, counted, maps)
    found = torch.autograd.grad(got, learnt, allow_unused=True)
    value, gradients = torch.zeros((), dtype=torch.float64), [torch.zeros_like(leaf) for leaf in learnt]
    for name, one in zip(WEIGHTS, SEVERAL, strict=True):
        each = alone(one, mine, theirs, counted, maps)
        assert parts[name].item() == pytest.approx(each.item(), rel=1e-12)
        assert not parts[name].requires_grad
        value = value + WEIGHTS[name] * each.detach()
        for i, part in enumerate(torch.autograd.grad(each, learnt, allow_unused=True)):
            gradients[i] = gradients[i] + (0 if part is None else WEIGHTS[name] * part)
    assert list(parts) == list(WEIGHTS)
    assert got.item() == pytest.approx(value.item(), rel=1e-12)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in gradients[len(leaves(mine)) :])


def test_a_pair_that_several_compare_is_projected_once() -> None:
    features = [{"method": name, "pairs": [(0, 0)]} for name in OF_OUTPUTS]
    loss = WithFeatures(objective=CROSS_ENTROPY, features=features, widths=(D, E))
    maps, calls = {name: module.double() for name, module in loss.projections().items()}, []
    maps["0_0"].register_forward_hook(lambda *_: calls.append(1))
    loss.feature_losses([randn(B, T, D)], [randn(B, T, E)], counting(some_labels()), maps)
    assert (list(maps), len(calls)) == (["0_0"], 1)


def test_projections_are_made_for_other_widths_alone() -> None:
    assert with_features("hidden_mse").projections() == {}
    found = [with_features("hidden_mse", widths=[D, E]).projections() for _ in range(2)]
    assert [list(made) for made in found] == [["0_0", "1_1"]] * 2
    one, two = (list(made.values()) for made in found)
    assert [tuple(m.weight.shape) for m in one] == [(E, D), (E, D)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].weight, one[1].weight)


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 3, 6, [(0, 1), (1, 3), (2, 5)]),
        ("uniform", 2, 5, [(0, 2), (1, 4)]),
        ("uniform", 4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),
        ("uniform", 4, 1, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        ("last_2", 3, 6, [(1, 4), (2, 5)]),
        (((0, 1), (2, 5)), 3, 6, [(0, 1), (2, 5)]),
    ],
)
def test_which_blocks_are_compared(
    layers: Any, student: int, teacher: int, pairs: list[tuple[int, int]]
) -> None:
    assert mapping_faults(layers, student, teacher, "layers") == []
    assert list(paired(layers, student, teacher)) == pairs


@pytest.mark.parametrize("student", range(1, 9))
@pytest.mark.parametrize("teacher", range(1, 9))
def test_uniform_pairs_are_in_order_and_end_with_the_last(student: int, teacher: int) -> None:
    pairs = paired("uniform", student, teacher)
    assert [s for s, _ in pairs] == list(range(student))
    theirs = [t for _, t in pairs]
    assert theirs == sorted(theirs)
    assert theirs[-1] == teacher - 1
    assert theirs[0] >= 0
    for i, t in pairs:  # as far through the teacher as through the student, to half a block
        assert abs((t + 1) - (i + 1) * teacher / student) <= 0.5 or t == 0


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ("unifrom", "expected uniform, last_1 or a higher number, or pairs"),
        ("last_k", "expected uniform, last_1"),
        ("last_0", "expected a number from 1 to 3: the student has 3 blocks, the teacher 6, got last_0"),
        ("last_4", "expected a number from 1 to 3"),
        (3, "got 3"),
        ((), r"got \(\)"),
        (((0, "1"),), "expected uniform"),
        (((0, True),), "expected uniform"),
        (((0, 1, 2),), "expected uniform"),
        (((3, 1), (-1, 2)), "expected blocks of the student from 0 to 2, got -1, 3"),
        (((0, 6),), "expected blocks of the teacher from 0 to 5, got 6"),
    ],
)
def test_what_is_no_mapping_is_told(layers: Any, told: str) -> None:
    (fault,) = mapping_faults(layers, 3, 6, "features.layers")
    with pytest.raises(ValueError, match=told):
        raise ValueError(str(fault))
