"""submitit's Slurm executor with three things of our own: where a rank begins, slices, and refusals in full.

- Ranks start at `jobs.rank`, which holds signals back and looks at the folder before submitit unpickles anything.
- The slices of a phase are one task: pickled once, and linked for each element of the array.
- What sbatch refuses is raised as it said it.
"""

import contextlib
import io
import os
import shlex
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from crystal_hpc.errors import SlurmError

# submitit stops requeueing after 3 timeouts by default, and takes preemption for one; how long to go on is not its say.
MANY = 10**6


class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Submits tasks from a folder on shared storage."""

    def __init__(self, folder: Path, python: str, parameters: dict[str, Any]) -> None:
        super().__init__(folder, max_num_timeout=MANY, python=python)
        self.update_parameters(**parameters)

    @classmethod
    def affinity(cls) -> int:
        """Always usable: a script can be shown without Slurm, and its absence is reported by `submit`."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m crystal_hpc.jobs.rank {shlex.quote(str(self.folder))}"

    def script(self, slices: int = 1) -> str:
        """The batch script that `submit_slices` would queue."""
        if slices > 1:
            self.parameters["map_count"] = slices
        text: str = self._make_submission_file_text(self._submitit_command_str, "dry-run")
        self.parameters.pop("map_count", None)
        return text

    def submit_slices(self, task: Any, slices: int = 1) -> list[Any]:
        """Queues one job, or an array of `slices` elements that run one after the other; raises SlurmError."""
        with _only_mine(), _refusals():
            if slices == 1:
                return [self.submit(task)]
            self.folder.mkdir(parents=True, exist_ok=True)
            delayed = utils.DelayedSubmission(task)
            delayed.set_timeout(self.parameters["time"], MANY)
            pickle = self.folder / f"{uuid.uuid4().hex}.pkl"
            delayed.dump(pickle)
            self.parameters["map_count"] = slices
            try:
                first = self._submit_command(self._submitit_command_str)
            finally:
                del self.parameters["map_count"]
            ranks = list(range(first.num_tasks))
            jobs = [self.job_class(self.folder, f"{first.job_id}_{element}", ranks) for element in range(slices)]
            for job in jobs:
                os.link(pickle, job.paths.submitted_pickle)
            pickle.unlink()
            return jobs


@contextlib.contextmanager
def _only_mine() -> Iterator[None]:
    """Files made here can be written by their owner alone, whatever the umask: pickles are code."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):  # where submitit shows them too
            yield
        sys.stderr.write(heard.getvalue())  # a site's notices, where sbatch did not refuse
    except utils.FailedJobError as error:
        said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise SlurmError(said) from error
