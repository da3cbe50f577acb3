"""Staging on a real Slurm: over two nodes with a disk each, and where it cannot work. The run stays the same."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devcluster import DevCluster
from stories import Story

from crystal_hpc import files
from crystal_hpc.config.schema import Cluster

Profile = Callable[..., Cluster]
MakeStory = Callable[..., Story]
SAID = r"staged: \S+ in (\S+): (\d+) bytes copied, (\d+) kept, (\d+) read"


def consumed(folder: Path) -> list[tuple[Any, ...]]:
    """Digest and loss of every step: what the model was given, and what it made of it."""
    lines = files.read_lines(folder / "metrics.jsonl")
    return [(line["phase"], line["step"], line["digest"], line["loss"]) for line in lines]


def is_as_undisturbed(whole: Story, undisturbed: Path, phases: int) -> bool:
    """Runs to the end; whether every step was the same."""
    whole.start()
    whole.wait_until_over()
    assert whole.outcomes() == ["finished"] * phases, whole.log()
    mine = consumed(whole.folder)
    return len(mine) > 0 and mine == consumed(undisturbed)[: len(mine)]


def copied(whole: Story) -> dict[str, list[tuple[int, int, int]]]:
    """What the copying steps say: (copied, kept, read) of each start, by node's folder."""
    said: dict[str, list[tuple[int, int, int]]] = {}
    for path in sorted((whole.folder / "logs").glob("*_copy_0.out")):
        for place, *counts in re.findall(
            r"staged: \S+ in (\S+): (\d+) bytes copied, (\d+) kept, (\d+) read", path.read_text()
        ):
            said.setdefault(Path(place).name, []).append(tuple(map(int, counts)))  # type: ignore[arg-type]
    return said


def test_whole_stores_are_read_once_for_two_nodes_and_kept_for_the_next_phase(
    devcluster: DevCluster, undisturbed: Path, profile: Profile, story: MakeStory, long_config: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    cluster = profile(staging={"mode": "whole", "folder": f"{tmp_path}/disks/$SLURMD_NODENAME"})
    whole = story(cluster, phases=long_config["phases"][:2])
    assert is_as_undisturbed(whole, undisturbed, 2)
    said = copied(whole)
    assert len(said) == 2, "a folder for each node"
    sizes = {
        name: sum(shard["bytes"] for shard in files.read_json(Path(store) / "store.json")["shards"])
        for name, store in long_config["data"]["sources"].items()
    }
    for node in said.values():
        assert [(new, kept) for new, kept, _ in node] == [(sizes["prose"], 0), (sizes["code"], sizes["prose"])]
    assert sum(read for node in said.values() for _, _, read in node) == sizes["prose"] + sizes["code"]
    assert "reading shared storage" not in whole.log()


def test_slices_are_prepared_while_training_goes_on(
    devcluster: DevCluster, undisturbed: Path, profile: Profile, story: MakeStory, long_config: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    staging = {"mode": "slice", "span": 50, "folder": f"{tmp_path}/disks/$SLURMD_NODENAME"}
    whole = story(profile(staging=staging), phases=long_config["phases"][:2])
    assert is_as_undisturbed(whole, undisturbed, 2)
    served = re.findall(r"(\d+) steps of phase code were read from slices", whole.log())
    assert served and int(served[0]) >= 50, "the last of three spans at least was ready in time"
    assert "reading shared storage" not in whole.log()
    assert not list((tmp_path / "disks").rglob("*.h5")), "what was passed is gone"


def test_a_disk_that_cannot_be_written_is_a_warning(
    devcluster: DevCluster, undisturbed: Path, profile: Profile, story: MakeStory, tiny_config: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("a file where a folder must be")
    cluster = profile(staging={"mode": "whole", "folder": f"{tmp_path}/file"})
    whole = story(cluster, phases=tiny_config["phases"][:1])
    assert is_as_undisturbed(whole, undisturbed, 1)
    assert "reading shared storage instead" in whole.log()
    (said,) = (whole.folder / "logs").glob("*_copy_0.out")
    assert "not staged: " in said.read_text() and "a part of the path is a file" in said.read_text()
