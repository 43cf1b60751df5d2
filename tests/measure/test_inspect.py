"""What is said of each layer is what lies on disk; what is timed is what computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import compresskit as ck
from compresskit.cli import main
from compresskit.kernels.limits import ZeroLayout
from compresskit.measure import inspect as inspecting
from compresskit.measure import matvec
from compresskit.measure.inspect import inspect_layers
from compresskit.measure.matvec import KERNELS, Timing, time_layer
from compresskit.reports.figures import write_bytes
from compresskit.reports.layers import write_layers
from compresskit.sparse.pattern import parse_pattern
from tests.tiny import tiny_llama

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("inspect") / "dense")


@pytest.fixture(scope="module")
def sparse(dense: Path) -> Path:
    """The same with 2:4 in one layer, four of five weights zero in another; made by nobody's pruner."""
    place = tiny_llama(dense.parent / "sparse")
    tensors = load_file(place / "model.safetensors")
    for layer, pattern in ((Q, "2:4"), (DOWN, "80%:layer")):
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = weight * parse_pattern(pattern).keep_largest(weight.abs())
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def artifact(dense: Path) -> Path:
    stages = (ck.Prune("magnitude", pattern="2:4"), ck.Quantize("rtn", scheme="w8a8"))
    ck.run(ck.Recipe(model=str(dense), stages=stages), dense.parent / "artifact", measures=())
    return dense.parent / "artifact"


