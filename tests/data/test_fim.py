"""Fill-in-the-middle: the text survives, the row keeps its length, and comes out the same wherever it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from crystal_hpc.config.schema import Fim
from crystal_hpc.data.fim import Draws, Place, Rewriter, cut_characters, draws
from crystal_hpc.data.sentinels import find_sentinels, read_sentinels
from crystal_hpc.data.spelling import Spelling
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import StoreError

CRYSTAL = Path(__file__).parents[2].parent / "shared/data/crystal_tokenizer.json"
QUICK = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
# Every plane; what tokenizers trip over; what looks like a special token but is text.
ANY = st.characters(exclude_categories=["Cs"])
ASTRAL = st.characters(min_codepoint=0x10000)
ODD = st.sampled_from(
    ["▁", " ", "  ", "\n", "\r\n", "\0", "\ufeff", "<s>", "</s>", "<|fim_prefix|>", "<0x0A>", "e\u0301"]
)
TEXTS = st.lists(st.one_of(st.text(ANY), st.text(ASTRAL), ODD, st.text(" \nthe{}()")), max_size=6).map("".join)
FIMS = st.builds(
    Fim,
    rate=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    spm_variant=st.sampled_from([1, 2]),
    level=st.sampled_from(["character", "token"]),
    loss=st.sampled_from(["all", "middle"]),
)

Tokens = npt.NDArray[np.int32]


def with_sentinels() -> dict[str, Any]:
    """Crystal's tokenizer.json with the four tokens of its release."""
    value: dict[str, Any] = json.loads(CRYSTAL.read_text(encoding="utf-8"))
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, name in enumerate(("prefix", "middle", "suffix", "pad")):
        value["added_tokens"].append({"id": 32000 + number, "content": f"<fim_{name}>", "special": True, **options})
    return value


@pytest.fixture(scope="module", params=["trained here", "Crystal's"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Tokenizer:
    if request.param == "trained here":
        return Tokenizer.load(tokenizer_folder)
    if not CRYSTAL.exists():
        pytest.skip("Crystal's tokenizer.json is not here")
    return Tokenizer(with_sentinels(), "Crystal's")


@pytest.fixture(scope="module")
def rewriter(tokenizer: Tokenizer) -> Rewriter:
    return Rewriter(tokenizer, 7)


def row_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """Documents one after another, each between BOS and EOS."""
    return [token for text in texts for token in (tokenizer.bos, *tokenizer.encode(text), tokenizer.eos)]


def rewrite(rewriter: Rewriter, row: list[int], fim: Fim, number: int = 0, room: int = 0) -> tuple[Tokens, list[bool]]:
    """One row rewritten; with `room`, so many more tokens fit than it has. Padding at the end is taken off again."""
    pad = rewriter.sentinels.pad
    # A last segment that holds <pad> is left alone, and so keeps the room at the end of the row.
    rows = np.array([[*row, rewriter_eos(rewriter), *[pad] * room] if room else row], np.int32)
    done, mask = rewriter.rewrite(rows, [Place("code", 2, number)], [fim])
    assert done.shape == rows.shape and mask.shape == (1, rows.shape[1] - 1)
    assert done.dtype == np.int32 and mask.dtype == bool
    return done[0], mask[0].tolist()


def rewriter_eos(rewriter: Rewriter) -> int:
    return rewriter._tokenizer.eos


def read_back(tokenizer: Tokenizer, done: list[int], sentinels: Any) -> bytes:
    """The bytes of one rewritten segment, in their original order."""
    pieces: dict[int, list[int]] = {0: []}
    where = 0
    for token in done:
        if token in sentinels[:3]:
            where = token
            pieces[where] = []
        else:
            pieces[where].append(token)
    order = (0, sentinels.prefix, sentinels.middle, sentinels.suffix)  # SPM 2 has its prefix behind the middle mark
    spell = Spelling(tokenizer.token_bytes).spell
    return b"".join(spell(np.array(pieces.get(mark, []), np.int64))[0] for mark in order)


@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), fim=FIMS, number=st.integers(0, 2**40))
def test_the_text_of_every_document_survives(
    tokenizer: Tokenizer, rewriter: Rewriter, texts: list[str], fim: Fim, number: int
) -> None:
    row = row_of(tokenizer, *texts)
    done, _ = rewrite(rewriter, row, fim, number, room=len(row) + 200)
    spell = Spelling(tokenizer.token_bytes).spell
    for place, text in enumerate(texts):
        stop = done.tolist().index(tokenizer.eos)
        segment, done = done[:stop].tolist(), done[stop + 1 :]
        assert segment.pop(0) == tokenizer.bos
        assert read_back(tokenizer, segment, rewriter.sentinels) == spell(np.array(tokenizer.encode(text), np.int64))[0]
        marks = [token for token in segment if token in rewriter.sentinels]
        drawn = draws(7, Place("code", 2, number), place)
        if not tokenizer.encode(text) or drawn.rewrite >= fim.rate * 2**32:
            assert marks == []
        else:
            pre, mid, suf, _ = rewriter.sentinels
            spm = [pre, suf, mid] if fim.spm_variant == 2 else [suf, pre, mid]
            assert marks == (spm if drawn.order < fim.spm_rate * 2**32 else [pre, suf, mid])


