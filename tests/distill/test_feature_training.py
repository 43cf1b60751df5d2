"""A feature loss in training: what is compared, that nothing else changes, restarts, projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_in
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from compresskit.distill.features import WithFeatures
from compresskit.distill.teacher import Replica
from compresskit.errors import ModelError
from compresskit.modeling import load_model
from compresskit.training import run as run_module
from compresskit.training.features import PROJECTIONS
from compresskit.training.fields import TrainingFields
from compresskit.training.order import Ordered
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

CROSS_ENTROPY = {"target": "compresskit.training.objective:CrossEntropy", "options": {}}
FORWARD_KL = {"target": "compresskit.distill.divergences:Divergences", "options": {}}
VOCABULARY, WIDTH, ROWS = 48, 12, 24
FIELDS = TrainingFields(steps=6, batch_size=4, learning_rate=3e-3, checkpoint_every=0, warmup_fraction=0.0)
PAIRS = ((0, 1), (1, 2))
"""Of a student of three blocks and a teacher of four: none is the last, after which a norm follows."""


class Counting:
    """Rows that count upwards; some tokens are not supervised, in each row others."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (7 * index + 5 * torch.arange(WIDTH)) % VOCABULARY
        labels = ids.clone()
        labels[: 1 + index % 5] = -100
        labels[8 + index % 3] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(WIDTH)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four blocks, and students of three: as wide, and half as wide."""
    out = tmp_path_factory.mktemp("models")
    settings: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 1}
    settings |= {"eos_token_id": 2}
    tiny_llama(out / "teacher", seed=1, num_hidden_layers=4, **settings)
    tiny_llama(out / "student", num_hidden_layers=3, **settings)
    tiny_llama(out / "narrow", num_hidden_layers=3, hidden_size=16, **settings)
    return out


def student(place: Path, name: str = "student") -> LlamaForCausalLM:
    model: LlamaForCausalLM = load_model(place / name)
    return model


def objective(method: str = "squarehead", **changes: Any) -> WithFeatures:
    widths, inner = changes.pop("widths", None), changes.pop("objective", CROSS_ENTROPY)
    one = {"method": method, "options": {"weight": 0.5}, "pairs": PAIRS} | changes
    return WithFeatures(objective=inner, features=[one], widths=widths)


def train(model: nn.Module, place: Path, scratch: Path, loss: WithFeatures, **changes: Any) -> TrainOutcome:
    extra = {name: changes.pop(name) for name in ("held", "validation", "save") if name in changes}
    teacher = Replica(
        directory=str(place / "teacher"),
        vocabulary=VOCABULARY,
        blocks=loss.looks_at_teacher.outputs,
        attended=loss.looks_at_teacher.attended,
    )
    fields = replace(FIELDS, **changes)
    return Run(
        model,
        Counting(),
        fields=fields,
        scratch=scratch,
        objective=loss,
        teacher=teacher,
        device="cpu",
        **extra,
    ).train()


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


def parts(scratch: Path, name: str) -> list[float]:
    return [record["parts"][name] for record in LossLog(scratch / "losses.jsonl").read() if "parts" in record]


def slow_losses(model: LlamaForCausalLM, teacher: LlamaForCausalLM, weight: float) -> list[float]:
    """The same training written out, on the states that transformers itself gives away."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIELDS.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * s / 6))))
    )
    ordered, found = Ordered(Counting(), steps=6, batch_size=4, seed=0), []
    for step in range(6):
        batch = [ordered[step * 4 + i] for i in range(4)]
        ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
        mine = model(input_ids=ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, output_hidden_states=True)
        counts = labels[:, 1:] != -100
        loss = cross_entropy(mine.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        for s, t in PAIRS:  # of hidden_states the first is the embedding
            a, b = mine.hidden_states[s + 1][:, :-1][counts], theirs.hidden_states[t + 1][:, :-1][counts]
            loss = loss + weight * ((a - b).square().mean(-1) / b.square().mean(-1)).mean() / len(PAIRS)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_equals_the_loop_written_out(place: Path, tmp_path: Path) -> None:
    model, twin = student(place), student(place)
    outcome = train(model, place, tmp_path, objective())
    true = slow_losses(twin, student(place, "teacher"), 0.5)
    assert losses(tmp_path) == pytest.approx(true, rel=1e-5)
    for (name, mine), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5, msg=name)
    features = parts(tmp_path, "squarehead")
    assert outcome.final_parts == {"squarehead": pytest.approx(sum(features) / 6)}
    assert not any(module._forward_hooks for module in model.modules())


