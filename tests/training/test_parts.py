"""The small parts of the trainer: order of rows, checkpoints, the loss log, the DeepSpeed config, writing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn

from compresskit.errors import CheckpointError, EngineError, ModelError
from compresskit.modeling import ModelSource, load_model
from compresskit.training import write
from compresskit.training.checkpoint import damaged_after, latest, seal, step_of, sweep, written
from compresskit.training.engine import deepspeed_config, engine_arguments, require_engine, running_engine
from compresskit.training.fields import TrainingFields
from compresskit.training.hold import weight_of
from compresskit.training.objective import head_module, supervised_tokens
from compresskit.training.order import Ordered
from compresskit.training.setting import Setting
from compresskit.training.watch import LossLog, Watch
from compresskit.training.write import write_checkpoint


class Numbers:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index])}


def order(steps: int, batch: int, seed: int) -> list[int]:
    rows = Ordered(Numbers(), steps=steps, batch_size=batch, seed=seed)
    return [int(row["input_ids"]) for row in (rows[i] for i in range(len(rows)))]


def test_every_pass_sees_every_row_once_in_another_order() -> None:
    found = order(5, 3, seed=0)
    passes = [found[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(p) == list(range(5)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1
    assert order(3, 5, seed=0) == found, "the order depends on the batch size"
    assert order(5, 3, seed=1) != found
    rows = Ordered(Numbers(), steps=5, batch_size=3, seed=0)
    assert [int(rows[i]["input_ids"]) for i in (14, 3, 9)] == [found[i] for i in (14, 3, 9)]
    with pytest.raises(IndexError):
        rows[15]


def make(folder: Path, step: int, identity: str = "me") -> Path:
    made = folder / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True)
    (made / "a.bin").write_bytes(b"12345")
    (made / "deep" / "b.bin").write_bytes(b"1")
    seal(made, identity)
    return made


def test_only_a_complete_checkpoint_counts(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent", "me") is None
    two, ten = make(tmp_path, 2), make(tmp_path, 10)
    assert latest(tmp_path, "me") == ten
    assert step_of(ten) == 10
    (ten / "deep" / "b.bin").unlink()
    assert latest(tmp_path, "me") == two
    (tmp_path / "checkpoint-30").mkdir()
    assert latest(tmp_path, "me") == two
    assert latest(tmp_path, "you") is None
    (two / "complete.json").write_text('{"iden')
    assert latest(tmp_path, "me") is None


def test_a_sweep_keeps_the_latest_whole_ones(tmp_path: Path) -> None:
    make(tmp_path, 4)
    make(tmp_path, 2)
    make(tmp_path, 9, "another run")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "other").mkdir()
    sweep(tmp_path, "me", keep=2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "other"}
    sweep(tmp_path, "me", keep=1)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "other"}


def test_a_checkpoint_damaged_after_it_was_complete_is_named(tmp_path: Path) -> None:
    two, four, ten = make(tmp_path, 2), make(tmp_path, 4), make(tmp_path, 10)
    make(tmp_path, 12, "another run")
    (tmp_path / "checkpoint-14").mkdir()
    assert damaged_after(tmp_path, "me", ten) == []
    (four / "a.bin").write_bytes(b"123")
    assert damaged_after(tmp_path, "me", ten) == []
    (ten / "complete.json").write_text('{"iden')
    assert latest(tmp_path, "me") == two
    assert damaged_after(tmp_path, "me", two) == ["checkpoint-4", "checkpoint-10"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
        SafetensorError("I/O error: No space left on device"),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_is_told_and_the_one_before_stays(tmp_path: Path, error: Exception) -> None:
    before, torn = make(tmp_path, 2), tmp_path / "checkpoint-4"

    def write() -> None:
        with written(torn):
            torn.mkdir()
            (torn / "a.bin").write_bytes(b"1")
            raise error

    with pytest.raises(CheckpointError, match=r"checkpoint-4(.|\n)*free(.|\n)*after step 2"):
        write()
    assert not torn.exists()
    assert latest(tmp_path, "me") == before


def test_what_is_not_of_the_disk_is_not_told_as_such(tmp_path: Path) -> None:
    for error in (RuntimeError("gloo: Connection closed by peer"), ConnectionError("reset")):
        with pytest.raises(type(error)), written(tmp_path / "checkpoint-4"):
            raise error


def test_the_loss_log_survives_a_kill(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "losses.jsonl")
    assert log.read() == []
    watch = Watch(log, title="t", steps=4, done=0, tokens_per_step=10, memory_bytes=lambda: 0)
    watch.progress = type(watch.progress)("t", 4, stream=io.StringIO())
    for step in (1, 2, 3):
        watch.step(step, 3.0 - step, 0.1, 1.0, skipped=step == 2)
    watch.evaluation(3, 0.5)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert (log.losses(), log.skipped()) == ([2.0, 1.0, 0.0], 1)
    log.cut_after(2)
    assert [r["step"] for r in log.read()] == [1, 2]
    assert log.read()[1]["tokens"] == 20
    resumed = Watch(log, title="t", steps=4, done=2, tokens_per_step=10, memory_bytes=lambda: 0)
    resumed.progress = type(watch.progress)("t", 4, stream=io.StringIO())
    resumed.step(3, 0.0, 0.1, 1.0, skipped=False, tokens=4)
    resumed.step(4, 0.0, 0.1, 1.0, skipped=False)
    assert [r["tokens"] for r in log.read()] == [10, 20, 24, 34]


def setting(config: Path | None = None) -> Setting:
    fields = TrainingFields(
        batch_size=16,
        micro_batch_size=4,
        strategy="deepspeed",
        zero_stage=3,
        max_grad_norm=0.7,
        deepspeed_config=str(config) if config else None,
    )
    return Setting(fields, 2, "cpu")


def test_our_deepspeed_config_sets_what_deepspeed_would_default() -> None:
    ours = deepspeed_config(setting())
    assert (ours["gradient_clipping"], ours["zero_optimization"]["stage"]) == (0.7, 3)
    assert (ours["train_micro_batch_size_per_gpu"], ours["gradient_accumulation_steps"]) == (4, 2)


def test_a_users_deepspeed_config_is_kept_and_its_gaps_are_filled(tmp_path: Path) -> None:
    theirs = {
        "zero_optimization": {"stage": "auto", "overlap_comm": True},
        "train_batch_size": "auto",
        "x": 1,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(theirs))
    merged = deepspeed_config(setting(path))
    assert (merged["x"], merged["train_batch_size"], merged["gradient_clipping"]) == (1, 16, 0.7)
    assert merged["zero_optimization"]["stage"] == 3
    assert merged["zero_optimization"]["overlap_comm"] is True
    assert merged["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_ddp_sends_no_masks_and_no_frozen_integers_each_step() -> None:
    """They are buffers, as large as the weights themselves, which it would send before each forward pass."""
    made = engine_arguments(Setting(TrainingFields(strategy="ddp"), 2, "cpu"), [])
    assert made["ddp_broadcast_buffers"] is False


def test_another_engine_than_asked_for_is_an_error() -> None:
    model = nn.Linear(2, 2)
    assert running_engine(model, model) == "single"
    with pytest.raises(EngineError, match="strategy: expected deepspeed ZeRO-3, got single"):
        require_engine(setting(), model, model)
    fsdp = Setting(TrainingFields(strategy="fsdp"), 2, "cpu")
    with pytest.raises(EngineError, match="expected fsdp, got single"):
        require_engine(fsdp, model, model)


def test_what_cannot_be_trained_is_named() -> None:
    with pytest.raises(ModelError, match="Linear: expected a causal language model"):
        head_module(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="Did you mean: 0"):
        weight_of(nn.Sequential(nn.Linear(2, 2)), "9")


def test_the_first_token_of_a_row_is_never_supervised() -> None:
    assert supervised_tokens(torch.tensor([[5, 6, -100, 7], [-100, -100, 8, 9]])) == 4


@pytest.mark.parametrize("shard_bytes", [write.SHARD_BYTES, 20_000])
def test_a_written_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", shard_bytes)
    source = ModelSource(tiny_llama(tmp_path / "model", dtype=torch.bfloat16))
    tensors = {n: t.float() + 1 for n, t in load_model(source).state_dict().items()}
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(source, out, tensors)
    again = load_model(out).state_dict()
    assert all(torch.equal(again[n], t.to(torch.bfloat16)) for n, t in tensors.items())
    assert "lm_head.weight" not in {k for f in out.glob("*.safetensors") for k in load_file(f)}
    assert len(list(out.glob("*.safetensors"))) == (1 if shard_bytes == 5_000_000_000 else 3)
    assert (out / "tokenizer.json").is_file()


WITHOUT = """
import importlib.util, sys
ABSENT, real = ("deepspeed", "torchao", "bitsandbytes", "peft"), importlib.util.find_spec
class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else real(name, package)
import compresskit.training.run
"""


def test_training_does_without_optional_packages() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
