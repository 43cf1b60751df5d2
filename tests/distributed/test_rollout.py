"""On-policy steps: which they are, what is generated, and what is learnt of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_engine import Counting, broken_off, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from compresskit.distill.divergences import Divergences
from compresskit.training.fields import TrainingFields
from compresskit.training.objective import Head, Hidden, Signal, head_of
from compresskit.training.outcome import TrainOutcome
from compresskit.training.rollout import (
    OfText,
    OnPolicy,
    Student,
    eos_ids,
    generate,
    on_policy_batches,
    prompts_of,
    sample,
    tokens_of,
)
from compresskit.training.run import Run

EOS = 2


def row(
    length: int, *, starts: tuple[int, ...] = (0,), learnt: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    """A row of ids that count from 10."""
    ids = torch.arange(10, 10 + length)
    positions = torch.arange(length)
    labels = ids.clone()
    for start in starts:
        positions[start:] = torch.arange(length - start)
        labels[start] = -100
    if learnt is not None:
        labels[[i for i in range(length) if i not in learnt]] = -100
    return {
        name: t[None] for name, t in (("input_ids", ids), ("position_ids", positions), ("labels", labels))
    }


def student(model: LlamaForCausalLM, eos: tuple[int, ...] = (EOS,)) -> Student:
    return Student(model.eval(), model, eos, "fp32")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.7, 1.0])
def test_the_share_of_steps_is_exact_and_even(fraction: float) -> None:
    policy = OnPolicy(fraction=fraction)
    for seed in range(5):
        due = [policy.is_due(step, seed) for step in range(200)]
        assert due == [policy.is_due(step, seed) for step in range(200)]
        for first in range(0, 190, 7):
            for count in (1, 10, 100):
                part = due[first : first + count]
                assert abs(sum(part) - fraction * len(part)) < 1
    half = [OnPolicy(fraction=0.5).is_due(step, 0) for step in range(6)]
    assert half in ([True, False] * 3, [False, True] * 3)
    assert len({tuple(OnPolicy(fraction=0.1).is_due(s, seed) for s in range(9)) for seed in range(20)}) > 3


def test_prompts_by_hand() -> None:
    policy = OnPolicy(max_new_tokens=4, prompt_fraction=0.5)
    cases = [
        (row(12), range(10, 16)),  # text: the first half
        (row(12, starts=(0, 4)), range(14, 16)),  # of the document in which the first half ends
        (row(12, starts=(0, 6)), range(10, 16)),
        (row(12, learnt=(5, 6, 9)), range(10, 15)),  # a dialogue: what comes before its first response
        (row(12, starts=(0, 3), learnt=(7, 8)), range(13, 17)),  # whose response stands in the second
        (row(12, learnt=(11,)), range(13, 21)),  # too long: its beginning is left out
        (row(4), range(11, 12)),  # no longer than a response: its last token stays
        (row(3), range(11, 12)),
    ]
    for batch, expected in cases:
        (prompt,) = prompts_of(policy, batch)
        assert prompt.tolist() == list(expected)


def test_sampling_follows_the_distribution_and_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20000, 4)

    def shares(**changes: Any) -> list[float]:
        drawn = sample(logits, OnPolicy(**changes), gen())
        return (torch.bincount(drawn[:, 0], minlength=4) / 20000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    assert shares(top_p=0.4) == [1, 0, 0, 0]
    drawn = sample(logits, OfText(text_ids=2), gen())
    assert torch.bincount(drawn[:, 0]).tolist() == pytest.approx([12500, 7500], rel=0.02)
    hot = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert shares(sampling_temperature=2.0) == pytest.approx((hot / hot.sum()).tolist(), abs=0.02)


def test_generated_tokens_are_those_of_a_loop_without_cache_or_padding() -> None:
    """The likeliest token each time, for prompts of different lengths."""
    model, _ = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    prompts = [torch.tensor([5, 9, 11]), torch.tensor([7]), torch.arange(8)]
    policy = OnPolicy(max_new_tokens=6, top_p=1e-6)
    said = generate(policy, prompts, student(model, ()), gen())
    assert said.shape == (3, 6)
    assert len(set(said.flatten().tolist())) > 3
    for prompt, response in zip(prompts, said, strict=True):
        ids = prompt
        for token in response:
            logits = model(input_ids=ids[None]).logits[0, -1]
            assert int(logits.argmax()) == int(token)
            ids = torch.cat([ids, token[None]])


def says_always(token: int) -> LlamaForCausalLM:
    """A student that cannot but say ``token``: untied, and of a head that looks at one constant."""
    model, _ = make_model(tied=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(48))
    with torch.no_grad():
        model.lm_head.bias[token] = 50
    return model


def test_a_student_that_always_says_one_token_is_taught_that_token() -> None:
    batches = [row(12), row(12, learnt=(7, 8))]
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    policy = OnPolicy(max_new_tokens=3, prompt_fraction=0.25)
    (made,) = on_policy_batches(policy, [batch], student(says_always(33)), step=0, seed=0, rank=0)
    assert made["input_ids"].tolist() == [
        [10, 11, 12, 33, 33, 33, 0, 0, 0, 0],
        [10, 11, 12, 13, 14, 15, 16, 33, 33, 33],
    ]
    assert made["labels"].tolist() == [
        [-100] * 3 + [33] * 3 + [-100] * 4,
        [-100] * 7 + [33] * 3,
    ]
    assert made["position_ids"].tolist() == [list(range(10))] * 2
    assert tokens_of([made, made]) == 2 * (6 + 10)


def test_a_response_ends_with_eos_and_nothing_is_learnt_after_it() -> None:
    policy = OnPolicy(max_new_tokens=5)
    (made,) = on_policy_batches(policy, [row(12)], student(says_always(EOS)), step=0, seed=0, rank=0)
    assert made["input_ids"].tolist() == [[10, 11, 12, EOS]], "all rows have ended after one token"
    assert made["labels"].tolist() == [[-100, -100, -100, EOS]]
    model, _ = make_model()
    batch = {name: torch.cat([row(12)[name]] * 8) for name in row(12)}
    everything = tuple(range(0, 48, 7))
    (made,) = on_policy_batches(
        OnPolicy(max_new_tokens=9), [batch], student(model, everything), step=0, seed=0, rank=0
    )
    ends = set()
    for ids, labels in zip(made["input_ids"].tolist(), made["labels"].tolist(), strict=True):
        said = [token for token in labels if token != -100]
        assert all(token not in everything for token in said[:-1])
        assert ids[3 : 3 + len(said)] == said
        assert set(labels[3 + len(said) :]) <= {-100}
        ends.add(len(said))
    assert len(ends) > 2


def test_each_rank_step_and_batch_samples_a_stream_of_its_own_and_always_the_same() -> None:
    model, _ = make_model()
    policy = OnPolicy(max_new_tokens=8)

    def drawn(step: int, seed: int, rank: int) -> list[Any]:
        made = on_policy_batches(policy, [row(12)] * 2, student(model), step=step, seed=seed, rank=rank)
        return [batch["input_ids"].tolist() for batch in made]

    random = torch.get_rng_state()
    first = drawn(3, 0, 0)
    assert first == drawn(3, 0, 0)
    assert torch.equal(random, torch.get_rng_state()), "dropout draws from that"
    others = [first[1], *(drawn(*place)[0] for place in ((4, 0, 0), (3, 1, 0), (3, 0, 1)))]
    assert first[0] not in others
    assert len({str(one) for one in others}) == 4


def test_the_student_is_in_the_same_mode_afterwards() -> None:
    model, _ = make_model()
    one = Student(model.train(), model, (EOS,), "bf16")
    on_policy_batches(OnPolicy(max_new_tokens=2), [row(12)], one, step=0, seed=0, rank=0)
    assert model.training
    assert "forward" not in vars(model)


class Scored:
    """A teacher that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Tensor]] = []
        self.model, _ = make_model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(4)
        self.hidden = None

    def load(self) -> None: ...

    def signal(self, inputs: Any) -> Signal:
        self.asked.append(dict(inputs))
        with torch.no_grad():
            states = self.model.base_model(inputs["input_ids"], position_ids=inputs["position_ids"])[0]
        return Signal(Hidden(states, Head(head_of(self.model).weight_VD.detach())))


