"""What the batch script of a Slurm job runs before its ranks (`begin`) and after them (`end`).

The script survives the signals that are meant for the ranks, runs on the host even where they are in a container, and
is the only one to see how they ended: so it closes the journal where they could not, and decides how the job goes on.
"""

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from crystal_hpc.config.load import load_run
from crystal_hpc.errors import CrystalError, RunError, SlurmError
from crystal_hpc.jobs import chain, journal, slurm, submitted
from crystal_hpc.jobs.launch import read_cluster, write_launch
from crystal_hpc.jobs.place import Place, job_of
from crystal_hpc.jobs.queueing import check_path
from crystal_hpc.jobs.rank import refuse_shared
from crystal_hpc.jobs.request import NOTHING_TO_DO
from crystal_hpc.jobs.verdict import Next, Verdict, judge, nodes_to_exclude
from crystal_hpc.log import log, setup_logging

BEGIN = "batch script begins:"  # in the log, before what srun says of this start
TASK_ENDED = re.compile(r"^srun: error: (\S+): tasks? [\d,-]+: (.*)$", re.M)
BY_SIGNAL = ("Killed", "Segmentation fault", "Bus error", "Aborted")
PATIENCE_WITH_OTHERS = 600.0
PATIENCE_WITH_SLURM = 300.0
MOST_TRIES_OF_A_SIDE_JOB = 3


