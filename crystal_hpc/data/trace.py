"""From a step of a run to the documents in it, and from a document to the steps that saw it.

Both are arithmetic on the plan and the stores (`data/order` and its inverse), so they answer for steps that are still
to come as well. `crystal data trace` and `crystal data show` ask. A row of sequence_length L holds L + 1 tokens; the
last is only a label here, and the first of the next row: a document that reaches into a row by no more counts too.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Phase, Run
from crystal_hpc.data.fim import load_fims
from crystal_hpc.data.order import PhaseOrder, run_orders
from crystal_hpc.data.rows import Rows, read_rows
from crystal_hpc.data.shard import read_documents
from crystal_hpc.data.sources import open_source, read_sources
from crystal_hpc.data.store import TokenStore
from crystal_hpc.errors import RunError, StoreError


@dataclass(frozen=True)
class Sample:
    """One row of a step."""

    position: int
    """In its phase."""
    source: str
    epoch: int
    row: int


@dataclass(frozen=True)
class Piece:
    """What of one document lies in a row: tokens start..stop-1 of the document, which begin at `at` in the row."""

    document: int
    info: dict[str, Any]
    hash: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Sighting:
    """A step that reads some of a document."""

    phase: str
    step: int
    sample: Sample
    piece: Piece
    done: bool
    """Whether the run has taken the step."""


class History:
    """A run, given its folder or its config, with its stores opened."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError or StoreError where the run or its stores cannot be read."""
        folder = path if path.is_dir() else None
        if folder and not (folder / "run.yaml").exists():
            raise RunError(f"{path}: not a run folder (it has no run.yaml), nor a run's config")
        self.run: Run = load_run(folder / "run.yaml" if folder else path)
        sources = read_sources(self.run)
        self.stores = {name: open_source(info) for name, info in sources.training.items()}
        self.orders: list[PhaseOrder] = run_orders(self.run, sources.tokens)
        lines = files.read_lines(folder / "metrics.jsonl") if folder else iter(())
        self.done = {(line["phase"], line["step"]) for line in lines}

    def phase(self, name: str) -> tuple[int, Phase]:
        """Number and config of a phase. Raises RunError for one that the run does not have."""
        names = [phase.name for phase in self.run.phases]
        if name not in names:
            raise RunError(f"run {self.run.name} has no phase {name!r}; choose from {', '.join(names)}")
        return names.index(name), self.run.phases[names.index(name)]

    def samples(self, phase: str, step: int) -> list[Sample]:
        """The rows of a step, in order of position. Raises RunError for a step that the phase does not have."""
        number, config = self.phase(phase)
        if not 0 <= step < derive.phase_steps(config):
            raise RunError(f"phase {phase} has steps 0 to {derive.phase_steps(config) - 1}, not {step}")
        positions = np.arange(config.batch_size, dtype=np.int64) + step * config.batch_size
        order = self.orders[number]
        source, epoch, row = (column.tolist() for column in order.samples(positions))
        found = zip(positions.tolist(), source, epoch, row, strict=True)
        return [Sample(position, order.sources[s], e, r) for position, s, e, r in found]

    def rows(self, phase: str, step: int) -> Rows:
        """The rows of a step as the model gets them, in order of position."""
        number, config = self.phase(phase)
        positions = np.array([sample.position for sample in self.samples(phase, step)], np.int64)
        order = self.orders[number]
        stores = [self.stores[name] for name in order.sources]
        return read_rows(order, stores, positions, load_fims(self.run)[number])

    def pieces(self, phase: str, sample: Sample) -> list[Piece]:
        """The documents in a sample, in their order there. Raises StoreError for a source without documents."""
        length = self.phase(phase)[1].sequence_length
        begin = sample.row * length
        return list(_pieces(self._store(sample.source), begin, begin + length + 1))

    def sightings(self, source: str, document: int) -> Iterator[Sighting]:
        """The steps that read some of a document, in their order."""
        store = self._store(source)
        first, last = store.document_span(document)
        for phase, order in zip(self.run.phases, self.orders, strict=True):
            length, samples = phase.sequence_length, derive.phase_samples(phase)
            rows = range(max(0, (first - 1) // length), min(store.rows(length), (last - 1) // length + 1))
            found = [(*hit, row) for row in rows for hit in order.positions(source, row, samples)]
            for position, epoch, row in sorted(found):
                begin = row * length
                (piece,) = [p for p in _pieces(store, begin, begin + length + 1) if p.document == document]
                step, sample = position // phase.batch_size, Sample(position, source, epoch, row)
                yield Sighting(phase.name, step, sample, piece, (phase.name, step) in self.done)

    def find(self, name: str) -> list[tuple[str, int]]:
        """(source, number) of the documents of that name: an id, the hash of a text in hex, or SOURCE:NUMBER."""
        source, _, number = name.rpartition(":")
        if source in self.stores and number.isdecimal():
            if int(number) >= self._store(source).info.documents:
                raise RunError(
                    f"source {source} has documents 0 to {self._store(source).info.documents - 1}, not {number}"
                )
            return [(source, int(number))]
        tokens = [(key, store) for key, store in self.stores.items() if isinstance(store, TokenStore)]
        return [(key, number) for key, store in tokens for number in find_documents(store, name)]

    def _store(self, source: str) -> TokenStore:
        store = self.stores[source]
        if not isinstance(store, TokenStore):
            raise StoreError(f"source {source}: published rows say nothing of the documents that they were made of")
        return store


def find_documents(store: TokenStore, name: str) -> list[int]:
    """The numbers of the documents with this id, or whose text has this hash (32 hex digits)."""
    wanted = np.array(divmod(xxhash.xxh3_128_intdigest(name.encode()), 1 << 64), np.uint64)
    text = None
    if len(name) == 32 and all(char in "0123456789abcdef" for char in name):
        text = np.array(divmod(int(name, 16), 1 << 64), np.uint64)
    found, before = [], 0
    for number in range(len(store.info.shards)):
        documents = store.documents(number)
        here = (documents.id_hashes == wanted).all(axis=1)
        if text is not None:
            here |= (documents.hashes == text).all(axis=1)
        found += (before + np.flatnonzero(here)).tolist()
        before += len(documents)
    return found


def about_document(store: TokenStore, number: int) -> tuple[dict[str, Any], str]:
    """What is said of a document (id, language, path), and the hash of its text in hex."""
    shard, place = store.place_of(number)
    documents = read_documents(store.path(shard), place, place + 1)
    ((high, low),) = documents.hashes.tolist()
    said: dict[str, Any] = orjson.loads(documents.info.tobytes() or b"{}")
    return said, f"{high:016x}{low:016x}"


def _pieces(store: TokenStore, begin: int, end: int) -> Iterator[Piece]:
    """The documents in tokens begin..end-1 of a store."""
    number = _document_at(store, begin)
    while number < store.info.documents:
        start, stop = store.document_span(number)
        if start >= end:
            return
        said, digest = about_document(store, number)
        inside = max(start, begin), min(stop, end)
        yield Piece(number, said, digest, inside[0] - start, inside[1] - start, inside[0] - begin)
        number += 1


def _document_at(store: TokenStore, token: int) -> int:
    """The number of the document that holds a token of the stream."""
    before_tokens = before_documents = 0
    for number, shard in enumerate(store.info.shards):
        if token < before_tokens + shard.tokens:
            return before_documents + bisect_right(store.documents(number).offsets, token - before_tokens) - 1
        before_tokens += shard.tokens
        before_documents += shard.documents
    raise IndexError(f"token {token} of {store.tokens}")