def train(
    scratch: Path, policy: OnPolicy | None, model: LlamaForCausalLM | None = None, **changes: Any
) -> tuple[TrainOutcome, Scored, dict[str, Tensor]]:
    teacher, saved = Scored(), dict[str, Tensor]()
    fields: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2}
    outcome = Run(
        model or make_model()[0],
        Counting(),
        fields=TrainingFields(**fields | changes),
        scratch=scratch,
        objective=Divergences(),
        teacher=teacher,
        device="cpu",
        save=saved.update,
        on_policy=policy,
    ).train()
    return outcome, teacher, saved


@pytest.mark.parametrize("micro", [None, 2])
def test_the_teacher_scores_what_was_generated_in_the_steps_that_are_due(
    micro: int | None, tmp_path: Path
) -> None:
    policy = OnPolicy(max_new_tokens=4)
    _, teacher, _ = train(tmp_path / "a", policy, micro_batch_size=micro)
    passes = 2 if micro else 1
    rows = {tuple(ids.tolist()) for ids in Counting().ids}
    for step in range(6):
        for asked in teacher.asked[step * passes : (step + 1) * passes]:
            own = [tuple(ids.tolist()) not in rows for ids in asked["input_ids"]]
            assert own == [policy.is_due(step, 0)] * len(own)
            if own[0]:
                said = (asked["labels"] != -100).sum(-1)
                assert said.min() >= 1
                assert said.max() == 4


