"""The command line: parse, call one function, print.

Imports of the package are inside the commands, because `crystal --help` and `crystal plan` must answer at once on a
login node, without torch. A user's mistake is printed as it stands and ends with exit code 2.
"""

import atexit
import gc
import os
import sys
from pathlib import Path
from typing import Any

import click

from crystal_hpc import __version__
from crystal_hpc.cli_checkpoints import checkpoints
from crystal_hpc.cli_data import data, with_progress
from crystal_hpc.errors import CrystalError

RUN_FOLDER = click.argument("run", type=click.Path(path_type=Path))
SETTINGS = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


class _Crystal(click.Group):
    """Prints a CrystalError without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CrystalError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Crystal, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Pretrain language models in data phases on preemptible clusters."""


@main.group()
def config() -> None:
    """Check and describe run and cluster files."""


@config.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@SETTINGS
def config_check(file: Path, overrides: tuple[str, ...]) -> None:
    """Report everything wrong with a run file; the data need not be there."""
    from crystal_hpc.config.load import load_run

    run = load_run(file, overrides)
    click.echo(f"{file}: a valid run, {run.name!r}, {len(run.phases)} phases")


@config.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@SETTINGS
def config_show(file: Path, overrides: tuple[str, ...]) -> None:
    """Print a run file with overrides and defaults filled in."""
    from crystal_hpc.config.load import dump_yaml, load_run

    click.echo(dump_yaml(load_run(file, overrides)), nl=False)


@config.command("schema")
@click.argument("kind", type=click.Choice(["run", "cluster"]), default="run")
def config_schema(kind: str) -> None:
    """Print the JSON Schema of run or cluster files, for editors."""
    import json

    from crystal_hpc.config.describe import json_schema
    from crystal_hpc.config.schema import Cluster, Run

    click.echo(json.dumps(json_schema(Run if kind == "run" else Cluster), indent=2))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@SETTINGS
@click.option("--cluster", type=click.Path(path_type=Path), help="Cluster file: its ranks, and the memory of its GPUs.")
@click.option("--memory", is_flag=True, help="Only the memory of each GPU; the data need not be there.")
def plan(file: Path, overrides: tuple[str, ...], cluster: Path | None, memory: bool) -> None:
    """Show tokens, steps and epochs by source and phase, and the memory of each GPU, before anything runs.

    Where stores are missing or do not fit, the plan comes without what depends on them, and the exit code is 2.
    """
    from crystal_hpc.config.load import check_layout, load_cluster, load_run
    from crystal_hpc.data.sources import survey_sources
    from crystal_hpc.errors import ConfigError
    from crystal_hpc.report.footprint import describe_memory
    from crystal_hpc.report.plan import describe_plan, make_plan

    run, machine = load_run(file, overrides), load_cluster(cluster) if cluster else None
    if machine:
        check_layout(run, machine)
    problems: list[str] = []
    if not memory:
        sources, problems = survey_sources(run)
        click.echo(describe_plan(run, make_plan(run, sources)) + "\n")
    click.echo(describe_memory(run, machine))
    if problems:
        raise ConfigError(problems, f"run {run.name}")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@SETTINGS
@click.option("--cluster", required=True, type=click.Path(path_type=Path), help="Cluster file, see configs/clusters.")
@click.option("--runs", type=click.Path(path_type=Path), default="runs", show_default=True, help="Folder of all runs.")
@click.option("--wait/--no-wait", default=False, help="Stay and show progress; Ctrl-C leaves the job running.")
@click.option("--dry-run", is_flag=True, help="Print the batch scripts; create and submit nothing.")
def submit(file: Path, overrides: tuple[str, ...], cluster: Path, runs: Path, wait: bool, dry_run: bool) -> None:
    """Start a run, or take it up where it stopped."""
    from crystal_hpc.config.load import load_cluster, load_run
    from crystal_hpc.jobs import submit as jobs

    machine, asked = load_cluster(cluster), load_run(file, overrides)
    if dry_run:
        for title, script in jobs.dry_run(asked, machine, runs):
            click.echo(f"##### {title}\n{script}")
        return
    folder = jobs.prepare(asked, machine, runs)
    _start(folder, machine, wait)


@main.command()
@RUN_FOLDER
@click.option("--cluster", type=click.Path(path_type=Path), help="Another cluster file than that of last time.")
@click.option("--wait/--no-wait", default=False, help="Stay and show progress; Ctrl-C leaves the job running.")
def resume(run: Path, cluster: Path | None, wait: bool) -> None:
    """Take up a run that was cancelled, stopped or lost, from its last checkpoint."""
    from crystal_hpc.jobs import submit as jobs

    folder, machine = jobs.reopen(run, cluster)
    _start(folder, machine, wait)


