"""What the figures mean for someone who runs the model: one honest sentence for each thing won or not won."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean

from compresskit.errors import InputError
from compresskit.exports import EXPORTS, runtimes_of
from compresskit.kernels.limits import BF16, ZeroLayout, values_of
from compresskit.reports.chain import FINAL, Chain, Step, is_cut
from compresskit.reports.figures import ends, write_bytes, write_ms, write_quality
from compresskit.sparse.worth import Worth, layout_of, usual_values

NO_CHANGE = 0.02  # ratios within two hundredths of 1 are called unchanged


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence; ``tone`` is ``gain``, ``cost`` or ``note``."""

    tone: str
    text: str


def findings(chain: Chain) -> list[Finding]:
    """Every finding about ``chain``: totals first, then what each stage gives on the runtime."""
    found = [*_size(chain), *_latency(chain), *_memory(chain), *_quality(chain)]
    for index, step in enumerate(chain.steps[1:], 1):
        about = ABOUT_STAGES.get(step.kind)
        if about is not None:
            found += about(chain, index)
    found += _recovery(chain)
    return found


def times(first: float, last: float) -> str:
    """``3.6x smaller``'s number: the larger over the smaller, with two or three digits."""
    ratio = max(first, last) / max(min(first, last), 1e-300)
    return f"{ratio:.3g}x" if ratio >= 10 else f"{ratio:.2f}x"


def is_same(first: float, last: float) -> bool:
    """Whether two figures are within two hundredths of each other."""
    return abs(last / first - 1) <= NO_CHANGE if first else first == last


@dataclass(frozen=True, slots=True)
class TimeChange:
    """How the time of two steps differs: ``word`` is ``unchanged``, ``faster`` or ``slower``.

    ``explained`` is False when the measured difference is larger than its spread and yet both models are the
    same work for the runtime: as many parameters, the same dtype. Then it is the machine that changed.
    """

    word: str
    explained: bool

    @property
    def tone(self) -> str:
        """Of a finding."""
        return "note" if self.word == "unchanged" or not self.explained else TONES[self.word]


TONES = {"faster": "gain", "slower": "cost"}
DRIFT = (
    "but both models are the same work for this runtime, so that is the machine's drift between the two "
    "measurements, not the model's gain or loss"
)


def time_change(first: Step, last: Step, name: str) -> TimeChange:
    """Compare one latency of two steps that both have it."""
    records = first.records["latency"], last.records["latency"]
    old, new = float(records[0].values[name]), float(records[1].values[name])
    low, high = (r.quartiles.get(name, (v, v, v)) for r, v in zip(records, (old, new), strict=True))
    if is_same(old, new) or (low[0] <= high[2] and high[0] <= low[2]):
        return TimeChange("unchanged", True)
    parameters = [step.value("size", "num_parameters") for step in (first, last)]
    same_work = parameters[0] is not None and parameters[0] == parameters[1]
    same_work &= records[0].settings.get("dtype") == records[1].settings.get("dtype")
    same_work &= records[0].device == records[1].device == "cpu"
    if new < old:
        return TimeChange("faster", not same_work)
    # Unpacking, and quantising activations on the way, is work that only a packed model has.
    widths = [step.value("size", "bytes_per_parameter") or 0.0 for step in (first, last)]
    return TimeChange("slower", not same_work or not is_same(widths[0], widths[1]))


def _size(chain: Chain) -> list[Finding]:
    pair = ends(chain, "size", "total_bytes")
    if pair is None:
        return []
    first, last = pair
    if is_same(first, last):
        return [Finding("note", f"Size on disk is unchanged: {write_bytes(last)}.")]
    tone, word = ("gain", "smaller") if last < first else ("cost", "larger")
    text = f"{write_bytes(first)} became {write_bytes(last)} on disk"
    return [Finding(tone, f"{times(first, last)} {word}: {text}.")]


def _latency(chain: Chain) -> list[Finding]:
    """What became of prompt and token time; one sentence for both where the same is true of both."""
    told: dict[tuple[str, str], list[str]] = {}
    for name, what in (("prefill_ms", "the prompt"), ("decode_ms", "each token")):
        pair = ends(chain, "latency", name)
        if pair is None:
            continue
        change = time_change(chain.steps[0], chain.steps[-1], name)
        lead = "No faster" if change.tone == "note" else f"{times(*pair)} {change.word}"
        if change.word == "unchanged":
            lead, reason = "No faster", ", within the spread of the repetitions"
        else:
            reason = "" if change.explained else f", {DRIFT}"
        text = f"{write_ms(pair[0])} before and {write_ms(pair[1])} after for {what}"
        told.setdefault((change.tone, reason), []).append(f"{lead}: {text}" if change.explained else text)
    found = []
    for (tone, reason), texts in told.items():
        if reason.endswith(DRIFT):
            texts[0] = f"No faster: measured {texts[0]}"
        elif reason:
            texts[1:] = [text.removeprefix("No faster: ") for text in texts[1:]]
        found.append(Finding(tone, f"{('; ' if not reason else ', ').join(texts)}{reason}."))
    return found


