"""Teachers with another tokenizer: what is said where, against slow readings of the same text."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from marked import marked_tokenizer, save_marked, trailing_tokenizer
from tiny import byte_tokenizer, tiny_llama
from torch import Tensor

from compresskit.distill.align.boundaries import NOWHERE, common, render, walk
from compresskit.distill.align.provider import Aligned
from compresskit.distill.align.spelling import beginnings, spelling_of, twins
from compresskit.distill.divergences import Divergences
from compresskit.distill.teacher import Replica
from compresskit.modeling import load_model
from compresskit.training.job import Part
from compresskit.training.objective import Head, Hidden, Listing, Signal

TEXTS = ["and a cab", "a band, and a can", "caf\u00e9 and \u4e2d", ""]


TOKENIZERS = {"bytes": byte_tokenizer, "marked": marked_tokenizer, "trailing": trailing_tokenizer}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("align")
    tiny_llama(out / "bytes", dtype=torch.float64, initializer_range=0.3)
    save_marked(out / "marked")
    trailing_tokenizer().save_pretrained(out / "trailing")  # of a student, which is not asked itself
    return out


def aligned(place: Path, student: str, teacher: str, method: str = "spans", **changes: Any) -> Aligned:
    made: Any = TOKENIZERS[student]()
    ids = 258 if teacher == "bytes" else len(marked_tokenizer())
    settings: dict[str, Any] = {
        "teacher": asdict(
            Part(
                "compresskit.distill.teacher:Replica",
                {"directory": str(place / teacher), "vocabulary": ids},
            )
        ),
        "student_tokenizer": str(place / student),
        "teacher_tokenizer": str(place / teacher),
        "longest": 64,
        "alignment": method,
        "students": len(made),
    }
    provider = Aligned(**settings | changes)
    provider.load()
    return provider


def batch(tokenizer: Any, texts: list[str], length: int) -> dict[str, Tensor]:
    """One row of whole documents, filled up with a last one that is cut."""
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < length:
        for text in texts:
            one = tokenizer(text, verbose=False)["input_ids"]
            ids += one
            positions += range(len(one))
    return {
        "input_ids": torch.tensor([ids[:length]]),
        "position_ids": torch.tensor([positions[:length]]),
    }


def test_common_boundaries_by_hand() -> None:
    rendered = render([b"", b" an", b"d", b" ", b"a"], space_is_put=True)
    assert rendered.text == b" and a"
    assert rendered.ends == [0, 3, 4, 5, 6]
    theirs = walk([b"", b"and", b" a"], rendered.text, 1)
    assert theirs == [1, 4, 6]
    found = common(rendered.ends, theirs, rendered.text)
    assert found == [(0, 0, -1), (2, 1, 0), (3, 1, 1), (4, 2, 0)]
    mirrored = common(theirs, rendered.ends, rendered.text)
    assert mirrored == [(0, 0, 1), (1, 2, 0), (2, 4, 0)]
    found = common([1, 1, 2, 2], [1, 2, 2], b" ab")
    assert found == [(1, 0, 0), (2, 1, 0)], "the last opening, and the first of others"


def test_where_a_tokenizer_does_not_spell_the_text_nothing_is_known() -> None:
    text = b" one two three four"
    assert walk([b"one", None, b" three", b" four"], text, 1) == [4, NOWHERE, 14, 19]
    assert walk([b"one", b" TWO", b" three", b" four"], text, 1) == [4, NOWHERE, 14, 19]
    assert walk([b"one", b" TWO", b" t"], text, 1) == [4, NOWHERE, NOWHERE], "too little to go on with"
    # A special token, after which a tokenizer puts a space anew.
    assert walk([b" a", b"<eos>", b" b"], b" a<eos>b", 0) == [2, 7, 8]


def test_spelling_is_exact_in_bytes() -> None:
    for tokenizer in (byte_tokenizer(), marked_tokenizer()):
        spelling = spelling_of(tokenizer)
        assert spelling is not None
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            spelt = b"".join(piece or b"?" for piece in spelling.of(ids))
            before = b" " if spelling.begins_with_space and text else b""
            assert spelt == before + text.encode()
    marked = spelling_of(marked_tokenizer())
    assert marked is not None
    assert marked.pieces[0] is None
    assert marked.begins_with_space


def test_twins_spell_the_same_and_a_tokenizer_is_its_own_twin() -> None:
    ours, theirs = (spelling_of(t) for t in (byte_tokenizer(), marked_tokenizer()))
    assert ours is not None
    assert theirs is not None
    for one in (ours, theirs):
        known = [i for i, piece in enumerate(one.pieces) if piece is not None]
        assert twins(one, one) == [(i, i) for i in known]
    assert twins(theirs, theirs)[0] == (1, 1), "nobody knows what <unk> spells"
    found = dict(twins(ours, theirs))
    letter = byte_tokenizer().get_vocab()["a"]
    assert found[letter] == marked_tokenizer().get_vocab()["a"], "the letter, not the byte that is never used"
    roles = spelling_of(byte_tokenizer(), roles_of=marked_tokenizer())
    assert roles is not None
    assert dict(twins(roles, theirs))[257] == 2, "one EOS for both"


def test_tokens_that_begin_others_by_hand() -> None:
    """A teacher of bytes says a space before " and", " ca" and " an"; of them " and" goes on from " an"."""
    marked, plain = marked_tokenizer(), byte_tokenizer()
    found = beginnings(marked, plain)
    begin = {"\u0120", "a", "b", "c", "n"}
    assert {one for one in plain.get_vocab() if found.teachers[plain.get_vocab()[one]]} == begin
    ids = marked.get_vocab()
    goes_on = {one for one, index in ids.items() if found.students[index]}
    assert goes_on == {"\u2581", "\u2581a", "\u2581an", "a", "b", "c", "n"}
    for same in (marked, plain):
        itself = beginnings(same, same)
        assert not any(itself.teachers)
        assert not any(itself.students)


@pytest.mark.parametrize("name", ["bytes", "marked"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_same_tokenizer_it_is_the_teacher_itself(name: str, temperature: float, place: Path) -> None:
    tokenizer: Any = byte_tokenizer() if name == "bytes" else marked_tokenizer()
    inputs = batch(tokenizer, TEXTS[:3], 60)
    provider = aligned(place, name, name, options={"top": len(tokenizer)}, temperature=temperature)
    plain = Replica(directory=str(place / name), vocabulary=len(tokenizer))
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 60, 6, generator=gen, dtype=torch.float64)
    head = Head(torch.randn(len(tokenizer), 6, generator=gen, dtype=torch.float64))
    labels = inputs["input_ids"].masked_fill(inputs["position_ids"] == 0, -100)
    told = provider.signal(inputs)
    assert told.told_BT is not None
    first = 2 if name == "bytes" else 1  # without BOS nothing stands before the first token
    known = told.told_BT[0]
    assert known[inputs["position_ids"][0] >= first].all()
    labels = labels.masked_fill(~told.told_BT, -100)
    loss = Divergences(temperature=temperature)
    got, true = loss(hidden, head, labels, told), loss(hidden, head, labels, plain.signal(inputs))
    torch.testing.assert_close(got["forward_kl"], true["forward_kl"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["agreement"], true["agreement"])


class Telling:
    """A provider that is not quite its teacher, and keeps what it is shown."""

    hidden = None

    def load(self) -> None:
        pass

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        raise AssertionError

    def told(self, rows: Any, device: torch.device) -> tuple[str, ...]:
        self.rows, self.device = [rows[i] for i in range(len(rows))], device
        return ("It is far.",)


def test_what_the_teacher_inside_tells_is_told_of_rows_in_its_own_tokens(place: Path) -> None:
    tokenizer: Any = byte_tokenizer()
    rows = [{k: t[0] for k, t in batch(tokenizer, [text], 24).items()} for text in TEXTS[:3]]
    device = torch.device("cpu")
    assert aligned(place, "bytes", "marked").told(rows, device) == (), "the teacher itself is heard"
    provider = aligned(place, "bytes", "marked")
    provider.__dict__["_provider"] = inside = Telling()
    assert provider.told(rows, device) == ("It is far.",)
    assert inside.device == device
    assert len(inside.rows) == len(rows)
    assert len({len(row["labels"]) for row in inside.rows}) == 1, "they make a batch"
    for row, shown in zip(rows, inside.rows, strict=True):
        ends = [*(row["position_ids"] == 0).nonzero()[1:, 0].tolist(), 24]
        ids: list[int] = []
        positions: list[int] = []
        for start, end in itertools.pairwise([0, *ends]):
            text = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True).rstrip("\ufffd")
            ids += marked_tokenizer()(text)["input_ids"]
            positions += range(len(ids) - len(positions))
        assert shown["input_ids"][: len(ids)].tolist() == ids
        assert shown["position_ids"][: len(ids)].tolist() == positions
        assert shown["labels"].tolist() == ids + [-100] * (len(shown["labels"]) - len(ids))


def _last_ids(tokenizer: Any, roles_of: Any) -> dict[bytes, int]:
    """What is spelt -> the last id that spells it; the marked tokenizer has a byte before each letter."""
    made = spelling_of(tokenizer, roles_of=roles_of)
    assert made is not None
    return {piece: i for i, piece in enumerate(made.pieces) if piece}


def merged(tokenizer: Any, piece: bytes, *, marks: bool) -> list[str]:
    """The tokens of a piece of text: the first merge of the list wherever it fits, then the next."""
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    symbols = [chr(byte) for byte in piece]
    for a, b in merges:
        a, b = ((one.replace("\u2581" if marks else "\u0120", " ")) for one in (a, b))
        made: list[str] = []
        for symbol in symbols:
            if made and (made[-1], symbol) == (a, b):
                made[-1] += symbol
            else:
                made.append(symbol)
        symbols = made
    return symbols


def begun(student: Any, teacher: Any, names: tuple[str, str], lead: str) -> tuple[set[str], set[str]]:
    """What the teacher's first tokens of the student's longer ones spell, and which of those begin others."""
    ours, theirs = (student, names[0] == "marked"), (teacher, names[1] == "marked")
    said = {}
    for piece in _last_ids(student, teacher):
        spelt, special = piece.decode("latin-1"), piece in (b"<bos>", b"<eos>", b"<s>", b"</s>")
        if not special and merged(ours[0], piece, marks=ours[1]) == [spelt]:
            said[spelt] = merged(theirs[0], lead.encode() + piece, marks=theirs[1])
    firsts = {tokens[0] for tokens in said.values() if len(tokens) > 1}
    return firsts, {
        u for u, mine in said.items() for other in said.values() if other[: len(mine)] == mine != other
    }


def slow(
    place: Path, student: Any, teacher: Any, name: str, ids: list[int]
) -> dict[int, tuple[int, float | None, dict[int, float], bool]]:
    """Of one document: the token that is told -> its id, probability (of a beginning none), and all known."""

    def spelt(tokenizer: Any, tokens: list[int]) -> list[bytes]:
        made = spelling_of(tokenizer)
        assert made is not None
        return [b"" if t == tokenizer.bos_token_id else made.pieces[t] or b"" for t in tokens]

    text = b"".join(spelt(student, ids))
    lead = b" " if not text.startswith(b" ") else b""
    theirs = teacher((lead + text)[1:].decode(errors="ignore"))["input_ids"]
    model = load_model(place / name)
    p = model(torch.tensor([theirs])).logits[0, :, : len(teacher)].softmax(-1).detach()
    ours_spelt, theirs_spelt = spelt(student, ids), spelt(teacher, theirs)
    before = b"" if theirs_spelt and b"".join(theirs_spelt).startswith(b" ") else b" "
    vocabulary = _last_ids(student, teacher)
    opens = [t for t, piece in enumerate(spelling_of(teacher).pieces) if piece and piece.startswith(b" ")]  # type: ignore[union-attr]

    def reached(text: bytes) -> list[tuple[int, bool]]:
        """The teacher's token that ends there, or but for a space."""
        ends = [before + b"".join(theirs_spelt[: k + 1]) for k in range(len(theirs))]
        exact = [(k, False) for k, end in enumerate(ends) if end == text]
        return exact or [(k, True) for k, end in enumerate(ends) if end + b" " == text]

    names = ("marked" if student.vocab_size > 270 else "other", name)
    beginning = {lead: begun(student, teacher, names, lead) for lead in ("", " ")}
    found = {}
    for j in range(len(ids) - 1):
        here, there = lead + b"".join(ours_spelt[: j + 1]), lead + b"".join(ours_spelt[: j + 2])
        at, to = reached(here)[-1:], reached(there)[:1]
        if not at or not to or at[0][0] >= to[0][0]:
            continue
        (k, space), (end, space_after) = at[0], to[0]
        span = range(k + 1, end + 1)
        firsts, longer = beginning[" " if space else ""]
        is_open = ours_spelt[j + 1].decode("latin-1") in longer
        given = float(p[k, opens].sum()) if space else 1.0
        product = math.prod(float(p[i - 1, theirs[i]]) for i in span) / given
        product *= float(p[end, opens].sum()) if space_after else 1.0
        known = {}
        for piece, t in _last_ids(teacher, teacher).items():
            if space and not piece.startswith(b" "):
                continue
            spelt_there = piece[1:] if space else piece
            if spelt_there in vocabulary and piece.decode("latin-1") not in firsts:
                known[vocabulary[spelt_there]] = float(p[k, t]) / given
        first = vocabulary.get(theirs_spelt[k + 1][1:] if space else theirs_spelt[k + 1])
        if is_open:
            known.pop(ids[j + 1], None)
        elif first != ids[j + 1] or len(span) > 1 or space_after:
            if first in known:
                known[first] -= product
            known[ids[j + 1]] = known.get(ids[j + 1], 0.0) + product
        found[j + 1] = (ids[j + 1], known.get(ids[j + 1]), known, space)
    return found


