"""Every kind of file, good and bad: the same documents whatever the kind, and every fault with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.data import jsonfile, lines
from compresskit.data.readers import DOCUMENT_CHARACTERS, kind_of, read_file
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError

TEXTS = ["one", 'two, with "quotes"\nand a line end', "", "dr\u00e9i \u2028 \U0001f600", "  four "]


def texts_of(path: Path, column: str | None = None) -> list[str]:
    return [str(text) for _, text in read_file(path, DataSpec(column=column))]


def places_of(path: Path) -> list[str]:
    return [place.removeprefix(str(path)) for place, _ in read_file(path, DataSpec())]


def as_table(texts: list[str], **style: object) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, **style)  # type: ignore[arg-type]
    writer.writerows([["label", "text"], *[[str(i), text] for i, text in enumerate(texts)]])
    return out.getvalue()


def write(path: Path, body: str | bytes) -> Path:
    raw = body.encode() if isinstance(body, str) else body
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
BODIES = {
    "a.jsonl": JSON_LINES,
    "blank-lines.jsonl": JSON_LINES.replace("\n", "\n\n"),
    "windows.jsonl": JSON_LINES.replace("\n", "\r\n"),
    "bom.jsonl": "\ufeff" + JSON_LINES,
    "no-last-line-end.jsonl": JSON_LINES.rstrip(),
    "a.jsonl.gz": JSON_LINES,
    "lines.json": JSON_LINES,
    "lines.json.gz": JSON_LINES,
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2) + "\n",
    "strings.json": json.dumps(TEXTS),
    "wrapped.json": json.dumps({"version": 1, "rows": ROWS}, indent=1),
    "upper.JSON": json.dumps(ROWS, ensure_ascii=False),
    "a.csv": as_table(TEXTS),
    "a.csv.gz": as_table(TEXTS),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_kind_holds_the_same_documents(tmp_path: Path, name: str) -> None:
    assert texts_of(write(tmp_path / name, BODIES[name])) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([*TEXTS, None]).cast(kind) if not pa.types.is_dictionary(kind) else None
    values = pa.array([*TEXTS, None]).dictionary_encode() if values is None else values
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(6), "text": values}), path, row_group_size=2)
    assert texts_of(path) == [*TEXTS, ""]


def test_tab_separated_with_lone_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'label\tcontent\n1\t"lone quote\n0\tplain "x\n')
    assert texts_of(path) == ['"lone quote', 'plain "x']


def test_places_are_lines(tmp_path: Path) -> None:
    assert places_of(write(tmp_path / "a.jsonl", '{"text":"x"}\n\n{"text":"y"}\n')) == [":1", ":3"]
    assert places_of(write(tmp_path / "a.json", '[\n{"text":"x"},\n\n{"text":"y"}\n]')) == [":2", ":4"]
    assert places_of(write(tmp_path / "a.csv", 'text\n"x\ny"\nz\n')) == [":2", ":4"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("piece", range(1, 12))
def test_numbers_that_a_piece_cuts_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    rows = [0.5, 25, -3e-7, 1e100, True, [1.25], "1.5", 0]
    path = write(tmp_path / "a.json", json.dumps(rows))
    monkeypatch.setattr(jsonfile, "LINE_BYTES", piece)
    assert [row for _, row in jsonfile.json_rows(path)] == rows


@settings(max_examples=60)
@given(st.lists(json_values, max_size=8), st.sampled_from([None, 1, "\t"]), st.integers(1, 40))
def test_an_array_read_in_pieces_is_the_array(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object], indent: int | str | None, piece: int
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    body = json.dumps(rows, indent=indent, ensure_ascii=False)
    path.write_text(body, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonfile, "LINE_BYTES", piece)
        read = list(jsonfile.json_rows(path))
    assert [row for _, row in read] == rows
    numbers = [number for number, _ in read]
    assert numbers == sorted(numbers)
    assert all(1 <= number <= body.count("\n") + 1 for number in numbers)


@settings(max_examples=60)
@given(st.lists(json_values, min_size=1, max_size=5), st.data())
def test_a_truncated_array_is_always_an_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object], data: st.DataObject
) -> None:
    body = json.dumps(rows, indent=1).encode()
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_bytes(body[: data.draw(st.integers(0, len(body) - 1))])
    with pytest.raises(DataError):
        list(jsonfile.json_rows(path))


@settings(max_examples=60)
@given(st.text(min_size=1), st.integers(1, 12))
def test_pieces_of_lines_are_the_lines(
    tmp_path_factory: pytest.TempPathFactory, text: str, longest: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    pieces = list(lines.lines(path, longest_bytes=longest))
    assert "".join(piece for _, piece in pieces) == text.removeprefix("\ufeff")
    assert pieces == [] or pieces[-1][0] == text.rstrip("\n").count("\n") + 1 or text.endswith("\n")


def test_plain_text_is_cut_at_blank_lines_into_documents_of_some_length(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 100 for i in range(60)]
    path = write(tmp_path / "a.txt", "\n\n".join(paragraphs) + "\n")
    texts = texts_of(path)
    assert "\n\n".join(text.strip("\n") for text in texts) == "\n\n".join(paragraphs)
    assert all(DOCUMENT_CHARACTERS <= len(text) < DOCUMENT_CHARACTERS + 600 for text in texts[:-1])
    assert len(texts) > 5


def test_plain_text_is_cut_at_its_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\n\nb\n<|endoftext|>\nc\n<|endoftext|>\n")
    assert texts_of(path) == ["a\n\nb", "c"]


def test_plain_text_without_blank_lines_or_line_ends_is_still_cut(tmp_path: Path) -> None:
    by_line = texts_of(write(tmp_path / "a.txt", "word word word\n" * 5000))
    assert "\n".join(by_line) == "\n".join(["word word word"] * 5000)
    assert len(by_line) > 3
    by_size = texts_of(write(tmp_path / "b.txt", "\u00e9" * (3 << 20)))
    assert "".join(by_size) == "\u00e9" * (3 << 20)
    assert len(by_size) > 1


BAD = {
    "truncated.jsonl": ('{"text": "a"}\n{"text": "b', ":2:", "Unterminated string"),
    "number.jsonl": ("1\n", ":1:", "int"),
    "no-such-key.jsonl": ('{"text": "a"}\n{"txet": "b"}\n', ":2:", "columns txet"),
    "number-in-text.jsonl": ('{"text": "a"}\n{"text": 5}\n', ":2:", "int"),
    "truncated.json": ('[\n {"text": "a"},\n {"text": "b', ":3:", "inside a row"),
    "no-end.json": ('[\n {"text": "a"}\n', ":3:", "end of the file"),
    "no-comma.json": ('[{"text": "a"}\n{"text": "b"}]', ":2:", "','"),
    "more.json": ('[{"text": "a"}]\n{', ":2:", "after the array"),
    "object.json": ('{"text": "a"', ":1:", "delimiter"),
    "empty.json": ("", "", "empty"),
    "empty.csv": ("", "", "empty"),
    "header.csv": ("text\n", "", "header alone"),
    "fields.csv": ("id,text\n1,a\n2,b,c\n", ":3:", "3 fields"),
    "open-quote.csv": ('text\n"a\nb\n', ":2:", "unexpected end"),
    "many.csv": ("title,summary\na,b\n", ":1:", "title, summary"),
    "none.csv": ("x,y\n1,2\n", ":1:", "no column of text"),
    "latin1.txt": (b"abc\ncaf\xe9 x\n", ":2:", "0xe9 at offset 7"),
    "latin1-bom.txt": (b"\xef\xbb\xbfcaf\xe9 x\n", ":1:", "offset 6"),
    "latin1.jsonl": (b'{"text":"a"}\n{"text":"\xff"}\n', ":2:", "offset 22"),
    "bad.parquet": (b"PAR1 nothing", "", "parquet"),
    "what.pdf": (b"x", "", ".pdf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_said_with_their_place(tmp_path: Path, name: str) -> None:
    body, place, words = BAD[name]
    path = write(tmp_path / name, body)
    with pytest.raises(DataError) as caught:
        texts_of(path)
    message = str(caught.value)
    assert f"{path}{place}" in message
    assert words in message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "lines.json.gz"])
def test_truncated_gzip(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, BODIES[name] * 200)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"{name}:\d+: expected a whole gzip stream"):
        texts_of(path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=f"{name}:1: expected a whole gzip stream"):
        texts_of(path)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 5000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a whole parquet file"):
        texts_of(path)


def test_the_column_wanted_and_the_columns_that_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "a", "answer": "b", "n": 1}\n')
    assert texts_of(path, "answer") == ["b"]
    with pytest.raises(DataError, match=r"columns question, answer, n.*Did you mean: answer"):
        texts_of(path, "anwser")
    with pytest.raises(DataError, match=r"text in column 'n'"):
        texts_of(path, "n")
    with pytest.raises(DataError, match="no columns"):
        texts_of(write(tmp_path / "a.txt", "x"), "text")


def test_kinds() -> None:
    found = [
        kind_of(Path(n)) for n in ("a.TXT", "a.jsonl.gz", "a.b.csv", "a.gz", "a", "a.parquet.gz", ".json")
    ]
    assert found == [".txt", ".jsonl", ".csv", "", "", "", ""]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_a_file_is_never_held_in_memory(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{i} " + "word " * 3000} for i in range(1500)]
    bodies = {
        ".json": lambda: json.dumps(rows),
        ".jsonl": lambda: "\n".join(json.dumps(row) for row in rows),
        ".csv": lambda: as_table([row["text"] for row in rows]),
        ".txt": lambda: "\n\n".join(row["text"] for row in rows),
    }
    path = write(tmp_path / name, bodies[Path(name).suffix]())
    assert path.stat().st_size > 22_000_000
    tracemalloc.start()
    count = sum(1 for _ in read_file(path, DataSpec()))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1500
    assert peak_bytes < 8_000_000


def test_json_lines_longer_than_a_piece_under_a_json_name(tmp_path: Path) -> None:
    texts = ["x" * (lines.LINE_BYTES + 5), "y"]
    path = write(tmp_path / "a.json", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert texts_of(path) == texts
