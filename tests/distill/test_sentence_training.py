"""Losses on sentences in training: what is compared, what is left alone, restarts, what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_in
from tiny import tiny_bert
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from compresskit.data.examples import pad_stack
from compresskit.distill.features import WithFeatures
from compresskit.distill.relation import Relation
from compresskit.distill.sentence_teacher import SentenceReplica
from compresskit.distill.sentences import SentenceLosses
from compresskit.modeling import load_model
from compresskit.modeling.attention import attending
from compresskit.training.features import Counted, Looks
from compresskit.training.fields import TrainingFields
from compresskit.training.order import Ordered
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

ROWS, STEPS, CLASSES = 24, 6, 3
FIELDS = TrainingFields(
    steps=STEPS, batch_size=4, learning_rate=3e-3, checkpoint_every=0, warmup_fraction=0.0
)
COSINE = {"losses": [("embedding_cosine", {})]}
BOTH = {"losses": [("embedding_cosine", {}), ("pairwise", {"weight": 3.0, "pooling": "cls"})]}
LOGITS = {"losses": [("class_logits", {})], "temperature": 2.0, "cross_entropy_weight": 0.25}
IDLE = ["pooler.dense.weight", "pooler.dense.bias"]


class Sentences:
    """Rows of many lengths, some in two segments; every fifth has no class."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        words = 4 + (7 * index + 5 * torch.arange(3 + index % 6)) % 60
        ids = torch.cat([torch.tensor([2]), words, torch.tensor([3])])
        types = (torch.arange(len(ids)) > 3).long() * (index % 2)
        return {
            "input_ids": ids,
            "token_type_ids": types,
            "label": -100 if index % 5 == 4 else index % CLASSES,
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders and classifiers; a narrow student has other heads, too."""
    out = tmp_path_factory.mktemp("models")
    tiny_bert(out / "teacher", seed=1, num_hidden_layers=3)
    tiny_bert(out / "student")
    tiny_bert(out / "narrow", hidden_size=16, num_attention_heads=2)
    tiny_bert(out / "class-teacher", seed=1, classes=CLASSES, num_hidden_layers=3)
    tiny_bert(out / "class-student", classes=CLASSES)
    return out


def model_of(place: Path, name: str) -> Any:
    return load_model(place / name)


def with_features(options: Mapping[str, Any], **changes: Any) -> WithFeatures:
    inner = {"target": "compresskit.distill.sentences:SentenceLosses", "options": options}
    widths = changes.pop("widths", None)
    one = {"method": "relation", "options": {"weight": 0.5}, "pairs": ((1, 2),)} | changes
    return WithFeatures(objective=inner, features=[one], widths=widths)


def train(model: nn.Module, place: Path, scratch: Path, loss: Any, **changes: Any) -> TrainOutcome:
    extra = {name: changes.pop(name) for name in ("held", "validation", "save") if name in changes}
    inner = getattr(loss, "inner", loss)
    name = "class-teacher" if inner.reads == "logits" else "teacher"
    looks = getattr(loss, "looks_at_teacher", Looks())
    teacher = SentenceReplica(
        directory=str(place / name), reads=inner.reads, blocks=looks.outputs, attended=looks.attended
    )
    return Run(
        model,
        Sentences(),
        fields=replace(FIELDS, **changes),
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


def assert_alike(model: nn.Module, twin: nn.Module) -> None:
    """But for the biases of keys: attention does not see them, so that rounding alone moves them."""
    for (name, mine), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not name.endswith("key.bias"):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5, msg=name)


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[: int(m.sum())].mean(0) for row, m in zip(states, mask, strict=True)])


def slow_losses(model: Any, step_loss: Any) -> list[float]:
    """The same training written out, on what transformers itself gives away."""
    trained = [p for n, p in model.named_parameters() if n not in IDLE]
    optimizer = torch.optim.AdamW(trained, lr=FIELDS.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * s / STEPS))))
    )
    ordered, found = Ordered(Sentences(), steps=STEPS, batch_size=4, seed=0), []
    for step in range(STEPS):
        batch = pad_stack([ordered[step * 4 + i] for i in range(4)])
        labels = batch.pop("labels")
        loss = step_loss(model, batch, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_embeddings_and_relations_equal_the_loop_written_out(place: Path, tmp_path: Path) -> None:
    model, twin, teacher = (model_of(place, name) for name in ("student", "student", "teacher"))

    def step_loss(student: Any, batch: dict[str, Tensor], _: Tensor) -> Tensor:
        mask = batch["attention_mask"]
        with torch.no_grad(), attending([teacher.encoder.layer[2]]) as theirs:
            wanted = teacher(**batch)[0]
        with attending([student.encoder.layer[1]]) as mine:
            made = student(**batch)[0]
        loss = (1 - cosine_similarity(mean_of(made, mask), mean_of(wanted, mask), dim=-1)).mean()
        a, b = (torch.nn.functional.normalize(x[:, 0], dim=-1) for x in (made, wanted))
        loss = loss + 3 * ((a @ a.mT - b @ b.mT) ** 2).sum() / 3 / 4  # the diagonal is none
        counted = Counted.of_sentences(mask)
        pair = mine[student.encoder.layer[1]], theirs[teacher.encoder.layer[2]]
        return loss + 0.5 * counted.total(Relation()(*pair, counted.sees_BTT)) / 4

    outcome = train(model, place, tmp_path, with_features(BOTH))
    assert losses(tmp_path) == pytest.approx(slow_losses(twin, step_loss), rel=1e-5)
    assert_alike(model, twin)
    assert outcome.final_parts.keys() == {"embedding_cosine", "pairwise", "relation"}
    assert outcome.warnings == (f"The loss does not reach {', '.join(IDLE)}: they stay as they were.",)
    start = model_of(place, "student")
    assert torch.equal(model.pooler.dense.weight, start.pooler.dense.weight)
    assert all(p.requires_grad for p in model.parameters())
    assert parts(tmp_path, "embedding_cosine")[-1] < parts(tmp_path, "embedding_cosine")[0]


def test_classes_equal_the_loop_written_out(place: Path, tmp_path: Path) -> None:
    model, twin = (model_of(place, "class-student") for _ in range(2))
    teacher = model_of(place, "class-teacher")

    def step_loss(student: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        made = student(**batch).logits
        with torch.no_grad():
            wanted = teacher(**batch).logits
        log_q, log_p = (made / 2).log_softmax(-1), (wanted / 2).log_softmax(-1)
        soft = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        hard = cross_entropy(made, labels, ignore_index=-100, reduction="sum") / len(labels)
        return 0.75 * soft + 0.25 * hard

    outcome = train(model, place, tmp_path, SentenceLosses(**LOGITS))
    assert losses(tmp_path) == pytest.approx(slow_losses(twin, step_loss), rel=1e-5)
    assert_alike(model, twin)
    assert outcome.warnings == ()
    assert outcome.final_parts.keys() == {"class_logits", "cross_entropy", "agreement"}


CASES = {
    "encoder": ("student", with_features(COSINE)),
    "classifier": ("class-student", SentenceLosses(**LOGITS)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "changes",
    [{"activation_checkpointing": True}, {"micro_batch_size": 1}, {"micro_batch_size": 2}],
    ids=str,
)
def test_recomputing_and_accumulation_change_nothing(
    place: Path, tmp_path: Path, case: str, changes: dict[str, Any]
) -> None:
    """Though batches are padded to other lengths."""
    name, loss = CASES[case]
    model, twin = model_of(place, name), model_of(place, name)
    train(model, place, tmp_path / "one", loss)
    train(twin, place, tmp_path / "two", loss, **changes)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_alike(twin, model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_compute_stays_near(place: Path, tmp_path: Path, precision: str) -> None:
    train(model_of(place, "student"), place, tmp_path / "wide", with_features(COSINE))
    train(model_of(place, "student"), place, tmp_path / "narrow", with_features(COSINE), precision=precision)
    assert losses(tmp_path / "narrow") != losses(tmp_path / "wide")
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "wide"), rel=0.05)


def test_held_zeros_stay_also_where_the_loss_does_not_reach(place: Path, tmp_path: Path) -> None:
    model = model_of(place, "student")
    held = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    assert "pooler.dense" in held
    with torch.no_grad():
        for name in held:
            model.get_submodule(name).weight[:, ::2] = 0
    train(model, place, tmp_path, with_features(COSINE), held=held)
    for name in held:
        assert not model.get_submodule(name).weight[:, ::2].any()


@pytest.mark.parametrize("method", ["relation", "hidden_mse"])
def test_another_width_is_projected_and_the_projection_thrown_away(
    place: Path, tmp_path: Path, method: str
) -> None:
    """Of embeddings and of blocks each their own; relations need none."""
    model = model_of(place, "narrow")
    names, saved = set(model.state_dict()), dict[str, Tensor]()
    widths = {"widths": (16, 32)}
    options = {"method": method, **({} if method == "relation" else widths)}
    loss = with_features(COSINE | widths, **options)
    train(model, place, tmp_path, loss, save=saved.update, steps=24)
    assert set(saved) == set(model.state_dict()) == names
    for name in ("embedding_cosine", method):
        found = parts(tmp_path, name)  # four passes over six batches
        assert sum(found[-6:]) < 0.9 * sum(found[:6])


@pytest.mark.parametrize("name", ["student", "narrow"])
def test_a_restart_gives_the_same_bytes(place: Path, tmp_path: Path, name: str) -> None:
    """With dropout, and with what takes no gradient out of the checkpoints."""
    widths = {"widths": (16, 32)} if name == "narrow" else {}
    loss = with_features(COSINE | widths)

    def fresh() -> Any:
        model = model_of(place, name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return model

    straight, again = fresh(), fresh()
    train(straight, place, tmp_path / "straight", loss, checkpoint_every=2)
    with broken_off_in(step=4):
        train(fresh(), place, tmp_path / "broken", loss, checkpoint_every=2)
    outcome = train(again, place, tmp_path / "broken", loss, checkpoint_every=2)
    assert outcome.resumed_from == 2
    for (parameter, a), b in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), parameter


def test_an_evaluation_is_a_mean_over_sentences(place: Path, tmp_path: Path) -> None:
    """Twenty-four rows in batches of five: the last has four."""
    fields = {"batch_size": 5, "learning_rate": 1e-12}
    outcome = train(
        model_of(place, "student"),
        place,
        tmp_path,
        SentenceLosses(**COSINE),
        validation=Sentences(),
        **fields,
    )
    found = []
    student, teacher = model_of(place, "student"), model_of(place, "teacher")
    for i in range(ROWS):
        row = {k: v[None] for k, v in Sentences()[i].items() if isinstance(v, Tensor)}
        with torch.no_grad():
            mine, theirs = (m(**row)[0][0].mean(0) for m in (student, teacher))
        found.append(1 - cosine_similarity(mine, theirs, dim=0).item())
    assert outcome.validation_loss == pytest.approx(sum(found) / ROWS, rel=1e-4)
