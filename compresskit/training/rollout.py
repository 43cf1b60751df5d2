"""On-policy steps: the student goes on from the prompts of a batch, and learns from what it said itself.

Paper: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
ICLR 2024, https://arxiv.org/abs/2306.13649.

Shapes: B = rows, T = tokens of a row, P = tokens of the longest prompt, N = new tokens, V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling.forwards import computing
from compresskit.options import Within
from compresskit.training.finite import on_every_rank
from compresskit.training.objective import IGNORED, head_module, softcap_of
from compresskit.training.redirect import AUTOCAST

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicy:
    """How much of training is on the student's own text, and how that is sampled.

    Attributes:
        fraction: of the steps, evenly spread.
        max_new_tokens: of a response; it ends earlier with an EOS.
        sampling_temperature: divides the student's logits while it generates.
        top_p: sample from the likeliest tokens that hold so much of the probability.
        prompt_fraction: of a row, where all of it is learnt; of others the prompt is what comes before the
            first token to learn.
    """

    fraction: Annotated[float, Within(0, 1, above=True)] = 0.5
    max_new_tokens: Annotated[int, Within(1)] = 64
    sampling_temperature: Annotated[float, Within(0, above=True)] = 1.0
    top_p: Annotated[float, Within(0, 1, above=True)] = 1.0
    prompt_fraction: Annotated[float, Within(0, 1, above=True)] = 0.25

    def is_due(self, step: int, seed: int) -> bool:
        """Whether step ``step``, counted from 0, is on-policy: the same on every rank and after a restart.

        Of any number of consecutive steps the share is ``fraction``, but for one step more or less; the seed
        says where it begins.
        """
        start = _number(seed) / 2**64
        return floor((step + 1) * self.fraction + start) > floor(step * self.fraction + start)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfText(OnPolicy):
    """With what a tokenizer knows: a projection may have more rows than that, and a teacher fewer of them.

    Attributes:
        text_ids: so many ids stand for text; no others are said.
    """

    text_ids: int


@dataclass(frozen=True, slots=True)
class Student:
    """Who generates, and in which surroundings.

    Attributes:
        model: bare.
        wrapped: by the engine; what is called, so that weights are gathered.
        eos: ids that end a response.
        precision: of matrix products.
    """

    model: nn.Module
    wrapped: nn.Module
    eos: tuple[int, ...]
    precision: str


def on_policy_batches(
    policy: OnPolicy, batches: Sequence[Batch], student: Student, *, step: int, seed: int, rank: int
) -> list[dict[str, Tensor]]:
    """The batches of one step with responses of the student's own in place of the data's.

    Every rank calls it at the same step with as many batches.

    Args:
        policy: how to sample.
        batches: ``input_ids``, ``position_ids`` and ``labels``, each int64 (B, T).
        student: who generates; it is in the same mode afterwards.
        step: counted from 0.
        seed: of the run.
        rank: each samples a stream of its own.

    Returns:
        Batches of the same form: prompt, response, padding; labels are the response, its EOS included.
    """
    was_training = student.wrapped.training
    student.wrapped.eval()
    made = []
    try:
        for index, batch in enumerate(batches):
            device = batch["input_ids"].device
            generator = torch.Generator(device).manual_seed(_number(seed, step, rank, index) % 2**63)
            prompts = prompts_of(policy, batch)
            made.append(_rows(prompts, generate(policy, prompts, student, generator), student.eos))
    finally:
        student.wrapped.train(was_training)
    return made


def tokens_of(batches: Sequence[Batch]) -> int:
    """Of prompts and responses as ``on_policy_batches`` gives them; padding is none."""
    return sum(int(_ends(batch["labels"]).sum()) for batch in batches)


def prompts_of(policy: OnPolicy, batch: Batch) -> list[Tensor]:
    """What the student goes on from, a prompt a row, each of 1 token at least.

    It is of one document: the beginning of that in which the first token to learn stands, up to that token;
    or, where a row is learnt from its second token on, what of a document stands in the first part of the
    row. The beginning of a prompt is left out where a response behind it would not fit into a row of T, but
    for its last token: the only row of little text may be shorter than a response.
    """
    found = []
    room = max(1, batch["input_ids"].shape[1] - policy.max_new_tokens)
    for ids, positions, labels in zip(
        batch["input_ids"], batch["position_ids"], batch["labels"], strict=True
    ):
        learnt = (labels != IGNORED).nonzero()[:, 0].tolist()
        end = learnt[0] if learnt else len(ids)
        begins = [0, *(positions == 0).nonzero()[:, 0].tolist()]
        if end <= 1:
            end = ceil(policy.prompt_fraction * len(ids))
        start = max(begin for begin in begins if begin < end)
        found.append(ids[max(start, end - room) : end])
    return found


def generate(
    policy: OnPolicy, prompts: Sequence[Tensor], student: Student, generator: torch.Generator
) -> Tensor:
    """Responses (B, N) sampled token by token; what stands after an EOS means nothing.

    Every rank takes as many steps, until all rows of all ranks have ended.

    Args:
        policy: how to sample.
        prompts: token ids, each (P,) or shorter.
        student: in evaluation mode; its forward is replaced for the time being.
        generator: of the samples.
    """
    ids_BP, mask_BP = _left_padded(prompts)
    decode = _Decoder(student)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=ids_BP.device)
    eos = torch.tensor(student.eos, dtype=torch.int64, device=ids_BP.device)
    said: list[Tensor] = []
    with torch.no_grad(), computing([(student.model, decode.forward)]):
        new_B1, positions_BP = ids_BP, (mask_BP.cumsum(-1) - 1).clamp_min(0)
        for _ in range(policy.max_new_tokens):
            logits_BV = student.wrapped(input_ids=new_B1, position_ids=positions_BP, attention_mask=mask_BP)[
                "logits"
            ]
            new_B1 = sample(logits_BV, policy, generator)
            said.append(new_B1)
            ended_B |= torch.isin(new_B1[:, 0], eos)
            mask_BP = torch.cat([mask_BP, torch.ones_like(new_B1)], -1)
            positions_BP = mask_BP.sum(-1, keepdim=True) - 1
            if not on_every_rank(not bool(ended_B.all()), ended_B.device):
                break
    return torch.cat(said, -1)


def sample(logits_BV: Tensor, policy: OnPolicy, generator: torch.Generator) -> Tensor:
    """One token a row, (B, 1)."""
    if isinstance(policy, OfText):
        logits_BV = logits_BV[:, : policy.text_ids]
    p_BV = (logits_BV.float() / policy.sampling_temperature).softmax(-1)
    if policy.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        p_BV = p_BV.scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= policy.top_p, 0))
    return torch.multinomial(p_BV, 1, generator=generator)


def eos_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that end a text, as the configuration of ``model`` names them."""
    named = getattr(getattr(model, "config", None), "eos_token_id", None)
    return () if named is None else tuple(named) if isinstance(named, list | tuple) else (int(named),)


