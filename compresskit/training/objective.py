"""What is minimised: a pure function of hidden states, output projections and labels.

Shapes: B = rows, T = tokens of a row, D = student's hidden width, E = teacher's, V = vocabulary, N =
supervised tokens, S = sentences, C = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.kernels.ops import linear_cross_entropy
from compresskit.modeling.attention import Attended

if TYPE_CHECKING:
    from compresskit.training.order import Rows

IGNORED = -100
LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Head:
    """An output projection: logits = softcap(hidden @ weight.T + bias).

    Attributes:
        weight_VD: whole, on the device of the hidden states.
        bias_V: or None.
        softcap: bound of the logits; 0 for none.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float = 0.0

    def cut(self, vocabulary: int) -> Head:
        """The same projection onto the first ``vocabulary`` ids only."""
        bias = None if self.bias_V is None else self.bias_V[:vocabulary]
        return Head(self.weight_VD[:vocabulary], bias, self.softcap)


@dataclass(frozen=True, slots=True)
class Hidden:
    """A teacher's distributions over all ids, as hidden states before its own head.

    Attributes:
        states_BTE: in the teacher's own type.
        head: its output projection, onto ids that the student has too.
        foreign: whether they are ids of another tokenizer, any number of them.
    """

    states_BTE: Tensor
    head: Head
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """A teacher's distributions of which only some ids are known.

    Attributes:
        ids_BTK: int64; of each token K ids, those of any probability different.
        log_p_BTO: (B, T, K) their log-probabilities, or (B, T, K + 1) with that of all other ids last.
        vocabulary: ids the teacher may give a probability to: the first of the student's.
        temperature: of the log-probabilities.
    """

    ids_BTK: Tensor
    log_p_BTO: Tensor
    vocabulary: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a teacher makes of sentences.

    Attributes:
        states_STE: of its last block, in its own type; those of padding mean nothing.
    """

    states_STE: Tensor


@dataclass(frozen=True, slots=True)
class Classified:
    """Which classes a teacher takes sentences for.

    Attributes:
        logits_SC: in its own type.
    """

    logits_SC: Tensor


@dataclass(frozen=True, slots=True)
class Signal:
    """What a teacher says about a batch. No mapping: engines would cast what is in one.

    Attributes:
        says: the distributions of next tokens, or what it makes of whole sentences.
        blocks_BTE: what feature losses compare: outputs of its blocks, then what their attention is given.
        told_BT: bool, of which tokens it says what they might have been, at the token before; None for all.
        progress: share of the training steps that are done; 1 in an evaluation. The trainer sets it.
    """

    says: Hidden | Listing | Embedded | Classified
    blocks_BTE: tuple[Tensor | Attended, ...] = ()
    told_BT: Tensor | None = None
    progress: float = 1.0


class Objective(Protocol):
    """A frozen dataclass of hyperparameters; runs inside the wrapped model's forward."""

    needs_teacher: ClassVar[bool]

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """Sums over the supervised tokens of a batch.

        Args:
            hidden_BTD: (B, T, D), of the model in training, before its head.
            head: its output projection.
            labels_BT: int64 (B, T), not shifted; the label of token t + 1 is predicted at t; -100 is ignored.
            signal: of the teacher, where one is needed.

        Returns:
            ``loss``, the scalar to minimise, and any other sums worth a log, detached; nats.
        """
        ...


class TeacherProvider(Protocol):
    """Where a teacher's signal comes from; the trainer never touches the teacher itself."""

    @property
    def hidden(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Its hidden states (B, T, E) for ids and positions; None where no model runs in this process."""
        ...

    def load(self) -> None:
        """Read the weights now. Once an engine runs it may shard whatever is loaded (ZeRO-3 does)."""
        ...

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """What the teacher says about a batch of ``input_ids`` and ``position_ids``, each (B, T)."""
        ...


@runtime_checkable
class Approximate(Protocol):
    """A ``TeacherProvider`` whose signal is not quite that of its teacher."""

    def told(self, rows: Rows, device: torch.device) -> tuple[str, ...]:
        """How far it is, on some of the training rows: full sentences for the stage's result."""
        ...


@runtime_checkable
class Remote(Protocol):
    """A ``TeacherProvider`` elsewhere: its ``signal`` raises RunError once it is lost for good."""

    @property
    def is_remote(self) -> bool:
        """True."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a provider has done before training.

    Attributes:
        figures: for the stage's metrics; the same whenever the run is repeated.
        notes: full sentences.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class Prepares(Protocol):
    """A ``TeacherProvider`` that must know all rows before the first step."""

    def prepare(self, rows: Sequence[Rows], cache: Path, device: str) -> Prepared:
        """Get ready for these rows; called in each process, before the model in training is loaded.

        Args:
            rows: to train on, and to evaluate on.
            cache: folder for what may be used again.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        """
        ...


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """The ordinary next-token loss."""

    needs_teacher: ClassVar[bool] = False

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """See :meth:`Objective.__call__`; ``signal`` is not used."""
        hidden_ND, labels_N = predictions(hidden_BTD, labels_BT)
        loss = linear_cross_entropy(
            hidden_ND, head.weight_VD, labels_N, bias_V=head.bias_V, softcap=head.softcap
        )
        return {LOSS: loss}


def predictions(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states that predict a label, (N, D), and those labels, (N,)."""
    keep = labels_BT[:, 1:] != IGNORED
    return hidden_BTD[:, :-1][keep], labels_BT[:, 1:][keep]


def supervised_tokens(labels_BT: Tensor) -> int:
    """How many tokens of a batch are predicted: the first of a row never is."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


def head_module(model: nn.Module) -> nn.Module:
    """The output projection of a causal language model.

    Raises:
        ModelError: it has none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or getattr(model, "base_model", model) is model:
        name = type(model).__name__
        raise ModelError(
            Fault(name, "a causal language model with an output projection", "none", "Train another model.")
        )
    return head


def softcap_of(model: nn.Module) -> float:
    """The bound of ``model``'s logits; 0 for none."""
    return softcap_in(getattr(model, "config", None))


def softcap_in(config: Any) -> float:
    """The bound of the logits of a model with such a configuration; 0 for none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return float(getattr(text, "final_logit_softcapping", None) or 0.0)


def head_of(model: nn.Module) -> Head:
    """The output projection of ``model`` as its parameters stand now."""
    module = head_module(model)
    bias = getattr(module, "bias", None)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Head(weight, bias if isinstance(bias, torch.Tensor) else None, softcap_of(model))
