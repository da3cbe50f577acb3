"""Fill-in-the-middle: rows rewritten on reading, so that the model learns to write between a prefix and a suffix.

Between `rows`, which reads, and `batches` in the flow of a token. Nothing is drawn from a state: what becomes of a
segment is a function of (run seed, source, epoch, row, segment number), so it is the same on any rank, in any batch,
after any resume, and in any program that reads the row again.

As Crystal did (arXiv 2207.14255 is where the method is from), a row of L+1 tokens is cut at its EOS tokens, which stay
where they are. Each segment is rewritten with probability `rate`: cut at two places into prefix P, middle M and suffix
S, each of which may be empty, and written as

    PSM              <pre> P <suf> S <mid> M
    SPM, variant 2   <pre> <suf> S <mid> P M          with probability `spm_rate`; Crystal's variant
    SPM, variant 1   <suf> S <pre> P <mid> M

A BOS that leads a segment stays in front of all this. The row is then cut to L+1 tokens again; where it came out
shorter it is filled with <pad>, and a label that is <pad> does not count.

At character level the segment's text is cut between any two characters, and each part is encoded as a text of its own,
as a prompt will be. The parts spell the segment's bytes exactly: only the part that begins a document gets the blank
that some tokenizers put there. What is defined for odd segments:

- empty (EOS after EOS, or nothing but BOS): left alone; one that holds a sentinel or <pad> already: left alone;
- one token: cut like any other, inside its text or at its ends;
- a character cut by the edge of the row: its bytes keep their tokens, at the front of P or the end of S;
- cut between tokens instead of characters: one with special tokens inside, one whose text is not UTF-8 even so, and
  one of which a part, encoded, does not spell its bytes again (a tokenizer that normalizes).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from crystal_hpc.config.schema import Fim, Run
from crystal_hpc.data.sentinels import find_sentinels
from crystal_hpc.data.spelling import Spelling

if TYPE_CHECKING:  # `tokenizers` takes a while to import, and only runs with FIM need it
    from crystal_hpc.data.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Parts = tuple[Tokens, Tokens, Tokens]

WORD = 32  # bits of one draw; a segment's hash holds four


class Place(NamedTuple):
    """Which row it is, wherever it is read."""

    source: str
    epoch: int
    row: int


class Draws(NamedTuple):
    """Four uniform draws from [0, 2**32) that decide all about one segment."""

    rewrite: int
    order: int
    one_cut: int
    other_cut: int

    def cuts(self, size: int) -> tuple[int, int]:
        """Two places in 0..size, in order."""
        one, other = (draw * (size + 1) >> WORD for draw in (self.one_cut, self.other_cut))
        return min(one, other), max(one, other)


def draws(seed: int, place: Place, segment: int) -> Draws:
    """The four 32-bit words, lowest first, of xxh3-128 over uint64 (seed, epoch, row, segment) and the source."""
    key = struct.pack("<4Q", seed, place.epoch, place.row, segment) + place.source.encode()
    bits = xxhash.xxh3_128_intdigest(key)
    return Draws(*((bits >> WORD * number) % (1 << WORD) for number in range(4)))


def happens(draw: int, probability: float) -> bool:
    """Whether a draw decides for what has this probability."""
    return draw < round(probability * (1 << WORD))


@dataclass
class _Segment:
    """A segment that is rewritten: tokens start..stop-1 of row `row` of the call, BOS and EOS left out."""

    row: int
    start: int
    stop: int
    bos: int
    """1 where a BOS stands before it, else 0."""
    fim: Fim
    draws: Draws
    parts: Parts | None = None
    """Prefix, middle and suffix, once they are found."""


@dataclass
class _Text:
    """The text of a segment, in three parts; `head` and `tail` tokens of it are bytes of characters cut in two."""

    segment: _Segment
    head: int
    tail: int
    parts: list[str]
    first: int
    """The part that begins a document, and gets what the tokenizer puts there; -1 if none does."""


class Rewriter:
    """Rewrites rows with one tokenizer and one seed."""

    def __init__(self, tokenizer: "Tokenizer", seed: int, where: str = "tokenizer") -> None:
        """Raises StoreError if the tokenizer lacks sentinels; `where` names it in the message."""
        self._tokenizer, self._seed = tokenizer, seed
        self.sentinels = find_sentinels(tokenizer.id_of, where)
        self._marks = [np.array([token], np.int32) for token in self.sentinels[:3]]
        self._spelling = Spelling(tokenizer.token_bytes)
        self._is_sentinel = np.isin(np.arange(tokenizer.vocab_size), self.sentinels)
        begun = self._spelling.spell(tokenizer.encode_flat(["a"])[0])[0]
        self._blank = begun.partition(b"a")[0]  # what is put in front of a document

    def rewrite(self, rows: Tokens, places: Sequence[Place], fims: Sequence[Fim]) -> tuple[Tokens, Flags]:
        """Rows (n, L+1) as they stand in the store -> rewritten (n, L+1), and (n, L) which of its labels count."""
        chosen = [
            list(self._choose(number, row, place, fim))
            for number, (row, place, fim) in enumerate(zip(rows, places, fims, strict=True))
        ]
        every = [segment for several in chosen for segment in several]
        self._cut_texts(rows, [segment for segment in every if segment.fim.level == "character"])
        done, counts = np.empty_like(rows), np.empty(rows.shape, bool)
        for number, segments in enumerate(chosen):
            self._write(rows[number], segments, done[number], counts[number])
        return done, counts[:, 1:] & (done[:, 1:] != self.sentinels.pad)

    def _choose(self, number: int, row: Tokens, place: Place, fim: Fim) -> Iterator[_Segment]:
        """The segments of a row that are rewritten."""
        holds_sentinel = bool(self._is_sentinel[row].any())
        start = 0
        for segment, stop in enumerate([*np.flatnonzero(row == self._tokenizer.eos).tolist(), len(row)]):
            drawn = draws(self._seed, place, segment)
            bos = int(stop > start and row[start] == self._tokenizer.bos)
            begin = start + bos
            done_before = holds_sentinel and self._is_sentinel[row[begin:stop]].any()
            if begin < stop and happens(drawn.rewrite, fim.rate) and not done_before:
                yield _Segment(number, begin, stop, bos, fim, drawn)
            start = stop + 1

    def _cut_texts(self, rows: Tokens, segments: list[_Segment]) -> None:
        """Cuts segments between characters where that can be done, and encodes the parts, all in two calls."""
        if not segments:
            return
        spelled, offsets = self._spelling.spell(rows.reshape(-1))
        specials = np.concatenate([[0], np.cumsum(~self._spelling.known[rows.reshape(-1)])])
        texts = []
        for segment in segments:
            start, stop = (segment.row * rows.shape[1] + place for place in (segment.start, segment.stop))
            if specials[start] == specials[stop] and (text := self._read(segment, spelled, offsets[start : stop + 1])):
                texts.append(text)
        begins = [text.parts[text.first] for text in texts if text.first >= 0]
        others = [part for text in texts for number, part in enumerate(text.parts) if number != text.first]
        begun, inside = self._encode(begins, self._blank, False), self._encode(others, b"", True)
        for text in texts:
            parts = [next(begun if number == text.first else inside) for number in range(3)]
            self._fit(text, parts, rows[text.segment.row])

    def _read(self, segment: _Segment, spelled: bytes, offsets: npt.NDArray[np.int64]) -> _Text | None:
        """Cuts the text of a segment, whose tokens have these offsets in `spelled`; None if that cannot be done."""
        data = spelled[offsets[0] : offsets[-1]]
        head = tail = 0
        try:
            text = data.decode()
        except UnicodeDecodeError:
            before, after = cut_characters(data)
            stop = len(data) - after
            head, end = np.searchsorted(offsets - offsets[0], [before, stop]).tolist()
            tail = len(offsets) - 1 - end
            if offsets[head] - offsets[0] != before or offsets[end] - offsets[0] != stop:
                return None
            try:
                text = data[before:stop].decode()
            except UnicodeDecodeError:
                return None
        blank = self._blank.decode()
        # Behind BOS or EOS stands the beginning of a document; at the front of a row, what a document goes on with.
        begins = segment.start > 0 and not head and blank != text and text.startswith(blank)
        text = text[len(blank) :] if begins else text
        one, other = segment.draws.cuts(len(text))
        parts = [text[:one], text[one:other], text[other:]]
        first = next((number for number, part in enumerate(parts) if part), -1) if begins else -1
        return _Text(segment, head, tail, [parts[0], parts[1], parts[2]], first)

    def _encode(self, texts: list[str], blank: bytes, inside: bool) -> Iterator[Tokens | None]:
        """The ids of each text; None for one whose ids do not spell it, with `blank` in front."""
        if not texts:
            return
        ids, offsets = self._tokenizer.encode_flat(texts, inside)
        spelled, places = self._spelling.spell(ids)
        expected = [blank + text.encode() for text in texts]
        ends = places[offsets].tolist()
        tokens, at = ids.astype(np.int32), offsets.tolist()
        for number, part in enumerate(expected):
            same = spelled[ends[number] : ends[number + 1]] == part
            yield tokens[at[number] : at[number + 1]] if same else None

    def _fit(self, text: _Text, parts: list[Tokens | None], row: Tokens) -> None:
        """Gives a segment its encoded parts, if all of them are good, and puts cut characters back to its ends."""
        prefix, middle, suffix = parts
        segment = text.segment
        if prefix is None or middle is None or suffix is None:
            return
        if text.head:
            prefix = np.concatenate([row[segment.start : segment.start + text.head], prefix])
        if text.tail:
            suffix = np.concatenate([suffix, row[segment.stop - text.tail : segment.stop]])
        segment.parts = prefix, middle, suffix

    def _write(self, row: Tokens, segments: list[_Segment], done: Tokens, counts: Flags) -> None:
        """Puts a rewritten row into `done`, and into `counts` which of its tokens count as labels; both (L+1,)."""
        pieces: list[tuple[Tokens, bool]] = []
        at = 0
        for segment in segments:
            begin = segment.start - segment.bos
            pieces += [(row[at:begin], True), (row[begin : segment.start], segment.fim.loss == "all")]
            pieces += self._arrange(segment, row)
            at = segment.stop
        pieces += [(row[at:], True)]
        tokens = np.concatenate([piece for piece, _ in pieces])[: len(row)]
        done[: len(tokens)], done[len(tokens) :] = tokens, self.sentinels.pad
        counted = np.repeat([count for _, count in pieces], [len(piece) for piece, _ in pieces])[: len(row)]
        counts[: len(counted)], counts[len(counted) :] = counted, False

    def _arrange(self, segment: _Segment, row: Tokens) -> list[tuple[Tokens, bool]]:
        """Sentinels and parts in their order, and whether each counts as labels."""
        fim = segment.fim
        prefix, middle, suffix = segment.parts or _cut_tokens(row[segment.start : segment.stop], segment.draws)
        pre, mid, suf = self._marks
        if not happens(segment.draws.order, fim.spm_rate):
            order = [pre, prefix, suf, suffix, mid]
        elif fim.spm_variant == 2:
            order = [pre, suf, suffix, mid, prefix]
        else:
            order = [suf, suffix, pre, prefix, mid]
        return [*((piece, fim.loss == "all") for piece in order), (middle, True)]


def _cut_tokens(tokens: Tokens, drawn: Draws) -> Parts:
    one, other = drawn.cuts(len(tokens))
    return tokens[:one], tokens[one:other], tokens[other:]


def cut_characters(data: bytes) -> tuple[int, int]:
    """How many bytes at the front, and at the end, belong to a character that is not whole in `data` (UTF-8)."""
    before = 0
    while before < min(3, len(data)) and data[before] & 0xC0 == 0x80:
        before += 1
    for after in range(1, min(3, len(data) - before) + 1):
        lead = data[-after]
        if lead & 0xC0 != 0x80:
            length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return before, after if length > after else 0
    return before, 0


@dataclass(frozen=True)
class PhaseFim:
    """FIM of one phase: how, by source."""

    by_source: Mapping[str, Fim]
    rewriter: Rewriter

    def rewrite(self, rows: Tokens, places: Sequence[Place]) -> tuple[Tokens, Flags]:
        """Rows (n, L+1) of sources that are in `by_source` -> the same rewritten, and (n, L) which labels count."""
        return self.rewriter.rewrite(rows, places, [self.by_source[place.source] for place in places])


def load_fims(run: Run) -> list[PhaseFim | None]:
    """What each phase needs to read its rows; the tokenizer is loaded only if one of them does. Raises StoreError."""
    wanted = [{name: fim for name, fim in phase.fim.items() if fim.rate > 0} for phase in run.phases]
    if not any(wanted):
        return [None] * len(wanted)
    from crystal_hpc.data.tokenizer import Tokenizer

    path = Path(run.data.tokenizer)
    rewriter = Rewriter(Tokenizer.load(path), run.seed, str(path))
    return [PhaseFim(by_source, rewriter) if by_source else None for by_source in wanted]
