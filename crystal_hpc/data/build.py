"""Builds a token store: documents in, a folder of HDF5 shards and a store.json out, by any number of processes.

    corpus -> units -> parts (encoded, each sorted)     data/corpus, data/parts
    parts  -> which documents go into which shard       data/division
    parts  -> shards                                    data/merge
    shards -> store.json, the marker

Each arrow is done piece by piece by whoever comes first (`data/work`): one process, its helpers on the other cores, the
ranks of mpiexec or srun, or the tasks of a Slurm array, all with the same command. What is finished stays finished
through kill -9; and since documents are sorted by a hash of their text, the bytes depend on the documents and the
settings alone. See `files` for the commit rule.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from crystal_hpc.data.catalog import (
    BUILD_FILE,
    FORMAT,
    STORE_FILE,
    StoreInfo,
    read_store_info,
    tokenizer_file,
)
from crystal_hpc.data.corpus import LONGEST, MOST_REJECTED, Document, Fields, Unit, list_units, read_unit
from crystal_hpc.data.division import BUCKETS
from crystal_hpc.data.parts import unit_name
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.data.units import shown
from crystal_hpc.data.work import SECONDS_BETWEEN_LOOKS, claimed
from crystal_hpc.data.worker import LOCKS, PARTS, Worker, beside, remove_parts
from crystal_hpc.errors import StoreError
from crystal_hpc.files import PENDING, disk_errors, make_folder, read_json, remove_folder, write_json
from crystal_hpc.progress import Progress

SHARD_TOKENS = 1 << 28
UNIT_BYTES = 4 << 20, 128 << 20  # the smallest and the largest unit of work
SAMPLE_CHARACTERS = 100_000  # of each of so many units, on which engines are compared
SAMPLE_UNITS = 8
SAMPLE_RECORDS = 10_000

# What must be the same for a build to be continued, with the words to say so.
_MUST_AGREE = {
    "format": "store format",
    "tokenizer": "tokenizer",
    "seed": "seed",
    "bos": "BOS",
    "eos": "EOS",
    "shard_tokens": "shard size",
    "held_out": "held-out share",
    "fields": "fields",
    "longest": "longest document",
    "inputs": "corpus files",
}


class Stopped(Exception):
    """Carries a request to stop out of the depths of a build."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be chosen about a build."""

    name: str | None = None
    """The store's; default: its folder's."""
    seed: int = 1
    """Of the shuffle, 0..2**64-1."""
    bos: bool = True
    """Whether each document begins with the tokenizer's BOS."""
    eos: bool = True
    """Whether each document ends with its EOS."""
    fields: Fields = field(default_factory=Fields)
    """The names of text, id, language and path in JSON objects or Parquet columns."""
    format: str | None = None
    """Of the inputs: jsonl, parquet or text; default: found out."""
    shard_tokens: int = SHARD_TOKENS
    """In a shard; a shard ends with the document before the one that holds the next one's first token."""
    held_out: float = 0.0
    """Share of the documents that go into a store of their own beside this one, named -held-out."""
    most_rejected: float = MOST_REJECTED
    """Share of unusable records to put up with."""
    longest: int = LONGEST
    """Bytes of the longest record that is taken."""
    engine: str | None = None
    """tokenizers or gigatoken; default: the fastest that proves identical."""


