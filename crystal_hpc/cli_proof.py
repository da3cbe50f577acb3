"""`crystal data audit`, `show` and `trace`: what is in stores and steps. Part of `cli_data`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
Progress = Callable[..., None]


@click.command("audit")
@click.argument("stores", nargs=-1, required=True, type=PATH)
@click.option("--tokenizer", type=PATH, help="With it, documents are decoded and held against the hash of their text.")
@click.option("--held-out", multiple=True, type=PATH, help="A store no document of which may be in the others.")
@click.option("--sample", type=int, default=1000, show_default=True, help="Documents of each store to read back.")
@click.option(
    "--most-duplicates", type=float, default=0.01, show_default=True, help="Share of repeated texts to allow."
)
@click.option("--json", "json_file", type=PATH, help="Write the findings to this file, too.")
def audit(
    stores: tuple[Path, ...], tokenizer: Path | None, held_out: tuple[Path, ...], sample: int, most_duplicates: float,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Prove what is in token stores; exit code 0 if nothing bad was found, else 1."""
    from dataclasses import asdict

    from crystal_hpc import files
    from crystal_hpc.data.audit import audit as examine
    from crystal_hpc.data.audit import describe
    from crystal_hpc.progress import shown_progress

    with shown_progress() as on_progress:
        findings = examine(
            stores, tokenizer, held_out=held_out, sample=sample, most_duplicates=most_duplicates,
            on_progress=on_progress,
        )  # fmt: skip
    if json_file:
        files.write_json(json_file, [asdict(finding) for finding in findings])
    click.echo(describe(findings))
    sys.exit(1 if any(finding.verdict == "bad" for finding in findings) else 0)


@click.command("show")
@click.argument("place", metavar="STORE|RUN", type=PATH)
@click.option("--tokenizer", type=PATH, help="Of a store; a run names its own.")
@click.option("--document", help="Of a store: a number, an id, or the hash of a text.")
@click.option("--row", type=int, help="Of a store: a row, with --length.")
@click.option("--length", type=int, default=2048, show_default=True, help="Of the row, in tokens.")
@click.option("--phase", help="Of a run: a phase, with --step.")
@click.option("--step", type=int, help="Of the phase, counted from 0.")
@click.option("--sample", type=int, help="Of the step, counted from 0; default: all.")
def show(place: Path, phase: str | None, step: int | None, sample: int | None, **of_a_store: Any) -> None:
    """Decode a document or row of a store, or the samples of a step as the model gets them."""
    from crystal_hpc.data.show import show_step, show_store
    from crystal_hpc.errors import RunError

    if phase is not None and step is not None:
        click.echo(show_step(place, phase, step, sample))
    elif phase is not None or step is not None:
        raise RunError("--phase and --step belong together: a step is counted within its phase")
    else:
        click.echo(show_store(place, **of_a_store))


@click.command("trace")
@click.argument("run", metavar="RUN", type=PATH)
@click.option("--phase", help="A phase, with --step.")
@click.option("--step", type=int, help="List the documents of this step of the phase.")
@click.option("--document", help="List the steps that read it: an id, the hash of a text, or SOURCE:NUMBER.")
def trace(run: Path, phase: str | None, step: int | None, document: str | None) -> None:
    """From a step of a run (folder or config) to its documents, or from a document to its steps."""
    from crystal_hpc.data.show import trace_document, trace_step
    from crystal_hpc.errors import RunError

    if document is not None and phase is None and step is None:
        click.echo(trace_document(run, document))
    elif document is None and phase is not None and step is not None:
        click.echo(trace_step(run, phase, step))
    else:
        raise RunError("ask either for --phase and --step, or for --document")