def test_the_log_names_the_feature_loss_apart(place: Path, tmp_path: Path) -> None:
    train(student(place), place, tmp_path, objective(objective=FORWARD_KL, options={"weight": 0.25}))
    both = zip(parts(tmp_path, "forward_kl"), parts(tmp_path, "squarehead"), strict=True)
    assert losses(tmp_path) == pytest.approx([kl + 0.25 * features for kl, features in both], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"micro_batch_size": 1},
        {"micro_batch_size": 2, "activation_checkpointing": True},
    ],
    ids=str,
)
def test_recomputing_and_accumulation_change_nothing(
    place: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, twin = student(place), student(place)
    train(model, place, tmp_path / "one", objective())
    train(twin, place, tmp_path / "two", objective(), **changes)
    for found in (losses, lambda scratch: parts(scratch, "squarehead")):
        assert found(tmp_path / "two") == pytest.approx(found(tmp_path / "one"), rel=1e-5)
    for (name, mine), expected in zip(twin.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_compute_stays_near(place: Path, tmp_path: Path, precision: str) -> None:
    train(student(place), place, tmp_path / "wide", objective())
    train(student(place), place, tmp_path / "narrow", objective(), precision=precision)
    assert losses(tmp_path / "narrow") != losses(tmp_path / "wide")
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "wide"), rel=0.05)


def test_held_zeros_stay(place: Path, tmp_path: Path) -> None:
    model = student(place)
    held = tuple(name for name, _ in model.named_modules() if name.endswith("proj"))
    with torch.no_grad():
        for name in held:
            model.get_submodule(name).weight[:, ::2] = 0
    train(model, place, tmp_path, objective(), held=held)
    for name in held:
        assert not model.get_submodule(name).weight[:, ::2].any()
        assert (model.get_submodule(name).weight[:, 1::2] != 0).all()


@pytest.mark.parametrize("method", ["squarehead", "hidden_mse", "hidden_cosine"])
def test_another_width_is_projected_and_the_projection_thrown_away(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The projections learn, in the engine's own optimiser; neither the result nor the model has them."""
    model = student(place, "narrow")
    names, seen = set(model.state_dict()), []
    gather = run_module.without_projections

    def look(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append({n: t.clone() for n, t in tensors.items() if n.startswith(PROJECTIONS)})
        return gather(tensors)

    monkeypatch.setattr(run_module, "without_projections", look)
    saved: dict[str, Tensor] = {}
    loss = objective(method, widths=(16, 32), options={"weight": 20.0})
    train(model, place, tmp_path, loss, save=saved.update, steps=24)
    assert set(saved) == set(model.state_dict()) == names
    (made,) = seen
    assert len(loss.projections()) == 2
    for name, start in loss.projections().items():
        moved = made[f"{PROJECTIONS}.{name}.weight"]
        assert moved.shape == (32, 16)
        assert ((moved - start.weight).abs() > 1e-4).float().mean() > 0.9
    features = parts(tmp_path, method)  # four passes over six batches
    assert sum(features[-6:]) < 0.98 * sum(features[:6])


@pytest.mark.parametrize("name", ["student", "narrow"])
def test_a_restart_gives_the_same_bytes(place: Path, tmp_path: Path, name: str) -> None:
    """Projections and their moments come back with the rest."""
    straight, again = student(place, name), student(place, name)
    loss = objective(widths=(16, 32) if name == "narrow" else None)
    train(straight, place, tmp_path / "straight", loss, checkpoint_every=2)
    with broken_off_in(step=4):
        train(student(place, name), place, tmp_path / "broken", loss, checkpoint_every=2)
    outcome = train(again, place, tmp_path / "broken", loss, checkpoint_every=2)
    assert outcome.resumed_from == 2
    for (parameter, a), b in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), parameter
    logs = [LossLog(tmp_path / run / "losses.jsonl").read() for run in ("straight", "broken")]
    assert [(r["loss"], r["parts"]) for r in logs[0]] == [(r["loss"], r["parts"]) for r in logs[1]]


def test_other_features_are_another_run(place: Path, tmp_path: Path) -> None:
    train(student(place), place, tmp_path, objective(), checkpoint_every=2)
    assert train(student(place), place, tmp_path, objective(), checkpoint_every=2).resumed_from == 6
    for changes in ({"options": {"weight": 0.4}}, {"pairs": ((0, 1), (1, 3))}, {"method": "hidden_mse"}):
        assert train(student(place), place, tmp_path, objective(**changes)).resumed_from == 0


def test_an_evaluation_measures_the_same_sum(place: Path, tmp_path: Path) -> None:
    rows = Counting()
    outcome = train(student(place), place, tmp_path, objective(), validation=rows, learning_rate=1e-12)
    batch = {k: torch.stack([rows[i][k] for i in range(ROWS)]) for k in ("input_ids", "labels")}
    model, teacher = student(place), student(place, "teacher")
    with torch.no_grad():
        mine, theirs = (m(input_ids=batch["input_ids"], output_hidden_states=True) for m in (model, teacher))
    counts, labels = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:].flatten()
    true = cross_entropy(mine.logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)
    for s, t in PAIRS:
        a, b = mine.hidden_states[s + 1][:, :-1][counts], theirs.hidden_states[t + 1][:, :-1][counts]
        true = true + 0.5 * ((a - b).square().mean(-1) / b.square().mean(-1)).mean() / len(PAIRS)
    assert outcome.validation_loss == pytest.approx(true.item(), rel=1e-5)


