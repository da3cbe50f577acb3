"""Trains a lossless byte-fallback BPE tokenizer on a corpus.

The folder written can be given to build_store.py and to transformers. Crystal's 22 special tokens come on top of the
vocabulary asked for. All of the files is read: give a sample of a large corpus.

    python tools/train_tokenizer.py corpus/prose.jsonl corpus/code.jsonl --vocab-size 4096 --out tokenizer/
"""

import argparse
from pathlib import Path

from crystal_hpc.data.tokenizer import train_tokenizer
from crystal_hpc.progress import run, shown_progress


def main() -> int:
    """Trains the tokenizer that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="files or folders: JSON Lines, Parquet, text")
    parser.add_argument("--out", required=True, type=Path, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, help="tokens before the special ones (default: 32000)"
    )
    arguments = parser.parse_args()
    with shown_progress() as on_progress:
        tokenizer = train_tokenizer(arguments.inputs, arguments.out, arguments.vocab_size, on_progress)
    print(f"{arguments.out}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    run(main)
