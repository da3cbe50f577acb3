"""What proves that a token store is what it should be: every byte, every document, every count.

After `data/build` in the flow of a token, before anyone trains on it: `crystal data audit`. One pass over the shards,
in memory that does not grow with the store. What a build counted going in (build.json) is held against what the shards
hold; what the shards say of themselves (hashes, ends, order) against their tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from crystal_hpc.data.catalog import BUILD_FILE, HELD_OUT, STORE_FILE, StoreInfo, read_store_info
from crystal_hpc.data.repeats import MOST_STORES, repeated_ids, shared_documents
from crystal_hpc.data.scan import Scan, scan_shard
from crystal_hpc.data.spelling import Spelling
from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer
from crystal_hpc.errors import StoreError
from crystal_hpc.files import read_json
from crystal_hpc.progress import Progress

Verdict = Literal["good", "note", "bad"]
MOST_DUPLICATES = 0.01
MOST_LOSSY = 0.01  # of the sample: texts that a tokenizer cannot give back
BETWEEN = "between stores"
BAR = 40  # characters of the longest bar of the histogram


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and, in one line, what was found."""

    store: str
    name: str
    verdict: Verdict
    said: str


def audit(
    folders: Sequence[Path],
    tokenizer: Path | None = None,
    *,
    held_out: Sequence[Path] = (),
    sample: int = 1000,
    most_duplicates: float = MOST_DUPLICATES,
    on_progress: Progress | None = None,
) -> list[Finding]:
    """Everything about some stores that can be proved. Bad findings are faults; the rest is good, or worth knowing.

    With a tokenizer, special tokens are counted and `sample` documents are decoded and held against the hash of the
    text that they were made of. No document of a store in `held_out` may be in one of `folders`. Raises StoreError for
    a folder that is no token store, and for an unreadable tokenizer.
    """
    if sample < 1:
        raise StoreError(f"a sample of {sample} documents proves nothing; ask for at least 1")
    if len(folders) + len(held_out) > MOST_STORES:
        raise StoreError(f"{len(folders) + len(held_out)} stores are too many at once: give at most {MOST_STORES}")
    encoder = Tokenizer.load(tokenizer) if tokenizer else None
    stores = [TokenStore(_described(folder)) for folder in (*folders, *held_out)]
    findings: list[Finding] = []
    sound: list[tuple[TokenStore, bool]] = []
    for number, store in enumerate(stores):
        scan, damage = _scan(store, encoder, on_progress)
        findings += [Finding(store.info.name, *found) for found in _judge(store, scan, damage, most_duplicates)]
        if not damage:
            sound.append((store, number >= len(folders)))
            read_back = _read_back(store, scan, encoder, sample, on_progress)
            findings += [Finding(store.info.name, *found) for found in read_back]
    if len(sound) < len(stores):
        said = f"only the {len(sound)} sound stores of {len(stores)} were compared; mend the others and audit again"
        findings.append(Finding(BETWEEN, "shared", "note", said))
    return findings + list(_across(sound, on_progress))


def _described(folder: Path) -> StoreInfo:
    info = read_store_info(folder)
    if info.layout != "tokens":
        raise StoreError(f"{folder}: rows as they were published, without documents or digests; nothing to audit")
    return info


def describe(findings: Sequence[Finding]) -> str:
    """Findings as a table, a block a store, and how many there are of each verdict."""
    width = max(len(finding.name) for finding in findings)
    lines, last = [], ""
    for finding in findings:
        if finding.store != last:
            last = finding.store
            lines.append(f"{last}:")
        first, *more = finding.said.split("\n")
        lines.append(f"  {finding.verdict:<4}  {finding.name:<{width}}  {first}")
        lines.extend(" " * (width + 10) + line for line in more)
    counts = Counter(finding.verdict for finding in findings)
    return "\n".join([*lines, f"{counts['good']} good, {counts['note']} note, {counts['bad']} bad"])


Found = tuple[str, Verdict, str]


def _scan(store: TokenStore, encoder: Tokenizer | None, on_progress: Progress | None) -> tuple[Scan, list[str]]:
    """What the sound shards hold, and what is wrong with the others."""
    scan, damage, done = Scan(store.info.vocab_size), [], 0
    for number, shard in enumerate(store.info.shards):
        try:
            store.check_shard(number)
            scan_shard(store, number, scan)
        except StoreError as error:
            damage.append(str(error))
        done += shard.tokens
        if on_progress:
            on_progress(f"auditing {store.info.name}", done, store.tokens)
    return scan, damage