@pytest.mark.parametrize(
    ("student", "teacher"), [("bytes", "marked"), ("marked", "bytes"), ("trailing", "marked")]
)
@pytest.mark.parametrize("top", [1, 4, 400])
def test_spans_are_products_of_probabilities(student: str, teacher: str, top: int, place: Path) -> None:
    tokenizers: dict[str, Any] = {name: make() for name, make in TOKENIZERS.items()}
    provider = aligned(place, student, teacher, options={"top": top})
    ours = tokenizers[student]
    for text in TEXTS[:3]:
        ids = ours(text)["input_ids"]
        row = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
        signal = provider.signal(row)
        expected = slow(place, ours, tokenizers[teacher], teacher, ids)
        if top > 4:  # fewer ids spell the same but for a space
            expected = {at: one for at, one in expected.items() if not one[3]}
        assert expected
        says, told = signal.says, signal.told_BT
        assert isinstance(says, Listing)
        assert told is not None
        assert told[0].nonzero()[:, 0].tolist() == sorted(expected)
        for place_of, (token, probability, known, _) in expected.items():
            listed, p = says.ids_BTK[0, place_of - 1].tolist(), says.log_p_BTO[0, place_of - 1].exp()
            assert len(set(listed)) == len(listed)
            if probability is None:
                assert token not in listed
            else:
                assert float(p[listed.index(token)]) == pytest.approx(probability, rel=1e-9)
            assert float(p.sum()) == pytest.approx(1.0, rel=1e-9)
            for one, chance in zip(listed, p.tolist(), strict=False):
                assert chance == pytest.approx(known[one], rel=1e-9, abs=1e-30)


