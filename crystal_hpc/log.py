"""One logging set-up: every line says when, which job, which attempt and which rank.

Called once at the start of a task (`jobs/task`) and of the command line. Rank 0 speaks at INFO; the others only when
something is wrong, so that a log of a thousand ranks stays readable.
"""

import logging
import sys

log = logging.getLogger("crystal_hpc")


def setup_logging(rank: int = 0, job: str = "-", attempt: int = 0) -> None:
    """Sends the package's log to stderr, each line led by time, job, attempt and rank."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"job={job} attempt={attempt} rank={rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {prefix} %(message)s", "%Y-%m-%dT%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