@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), fim=FIMS, data=st.data())
def test_any_window_of_a_stream_keeps_its_length_its_text_and_its_ends(
    tokenizer: Tokenizer, rewriter: Rewriter, texts: list[str], fim: Fim, data: st.DataObject
) -> None:
    stream = row_of(tokenizer, *texts)
    start = data.draw(st.integers(0, len(stream) - 1))
    window = stream[start : data.draw(st.integers(start + 1, len(stream)))]
    same, mask = rewrite(rewriter, window, fim, start)
    longer, _ = rewrite(rewriter, window, fim, start, room=len(window) + 200)
    kept = same[same != rewriter.sentinels.pad]
    assert kept.tolist() == longer[: len(kept)].tolist(), "a row is cut at its end, nothing else"
    assert [counts for counts, label in zip(mask, same[1:], strict=True) if label == rewriter.sentinels.pad] == [
        False
    ] * (len(same) - len(kept))
    spell = Spelling(tokenizer.token_bytes).spell
    begin = 0
    ends = [number for number, token in enumerate(window) if token == tokenizer.eos]
    for stop in [*ends, len(window)]:  # also where the window cuts a character in two
        segment, longer = longer[: (at := longer.tolist().index(tokenizer.eos))].tolist(), longer[at + 1 :]
        text = [token for token in window[begin:stop] if token != tokenizer.bos]
        assert (
            read_back(tokenizer, [t for t in segment if t != tokenizer.bos], rewriter.sentinels)
            == spell(np.array(text, np.int64))[0]
        )
        begin = stop + 1


def test_the_same_rows_come_out_of_any_batch_in_any_order(tokenizer: Tokenizer, rewriter: Rewriter) -> None:
    streams = [row_of(tokenizer, *(f"def f{n}(x):\n    return {k} * x  # 漢字" for k in range(9))) for n in range(12)]
    rows = np.array([stream[:97] for stream in streams], np.int32)
    places = [Place("code" if n % 2 else "web", n % 3, n) for n in range(12)]
    fims = [Fim(rate=0.7, level="token" if n % 4 == 0 else "character", loss="middle") for n in range(12)]
    together = rewriter.rewrite(rows, places, fims)
    assert not np.array_equal(together[0], rows)
    for split in (1, 5, 12):
        order = np.random.default_rng(split).permutation(12)
        for begin in range(0, 12, split):
            some = order[begin : begin + split]
            found = rewriter.rewrite(rows[some], [places[n] for n in some], [fims[n] for n in some])
            assert np.array_equal(found[0], together[0][some]) and np.array_equal(found[1], together[1][some])


def test_each_part_of_the_key_matters() -> None:
    place = Place("code", 1, 5)
    known = draws(1, place, 0)
    others = [draws(2, place, 0), draws(1, Place("web", 1, 5), 0), draws(1, Place("code", 2, 5), 0)]
    others += [draws(1, Place("code", 1, 6), 0), draws(1, place, 1)]
    assert len({known, *others}) == 6
    # Known answers: another hash or packing would change what every run in progress reads.
    assert known == Draws(*KNOWN)


KNOWN = (3462701269, 1788623191, 1669349941, 1829196221)


def test_rates_and_cuts_are_as_asked_for() -> None:
    drawn = [draws(3, Place("s", 0, row), 0) for row in range(20_000)]
    assert sum(draw.rewrite < 0.3 * 2**32 for draw in drawn) / len(drawn) == pytest.approx(0.3, abs=0.015)
    cuts = np.array([draw.cuts(9) for draw in drawn])
    assert (cuts[:, 0] <= cuts[:, 1]).all() and cuts.min() == 0 and cuts.max() == 9
    both = np.bincount(cuts.reshape(-1), minlength=10) / cuts.size
    assert both == pytest.approx(0.1, abs=0.01), "every place is equally likely, the ends included"


