"""Builds a token store: documents in, a folder of HDF5 shards and a store.json out.

The third step of a token's way: `corpus` says where the documents are and in which order, `tokenizer` encodes them,
`store` writes each shard. What goes into which shard follows from the corpus and the settings alone, and every shard
is a task of its own (`Build.write_shard`), so ranks can share them and a build that was cut short goes on where it was.

On disk, in this order: `build.json` (the plan), the shards, `store.json` (the marker). See `files` for the commit rule.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crystal_hpc.data.catalog import (
    BUILD_FILE,
    FORMAT,
    STORE_FILE,
    StoreInfo,
    digest_of,
    read_store_info,
    shard_name,
)
from crystal_hpc.data.corpus_index import (
    MOST_REJECTED,
    CorpusIndex,
    Document,
    Progress,
    check_file,
    index_corpus,
    read_documents,
)
from crystal_hpc.data.store import Tokens, read_shard_info, token_type, write_shard
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import StoreError
from crystal_hpc.files import PENDING, disk_errors, make_folder, read_json, write_json

SHARD_BYTES = 64_000_000  # of text
BATCH_BYTES = 500_000  # of text handed to the tokenizer at a time: enough for all cores, soon done when asked to stop

# What must be the same for a build to be continued, with the words to say so.
_MUST_AGREE = {
    "format": "store format",
    "tokenizer": "tokenizer",
    "seed": "seed",
    "bos": "BOS",
    "eos": "EOS",
    "shard_bytes": "shard size",
    "corpus": "corpus",
}


Watch = Callable[[str, int, int], None]  # shows progress, or raises Stopped


class Stopped(Exception):
    """Carries a request to stop out of the depths of a build."""


@dataclass(frozen=True)
class Build:
    """A planned build: everything that a rank needs to write any of the shards.

    Shard k holds documents bounds[k]..bounds[k+1]-1 of the shuffled order.
    """

    out: Path
    name: str
    index: CorpusIndex
    encoder: Tokenizer
    plan: dict[str, Any]  # the content of build.json
    bounds: tuple[int, ...]

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1


def build_store(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: Path,
    *,
    name: str | None = None,
    seed: int = 1,
    bos: bool = True,
    eos: bool = True,
    shard_bytes: int = SHARD_BYTES,
    most_rejected: float = MOST_REJECTED,
    fresh: bool = False,
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> StoreInfo | None:
    """Encodes JSON Lines files into a token store at `out`, documents shuffled by (seed, text).

    `tokenizer` is a tokenizer.json or its folder. `bos` and `eos` say whether each document gets them. `shard_bytes`
    is the UTF-8 text that goes into a shard; `most_rejected` the share of unusable lines to put up with. `name`
    defaults to the folder's.

    Run again after a crash it goes on from the finished shards; after completion it returns at once. `should_stop` is
    asked between batches: once it says yes, None is returned, and the next run goes on. Raises StoreError for a bad
    corpus or tokenizer, and when `out` holds a store from another corpus or other settings (`fresh` deletes that
    first); DiskError when the disk refuses.
    """
    if shard_bytes < 1:
        raise StoreError(f"a shard of {shard_bytes} bytes of text is too small; the default is {SHARD_BYTES}")

    def watch(what: str, done: int, total: int) -> None:
        if should_stop and should_stop():
            raise Stopped
        if on_progress:
            on_progress(what, done, total)

    encoder = Tokenizer.load(tokenizer)
    plan = {
        "format": FORMAT,
        "tokenizer": encoder.fingerprint,
        "seed": seed,
        "bos": encoder.bos if bos else None,
        "eos": encoder.eos if eos else None,
        "shard_bytes": shard_bytes,
        "inputs": _identities(inputs),
    }
    make_folder(out)
    if fresh:
        _remove_store(out)
    if finished := _finished(out, plan):
        return finished
    try:
        build = plan_build(inputs, out, encoder, plan, name, most_rejected, watch)
        for number in range(build.shards):
            if not _is_written(out / shard_name(number)):
                build_shard(build, number, watch)
    except Stopped:
        return None
    return finish_build(build)


def plan_build(
    inputs: Sequence[Path],
    out: Path,
    encoder: Tokenizer,
    plan: dict[str, Any],
    name: str | None,
    most_rejected: float,
    watch: Watch,
) -> Build:
    """Indexes the corpus, cuts it into shards and commits build.json. Raises StoreError where another was begun."""
    index = index_corpus(inputs, plan["seed"], most_rejected, watch)
    bounds = shard_bounds(index.entries["text_bytes"], plan["shard_bytes"])
    plan = plan | {"corpus": index.digest, "documents": len(index.entries), "shards": len(bounds) - 1}
    _refuse_another(out, plan)
    write_json(out / BUILD_FILE, plan)
    return Build(out, name or out.resolve().name, index, encoder, plan, bounds)


def shard_bounds(text_bytes: npt.NDArray[np.int64], shard_bytes: int) -> tuple[int, ...]:
    """Where the shards begin and end in the shuffled order, as document numbers, from 0 to the number of documents.

    A document belongs to the shard that its first byte falls into, so a shard exceeds `shard_bytes` by less than one
    document, and a document larger than that does not leave an empty shard behind.
    """
    shard = (np.cumsum(text_bytes) - text_bytes) // shard_bytes
    inner = np.flatnonzero(np.diff(shard)) + 1
    return (0, *inner.tolist(), len(text_bytes))


def build_shard(build: Build, number: int, watch: Watch) -> None:
    """Encodes and writes one shard. Independent of all others, and the same whoever does it."""
    start, stop = build.bounds[number], build.bounds[number + 1]
    text_bytes = build.index.entries["text_bytes"]
    done, total = int(text_bytes[:start].sum()), int(text_bytes.sum())
    dtype = token_type(build.encoder.vocab_size)
    pieces: list[Tokens] = []
    lengths: list[int] = [0]
    for texts in _batches(read_documents(build.index, start, stop)):
        watch("encoding", done, total)
        ids = _encode(build, texts)
        pieces.append(np.array(list(chain.from_iterable(ids)), dtype))
        lengths.extend(map(len, ids))
        done += sum(len(text.encode()) for text in texts)
    path = build.out / shard_name(number)
    write_shard(path, np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64), _attributes(build, number))
    watch("encoding", done, total)


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    """Texts in groups of about BATCH_BYTES characters."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(build: Build, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, with BOS and EOS as planned."""
    front, back = ([] if build.plan[end] is None else [build.plan[end]] for end in ("bos", "eos"))
    return [front + ids + back for ids in build.encoder.encode_batch(texts)]