def test_the_loss_is_that_of_the_generated_tokens(tmp_path: Path) -> None:
    policy = OnPolicy(fraction=1.0, max_new_tokens=4)
    outcome, teacher, _ = train(tmp_path, policy, steps=1)
    (asked,) = teacher.asked
    model, _ = make_model()
    keep = asked["labels"][:, 1:] != -100
    with torch.no_grad():
        logits = [
            one(input_ids=asked["input_ids"], position_ids=asked["position_ids"]).logits[:, :-1][keep]
            for one in (model, teacher.model)
        ]
    q, p = (one.log_softmax(-1) for one in logits)
    kl = (p.exp() * (p - q)).sum() / keep.sum()
    assert outcome.first_loss == pytest.approx(float(kl), rel=1e-5)
    assert outcome.first_loss > 0.01


def test_broken_off_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    policy = OnPolicy(max_new_tokens=5)
    found = []

    def start() -> TrainOutcome:
        outcome, _, saved = train(tmp_path / "broken", policy)
        found.append(saved)
        return outcome

    resumed = broken_off(start, 3)
    assert resumed.resumed_from == 2
    whole, _, saved = train(tmp_path / "whole", policy)
    assert resumed.final_loss == whole.final_loss
    save_file(saved, tmp_path / "a.safetensors")
    save_file(found[-1], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_file(tmp_path / "a.safetensors").keys() == saved.keys()
    _, _, other = train(tmp_path / "other", None)
    assert any(not torch.equal(other[name], saved[name]) for name in saved)


def test_another_policy_is_another_run(tmp_path: Path) -> None:
    train(tmp_path, OnPolicy(max_new_tokens=5), steps=4)
    outcome, _, _ = train(tmp_path, OnPolicy(max_new_tokens=4), steps=4)
    assert outcome.resumed_from == 0


def test_ids_that_end_a_text() -> None:
    model, _ = make_model()
    assert eos_ids(model) == (2,)
    model.config.eos_token_id = [2, 7]
    assert eos_ids(model) == (2, 7)
    model.config.eos_token_id = None
    assert eos_ids(model) == ()
