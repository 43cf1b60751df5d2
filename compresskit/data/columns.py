"""Which columns of a table hold the text, the dialogues, or the sentences and their classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from compresskit.data.dialogue import MEND, Content, Dialogue, from_messages, paired
from compresskit.data.example import LABELS, Example, find_pairs, label_of
from compresskit.data.lines import bad
from compresskit.data.spec import DataSpec
from compresskit.registry import nearest

PREFERRED = ("text", "content", "story", "sentence", "document", "body", "article", "code")
CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "instruction", "query")
INPUTS = ("input", "context")
RESPONSES = ("response", "completion", "answer", "output")
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"
INSTANCES = "instances"
NAMES = (
    "a prompt ({}), a response ({}), and if need be input or context, system and history; "
    "or a list of messages ({})"
).format(", ".join(PROMPTS), ", ".join(RESPONSES), ", ".join(CHATS))
NAME_TEXT = "Set data.column to the one with the text, or data.columns to those of prompt and response."
NAME_PAIR = "Set data.column and data.pair to those of the two sentences, or data.column to a single one's."

Read = Content | Example


@dataclass(frozen=True, slots=True)
class Layout:
    """What the columns of a source are read as: one of ``text``, ``chat``, ``response`` is set.

    Attributes:
        text: column of plain text.
        chat: column of lists of messages.
        prompt: columns whose texts make up the prompt, blank ones left out, a blank line between.
        response: column of the response.
        instances: column of lists of ``{input, output}``, each a dialogue of its own.
        exact: the user named the columns: no input, system or history is looked for beside them.
        examples: ``text`` is a sentence, and the row an example.
        pair: column of the second sentence, or nothing.
        label: column of the class, or nothing.
        labels: names of the classes; see DataSpec.
    """

    text: str = ""
    chat: str = ""
    prompt: tuple[str, ...] = ()
    response: str = ""
    instances: str = ""
    exact: bool = False
    examples: bool = False
    pair: str = ""
    label: str = ""
    labels: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that each row has."""
        names = (self.text, self.pair, self.label, self.chat, *self.prompt, self.response, self.instances)
        return tuple(name for name in names if name)

    def wanted(self, columns: Iterable[str]) -> list[str]:
        """Those of a table's ``columns`` that are read."""
        beside = () if self.text or self.exact else (*INPUTS, *SYSTEMS, HISTORY)
        return [name for name in columns if name in self.required or name.lower() in beside]

    def contents(self, place: str, row: object) -> list[Read]:
        """The documents in one row; a row that is a string is its own text, null is no text.

        Raises:
            DataError: the row is no object, lacks a column, or holds something else there.
        """
        if isinstance(row, str):
            return [Example(row) if self.examples else row]
        if not isinstance(row, dict):
            cure = "Write one object or one string per row."
            raise bad(place, "an object or a string", type(row).__name__, cure)
        for name in self.required:
            if name not in row:
                cure = f"Did you mean: {nearest(name, row)}? Mend that row."
                raise bad(place, f"a column called {name!r}", f"columns {', '.join(row) or 'none'}", cure)
        if self.text:
            text = _text(place, row, self.text)
            return [self._example(place, row, text) if self.examples else text]
        lower = {} if self.exact else {name.lower(): name for name in row if name not in self.required}
        system = "\n\n".join(_texts(place, row, lower, SYSTEMS))
        if self.chat:
            return [from_messages(place, row[self.chat], system)]
        asked = [text for name in self.prompt if (text := _text(place, row, name)).strip()]
        if self.instances:
            return list(_instances(place, asked, row[self.instances], system))
        prompt = "\n\n".join([*asked, *_texts(place, row, lower, INPUTS)])
        history = row[lower[HISTORY]] if HISTORY in lower else None
        return [paired(place, prompt, _text(place, row, self.response), history, system)]

    def _example(self, place: str, row: Mapping[str, object], text: str) -> Example:
        pair = _text(place, row, self.pair) if self.pair else None
        label = label_of(place, row[self.label], self.label, self.labels) if self.label else None
        return Example(text, pair, label)


