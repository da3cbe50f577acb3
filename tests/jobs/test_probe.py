"""What the nodes saw is judged against the profile, and what cannot be looked at is refused."""

from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config.schema import Cluster
from crystal_hpc.errors import ConfigError, RunError, SlurmError
from crystal_hpc.jobs.probe import check_nodes, judge_probes


def profile(**changes: Any) -> Cluster:
    """A profile of two nodes with two GPUs each; keys of `slurm` are given as they are."""
    own = {key: changes.pop(key) for key in list(changes) if key in Cluster.model_fields}
    base = {"name": "here", "executor": "slurm", "nodes": 2, "ranks_per_node": 2, "time_limit": "1h", "slurm": changes}
    return Cluster.model_validate({**base, **own})


def two_probes(delay: float = 0.1, ahead: float = 0.0, **second: Any) -> dict[str, Any]:
    """What two nodes wrote: files need `delay` seconds each way, and n2's clock is `ahead` of n1's."""
    seen = {"gpus": 2, "commit": 0.01, "refusal": "", "free_gib": 5.0}
    sent = 1000.0
    called = sent + delay + 0.05
    first = {**seen, "rank": 0, "noticed": {"1": sent + delay}, "called": called}
    return {"n1": first, "n2": {**seen, "rank": 1, "sent": sent + ahead, "heard": called + delay + ahead, **second}}


def node_verdicts(answers: dict[str, Any], **changes: Any) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.verdict, finding.said) for finding in judge_probes(answers, profile(**changes))}


def test_nodes_that_are_as_they_should_be() -> None:
    found = node_verdicts(two_probes(), scratch="/scratch")
    assert {verdict for verdict, _ in found.values()} == {"good"}
    assert set(found) == {"nodes", "gpus", "scratch", "commit", "shared folder", "clocks"}


@pytest.mark.parametrize(("ahead", "apart"), [(5.0, True), (-5.0, True), (0.5, False), (-0.5, False)])
def test_clocks_are_compared_whatever_the_way_takes(ahead: float, apart: bool) -> None:
    verdict, said = node_verdicts(two_probes(ahead=ahead))["clocks"]
    assert (verdict == "note") == apart
    assert ("n2 is off by 4.9 s" in said) == apart
    slow = node_verdicts(two_probes(delay=20.0, ahead=0.5))
    assert slow["clocks"][0] == "good"
    assert slow["shared folder"][0] == "note"


@pytest.mark.parametrize(
    ("second", "name", "verdict", "words"),
    [
        ({"gpus": 1}, "gpus", "bad", "n2 sees 1"),
        ({"refusal": "/scratch: Permission denied"}, "scratch", "bad", "n2: /scratch: Permission denied"),
        ({"free_gib": 0.25}, "scratch", "good", "0.2 GiB"),
        ({"commit": 3.0}, "commit", "note", "3000.0 ms"),
        ({"heard": None}, "shared folder", "bad", "from n2 to n1"),
    ],
)
def test_a_node_that_is_not_as_it_should_be(second: dict[str, Any], name: str, verdict: str, words: str) -> None:
    found = node_verdicts(two_probes(**second), scratch="/scratch")[name]
    assert (found[0], words in found[1]) == (verdict, True), found


def test_one_node_has_nobody_to_meet() -> None:
    answers = two_probes()
    assert "clocks" not in node_verdicts({"n1": {**answers["n1"], "noticed": {}}})
    assert "clocks" not in node_verdicts({"n2": answers["n2"]})


def test_a_local_profile_has_no_nodes_to_look_at(tmp_path: Path) -> None:
    local = Cluster.model_validate({"name": "here", "executor": "local", "ranks_per_node": 2, "time_limit": "1h"})
    with pytest.raises(ConfigError, match="executor: slurm"):
        check_nodes(local, tmp_path)


def test_without_slurm_it_says_where_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"sbatch, .*: not found; run the doctor on a login node[^\n]*$"):
        check_nodes(profile(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_slurm_would_misread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="choose another folder"):
        check_nodes(profile(), tmp_path / "50%")
