"""A stage may train something else than the plain model; what it saves is checked all the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny import stories, tiny_llama
from torch import Tensor, nn

from compresskit.data.spec import DataSpec
from compresskit.errors import PromiseError
from compresskit.modeling import ModelSource
from compresskit.training.adaptation import Plain
from compresskit.training.fields import TrainingFields
from compresskit.training.job import Part, TrainJob, train
from compresskit.training.watch import LossLog

LAYER = "model.layers.0.mlp.up_proj"
FIELDS = TrainingFields(steps=4, batch_size=4, learning_rate=1e-3, checkpoint_every=2, warmup_fraction=0.0)


@dataclass(frozen=True)
class Scaled:
    """Trains one layer's weights times ``factor``, under the output of the same model, and undoes it."""

    masks_gradients: ClassVar[bool] = True
    saves_frozen: ClassVar[bool] = True
    factor: float
    spoil: bool = False

    def load(self, source: ModelSource) -> nn.Module:
        model = Plain().load(source)
        layer = model.get_submodule(LAYER)
        with torch.no_grad():
            layer.weight.mul_(self.factor)  # type: ignore[operator]
        layer.register_forward_hook(lambda _m, _i, out: out / self.factor)
        return model

    def save(self, source: ModelSource, out: Path, tensors: Mapping[str, Tensor]) -> None:
        back = tensors[f"{LAYER}.weight"] / self.factor + (1.0 if self.spoil else 0.0)
        Plain().save(source, out, {**tensors, f"{LAYER}.weight": back})


@pytest.fixture
def job(tmp_path: Path, token_cache: Path) -> TrainJob:
    text = tmp_path / "text.txt"
    text.write_text(stories(100))
    model = tiny_llama(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "out").mkdir()
    return TrainJob(
        model=str(model),
        out=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        fields=asdict(FIELDS),
        objective=Part("compresskit.training.objective:CrossEntropy"),
        data=asdict(DataSpec(source=str(text))),
        context_length=24,
        cache=str(token_cache),
        device="cpu",
    )


def adapted(job: TrainJob, **options: object) -> TrainJob:
    return replace(job, adaptation=Part("test_adaptation:Scaled", options))


def test_an_adaptation_survives_json(job: TrainJob) -> None:
    job = adapted(job, factor=2.0)
    assert TrainJob.from_json(job.to_json()) == job


def test_what_is_loaded_is_trained_and_what_it_saves_is_the_result(job: TrainJob, tmp_path: Path) -> None:
    """The scaled layer learns at half the rate of the plain one; the rest of the model as before."""
    train(adapted(job, factor=2.0))
    (tmp_path / "plain").mkdir()
    train(replace(job, out=str(tmp_path / "plain"), scratch=str(tmp_path / "plain_scratch")))
    before, one, two = (
        load_file(Path(d) / "model.safetensors") for d in (job.model, tmp_path / "plain", job.out)
    )
    moved, plain = ((t[f"{LAYER}.weight"] - before[f"{LAYER}.weight"]).norm() for t in (two, one))
    assert moved / plain == pytest.approx(0.5, rel=0.05)
    first = LossLog(Path(job.scratch) / "losses.jsonl").losses()[0]
    assert first == pytest.approx(LossLog(tmp_path / "plain_scratch" / "losses.jsonl").losses()[0], rel=1e-6)


def test_zeros_are_checked_in_what_an_adaptation_saves(job: TrainJob) -> None:
    source = ModelSource(job.model)
    zeroed = source.tensor(f"{LAYER}.weight").clone()
    zeroed[:, ::2] = 0
    tensors = {name: source.tensor(name) for name in source.names()} | {f"{LAYER}.weight": zeroed}
    Plain().save(source, Path(job.model), tensors)
    with pytest.raises(PromiseError, match="every pruned weight still zero"):
        train(replace(adapted(job, factor=2.0, spoil=True), held=(LAYER,)))
    train(replace(adapted(job, factor=2.0), held=(LAYER,)))
    assert not load_file(Path(job.out) / "model.safetensors")[f"{LAYER}.weight"][:, ::2].any()
    assert Plain.masks_gradients


def test_another_adaptation_is_another_run(job: TrainJob) -> None:
    train(adapted(job, factor=2.0))
    assert train(adapted(job, factor=2.0)).resumed_from == 4
    assert train(adapted(job, factor=4.0)).resumed_from == 0
