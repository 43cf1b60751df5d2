"""Models and tokenizers as transformers makes them: on the meta device, or whole."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compresskit.errors import CompressKitError, Fault, InputError, ModelError
from compresskit.formats.bitmask import METHOD
from compresskit.modeling.quiet import hush, without_bars
from compresskit.registry import nearest

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "tokenizer_config.json",
)
FETCH_OR_FIX = "Fetch the checkpoint again, or correct config.json."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration in ``path``, a model directory or a config.json itself.

    Raises:
        ModelError: transformers cannot read it; its reason is passed on.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean that this is no usable config
        raise ModelError(
            Fault(
                str(path / CONFIG if path.is_dir() else path),
                "a config.json that transformers understands",
                f"{type(error).__name__}: {_first_line(error)}",
                "Mend the file; if the model brings code of its own, set trust_remote_code.",
            )
        ) from error


def model_class(config: Any, directory: Path, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that ``config.architectures`` names.

    Args:
        config: a transformers configuration.
        directory: where code of the model's own would lie.
        trust_remote_code: whether that code may run.

    Returns:
        The class, from transformers or from the directory.

    Raises:
        ModelError: no architecture is named, or no such class exists.
    """
    where = str(directory / CONFIG)
    names = getattr(config, "architectures", None) or ()
    if not names:
        likely = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "LlamaForCausalLM")
        raise ModelError(
            Fault(
                where,
                '"architectures"',
                "none",
                f'Add "architectures": ["{likely}"], or what fits the weights.',
            )
        )
    own = {ref.rpartition(".")[2]: ref for ref in _auto_map(config)}
    if names[0] in own and trust_remote_code:
        cls: type[PreTrainedModel] = get_class_from_dynamic_module(own[names[0]], str(directory))
        return cls
    found = getattr(transformers, names[0], None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    known = {n for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in [value] if isinstance(n, str)}
    cure = f"Did you mean: {nearest(names[0], known)}?"
    if names[0] in own:
        cure = "Its code is in the model's directory: read it, then set trust_remote_code."
    raise ModelError(Fault(where, "an architecture that transformers has", repr(names[0]), cure))


def skeleton_of(
    config: Any, directory: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of ``config`` on the meta device, in evaluation mode; no memory for weights.

    Args:
        config: a transformers configuration; not changed.
        directory: of the model, for errors and code of its own.
        dtype: of the parameters; None is the configuration's.
        trust_remote_code: whether that code may run.

    Returns:
        The module.

    Raises:
        ModelError: the class is not to be had, or refuses the configuration.
    """
    cls: Any = model_class(config, directory, trust_remote_code=trust_remote_code)
    try:
        # Under ZeRO-3 transformers would have all ranks divide the weights of whatever is made.
        with torch.device("meta"), set_zero3_state():
            model: PreTrainedModel = cls._from_config(deepcopy(config), dtype=dtype or config.dtype)
    except Exception as error:  # whatever a model's constructor raises over its own configuration
        raise ModelError(
            Fault(
                str(directory / CONFIG),
                f"a configuration that {cls.__name__} accepts",
                f"{type(error).__name__}: {_first_line(error)}",
                "Mend the file.",
            )
        ) from error
    model.train(False)
    return model


def skeleton(source: ModelSource, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A fresh skeleton of ``source`` on the meta device, tied as its configuration says.

    Args:
        source: a checkpoint.
        dtype: of the parameters; None is the configuration's.

    Returns:
        The module in evaluation mode.

    Raises:
        ModelError: the configuration fits no model class.
    """
    trust = source.trust_remote_code
    return skeleton_of(source.config, source.directory, dtype=dtype, trust_remote_code=trust)


def load_model(
    model: ModelSource | Path | str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    packed: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """The whole model, as plain ``from_pretrained`` gives it, in evaluation mode.

    Args:
        model: a source, or the directory of a checkpoint, compressed or not.
        dtype: ``auto`` is what the configuration says, else what is stored.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        trust_remote_code: whether code in the directory may run; a source brings its own answer.
        packed: ``layout`` and ``resident`` of a bitmask checkpoint: see ``compresskit.kernels.choice.Wish``.

    Returns:
        The module with its weights on ``device``.

    Raises:
        ModelError: transformers cannot load it, or weights are missing.
        FormatError: packed weights contradict themselves.
        InputError: ``packed`` is for a checkpoint that is not, or what it asks for cannot be.
    """
    directory = model.directory if not isinstance(model, (str, Path)) else Path(model)
    trust = trust_remote_code or (not isinstance(model, (str, Path)) and model.trust_remote_code)
    config = load_config(directory, trust_remote_code=trust)
    cls: Any = model_class(config, directory, trust_remote_code=trust)
    place = resolve_device(device)
    asked = _asked_of(config, directory, packed or {}, place)
    try:
        with without_bars():
            loaded, info = cls.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, trust_remote_code=trust, **asked
            )
    except CompressKitError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            Fault(
                str(directory),
                f"a checkpoint that {cls.__name__}.from_pretrained loads",
                f"{type(error).__name__}: {_first_line(error)}",
                "Mend the checkpoint, or install what the message asks for.",
            )
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            Fault(
                str(directory),
                "all weights of the model",
                f"none for {', '.join(missing[:10])}",
                FETCH_OR_FIX,
            )
        )
    hush(loaded)
    found: PreTrainedModel = loaded.to(place).eval()
    return found


def _asked_of(config: Any, directory: Path, packed: Mapping[str, str], place: torch.device) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` that tell packed layers where and how to compute."""
    said = getattr(config, "quantization_config", None)
    if isinstance(said, Mapping) and said.get("quant_method") == METHOD:
        config.quantization_config = {**said, **packed, "device": str(place)}
        return {"config": config}
    if any(packed.values()):
        cure = "Write it with `compresskit export --to bitmask`, or ask for no layout."
        got = ", ".join(name for name, value in packed.items() if value)
        raise InputError(
            Fault(str(directory), "a bitmask checkpoint, whose layouts can be chosen", got, cure)
        )
    return {}


def load_tokenizer(model: ModelSource | Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model.

    Args:
        model: a source, or a directory.
        trust_remote_code: whether code in the directory may run; a source brings its own answer.

    Returns:
        A transformers tokenizer.

    Raises:
        ModelError: there is none, or transformers cannot read it.
    """
    directory = model.directory if not isinstance(model, (str, Path)) else Path(model)
    trust = trust_remote_code or (not isinstance(model, (str, Path)) and model.trust_remote_code)
    # Checked first because transformers makes an empty tokenizer from a config.json alone.
    if not any(any(directory.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(
            Fault(
                str(directory),
                "the files of a tokenizer",
                "none of " + ", ".join(TOKENIZER_FILES),
                "Copy the tokenizer's files there, or name a tokenizer.",
            )
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ModelError(
            Fault(
                str(directory),
                "a tokenizer that transformers can read",
                f"{type(error).__name__}: {_first_line(error)}",
                "Copy the tokenizer's files again, or install what the message asks for.",
            )
        ) from error


def text_ids(tokenizer: Any) -> int:
    """How many ids ``tokenizer`` may give: rows of a projection beyond them stand for no text."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def context_length(config: Any) -> int:
    """The longest sequence that the model of ``config`` takes, in tokens.

    Raises:
        ModelError: the configuration states none.
    """
    text = config.get_text_config()
    for name in (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_sequence_length",
        "max_seq_len",
        "seq_length",
    ):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(
        Fault("config.json", "max_position_embeddings", "none", "State context_length in the recipe.")
    )


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is any, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            Fault("device", "auto, cpu, cuda or cuda:0", repr(device), "Name one of these.")
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            Fault(
                "device", f"one of {torch.cuda.device_count()} CUDA devices", repr(device), "Use auto or cpu."
            )
        )
    return found


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """A dtype by name; None for ``auto``.

    Raises:
        InputError: no such name.
    """
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise InputError(
            Fault(
                "dtype", f"auto, {', '.join(DTYPES)}", repr(dtype), f"Did you mean: {nearest(dtype, DTYPES)}?"
            )
        )
    return DTYPES[dtype]


def _auto_map(config: Any) -> list[str]:
    """Every ``module.Class`` that the configuration says its directory brings."""
    refs = (getattr(config, "auto_map", None) or {}).values()
    return [ref for value in refs for ref in ([value] if isinstance(value, str) else value) if ref]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