@pytest.fixture(scope="module")
def byte_level(texts: list[str]) -> Tokenizer:
    """A tokenizer as GPT-2's: tokens may end inside a character, and one token both begins and ends a document."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", *(f"<fim_{name}>" for name in ("prefix", "middle", "suffix", "pad"))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    engine.train_from_iterator([*texts[:20], "漢字かな交じり" * 9, " 漢 漣 漤 漥 漦 漧" * 9], trainer)
    return Tokenizer(json.loads(engine.to_str()), "byte level")


@QUICK
@given(texts=st.lists(st.one_of(TEXTS, st.text(" 漢漣漤漥漦漧é")), min_size=1, max_size=3), fim=FIMS, data=st.data())
def test_tokens_that_end_inside_a_character_lose_nothing_either(
    byte_level: Tokenizer, texts: list[str], fim: Fim, data: st.DataObject
) -> None:
    rewriter, eos = Rewriter(byte_level, 3), byte_level.eos
    stream = [token for text in texts for token in (*byte_level.encode(text), eos)]
    start = data.draw(st.integers(0, len(stream) - 1))
    window = stream[start : data.draw(st.integers(start + 1, len(stream)))]
    done, _ = rewrite(rewriter, window, fim, start, room=len(window) + 200)
    found, spell = done.tolist(), Spelling(byte_level.token_bytes).spell
    while window:
        stop = window.index(eos) if eos in window else len(window)
        at = found.index(eos)
        text = spell(np.array(window[:stop], np.int64))[0]
        assert read_back(byte_level, found[:at], rewriter.sentinels) == text
        window, found = window[stop + 1 :], found[at + 1 :]


ALWAYS = {"rate": 1.0, "spm_rate": 0.0}


@pytest.mark.parametrize("level", ["character", "token"])
def test_segments_without_text_or_with_sentinels_are_left_alone(
    tokenizer: Tokenizer, rewriter: Rewriter, level: Any
) -> None:
    bos, eos = tokenizer.bos, tokenizer.eos
    word = tokenizer.encode("the")
    fim = Fim(**ALWAYS, level=level)
    for row in (
        [eos, eos, eos],
        [bos, eos, bos, eos],
        [eos, bos],
        [bos],
        *([bos, *word, mark, *word, eos] for mark in rewriter.sentinels),
    ):
        done, mask = rewrite(rewriter, row, fim)
        assert done.tolist() == row
        assert mask == [label != rewriter.sentinels.pad for label in row[1:]]
    done, _ = rewrite(rewriter, [bos, rewriter.sentinels.middle, eos, bos, *word, eos], fim)
    assert done[:5].tolist() == [bos, rewriter.sentinels.middle, eos, bos, rewriter.sentinels.prefix]


@pytest.mark.parametrize("level", ["character", "token"])
def test_a_segment_of_one_token_is_cut_inside_it_or_at_its_ends(
    tokenizer: Tokenizer, rewriter: Rewriter, level: Any
) -> None:
    (token,) = tokenizer.encode_flat([" the"], inside=True)[0].tolist()
    seen = {tuple(rewrite(rewriter, [token], Fim(**ALWAYS, level=level), n, 20)[0].tolist()) for n in range(200)}
    texts = {read_back(tokenizer, list(row[: row.index(tokenizer.eos)]), rewriter.sentinels) for row in seen}
    assert texts == {b" the"}
    # Into three of four characters, in order: 5 + 10 ways; between tokens: all before, between, or behind both cuts.
    assert len(seen) == (15 if level == "character" else 3)


def test_a_segment_with_special_tokens_in_it_is_cut_between_tokens(tokenizer: Tokenizer, rewriter: Rewriter) -> None:
    unk = tokenizer.id_of("<unk>")
    assert unk is not None
    row = [*tokenizer.encode("a b c"), unk, *tokenizer.encode("d e f")]
    pre, mid, suf, _ = rewriter.sentinels
    for number in range(30):
        done, _ = rewrite(rewriter, row, Fim(**ALWAYS), number, room=20)
        found = done[: done.tolist().index(tokenizer.eos)].tolist()
        one, two = found.index(suf), found.index(mid)
        assert found[0] == pre and found[1:one] + found[two + 1 :] + found[one + 1 : two] == row


def test_a_tokenizer_that_normalizes_gets_cuts_between_tokens(tokenizer_folder: Path) -> None:
    value = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    plain = Tokenizer(value, "plain").encode("The Other Way is The Same")
    folding = Rewriter(Tokenizer(value | {"normalizer": {"type": "Lowercase"}}, "folding"), 1)
    pre, mid, suf, _ = folding.sentinels
    for number in range(20):
        done, _ = rewrite(folding, plain, Fim(**ALWAYS), number, room=20)
        found = done[: done.tolist().index(folding._tokenizer.eos)].tolist()
        one, two = found.index(suf), found.index(mid)
        assert found[1:one] + found[two + 1 :] + found[one + 1 : two] == plain and found[0] == pre


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
@pytest.mark.parametrize("variant", [1, 2])
def test_only_middles_and_ends_count_when_asked_for(
    tokenizer: Tokenizer, rewriter: Rewriter, spm_rate: float, variant: Any
) -> None:
    text = "return the other of these two"
    fim = Fim(rate=1.0, spm_rate=spm_rate, spm_variant=variant, loss="middle", level="token")
    for number in range(20):
        row = row_of(tokenizer, text, text)
        done, mask = rewrite(rewriter, row, fim, number, room=20)
        tokens, begin = tokenizer.encode(text), 0
        for segment in range(2):
            stop = begin + done[begin:].tolist().index(tokenizer.eos)
            one, other = draws(7, Place("code", 2, number), segment).cuts(len(tokens))
            counted = [begin + place for place, counts in enumerate([False, *mask][begin : stop + 1]) if counts]
            assert done[counted].tolist() == [*tokens[one:other], tokenizer.eos]
            begin = stop + 1


def test_every_label_but_padding_counts_unless_asked_otherwise(tokenizer: Tokenizer, rewriter: Rewriter) -> None:
    done, mask = rewrite(rewriter, row_of(tokenizer, "the other man", "all of it"), Fim(rate=1.0))
    assert all(mask) and rewriter.sentinels.prefix in done
    # Ids that spell a text in more tokens than the tokenizer would: the row comes out shorter, and is filled up.
    letters = [tokenizer.encode_flat([letter], inside=True)[0][0] for letter in " the other man about all of it" * 3]
    done, mask = rewrite(rewriter, [int(letter) for letter in letters], Fim(rate=1.0))
    padding = done == rewriter.sentinels.pad
    assert padding.any() and (~np.array(mask)).tolist() == padding[1:].tolist()


def test_a_document_keeps_the_blank_in_front_and_no_part_gains_one(tokenizer: Tokenizer, rewriter: Rewriter) -> None:
    text = "hello world, hello"
    for number in range(30):
        done, _ = rewrite(rewriter, row_of(tokenizer, text), Fim(**ALWAYS), number, room=40)
        one, other = draws(7, Place("code", 2, number), 0).cuts(len(text))
        found = done[1 : done.tolist().index(tokenizer.eos)].tolist()
        pre, mid, suf, _ = rewriter.sentinels
        at = [found.index(mark) for mark in (pre, suf, mid)]
        parts = [found[at[0] + 1 : at[1]], found[at[2] + 1 :], found[at[1] + 1 : at[2]]]
        expected, first = [], True
        for part in (text[:one], text[one:other], text[other:]):
            expected.append(tokenizer.encode_flat([part], inside=not first)[0].tolist() if part else [])
            first = first and not part
        assert parts == expected


@given(text=st.text(ANY, min_size=1), before=st.integers(0, 3), after=st.integers(0, 3))
def test_what_is_left_of_a_cut_text_is_whole_characters(text: str, before: int, after: int) -> None:
    data = text.encode()
    data = data[before : max(before, len(data) - after)]
    front, back = cut_characters(data)
    assert front <= 3 and back <= 3
    assert data[front : len(data) - back].decode() in text


def test_missing_sentinels_are_named(tokenizer_folder: Path, tmp_path: Path, edit: Callable[..., Path]) -> None:
    assert read_sentinels(tokenizer_folder) == (512, 513, 514, 515)
    bare = edit(lambda name: name.replace("<|fim_", "<fim_").replace("|>", ">"))
    assert read_sentinels(bare) == (512, 513, 514, 515)
    without = edit(lambda name: name.replace("fim_middle", "x").replace("fim_pad", "y"))
    with pytest.raises(StoreError, match=r"has no <\|fim_middle\|>, <\|fim_pad\|> \(nor the same without bars\)"):
        read_sentinels(without)
    with pytest.raises(StoreError, match="has no"):
        find_sentinels(Tokenizer.load(without).id_of, "here")


@pytest.fixture
def edit(tokenizer_folder: Path, tmp_path: Path) -> Callable[[Callable[[str], str]], Path]:
    """Writes the test tokenizer with its added tokens renamed."""

    def write(rename: Callable[[str], str]) -> Path:
        value = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
        for token in value["added_tokens"]:
            token["content"] = rename(token["content"])
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(value))
        return path

    return write
