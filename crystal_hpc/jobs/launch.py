"""What a job's batch script and the profile tell its ranks.

`batch begin` writes a small file for each start of a job, because ranks in a container cannot ask Slurm themselves; the
profile of the last submission lies in the run folder. Without them, as for a local job, the defaults hold.
"""

from dataclasses import dataclass
from pathlib import Path

from crystal_hpc import files
from crystal_hpc.config.load import load_cluster
from crystal_hpc.config.schema import Cluster


@dataclass(frozen=True)
class Launch:
    """One start of a job, as its ranks need to know it."""

    deadline: float | None
    """Unix time at which to save though no signal has come; None if nobody knows when the job ends."""
    hang_limit: float
    """Seconds without a sign of life after which a rank gives up."""


def read_cluster(folder: Path) -> Cluster | None:
    """The profile that the run was submitted with last; None for a run started by hand."""
    path = folder / "cluster.yaml"
    return load_cluster(path) if path.exists() else None


def launch_path(folder: Path, start: str) -> Path:
    """The file for one start of a job (`12_3.0`: its id, and how often it was requeued)."""
    return folder / "attempts" / f".launch-{start}.json"


def write_launch(folder: Path, start: str, ends: float | None, signal_delay: float) -> None:
    """Notes when the job ends (Unix time), and so when to stop without a signal."""
    # Later than Slurm's own signal, which may come up to a minute late and is the better cause to record.
    deadline = ends - max(signal_delay - 60, signal_delay / 2) if ends else None
    files.make_folder(folder / "attempts")
    files.write_json(launch_path(folder, start), {"deadline": deadline})


def read_launch(folder: Path, start: str) -> Launch:
    """What the batch script wrote, and the profile says."""
    path, cluster = launch_path(folder, start), read_cluster(folder)
    deadline = files.read_json(path)["deadline"] if path.exists() else None
    return Launch(deadline, float(cluster.hang_limit) if cluster else 900.0)