def _texts(
    place: str, row: Mapping[str, object], lower: Mapping[str, str], names: Iterable[str]
) -> list[str]:
    """The texts, blank ones left out, of those columns among ``names`` that the row has."""
    found = [_text(place, row, lower[name]) for name in names if name in lower]
    return [text for text in found if text.strip()]


def _text(place: str, row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if value is not None and not isinstance(value, str):
        got = "a list" if isinstance(value, list) else type(value).__name__
        cure = "Set data.column or data.columns to those that hold one text a row, or mend that row."
        raise bad(place, f"text in column {name!r}", got, cure)
    return value or ""


def _instances(place: str, asked: list[str], instances: object, system: str) -> Iterator[Dialogue]:
    """One dialogue for each ``{input, output}`` of a row of seed tasks."""
    if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
        raise bad(place, f"a list of objects in column {INSTANCES!r}", type(instances).__name__, MEND)
    for number, one in enumerate(instances, 1):
        where = f"{place} instance {number}"
        if "output" not in one:
            raise bad(where, "the key 'output'", f"keys {', '.join(one) or 'none'}", MEND)
        given = _text(where, one, "input") if "input" in one else ""
        prompt = "\n\n".join([*asked, given] if given.strip() else asked)
        yield paired(where, prompt, _text(where, one, "output"), None, system)


def find_layout(where: str, columns: Mapping[str, bool], spec: DataSpec) -> Layout:
    """What the columns of a table are to be read as.

    Args:
        where: the file, for the error.
        columns: name of each column and whether it holds text.
        spec: the user's choice; without one, columns are known by their names (:data:`NAMES`), else the
            text is looked for by a usual name, then as the only column with text.

    Raises:
        DataError: a named column is not there, there is no candidate, or there are several.
    """
    if spec.examples:
        return _examples(where, columns, spec)
    if spec.columns:
        return _named(where, columns, spec.columns)
    if spec.column is not None:
        return Layout(text=text_column(where, columns, spec.column))
    found = _dialogues(columns)
    lower = {name.lower(): name for name in columns if columns[name]}
    texts = [] if spec.supervise == "responses" else [lower[name] for name in PREFERRED if name in lower]
    if found and texts:
        raise bad(
            where,
            "text or dialogues",
            f"both, text in column {texts[0]!r} and dialogues in {_said(found[0])}",
            f"Set data.column={texts[0]} for the text, or data.supervise=responses for the dialogues.",
        )
    if len(found) > 1:
        got = "; or ".join(map(_said, found))
        cure = "Set data.columns to those of the prompt and the response, as in [question, answer]."
        raise bad(where, "one way to read dialogues", got, cure)
    if found:
        return found[0]
    if spec.supervise == "responses":
        got = f"columns {', '.join(columns) or 'none'}"
        cure = "Set data.columns to those of the prompt and the response, as in [question, answer]."
        raise bad(where, f"dialogues: {NAMES}", got, cure)
    cure = f"{NAME_TEXT} Set data.examples=true for pairs of sentences." if find_pairs(lower) else NAME_TEXT
    return Layout(text=text_column(where, columns, None, cure))


def _examples(where: str, columns: Mapping[str, bool], spec: DataSpec) -> Layout:
    """Of sentences, single or in pairs, and their classes."""
    for field, name in (("column", spec.column), ("pair", spec.pair), ("label", spec.label)):
        if name and name not in columns:
            cure = f"Did you mean: {nearest(name, columns)}? Set data.{field} to one of them."
            raise bad(where, f"a column called {name!r}", f"columns {', '.join(columns) or 'none'}", cure)
    lower = {name.lower(): name for name in columns}
    label = spec.label
    if label is None:
        labels = [lower[name] for name in LABELS if name in lower and lower[name] != spec.column]
        if len(labels) > 1:
            cure = "Set data.label to one of them, or to '' to read none."
            raise bad(where, "one column of classes", " and ".join(map(repr, labels)), cure)
        label = labels[0] if labels else ""
    texts = {name: is_text for name, is_text in columns.items() if name != label}
    if spec.column is not None:
        text, pair = spec.column, spec.pair or ""
    elif spec.pair is not None:
        cure = "Set data.column to the first sentence's."
        raise bad(where, "the column of the first sentence", f"that of the second alone, {spec.pair}", cure)
    else:
        text, pair = _sentences(where, texts)
    return Layout(text=text, examples=True, pair=pair, label=label, labels=spec.labels)


def _sentences(where: str, columns: Mapping[str, bool]) -> tuple[str, str]:
    """The column of the sentence and that of its pair, or nothing."""
    lower = {name.lower(): name for name in columns if columns[name]}
    pairs = find_pairs(lower)
    ways = [" and ".join(map(repr, pair)) for pair in pairs]
    taken = {name for pair in pairs for name in pair}
    ways += [repr(lower[n]) for n in PREFERRED if pairs and n in lower and lower[n] not in taken]
    if len(ways) > 1:
        raise bad(where, "one sentence or one pair of them a row", "; or ".join(ways), NAME_PAIR)
    return pairs[0] if pairs else (text_column(where, columns, None, NAME_PAIR), "")


def _said(layout: Layout) -> str:
    if layout.chat:
        return f"the messages of {layout.chat!r}"
    return " and ".join(repr(name) for name in layout.required)


def _named(where: str, columns: Mapping[str, bool], names: tuple[str, ...]) -> Layout:
    for name in names:
        if name not in columns:
            cure = f"Did you mean: {nearest(name, columns)}? Set data.columns to those of the dialogues."
            raise bad(where, f"a column called {name!r}", f"columns {', '.join(columns) or 'none'}", cure)
    if len(names) == 1:
        return Layout(chat=names[0], exact=True)
    return Layout(prompt=names[:-1], response=names[-1], exact=True)


def _dialogues(columns: Mapping[str, bool]) -> list[Layout]:
    """Every way in which columns of such names are dialogues."""
    lower = {name.lower(): name for name in columns}
    found = [Layout(chat=lower[name]) for name in CHATS if name in lower and not columns[lower[name]]]
    prompts = [lower[name] for name in PROMPTS if name in lower]
    if not prompts and INPUTS[0] in lower:
        prompts = [lower[INPUTS[0]]]
    responses = [lower[name] for name in RESPONSES if name in lower]
    found += [Layout(prompt=(p,), response=r) for p in prompts for r in responses]
    if INSTANCES in lower and not columns[lower[INSTANCES]] and len(prompts) == 1:
        found.append(Layout(prompt=tuple(prompts), instances=lower[INSTANCES]))
    return found


def text_column(where: str, columns: Mapping[str, bool], wanted: str | None, several: str = NAME_TEXT) -> str:
    """The name of the column to read as text.

    Args:
        where: the file, for the error.
        columns: name of each column and whether it holds text.
        wanted: the user's choice; None looks for a usual name, then for the only column with text.
        several: the cure where there is more than one.

    Raises:
        DataError: ``wanted`` is not there, or there is no single candidate; both list the columns.
    """
    names = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted not in columns:
            cure = f"Did you mean: {nearest(wanted, columns)}? Set data.column to the one with the text."
            raise bad(where, f"a column called {wanted!r}", f"columns {names}", cure)
        return wanted
    lower = {name.lower(): name for name in columns if columns[name]}
    for name in PREFERRED:
        if name in lower:
            return lower[name]
    if len(lower) == 1:
        return next(iter(lower.values()))
    kind = "several columns of text" if lower else "no column of text"
    raise bad(
        where,
        "one column of text, or one of the names " + ", ".join(PREFERRED),
        f"{kind}; the columns are {names}",
        several if lower else "Name a source that has text.",
    )
