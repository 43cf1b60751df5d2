"""Rows that hold dialogues: every way to write them down, and what is refused, with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compresskit.data import check, documents, open_corpus
from compresskit.data.dialogue import Dialogue
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError

Row = dict[str, object]
ONE = Dialogue((("Hi?", "Ho!"),))
TWO = Dialogue((("Hi?", "Ho!"), ("So?", "No.")), "Be brief.")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho!"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "No."},
]
SHARED = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
    for m in CHAT
]
GOOD: dict[str, tuple[Row, list[Dialogue]]] = {
    "prompt": ({"prompt": "Hi?", "response": "Ho!", "id": 3}, [ONE]),
    "completion": ({"Prompt": "Hi?", "Completion": "Ho!"}, [ONE]),
    "question": ({"question": "Hi?", "answer": "Ho!", "topic": "greeting"}, [ONE]),
    "input": ({"input": "Hi?", "output": "Ho!"}, [ONE]),
    "instruction": ({"instruction": "Hi?", "input": "", "output": "Ho!", "history": []}, [ONE]),
    "null": ({"instruction": "Hi?", "input": None, "output": "Ho!", "history": None}, [ONE]),
    "with-input": (
        {"instruction": "Sum up.", "input": "A b c.", "output": "Abc."},
        [Dialogue((("Sum up.\n\nA b c.", "Abc."),))],
    ),
    "history": (
        {"instruction": "So?", "output": "No.", "history": [["Hi?", "Ho!"]], "system": "Be brief."},
        [TWO],
    ),
    "orca": ({"system_prompt": "", "question": "Hi?", "response": "Ho!"}, [ONE]),
    "messages": ({"messages": CHAT, "source": "x"}, [TWO]),
    "sharegpt": ({"id": "a", "conversations": SHARED}, [TWO]),
    "system-beside": ({"system": "Be brief.", "conversations": SHARED[1:]}, [TWO]),
    "seed-tasks": (
        {
            "name": "x",
            "instruction": "Hi?",
            "instances": [{"input": "", "output": "Ho!"}, {"input": "x", "output": "y"}],
        },
        [ONE, Dialogue((("Hi?\n\nx", "y"),))],
    ),
}


def lines(path: Path, *rows: object) -> DataSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSpec(source=str(path))


def read(spec: DataSpec) -> list[object]:
    return list(open_corpus(spec).documents("all"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", GOOD)
def test_every_way_to_write_a_dialogue(tmp_path: Path, name: str, kind: str) -> None:
    row, expected = GOOD[name]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        lines(path, row, row)
    elif kind == "json":
        path.write_text(json.dumps([row, row], indent=1))
    else:
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    spec = DataSpec(source=str(path))
    assert read(spec) == expected * 2
    assert check(spec, "data") == []
    assert open_corpus(spec).is_dialogue


@pytest.mark.parametrize("name", ["question", "history", "messages", "sharegpt"])
def test_a_hub_data_set_of_dialogues(
    fake_hub: Callable[[dict[str, datasets.Dataset]], None], name: str
) -> None:
    row, expected = GOOD[name]
    fake_hub({"train": datasets.Dataset.from_list([row, row])})
    spec = DataSpec(source="owner/set:small")
    assert read(spec) == expected * 2
    assert check(spec, "data") == []


def test_a_table_of_prompts_and_responses(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,question,answer\n1,Hi?,Ho!\n2,"a\nb",c\n')
    assert read(DataSpec(source=str(path))) == [ONE, Dialogue((("a\nb", "c"),))]


def test_columns_named_by_the_user_and_nothing_beside_them(tmp_path: Path) -> None:
    row = {"ask": "Hi?", "more": "", "say": "Ho!", "history": [["a", "b"]], "text": "x", "talk": SHARED}
    source = lines(tmp_path / "a.jsonl", row).source
    assert read(DataSpec(source=source, columns=("ask", "say"))) == [ONE]
    assert read(DataSpec(source=source, columns=("ask", "more", "say"))) == [ONE]
    assert read(DataSpec(source=source, columns="talk")) == [TWO]  # type: ignore[arg-type]
    assert read(DataSpec(source=source)) == ["x"]
    texts = lines(tmp_path / "b.jsonl", {"messages": "not a list, but text", "n": 1})
    assert read(texts) == ["not a list, but text"]
    with pytest.raises(DataError, match=r"a column called 'sya'.*Did you mean: say"):
        read(DataSpec(source=source, columns=("ask", "sya")))


def test_a_file_with_text_and_dialogues_is_read_as_the_user_says(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", {"text": "Hi? Ho!", "question": "Hi?", "answer": "Ho!"}).source
    (fault,) = check(DataSpec(source=source), "data")
    assert fault.got == "both, text in column 'text' and dialogues in 'question' and 'answer'"
    assert "data.column=text" in fault.cure
    assert "data.supervise=responses" in fault.cure
    assert read(DataSpec(source=source, column="text")) == ["Hi? Ho!"]
    assert read(DataSpec(source=source, supervise="responses")) == [ONE]
    assert read(DataSpec(source=source, columns=("question", "answer"))) == [ONE]
    assert list(documents(DataSpec(source=source, column="answer"), "all")) == ["Ho!"]


BAD: dict[str, tuple[Row, str, str, str]] = {
    "empty": ({"prompt": "a", "response": " \n"}, "", "a response", "only blanks"),
    "null": ({"prompt": "a", "response": None}, "", "a response", "none"),
    "no-prompt": ({"prompt": "", "input": "", "response": "a"}, "", "a prompt", "none"),
    "missing": ({"prompt": "a", "respnse": "b"}, "", "a column called 'response'", "prompt, respnse"),
    "list": ({"prompt": "a", "response": ["b", "c"]}, "", "text in column 'response'", "a list"),
    "number": ({"prompt": 5, "response": "b"}, "", "text in column 'prompt'", "int"),
    "history": ({"prompt": "a", "response": "b", "history": "x"}, "", "as history", "str"),
    "history-one": (
        {"prompt": "a", "response": "b", "history": [["c", "d"], ["e"]]},
        " history 2",
        "a pair of texts",
        "a list of 1",
    ),
    "history-blank": (
        {"prompt": "a", "response": "b", "history": [["c", ""]]},
        " history 1",
        "a response",
        "none",
    ),
}
BAD_CHATS: dict[str, tuple[object, str, str, str]] = {
    "role": ([*CHAT[:3], {"role": "tool", "content": "5"}], " message 4", "a role among", "'tool'"),
    "order": (CHAT[:2] + CHAT[3:], " message 3", "a message of the assistant", "one of the user"),
    "assistant-first": (CHAT[2:], " message 1", "a message of the user", "one of the assistant"),
    "system-late": ([*CHAT[1:3], CHAT[0]], " message 3", "a message of the user", "one of the system"),
    "system-alone": (CHAT[:1], "", "a response to each prompt", "0 messages"),
    "no-response": (CHAT[:4], "", "a response to each prompt", "3 messages"),
    "empty-list": ([], "", "a list of messages", "an empty list"),
    "null-content": (
        [CHAT[1], {"role": "assistant", "content": None}],
        " message 2",
        "text as 'content'",
        "NoneType",
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        " message 1",
        "text as 'content'",
        "list",
    ),
    "keys": ([{"role": "user", "text": "a"}], " message 1", "the key 'content'", "role, text"),
    "blank": ([CHAT[1], {"role": "assistant", "content": ""}], "", "a response", "none"),
    "no-object": (["hello"], " message 1", "an object", "str"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_CHATS])
def test_bad_rows_are_said_with_their_place(tmp_path: Path, name: str) -> None:
    if name in BAD:
        good: Row = {"prompt": "a", "response": "b"}
        row, place, expected, got = BAD[name]
    else:
        good = {"messages": CHAT}
        messages, place, expected, got = BAD_CHATS[name]
        row = {"messages": messages}
    spec = lines(tmp_path / "a.jsonl", good, row)
    (fault,) = check(spec, "data")
    assert fault.where == f"data: {spec.source}:2{place}"
    assert expected in fault.expected
    assert got in fault.got
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        read(spec)


def test_rows_beyond_the_first_bad_ones_are_counted(tmp_path: Path) -> None:
    spec = lines(tmp_path / "a.jsonl", *({"prompt": "a", "response": "b" * (i % 2)} for i in range(20)))
    faults = check(spec, "data")
    assert [fault.where.rsplit(":", 1)[-1] for fault in faults] == ["1", "3", "5"]
    assert faults[-1].got.endswith("(and 7 more rows of that file are wrong)")


def test_what_is_not_sure_to_be_a_dialogue_is_refused(tmp_path: Path) -> None:
    def fault(row: Row, **options: object) -> str:
        (found,) = check(DataSpec(source=lines(tmp_path / "a.jsonl", row).source, **options), "data")  # type: ignore[arg-type]
        return str(found)

    assert "'prompt' and 'answer'; or 'question' and 'answer'" in fault(
        {"prompt": "a", "question": "b", "answer": "c"}
    )
    assert "the messages of 'messages'; or 'prompt' and 'response'" in fault(
        {"messages": CHAT, "prompt": "a", "response": "b"}
    )
    assert "data.columns to those of prompt and response" in fault({"question": "a", "std_answer": "b"})
    assert "expected dialogues: a prompt (prompt," in fault({"text": "a"}, supervise="responses")
    assert "responses or all" in fault({"prompt": "a", "response": "b"}, supervise="assistant")
    assert "Leave one of them out" in fault({"prompt": "a", "response": "b"}, column="prompt", columns=("a",))
    assert "Leave one of them out" in fault({"a": "a"}, column="a", supervise="responses")
    for options in ({"columns": ("a", "b")}, {"supervise": "responses"}):
        assert "plain text" in str(check(DataSpec(**options), "data")[0])  # type: ignore[arg-type]


def test_text_and_dialogues_in_one_source_are_refused(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "a"})
    lines(tmp_path / "b.jsonl", {"prompt": "a", "response": "b"})
    spec = DataSpec(source=str(tmp_path))
    (fault,) = check(spec, "data")
    assert (fault.expected, fault.got) == ("text or dialogues", "1 text and 1 dialogues")
    with pytest.raises(DataError, match=r"b.jsonl:1: expected text, as elsewhere, got a dialogue"):
        read(spec)


def test_dialogues_are_divided_and_told_apart_like_documents(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(200)]
    spec = lines(tmp_path / "a.jsonl", *rows)
    train, held = (set(open_corpus(spec).documents(split)) for split in ("train", "validation"))
    assert len(train) + len(held) == 200
    assert not train & held
    assert 2 <= len(held) <= 30
    with pytest.raises(DataError, match="expected text, as elsewhere, got a dialogue"):
        list(documents(spec, "all"))


REAL = {
    "oasst_sft_zh.json": 766,
    "gsm8k_train.jsonl": 7473,
    "identity.json": 91,
    "self_instruct_seed_tasks.jsonl": 175,
    "belle_zh_seed_tasks.jsonl": 175,
}


@pytest.mark.parametrize("name", REAL)
def test_real_dialogues(shared_data: Path, name: str) -> None:
    spec = DataSpec(source=str(shared_data / "instruct" / name))
    found = read(spec)
    assert len(found) == REAL[name]
    assert all(isinstance(one, Dialogue) for one in found)
    assert check(spec, "data") == []


def test_the_real_chinese_file_turn_by_turn(shared_data: Path) -> None:
    path = shared_data / "instruct" / "oasst_sft_zh.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    turns = [[*map(tuple, row["history"]), (row["instruction"], row["output"])] for row in rows]
    found = read(DataSpec(source=str(path)))
    assert [list(one.turns) for one in found if isinstance(one, Dialogue)] == turns
    assert sum(map(len, turns)) == 766 + 432 + 2 * 92


def test_real_files_that_are_no_dialogues_say_why(shared_data: Path) -> None:
    folder = shared_data / "instruct"
    ranked = check(DataSpec(source=str(folder / "oasst_rm_zh.json")), "data")
    assert "oasst_rm_zh.json:2: expected text in column 'output', got a list" in str(ranked[0])
    assert "772 more rows" in ranked[-1].got
    belle = str(folder / "belle_eval_set.json")
    assert "columns are question, std_answer, class" in str(check(DataSpec(source=belle), "data")[0])
    blank = check(DataSpec(source=belle, columns=("question", "std_answer")), "data")
    assert "belle_eval_set.json:4: expected a response" in str(blank[0])
    assert "366 more rows" in blank[-1].got
