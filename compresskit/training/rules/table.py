"""What does not combine, as tables of Markdown, in the rules' own words. No torch.

``python -m compresskit.training.rules.table docs/training.md`` writes them into the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from string import Formatter

from compresskit.training.rules import ROOMS
from compresskit.training.rules.base import Rule

BEGIN, END = "<!-- rules -->\n", "<!-- end of rules -->\n"
OBVIOUS = ("-name", "-missing")
"""Ends of names of rules that need no telling: a word that is none of those there are, a package."""


def tables() -> str:
    """One table a subject: each rule, the field that it is told of, what it expects, and the cure."""
    return "\n".join(_table(room.__doc__ or "", room.RULES) for room in ROOMS)


def with_tables(page: str) -> str:
    """``page`` with the tables as they are now between its two marks."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


def _table(told: str, rules: tuple[Rule, ...]) -> str:
    subject = told.partition(": ")[2].partition(". ")[0]
    rows = [rule for rule in rules if not rule.name.endswith(OBVIOUS)]
    lines = [f"| `{r.name}` | `{r.field}` | {_words(r.expected)} | {r.cure} |" for r in rows]
    head = f"| rule: {subject} | field | what it expects | cure |"
    return "\n".join([head, "|---|---|---|---|", *lines, ""])


def _words(template: str) -> str:
    """With a field's name, in capitals, in the place of its value."""
    return "".join(text + (name or "").upper() for text, name, _, _ in Formatter().parse(template))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.write_text(with_tables(place.read_text(encoding="utf-8")), encoding="utf-8")