def test_a_row_may_begin_and_end_inside_a_character(place: Path) -> None:
    ids = byte_tokenizer()("\u4e2d and a cab \u4e2d", add_special_tokens=False)["input_ids"]
    row = torch.tensor([ids[1:-1]])
    signal = aligned(place, "bytes", "marked", "uld").signal(
        {"input_ids": row, "position_ids": torch.arange(row.shape[1])[None]}
    )
    assert signal.told_BT is not None
    # Two bytes of a character, " and a cab ", two of another: both end after "and", "a", "ca", "b", " ", and
    # the student alone after the spaces before "a" and "cab".
    assert signal.told_BT[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9, 11, 12, 13]


def test_documents_do_not_see_each_other_and_long_ones_end(place: Path) -> None:
    provider = aligned(place, "bytes", "marked")
    whole = batch(byte_tokenizer(), TEXTS[:2], 50)
    both = provider.signal(whole)
    alone = provider.signal({k: v[:, :9] for k, v in whole.items()})
    assert isinstance(both.says, Listing)
    assert isinstance(alone.says, Listing)
    torch.testing.assert_close(both.says.log_p_BTO[:, :8], alone.says.log_p_BTO[:, :8])
    short = aligned(place, "bytes", "marked", longest=4).signal(whole)
    assert short.told_BT is not None
    assert both.told_BT is not None
    assert 0 < short.told_BT.sum() < both.told_BT.sum()
    assert not (short.told_BT & ~both.told_BT).any()


