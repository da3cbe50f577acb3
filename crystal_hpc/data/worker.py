"""One of the processes of a build, from its first unit of the corpus to the store's marker.

Under `data/build`, which says what is to be built (build.json) and starts as many of these as are wanted. They need not
know of each other (`data/work`); each goes through the same stages, and leaves each only when all of it is done.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crystal_hpc.config.units import format_count, format_seconds
from crystal_hpc.data.catalog import (
    BUILD_FILE,
    HELD_OUT,
    STORE_FILE,
    ShardInfo,
    StoreInfo,
    digest_of,
    read_store_info,
    shard_name,
)
from crystal_hpc.data.corpus import Fields, Rejected, Rejections, Unit
from crystal_hpc.data.division import Division, divide
from crystal_hpc.data.merge import merge_shard
from crystal_hpc.data.parts import Account, Encoding, encode_unit, is_encoded, part_file, read_accounts, unit_name
from crystal_hpc.data.shard import read_documents, read_shard_info, token_type
from crystal_hpc.data.sorting import info_bytes
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.data.work import share
from crystal_hpc.errors import StoreError
from crystal_hpc.files import PENDING, make_folder, read_json, remove_folder, replaced, write_file, write_json
from crystal_hpc.progress import Progress

PARTS = "parts"  # the folder of what is only needed until the store is complete
LOCKS = "locks"  # in it
DIVISION = "division.npz"
ACCOUNTS = "accounts.json"
REJECTED_FILE = "rejected.jsonl"
REPEATED = "id seen before"


def remove_parts(out: Path) -> None:
    """Deletes what was only needed until the store at `out` was complete."""
    remove_folder(out / PARTS)


def beside(out: Path) -> Path:
    """The folder of the held-out store of the store at `out`."""
    return out.with_name(out.name + HELD_OUT)


class Worker:
    """Works on the build that build.json in `out` describes."""

    def __init__(
        self,
        out: Path,
        tokenizer: Tokenizer,
        units: list[Unit],
        place: tuple[int, int],
        watch: Progress,
    ) -> None:
        """`place` is this process's (number, count) among those that were started together; `watch` may raise."""
        self.out, self.tokenizer, self.units = out, tokenizer, units
        self.plan: dict[str, Any] = read_json(out / BUILD_FILE)
        self._place, self._watch = place, watch
        self._parts = make_folder(out / PARTS)
        self._locks = make_folder(out / PARTS / LOCKS)
        tokenizer.use_engine(self.plan["engine"]["engine"])

    def run(self) -> StoreInfo:
        """Returns once the store is complete. Raises StoreError, DiskError, and what `watch` raises."""
        try:
            self._encode()
            self._once("dividing", self._parts / DIVISION, self._divide)
            self._merge()
            self._once("finishing", self.out / STORE_FILE, self._finish)
        except (FileNotFoundError, StoreError):
            if not (self.out / STORE_FILE).exists():  # else another process has finished, and cleared away the parts
                raise
        return read_store_info(self.out)

    def _once(self, name: str, result: Path, do: Callable[[], None]) -> None:
        """Has something done by the first process to come here; the others wait for its result."""

        def is_done(path: Path) -> bool:
            return path.exists() or self._is_complete()

        share([result], lambda _: name, is_done, lambda _: do(), self._locks, lambda: self._watch(name, 0, 1))

    def _is_complete(self) -> bool:
        """Whether another process was quicker, and has cleared away the parts."""
        return (self.out / STORE_FILE).exists()

    def _encode(self) -> None:
        encoding = Encoding(
            self.tokenizer,
            Fields(**self.plan["fields"]),
            self.plan["seed"],
            self.plan["bos"],
            self.plan["eos"],
            self.plan["longest"],
        )
        tally = _Tally(self.units, self._parts, self._watch)

        def encode(unit: Unit) -> None:
            encode_unit(unit, self._parts, encoding, tally.show)

        share(
            self.units, unit_name, lambda unit: is_encoded(unit, self._parts) or self._is_complete(), encode,
            self._locks, tally.look, *self._place,
        )  # fmt: skip

    def _divide(self) -> None:
        """Settles which documents go where; raises StoreError if too many records were rejected."""
        account, parts = read_accounts(self.units, self._parts)
        if not parts:
            account.rejections.check(self.plan["most_rejected"], 0)

        def look() -> None:
            self._watch("dividing", 0, 1)

        division = divide(parts, self.plan["seed"], self.plan["shard_tokens"], self.plan["held_out"], look)
        repeated = _count_repeated(parts, division, account.rejections)
        _write_rejected(self.out / REJECTED_FILE, account.rejections)
        account.rejections.check(self.plan["most_rejected"], account.documents - repeated["documents"])
        if self.plan["held_out"] and not division.held_out:
            raise StoreError(f"none of {account.documents} documents would be held out; hold out a larger share")
        if division.shards == division.held_out:
            raise StoreError(f"all {account.documents} documents would be held out; hold out a smaller share")
        accounts = {
            "records": account.records,
            "documents": account.documents,
            "tokens": account.tokens,
            "rejected": {k: v for k, v in account.rejections.counts.items() if k != REPEATED},
            "duplicate_ids": repeated,
        }
        shards = division.shards - division.held_out
        write_json(self.out / BUILD_FILE, self.plan | {"shards": shards})
        write_json(self._parts / ACCOUNTS, accounts)
        if division.held_out:
            folder = make_folder(beside(self.out))
            write_json(folder / BUILD_FILE, {"held_out_of": str(self.out), "shards": division.held_out})
        with replaced(self._parts / DIVISION) as pending:
            division.save(pending)

    def _merge(self) -> None:
        division = Division.load(self._parts / DIVISION)
        _, parts = read_accounts(self.units, self._parts)
        done = 0

        def merge(number: int) -> None:
            attributes = self._attributes(number, division)
            merge_shard(self._shard(number, division), number, parts, division, self.plan["seed"], attributes)

        def is_done(number: int) -> bool:
            nonlocal done
            written = _is_written(self._shard(number, division))
            done += written
            return written

        def look() -> None:
            self._watch("writing shards", min(done, division.shards), division.shards)

        share(range(division.shards), lambda n: f"shard-{n}", is_done, merge, self._locks, look, *self._place)

    def _shard(self, number: int, division: Division) -> Path:
        """Where a shard of the division belongs."""
        if number < division.held_out:
            return beside(self.out) / shard_name(number)
        return self.out / shard_name(number - division.held_out)

    def _attributes(self, number: int, division: Division) -> dict[str, int | str]:
        """What a person who opens a shard with h5dump would like to know."""
        held_out = number < division.held_out
        return {
            "about": "documents in shuffled order: tokens[doc_offsets[i]:doc_offsets[i+1]] is the i-th",
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "seed": str(self.plan["seed"]),
            "shard": number if held_out else number - division.held_out,
            "shards": division.held_out if held_out else division.shards - division.held_out,
            "bos": str(self.plan["bos"]),
            "eos": str(self.plan["eos"]),
        }

    def _finish(self) -> None:
        """Writes store.json, which makes the store one, after that of the held-out store; then the parts can go."""
        division = Division.load(self._parts / DIVISION)
        infos = [read_shard_info(self._shard(number, division)) for number in range(division.shards)]
        accounts = read_json(self._parts / ACCOUNTS)
        rejected = accounts["rejected"]
        if repeated := accounts["duplicate_ids"]["documents"]:
            rejected = dict(sorted({**rejected, REPEATED: repeated}.items()))
        held_out, training = infos[: division.held_out], infos[division.held_out :]
        accounts["held_out"] = {
            "documents": sum(shard.documents for shard in held_out),
            "tokens": sum(shard.tokens for shard in held_out),
        }
        write_json(self.out / BUILD_FILE, read_json(self.out / BUILD_FILE) | {"accounts": accounts})
        if held_out:
            write_json(beside(self.out) / STORE_FILE, self._info(beside(self.out), held_out, {}).as_json())
        write_json(self.out / STORE_FILE, self._info(self.out, training, rejected).as_json())
        for stale in self.out.glob(f"*{PENDING}"):  # of runs that were killed
            stale.unlink(missing_ok=True)
        remove_parts(self.out)

    def _info(self, folder: Path, shards: list[ShardInfo], rejected: dict[str, int]) -> StoreInfo:
        return StoreInfo(
            folder=folder,
            name=self.plan["name"] + (HELD_OUT if folder != self.out else ""),
            tokenizer=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            max_token=max(shard.max_token for shard in shards),
            dtype=token_type(self.tokenizer.vocab_size).name,
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            seed=self.plan["seed"],
            bos=self.plan["bos"],
            eos=self.plan["eos"],
            rejected=rejected,
            shards=tuple(shards),
            digest=digest_of(shard.digest for shard in shards),
        )


