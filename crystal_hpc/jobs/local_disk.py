"""Training data on the nodes' own disks: what a job does about it before and while it trains (`staging:` in a profile).

Mode `whole`: one process a node copies the stores of the phase, in a step of srun's before the ranks (`request`), or in
the first rank of a local job; the ranks then read the copies. Mode `slice`: a helper process of the ranks prepares the
rows of the next steps (`data.slices`). Whatever goes wrong with it is a warning: shared storage has everything.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crystal_hpc.comm import BytesComm, SoloComm, my_comm
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run, Staging
from crystal_hpc.data.catalog import StoreInfo
from crystal_hpc.errors import ConfigError, CrystalError, RunError
from crystal_hpc.jobs.chain import is_at_end
from crystal_hpc.jobs.launch import read_cluster, read_launch
from crystal_hpc.jobs.place import my_place
from crystal_hpc.jobs.request import STOPPED as STOPPED
from crystal_hpc.log import log, setup_logging
from crystal_hpc.progress import Progress
from crystal_hpc.train.preemption import Stop, watch

if TYPE_CHECKING:
    from crystal_hpc.data.preparing import PreparedRows
    from crystal_hpc.data.rows import RowSource
    from crystal_hpc.data.sources import Sources


def read_staging(folder: Path) -> Staging | None:
    """What the profile that the run was submitted with says; for a job submitted by hand, CRYSTAL_STAGING's mode."""
    cluster = read_cluster(folder)
    if cluster is not None:
        return cluster.staging
    mode = os.environ.get("CRYSTAL_STAGING")
    if not mode:
        return None
    if mode not in ("whole", "slice"):
        raise ConfigError(f"CRYSTAL_STAGING: {mode!r} is neither `whole` nor `slice`")
    return Staging.model_validate({"mode": mode})


def stores_of(run: Run, infos: dict[str, StoreInfo], phases: Iterable[str]) -> list[StoreInfo]:
    """The stores that phases read. Published rows are files of another kind, and stay where they are."""
    names = dict.fromkeys(
        name for phase in run.phases if phase.name in phases for name, weight in phase.mixture.items() if weight > 0
    )
    return [infos[name] for name in names if infos[name].layout == "tokens"]


def copy_stores(
    run_folder: Path,
    phase: str | None,
    scratch: str,
    comm: BytesComm,
    should_stop: Callable[[], bool],
    on_progress: Progress | None = None,
) -> bool:
    """Copies the stores of a phase (None: of all that are not done) to every node; whether it came to the end.

    Raises CrystalError, on all ranks, where it cannot be done.
    """
    from crystal_hpc.data.copying import Stopped, together
    from crystal_hpc.data.scratch import scratch_folder
    from crystal_hpc.data.sources import read_sources
    from crystal_hpc.data.staging import stage_stores

    run = load_run(run_folder / "run.yaml")
    if phase is not None:
        _phase_number(run_folder, run, phase)
    phases = [phase] if phase else [named.name for named in run.phases if not is_at_end(run_folder, named)]

    try:
        place = together(comm, lambda: scratch_folder(scratch), should_stop)
        infos = together(comm, lambda: read_sources(run).training, should_stop)
    except Stopped:
        return False
    staged = stage_stores(stores_of(run, infos, phases), place, comm, should_stop, on_progress)
    told = comm.gather((os.uname().nodename, str(place), staged.read, staged.copied, staged.kept))
    for node, where, read, copied, kept in told if comm.rank == 0 else ():
        done = "stopped before the end" if staged.stopped else "staged"
        log.info("%s: %s in %s: %d bytes copied, %d kept, %d read here", done, node, where, copied, kept, read)
    return not staged.stopped


def cut_slice(
    run_folder: Path,
    phase: str,
    scratch: str,
    steps: str | None,
    share: tuple[int, int],
    should_stop: Callable[[], bool],
    on_progress: Progress,
) -> bool:
    """Cuts one slice by hand: steps `A-B` (A to B-1; None: all) for data-parallel rank share[0] of share[1].

    Returns whether it came to the end. Raises CrystalError.
    """
    from crystal_hpc.data.scratch import scratch_folder
    from crystal_hpc.data.slices import hold, make_cut, open_reading, write_slice
    from crystal_hpc.data.sources import read_sources

    run = load_run(run_folder / "run.yaml")
    number = _phase_number(run_folder, run, phase)
    first, stop = _steps(steps, derive.phase_steps(run.phases[number]))
    if not 0 <= share[0] < share[1] or run.phases[number].batch_size % (share[1] * run.parallel.micro_batch):
        raise RunError(f"rank {share[0]} of {share[1]}: the batches of phase {phase!r} are not shared out like that")
    sources, place = read_sources(run), scratch_folder(scratch)
    cut = make_cut(run, sources, number, *share, span=max(1, stop - first))

    def go_on(step: int) -> bool:
        on_progress("cutting", step - first, stop - first)
        return not should_stop()

    held = hold(cut, place)
    path = write_slice(cut, place, first, stop, open_reading(run, sources, number), go_on)
    held.release()
    if path is not None:
        log.info("steps %d to %d of phase %s are in %s: %d bytes", first, stop - 1, phase, path, path.stat().st_size)
    return path is not None


