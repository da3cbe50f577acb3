"""How the ranks of a job find each other: rank 0 listens, and says where in a file that all of them see.

A port that the system chooses is free, which one computed from the job's id only hopes to be. The file is named after
this start of the job, so that no leftover of an earlier one can mislead.
"""

import datetime
import time
from pathlib import Path

from torch._C._distributed_c10d import Store, TCPStore

from crystal_hpc import files
from crystal_hpc.errors import RunError
from crystal_hpc.jobs import journal
from crystal_hpc.jobs.place import Place

PATIENCE = datetime.timedelta(minutes=10)


def meet(folder: Path, place: Place) -> Store:
    """The store through which torch.distributed forms its groups. Raises RunError if rank 0 does not show up."""
    meeting = folder / f".meeting-{place.start}"
    if place.rank == 0:
        store = TCPStore("0.0.0.0", 0, None, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        files.write_file(meeting, f"{place.address} {store.port}")
        return store
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not files.wait_until_visible(meeting, 1.0):
        note = journal.first_error(folder.parent, place.job, place.launch)
        if note and note["rank"] == 0:  # it will not come
            raise RunError(f"rank 0: {note['reason']}")
        if time.monotonic() > deadline:
            raise RunError(f"{meeting}: rank 0 has not said where it listens; do all nodes see this folder?")
    address, _, port = meeting.read_text().rpartition(" ")
    return TCPStore(address, int(port), None, is_master=False, timeout=PATIENCE)


def leave(folder: Path, place: Place) -> None:
    """Removes the file once the job is over."""
    (folder / f".meeting-{place.start}").unlink(missing_ok=True)
