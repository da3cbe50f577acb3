"""`crystal checkpoints`: what a run has saved, and why it is still there. Like `cli`, it parses, calls and prints."""

import sys
from pathlib import Path
from typing import Any

import click


@click.command("checkpoints")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read all files against their digests; exit code 1 if some are damaged.")
@click.option("--prune", "pruning", is_flag=True, help="Delete those that no rule keeps.")
@click.option("--dry-run", is_flag=True, help="With --prune: only say which.")
@click.option("--keep", "kept", metavar="PHASE/STEP", help="Never delete this one; with --name.")
@click.option("--name", help="What it is kept as.")
@click.option("--drop-name", "dropped", metavar="PHASE/STEP", help="Take the name away; the rules hold again.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def checkpoints(
    run: Path, verify: bool, pruning: bool, dry_run: bool, kept: str | None, name: str | None, dropped: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """List the checkpoints of a run: when and why saved, whether verified, why kept.

    Works while a job runs: what that still needs is never deleted or moved.
    """
    from crystal_hpc.errors import RunError
    from crystal_hpc.progress import shown_progress
    from crystal_hpc.report import checkpoints as report
    from crystal_hpc.train import generations, retention

    if (kept is None) != (name is None):
        raise RunError("--keep and --name belong together: crystal checkpoints RUN --keep PHASE/STEP --name NAME")
    if dry_run and not pruning:
        raise RunError("--dry-run says what --prune would delete: give both")
    config = report.open_run(run)

    def say(line: str) -> None:
        click.echo(line, err=as_json)

    if kept is not None and name is not None:
        generations.keep(report.find_generation(run, config, kept).folder, name)
    if dropped is not None:
        generations.unkeep(report.find_generation(run, config, dropped).folder)
    bad: report.Damage = []
    if verify:
        with shown_progress() as on_progress:
            bad = report.verify(run, config, say, on_progress)
    gone = retention.prune(run, config, dry_run, say) if pruning else []
    listing = report.list_checkpoints(run, config)
    if as_json:
        _print_json(listing, bad if verify else None, [one.label for one in gone])
    else:
        _print(listing, bad)
    sys.exit(1 if bad else 0)


def _print(listing: Any, bad: list[tuple[str, list[str]]]) -> None:
    from crystal_hpc.report import checkpoints as report

    rows = report.table_rows(listing)
    if rows and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in report.COLUMNS:
            table.add_column(column, justify="right" if column in report.NUMBERS else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # a name may look like markup
        Console().print(table)
    elif rows:
        click.echo(report.describe_table(rows))
    click.echo(report.describe_rest(listing))
    for label, findings in bad:
        click.echo(f"bad: {label}: {'; '.join(findings)}", err=True)
    if bad:
        click.echo(
            "nothing was moved, because a running job may hold it; a start of the run quarantines a damaged checkpoint "
            "before it would use it, and takes the one before",
            err=True,
        )


def _print_json(listing: Any, bad: list[tuple[str, list[str]]] | None, gone: list[str]) -> None:
    import json
    from dataclasses import asdict

    said = {**asdict(listing), "bytes": listing.bytes, "deleted": gone, "bad": None if bad is None else dict(bad)}
    click.echo(json.dumps(said, indent=2))
