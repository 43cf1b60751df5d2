"""Dialogues as tokens, and which of these are the assistant's.

A tokenizer with a chat template of its own is taken at its word: the ids are those of its
``apply_chat_template``. Where the template marks what the assistant says (``{% generation %}``), those
tokens are learnt. Elsewhere they are found by rendering the dialogue a second time with a mark in place of
each response: what stands around the marks must be, character for character, what stands around the
responses, or the dialogue is refused. Learnt are the tokens of each response and the added token that
follows it, such as ``<|im_end|>``.

A tokenizer without a template gets this one, where BOS is there if the tokenizer itself puts one before a
text, and EOS if it has any::

    BOS System:
    {system}

    User:
    {prompt}

    Assistant:
    {response} EOS

    User:
    ...

with nothing between BOS and what follows, nor between a response and its EOS. Learnt are responses and EOS.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from compresskit.data.dialogue import Dialogue
from compresskit.data.lines import bad
from compresskit.errors import DataError

VERSION = "1"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TRIMS = (lambda text: text, str.strip, str.rstrip, str.lstrip)
MARK_IT = "Put {% generation %} and {% endgeneration %} around what the assistant says in the chat template."

Extents = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """One dialogue as a model reads it.

    Attributes:
        ids: of all tokens (T,).
        learnt: runs of the assistant's tokens, first and end of each, in order.
        text: that the ids stand for.
        offsets: of each token in ``text``, first character and end.
        added: which tokens are added ones, such as EOS, and stand for no text of the dialogue.
    """

    ids: list[int]
    learnt: Extents
    text: str
    offsets: Extents
    added: frozenset[int]

    def covered_bytes(self, begin: int, end: int) -> int:
        """Bytes of UTF-8 text that learnt tokens in [begin, end) stand for, added tokens left out."""
        total = 0
        for low, high in self.learnt:
            tokens = [t for t in range(max(low, begin), min(high, end)) if self.ids[t] not in self.added]
            if tokens:
                part = self.text[self.offsets[tokens[0]][0] : self.offsets[tokens[-1]][1]]
                total += len(part.encode("utf-8", errors="surrogatepass"))
        return total


@dataclass(slots=True)
class Renderer:
    """Turns dialogues into tokens for one tokenizer, and counts what is worth a warning.

    Attributes:
        tokenizer: a fast one.
        dialogues: rendered so far.
        shared: responses that share a token with the template's own words; that token is not learnt.
        unended: dialogues in which a response has no token after it that ends it.
        template: the tokenizer's own chat template; None takes the one above.
        spelt: dialogues whose own words spell an added token, such as ``</s>``, and so become it.
    """

    tokenizer: PreTrainedTokenizerBase
    dialogues: int = 0
    shared: int = 0
    unended: int = 0
    spelt: int = 0
    template: str | None = field(init=False)
    _added: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            name = type(self.tokenizer).__name__
            cure = "Save a fast tokenizer (tokenizer.json) beside the model."
            raise bad(name, "a fast tokenizer, which knows the characters of each token", "a slow one", cure)
        self.template = template_of(self.tokenizer)
        self._added = added_tokens(self.tokenizer)

    @property
    def identity(self) -> str:
        """A hash of everything but the tokenizer's vocabulary that decides what is made of a dialogue."""
        tokenizer = self.tokenizer
        facts = [VERSION, self.template, sorted(self._added.items()), tokenizer.special_tokens_map]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def notes(self, source: str) -> list[str]:
        """Sentences for whoever trains on these tokens."""
        found = []
        if self.shared:
            found.append(
                f"{source}: {self.shared} responses share a token with the words of the chat template around "
                "them; that token is not learnt."
            )
        if self.unended:
            found.append(
                f"{source}: {self.unended} of {self.dialogues} dialogues have a response that no token ends: "
                "the model does not learn to stop there."
            )
        if self.spelt:
            found.append(
                f"{source}: {self.spelt} of {self.dialogues} dialogues spell out a token of the tokenizer's "
                "own, such as its end of text; the model reads and learns it as that token."
            )
        return found

    def __call__(self, dialogues: Sequence[Dialogue]) -> list[Rendered]:
        """The tokens of each dialogue.

        Raises:
            DataError: the template refuses a dialogue, or does not show what in it is the assistant's.
        """
        self.dialogues += len(dialogues)
        self.spelt += sum(any(token in str(one) for token in self._added.values()) for one in dialogues)
        if self.template is not None and GENERATION.search(self.template):
            return [self._marked(dialogue) for dialogue in dialogues]
        rendered = [self._plain(d) if self.template is None else self._found(d) for d in dialogues]
        coded = self._tokens([text for text, _ in rendered])
        return [
            Rendered(ids, self._inside(text, extents, offsets), text, offsets, frozenset(self._added))
            for (text, extents), (ids, offsets) in zip(rendered, coded, strict=True)
        ]

    def _tokens(self, texts: list[str]) -> list[tuple[list[int], Extents]]:
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        coded = self.tokenizer(texts, return_offsets_mapping=True, **options)
        return list(zip(coded["input_ids"], coded["offset_mapping"], strict=True))

    def _plain(self, dialogue: Dialogue) -> tuple[str, Extents]:
        """The text by this module's own template, and the extents of responses with their EOS."""
        end = self.tokenizer.eos_token or ""
        self.unended += not end
        parts = [self._opening(), f"System:\n{dialogue.system}\n\n" if dialogue.system else ""]
        extents, size = [], sum(map(len, parts))
        for number, (prompt, response) in enumerate(dialogue.turns):
            before = ("\n\n" if number else "") + f"User:\n{prompt}\n\nAssistant:\n"
            first = size + len(before)
            size = first + len(response) + len(end)
            parts += [before, response, end]
            extents.append((first, size))
        return "".join(parts), extents

    def _opening(self) -> str:
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return str(self.tokenizer.bos_token) if bos is not None and ids[:1] == [bos] else ""

    def _found(self, dialogue: Dialogue) -> tuple[str, Extents]:
        """The text by the tokenizer's template, and the extents of responses with what ends them."""
        messages = dialogue.messages()
        text = self._applied(dialogue.place, messages)
        marks = [f"\ue000{number}\ue001" for number in range(len(dialogue.turns))]
        responses = [response for _, response in dialogue.turns]
        left = iter(marks)
        masked = [m | {"content": next(left)} if m["role"] == "assistant" else m for m in messages]
        around = re.split("|".join(marks), self._applied(dialogue.place, masked))
        for trim in TRIMS:
            said = [trim(response) for response in responses]
            if len(around) == len(said) + 1 and text == _woven(around, said):
                return text, self._extents(around, said)
        got = "one that words a dialogue differently for different responses"
        raise bad(dialogue.place, "a chat template that shows where responses stand", got, MARK_IT)

    def _extents(self, around: list[str], said: list[str]) -> Extents:
        """Of each response, and of the added token that follows it at once or after blanks."""
        extents, at, unended = [], 0, False
        for before, response, after in zip(around[:-1], said, around[1:], strict=True):
            first = at + len(before)
            at = first + len(response)
            blanks = len(after) - len(after.lstrip())
            ends = [t for t in self._added.values() if after.startswith(t, blanks)]
            unended = unended or not ends
            extents.append((first, at + (blanks + max(map(len, ends)) if ends else 0)))
        self.unended += unended
        return extents

    def _applied(self, place: str, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise _refused(place, error) from error

    def _inside(self, text: str, extents: Extents, offsets: Extents) -> Extents:
        """Runs of the tokens whose characters lie within ``extents``; blanks may stand outside."""
        firsts_T, ends_T = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        keep_T = np.zeros(len(offsets), dtype=bool)
        for first, end in extents:
            over_T = (firsts_T < end) & (ends_T > first)
            for t in np.flatnonzero(over_T & ((firsts_T < first) | (ends_T > end))):
                outside = text[firsts_T[t] : max(first, firsts_T[t])] + text[min(end, ends_T[t]) : ends_T[t]]
                if outside.strip():
                    over_T[t] = False
                    self.shared += 1
            keep_T |= over_T
        return runs_of(keep_T)

    def _marked(self, dialogue: Dialogue) -> Rendered:
        """By a template that marks the assistant's words."""
        messages = dialogue.messages()
        text = self._applied(dialogue.place, messages)
        ((ids, offsets),) = self._tokens([text])
        coded: Any = self.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        learnt = runs_of(np.asarray(coded["assistant_masks"], dtype=bool))
        if coded["input_ids"] != ids or not learnt:
            got = "none" if not learnt else "other token ids than those of its text"
            raise bad(dialogue.place, "tokens that the chat template marks as the assistant's", got, MARK_IT)
        self.unended += any(ids[end - 1] not in self._added for _, end in learnt)
        return Rendered(ids, learnt, text, offsets, frozenset(self._added))


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that ``apply_chat_template`` would take; None where there is none."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        cure = "Keep one template, or call one of them 'default'."
        raise bad("tokenizer", "one chat template", str(error).splitlines()[0], cure) from error


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id and text of the tokens beside those of ordinary text, such as BOS, EOS, ``<|im_end|>``."""
    found = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    ids = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return found | {int(i): str(token) for i, token in ids}


def runs_of(keep_T: np.ndarray[Any, Any]) -> Extents:
    """First and end of each run of True."""
    edges = np.flatnonzero(np.diff(keep_T.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def _woven(around: list[str], said: list[str]) -> str:
    return around[0] + "".join(a + b for a, b in zip(said, around[1:], strict=True))


def _refused(place: str, error: Exception) -> DataError:
    cure = "Change that dialogue (a system message, perhaps), or the tokenizer's chat template."
    return bad(place, "a dialogue that the tokenizer's chat template takes", str(error), cure)
