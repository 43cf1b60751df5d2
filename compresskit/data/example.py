"""Examples for models that read a text whole: a sentence or a pair of them, and its class if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compresskit.data.lines import bad

UNLABELLED = -100
PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("anchor", "positive"),
)
LABELS = ("label", "labels", "label_id", "class", "target")


@dataclass(frozen=True, slots=True)
class Example:
    """What an encoder reads at once.

    Attributes:
        text: the sentence, or the first of two.
        pair: the second; None where the source has single sentences.
        label: number of its class, from 0; None where it has none.
    """

    text: str
    pair: str | None = None
    label: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether no side of it is blank."""
        return bool(self.text.strip()) and (self.pair is None or bool(self.pair.strip()))

    @property
    def is_blank(self) -> bool:
        """Whether every side of it is blank."""
        return not f"{self.text}{self.pair or ''}".strip()

    def __str__(self) -> str:
        """All of its text, so that the same text is on one side of a split whatever its label."""
        return self.text if self.pair is None else f"{self.text}\0{self.pair}"


def label_of(place: str, value: object, name: str, names: tuple[str, ...]) -> int | None:
    """The number of a class as a table wrote it.

    Args:
        place: of the row, for errors.
        value: a whole number, its digits, or one of ``names``; null, nothing and -1 stand for no class.
        name: of the column.
        names: of the classes, in the order of their numbers; empty where a table writes numbers.

    Raises:
        DataError: it is something else.
    """
    text = value.strip() if isinstance(value, str) else value
    if text is None or text == "":
        return None
    if isinstance(text, str) and text in names:
        return names.index(text)
    number = _whole(text)
    if names and number is None:
        cure = "Add it to data.labels, or mend that row."
        raise bad(place, f"a class among {', '.join(names)} in column {name!r}", repr(text), cure)
    if number is None or number < -1:
        cure = (
            "Set data.labels to the names of the classes in the order of their numbers, as in [negative, "
            "positive], or data.label to another column, or to '' to read no label."
        )
        raise bad(place, f"the number of a class in column {name!r}", repr(value), cure)
    if names and number >= len(names):
        cure = "Add the missing names to data.labels, or mend that row."
        raise bad(place, f"a class below {len(names)}, as data.labels has names", str(number), cure)
    return None if number == -1 else number


def _whole(value: object) -> int | None:
    """``value`` as a whole number (also 1.0, as tables with gaps write it), or None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return int(value) if isinstance(value, bool) else None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < 1 << 31 else None


def find_pairs(lower: Mapping[str, str]) -> list[tuple[str, str]]:
    """The columns of every usual pair of names.

    Args:
        lower: a column's name in small letters -> its name.
    """
    return [(lower[a], lower[b]) for a, b in PAIRS if a in lower and b in lower]