def _attributes(build: Build, number: int) -> dict[str, int | str]:
    """What a person who opens a shard with h5dump would like to know."""
    return {
        "about": "documents in shuffled order, one after another: tokens[doc_offsets[i]:doc_offsets[i+1]] is the i-th",
        "tokenizer": build.encoder.fingerprint,
        "vocab_size": build.encoder.vocab_size,
        "corpus": build.index.digest,
        "seed": str(build.index.seed),
        "shard": number,
        "shards": build.shards,
        "bos": str(build.plan["bos"]),
        "eos": str(build.plan["eos"]),
    }


def finish_build(build: Build) -> StoreInfo:
    """Writes store.json, which makes the store one; all shards must be there."""
    shards = tuple(read_shard_info(build.out / shard_name(number)) for number in range(build.shards))
    info = StoreInfo(
        folder=build.out,
        name=build.name,
        tokenizer=build.encoder.fingerprint,
        vocab_size=build.encoder.vocab_size,
        max_token=max(shard.max_token for shard in shards),
        dtype=token_type(build.encoder.vocab_size).name,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        seed=build.index.seed,
        bos=build.plan["bos"],
        eos=build.plan["eos"],
        rejected=build.index.rejected,
        shards=shards,
        digest=digest_of(shard.digest for shard in shards),
    )
    write_json(build.out / STORE_FILE, info.as_json())
    for stale in build.out.glob(f"*{PENDING}"):  # of runs that were killed
        stale.unlink(missing_ok=True)
    return info


def _identities(inputs: Sequence[Path]) -> list[list[str | int]]:
    """Path, size and time of every input: enough to know, without reading them, that nothing has changed."""
    return sorted([str(path.resolve()), check_file(path), path.stat().st_mtime_ns] for path in inputs)


def _finished(out: Path, plan: dict[str, Any]) -> StoreInfo | None:
    """The store at `out` if it is the one asked for and complete. Raises StoreError where another is in the way."""
    old = _refuse_another(out, plan)
    if old.get("inputs") != plan["inputs"]:
        return None  # perhaps the same documents all the same: indexing will tell
    with contextlib.suppress(StoreError):  # half-written, or a shard was deleted: go on building
        return read_store_info(out)
    return None


def _refuse_another(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan found at `out`, empty if there is none; raises StoreError when it is not this one."""
    remedy = "choose another folder, or build afresh (--fresh), which deletes what is there"
    try:
        old = read_json(out / BUILD_FILE)
        found = {words: (old[key], plan[key]) for key, words in _MUST_AGREE.items() if key in plan}
    except FileNotFoundError:
        if (out / STORE_FILE).exists():
            raise StoreError(f"{out}: holds a store without its {BUILD_FILE}; {remedy}") from None
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{out / BUILD_FILE}: not a build plan ({error!r}); {remedy}") from error
    different = [f"{words} {was}, not {now}" for words, (was, now) in found.items() if was != now]
    if different:
        raise StoreError(f"{out}: holds a store, perhaps unfinished, with {', '.join(different)}; {remedy}")
    plan_found: dict[str, Any] = old
    return plan_found


def _is_written(shard: Path) -> bool:
    """Whether a shard is there and whole; one that is damaged is written again."""
    with contextlib.suppress(StoreError):
        return read_shard_info(shard).tokens > 0
    return False


def _remove_store(out: Path) -> None:
    """Deletes a store, marker first; other files in the folder stay."""
    with disk_errors(out):
        for pattern in (STORE_FILE, "shard-*.h5", f"*{PENDING}", BUILD_FILE):
            for path in out.glob(pattern):
                path.unlink(missing_ok=True)
