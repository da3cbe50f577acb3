"""The jobs of the chain beside the training: reading a phase's stores before it, held-out losses after it.

Both can be told to leave at any moment: what they have not finished they do again when they are started again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.load import load_run
from crystal_hpc.jobs.chain import staged_path
from crystal_hpc.jobs.place import my_place
from crystal_hpc.log import log, setup_logging
from crystal_hpc.train.preemption import Stop, watch


@dataclass(frozen=True)
class StageTask:
    """Reads every store of a phase against its digests, so that training never meets a damaged one."""

    run_folder: Path
    phase: str

    def __call__(self) -> str:
        """Runs on every rank, works on the first. Raises StoreError for a damaged store."""
        from crystal_hpc.data.sources import open_source, read_sources

        flag, place = watch(), my_place()
        setup_logging(place.rank, place.job, 0)
        if place.rank != 0:
            return "finished"

        def on_progress(what: str, done: int, total: int, _note: str = "") -> None:
            if flag.stop is not Stop.NO:
                log.info("told to leave at %s, %d of %d", what, done, total)
                sys.exit(0)

        run = load_run(self.run_folder / "run.yaml")
        names = next(phase.mixture for phase in run.phases if phase.name == self.phase)
        sources, read = read_sources(run).training, {}
        for name in names:
            store = open_source(sources[name], run.model.vocab_size)
            store.check_digests(on_progress)
            log.info("store %s is as it was written", store.info.folder)
            read[name] = store.info.digest
        path = staged_path(self.run_folder, self.phase)
        files.make_folder(path.parent)
        files.write_json(path, {"phase": self.phase, "digests": read})
        return "finished"


@dataclass(frozen=True)
class EvaluateTask:
    """Held-out losses of the model at the end of a phase."""

    run_folder: Path
    phase: str

    def __call__(self) -> str:
        """Runs on every rank; leaves by SystemExit if told to stop before the end."""
        flag, place = watch(), my_place()
        setup_logging(place.rank, place.job, 0)

        from crystal_hpc.jobs import training
        from crystal_hpc.train.evaluate import evaluate_phase
        from crystal_hpc.train.restore import load_model
        from crystal_hpc.train.state import Position

        session = training.start(self.run_folder, place)
        run, names = session.run, [phase.name for phase in session.run.phases]
        job = session.job(flag, 0, lambda *_: None)
        phase = run.phases[names.index(self.phase)]
        position = Position(names.index(self.phase), derive.phase_steps(phase))
        load_model(job.trainer, self.run_folder, position)
        losses = evaluate_phase(
            job.trainer, self.run_folder, job.held_out, position, lambda: job.stop_agreed() is not Stop.NO
        )
        session.stop()
        if not losses and flag.stop is not Stop.NO:
            sys.exit(0)
        log.info("held-out losses after phase %s: %s", self.phase, losses)
        return "finished"
