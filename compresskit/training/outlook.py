"""What can be told of a training stage before it runs: its faults and the memory it takes. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compresskit.errors import Fault
from compresskit.kernels.chunking import loss_bytes
from compresskit.stage import Forecast
from compresskit.timing import usable_cores
from compresskit.training.faults import training_faults
from compresskit.training.fields import TrainingFields
from compresskit.training.mesh.plan import tensor_faults
from compresskit.training.optimizers import OPTIMIZERS
from compresskit.training.rules.asynchronous import BUCKET, ZENFLOW
from compresskit.training.rules.memory import NOISE
from compresskit.training.rules.pipeline import STAGES_A_RANK
from compresskit.training.rules.zenflow import SELECTED, shape_faults
from compresskit.training.setting import Setting, launched_processes

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy
    from compresskit.stage import Outlook

LONGEST_ROW = 2048
"""Tokens of a row where neither the recipe nor the model asks for fewer."""
STATE_BYTES = 16
"""Of one trained parameter: fp32 weight, gradient and the two moments of Adam."""
INT8_NOTES = {
    "cpu": "Products in int8 were faster than in fp32 and slower than in bf16, on a CPU with instructions "
    "for both; without such instructions they may be slower than either.",
    "cuda": "How much faster products in int8 are on a GPU was not measured.",
}
OF_SENTENCES = (
    "Choose a causal language model; others can be distilled, with loss: embedding_cosine, embedding_mse or "
    "pairwise, or class_logits for a classifier."
)
UNSUPPORTED_SCALES = ("lm_head_multiplier", "logit_scale", "logits_scaling")


def student_faults(fields: TrainingFields, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with training such a ``model`` with these ``fields``."""
    place = {"devices": model.devices, "cores": usable_cores()}
    faults = training_faults(fields, where, device=model.device, **place)
    if fields.learns_sentences:
        pass  # which models can is told by the lesson
    elif not model.anatomy.is_causal or model.anatomy.head is None:
        expected = "a causal language model with an output projection"
        faults.append(Fault(where, expected, type(model.config).__name__, OF_SENTENCES))
    else:
        faults += _probed_faults(fields, model, where) + scale_faults(model.config, where)
    if fields.matmul == "int8" and all(n.transposed for n in model.anatomy.linears.values() if n.block):
        cure = "Use matmul float: torchao multiplies no layer that stores its weight transposed."
        faults.append(Fault(f"{where}.matmul", "a model with torch.nn.Linear in its blocks", "none", cure))
    stages = fields.pipeline_stages * STAGES_A_RANK.get(fields.pipeline_schedule, 1)
    if fields.pipeline_stages > 1 and stages > len(model.anatomy.blocks):
        expected = f"at least {stages} blocks for {fields.pipeline_stages} x {fields.pipeline_schedule}"
        got = str(len(model.anatomy.blocks))
        faults.append(Fault(f"{where}.pipeline_stages", expected, got, "Lower pipeline_stages."))
    if fields.synchronise == ZENFLOW:
        faults += shape_faults(model.anatomy.parameter_shapes, where)
    limit = getattr(model.config, "max_position_embeddings", None)
    if fields.tensor_parallel > 1:
        faults += tensor_faults(model.config, model.anatomy, fields.tensor_parallel, where)
    if fields.context_length and limit and fields.context_length > limit:
        faults.append(
            Fault(
                f"{where}.context_length",
                f"at most {limit}, the model's own maximum",
                str(fields.context_length),
                "Lower context_length.",
            )
        )
    return faults