def build_store(
    inputs: Sequence[Path],
    out: Path,
    tokenizer: Path,
    options: Options | None = None,
    *,
    fresh: bool = False,
    workers: int = 1,
    place: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> StoreInfo | None:
    """Encodes a corpus into a token store at `out`, documents shuffled by (seed, text).

    `inputs` are files and folders (`data.corpus`), `tokenizer` is a tokenizer.json or its folder. `workers` processes
    of this machine take part; `place` is this process's (number, count) among others started with the same command.

    Run again after a crash it goes on from what is finished; after completion it returns at once. Once `should_stop`
    says yes, None is returned, and the next run goes on.

    Raises StoreError for a bad corpus or tokenizer, and when `out` holds a store from another corpus or other settings
    (`fresh` deletes that first); DiskError when the disk refuses.
    """
    options, out = options or Options(), Path(os.path.abspath(out))
    _check(inputs, out, options)

    def watch(what: str, done: int, total: int, note: str = "") -> None:
        if should_stop and should_stop():
            raise Stopped
        if on_progress:
            on_progress(what, done, total, note)

    encoder = Tokenizer.load(tokenizer)
    units = list_units(inputs, unit_bytes=_unit_bytes(inputs, options), format=options.format)
    plan = _plan(inputs, out, tokenizer, encoder, units, options)
    if fresh and place[1] > 1:
        raise StoreError(f"{out}: --fresh is for one process, and {place[1]} were started; delete the folder first")
    if fresh:
        _remove_store(out)
    helpers = 0 if _finished(out) else min(workers, len(units)) - 1
    try:
        with _helpers(out, tokenizer, helpers) as let_begin:
            if finished := _begin(out, plan, encoder, units, options, watch):
                return finished
            let_begin()
            info = Worker(out, encoder, units, place, watch).run()
        remove_parts(out)  # again: a process that came late may have made the folder once more
        return info
    except Stopped:
        return None


def _begin(
    out: Path, plan: dict[str, Any], encoder: Tokenizer, units: Sequence[Unit], options: Options, watch: Progress
) -> StoreInfo | None:
    """Commits build.json, whoever comes first; the store if it is complete. Raises StoreError where another is."""
    _found(out, plan)  # before anything is made
    while True:
        locks = make_folder(out / PARTS / LOCKS)
        # The folder goes when another process completes the store: then this one begins again, and finds it.
        with contextlib.suppress(FileNotFoundError), claimed(locks / "plan.lock") as mine:
            if mine:
                old = _found(out, plan)
                if old and (finished := _finished(out)):
                    return finished
                with claimed(locks / "finishing.lock") as nobody_finishes:
                    if old and nobody_finishes and not _finished(out):
                        (out / STORE_FILE).unlink(missing_ok=True)  # of a store that has lost a shard
                if old.get("most_rejected") != options.most_rejected:  # the only thing that may change
                    proof = asdict(encoder.choose_engine(options.engine, [*_samples(units, options)]))
                    write_json(out / BUILD_FILE, {**old, **plan, "engine": old.get("engine", proof)})
                return None
        watch("beginning", 0, 1)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def help_build(out: Path, tokenizer: Path) -> None:
    """Takes part in the build of the process that started this, from its word, a byte on stdin, until it is done."""
    parent = os.getppid()
    encoder = Tokenizer.load(tokenizer)
    encoder.encode("")  # makes the engine ready, while the other process chooses one
    if not sys.stdin.buffer.read(1):
        return
    plan = read_json(out / BUILD_FILE)

    def watch(_what: str, _done: int, _total: int, _note: str = "") -> None:
        if os.getppid() != parent:
            raise Stopped

    units = list_units([Path(path) for path in plan["paths"]], unit_bytes=plan["unit_bytes"], format=plan["kind"])
    if _units_digest(units) != plan["units"]:
        return  # files have come or gone since
    with contextlib.suppress(Stopped, StoreError):  # what is wrong, the one that began finds out for itself
        Worker(out, encoder, units, (0, 1), watch).run()


@contextlib.contextmanager
def _helpers(out: Path, tokenizer: Path, count: int) -> Iterator[Callable[[], None]]:
    """So many more processes for the same build. They get ready, begin once the function is called, and end with the
    block."""
    command = [sys.executable, "-m", "crystal_hpc.data.build", str(out), str(tokenizer)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    # A session of their own: Ctrl-C is for the one that can say so.
    helpers = [
        subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.PIPE) for _ in range(count)
    ]

    def let_begin() -> None:
        if helpers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for helper in helpers:
            assert helper.stdin
            with contextlib.suppress(BrokenPipeError):  # it has died: we do without
                helper.stdin.write(b"\n")
                helper.stdin.flush()

    try:
        yield let_begin
    finally:
        for helper in helpers:
            helper.send_signal(signal.SIGTERM)  # at any moment: nothing is lost but a part in the making
            helper.communicate()


def _check(inputs: Sequence[Path], out: Path, options: Options) -> None:
    for path in inputs:
        if Path(path).is_dir() and Path(path).resolve() in (out / "x").resolve().parents:
            raise StoreError(f"{out}: lies in the corpus folder {path}, and would become a part of it; build elsewhere")
    if not 0 <= options.most_rejected <= 1:
        raise StoreError(f"a share of {options.most_rejected:g} rejected records makes no sense: from 0 to 1")
    if options.held_out and not round(options.held_out * BUCKETS):
        raise StoreError(
            f"a held-out share of {options.held_out:g} holds nothing out: choose {1 / BUCKETS:.6f} or more"
        )
    if options.shard_tokens < 1:
        raise StoreError(f"a shard of {options.shard_tokens} tokens is too small; the default is {SHARD_TOKENS}")
    if not 0 <= options.seed < 2**64:
        raise StoreError(f"seed {options.seed} is out of range: choose one from 0 to 2**64 - 1")
    if not 0 <= options.held_out < 1:
        raise StoreError(f"a held-out share of {options.held_out:g} makes no sense: from 0 up to, but not including, 1")


def _unit_bytes(inputs: Sequence[Path], options: Options) -> int:
    """The size of a unit of work: many for any number of processes, the same whatever that number is."""
    smallest, largest = UNIT_BYTES
    total = sum(unit.size for unit in list_units(inputs, unit_bytes=largest, format=options.format))
    return max(smallest, min(largest, total // 64))


def _plan(
    inputs: Sequence[Path], out: Path, tokenizer: Path, encoder: Tokenizer, units: Sequence[Unit], options: Options
) -> dict[str, Any]:
    """The content of build.json: all that another process needs to take part."""
    files = {str(unit.path): [unit.file_size, unit.mtime_ns] for unit in units}
    texts = {str(unit.path / text.name): [text.size, text.mtime_ns] for unit in units for text in unit.files}
    return {
        "format": FORMAT,
        "name": options.name or out.resolve().name,
        "tokenizer": encoder.fingerprint,
        "tokenizer_path": str(tokenizer_file(tokenizer).resolve()),
        "seed": options.seed,
        "bos": encoder.bos if options.bos else None,
        "eos": encoder.eos if options.eos else None,
        "shard_tokens": options.shard_tokens,
        "held_out": options.held_out,
        "fields": asdict(options.fields),
        "longest": options.longest,
        "most_rejected": options.most_rejected,
        "kind": options.format,
        "unit_bytes": _unit_bytes(inputs, options),
        "paths": sorted(os.path.abspath(path) for path in inputs),
        "units": _units_digest(units),
        "inputs": {**files, **texts},
    }


def _units_digest(units: Sequence[Unit]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(map(unit_name, units)).encode())


def _samples(units: Sequence[Unit], options: Options) -> Iterator[str]:
    """Some documents from different places of the corpus."""
    for unit in units[:: max(1, len(units) // SAMPLE_UNITS)]:
        left = SAMPLE_CHARACTERS
        for item, _ in islice(read_unit(unit, options.fields, longest=options.longest), SAMPLE_RECORDS):
            if isinstance(item, Document):
                yield item.text[:left]
                left -= len(item.text)
            if left <= 0:
                break


def _found(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan at `out` where this build was begun before, else {}; raises StoreError when `out` holds another."""
    remedy = "choose another folder, or build afresh (--fresh), which deletes what is there"
    try:
        old = read_json(out / BUILD_FILE)
        pairs = {words: (old[key], plan[key]) for key, words in _MUST_AGREE.items()}
    except FileNotFoundError:
        for folder in (out, beside(out)) if plan["held_out"] else (out,):
            if (folder / STORE_FILE).exists() or next(folder.glob("shard-*.h5"), None):
                said = f"{folder}: holds a store, or shards of one, that is not of this build"
                raise StoreError(f"{said}; choose another name, or delete that folder") from None
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{out / BUILD_FILE}: not a build plan of this version ({error!r}); {remedy}") from error
    different = [_difference(words, was, now) for words, (was, now) in pairs.items() if was != now]
    if different:
        raise StoreError(f"{out}: holds a store, perhaps unfinished, with {', '.join(different)}; {remedy}")
    found: dict[str, Any] = old
    return found


def _difference(words: str, was: Any, now: Any) -> str:
    if not isinstance(was, dict):
        return f"{words} {was}, not {now}"
    changed = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return f"other {words} ({shown(changed[0])}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''})"


def _finished(out: Path) -> StoreInfo | None:
    """The store at `out` if it is complete."""
    with contextlib.suppress(StoreError):  # half-written, or a shard was deleted: go on building
        info = read_store_info(out)
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # no account: a copied store
            if read_json(out / BUILD_FILE)["accounts"]["held_out"]["documents"]:
                read_store_info(beside(out))
        remove_folder(out / PARTS)  # of a run that was killed in its last moment
        return info
    return None


def _remove_store(out: Path) -> None:
    """Deletes a store and its held-out one, markers first; other files in the folders stay."""
    ours = (beside(out) / BUILD_FILE).exists() and "held_out_of" in read_json(beside(out) / BUILD_FILE)
    for folder in (out, beside(out)) if ours else (out,):
        with disk_errors(folder):
            for pattern in (STORE_FILE, "shard-*.h5", "rejected.jsonl", f"*{PENDING}", BUILD_FILE):
                for path in folder.glob(pattern):
                    path.unlink(missing_ok=True)
        remove_folder(folder / PARTS)


if __name__ == "__main__":
    help_build(Path(sys.argv[1]), Path(sys.argv[2]))
