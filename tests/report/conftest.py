from pathlib import Path

import pytest
from run_folders import MakeRun, RunFolder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(prose=40, code=60) gives a run folder planned but not yet started."""
    return lambda **phases: RunFolder(tmp_path / "runs" / "demo", phases or {"prose": 40, "code": 60})


@pytest.fixture
def preempted_run(make_run: MakeRun) -> RunFolder:
    """Finished after a preemption in prose and a lost node in code that made it do 12 steps again."""
    folder = make_run(prose=40, code=60)
    folder.attempt(1, ("prose", 0), ("prose", 16), outcome="preempted", reason="SIGTERM from Slurm", signal="SIGTERM",
                   signal_to_durable=0.8)  # fmt: skip
    folder.checkpoint("prose", 17, "preempted")
    folder.attempt(2, ("prose", 17), ("prose", 39))
    folder.checkpoint("prose", 40, "phase end")
    folder.evaluate("prose", 40, {"prose": 2.61, "code": 3.4})
    folder.attempt(3, ("code", 0), ("code", 31), outcome="node_failure", reason="node n1 went down")
    folder.checkpoint("code", 20, "periodic")
    folder.attempt(4, ("code", 20), ("code", 59), redone_steps=12)
    folder.checkpoint("code", 60, "phase end")
    folder.evaluate("code", 60, {"prose": 2.45, "code": 2.2})
    return folder