def _start(folder: Path, machine: Any, wait: bool) -> None:
    """Submits what is left of a prepared run, and says what to do next."""
    from crystal_hpc.jobs import journal, queueing
    from crystal_hpc.jobs import submit as jobs

    if jobs.is_finished(folder):
        click.echo(f"{folder} is finished: nothing to submit")
        return
    since = len(journal.read_attempts(folder))
    started = jobs.start(folder, machine)
    if machine.executor == "slurm":
        for warning in queueing.warnings(folder, machine):
            click.echo(f"warning: {warning}", err=True)
    ids = list(dict.fromkeys(job.job_id.partition("_")[0] for job in started))
    click.echo(f"submitted job{'s' if len(ids) > 1 else ''} {', '.join(ids)} for {folder}")
    if not wait:
        click.echo(f"watch it with: crystal status {folder}")
        return
    if not jobs.follow(folder, started, since, click.echo):
        click.echo(f"the run is not finished; see: crystal status {folder}, crystal logs {folder}", err=True)
        sys.exit(1)


@main.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--runs", type=click.Path(path_type=Path), default="runs", show_default=True, help="Folder of all runs.")
@click.option("--watch", is_flag=True, help="Show again every few seconds.")
def status(run: Path | None, runs: Path, watch: bool) -> None:
    """Show phases, jobs, attempts and progress of a run; without RUN, a line for each."""
    import time

    from crystal_hpc.jobs.status import describe_runs, describe_status

    def show() -> None:
        click.echo(describe_status(run) if run else describe_runs(runs))

    show()
    while watch:
        time.sleep(5)
        click.clear()
        show()


@main.command()
@RUN_FOLDER
@click.option("--rank", type=int, default=0, show_default=True)
@click.option("--follow", is_flag=True, help="Go on as the log grows.")
@click.option("--lines", type=int, default=40, show_default=True, help="How many of the last lines to begin with.")
def logs(run: Path, rank: int, follow: bool, lines: int) -> None:
    """Print the log of a rank of the newest job."""
    from crystal_hpc.jobs.status import log_lines

    for line in log_lines(run, rank, lines, follow):
        click.echo(line, nl=False)


@main.command()
@RUN_FOLDER
def cancel(run: Path) -> None:
    """Take the jobs of a run out of the queue; those that run save first."""
    from crystal_hpc.jobs.status import cancel as cancel_job

    click.echo(cancel_job(run))


@main.command()
@RUN_FOLDER
@click.option("--check", is_flag=True, help="Recompute from the stores which rows every step must have consumed.")
def ledger(run: Path, check: bool) -> None:
    """Show what a run consumed of each source; with --check, prove it sample by sample."""
    from crystal_hpc.report.ledger import check_ledger, describe_ledger

    click.echo(check_ledger(run) if check else describe_ledger(run))


@main.command()
@RUN_FOLDER
def report(run: Path) -> None:
    """Write RUN/report.html, one self-contained page."""
    from crystal_hpc.report.html import write_report

    click.echo(write_report(run))


main.add_command(checkpoints)
main.add_command(data)


