"""A plan says how dialogues are worded, and refuses what the chat template will refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.errors import PlanError
from tests.tiny import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)
GOOD = '{"prompt": "a", "response": "b"}\n'


def recipe(folder: Path, body: str, template: str | None = None) -> ck.Recipe:
    model = tiny_llama(folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    data = folder / "talks.jsonl"
    data.write_text(body)
    return ck.Recipe(model=str(model), data=DataSpec(source=str(data)), stages=(ck.Finetune(steps=1),))


def test_a_plan_says_how_dialogues_are_worded(tmp_path: Path) -> None:
    plain = ck.plan(recipe(tmp_path, GOOD))
    sentence = (
        "data: dialogues, worded with plain 'User:' and 'Assistant:' headings; training learns the responses"
    )
    assert plain.notes == (sentence,)
    assert sentence in str(plain)
    assert plain.to_json()["notes"] == [sentence]
    (note,) = ck.plan(recipe(tmp_path, GOOD, TEMPLATE)).notes
    assert "the tokenizer's own chat template" in note
    assert ck.plan(recipe(tmp_path, '{"text": "a"}\n')).notes == ()


def test_a_plan_refuses_what_the_template_refuses(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"talks.jsonl:2: expected .*chat template takes, got no system here"):
        ck.plan(recipe(tmp_path, GOOD + '{"prompt": "a", "response": "b", "system": "c"}\n', TEMPLATE))
    with pytest.raises(PlanError) as caught:
        ck.plan(recipe(tmp_path, GOOD + '{"prompt": "a", "response": ""}\n', TEMPLATE))
    assert len(caught.value.faults) == 1
