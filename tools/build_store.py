"""Encodes JSON Lines files into a token store (HDF5 shards), shuffled by (seed, document).

Each line is a JSON object with a `text`. Stop it at any time, with Ctrl-C, SIGTERM or a power cut: the same command
goes on from the finished shards. Exit code 0 when the store is complete, 2 when something is wrong with what was asked
for, 3 when stopped before the end.

    python tools/build_store.py corpus/code.jsonl --tokenizer tokenizer/ --out stores/code
    python tools/build_store.py corpus/*.jsonl --tokenizer tokenizer.json --out stores/all --seed 7 --fresh
"""

import argparse
import sys
from pathlib import Path

from crystal_hpc.progress import run, shown_progress, stop_on_signals


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="JSON Lines files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the store")
    parser.add_argument("--tokenizer", required=True, type=Path, help="a tokenizer.json or the folder with one")
    parser.add_argument("--name", help="the store's name (default: the folder's)")
    parser.add_argument("--seed", type=int, default=1, help="of the shuffle (default: 1)")
    parser.add_argument("--no-bos", action="store_true", help="put no BOS in front of each document")
    parser.add_argument("--no-eos", action="store_true", help="put no EOS behind each document")
    parser.add_argument("--shard-bytes", type=int, default=64_000_000, help="text in a shard (default: 64,000,000)")
    parser.add_argument("--most-rejected", type=float, default=0.01, help="share of bad lines allowed (default: 0.01)")
    parser.add_argument("--fresh", action="store_true", help="delete a store that is already there first")
    return parser.parse_args()


def main() -> int:
    """Builds the store that the command line asks for; returns the exit code."""
    arguments = parse()
    should_stop = stop_on_signals()
    from crystal_hpc.data.build import build_store  # late: --help and the signals come first

    with shown_progress() as on_progress:
        info = build_store(
            arguments.inputs,
            arguments.out,
            arguments.tokenizer,
            name=arguments.name,
            seed=arguments.seed,
            bos=not arguments.no_bos,
            eos=not arguments.no_eos,
            shard_bytes=arguments.shard_bytes,
            most_rejected=arguments.most_rejected,
            fresh=arguments.fresh,
            on_progress=on_progress,
            should_stop=should_stop,
        )
    if info is None:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 3
    rejected = f", rejected lines: {dict(info.rejected)}" if info.rejected else ""
    print(f"{arguments.out}: {info.tokens:,} tokens, {info.documents:,} documents, {len(info.shards)} shards{rejected}")
    return 0


if __name__ == "__main__":
    run(main)
