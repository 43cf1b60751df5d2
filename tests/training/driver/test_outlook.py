"""What a plan tells of pipelines and of ranks that step alone, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import outlook, tiny_llama

from compresskit.modeling import ModelSource
from compresskit.stage import Outlook
from compresskit.training.fields import TrainingFields
from compresskit.training.outlook import STATE_BYTES, forecast_training, student_faults


@pytest.fixture
def model(tmp_path: Path) -> Outlook:
    return outlook(ModelSource(tiny_llama(tmp_path, num_hidden_layers=3)))


@pytest.mark.parametrize(("schedule", "stages", "least"), [("1f1b", 4, 4), ("interleaved", 2, 4)])
def test_more_stages_than_blocks_are_told(model: Outlook, schedule: str, stages: int, least: int) -> None:
    fields = TrainingFields(processes=stages, pipeline_stages=stages, pipeline_schedule=schedule)
    (fault,) = student_faults(fields, model, "stages[0]")
    assert fault.where == "stages[0].pipeline_stages"
    assert (f"at least {least} blocks" in fault.expected, fault.got) == (True, "3")


def test_as_many_stages_as_blocks_are_fine(model: Outlook) -> None:
    fields = TrainingFields(processes=3, pipeline_stages=3, batch_size=12)
    assert student_faults(fields, model, "stages[0]") == []


def test_memory_of_outer_weights_and_of_stages(model: Outlook) -> None:
    def needed(**changes: object) -> int:
        fields = TrainingFields(processes=2, batch_size=8, micro_batch_size=1, **changes)  # type: ignore[arg-type]
        return forecast_training(fields, model).memory_bytes

    plain, parameters = needed(), model.anatomy.num_parameters
    # One bucket has all of so small a model: sent, and of DiLoCo how far it has come, too.
    assert needed(synchronise="local_sgd") == plain + 4 * parameters
    assert needed(synchronise="diloco") == plain + (8 + 8) * parameters
    assert needed(synchronise="diloco", synchronise_delay=2) == plain + (16 + 4) * parameters
    assert needed(pipeline_stages=2) == plain - STATE_BYTES * parameters // 2
