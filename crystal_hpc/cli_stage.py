"""`crystal data stage`: training data brought to this node's own disk by hand.

A profile with `staging:` has it done by the job itself. Under mpiexec or srun, one process a node, the processes read
shared storage once between them.
"""

import sys
from pathlib import Path
from typing import Any

import click


@click.command("stage")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--phase", required=True, help="Whose data.")
@click.option("--folder", default="$CRYSTAL_SCRATCH", show_default=True, help="The node's own disk.")
@click.option("--mode", type=click.Choice(["whole", "slice"]), default="whole", show_default=True)
@click.option("--steps", metavar="A-B", help="With slice: steps A to B-1 of the phase.  [default: all]")
@click.option("--rank", type=int, default=0, show_default=True, help="With slice: the data-parallel rank ...")
@click.option("--size", type=int, default=1, show_default=True, help="... of so many.")
def stage(run: Path, phase: str, folder: str, mode: str, steps: str | None, rank: int, size: int) -> None:
    """Copy the stores of a phase of RUN, or cut the slice of some steps, to this node's disk.

    Run again, it goes on where it was. Exit code 3: told to stop before the end.
    """
    from crystal_hpc.comm import my_comm
    from crystal_hpc.jobs import local_disk
    from crystal_hpc.log import setup_logging
    from crystal_hpc.progress import shown_progress, stop_on_signals

    should_stop, comm = stop_on_signals(), my_comm()
    setup_logging(comm.rank, "stage")
    with shown_progress(quiet=comm.rank > 0) as on_progress:
        arguments: dict[str, Any] = {"should_stop": should_stop, "on_progress": on_progress}
        if mode == "whole":
            done = local_disk.copy_stores(run, phase, folder, comm, **arguments)
        else:
            done = local_disk.cut_slice(run, phase, folder, steps, (rank, size), **arguments)
    if not done:
        click.echo("stopped before the end; the same command goes on", err=True)
        sys.exit(local_disk.STOPPED)
