"""Measure one model directory, or several in turn; each figure becomes a record. No torch at import."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compresskit.data.dialogue import Content
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError
from compresskit.measure.fresh import run_probe
from compresskit.measure.record import Record, spread
from compresskit.progress import Progress
from compresskit.registry import nearest
from compresskit.timing import (
    REPETITIONS,
    WARMUP,
    default_threads,
    is_crowded,
    load_average,
    request_tokens,
)

Json = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured and how; built by :func:`measure`.

    Attributes:
        name: of the records.
        directory: of the checkpoint.
        data: text for quality, or the texts themselves.
        context_length: for quality; None is the model's own maximum.
        max_documents: for quality; None is all.
        prompt_tokens: of the prefill.
        decode_tokens: decoded one by one.
        repetitions: timed rounds.
        warmup: rounds before them.
        threads: of one operation.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        seed: of the prompt.
        trust_remote_code: whether code in the directory may run.
    """

    name: str
    directory: Path
    data: DataSpec | Iterable[str]
    context_length: int | None
    max_documents: int | None
    prompt_tokens: int
    decode_tokens: int
    repetitions: int
    warmup: int
    threads: int
    device: str
    seed: int
    trust_remote_code: bool

    def record(self, kind: str, values: Mapping[str, Json], **more: Json) -> Record:
        """A record of this subject."""
        return Record(
            kind=kind, subject=self.name, values=values, threads=self.threads, seed=self.seed, **more
        )


