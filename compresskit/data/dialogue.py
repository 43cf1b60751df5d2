"""Dialogues of a user and an assistant, however a row wrote them down.

Read are pairs of a prompt and a response (with the turns before them as ``history``), lists of messages
``{role, content}``, and ShareGPT's ``{from, value}``. Each becomes pairs of prompt and response; what is
no such pair is refused, never mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from compresskit.data.lines import bad

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
MEND = "Mend that row, or delete it."


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What a user asked and an assistant answered, in turn.

    Attributes:
        turns: pairs of a prompt and a response, at least one; none of them is blank.
        system: an instruction before the first prompt, or nothing.
        place: where it was read, for errors.
    """

    turns: tuple[tuple[str, str], ...]
    system: str = ""
    place: str = field(default="", compare=False)

    def messages(self) -> list[dict[str, str]]:
        """The dialogue as chat templates take it."""
        made = [{"role": "system", "content": self.system}] if self.system else []
        for prompt, response in self.turns:
            made.append({"role": "user", "content": prompt})
            made.append({"role": "assistant", "content": response})
        return made

    def __str__(self) -> str:
        """All of its text; differs wherever two dialogues differ."""
        return "\0".join([self.system, *(part for turn in self.turns for part in turn)])


Content = str | Dialogue


def paired(place: str, prompt: str, response: str, history: object = None, system: str = "") -> Dialogue:
    """A dialogue of one pair and the pairs before it.

    Args:
        place: of the row, for errors.
        prompt: of the last turn.
        response: to it.
        history: a list of ``[prompt, response]``, the earliest first; None is none.
        system: instruction before all of them, or nothing.

    Raises:
        DataError: a turn is blank or no pair.
    """
    if not isinstance(history, list | None):
        raise bad(place, "a list of [prompt, response] as history", type(history).__name__, MEND)
    turns = []
    for number, pair in enumerate(history or (), 1):
        where = f"{place} history {number}"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
            got = f"a list of {len(pair)}" if isinstance(pair, list) else type(pair).__name__
            raise bad(where, "a pair of texts, [prompt, response]", got, MEND)
        turns.append(_turn(where, *pair))
    return Dialogue((*turns, _turn(place, prompt, response)), system if system.strip() else "", place)


def _turn(place: str, prompt: str, response: str) -> tuple[str, str]:
    for name, text in (("prompt", prompt), ("response", response)):
        if not text.strip():
            raise bad(place, f"a {name}", "none, or only blanks", f"Write the {name}, or delete that row.")
    return prompt, response


def from_messages(place: str, messages: object, system: str = "") -> Dialogue:
    """A dialogue from a list of ``{role, content}`` or ``{from, value}``.

    Args:
        place: of the row, for errors.
        messages: a system message or none, then user and assistant in turn, the assistant last.
        system: instruction from a column of its own, or nothing.

    Raises:
        DataError: another role or order, or a message without text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        got = "an empty list" if messages == [] else type(messages).__name__
        raise bad(place, "a list of messages", got, MEND)
    spoken: list[str] = []
    for number, message in enumerate(messages, 1):
        where = f"{place} message {number}"
        role, text = _message(where, message)
        if role == "system" and number == 1 and not system.strip():
            system = text
            continue
        expected = "assistant" if len(spoken) % 2 else "user"
        if role != expected:
            want = f"a message of the {expected} (user and assistant in turn, system at most once and first)"
            raise bad(where, want, f"one of the {role}", MEND)
        spoken.append(text)
    if not spoken or len(spoken) % 2:
        raise bad(place, "a response to each prompt", f"{len(spoken)} messages of user and assistant", MEND)
    turns = zip(spoken[::2], spoken[1::2], strict=True)
    return Dialogue(tuple(_turn(place, *turn) for turn in turns), system if system.strip() else "", place)


def _message(where: str, message: object) -> tuple[str, str]:
    """The role, in our words, and the text of one message."""
    if not isinstance(message, dict):
        raise bad(where, "an object of role and content", type(message).__name__, MEND)
    keys = ("from", "value") if "from" in message else ("role", "content")
    if missing := [key for key in keys if key not in message]:
        got = f"keys {', '.join(map(str, message)) or 'none'}"
        raise bad(where, f"the key {missing[0]!r} (role and content, or from and value)", got, MEND)
    role, text = (message[key] for key in keys)
    if not isinstance(role, str) or role.lower() not in ROLES:
        cure = "Delete that row: tools and other speakers are not read."
        raise bad(where, "a role among " + ", ".join(ROLES), repr(role), cure)
    if not isinstance(text, str):
        raise bad(where, f"text as {keys[1]!r}", type(text).__name__, MEND)
    return ROLES[role.lower()], text
