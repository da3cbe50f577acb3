"""The first thing a rank of a Slurm job runs: `python -m crystal_hpc.jobs.rank`.

Signals are held back at once, before anything is imported, until the task's own handlers stand. Then the folder is
looked at: submitit's pickles are code, so nobody else may have been able to put one there.
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))

import argparse  # noqa: E402
import os  # noqa: E402
import stat  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from crystal_hpc.errors import CrystalError, RunError  # noqa: E402


def refuse_shared(folder: Path) -> None:
    """Raises RunError if anybody but this user could have changed what lies in a folder, or below which it lies."""
    for path in (folder, *folder.parents[:2]):
        about = path.stat()
        if about.st_mode & stat.S_IWOTH and not about.st_mode & stat.S_ISVTX:
            raise RunError(f"{path}: others can write to it, and what lies there is run as code; chmod o-w {path}")
    for path in folder.glob("*_submitted.pkl"):
        about = path.stat()
        if about.st_uid not in (os.geteuid(), 0) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RunError(f"{path}: not yours alone, and it would be run as code; submit the run again")


def main() -> int:
    """A task of submitit's, or, in a script submitted by hand, one on a run folder."""
    parser = argparse.ArgumentParser(description="A rank of a job; started by srun.")
    parser.add_argument("folder", type=Path, help="submitit's folder; with one of these, a run folder:")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--train", action="store_true", help="train the run to its end")
    kinds.add_argument("--stage", metavar="PHASE", help="read the stores of a phase against their digests")
    kinds.add_argument("--evaluate", metavar="PHASE", help="held-out losses at the end of a phase")
    kinds.add_argument("--copy", metavar="PHASE", nargs="?", const="", help="copy the stores of a phase to this node")
    options = parser.parse_args()
    try:
        refuse_shared(options.folder)
    except CrystalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    folder = options.folder.resolve()
    if options.train:
        from crystal_hpc.jobs.task import TrainTask

        TrainTask(folder)()
    elif options.copy is not None:
        from crystal_hpc.jobs.local_disk import CopyTask

        return CopyTask(folder, options.copy or None)()
    elif options.stage or options.evaluate:
        from crystal_hpc.jobs.side import EvaluateTask, StageTask

        (StageTask(folder, options.stage) if options.stage else EvaluateTask(folder, options.evaluate))()
    else:
        from submitit.core.submission import process_job

        process_job(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