@pytest.mark.parametrize(("student", "teacher"), [("bytes", "marked"), ("marked", "bytes")])
def test_uld_is_the_distance_of_sorted_probabilities(student: str, teacher: str, place: Path) -> None:
    ours: Any = byte_tokenizer() if student == "bytes" else marked_tokenizer()
    inputs = batch(ours, TEXTS[:2], 40)
    signal = aligned(place, student, teacher, "uld").signal(inputs)
    assert isinstance(signal.says, Hidden)
    assert signal.told_BT is not None
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 40, 6, generator=gen, dtype=torch.float64).requires_grad_()
    head = Head(torch.randn(len(ours), 6, generator=gen, dtype=torch.float64).requires_grad_())
    labels = inputs["input_ids"]
    total = torch.zeros((), dtype=torch.float64)
    for t in range(39):
        if signal.told_BT[0, t + 1]:
            q = (hidden[0, t] @ head.weight_VD.T / 1.5).softmax(-1).sort(descending=True).values
            p = (signal.says.states_BTE[0, t] @ signal.says.head.weight_VD.T / 1.5).softmax(-1)
            p = p.sort(descending=True).values
            size = max(len(q), len(p))
            full = [torch.cat([v, v.new_zeros(size - len(v))]) for v in (q, p)]
            total = total + 1.5**2 * (full[0] - full[1]).abs().sum()
    got = Divergences(losses=(("uld", {}),), temperature=1.5)(hidden, head, labels, signal)
    torch.testing.assert_close(got["loss"], total, rtol=1e-10, atol=1e-12)
    assert set(got) == {"loss", "uld", "aligned"}
    assert got["aligned"] == signal.told_BT[:, 1:].sum() > 5
    leaves = [hidden, head.weight_VD]
    for mine, true in zip(
        torch.autograd.grad(got["loss"], leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-11)


def test_uld_reads_the_teacher_where_both_end(place: Path) -> None:
    text = "and a cab"
    ids = byte_tokenizer()(text)["input_ids"]
    row = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None]}
    signal = aligned(place, "bytes", "marked", "uld").signal(row)
    theirs = marked_tokenizer()(text)["input_ids"]
    states = load_model(place / "marked").base_model(torch.tensor([theirs]))[0][0]
    assert isinstance(signal.says, Hidden)
    torch.testing.assert_close(signal.says.states_BTE[0, 2], states[1])  # after "and" of both
    torch.testing.assert_close(signal.says.states_BTE[0, 4], states[2])  # after " a"
    torch.testing.assert_close(signal.says.states_BTE[0, 3], states[1])  # the student has read a space more
    assert signal.told_BT is not None
    assert signal.told_BT[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 8]


def test_chunks_do_not_matter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(byte_tokenizer(), TEXTS[:2], 60)
    provider = aligned(place, "bytes", "marked")
    whole = provider.signal(inputs).says
    monkeypatch.setattr("compresskit.distill.align.spans.chunk_tokens", lambda *_: 2)
    parts = provider.signal(inputs).says
    assert isinstance(whole, Listing)
    assert isinstance(parts, Listing)
    assert torch.equal(whole.ids_BTK, parts.ids_BTK)
    torch.testing.assert_close(whole.log_p_BTO, parts.log_p_BTO, rtol=1e-12, atol=1e-12)


def test_a_signal_without_distributions_is_no_teacher(place: Path) -> None:
    provider = aligned(place, "bytes", "marked")
    listing = Signal(Listing(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1), 1))

    class Listed:
        def signal(self, inputs: Any) -> Signal:
            return listing

    provider.__dict__["_provider"] = Listed()
    with pytest.raises(ValueError, match="whole distributions"):
        provider.signal(batch(byte_tokenizer(), TEXTS[:2], 20))
