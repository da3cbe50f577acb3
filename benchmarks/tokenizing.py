"""Claim: documents become a finished, shuffled store at least 5 times as fast as Megatron's own tool makes its files.

Same JSON Lines, same tokenizer, BOS before and EOS behind every document, the same two cores, and identical ids: the
documents of all outputs are compared, as multisets, since ours and datatrove's are shuffled. The named peers:

(a) `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` fed by Hugging Face's `tokenizers`, which is what
    Megatron's `tools/preprocess_data.py` does: with a pool of workers that encode document by document, as there, and
    with one loop over `encode_batch`, in batches of several sizes, on the library's own threads. The fastest counts.
(b) datatrove's pipeline: JsonlReader, DocumentTokenizer, then DocumentTokenizerMerger, which finishes the shuffle. It
    is measured where it is installed (`pip install datatrove`).

    python benchmarks/tokenize.py [--megabytes 150] [--turns 2] [--tokenizer FILE] [--corpus FOLDER] [--json FILE]

The corpus is harvested from the Python installation unless a folder of .jsonl files is given. The clock of each, in a
process of its own, starts when its libraries are imported and the corpus is in the page cache, and includes the start
of its workers; the best of its turns counts. Exit code 0 if (a) / ours is 5 or more and the ids agree, else 1.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash
from tokenizers.processors import TemplateProcessing

from crystal_hpc.data.build import build_store
from crystal_hpc.data.catalog import read_tokenizer_json
from crystal_hpc.data.harvest import harvest
from crystal_hpc.data.store import TokenStore
from crystal_hpc.data.tokenizer import Tokenizer, train_tokenizer
from crystal_hpc.files import read_json

AIM = 5.0
CORES = 2
FILES = 8
BATCHES = 100, 1000  # documents
CHUNK = 32  # documents handed to a worker at a time: as in Megatron's tool
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "crystal_tokenizer.json"
OURS, LOOP, POOL, DATATROVE = "ours", "megatron, loop", "megatron, pool", "datatrove"

Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=150, help="of text to harvest (default: 150)")
    parser.add_argument("--turns", type=int, default=2, help="of each contender (default: 2)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: Crystal's, or one trained here)")
    parser.add_argument("--corpus", type=Path, help="a folder of .jsonl files to take instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)  # what this script starts in processes
    arguments = parser.parse_args()
    if arguments.contender:
        name, folder = arguments.contender
        print(json.dumps(_measure(name, Path(folder), arguments.corpus)))
        return 0
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = arguments.corpus or _make_corpus(folder / "corpus", arguments.megabytes)
        _make_tokenizer(folder, corpus, arguments.tokenizer)
        figures = _compare(folder, corpus, arguments.turns)
    _show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["ratio"] >= AIM and figures["identical"] else 1


def _make_corpus(folder: Path, megabytes: int) -> Path:
    """Prose and code in some files of about the same size; repeated, with other first lines, if there is too little."""
    harvest(folder / "harvest", megabytes * 3 // 4 * 1_000_000, held_out=0)
    lines = [path.read_bytes().split(b"\n") for path in sorted(folder.glob("harvest/*.jsonl"), reverse=True)]
    texts = [json.loads(line)["text"] for several in lines for line in several if line]
    left, copy = megabytes * 1_000_000, 0
    files = [open(folder / f"part-{number}.jsonl", "w") for number in range(FILES)]  # noqa: SIM115 (closed below, all at once)
    while left > 0:
        for number, text in enumerate(f"copy {copy}\n{text}" if copy else text for text in texts):
            if "\0" not in text and left > 0:  # which we reject
                files[number % FILES].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                left -= len(text.encode())
        copy += 1
    if copy > 1:
        print(f"this installation has too little text: all of it {copy} times, with a line before each document")
    for file in files:
        file.close()
    return folder


def _make_tokenizer(folder: Path, corpus: Path, given: Path | None) -> None:
    """Writes tokenizer.json for us, and peer.json: the same for libraries that would take "<s>" in a text for BOS."""
    source = given or (SHARED if SHARED.exists() else None)
    if source is None:
        print("no tokenizer given: one is trained on the corpus, which Hugging Face's engine may have to encode")
        train_tokenizer(sorted(corpus.glob("*.jsonl"))[:1], folder / "trained", 32000)
        source = folder / "trained"
    value = read_tokenizer_json(source)
    (folder / "tokenizer.json").write_text(json.dumps(value))
    ours = Tokenizer.load(folder / "tokenizer.json")
    ends = {"<begin>": ours.bos, "<end>": ours.eos}
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["special"]]
    value["post_processor"] = None
    library = tokenizers.Tokenizer.from_str(json.dumps(value))
    library.post_processor = TemplateProcessing("<begin> $A <end>", special_tokens=[*ends.items()])
    library.save(str(folder / "peer.json"))


def _compare(folder: Path, corpus: Path, turns: int) -> Figures:
    """Lets all contenders take turns, and compares what they wrote."""
    names = [OURS, *(f"{LOOP} {size}" for size in BATCHES), POOL]
    if importlib.util.find_spec("datatrove"):
        names.append(DATATROVE)
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    outputs = {}
    for turn in range(turns):
        if turn == 1:  # of the variants of (a), only the fastest goes on
            quick = min((name for name in names if name.startswith("megatron")), key=lambda name: runs[name][0]["wall"])
            names = [name for name in names if name == quick or not name.startswith("megatron")]
        for name in names:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                runs[name].append(_start(name, folder, Path(place), corpus))
                if turn == 0:
                    outputs[name] = _documents(name, Path(place))
    best = {name: min(several, key=lambda found: found["wall"]) for name, several in runs.items()}
    peer = min((name for name in best if name.startswith("megatron")), key=lambda name: best[name]["wall"])
    return {
        "bytes": sum(path.stat().st_size for path in corpus.glob("*.jsonl")),
        "documents": outputs[OURS].total(),
        "tokens": best[OURS]["tokens"],
        "identical": all(found == outputs[OURS] for found in outputs.values()),
        "peer": peer,
        "ratio": best[peer]["wall"] / best[OURS]["wall"],
        "ratio of processor time": best[peer]["processor"] / best[OURS]["processor"],
        "ratio of datatrove": best[DATATROVE]["wall"] / best[OURS]["wall"] if DATATROVE in best else None,
        "best": best,
        "runs": runs,
    }


def _start(name: str, folder: Path, place: Path, corpus: Path) -> Figures:
    """One turn of a contender, in a process of its own."""
    for file in ("tokenizer.json", "peer.json"):
        os.link(folder / file, place / file)
    words = [sys.executable, "-W", "ignore", __file__, "--contender", name, str(place), "--corpus", str(corpus)]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    found: Figures = json.loads(said.splitlines()[-1])
    return found


def _measure(name: str, place: Path, corpus: Path) -> Figures:
    files = sorted(corpus.glob("*.jsonl"))
    for file in files:
        file.read_bytes()  # into the page cache
    kind, _, size = name.rpartition(" ") if name.startswith(LOOP) else (name, "", "0")
    run = {OURS: _ours, LOOP: _loop(int(size)), POOL: _pool, DATATROVE: _datatrove}[kind]
    if name.startswith("megatron"):
        import megatron.core.datasets.indexed_dataset  # noqa: F401 (is it there?)
    if name == DATATROVE:
        import datatrove.executor
        import datatrove.pipeline.readers
        import datatrove.pipeline.tokens  # noqa: F401 (is it there?)
    busy, started = _processor_time(), time.perf_counter()
    extra = run(files, place)
    wall = time.perf_counter() - started
    return {"wall": wall, "processor": _processor_time() - busy, **extra}


def _processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used)


def _ours(files: list[Path], place: Path) -> Figures:
    marks: list[tuple[str, float]] = []

    def note(what: str, done: int, total: int, note: str = "") -> None:
        if not marks or what != marks[-1][0]:
            marks.append((what, time.perf_counter()))

    started = time.perf_counter()
    info = build_store(files, place / "out", place / "tokenizer.json", workers=CORES, on_progress=note)
    assert info
    laps = [("starting", started), *marks, ("", time.perf_counter())]
    stages: Counter[str] = Counter()
    for (what, begun), (_, ended) in pairwise(laps):
        stages[what] += ended - begun  # type: ignore[assignment]
    return {"stages": stages, "tokens": info.tokens, "engine": read_json(place / "out" / "build.json")["engine"]}


def _loop(size: int) -> Callable[[list[Path], Path], Figures]:
    def run(files: list[Path], place: Path) -> Figures:
        library = tokenizers.Tokenizer.from_file(str(place / "peer.json"))
        builder = _builder(place)
        for path in files:
            with open(path) as lines:
                while batch := [json.loads(line)["text"] for line in islice(lines, size)]:
                    for encoding in library.encode_batch(batch):
                        ids = encoding.ids
                        builder.add_document(ids, [len(ids)])
        builder.finalize(str(place / "out.idx"))
        return {}

    return run


def _builder(place: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    return IndexedDatasetBuilder(str(place / "out.bin"), dtype=np.uint16 if _is_small(place) else np.int32)


def _is_small(place: Path) -> bool:
    return Tokenizer.load(place / "tokenizer.json").vocab_size <= 1 << 16


_library: tokenizers.Tokenizer  # of a worker


def _begin_worker(tokenizer: str) -> None:
    global _library
    _library = tokenizers.Tokenizer.from_file(tokenizer)


def _encode_line(line: str) -> list[int]:
    ids: list[int] = _library.encode(json.loads(line)["text"]).ids
    return ids


def _pool(files: list[Path], place: Path) -> Figures:
    builder = _builder(place)
    with Pool(CORES, _begin_worker, (str(place / "peer.json"),)) as workers:
        for path in files:
            with open(path) as lines:
                for ids in workers.imap(_encode_line, lines, CHUNK):
                    builder.add_document(ids, [len(ids)])
        workers.close()
        workers.join()
    builder.finalize(str(place / "out.idx"))
    return {}


def _datatrove(files: list[Path], place: Path) -> Figures:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    encoder = DocumentTokenizer(str(place / "encoded"), str(place / "peer.json"), seed=1)
    steps = [JsonlReader(str(files[0].parent), glob_pattern="*.jsonl"), encoder]
    # Forked: it starts sooner than by default, and its processor time counts here.
    LocalPipelineExecutor(steps, tasks=CORES, workers=CORES, logging_dir=str(place / "log1"), start_method="fork").run()
    merger = DocumentTokenizerMerger(str(place / "encoded"), str(place / "out"), "all", seed=1, progress=False)
    LocalPipelineExecutor([merger], tasks=1, logging_dir=str(place / "log2")).run()
    return {}


def _documents(name: str, place: Path) -> Counter[bytes]:
    """The digests of all documents that a contender wrote, each over its ids."""
    return Counter(xxhash.xxh3_128_digest(ids.astype(np.uint32).tobytes()) for ids in _read(name, place))


def _read(name: str, place: Path) -> Iterator[Any]:
    if name == OURS:
        store = TokenStore.open(place / "out")
        start = 0
        for shard, info in enumerate(store.info.shards):
            tokens = store.read(start, info.tokens)
            yield from np.split(tokens, store.documents(shard).offsets[1:-1])
            start += info.tokens
    elif name == DATATROVE:
        for path in sorted((place / "out").glob("*.ds")):
            ids = np.fromfile(path, np.uint16 if _is_small(place) else np.uint32)
            yield from np.split(ids, np.fromfile(f"{path}.index", np.int64)[:-1])
    else:
        with warnings.catch_warnings(action="ignore"):
            from megatron.core.datasets.indexed_dataset import IndexedDataset

        yield from IndexedDataset(str(place / "out"))


def _show(figures: Figures) -> None:
    megabytes, tokens, best = figures["bytes"] / 1e6, figures["tokens"], figures["best"]
    print(f"{megabytes:.0f} MB of JSON Lines, {figures['documents']} documents, {tokens} tokens, {CORES} cores")
    print(f"{'':<24}{'wall':>9}{'MB/s':>8}{'tokens/s':>12}{'processor':>11}")
    for name, found in best.items():
        rates = f"{megabytes / found['wall']:>8.1f}{tokens / found['wall']:>12.0f}"
        print(f"{name:<24}{found['wall']:>7.2f} s{rates}{found['processor']:>9.2f} s")
    stages = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in best[OURS]["stages"].items())
    print(f"ours, by stage: {stages}; engine: {best[OURS]['engine']['engine']}")
    print(f"ids of all outputs {'are identical' if figures['identical'] else 'DIFFER'}")
    ratio, busy = figures["ratio"], figures["ratio of processor time"]
    print(f"(a) {figures['peer']} / ours: {ratio:.2f}, by processor time {busy:.2f}; aim: {AIM:g} or more")
    if figures["ratio of datatrove"]:
        print(f"(b) datatrove / ours: {figures['ratio of datatrove']:.2f}")
    else:
        print("(b) datatrove was not measured: it is not installed (pip install datatrove)")


if __name__ == "__main__":
    sys.exit(main())
