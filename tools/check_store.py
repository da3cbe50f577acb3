"""Checks token stores: every file there, every block of tokens as it was written.

Prints one line a store; exit code 2 at the first that is missing, half-written or damaged, with what to do about it.

    python tools/check_store.py stores/code
    python tools/check_store.py stores/*
"""

import argparse
from pathlib import Path

from crystal_hpc.data.sources import open_source, read_source_info
from crystal_hpc.progress import run, shown_progress


def main() -> int:
    """Checks the stores that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, help="folders of token stores")
    for folder in parser.parse_args().stores:
        store = open_source(read_source_info(folder))
        with shown_progress() as on_progress:
            store.check_digests(on_progress)
        info = store.info
        print(f"{folder}: good; {info.tokens:,} tokens in {len(info.shards)} shards, digest {info.digest}")
    return 0


if __name__ == "__main__":
    run(main)
