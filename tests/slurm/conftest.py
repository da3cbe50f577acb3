"""A private, real Slurm for the tests: four virtual nodes; a second one of two nodes has accounting.

Each is started once in a process, on the first test that needs it, and stopped at the end. Runs here are the tiny one
of the other tests with more steps, so that there is something to interrupt.
"""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stories import Story, wait_for

from crystal_hpc.config.load import load_cluster
from crystal_hpc.config.schema import Cluster
from crystal_hpc.jobs import slurm

sys.path.insert(0, str(Path(__file__).parents[2] / "slurm" / "devcluster"))
from devcluster import ClusterError, DevCluster, install  # noqa: E402


def _started(folder: Path, **settings: Any) -> DevCluster:
    if os.geteuid() != 0:
        pytest.skip("a private Slurm needs root")
    try:
        # Every process of xdist may have a cluster; apt-get serves one at a time.
        with open(folder.parents[1] / "installing", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            install(settings["accounting"])
    except ClusterError as error:
        pytest.skip(f"a private Slurm needs what could not be installed: {error}")
    cluster = DevCluster(folder, tied=True)
    cluster.up(**{"gpus": 2, "grace": 15, "kill_wait": 10, "max_array_size": 6, **settings})
    return cluster


@pytest.fixture(scope="session")
def _four_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    cluster = _started(tmp_path_factory.mktemp("slurm"), nodes=4, accounting=False)
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def _accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    cluster = _started(tmp_path_factory.mktemp("slurm-accounted"), nodes=2, accounting=True)
    yield cluster
    cluster.down()


@pytest.fixture
def devcluster(_four_nodes: DevCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    """Four nodes of two GPUs each, without accounting; no job is left behind."""
    yield from _used(_four_nodes, monkeypatch)


@pytest.fixture
def accounted(_accounted: DevCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    """Two nodes with accounting: sacct answers, and only the account `research` may submit."""
    yield from _used(_accounted, monkeypatch)


def _used(cluster: DevCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield cluster
    slurm.command("scancel", "--user", "root")
    wait_for(lambda: not slurm.command("squeue", "--noheader").strip(), "the queue to become empty")


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., Cluster]:
    """A cluster profile for the private Slurm: two nodes of one rank, unless told otherwise."""

    def make(**more: Any) -> Cluster:
        slurm_keys = {"partition": "normal", "cpus_per_rank": 1, **more.pop("slurm", {})}
        content = {"name": "dev", "executor": "slurm", "nodes": 2, "ranks_per_node": 1, "time_limit": "10min"}
        content |= {"signal_delay": "30s", "environment": {"OMP_NUM_THREADS": "1"}, "slurm": slurm_keys, **more}
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_cluster(path)

    return make


@pytest.fixture
def long_config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """The tiny run with a second phase long enough to be caught in, some twenty milliseconds a step."""
    first, second, third = tiny_config["phases"]
    phases = [first, {**second, "steps": 150, "checkpoint_every": 40}, third]
    return {**tiny_config, "parallel": {"micro_batch": 2, "distributed_optimizer": True}, "phases": phases}


@pytest.fixture
def story(tmp_path: Path, long_config: dict[str, Any], write_config: Callable[..., Path]) -> Callable[..., Story]:
    """Prepares a run; `changes` are merged into its config."""

    def make(cluster: Cluster, **changes: Any) -> Story:
        return Story(write_config({**long_config, **changes}), cluster, tmp_path / "runs")

    return make


@pytest.fixture(scope="session")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def undisturbed(
    devcluster: DevCluster, _kept: Path, profile: Callable[..., Cluster], long_config: dict[str, Any],
    write_config: Callable[..., Path],
) -> Path:  # fmt: skip
    """The folder of the same run, finished without any fault, on two nodes."""
    folder = _kept / "tiny"
    if not (folder / "run.yaml").exists():
        whole = Story(write_config(long_config, "undisturbed.yaml"), profile(), _kept)
        whole.start()
        whole.wait_until_over()
        assert whole.outcomes() == ["finished"] * 3
    return folder
