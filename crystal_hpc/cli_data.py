"""`crystal data ...`: corpora, tokenizers and token stores. Like `cli`, it parses, calls one function and prints."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from crystal_hpc.cli_proof import audit, show, trace
from crystal_hpc.cli_stage import stage

PATH = click.Path(path_type=Path)


def with_progress(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command a progress callback `on_progress(what, done, total, note)`."""

    @wraps(command)
    def with_progress(**arguments: Any) -> None:
        from crystal_hpc.progress import shown_progress

        with shown_progress() as on_progress:
            command(on_progress=on_progress, **arguments)

    return with_progress


@click.group()
def data() -> None:
    """Make corpora, tokenizers and token stores, and prove what is in them."""


for command in (audit, show, stage, trace):
    data.add_command(command)


@data.command("corpus")
@click.option("--out", required=True, type=PATH, help="Folder for the JSONL files.")
@click.option("--bytes-per-source", type=int, default=10_000_000, show_default=True)
@click.option("--held-out", type=float, default=0.02, show_default=True, help="Share of documents kept for evaluation.")
@with_progress
def corpus(out: Path, bytes_per_source: int, held_out: float, on_progress: Any) -> None:
    """Collect a small corpus of prose and code from this Python installation."""
    from crystal_hpc.data.harvest import harvest

    for name, counts in harvest(out, bytes_per_source, held_out, on_progress).items():
        click.echo(f"{out / name}: {counts['documents']:,} documents, {counts['bytes']:,} bytes")


@data.command("tokenizer")
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--out", required=True, type=PATH, help="Folder for tokenizer.json.")
@click.option("--vocab", "vocab_size", type=int, default=32_000, show_default=True, help="Without special tokens.")
@with_progress
def tokenizer(files: tuple[Path, ...], out: Path, vocab_size: int, on_progress: Any) -> None:
    """Train a LLaMA-style BPE tokenizer on a corpus (a sample of some hundred MB is plenty)."""
    from crystal_hpc.data.tokenizer import train_tokenizer

    made = train_tokenizer(list(files), out, vocab_size, on_progress)
    click.echo(f"{out}: {made.vocab_size:,} tokens, fingerprint {made.fingerprint}")


@data.command("build")
@click.argument("corpus", nargs=-1, required=True, type=PATH)
@click.option("--tokenizer", required=True, type=PATH, help="A tokenizer.json or its folder.")
@click.option("--out", required=True, type=PATH, help="Folder of the store.")
@click.option("--name", help="The store's name; default: its folder's.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the shuffle.")
@click.option("--bos/--no-bos", default=True, help="Put BOS in front of each document.  [default: yes]")
@click.option("--eos/--no-eos", default=True, help="Put EOS behind each document.  [default: yes]")
@click.option("--text", "text_field", default="text", show_default=True, help="JSON key or Parquet column of the text.")
@click.option("--id", "id_field", default="id", show_default=True, help="Of the id; documents may lack it.")
@click.option("--language", "language_field", default="language", show_default=True, help="Likewise.")
@click.option("--path", "path_field", default="path", show_default=True, help="Likewise.")
@click.option("--format", type=click.Choice(["jsonl", "parquet", "text"]), help="Default: found out, file by file.")
@click.option("--shard-tokens", type=int, default=1 << 28, show_default=True, help="In a shard.")
@click.option("--held-out", type=float, default=0.0, show_default=True, help="Share for a store beside, OUT-held-out.")
@click.option("--most-rejected", type=float, default=0.01, show_default=True, help="Share of bad records to allow.")
@click.option("--longest", type=int, default=4 << 30, show_default=True, help="Bytes of the longest record to take.")
@click.option("--engine", type=click.Choice(["gigatoken", "tokenizers"]), help="Default: the fastest proven identical.")
@click.option("--workers", type=int, help="Processes; default: one a core, or one where many are started together.")
@click.option("--fresh", is_flag=True, help="Delete a store that is there, and start again.")
def build(
    corpus: tuple[Path, ...], tokenizer: Path, out: Path, workers: int | None, fresh: bool, **chosen: Any
) -> None:
    """Encode a corpus (JSONL, .gz, .zst, Parquet, folders of text) into a token store.

    Run the same command any number of times at once, under mpiexec, srun or as a Slurm array: they share the work. Run
    it again after a crash, and it goes on. Exit code 3 when told to stop before the end.
    """
    from crystal_hpc.data.build import Options, build_store
    from crystal_hpc.data.corpus import Fields
    from crystal_hpc.data.work import default_workers, place_among_tasks
    from crystal_hpc.progress import shown_progress, stop_on_signals

    fields = Fields(*(chosen.pop(f"{name}_field") for name in ("text", "id", "language", "path")))
    place, should_stop = place_among_tasks(os.environ), stop_on_signals()
    count = default_workers(place) if workers is None else workers
    with shown_progress(quiet=place[0] > 0) as on_progress:
        info = build_store(
            list(corpus), out, tokenizer, Options(fields=fields, **chosen), fresh=fresh, workers=count, place=place,
            on_progress=on_progress, should_stop=should_stop,
        )  # fmt: skip
    if info is None:
        click.echo("stopped; run the same command again to go on", err=True)
        sys.exit(3)
    if place[0] == 0:
        rejected = f"; rejected: {dict(info.rejected)}, see {out}/rejected.jsonl" if info.rejected else ""
        size = f"{info.documents:,} documents, {info.tokens:,} tokens, {len(info.shards)} shards"
        click.echo(f"{out}: {size}{rejected}")
        if chosen["held_out"]:
            from crystal_hpc.data.catalog import HELD_OUT, read_store_info

            apart = read_store_info(info.folder.with_name(info.folder.name + HELD_OUT))
            click.echo(f"{apart.folder}: {apart.documents:,} documents held out, {apart.tokens:,} tokens")