def _memory(chain: Chain) -> list[Finding]:
    pair = ends(chain, "memory", "model_bytes")
    baseline = chain.steps[0].value("memory", "baseline_bytes")
    if pair is None or baseline is None:
        return []
    first, last = pair
    beyond = f"beyond the {write_bytes(baseline)} that Python with its libraries takes by itself"
    if is_same(first, last):
        return [Finding("note", f"Peak memory is unchanged: {write_bytes(last)} {beyond}.")]
    tone, word = ("gain", "Less") if last < first else ("cost", "More")
    text = f"{write_bytes(first)} became {write_bytes(last)} {beyond}"
    return [Finding(tone, f"{word} memory: {text}.")]


def _quality(chain: Chain) -> list[Finding]:
    pair = ends(chain, "quality", "bits_per_byte")
    if pair is None:
        return []
    first, last = pair
    change = last / first - 1
    text = f"{write_quality(first)} became {write_quality(last)} bits per byte ({change:+.1%})"
    if abs(change) < 0.0005:
        return [Finding("gain", f"Quality is unchanged: {text}.")]
    return [
        Finding("cost", f"Quality fell: {text}.") if change > 0 else Finding("gain", f"Quality rose: {text}.")
    ]


def _timing(chain: Chain, index: int) -> str:
    """What was measured from the step before to step ``index``, as half a sentence."""
    before, after = chain.steps[index - 1], chain.steps[index]
    old, new = before.value("latency", "decode_ms"), after.value("latency", "decode_ms")
    if old is None or new is None:
        return "Latency was not measured"
    change, figures = time_change(before, after, "decode_ms"), f"{write_ms(old)}, {write_ms(new)}"
    if change.word == "unchanged":
        return f"The measured time per token is the same within its spread ({figures})"
    text = f"The measured time per token is {times(old, new)} {change.word} ({figures})"
    return text if change.explained else f"{text}, {DRIFT}"


def _prune(chain: Chain, index: int) -> list[Finding]:
    step = chain.steps[index]
    if is_cut(step.fields):
        return [
            Finding(
                "gain", f"Pruning cut whole layers and neurons: every runtime gains. {_timing(chain, index)}."
            )
        ]
    share, worth = step.value("size", "zero_fraction"), _worth(chain, index)
    zeros = f"{share:.0%} of the linear weights are zero. " if share is not None else ""
    timing = _timing(chain, index)
    if not _is_faster(chain, index):
        timing = f"Not faster, since zeros are multiplied too: {timing[0].lower()}{timing[1:]}"
    text = f"{zeros}{worth.as_stored()} {timing}. {worth.at_best()}"
    return [Finding("note", text), Finding("note", worth.advice())]


def _worth(chain: Chain, index: int) -> Worth:
    """What the zeros of step ``index`` are worth on the runtimes that the chain was made for."""
    step = chain.steps[index]
    try:
        zeros = layout_of(step.fields["pattern"])
    except (KeyError, InputError):  # of another version: what was made stays true
        shares = [float(layer["zero_fraction"]) for layer in step.layers]
        zeros = ZeroLayout(zero_fraction=fmean(shares) if shares else 0.0)
    bits = {layer["name"]: layer["bits"] for s in chain.steps for layer in s.layers}
    made = [(values_of(bits[layer["name"]]), 1) for layer in step.layers]
    targets = [to for to in chain.recipe.get("export", ()) if to in EXPORTS]
    return Worth(zeros, usual_values(made or [(BF16, 1)]), runtimes_of(targets))


def _is_faster(chain: Chain, index: int) -> bool:
    """Whether step ``index`` was measured faster than the one before, or not at all."""
    before, after = chain.steps[index - 1], chain.steps[index]
    if any(step.value("latency", "decode_ms") is None for step in (before, after)):
        return True
    change = time_change(before, after, "decode_ms")
    return change.word == "faster" and change.explained


def _quantize(chain: Chain, index: int) -> list[Finding]:
    scheme = str(chain.steps[index].fields.get("scheme", "")).lower()
    match = re.match(r"w(\d+)a(\d+)", scheme)
    bits = match.group(1) if match else "few"
    integer = (
        " Integer arithmetic (w8a8) needs such a runtime too." if match and match.group(2) == "8" else ""
    )
    after = chain.steps[index + 1 : index + 2]
    last = index + 1 if after and after[0].kind == FINAL else index  # only the artifact is packed
    return [
        Finding(
            "note",
            f"transformers unpacks {bits}-bit weights on the first forward pass and computes in the model's "
            "own dtype: the file is smaller, while memory and time are at best those of the dense model. "
            f"vLLM computes on the packed weights.{integer} {_timing(chain, last)}.",
        )
    ]


def _recovery(chain: Chain) -> list[Finding]:
    """How much of what pruning or quantising cost the training after it won back."""
    found = []
    first = chain.steps[0].value("quality", "nats_per_token")
    for before, after in zip(chain.steps[1:], chain.steps[2:], strict=False):
        worse, better = before.value("quality", "nats_per_token"), after.value("quality", "nats_per_token")
        if after.kind not in ("distill", "finetune") or first is None or worse is None or better is None:
            continue
        if worse > first:
            share = (worse - better) / (worse - first)
            tone = "gain" if share > 0 else "cost"
            name = {"distill": "Distillation", "finetune": "Fine-tuning"}[after.kind]
            found.append(
                Finding(
                    tone, f"{name} won back {share:.0%} of the nats per token that the step before had cost."
                )
            )
    return found


ABOUT_STAGES = {"prune": _prune, "sparse_train": _prune, "quantize": _quantize, "qat": _quantize}
