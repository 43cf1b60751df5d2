"""Dialogues as tokens: exact ids and labels by hand, and no token learnt that is not the assistant's."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from compresskit.assets.teacher_model import train_tokenizer
from compresskit.data.dialogue import Dialogue
from compresskit.data.render import Rendered, Renderer
from compresskit.errors import DataError
from tests.tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
TRIMMED = CHATML.replace("m.content }}", "m.content | trim }}")
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LAST_ONLY = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:1] }}")
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TALK = Dialogue((("hi", "Yo!"), ("ok?", "no")), "Be.", place="talk.jsonl:7")
SYMBOLS = {" ": "\u0120", "\n": "\u010a"}


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, *parts: str) -> list[int]:
    """One id per character, except that a part that is a token of its own is that token."""
    vocabulary = tokenizer.get_vocab()
    found = []
    for part in parts:
        found += [vocabulary[part]] if part in vocabulary else [vocabulary[SYMBOLS.get(c, c)] for c in part]
    return found


def learnt_ids(made: Rendered) -> list[int]:
    return [token for first, end in made.learnt for token in made.ids[first:end]]


def test_without_a_template_ids_and_labels_by_hand() -> None:
    tokenizer = byte_tokenizer()
    (made,) = Renderer(tokenizer)([TALK])
    before, between = "System:\nBe.\n\nUser:\nhi\n\nAssistant:\n", "\n\nUser:\nok?\n\nAssistant:\n"
    assert made.ids == ids_of(tokenizer, before, "Yo!", "</s>", between, "no", "</s>")
    first = len(before)
    second = first + 4 + len(between)
    assert made.learnt == [(first, first + 4), (second, second + 3)]
    assert made.covered_bytes(0, len(made.ids)) == 5
    assert made.covered_bytes(first + 1, second + 1) == 3


def test_a_tokenizer_that_puts_bos_before_a_text_has_it_before_a_dialogue() -> None:
    tokenizer = train_tokenizer(["abc"], vocabulary=258)
    (made,) = Renderer(tokenizer)([Dialogue((("hi", "Yo"),))])
    assert made.ids == ids_of(tokenizer, "<s>", "User:\nhi\n\nAssistant:\n", "Yo", "</s>")
    assert made.learnt == [(len(made.ids) - 3, len(made.ids))]


@pytest.mark.parametrize("template", [CHATML, MARKED, TRIMMED])
def test_with_a_template_ids_and_labels_by_hand(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    renderer = Renderer(tokenizer)
    (made,) = renderer([TALK])
    start, end = "<|im_start|>", "<|im_end|>"
    expected = ids_of(
        tokenizer, start, "system\nBe.", end, "\n", start, "user\nhi", end, "\n", start, "assistant\n"
    )
    first = len(expected)
    expected += ids_of(tokenizer, "Yo!", end, "\n", start, "user\nok?", end, "\n", start, "assistant\n")
    second = len(expected)
    expected += ids_of(tokenizer, "no", end, "\n")
    assert made.ids == expected == tokenizer.apply_chat_template(TALK.messages())["input_ids"]
    assert made.learnt == [(first, first + 4), (second, second + 3)]
    assert renderer.notes("talk.jsonl") == []


def test_blanks_that_a_template_trims_are_no_response() -> None:
    tokenizer = chat_tokenizer(TRIMMED)
    (made,) = Renderer(tokenizer)([Dialogue((("hi", "  Yo\n"),))])
    assert learnt_ids(made) == ids_of(tokenizer, "Yo", "<|im_end|>")


def test_an_end_after_a_blank_and_a_refusal_of_the_template() -> None:
    tokenizer = chat_tokenizer(LLAMA2)
    renderer = Renderer(tokenizer)
    (made,) = renderer([Dialogue((("hi", "Yo"),))])
    assert made.ids == ids_of(tokenizer, "<s>", "[INST] hi [/INST] ", "Yo", " ", "</s>")
    assert learnt_ids(made) == ids_of(tokenizer, "Yo", " ", "</s>")
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*got no system here"):
        renderer([TALK])


def test_a_template_that_changes_with_the_response_is_refused() -> None:
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*different responses.*generation"):
        Renderer(chat_tokenizer(LAST_ONLY))([TALK])


def test_a_template_that_marks_nothing_in_a_dialogue_is_refused() -> None:
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'robot'")
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*marks as the assistant's, got none"):
        Renderer(chat_tokenizer(template))([TALK])


def test_responses_that_nothing_ends_are_told() -> None:
    renderer = Renderer(chat_tokenizer(NO_END))
    (made,) = renderer([TALK])
    assert learnt_ids(made) == ids_of(renderer.tokenizer, "Yo!", "no")
    (note,) = renderer.notes("talk.jsonl")
    assert "1 of 1 dialogues have a response that no token ends" in note
    bare = byte_tokenizer()
    bare.eos_token = None
    renderer = Renderer(bare)
    renderer([TALK])
    assert renderer.unended == 1


def test_dialogues_that_spell_out_a_special_token_are_told() -> None:
    renderer = Renderer(byte_tokenizer())
    (made, _) = renderer([Dialogue((("hi", "a</s>b"),)), TALK])
    assert learnt_ids(made) == ids_of(renderer.tokenizer, "a", "</s>", "b", "</s>")
    (note,) = renderer.notes("talk.jsonl")
    assert note.startswith("talk.jsonl: 1 of 2 dialogues spell out a token of the tokenizer's own")


def merged_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One that merges ``:Y`` and, blank and letter, `` n``."""
    from tokenizers import Tokenizer, decoders, models

    letters = sorted(set("system uer: hiok?assistant Yon!\n."))
    vocabulary = {letter: i for i, letter in enumerate([*letters, ":Y", " n"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Y"), (" ", "n")]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = template
    return tokenizer


def test_a_token_shared_with_the_template_is_learnt_only_if_the_rest_of_it_is_blank() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    renderer = Renderer(merged_tokenizer(template))
    (made,) = renderer([Dialogue((("hi", "You"),))])
    assert [made.text[slice(*made.offsets[t])] for a, b in made.learnt for t in range(a, b)] == ["o", "u"]
    assert "1 responses share a token" in renderer.notes("x")[0]
    renderer = Renderer(merged_tokenizer(template.replace(":{{", ": {{")))
    (made,) = renderer([Dialogue((("hi", "no"),))])
    assert [made.text[slice(*made.offsets[t])] for a, b in made.learnt for t in range(a, b)] == [" n", "o"]
    assert renderer.shared == 0


# Without "<" no text spells out a special token.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=20).filter(
    str.strip
)
talks = st.lists(st.tuples(texts, texts), min_size=1, max_size=4).map(lambda turns: Dialogue(tuple(turns)))


@pytest.mark.parametrize("template", [None, CHATML, MARKED])
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(talk=talks)
def test_what_is_learnt_decodes_to_exactly_the_responses(template: str | None, talk: Dialogue) -> None:
    tokenizer = chat_tokenizer(template)
    (made,) = Renderer(tokenizer)([talk])
    end = "</s>" if template is None else "<|im_end|>"
    said = [tokenizer.decode(made.ids[first:last]) for first, last in made.learnt]
    assert said == [response + end for _, response in talk.turns]
    assert made.covered_bytes(0, len(made.ids)) == sum(len(r.encode()) for _, r in talk.turns)
    if template is not None:
        assert made.ids == tokenizer.apply_chat_template(talk.messages())["input_ids"]


def test_a_tokenizer_that_knows_no_characters_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="a fast tokenizer"):
        Renderer(Slow())  # type: ignore[arg-type]


def test_the_identity_follows_the_template_and_the_added_tokens() -> None:
    made = [chat_tokenizer(template) for template in (None, CHATML, MARKED)]
    assert len({Renderer(tokenizer).identity for tokenizer in [*made, byte_tokenizer()]}) == 4
    assert Renderer(chat_tokenizer(CHATML)).identity == Renderer(made[1]).identity