class _Tally:
    """How far the encoding is, with what other processes have finished counted in."""

    def __init__(self, units: list[Unit], folder: Path, watch: Progress) -> None:
        self._folder, self._watch = folder, watch
        self._total = sum(unit.size for unit in units)
        self._left = {unit_name(unit): 0 for unit in units}  # parts counted of each unit that has more to come
        self._finished = Account()
        self._count()
        self._started, self._looked, self._at_start = time.monotonic(), time.monotonic(), self._finished.bytes

    def look(self) -> None:
        """Shows how far all are."""
        self.show(Account())

    def show(self, mine: Account) -> None:
        """The same, `mine` being the part in the making."""
        if time.monotonic() > self._looked + max(1.0, len(self._left) / 500):  # spares a shared file system
            self._looked = time.monotonic()
            self._count()
        done, tokens = self._finished.bytes + mine.bytes, self._finished.tokens + mine.tokens
        note = f"{format_count(self._finished.documents + mine.documents)} documents, {format_count(tokens)} tokens"
        seconds, read = time.monotonic() - self._started, done - self._at_start
        if read > 0 and seconds > 1:
            left = max(self._total - done, 0) * seconds / read
            note += f", {format_count(tokens / done * read / seconds)} tokens/s, {format_seconds(left)} left"
        self._watch("encoding", min(done, self._total), self._total, note)

    def _count(self) -> None:
        for name, number in list(self._left.items()):
            while (path := self._folder / part_file(name, number)).exists():
                number += 1
                account = read_json(path)
                self._finished.add(Account.from_json(account))
                self._left[name] = number
                if account["last"]:
                    del self._left[name]
                    break