@main.command()
@RUN_FOLDER
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/exports/PHASE-STEP.")
@click.option("--phase", help="Default: the newest checkpoint's; with --all, every phase.")
@click.option("--step", type=int, help="Default: the newest of the phase.")
@click.option("--all", "every", is_flag=True, help="Every checkpoint; those that are there already are left alone.")
@click.option("--share", metavar="I/N", help="As --all, but only every N-th one, from the I-th on (0/8 to 7/8).")
@click.option("--name", help="Of the folders in RUN/exports: 'CrystalCoder_{phase}_checkpoint_{step:06d}'.")
@click.option("--format", "kind", default="crystalcoder", show_default=True, help="Or llama, stablelm.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the weights; default: as trained.")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--overwrite", is_flag=True, help="Replace an export that is there, --skip-done or not.")
@click.option("--skip-done", is_flag=True, help="Succeed at once where this very export is there.")
@click.option(
    "--verify", type=click.Choice(["all", "weights", "none"]), default="all", show_default=True,
    help="Compare the weights as they were read and written, and the logits with Megatron's.",
)  # fmt: skip
@click.option("--no-verify", "verify", flag_value="none", help="The same as --verify none.")
@with_progress
def export(
    run: Path, out: Path | None, phase: str | None, step: int | None, every: bool, share: str | None, name: str | None,
    kind: str, dtype: Any, shard_size: str, overwrite: bool, skip_done: bool, verify: Any, on_progress: Any,
) -> None:  # fmt: skip
    """Convert a checkpoint to a Hugging Face folder; after a kill, the same command goes on."""
    if (every or share) and (out or step is not None):
        raise click.UsageError("--all and --share choose the checkpoints and the folders: without --out and --step")
    if name is not None and out:
        raise click.UsageError("--name chooses folders in RUN/exports: without --out")
    part = _parse_share(share or "0/1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison wants plain float32, on a GPU machine too
    from crystal_hpc.convert.export import Options, export_run, export_share, parse_size

    options = Options(kind, dtype, parse_size(shard_size), verify, overwrite, skip_done, name)
    if not (every or share):
        click.echo(export_run(run, out, phase, step, options, on_progress))
        return
    for said in export_share(run, part, phase, options, on_progress):
        click.echo(said)


def _parse_share(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise click.BadParameter(f"{text!r} is not like 0/8, the first of eight", param_hint="--share")
    return int(first), int(count)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", required=True)
@click.option("--tokens", type=int, default=40, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--seed", type=int, default=1, show_default=True)
def sample(folder: Path, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Continue a text with an exported model, through Transformers."""
    from crystal_hpc.convert.sample import generate

    click.echo(prompt + generate(folder, prompt, tokens, temperature, seed))


@main.command()
@click.option("--fresh", is_flag=True, help="Delete an earlier demo first; otherwise go on from it.")
def demo(fresh: bool) -> None:
    """From raw text to a trained, preempted, resumed and exported three-phase model, in a few minutes."""
    from crystal_hpc.demo import run_demo

    run_demo(fresh)


@main.command()
@click.option("--cluster", type=click.Path(path_type=Path), help="Cluster file; without it, the cluster as such.")
@click.option("--nodes", is_flag=True, help="Look at the nodes too, by a short job of the profile's size.")
@click.option("--runs", type=click.Path(path_type=Path), default="runs", show_default=True, help="Folder of all runs.")
def doctor(cluster: Path | None, nodes: bool, runs: Path) -> None:
    """Say which ways of recovery will work on this Slurm, and what to change in the profile."""
    from crystal_hpc.config.load import load_cluster
    from crystal_hpc.errors import RunError
    from crystal_hpc.jobs.doctor import describe, examine
    from crystal_hpc.jobs.probe import check_nodes

    machine = load_cluster(cluster) if cluster else None
    if nodes and machine is None:
        raise RunError("--nodes needs a profile: name one with --cluster")
    findings = examine(machine)
    if machine and nodes:
        findings += check_nodes(machine, runs.resolve())
    click.echo(describe(findings))
    sys.exit(1 if any(finding.verdict == "bad" for finding in findings) else 0)


@main.command()
@click.option("--cluster", required=True, type=click.Path(path_type=Path), help="Cluster file, executor: slurm.")
@click.option("--faults", help="Which ones, with commas between; default: all that the cluster allows.")
@click.option("--seed", type=int, default=1, show_default=True, help="Decides faults and moments.")
@click.option("--count", type=int, default=10, show_default=True, help="Faults in all.")
@click.option("--per-run", type=int, default=4, show_default=True, help="Faults, one after the other, in each run.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default="drill", show_default=True, help="On shared storage."
)
@click.option("--devcluster", type=click.Path(path_type=Path), help="Folder of a private cluster, to kill its nodes.")
def drill(
    cluster: Path, faults: str | None, seed: int, count: int, per_run: int, folder: Path, devcluster: Path | None
) -> None:
    """Inject faults into a toy run on a cluster, and prove that its weights come out the same, bit for bit."""
    from crystal_hpc.config.load import load_cluster
    from crystal_hpc.drill.rounds import drill as run_drill

    names = faults.split(",") if faults else None
    failed = run_drill(load_cluster(cluster), folder.resolve(), names, seed, count, per_run, devcluster, click.echo)
    sys.exit(1 if failed else 0)


def run() -> None:
    """The `crystal` program: `main`, made to answer at once (benchmarks/startup.py).

    No search for garbage among freshly imported modules, neither at start nor at exit, and none for pydantic's plugins
    among all installed packages: a tenth of the time of `crystal plan`, or more.
    """
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    main()


if __name__ == "__main__":
    run()
