"""What the ranks of a job are told about its start: when it ends, and how patient to be."""

import json
from pathlib import Path

import pytest
import yaml

from crystal_hpc.errors import ConfigError
from crystal_hpc.jobs.launch import Launch, launch_path, read_cluster, read_launch, write_launch

PROFILE = {"name": "there", "executor": "slurm", "ranks_per_node": 2, "time_limit": "1h", "hang_limit": "5min"}


@pytest.mark.parametrize(
    ("signal_delay", "before_the_end"),
    # Slurm may be a minute late with its signal; of less than two minutes, half.
    [(300, 240), (180, 120), (120, 60), (90, 45), (30, 15), (1, 0.5)],
)
def test_without_a_signal_the_ranks_save_by_themselves_later_than_slurm_would_have_told_them(
    tmp_path: Path, signal_delay: float, before_the_end: float
) -> None:
    write_launch(tmp_path, "12_3.1", 1_000_000.0, signal_delay)
    assert read_launch(tmp_path, "12_3.1").deadline == 1_000_000.0 - before_the_end


def test_a_job_without_an_end_has_no_deadline(tmp_path: Path) -> None:
    write_launch(tmp_path, "12.0", None, 90)
    assert json.loads(launch_path(tmp_path, "12.0").read_bytes()) == {"deadline": None}
    assert read_launch(tmp_path, "12.0") == Launch(None, 900.0)


def test_each_start_of_a_job_has_its_own(tmp_path: Path) -> None:
    write_launch(tmp_path, "12.0", 1000.0, 120)
    write_launch(tmp_path, "12.1", 2000.0, 120)
    write_launch(tmp_path, "12_1.0", 3000.0, 120)
    deadlines = [read_launch(tmp_path, start).deadline for start in ("12.0", "12.1", "12_1.0")]
    assert deadlines == [940.0, 1940.0, 2940.0]


def test_a_start_that_nobody_prepared_has_the_defaults(tmp_path: Path) -> None:
    assert read_cluster(tmp_path) is None
    assert read_launch(tmp_path, "7.0") == Launch(deadline=None, hang_limit=900.0)


def test_patience_comes_from_the_profile_of_the_last_submission(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(PROFILE))
    assert read_launch(tmp_path, "7.0") == Launch(deadline=None, hang_limit=300.0)
    cluster = read_cluster(tmp_path)
    assert cluster is not None and (cluster.name, cluster.ranks) == ("there", 2)


def test_a_profile_that_was_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**PROFILE, "hang_limit": "soon"}))
    with pytest.raises(ConfigError, match=r"cluster\.yaml.*hang_limit"):
        read_launch(tmp_path, "7.0")