def _write_rejected(path: Path, rejections: Rejections) -> None:
    """Leaves the sample of rejected records, one a line, for people to look at; nothing where there is none."""
    lines = [
        json.dumps({"reason": reason, "records": rejections.counts[reason], **record}, ensure_ascii=False) + "\n"
        for reason, records in rejections.samples().items()
        for record in records
    ]
    write_file(path, "".join(lines)) if lines else path.unlink(missing_ok=True)


def _count_repeated(parts: list[Path], division: Division, rejections: Rejections) -> dict[str, int]:
    """Documents and tokens left out for their id, and examples of them among the account's rejections."""
    tokens = 0
    for number, path in enumerate(parts):
        repeated = division.repeated_in(number)
        if len(repeated):
            documents = read_documents(path)
            tokens += int(np.diff(documents.offsets)[repeated].sum())
            for place in repeated.tolist():
                said = info_bytes(documents, place).decode()
                rejections.add("", Rejected(REPEATED, f"text {documents.hashes[place, 0]:016x}", said))
    return {"documents": len(division.repeated), "tokens": tokens}


def _is_written(shard: Path) -> bool:
    """Whether a shard is there and whole; one that is damaged is written again."""
    try:
        return bool(read_shard_info(shard).tokens)
    except StoreError:
        return False