def _judge(store: TokenStore, scan: Scan, damage: list[str], most_duplicates: float) -> Iterator[Found]:
    info = store.info
    if damage:
        yield "bytes", "bad", f"{len(damage)} of {len(info.shards)} shards are damaged\n" + "\n".join(damage)
        yield "the rest", "note", "was looked at in the sound shards alone; mend the others and audit again"
    else:
        yield "bytes", "good", f"all {sum(s.bytes for s in info.shards):,} in {len(info.shards)} shards as written"
        yield _counts(info, scan)
        yield from _conservation(info)
    yield _ends(info, scan)
    if scan.max_token >= info.vocab_size:
        yield "ids", "bad", f"the largest is {scan.max_token}, and the tokenizer has {info.vocab_size}"
    elif scan.max_token != info.max_token and not damage:
        yield "ids", "bad", f"the largest is {scan.max_token}, and store.json says {info.max_token}"
    else:
        yield "ids", "good", f"from 0 to {scan.max_token}, the tokenizer has {info.vocab_size}"
    if scan.out_of_order.count:
        yield "order", "bad", f"document {scan.out_of_order.first} stands before one whose shuffle key is smaller"
    else:
        yield "order", "good", f"shuffled by (seed {info.seed}, text)"
    yield _duplicates(scan, 0 if damage else repeated_ids(store), most_duplicates)
    yield "lengths", "note", _histogram(scan)


def _counts(info: StoreInfo, scan: Scan) -> Found:
    found, said = (scan.documents, scan.tokens), (info.documents, info.tokens)
    if found != said:
        return "counts", "bad", f"(documents, tokens) are {found}, and store.json says {said}"
    return "counts", "good", f"{info.documents:,} documents, {info.tokens:,} tokens"