def measure(
    directory: str | Path,
    *,
    data: DataSpec | Iterable[str] | None = None,
    what: Collection[str] = ("size", "quality", "latency", "memory"),
    subject: str | None = None,
    context_length: int | None = None,
    max_documents: int | None = None,
    prompt_tokens: int | None = None,
    decode_tokens: int | None = None,
    repetitions: int = REPETITIONS,
    warmup: int = WARMUP,
    threads: int | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> list[Record]:
    """Measure the model in ``directory`` as plain ``AutoModel*.from_pretrained`` loads it.

    Args:
        directory: a Hugging Face checkpoint, compressed or not.
        data: text for quality: the named split of a DataSpec (the validation split of ``stdlib:`` when
            None), or texts.
        what: which of :data:`MEASUREMENTS`, in this order.
        subject: name in the records; None is the directory's.
        context_length: tokens for quality; None is the model's maximum.
        max_documents: for quality; None scores all.
        prompt_tokens: of the prefill; None is 128, or what fits.
        decode_tokens: decoded one by one; None is 32, or what fits.
        repetitions: timed rounds of latency, in one fresh process.
        warmup: rounds before them.
        threads: of one operation in latency and memory; None is OMP_NUM_THREADS or every core.
        device: ``auto`` takes CUDA where there is one; else ``cpu``, ``cuda`` or ``cuda:0``.
        seed: of the prompt's token ids.
        trust_remote_code: whether code in the directory may run.

    Returns:
        One record for each entry of ``what``; where quality does not apply its values are None, with a note.

    Raises:
        InputError: an unknown measurement, lengths that do not fit, no model that loads, no text to score.
    """
    _check_what(what)
    directory = Path(directory)
    prompt, decode = _lengths(directory, prompt_tokens, decode_tokens, trust_remote_code)
    made = Subject(
        name=subject or directory.resolve().name,
        directory=directory,
        data=DataSpec(split="validation") if data is None else data,
        context_length=context_length,
        max_documents=max_documents,
        prompt_tokens=prompt,
        decode_tokens=decode,
        repetitions=_at_least_one(repetitions, "repetitions"),
        warmup=warmup,
        threads=_at_least_one(default_threads() if threads is None else threads, "threads"),
        device=_device(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    return [MEASUREMENTS[name](made) for name in what]


def _check_what(what: Collection[str]) -> None:
    if unknown := [name for name in what if name not in MEASUREMENTS]:
        cure = f"Did you mean: {nearest(unknown[0], MEASUREMENTS)}?"
        raise InputError(Fault("what", "measurements", ", ".join(unknown), cure))


def compare_latency(
    directories: Mapping[str, str | Path], *, rounds: int = 3, **settings: Any
) -> list[Record]:
    """Latency of several models side by side: a fresh process for each in turn, ``rounds`` times over.

    A machine whose load drifts then drifts for all of them; records measured one after another do not have
    that.

    Args:
        directories: subject -> checkpoint.
        rounds: fresh processes of each.
        settings: as of :func:`measure`.

    Returns:
        One record for each directory, over the samples of all rounds.
    """
    samples: dict[str, list[Record]] = {name: [] for name in directories}
    with Progress("latency", rounds * len(directories), unit="processes") as progress:
        for _ in range(_at_least_one(rounds, "rounds")):
            for name, directory in directories.items():
                samples[name] += measure(directory, what=("latency",), subject=name, **settings)
                progress.advance(note=name)
    return [_merged(records, rounds) for records in samples.values()]


def _merged(records: list[Record], rounds: int) -> Record:
    """One record over the medians of several processes: their spread is what a user will meet."""
    first = records[0]
    quartiles = {
        name: spread([float(r.values[name]) for r in records])
        for name in ("prefill_ms", "decode_ms", "load_ms")
        if name in first.values
    }
    values = {**first.values, **{name: three[1] for name, three in quartiles.items()}}
    notes = tuple(dict.fromkeys(note for r in records for note in r.notes))
    return Record(
        **{
            **first.to_json(),
            "values": values,
            "quartiles": quartiles,
            "notes": notes,
            "repetitions": rounds,
            "settings": {**first.settings, "rounds_in_turn": rounds, "rounds_per_process": first.repetitions},
        }
    )


def _measure_size(subject: Subject) -> Record:
    from compresskit.measure.size import size

    return subject.record("size", size(subject.directory, trust_remote_code=subject.trust_remote_code))


def _measure_quality(subject: Subject) -> Record:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from compresskit.measure.load import is_causal, load_model, max_positions
    from compresskit.measure.quality import Quality, quality

    if not is_causal(subject.directory):
        return subject.record(
            "quality",
            dict.fromkeys(Quality.__dataclass_fields__),
            notes=("Perplexity does not apply: this model does not predict the next token.",),
        )
    trust = {"trust_remote_code": subject.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(subject.directory, **trust)
    config = AutoConfig.from_pretrained(subject.directory, **trust)
    context = subject.context_length or max_positions(config)
    model = load_model(subject.directory, device=subject.device, **trust)
    documents, source = _documents(subject.data)
    found = quality(model, tokenizer, documents, context_length=context, max_documents=subject.max_documents)
    record = subject.record(
        "quality",
        asdict(found),
        device=device_name(subject.device),
        settings={
            "data": source,
            "context_length": context,
            "max_documents": subject.max_documents,
            "longer_documents": "truncated",
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    )
    # Quality runs in this process, whose threads are its own.
    return Record(**{**record.to_json(), "notes": record.notes, "threads": torch.get_num_threads()})


def _documents(data: DataSpec | Iterable[str]) -> tuple[Iterable[Content], str]:
    """The texts or dialogues to score and where they are from."""
    if not isinstance(data, DataSpec):
        return data, "texts given in the call"
    from compresskit.data import open_corpus

    name = data.source if data.split == "all" else f"{data.source}, {data.split} split"
    return open_corpus(data).documents(data.split), name


def _measure_latency(subject: Subject) -> Record:
    load_before = load_average()
    answer = run_probe("latency", _job(subject), threads=subject.threads)
    quartiles = {"prefill_ms": spread(answer["prefill_ms"])}
    if answer["decode_ms"]:
        quartiles["decode_ms"] = spread(answer["decode_ms"])
    notes = [*answer["notes"], *layout_notes(answer["layouts"])]
    if not answer["decode_ms"]:
        notes.append("This model does not predict the next token: only a forward pass was timed.")
    load = max(load_before, load_average())
    if is_crowded(load) and subject.device == "cpu":
        notes.append(
            f"The machine had more work than its {os.cpu_count()} cores: times are too long, and differences "
            "between models may be chance."
        )
    return subject.record(
        "latency",
        {**{name: three[1] for name, three in quartiles.items()}, "load_ms": answer["load_ms"]},
        quartiles=quartiles,
        device=device_name(subject.device),
        repetitions=subject.repetitions,
        notes=tuple(notes),
        settings={
            "prompt_tokens": subject.prompt_tokens,
            "decode_tokens": subject.decode_tokens if answer["decode_ms"] else 0,
            "batch_size": 1,
            "warmup": subject.warmup,
            "dtype": answer["dtype"],
            "attention": answer["attention"],
            "load_average": round(load, 2),
            "layouts": answer["layouts"],
        },
    )


def layout_notes(layouts: Mapping[str, str]) -> list[str]:
    """How packed layers multiply, in a sentence for each way; blocks have a star for their number.

    Args:
        layouts: layer -> layout, or layouts by the tokens of a batch.
    """
    alike: dict[str, dict[str, int]] = {}
    for layer, layout in layouts.items():
        counts = alike.setdefault(layout, {})
        name = re.sub(r"\.\d+(?=\.)", ".*", layer)
        counts[name] = counts.get(name, 0) + 1
    return [
        f"Packed layers that multiply as {layout}: "
        + ", ".join(f"{name} ({count})" for name, count in counts.items())
        + "."
        for layout, counts in alike.items()
    ]


def _measure_memory(subject: Subject) -> Record:
    answer = run_probe("memory", _job(subject), threads=subject.threads)
    is_reset = answer.pop("is_peak_of_load_and_run")
    if answer["cuda_peak_bytes"] is None:
        del answer["cuda_peak_bytes"]
    notes = ["Resident pages of the memory-mapped checkpoint count too."]
    if not is_reset:
        notes.append("The peak may be that of the imports: this system cannot reset it.")
    return subject.record(
        "memory",
        {**answer, "model_bytes": max(answer["peak_bytes"] - answer["baseline_bytes"], 0)},
        device=device_name(subject.device),
        notes=tuple(notes),
        settings={
            "prompt_tokens": subject.prompt_tokens,
            "decode_tokens": subject.decode_tokens,
            "baseline": "Python with torch, transformers and the model's code, before the weights",
        },
    )


MEASUREMENTS: Mapping[str, Callable[[Subject], Record]] = {
    "size": _measure_size,
    "quality": _measure_quality,
    "latency": _measure_latency,
    "memory": _measure_memory,
}


def _job(subject: Subject) -> dict[str, Json]:
    from compresskit.measure.load import is_causal

    return {
        "directory": str(subject.directory),
        "device": subject.device,
        "trust_remote_code": subject.trust_remote_code,
        "causal": is_causal(subject.directory),
        "prompt_tokens": subject.prompt_tokens,
        "decode_tokens": subject.decode_tokens,
        "repetitions": subject.repetitions,
        "warmup": subject.warmup,
        "seed": subject.seed,
    }


def _lengths(
    directory: Path, prompt: int | None, decode: int | None, trust_remote_code: bool
) -> tuple[int, int]:
    """Prompt and decode lengths that fit the model's positions."""
    from transformers import AutoConfig

    from compresskit.measure.load import auto_class, max_positions

    auto_class(directory)  # says in full what is wrong with a directory that holds no model
    limit = max_positions(AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code))
    return request_tokens(limit, prompt, decode)


def _at_least_one(value: int, name: str) -> int:
    if value < 1:
        raise InputError(Fault(name, "at least 1", str(value), f"Raise {name}."))
    return value


def _device(device: str) -> str:
    from compresskit.modeling import resolve_device

    return str(resolve_device(device))


def device_name(device: str) -> str:
    """``cpu``, or the accelerator's own name."""
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)
