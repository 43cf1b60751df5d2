"""A run goes on with checkpoints of its own model, teacher and objective alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import stories, tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compresskit.data.spec import DataSpec
from compresskit.distill.align.provider import Aligned
from compresskit.distill.cache.provider import Cached
from compresskit.distill.divergences import Divergences
from compresskit.distill.divided import Divided
from compresskit.distill.few_bits import FewBits
from compresskit.distill.sentence_teacher import SentenceReplica
from compresskit.distill.served import Served
from compresskit.distill.teacher import Replica
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource
from compresskit.training.adaptation import Plain
from compresskit.training.beginning import Known, digest_of_files, digest_of_weights, words_of_teacher
from compresskit.training.fields import TrainingFields
from compresskit.training.job import Part, TrainJob
from compresskit.training.job import train as train_job
from compresskit.training.objective import CrossEntropy, Hidden, Signal, head_of
from compresskit.training.order import Rows
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

Make = Callable[..., LlamaForCausalLM]
FIELDS = TrainingFields(steps=2, batch_size=4, checkpoint_every=1)


def run_of(model: nn.Module, rows: Rows, scratch: Path, **given: Any) -> Run:
    return Run(model, rows, fields=FIELDS, scratch=scratch, device="cpu", **given)


def test_another_model_is_another_run(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    def train(seed: int, scratch: str) -> tuple[TrainOutcome, Mapping[str, Tensor]]:
        model = make_model(seed)
        return run_of(model, rows, tmp_path / scratch).train(), model.state_dict()

    assert train(0, "one")[0].resumed_from == 0
    assert train(0, "one")[0].resumed_from == 2
    (outcome, got), (_, want) = train(7, "one"), train(7, "other")
    assert outcome.resumed_from == 0
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_digest_of_weights_is_of_names_shapes_and_values() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=torch.bfloat16)
    digest = digest_of_weights(layer)
    assert digest_of_weights(layer.float()) == digest, "the values are the same ones"
    layer.weight.data = layer.weight.t().contiguous().t()
    assert not layer.weight.is_contiguous()
    assert digest_of_weights(layer) == digest
    others = [nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(64, 48, bias=False), nn.Sequential(layer)]
    assert len({digest, *map(digest_of_weights, others)}) == 5
    for parts in ((slice(None), slice(5, 6)), (slice(7, 8), slice(None)), (slice(1, None, 2), slice(None))):
        changed = nn.Linear(64, 48)
        changed.load_state_dict(layer.state_dict())
        with torch.no_grad():
            changed.weight[parts] = 0
        assert digest_of_weights(changed) != digest


def test_weights_are_looked_at_without_a_copy() -> None:
    small = torch.randn(1, 1)
    assert len(digest_of_weights(small.expand(1 << 20, 1 << 20))) == 64


class Live:
    """A teacher in memory, which counts what it is asked."""

    hidden = None

    def __init__(self, model: nn.Module) -> None:
        self.model, self.asked = model, 0

    def load(self) -> None:
        """It is there."""

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        self.asked += 1
        model: Any = self.model
        with torch.no_grad():
            states = model.base_model(inputs["input_ids"], position_ids=inputs["position_ids"])[0]
        return Signal(Hidden(states, head_of(model)))


def test_another_teacher_is_another_run(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    def train(seed: int) -> int:
        run = run_of(make_model(), rows, tmp_path, objective=Divergences(), teacher=Live(make_model(seed)))
        return run.train().resumed_from

    assert [train(1), train(1), train(2)] == [0, 2, 0]


def test_a_teacher_that_is_a_module_is_known_by_its_weights(make_model: Make) -> None:
    told = [words_of_teacher(make_model(seed)) for seed in (0, 0, 1)]
    assert told[0] == told[1] != told[2]
    assert words_of_teacher(None)


def providers(model: Path) -> list[Any]:
    """One of each that reads the checkpoint there."""
    here: dict[str, Any] = {"directory": str(model), "vocabulary": 258}
    part = {"target": "compresskit.distill.teacher:Replica", "options": here}
    tokenizers = {"student_tokenizer": str(model), "teacher_tokenizer": str(model)}
    return [
        Replica(**here, blocks=(0,)),
        Divided(**here),
        FewBits(**here, base="nf4", layers=("a",)),
        SentenceReplica(directory=str(model)),
        Cached(**here),
        Aligned(teacher=part, **tokenizers, longest=8, alignment="uld", students=258),
    ]


def test_a_checkpoint_is_the_same_teacher_wherever_it_lies(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    tiny_llama(tmp_path / "other", seed=1)
    made = {name: providers(tmp_path / name) for name in ("one", "moved", "other")}
    assert all(isinstance(provider, Known) for provider in made["one"])
    one, moved, other = ([provider.identity for provider in made[name]] for name in made)
    assert one == moved
    assert len({*one, *other}) == 2 * len(one)
    replica = made["one"][0]
    assert replace(replica, blocks=[0]).identity == replica.identity, "as JSON has it"
    assert replace(replica, blocks=(1,)).identity != replica.identity
    assert not any("_model" in vars(provider) for provider in made["one"]), "no weights were read for it"


def test_a_server_is_known_by_its_model() -> None:
    said = {"url": "http://a/v1", "model": "big", "top_k": 8, "vocabulary": 48}
    first = Served(server=said)
    assert Served(server={**said, "url": "http://b/v1", "retries": 1}).identity == first.identity
    assert Served(server={**said, "model": "bigger"}).identity != first.identity


class Shaken(Plain):
    """Adds something else to the model at each start."""

    __slots__ = ()

    def load(self, source: ModelSource) -> nn.Module:
        model = super().load(source)
        model.model.norm.register_buffer("noise", torch.rand(3))  # type: ignore[union-attr]
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        super().save(source, out, {n: t for n, t in tensors.items() if not n.endswith("noise")})


def test_other_weights_in_the_same_directory_are_another_job(tmp_path: Path, token_cache: Path) -> None:
    """What an adaptation adds at random, and how an engine lays weights out, is no part of it."""
    (tmp_path / "text.txt").write_text(stories(100))
    (tmp_path / "out").mkdir()
    model = tiny_llama(tmp_path / "model", num_hidden_layers=1)
    job = TrainJob(
        model=str(model),
        out=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        fields=asdict(FIELDS),
        objective=Part("compresskit.training.objective:CrossEntropy"),
        adaptation=Part("test_beginning:Shaken"),
        data=asdict(DataSpec(source=str(tmp_path / "text.txt"))),
        context_length=24,
        cache=str(token_cache),
        device="cpu",
    )
    assert [train_job(job).resumed_from, train_job(job).resumed_from] == [0, 2]
    before = digest_of_files(model)
    (model / "modeling_own.py").write_text("SCALE = 2\n")
    assert digest_of_files(model) != before, "code is part of a model"
    (model / "modeling_own.py").unlink()
    assert digest_of_files(model) == before
    tiny_llama(model, num_hidden_layers=1, seed=1)
    assert digest_of_files(model) != before
    assert train_job(job).resumed_from == 0


class Hiding(CrossEntropy):
    """An objective that does not say what it is made with."""

    def __init__(self, smoothing: float) -> None:
        object.__setattr__(self, "smoothing", smoothing)

    __repr__ = object.__repr__


class Bare(CrossEntropy):
    """One that is made with nothing."""

    __slots__ = ()
    __repr__ = object.__repr__


@dataclass(frozen=True)
class Around(CrossEntropy):
    """One that tells its fields, of which one hides its own."""

    inner: Any = field(default_factory=lambda: Hiding(0.1))


@pytest.mark.parametrize("objective", [Hiding(0.1), Around()])
def test_an_objective_that_hides_its_fields_is_refused(
    objective: Any, make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(
        PlanError, match=r"training: objective: expected a repr that tells its fields.*dataclass"
    ):
        run_of(make_model(), rows, tmp_path, objective=objective).train()
    assert not list(tmp_path.iterdir())


def test_where_an_objective_lies_in_memory_makes_no_other_run(
    make_model: Make, rows: Rows, tmp_path: Path
) -> None:
    def identity(objective: Any) -> str:
        return run_of(make_model(), rows, tmp_path, objective=objective).identity

    first, second = Bare(), Bare()
    assert repr(first) != repr(second)
    assert identity(first) == identity(second)
    told = [first, CrossEntropy(), Divergences(), Divergences(temperature=2.0)]
    assert len({identity(objective) for objective in told}) == len(told)