def test_a_block_that_is_not_there_is_told(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a block 7, got 3 blocks"):
        train(student(place), place, tmp_path, objective(pairs=((7, 1),)))


SEVERAL = [
    {"method": "squarehead", "options": {"weight": 0.5}, "pairs": PAIRS},
    {"method": "relation", "options": {"weight": 2.0}, "pairs": ((1, 2), (2, 3))},
    {"method": "hidden_cosine", "pairs": ((0, 1), (2, 2))},
]


def test_several_are_added_up_and_named_each(place: Path, tmp_path: Path) -> None:
    """Each step's loss is the weighted sum; the first step's parts are those of a run with each alone."""
    several = WithFeatures(objective=FORWARD_KL, features=SEVERAL)
    outcome = train(student(place), place, tmp_path / "all", several)
    names = {"forward_kl": 1.0, "squarehead": 0.5, "relation": 2.0, "hidden_cosine": 1.0}
    assert outcome.final_parts.keys() == {*names, "agreement"}
    found = {name: parts(tmp_path / "all", name) for name in names}
    sums = [sum(w * found[name][step] for name, w in names.items()) for step in range(6)]
    assert losses(tmp_path / "all") == pytest.approx(sums, rel=1e-5)
    for one in SEVERAL:
        name = str(one["method"])
        alone = WithFeatures(objective=FORWARD_KL, features=[one])
        train(student(place), place, tmp_path / name, alone, steps=1)
        assert parts(tmp_path / name, name) == pytest.approx(found[name][:1], rel=1e-6)


def test_several_recomputed_and_of_another_width(place: Path, tmp_path: Path) -> None:
    """Recomputing in the backward pass changes nothing; of another width outputs alone are projected."""
    several = WithFeatures(objective=FORWARD_KL, features=SEVERAL, widths=(16, 32))
    assert list(several.projections()) == ["0_1", "1_2", "2_2"]
    one, two = student(place, "narrow"), student(place, "narrow")
    train(one, place, tmp_path / "one", several)
    train(two, place, tmp_path / "two", several, activation_checkpointing=True, micro_batch_size=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for (name, mine), expected in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_a_block_that_several_look_at_is_kept_once(place: Path) -> None:
    """Of the teacher's signal, too: outputs in the order of the blocks, then what attention is given."""
    twice = [*SEVERAL, {"method": "hidden_mse", "pairs": PAIRS}, {"method": "relation", "pairs": ((0, 3),)}]
    looks = WithFeatures(objective=FORWARD_KL, features=twice).looks_at_teacher
    assert (looks.outputs, looks.attended) == ((1, 2), (2, 3))
    teacher = Replica(
        directory=str(place / "teacher"), vocabulary=VOCABULARY, blocks=(1, 2), attended=looks.attended
    )
    inputs = {k: Counting()[0][k][None] for k in ("input_ids", "position_ids")}
    shapes = [
        [tuple(t.shape) for t in made] if isinstance(made, tuple) else tuple(made.shape)
        for made in teacher.signal(inputs).blocks_BTE
    ]
    given = [(1, WIDTH, 4, 8), (1, WIDTH, 2, 8), (1, WIDTH, 2, 8)]
    assert shapes == [(1, WIDTH, 32), (1, WIDTH, 32), given, given]


def test_only_the_compared_blocks_are_kept_and_not_copied(place: Path) -> None:
    """The teacher's signal holds the very tensors its blocks made."""
    teacher = Replica(directory=str(place / "teacher"), vocabulary=VOCABULARY, blocks=[2, 0])
    made: list[int] = []
    for block in teacher._model.model.layers:
        block.register_forward_hook(lambda _m, _i, out: made.append(out.data_ptr()))
    rows = Counting()
    signal = teacher.signal({k: rows[0][k][None] for k in ("input_ids", "position_ids")})
    assert [t.data_ptr() for t in signal.blocks_BTE] == [made[2], made[0]]
    plain = Replica(directory=str(place / "teacher"), vocabulary=VOCABULARY)
    assert plain.signal({k: rows[0][k][None] for k in ("input_ids", "position_ids")}).blocks_BTE == ()
