"""YAML scalars as people mean them, with lines; the traps are YAML 1.1's."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from compresskit.errors import RecipeError
from compresskit.yaml12 import dump_yaml, parse_yaml


def test_scalars_of_yaml_11_are_not_taken_for_something_else() -> None:
    data, _ = parse_yaml("a: 2:4\nb: 1e-3\nc: no\nd: 50%\ne: ~\nf: 010\ng: on\nh: 1_000", "f")
    assert data == {
        "a": "2:4", "b": 0.001, "c": "no", "d": "50%", "e": None, "f": 10, "g": "on", "h": "1_000",
    }  # fmt: skip


def test_every_path_has_its_line() -> None:
    _, lines = parse_yaml("model: m\nstages:\n  - prune:\n      pattern: 2:4\n  - distill\n", "f")
    assert lines["stages[0].prune.pattern"] == 4
    assert lines["stages[1]"] == 5


@pytest.mark.parametrize(
    ("text", "place"), [("a: [1", "f:1"), ("a: 1\na: 2", "f:2"), ("a: !!python/name:os.system x", "f:1")]
)
def test_malformed_yaml_names_the_line(text: str, place: str) -> None:
    with pytest.raises(RecipeError, match=place):
        parse_yaml(text, "f")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f\x85\xa0"))


@example({"0E0": "1e5"})
@given(st.recursive(SCALARS | TEXTS, lambda x: st.lists(x) | st.dictionaries(TEXTS, x), max_leaves=8))
def test_what_is_written_is_read_back_by_us_and_by_others(data: object) -> None:
    text = dump_yaml({"x": data})
    assert parse_yaml(text, "f")[0] == {"x": data}
    assert yaml.safe_load(text) == {"x": data}