def scale_faults(config: Any, where: str) -> list[Fault]:
    """What is wrong with the output projection of a student or teacher with such a configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [
        Fault(
            where,
            f"a model whose logits are not scaled ({name})",
            f"{name}={getattr(text, name)}",
            "Choose another model: the fused losses do not know this scale yet.",
        )
        for name in UNSUPPORTED_SCALES
        if getattr(text, name, 1.0) not in (None, 1.0)
    ]


def _probed_faults(fields: TrainingFields, model: Outlook, where: str) -> list[Fault]:
    """Why its logits would be others, or documents of a row see each other unless the data says they may."""
    from compresskit.training.isolation import probed_faults

    return probed_faults(
        where,
        model.config,
        model.anatomy,
        model.original,
        trust_remote_code=model.trust_remote_code,
        isolated=not (getattr(fields, "data", None) or model.data).cross_documents,
    )


def live_copy_bytes(fields: TrainingFields, anatomy: Anatomy, layers: Iterable[str]) -> int:
    """Of a float32 copy of the weight of each of ``layers`` that computes with one, as alive in a pass."""
    linears = anatomy.linears
    blocks: dict[str | None, int] = {}
    for name in layers:
        linear = linears[name]
        blocks[linear.block] = blocks.get(linear.block, 0) + linear.out_features * linear.in_features
    if fields.activation_checkpointing and anatomy.blocks:
        return 4 * max(blocks.values(), default=0)
    return 4 * sum(blocks.values())


def pass_tokens(fields: TrainingFields, config: Any) -> int:
    """Input tokens of one forward pass of one process, for a model with such a configuration."""
    longest = min(getattr(config, "max_position_embeddings", None) or LONGEST_ROW, LONGEST_ROW)
    setting = Setting(fields, launched_processes() or fields.processes, "cpu")
    return setting.micro_batch_size * (fields.context_length or longest)


def state_bytes(fields: TrainingFields, anatomy: Anatomy, trained: int) -> int:
    """What the optimiser of ``fields`` keeps of ``trained`` parameters, where nothing is sharded."""
    known = OPTIMIZERS[fields.optimizer]
    rest = known.matrix_bytes if known.rest_bytes is None else known.rest_bytes
    linears = [linear for linear in anatomy.linears.values() if linear.block]
    matrices = sum(linear.out_features * linear.in_features for linear in linears)
    if (
        trained < anatomy.num_parameters
    ):  # adapters, or the parameters that are no matrices: which, none knows
        return round(max(rest, known.matrix_bytes) * trained)
    return round(known.matrix_bytes * matrices + rest * (trained - matrices))


def kept_per_token(fields: TrainingFields, blocks: int, width: int, inner: int, device: str) -> int:
    """Numbers that blocks hold of one token at the end of the forward pass, and what works besides.

    Measured on Llama's blocks: beside its input each keeps queries, keys, values, what attention made, both
    norms and four tensors of the feed-forward's width; by operator, the outputs of its seven products and
    attention.

    Args:
        fields: of the stage.
        blocks: of the model.
        width: of the hidden states.
        inner: of the feed-forward layers.
        device: ``cpu`` or ``cuda``; only a GPU's tensors can wait elsewhere.
    """
    whole, dear = 10 * width + 4 * inner, 7 * width + 2 * inner
    again = sum(map(fields.recomputes, range(blocks)))
    offloads = fields.offload_activations and device != "cpu"
    rest = 0 if offloads else (blocks - again) * whole
    kept = again * (dear if fields.checkpoint_operators else 0 if offloads else width)
    return rest + kept + (whole if again or offloads else 0) + 4 * inner


def synchronising_bytes(fields: TrainingFields, parameters: int, largest: int) -> tuple[int, int]:
    """What ``synchronise`` keeps in each process, beside weights, gradients and states of the optimiser.

    Args:
        fields: of the stage.
        parameters: that are trained.
        largest: numbers of the largest of them, which is exchanged alone.

    Returns:
        Bytes that are kept all the time, and bytes besides while weights are exchanged.
    """
    bucket = min(parameters, max(BUCKET, largest))
    if fields.synchronise == "local_sgd":
        return 0, 4 * bucket
    if fields.synchronise == "diloco":  # outer weights and their momentum; what is under way, and was then
        delayed = fields.synchronise_delay > 0
        return parameters * (16 if delayed else 8), bucket * (4 if delayed else 8)
    if fields.synchronise == ZENFLOW:  # gradients and moments of the columns that each process steps at once
        return round(12 * SELECTED * parameters), 0
    return 0, 0


def forecast_training(
    fields: TrainingFields,
    model: Outlook,
    *,
    teacher_bytes: int = 0,
    trained: int | None = None,
    frozen_bytes: int = 0,
    other_bytes: int = 0,
) -> Forecast:
    """Memory of one process, in bytes: weights, gradients, optimiser, activations and the loss's chunks.

    Args:
        fields: of the stage.
        model: what the stage will be given.
        teacher_bytes: what every process holds of a teacher.
        trained: parameters that are; None: all of the model.
        frozen_bytes: of parameters that are not, which an engine shards where it shards the trained ones.
        other_bytes: what an adaptation holds besides, such as weights in few bits, in each process.
    """
    setting = Setting(fields, launched_processes() or fields.processes, "cpu")
    config, anatomy = model.config, model.anatomy
    width = getattr(config, "hidden_size", 0) or 0
    inner = getattr(config, "intermediate_size", None) or 4 * width
    vocabulary = 0 if fields.learns_sentences else getattr(config, "vocab_size", 0) or 0
    tokens = pass_tokens(fields, config)
    shards = setting.processes if setting.strategy == "deepspeed" else setting.parameter_parts
    parameters = anatomy.num_parameters if trained is None else trained
    kept = state_bytes(fields, anatomy, parameters)
    states = (parameters * 8 + kept + frozen_bytes) // shards
    if setting.strategy == "deepspeed" and fields.zero_stage < 3:
        states = parameters * 8 + kept // shards + frozen_bytes
    states += sum(synchronising_bytes(fields, parameters, vocabulary * width))
    activations = 4 * tokens * kept_per_token(fields, len(anatomy.blocks), width, inner, model.device)
    logits = loss_bytes(tokens, vocabulary, width, model.device)
    if fields.tensor_parallel > 1:
        logits += 2 * 4 * vocabulary * width  # the output projection and its gradient are whole in a loss
    loading = parameters * 4 + frozen_bytes
    notes: tuple[str, ...] = ()
    if setting.strategy in ("fsdp", "tp", "deepspeed") or fields.pipeline_stages > 1:
        notes = ("Each process loads the whole model once before it keeps only its shard.",)
    if fields.learning_rate_scaling != "none":
        notes += (
            f"The peak learning rate is {fields.peak_rate:.4g}: {fields.learning_rate:.4g}, for batches of "
            f"{fields.reference_batch_size}, scaled to {fields.batch_size} ({fields.learning_rate_scaling}).",
        )
    if fields.adapt_batch == NOISE:
        notes += (
            f"A step has {fields.batch_size} rows at first and {fields.largest_batch_size} at most, as the "
            "noise of gradients asks: what is told here is of the first.",
        )
    if fields.matmul == "int8":
        notes += (INT8_NOTES[model.device],)
    return Forecast(
        after=model,
        layers=len(anatomy.linears),
        memory_bytes=max(states, loading) + activations + logits + teacher_bytes + other_bytes,
        notes=notes,
        # The best weights so far in fp32, and for a moment those that take their place.
        scratch_bytes=2 * 4 * anatomy.num_parameters if fields.keep_best else 0,
    )