class Batch:
    """One start of a job, from its batch script."""

    def __init__(self, folder: Path, kind: chain.Kind, phase: str | None) -> None:
        self.folder, self.kind, self.phase = folder.resolve(), kind, phase
        self.run = load_run(self.folder / "run.yaml")
        self.cluster = read_cluster(self.folder)
        names = [named.name for named in self.run.phases]
        if phase is not None and phase not in names:
            raise RunError(f"{self.folder}: has no phase {phase!r}; choose from {', '.join(names)}")
        self.job, self.launch = job_of(os.environ)
        setup_logging(0, self.job, 0)

    def begin(self) -> int:
        """Whether the ranks may start: 0, or NOTHING_TO_DO. Raises CrystalError where they must not."""
        log.info("%s %s of %s", BEGIN, f"{self.job}.{self.launch}", self.folder)
        refuse_shared(self.folder / "logs")
        for stale in (self.folder / "logs").glob(f"{self.job}_*_result.pkl"):
            stale.unlink()  # of an earlier start: submitit would take it for this one's
        if self._is_done():
            log.info("%s is done: nothing to do", self.phase or "the run")
            self._drop_slices()
            return NOTHING_TO_DO
        if journal.cancel_marker(self.folder).exists():
            raise RunError(f"{self.folder}: was cancelled; go on with: crystal resume {self.folder}")
        stopped = submitted.stopped(self.folder)
        if stopped:
            raise RunError(f"{self.folder}: was stopped: {stopped['reason']}; then go on with: crystal resume")
        self._refuse_unfinished_before()
        if self.kind == "train":
            self._wait_for_others()
        fields = slurm.job_fields(self.job)
        ends = _unix(fields.get("EndTime", ""))
        write_launch(self.folder, f"{self.job}.{self.launch}", ends, self.cluster.signal_delay if self.cluster else 120)
        return 0

    def end(self, status: int) -> int:
        """Closes the journal and acts on the verdict; returns the job's exit code."""
        if self.kind != "train":
            return self._end_side_job(status)
        note = journal.first_error(self.folder, self.job, self.launch)
        if note and note.get("taken"):
            log.error("%s", note["reason"])
            return RunError.exit_code  # not our run: its journal and its chain are left alone
        self._close(status)
        attempts = journal.read_attempts(self.folder)
        cancelled = journal.cancel_marker(self.folder).exists()
        verdict = judge(attempts, self._is_done(), self._state(), cancelled)
        log.info("%s: %s", verdict.next.value, verdict.reason)
        return self._act(verdict, attempts)

    def _act(self, verdict: Verdict, attempts: list[journal.Entry]) -> int:
        if verdict.next is Next.DONE:
            self._drop_slices()
            return 0
        if verdict.next is Next.AGAIN:
            return self._again(nodes_to_exclude(attempts))
        if verdict.next is Next.STOP:
            submitted.stop(self.folder, verdict.reason, except_for=self.job)
        return 1

    def _again(self, excluded: list[str]) -> int:
        """On to the next slice if one waits; else this job goes back to the queue."""
        waiting = self._slices()
        if not waiting:
            try:
                slurm.requeue(self.job)
            except SlurmError as error:
                if "pending execution" in str(error):
                    return 1  # Slurm has requeued it already
                reason = f"the job cannot go on by itself: {error}; with resume_by: slices it could"
                submitted.stop(self.folder, reason, except_for=self.job)
                return 1
        if excluded:
            log.warning("keeping away from %s, which failed this run twice", ", ".join(excluded))
            everywhere = sorted({*excluded, *(self.cluster.slurm.exclude if self.cluster else [])})
            for job in {self.job if not waiting else waiting[0].array, *submitted.waiting_ids(self.folder)}:
                with contextlib.suppress(SlurmError):  # it has just started
                    slurm.exclude_nodes(job, everywhere)
        return 0

    def _slices(self) -> list[slurm.QueuedJob]:
        """What else waits to do what this job does: the next slices, of its own array and of those after it."""
        arrays = {self.job.partition("_")[0], *submitted.ids(self.folder, self.kind, self.phase)}
        return [job for job in slurm.queue(arrays) if job.state in slurm.WAITING and job.job != self.job]

    def _drop_slices(self) -> None:
        slurm.cancel({job.array for job in self._slices()}, waiting_only=True)

    def _end_side_job(self, status: int) -> int:
        if self._is_done():
            return 0
        cancelled = journal.cancel_marker(self.folder).exists()
        running = self._state() == "RUNNING"
        if running and not cancelled and self.launch + 1 < MOST_TRIES_OF_A_SIDE_JOB:
            slurm.requeue(self.job)
        elif running and not cancelled and self.kind == "stage":
            reason = f"staging of phase {self.phase} failed {self.launch + 1} times; see its log in {self.folder}/logs"
            submitted.stop(self.folder, reason, except_for=self.job)
        return status or 1

    def _state(self) -> str:
        """What Slurm says of this job; RUNNING as long as the job may still decide for itself."""
        fields = slurm.job_fields(self.job)
        state = fields.get("JobState", "UNKNOWN")
        if int(fields.get("Restarts", self.launch)) != self.launch:
            return "REQUEUED"  # a node was lost: Slurm has started the job elsewhere while this script lives on
        # Preempted without a grace time, or at the end of its time: where Slurm does not requeue the job, it still can.
        preempted = fields.get("PreemptTime", "None") != "None"
        return "RUNNING" if state in ("COMPLETING", "TIMEOUT") and (preempted or _is_used_up(fields)) else state

    def _is_done(self) -> bool:
        if self.kind == "train":
            return chain.is_trained(self.folder, self.run, self.cluster, self.phase)
        return (self.kind, self.phase) in chain.done_links(self.folder, self.run, self.cluster)

    def _refuse_unfinished_before(self) -> None:
        """Slices end with whatever befell them: a phase must look whether the one before it is really done."""
        names = [phase.name for phase in self.run.phases]
        place = names.index(self.phase) if self.phase else 0
        needed = self.run.phases[: {"train": place, "evaluate": place + 1}.get(self.kind, 0)]
        missing = [phase.name for phase in needed if not chain.is_at_end(self.folder, phase)]
        if missing:
            reason = f"phase {missing[0]} is not finished, and no job of it is left"
            if self.kind == "train":
                submitted.stop(self.folder, reason, except_for=self.job)
            raise RunError(f"{self.folder}: {reason}; go on with: crystal resume {self.folder}")

    def _wait_for_others(self) -> None:
        """Another job of this run may still be ending; two must never train at once."""
        deadline = time.monotonic() + PATIENCE_WITH_OTHERS
        while True:
            journal.settle(self.folder, (self.job, self.launch))
            open_ones = [entry for entry in journal.read_attempts(self.folder) if entry["outcome"] is None]
            others = [entry for entry in open_ones if (entry["job"], entry["launch"]) != (self.job, self.launch)]
            if not others:
                return
            if time.monotonic() > deadline:
                raise RunError(f"{self.folder}: job {others[-1]['job']} is at work on this run")
            time.sleep(1)

    def _close(self, status: int) -> None:
        """Closes this start's attempt if its ranks could not, or records one that came to nothing."""
        mine = [entry for entry in journal.read_attempts(self.folder) if self._is_mine(entry)]
        if mine and mine[-1]["outcome"] is not None and mine[-1]["outcome"] != "node_failure":
            return
        entry = mine[-1] if mine else journal.open_attempt(self.folder, self._place(), self.phase)
        note = journal.first_error(self.folder, self.job, self.launch)
        said = _last_start(self._log())
        ended = TASK_ENDED.findall(said)
        killed = [node for node, how in ended if how.startswith(BY_SIGNAL)]
        if re.search(r"oom[_-]kill", said):
            journal.close(self.folder, entry, "out_of_memory", "the kernel killed a rank that ran out of memory")
        elif killed and ended[0][0] == killed[0] and ended[0][1].startswith(BY_SIGNAL):
            # The first to go is the cause; those that srun kills because of it come later.
            reason = f"a rank on {killed[0]} was lost: {ended[0][1]}"
            journal.close(self.folder, entry, "node_failure", reason, blamed=killed[:1])
        elif note:
            journal.close_by_note(self.folder, entry, note)
            if note["hang"]:
                journal.update(self.folder, entry, blamed=journal.silent_nodes(self.folder, entry))
        elif mine:
            journal.close(self.folder, entry, "node_failure", f"the ranks vanished; srun's exit code was {status}")
        elif status == 0 or status > 128:
            journal.close(self.folder, entry, "preempted", "told to leave before the ranks had begun")
        else:
            reason = f"the ranks did not start: srun's exit code was {status}; see {self._log()}"
            journal.close(self.folder, entry, "code_error", reason)

    def _is_mine(self, entry: journal.Entry) -> bool:
        return (entry["executor"], entry["job"], entry["launch"]) == ("slurm", self.job, self.launch)

    def _place(self) -> Place:
        ranks = int(os.environ.get("SLURM_NTASKS", 1))
        return Place("slurm", self.job, self.launch, 0, ranks, 0, os.environ.get("SLURMD_NODENAME"), "")

    def _log(self) -> Path:
        """Where srun's own words are: the output of this script, and so of this process."""
        return Path("/proc/self/fd/2").resolve()