def _conservation(info: StoreInfo) -> Iterator[Found]:
    """In = out + rejected, by what the build counted when it read."""
    try:
        accounts = read_json(info.folder / BUILD_FILE)["accounts"]
        repeated, held_out = accounts["duplicate_ids"], accounts["held_out"]
        rejected = sum(accounts["rejected"].values())
        records, documents, tokens = accounts["records"], accounts["documents"], accounts["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        yield "in and out", "note", f"no account of what went in ({BUILD_FILE}): not compared with what is here"
        return
    folder = info.folder.resolve()
    if held_out["documents"] and not (folder.with_name(folder.name + HELD_OUT) / STORE_FILE).exists():
        said = f"{held_out['documents']:,} documents were held out; their store is not beside this one"
        yield "held out", "note", said
    parts = {"here": info.documents, "held out": held_out["documents"], "ids seen before": repeated["documents"]}
    told = " + ".join(f"{count:,} {name}" for name, count in {**parts, "rejected": rejected}.items())
    if records != sum(parts.values()) + rejected or documents != sum(parts.values()):
        yield "in and out", "bad", f"{records:,} records went in, {documents:,} of them usable, but {told}"
    elif tokens != info.tokens + held_out["tokens"] + repeated["tokens"]:
        said = f"{info.tokens:,} here, {held_out['tokens']:,} held out, {repeated['tokens']:,} left out"
        yield "in and out", "bad", f"{tokens:,} tokens were encoded, but {said}"
    else:
        yield "in and out", "good", f"{records:,} records = {told}; {tokens:,} tokens likewise"


def _ends(info: StoreInfo, scan: Scan) -> Found:
    """BOS in front of every document and EOS behind it, and nowhere else."""
    faults = []
    ends = [("BOS", info.bos, scan.without_bos), ("EOS", info.eos, scan.without_eos)]
    for name, expected, wrong in ends:
        if expected is not None and wrong.count:
            faults.append(f"{wrong.count:,} documents lack {name} ({expected}), the first is document {wrong.first}")
        same = [other for _, value, other in ends if value == expected]  # GPT-2 has one token for both ends
        due = sum(scan.documents - other.count for other in same)
        if expected is not None and (count := scan.count(expected)) != due:
            faults.append(f"{name} stands {count:,} times where {due:,} ends of documents are")
    if faults:
        return "ends", "bad", "; ".join(faults)
    said = [f"{name} {'none' if value is None else value}" for name, value in (("BOS", info.bos), ("EOS", info.eos))]
    return "ends", "good", f"{', '.join(said)}: around every document, and nowhere inside"


def _duplicates(scan: Scan, again: int, most: float) -> Found:
    """Repeated texts, and how many documents repeat an id."""
    share = scan.copies / max(scan.documents, 1)
    told = f"{again:,} documents repeat an id; " if again else ""
    told += (
        f"{scan.copies:,} of {scan.documents:,} documents repeat a text ({share:.2%}; {scan.copied_tokens:,} tokens)"
    )
    for count, number in scan.most_repeated:
        told += f"\n{count:,} times: document {number}"
    return "duplicates", "bad" if share > most or again else "good", told


def _histogram(scan: Scan) -> str:
    most = max(scan.lengths.values(), default=1)
    lines = [f"{scan.tokens / max(scan.documents, 1):,.0f} tokens a document; the longest is document "
             f"{scan.longest[1]} with {scan.longest[0]:,}"]  # fmt: skip
    for power in range(min(scan.lengths, default=0), max(scan.lengths, default=-1) + 1):
        count = scan.lengths.get(power, 0)
        bar = "#" * -(-count * BAR // most)
        lines.append(f"{1 << power:>12,} to {(2 << power) - 1:>12,}: {count:>12,} {bar}")
    return "\n".join(lines)


def _read_back(
    store: TokenStore, scan: Scan, encoder: Tokenizer | None, sample: int, on_progress: Progress | None
) -> Iterator[Found]:
    """Special tokens by name, and documents decoded and held against the hash of their text."""
    if encoder is None:
        yield "texts", "note", "not read back: name the tokenizer with --tokenizer"
        return
    if encoder.fingerprint != store.info.tokenizer:
        said = f"the store was made with tokenizer {store.info.tokenizer}, not with {encoder.fingerprint}"
        yield "tokenizer", "bad", f"{said}; name that one"
        return
    yield _special_tokens(encoder, scan)
    spelling, numbers = Spelling(encoder.token_bytes), _evenly(store.info.documents, sample)
    blank = encoder.token_bytes[int(encoder.encode_flat(["a"])[0][0])] or b""
    lost, opened, hashes = [], -1, np.empty((0, 2), np.uint64)
    for place, number in enumerate(numbers):
        tokens = _inside(store, number)
        text = spelling.spell(np.minimum(tokens, encoder.vocab_size - 1))[0]
        text = text[1:] if blank.startswith(b" ") else text
        shard, inside = store.place_of(number)
        if shard != opened:
            opened, hashes = shard, store.documents(shard).hashes
        if divmod(xxhash.xxh3_128_intdigest(text), 1 << 64) != tuple(hashes[inside].tolist()):
            lost.append(number)
        if on_progress:
            on_progress(f"reading back {store.info.name}", place + 1, len(numbers))
    if not lost:
        yield "texts", "good", f"{len(numbers):,} documents decode to exactly the texts that they were made of"
        return
    verdict: Verdict = "bad" if len(lost) > MOST_LOSSY * len(numbers) else "note"
    said = f"{len(lost):,} of {len(numbers):,} documents do not decode to their texts, the first is document {lost[0]}"
    yield "texts", verdict, f"{said} (a tokenizer may lose some characters; more than {MOST_LOSSY:.0%} is too much)"


def _special_tokens(encoder: Tokenizer, scan: Scan) -> Found:
    """How often each special token occurs; text is plain text, so only the ends of documents should be special."""
    counts = {name: scan.count(token) for name, token in encoder.special_tokens.items()}
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    unknown = scan.count(encoder.unknown) if encoder.unknown is not None else 0
    if unknown > MOST_LOSSY * scan.tokens:
        return (
            "special tokens",
            "bad",
            f"{told}: {unknown / scan.tokens:.1%} of all tokens are unknown",
        )
    return "special tokens", "good", told or "none"


def _evenly(documents: int, sample: int) -> list[int]:
    count = min(documents, sample)
    return [number * documents // count for number in range(count)]


def _inside(store: TokenStore, number: int) -> "np.typing.NDArray[np.int64]":
    """The tokens of a document without its ends."""
    tokens = store.document(number).astype(np.int64)
    start, stop = int(store.info.bos is not None), len(tokens) - int(store.info.eos is not None)
    return tokens[start:stop]


def _across(stores: Sequence[tuple[TokenStore, bool]], on_progress: Progress | None) -> Iterator[Finding]:
    """Documents that several stores have; with each store, whether it is held out."""
    if len(stores) < 2:
        return
    for (one, other), count in shared_documents([store for store, _ in stores], on_progress).items():
        names = stores[one][0].info.name, stores[other][0].info.name
        sides = stores[one][1], stores[other][1]
        if sides[0] != sides[1] and count:
            said = f"{count:,} documents are in both {names[0]} and {names[1]}: they would be trained on"
            yield Finding(BETWEEN, "held out", "bad", said)
        elif sides[0] != sides[1]:
            yield Finding(BETWEEN, "held out", "good", f"{names[0]} and {names[1]} have no document in common")
        else:
            said = f"{count:,} documents are in both {names[0]} and {names[1]}"
            yield Finding(BETWEEN, "shared", "note" if count else "good", said)
