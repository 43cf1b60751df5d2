"""A model cut to about half of its parameters, trained back, and what the plan said of it.

    python -m benchmarks.cutting --model DIR --train FILE --evaluate FILE
    python -m benchmarks.cutting

Without a model it is the bundled teacher on the ``stdlib:`` corpus. Width, depth and both are cut in turn,
and each is distilled from the uncut model. Parameters and bytes are those of the plan beside those of the
directory that plain transformers loads. Latency is forecast and then measured in a fresh process, one right
after the other, ``--rounds`` times over: medians of both, and of the deviations of each round. With
``--keep`` the models are left in a folder, and a second run with it only takes the times, as when the machine
had other work during the training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compresskit as ck
from benchmarks.run import append_record, settings_of
from compresskit.assets import teacher_path
from compresskit.measure import measure
from compresskit.measure.size import file_bytes
from compresskit.modeling import open_model
from compresskit.modeling.skeleton import context_length
from compresskit.sparse.structured.cut import Cut
from compresskit.sparse.structured.latency import Latency, stopwatch_for
from compresskit.sparse.structured.outline import Outline
from compresskit.sparse.structured.surgery import Patient
from compresskit.timing import request_tokens

TRIMS = ("width", "depth", "both")
DENSE = "dense"
loads: Any = AutoModelForCausalLM


def distilled(trim: str, place: Path, options: Any) -> dict[str, Any]:
    """Cut to ``trim`` and train back; what was planned, what lies on the disk, and the quality of each."""
    data, fields = ck.DataSpec(source=options.train), {"trim": trim, "parameters": fraction(trim, options)}
    cut = ck.Prune("cut", options={**fields, "importance": options.importance})
    train = ck.Distill(
        teacher=str(options.model),
        steps=options.steps,
        batch_size=options.batch_size,
        context_length=options.context_length,
        learning_rate=options.learning_rate,
        checkpoint_every=0,
    )
    small, back = place / f"{trim}-cut", place / trim
    (stage,) = (planned := ck.plan(ck.Recipe(model=str(options.model), data=data, stages=(cut,)))).stages
    ck.run(planned.recipe, small, measures=())
    ck.run(ck.Recipe(model=str(small), data=data, stages=(train,)), back, measures=())
    after = stage.forecast.after
    bytes_on_disk = file_bytes(back)["weights_bytes"]
    model, told = loads.from_pretrained(back, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(back)
    prompt = tokenizer(options.prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False)
    return {
        "notes": list(stage.forecast.notes),
        "parameters_planned": after.anatomy.num_parameters,
        "parameters_loaded": model.num_parameters(),
        "parameters_fraction": model.num_parameters() / stage.before.anatomy.num_parameters,
        "weights_bytes_planned": after.checkpoint_bytes,
        "weights_bytes_on_disk": bytes_on_disk,
        "bytes_deviation_percent": percent(bytes_on_disk / after.checkpoint_bytes),
        "bits_per_byte_cut": bits(small, options),
        "bits_per_byte_distilled": bits(back, options),
        "missing_keys": sorted(told["missing_keys"]),
        "unexpected_keys": sorted(told["unexpected_keys"]),
        "continuation": tokenizer.decode(made[0], skip_special_tokens=True),
    }


def made(place: Path, options: Any) -> dict[str, Any]:
    """The models in ``place`` and what was found of them, from a run before where there was one."""
    path = place / "made.json"
    values: dict[str, Any] = {}
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
    if DENSE not in values:
        values[DENSE] = {"bits_per_byte": bits(options.model, options)}
    for trim in TRIMS:
        if trim not in values:
            values[trim] = distilled(trim, place, options)
            print(trim, json.dumps(values[trim], indent=1), flush=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return values


def fraction(trim: str, options: Any) -> float:
    """Of the parameters to keep."""
    kept = options.depth_parameters if trim == "depth" else None
    return float(kept or options.parameters)


def bits(directory: Path, options: Any) -> float:
    """Bits per byte of ``directory`` on the documents of the evaluation."""
    found = ck.bench(
        directory, data=options.evaluate, measures=("quality",), documents=options.documents or None
    )
    return float(found[0].values["bits_per_byte"])


def planned_shapes(options: Any) -> dict[str, Patient]:
    """The uncut model, and what a plan leaves of it; no weight is read."""
    source = open_model(options.model)
    whole = Patient(source.config, source.anatomy, source.directory)
    shapes = {DENSE: whole}
    for trim in TRIMS:
        surgery = Outline(Cut(parameters=fraction(trim, options), trim=trim), whole).surgery()
        shapes[trim] = Patient(surgery.config, surgery.anatomy, source.directory)
    return shapes


def latencies(directories: Mapping[str, Path], options: Any) -> dict[str, dict[str, Any]]:
    """Forecast and measured times of each subject, one right after the other in each round."""
    source, shapes = open_model(options.model), planned_shapes(options)
    prompt, decode = request_tokens(context_length(source.config), None, None)
    weight_bytes = source.bytes / source.anatomy.num_parameters
    watch = stopwatch_for(source.config, weight_bytes, "cpu", prompt, decode)
    rounds: dict[str, list[tuple[Latency, Latency]]] = {name: [] for name in directories}
    for turn in range(options.rounds):
        for name, directory in directories.items():
            forecast = watch.time(shapes[name])
            (record,) = measure(directory, what=("latency",), threads=watch.threads, device="cpu")
            times = {key: float(record.values[key]) for key in ("prefill_ms", "decode_ms")}
            measured = Latency(**times, decode_tokens=decode)
            rounds[name].append((forecast, measured))
            print(turn, name, "forecast", forecast, "measured", measured, flush=True)
    return {name: deviations(pairs) for name, pairs in rounds.items()}


def deviations(pairs: list[tuple[Latency, Latency]]) -> dict[str, Any]:
    """Medians over rounds; a deviation is that of the measured time from the one forecast in its round."""
    found: dict[str, Any] = {}
    for key in ("prefill_ms", "decode_ms", "request_ms"):
        forecast, measured = ([float(getattr(one, key)) for one in side] for side in zip(*pairs, strict=True))
        ratios = [after / before for before, after in zip(forecast, measured, strict=True)]
        found[f"{key}_forecast"], found[f"{key}_measured"] = median(forecast), median(measured)
        name = key.removesuffix("_ms")
        found[f"{name}_deviation_percent"] = percent(median(ratios))
        found[f"{name}_deviation_percent_by_round"] = [percent(ratio) for ratio in ratios]
    return found


def percent(ratio: float) -> float:
    """How far a ratio is from one."""
    return round(100 * (ratio - 1), 2)


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="A model cut to half of its size and trained back.")
    parser.add_argument("--model", type=Path, default=teacher_path())
    parser.add_argument("--train", default="stdlib:")
    parser.add_argument("--evaluate", default="stdlib:")
    parser.add_argument("--documents", type=int, default=200, help="of the evaluation; 0 takes all")
    parser.add_argument("--parameters", type=float, default=0.5)
    parser.add_argument("--depth-parameters", type=float, help="where whole blocks leave no such fraction")
    parser.add_argument("--importance", default="activation")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--prompt", default="def read(self, path):\n")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="where models are left, or are found from a run before")
    return parser.parse_args()


def main() -> None:
    """Run it for one model and append a record."""
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        values = made(place, options)
        directories = {DENSE: options.model, **{trim: place / trim for trim in TRIMS}}
        for name, found in latencies(directories, options).items():
            values[name] |= found
            print(name, json.dumps(found, indent=1), flush=True)
    settings = settings_of(options, ("model", "train", "evaluate", "keep"))
    print(
        append_record(
            "cutting", values, subject=options.model.name, settings=settings, repetitions=options.rounds
        )
    )


if __name__ == "__main__":
    main()