@pytest.fixture(scope="module")
def bitmask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the layers keep bf16 weights, the others integers with scales; the head is dense."""
    place = tmp_path_factory.mktemp("bitmask")
    tiny_llama(place / "model", hidden_size=64, dtype=torch.bfloat16)
    quantize = ck.Quantize("rtn", scheme="w8a16", targets=("model.layers.0.*",))
    recipe = ck.Recipe(model=str(place / "model"), stages=(ck.Prune("magnitude", pattern="60%"), quantize))
    ck.run(recipe, place / "dense", measures=())
    ck.export(place / "dense", to="bitmask", out=place / "packed")
    return place / "packed"


@pytest.fixture
def cli() -> Callable[..., Result]:
    return lambda *argv: CliRunner().invoke(main, ["inspect", *map(str, argv)])


def test_a_plain_directory(sparse: Path) -> None:
    found = inspect_layers(sparse)
    layers = {layer.name: layer for layer in found.layers}
    assert len(layers) == 15
    assert (str(layers[Q].zeros), layers[Q].zeros.zero_fraction, layers[Q].limit) == ("2:4", 0.5, 32 / 17)
    down = layers[DOWN]
    assert (down.out_features, down.in_features, str(down.zeros)) == (32, 64, "unstructured")
    assert down.zeros.zero_fraction == round(0.8 * 2048) / 2048
    assert down.packing.bytes_per_weight == pytest.approx((32 * (1 - down.zeros.zero_fraction) + 1) / 8)
    others = [layer for name, layer in layers.items() if name not in (Q, DOWN)]
    assert all((str(x.zeros), x.limit, x.packing.storage) == ("none", 1.0, "dense") for x in others)
    assert all(layer.values.bytes_per_weight == 4 for layer in found.layers)
    assert (found.dtype, found.device, found.notes) == ("float32", "", ())
    text = write_layers(found)
    assert "32x64" in text
    assert "transformers, vLLM, llama.cpp and onnxruntime multiply by zeros" in text


def test_a_dense_model_says_so(dense: Path) -> None:
    assert write_layers(inspect_layers(dense)).endswith("\nNo layer has zeros.")


def test_a_packed_artifact_shows_bits_and_keeps_its_pattern(artifact: Path) -> None:
    layers = [layer for layer in inspect_layers(artifact).layers if layer.name != "lm_head"]
    assert {str(layer.zeros) for layer in layers} == {"2:4"}
    assert {8 * layer.values.bytes_per_weight for layer in layers} == {8 + 32 / 32, 8 + 32 / 64}


def test_a_bitmask_directory_shows_what_its_files_hold(bitmask: Path, cli: Callable[..., Result]) -> None:
    done = cli(bitmask, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])["inspection"]["layers"]
    stored = load_file(bitmask / "model.safetensors")
    totals = dict.fromkeys(("mask", "values", "scales"), 0)
    for layer in told:
        parts = {part: stored.get(f"{layer['name']}.{part}") for part in totals}
        expected = {part: t.numel() * t.itemsize for part, t in parts.items() if t is not None}
        assert layer["stored_bytes"] == (expected or None)
        if layer["name"] == "lm_head":
            assert (layer["zero_fraction"], layer["bytes_per_weight"]) == (0, 2)
            continue
        assert set(expected) == {"mask", "values"} | ({"scales"} if ".0." in layer["name"] else set())
        rows, inputs = layer["shape"]
        assert parts["values"] is not None
        assert layer["zero_fraction"] == 1 - parts["values"].numel() / (rows * inputs)
        assert layer["bytes_per_weight"] == sum(expected.values()) / (rows * inputs)
        assert layer["limit"] == layer["bytes_per_weight"] / layer["packed"]["bytes_per_weight"]
        assert 1 <= layer["limit"] < 1.06
        assert layer["bits"] == (8 + 16 / inputs if ".0." in layer["name"] else 16)
        for part, size in expected.items():
            totals[part] += size
    head, first, *_ = (line.split() for line in done.stdout.splitlines())
    assert head[5:9] == ["mask", "values", "scales", "bytes"]
    assert first[-10:] == ["8.25", "512", "B", "1.66", "kB", "256", "B", "0.594", "0.562", "1.06x"]
    said = next(line for line in done.stdout.splitlines() if line.startswith("Packed: "))
    each = ", ".join((f"mask {write_bytes(totals['mask'])}", f"values {write_bytes(totals['values'])}"))
    each += f" and scales {write_bytes(totals['scales'])}"
    assert said.startswith(f"Packed: 14 of the layers, in {write_bytes(sum(totals.values()))} ({each}); ")


def test_nothing_is_said_of_parts_where_zeros_are_in_the_file(artifact: Path, sparse: Path) -> None:
    for place in (artifact, sparse):
        found = inspect_layers(place)
        assert not any(layer.stored_bytes for layer in found.layers)
        assert "Packed: " not in write_layers(found)
        assert "mask" not in write_layers(found).splitlines()[0]


def test_one_weight_is_in_memory_at_a_time(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    look = inspecting._look

    def watched(name: str, weight_OI: torch.Tensor, *rest: object) -> object:
        assert not [ref for ref in alive if ref() is not None], "an earlier weight is still held"
        alive.append(weakref.ref(weight_OI))
        return look(name, weight_OI, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(inspecting, "_look", watched)
    inspect_layers(sparse)
    assert len(alive) == 15


def test_zeros_too_few_to_be_timed_are_told(tmp_path: Path) -> None:
    place = tiny_llama(tmp_path / "few")
    tensors = load_file(place / "model.safetensors")
    tensors[f"{Q}.weight"][0, :3] = 0
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    assert "Nothing was timed" not in write_layers(inspect_layers(place))
    text = write_layers(inspect_layers(place, timed=True, device="cpu"))
    assert text.endswith(
        "\nnote: Nothing was timed: in no layer are there zeros enough to pay for saying where they are."
    )


@pytest.mark.parametrize(("device", "is_told"), [("cpu", True), ("meta", False)])
def test_a_crowded_machine_is_told(device: str, is_told: bool) -> None:
    timing = Timing("CSR", (3.0, 4.0, 5.0), (1.0, 2.0, 3.0))
    said = inspecting._notes([timing], True, torch.device(device), load=1e6)
    assert bool(said) == is_told
    assert inspecting._notes([timing], True, torch.device(device), load=0.0) == ()
    if is_told:
        assert said[0].endswith("cores: ratios may be chance.")


def test_layers_of_one_shape_and_pattern_are_timed_once(
    artifact: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[int, ...], str, int]] = []

    def clocked(weight_OI: torch.Tensor, zeros: ZeroLayout, *, model_bytes: int) -> Timing:
        asked.append((tuple(weight_OI.shape), str(zeros), model_bytes))
        return Timing("CSR", (3.0, 4.0, 5.0), (1.0, 2.0, 3.0), ("BSR is left out: young.",))

    monkeypatch.setattr(inspecting, "time_layer", clocked)
    found = inspect_layers(sparse, timed=True, device="cpu")
    weights = 4 * sum(layer.out_features * layer.in_features for layer in found.layers)
    assert sorted(asked) == [((32, 32), "2:4", weights), ((32, 64), "unstructured", weights)]
    assert [layer.name for layer in found.layers if layer.timing] == [DOWN, Q]
    assert found.notes[0] == "BSR is left out: young."
    asked.clear()
    found = inspect_layers(artifact, timed=True, device="cpu")
    assert len(asked) == len(set(asked)) == 4
    timed = {layer.name: layer.timed_as for layer in found.layers if layer.timing}
    assert len(timed) == 14
    assert timed[Q] == "model.layers.0.self_attn.q_proj"
    text = write_layers(found)
    assert "4.00 ms  2.00 ms  2.00x CSR" in text
    assert "14 of 14 layers are faster sparse. Together they take 56.0 ms dense, and 28.0 ms" in text


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        ("CSR", "60%", torch.float32),
        ("CSR", "2:4", torch.bfloat16),
        ("BSR", "block", torch.float32),
    ],
)
def test_kernels_compute_the_dense_layer(name: str, pattern: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=draw)
    zeros = ZeroLayout(zero_fraction=0.5)
    if pattern == "block":
        weight *= torch.eye(4, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
        zeros = ZeroLayout(zero_fraction=7 / 8, block=(8, 8), block_fraction=7 / 8)
    else:
        weight *= parse_pattern(pattern).keep_largest(weight.abs())
    weight, x = weight.to(dtype), torch.randn(1, 64, generator=draw).to(dtype)
    layers, note = matvec._packed(KERNELS[name], weight, zeros, copies=3)
    assert (len(layers), note) == (3, "")
    for layer in layers:
        torch.testing.assert_close(layer(x).double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(36, 64), (32, 68)])
def test_short_blocks_are_not_for_a_kernel_of_whole_ones(shape: tuple[int, int]) -> None:
    zeros = ZeroLayout(zero_fraction=0.5, block=(8, 8), block_fraction=0.5)
    assert matvec._packed(KERNELS["BSR"], torch.ones(shape), zeros, copies=1) == ([], "")


def test_timing_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))

    def refuses(weight_OI: torch.Tensor, zeros: ZeroLayout) -> matvec.Layer:
        raise RuntimeError("no such\ndevice")

    made = {
        "right": lambda w, z: lambda x: torch.nn.functional.linear(x, w),
        "wrong": lambda w, z: lambda x: torch.nn.functional.linear(x, 2 * w),
        "refuses": refuses,
        "unasked": lambda w, z: None,
    }
    monkeypatch.setattr(matvec, "KERNELS", made)
    before = weight.clone()
    timing = time_layer(weight, ZeroLayout(zero_fraction=0.5), model_bytes=10_000)
    assert torch.equal(weight, before)
    assert timing.kernel == "right"
    assert timing.sparse_ms is not None
    assert timing.ratio == timing.dense_ms[1] / timing.sparse_ms[1]
    assert timing.notes[0].startswith("wrong is left out: its output is off by ")
    assert timing.notes[1] == "refuses is left out: no such"
    monkeypatch.setattr(matvec, "KERNELS", {"refuses": refuses})
    alone = time_layer(weight, ZeroLayout(zero_fraction=0.5), model_bytes=1)
    assert (alone.kernel, alone.sparse_ms, alone.ratio) == ("", None, 1.0)


def test_samples_are_taken_in_turn_and_go_round_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def layer(name: str) -> matvec.Layer:
        return lambda x: called.append(name) or x  # type: ignore[func-returns-value]

    monkeypatch.setattr(matvec, "SAMPLE_S", 0.0)
    monkeypatch.setattr(matvec, "SAMPLES", 2)
    taken = matvec._samples([[layer("a1"), layer("a2")], [layer("b1"), layer("b2")]], torch.zeros(1, 1))
    assert [len(ms) for ms in taken] == [2, 2]
    assert called == ["a1", "a2", "b1", "b2", "a1", "a2"] + ["a1", "a2", "b1", "b2"] * 2


def test_the_command(artifact: Path, sparse: Path, cli: Callable[..., Result]) -> None:
    done = cli(sparse, "--time", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    (layer,) = [x for x in told["inspection"]["layers"] if x["name"] == Q]
    assert (layer["pattern"], layer["packed"]["storage"], layer["timing"]["kernel"]) == (
        "2:4",
        "index",
        "CSR",
    )
    assert layer["timing"]["ratio"] == pytest.approx(
        layer["timing"]["dense_ms"] / layer["timing"]["sparse_ms"]
    )
    assert {name for name, gain in layer["gain_on"].items() if gain > 1} == {"compresskit"}
    assert "layers are faster sparse" in done.stdout
    shown = cli(artifact, "--verify", "--json")
    assert shown.exit_code == 0, shown.output
    assert "1-prune: promises kept" in shown.stdout
    assert "files are as they were written" in shown.stdout
    told = json.loads(shown.stdout.splitlines()[-1])
    assert [stage["name"] for stage in told["stages"]] == ["1-prune", "2-quantize"]
    assert len(told["inspection"]["layers"]) == 15


def test_wrongly(sparse: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in sparse.iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: 4000 if file.suffix == ".safetensors" else None])
    for argv, parts in (
        ((empty,), ["config.json", "an empty directory"]),
        ((sparse / "config.json",), ["expected a model directory", "got a file"]),
        ((tmp_path / "absent",), ["absent", "hub"]),
        ((sparse, "--verify"), ["compresskit.json", "Give a directory that compresskit wrote"]),
        ((sparse, "--time", "--device", "tpu9"), ["auto, cpu, cuda or cuda:0", "tpu9"]),
        ((cut,), ["model.safetensors"]),
    ):
        done = cli(*argv)
        assert done.exit_code == 2, (argv, done.output)
        for part in parts:
            assert part in done.output, done.output
        assert "Traceback" not in done.output