class _Decoder:
    """The forward of a model that remembers what it has read; a new one for each batch.

    What it remembers is kept here and not returned: engines look into what a forward returns.
    """

    def __init__(self, student: Student) -> None:
        self._student, self._head = student, head_module(student.model)
        self._past: Any = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Logits (B, V) of the token after the last one.

        Raises:
            ModelError: the model remembers nothing.
        """
        precision, model = self._student.precision, self._student.model
        kind = input_ids.device.type
        with torch.autocast(kind, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            base: Any = model.base_model
            read = base(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                past_key_values=self._past,
                use_cache=True,
            )
            self._past = getattr(read, "past_key_values", None)
            if self._past is None:
                cure = "Leave on_policy out."
                name = type(model).__name__
                raise ModelError(Fault(name, "keys and values of what it has read", "none", cure))
            logits_BV: Tensor = self._head(read[0][:, -1:])[:, 0].float()
        softcap = softcap_of(model)
        return {"logits": softcap * torch.tanh(logits_BV / softcap) if softcap else logits_BV}


def _ends(labels_BT: Tensor) -> Tensor:
    """Where the last token to learn of each row ends, (B,)."""
    places_T = torch.arange(1, labels_BT.shape[1] + 1, device=labels_BT.device)
    return places_T.where(labels_BT != IGNORED, 0).amax(-1)


def _left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts of one length (B, P), what is missing filled up on the left, and where they are theirs."""
    length = max(map(len, prompts))
    ids = [torch.cat([p.new_zeros(length - len(p)), p]) for p in prompts]
    mask = [torch.cat([p.new_zeros(length - len(p)), torch.ones_like(p)]) for p in prompts]
    return torch.stack(ids), torch.stack(mask)


def _rows(prompts: Sequence[Tensor], said_BN: Tensor, eos: Sequence[int]) -> dict[str, Tensor]:
    """Prompts and responses as rows to learn from, filled up on the right."""
    length = max(map(len, prompts)) + said_BN.shape[1]
    ids_BT = said_BN.new_zeros(len(prompts), length)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for row, (prompt, said) in enumerate(zip(prompts, said_BN, strict=True)):
        ends = torch.isin(said, said.new_tensor(eos)).nonzero()[:, 0].tolist()
        response = said[: ends[0] + 1 if ends else len(said)]
        begin, end = len(prompt), len(prompt) + len(response)
        ids_BT[row, :end] = torch.cat([prompt, response])
        labels_BT[row, begin:end] = response
    positions_BT = torch.arange(length, device=ids_BT.device).expand_as(ids_BT).contiguous()
    return {"input_ids": ids_BT, "position_ids": positions_BT, "labels": labels_BT}


def _number(*parts: int) -> int:
    """A number below 2**64 that looks random, and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")
