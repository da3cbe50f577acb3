"""Every fault at least once, in both ways of going on, against an undisturbed run, bit for bit: the drill itself.

The undisturbed run is the same for both and made once. The tests have a private Slurm and a process of their own, where
there are several.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from devcluster import DevCluster

from crystal_hpc.cli import main
from crystal_hpc.config.load import dump_yaml
from crystal_hpc.config.schema import Cluster
from crystal_hpc.drill.faults import FAULTS

pytestmark = pytest.mark.xdist_group("drill")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both drills: the second finds data and undisturbed runs of the first."""
    return tmp_path_factory.mktemp("drill")


@pytest.mark.parametrize("resume_by", ["requeue", "slices"])
def test_a_run_survives_every_fault_with_the_same_weights_and_samples(
    devcluster: DevCluster, profile: Callable[..., Cluster], room: Path, tmp_path: Path, resume_by: str
) -> None:
    cluster = profile(hang_limit="40s", signal_delay="60s", slurm={"resume_by": resume_by, "slices": 12})
    (tmp_path / "profile.yaml").write_text(dump_yaml(cluster))
    words = ["--cluster", tmp_path / "profile.yaml", "--folder", room, "--count", len(FAULTS), "--per-run", 6]
    words += ["--devcluster", devcluster.folder, "--seed", 3]
    done = CliRunner().invoke(main, ["drill", *map(str, words)])
    assert f"{len(FAULTS)} of {len(FAULTS)} bit-equal" in done.output, done.output
    assert done.exit_code == 0
    assert {line.split()[1] for line in done.output.splitlines() if re.match(r" +\d+  \w", line)} == set(FAULTS)


def test_a_fault_that_the_cluster_cannot_have_is_refused(
    devcluster: DevCluster, profile: Callable[..., Cluster], tmp_path: Path
) -> None:
    (tmp_path / "profile.yaml").write_text(dump_yaml(profile()))
    words: list[Any] = [
        "drill",
        "--cluster",
        tmp_path / "profile.yaml",
        "--faults",
        "USR2,slurmd",
        "--folder",
        tmp_path,
    ]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert (done.exit_code, "faults slurmd: not possible here; choose from USR2, TERM" in done.output) == (2, True)
