"""Stores, steps and documents in words: what `crystal data show` and `crystal data trace` print."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.data.trace import History, Piece, Sample, about_document, find_documents
from crystal_hpc.errors import RunError, StoreError


def show_store(folder: Path, tokenizer: Path | None, document: str | None, row: int | None, length: int) -> str:
    """A document or a row of a store, decoded. Raises StoreError where there is no such thing."""
    store = TokenStore.open(folder)
    if tokenizer is None or (document is None) == (row is None):
        raise StoreError(f"{folder}: to show something of a store, name --tokenizer, and either --document or --row")
    encoder = Tokenizer.load(tokenizer)
    if encoder.fingerprint != store.info.tokenizer:
        raise StoreError(
            f"{folder}: was made with tokenizer {store.info.tokenizer}, and {tokenizer} is {encoder.fingerprint}"
        )
    if row is not None:
        if not 0 <= row < store.rows(length):
            raise StoreError(f"{folder}: has rows 0 to {store.rows(length) - 1} of {length} tokens, not {row}")
        text = encoder.decode(store.row(row, length).tolist())
        return f"row {row}, {length} tokens and one more as the last label\n{text}"
    return "\n".join(_document(store, number, encoder) for number in _numbers(store, str(document)))


def _numbers(store: TokenStore, name: str) -> list[int]:
    if name.isdecimal() and int(name) < store.info.documents:
        return [int(name)]
    found = find_documents(store, name)
    if not found:
        raise StoreError(
            f"{store.info.folder}: no document {name!r}; it has numbers 0 to {store.info.documents - 1}, "
            "ids as they were in the corpus, and hashes of 32 hex digits"
        )
    return found


def _document(store: TokenStore, number: int, encoder: Tokenizer) -> str:
    said, digest = about_document(store, number)
    tokens = store.document(number).tolist()
    about = "".join(f", {key} {value}" for key, value in said.items())
    return f"document {number}{about}, hash {digest}, {len(tokens):,} tokens\n{encoder.decode(tokens)}"


def show_step(path: Path, phase: str, step: int, sample: int | None) -> str:
    """The samples of a step as the model gets them, fill-in-the-middle and all. Raises CrystalError."""
    history = History(path)
    samples, rows = history.samples(phase, step), history.rows(phase, step)
    if sample is not None and not 0 <= sample < len(samples):
        raise RunError(f"step {step} of phase {phase} has samples 0 to {len(samples) - 1}, not {sample}")
    encoder = Tokenizer.load(Path(history.run.data.tokenizer))
    told = []
    for number in range(len(samples)) if sample is None else [sample]:
        tokens = [*rows.inputs[number].tolist(), int(rows.labels[number, -1])]
        silent = 0 if rows.mask is None else int(np.count_nonzero(~rows.mask[number]))
        masked = f", {silent} labels that do not count" if silent else ""
        told.append(f"-- sample {number}: {_sample(samples[number])}{masked}\n{encoder.decode(tokens)}")
    return "\n".join(told)


def trace_step(path: Path, phase: str, step: int) -> str:
    """A line a document of a step. Raises CrystalError."""
    history = History(path)
    lines = [f"phase {phase}, step {step}{'' if (phase, step) in history.done else ' (not done yet)'}"]
    for number, sample in enumerate(history.samples(phase, step)):
        lines.append(f"sample {number}: {_sample(sample)}")
        try:
            lines.extend(f"  {_piece(piece)}" for piece in history.pieces(phase, sample))
        except StoreError as error:
            lines.append(f"  {error}")
    return "\n".join(lines)


def trace_document(path: Path, name: str) -> str:
    """A line a step that reads some of a document. Raises CrystalError."""
    history = History(path)
    found = history.find(name)
    if not found:
        raise RunError(
            f"run {history.run.name}: no document {name!r} in its sources; name an id, a hash, or SOURCE:NUMBER"
        )
    lines = []
    for source, number in found:
        seen = list(history.sightings(source, number))
        lines.append(f"document {number} of {source}: {_times(len(seen))}")
        for sight in seen:
            done = "" if sight.done else " (not done yet)"
            where = f"tokens {sight.piece.start:,} to {sight.piece.stop - 1:,}"
            lines.append(f"  phase {sight.phase}, step {sight.step}: {where}, {_sample(sight.sample)}{done}")
    return "\n".join(lines)


def _sample(sample: Sample) -> str:
    return f"position {sample.position:,}, {sample.source} row {sample.row:,}, epoch {sample.epoch}"


def _piece(piece: Piece) -> str:
    about = "".join(f" {value}" for value in _values(piece.info))
    span = f"tokens {piece.start:,} to {piece.stop - 1:,}"
    return f"at {piece.at:>6,}: document {piece.document:,}{about}, {span}, {piece.hash}"


def _values(info: dict[str, str]) -> Iterable[str]:
    return dict.fromkeys(info.values())  # id and path are often the same


def _times(count: int) -> str:
    return f"read in {count:,} row{'' if count == 1 else 's'}" if count else "not read by any step of the plan"