def prepare_by_hand(config: Path, overrides: list[str]) -> Path:
    """The run folder for a script that a user gave to sbatch; $CRYSTAL_RUNS is the folder of all runs.

    Its job joins those of the run: `crystal status` and `crystal cancel` know it.
    """
    from crystal_hpc.jobs.submit import prepare

    run, runs = load_run(config, overrides), Path(os.environ.get("CRYSTAL_RUNS", "runs"))
    check_path((runs / run.name).resolve())
    folder = prepare(run, None, runs)
    job = job_of(os.environ)[0].partition("_")[0]
    if job not in submitted.ids(folder, "train", None):  # else it is a later start, or slice, of the same submission
        submitted.clear(folder)
        slices = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1))
        submitted.add_job(folder, {"id": job, "kind": "train", "phase": None, "slices": slices, "dependency": None})
    return folder


def again() -> int:
    """Puts a job without a run, such as a build, back into the queue if it was preempted or has had all its time."""
    job = job_of(os.environ)[0]
    setup_logging(0, job, 0)
    fields = slurm.job_fields(job)
    if fields.get("PreemptTime", "None") != "None" or _is_used_up(fields):
        log.info("going on from what is finished when Slurm starts job %s again", job)
        slurm.requeue(job)
    return 0


def _last_start(log_file: Path) -> str:
    """What the log says of this start: requeued jobs append to it."""
    return _tail(log_file).rpartition(BEGIN)[2]


def _tail(path: Path, within: int = 1 << 18) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - within))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _is_used_up(fields: dict[str, str]) -> bool:
    """Whether a job has had the whole of its time limit (a cancelled one has not, though it has an EndTime)."""
    started, limit = _unix(fields.get("StartTime", "")), slurm.seconds(fields.get("TimeLimit", ""))
    return started is not None and limit is not None and time.time() >= started + limit


def _patiently(act: Callable[[], int]) -> int:
    """Acts until slurmctld answers: a run must not end because Slurm restarts just then."""
    deadline = time.monotonic() + PATIENCE_WITH_SLURM
    while True:
        try:
            return act()
        except SlurmError as error:
            if time.monotonic() > deadline or not re.search(r"contact slurm controller|no answer", str(error)):
                raise
            log.warning("%s; trying again", error)
            time.sleep(5)


def _unix(text: str) -> float | None:
    """A time as scontrol shows it (2026-11-23T08:13:06), in Unix seconds; None for Unknown."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


def main() -> int:
    """`prepare`, `begin`, `end` or `again`, as the batch script says."""
    parser = argparse.ArgumentParser(description="Before and after the ranks of a job; run by its batch script.")
    parser.add_argument("word", choices=["prepare", "begin", "end", "again"])
    parser.add_argument("folder", type=Path, nargs="?", help="the run's folder; for `prepare`, its config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for `prepare`")
    parser.add_argument("--kind", choices=["stage", "train", "evaluate"], default="train")
    parser.add_argument("--phase")
    parser.add_argument("--status", type=int, default=0)
    options = parser.parse_args()
    try:
        if options.word == "again":
            return _patiently(again)
        if options.word == "prepare":
            print(prepare_by_hand(options.folder, options.overrides))
            return 0
        batch = Batch(options.folder, options.kind, options.phase)
        return _patiently(batch.begin if options.word == "begin" else lambda: batch.end(options.status))
    except CrystalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