def _phase_number(run_folder: Path, run: Run, phase: str) -> int:
    names = [named.name for named in run.phases]
    if phase not in names:
        raise RunError(f"{run_folder}: has no phase {phase!r}; choose from {', '.join(names)}")
    return names.index(phase)


def _steps(asked: str | None, length: int) -> tuple[int, int]:
    """First step and the one after the last."""
    if asked is None:
        return 0, length
    found = re.fullmatch(r"(\d+)-(\d+)", asked)
    if not found or not int(found[1]) < int(found[2]) <= length:
        raise RunError(f"--steps {asked}: write FIRST-STOP, such as 0-{length}; the phase has {length} steps")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class CopyTask:
    """The step of srun's before the ranks: one process a node copies the stores of the phase."""

    run_folder: Path
    phase: str | None

    def __call__(self) -> int:
        """The exit code: 0, STOPPED, or that of the error, which is in the log."""
        flag, place = watch(), my_place()
        setup_logging(place.rank, place.job, 0)
        try:
            staging = read_staging(self.run_folder)
            if staging is None or staging.mode != "whole":
                return 0
            flag.deadline = read_launch(self.run_folder, place.start).deadline
            comm = my_comm()
            shown = _logged() if comm.rank == 0 else None
            whole = copy_stores(
                self.run_folder, self.phase, staging.folder, comm, lambda: flag.stop is not Stop.NO, shown
            )
        except CrystalError as error:
            log.warning("not staged: %s", error)
            return error.exit_code
        return 0 if whole else STOPPED


def copy_before_training(
    run_folder: Path, until: str | None, should_stop: Callable[[], bool], beat: Callable[[str], None]
) -> None:
    """What the first rank of a local job does before it trains."""
    try:
        staging = read_staging(run_folder)
        if staging is not None and staging.mode == "whole":

            def on_progress(*_: object) -> None:
                beat("staging")

            copy_stores(run_folder, until, staging.folder, SoloComm(), should_stop, on_progress)
    except CrystalError as error:
        log.warning("not staged: %s", error)


class LocalDisk:
    """What a rank of a training job finds on its node's disk."""

    def __init__(
        self, staging: Staging, run: Run, sources: "Sources", run_file: Path, share: tuple[int, int], leads: bool,
        speaks: bool,
    ) -> None:  # fmt: skip
        """`share` is the data-parallel rank and how many there are; with `leads` it has slices made; with `speaks` it
        warns for its node."""
        from crystal_hpc.data.scratch import scratch_folder

        self._staging, self._run, self._sources, self._run_file = staging, run, sources, run_file
        self._share, self._leads, self._speaks = share, leads, speaks
        self._scratch: Path | None = None
        try:
            self._scratch = scratch_folder(staging.folder)
        except CrystalError as error:
            self._warn(str(error))

    def nearest(self, source: "RowSource") -> "RowSource":
        """The copy of a store on this node, if there is one; else the store itself."""
        from crystal_hpc.data.staging import StagedStore
        from crystal_hpc.data.store import TokenStore

        if self._staging.mode != "whole" or self._scratch is None or not isinstance(source, TokenStore):
            return source
        try:
            copy = StagedStore.find(source, self._scratch)
        except (CrystalError, OSError) as error:
            self._warn(str(error))
            return source
        if copy is None:
            self._warn(f"{self._scratch} has no copy of {source.info.folder}")
        return copy or source

    def prepared(self, phase: int) -> "PreparedRows | None":
        """The slices of a phase (by its place in the run), with a helper that makes them if this rank leads."""
        from crystal_hpc.data.preparing import Helper, PreparedRows
        from crystal_hpc.data.slices import make_cut

        if self._staging.mode != "slice" or self._scratch is None:
            return None
        cut = make_cut(self._run, self._sources, phase, *self._share, self._staging.span)
        helper = Helper(self._run_file, phase, cut, self._scratch) if self._leads else None
        return PreparedRows(cut, self._scratch, helper)

    def _warn(self, said: str) -> None:
        if self._speaks:
            log.warning("%s; reading shared storage instead", said)


def _logged() -> Progress:
    """Tenths of the way, in the log."""
    shown = [0]

    def show(what: str, done: int, total: int, note: str = "") -> None:
        if done * 10 // max(total, 1) > shown[0]:
            shown[0] = done * 10 // max(total, 1)
            log.info("%s: %d%%", what, shown[0] * 10)
            sys.stderr.flush()

    return show
