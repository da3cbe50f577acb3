"""The doctor on a real Slurm: it reads the settings there, and finds out by one job what the nodes are like."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stories import wait_for

from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import SlurmError
from crystal_hpc.jobs import slurm
from crystal_hpc.jobs.doctor import Finding, describe, examine
from crystal_hpc.jobs.probe import check_nodes

Profile = Callable[..., Cluster]

pytestmark = pytest.mark.usefixtures("devcluster")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of all runs, in which nothing may be left behind."""
    return tmp_path / "runs"


def queued() -> str:
    return slurm.command("squeue", "--noheader")


def verdicts(findings: list[Finding]) -> dict[str, tuple[str, str]]:
    assert all("\n" not in finding.said for finding in findings)
    return {finding.name: (finding.verdict, finding.said) for finding in findings}


def test_a_cluster_is_examined_without_a_profile() -> None:
    found = verdicts(examine(None))
    assert found["grace"] == ("good", "a preempted job has 25 s to save (GraceTime 15 + KillWait 10)")
    assert found["partition"][1] == "normal (the default) is UP"
    assert re.fullmatch(r"version \d+\.\d+\.\d+.*", found["slurm"][1])
    assert "about 5 s" in found["start again"][1]
    assert "bad" not in [verdict for verdict, _ in found.values()]


def test_a_profile_that_fits_and_one_that_does_not(profile: Profile) -> None:
    found = verdicts(examine(profile(ranks_per_node=2, slurm={"resume_by": "slices", "slices": 14})))
    assert "bad" not in [verdict for verdict, _ in found.values()]
    assert found["arrays"][1] == "MaxArraySize=6: 14 slices of a phase make arrays: 3, one after the other"
    keys = {"partition": "urgent", "container": {"runtime": "pyxis", "image": "image.sqsh"}}
    found = verdicts(examine(profile(nodes=5, ranks_per_node=4, slurm=keys)))
    assert [name for name, (verdict, _) in found.items() if verdict == "bad"] == ["nodes", "gpus", "container"]
    assert "never preempted" in found["preemption"][1]


def test_an_unknown_partition_is_reported_in_slurms_words(profile: Profile, runs: Path) -> None:
    nowhere = profile(slurm={"partition": "nope"})
    with pytest.raises(SlurmError, match=r"^[^\n]*Partition nope not found$"):
        examine(nowhere)
    with pytest.raises(SlurmError, match=r"^sbatch[^\n]*Invalid partition name specified$"):
        check_nodes(nowhere, runs)
    assert list(runs.iterdir()) == []


def test_every_node_is_looked_at_by_one_job(profile: Profile, tmp_path: Path, runs: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    keys = {"setup": [f"export PLACE={tmp_path}"], "scratch": "$PLACE/scratch", "options": {"comment": "x"}}
    findings = check_nodes(profile(nodes=4, ranks_per_node=2, slurm=keys), runs)
    found = verdicts(findings)
    assert {verdict for verdict, _ in found.values()} == {"good"}, describe(findings)
    assert set(found) == {"nodes", "gpus", "scratch", "commit", "shared folder", "clocks"}
    assert found["nodes"][1] == "n1, n2, n3, n4 answered"
    assert [*runs.iterdir(), *scratch.iterdir()] == []


def test_a_scratch_that_is_not_there_is_found(profile: Profile, tmp_path: Path, runs: Path) -> None:
    found = verdicts(check_nodes(profile(nodes=1, slurm={"scratch": f"{tmp_path}/none"}), runs))
    assert found["scratch"][0] == "bad"
    assert "none: No such file or directory" in found["scratch"][1]
    found = verdicts(check_nodes(profile(nodes=1, slurm={"gpus": False, "scratch": "$NOT_SET"}), runs))
    assert re.match(r"n\d: slurm.scratch is empty", found["scratch"][1])
    assert "gpus" not in found


def test_nodes_that_say_nothing_are_named(profile: Profile, runs: Path) -> None:
    findings = check_nodes(profile(slurm={"setup": ["echo no such module", "exit 3"]}), runs)
    assert [(finding.name, finding.verdict) for finding in findings] == [("silent nodes", "bad")]
    assert re.match(r"n\d, n\d left nothing in ", findings[0].said)
    assert findings[0].said.endswith("FAILED, with at last: no such module")


@pytest.mark.parametrize(
    ("keys", "verdict", "state"),
    [({"nodes": 5}, "note", "PENDING"), ({"slurm": {"setup": ["sleep 60"]}}, "bad", "RUNNING")],
)
def test_a_job_that_takes_too_long_is_cancelled(
    profile: Profile, runs: Path, keys: dict[str, Any], verdict: str, state: str
) -> None:
    (finding,) = check_nodes(profile(**keys), runs, timeout=3)
    assert (finding.name, finding.verdict) == ("nodes", verdict)
    assert re.fullmatch(rf"job \d+ was still {state} after 3 s \(reason: \w+\): cancelled", finding.said)
    assert queued() == ""
    assert list(runs.iterdir()) == []


def test_an_impatient_user_leaves_nothing_behind(profile: Profile, runs: Path) -> None:
    program = f"""
import signal
from pathlib import Path
from crystal_hpc.config.schema import Cluster
from crystal_hpc.jobs.probe import check_nodes
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what they start with & ignore it
check_nodes(Cluster.model_validate({profile(nodes=5).model_dump(mode="json")!r}), Path({str(runs)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    wait_for(queued, "the job to be queued")
    time.sleep(1)  # sbatch has been left
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert queued() == ""
    assert list(runs.iterdir()) == []
