"""peft's LoRA on a model whose weights are frozen already.

The model that is trained is the one inside peft's wrapper: adapters live in its layers, so its forward, its
blocks and its output projection are found where every trainer looks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

ADAPTER = "default"
"""The name peft gives to an adapter that is not named."""


def attach_lora(
    model: Any,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_dora: bool = False,
) -> Any:
    """Wrap ``model``, in place, with a new LoRA adapter; only its parameters take a gradient.

    Args:
        model: a causal language model of transformers, on the CPU or on meta; frozen.
        targets: names of linear layers.
        rank: of the update.
        alpha: the update is multiplied by alpha / rank.
        dropout: of the adapter's input.
        use_dora: whether each row of the weight also gets a trained norm.

    Returns:
        The ``PeftModelForCausalLM``; ``get_base_model()`` of it is ``model``.
    """
    with peft_at_work():
        import peft

        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=cast(int, alpha),  # peft takes any number
            lora_dropout=dropout,
            target_modules=list(targets),
            use_dora=use_dora,
            # As the layers are now: frozen ones are torch.nn.Linear whatever they were.
            fan_in_fan_out=any(type(model.get_submodule(t)).__name__ == "Conv1D" for t in targets),
        )
        return peft.get_peft_model(model, config)


@contextmanager
def peft_at_work() -> Iterator[None]:
    """No warning from peft that is about peft's own use of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
