"""Encodes a corpus into a token store (HDF5 shards), shuffled by (seed, document): `crystal data build` as a script.

JSON Lines (plain, .gz, .zst), Parquet, or folders of these or of text files. Stop it at any time, with Ctrl-C, SIGTERM
or a power cut: the same command goes on from the finished parts. Any number of processes share the work.

    python tools/build_store.py corpus/code.jsonl --tokenizer tokenizer/ --out stores/code
    mpiexec -n 8 python tools/build_store.py corpus/ --tokenizer tokenizer.json --out stores/all --id doc_id
"""

from crystal_hpc.cli_data import build
from crystal_hpc.progress import run

if __name__ == "__main__":
    run(build.main)
