"""Which generations of a run stay on disk, why, and the deletion of the others.

`reasons_to_keep` is the whole policy, as a function of config and manifests; `checkpoint` calls `prune` after a save,
and `crystal checkpoints` shows the reasons. A generation goes by a rename to `step_00001500.pruned`, after which it
counts for nothing, and is then deleted; a crash between the two leaves a folder that the next start deletes.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from crystal_hpc import files
from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_bytes
from crystal_hpc.errors import DiskError
from crystal_hpc.train.generations import KEPT, PRUNED, Generation, generations
from crystal_hpc.train.manifest import MANIFEST

# Saved because the job had to leave: good until there is a newer one.
PASSING = ("preempted", "time limit")

Reasons = dict[Path, list[str]]


def reasons_to_keep(run: Run, found: Sequence[Generation]) -> Reasons:
    """Why each generation stays, by its folder; one without a reason may go. `found` is all of them, in order."""
    reasons: Reasons = {generation.folder: _own_reasons(run, generation) for generation in found}
    if not found:
        return reasons
    # Those that stay for what they are come on top of the last few.
    counted = [one for one in found if one.manifest.why not in PASSING and not one.kept and not _ends_phase(run, one)]
    for generation in counted[-run.checkpoints.keep_last :]:
        reasons[generation.folder].append(f"last {run.checkpoints.keep_last}")
    reasons[found[-1].folder].append("newest")
    verified = [one for one in found if one.verified]
    if verified:
        only = "the only verified one" if len(verified) == 1 else "the newest verified one"
        reasons[verified[-1].folder].append(only)
    return reasons


def _own_reasons(run: Run, generation: Generation) -> list[str]:
    """Reasons that do not depend on the other generations."""
    reasons = [f"named {generation.kept['name']}"] if generation.kept else []
    if _ends_phase(run, generation):
        reasons.append("end of phase")
    every = run.phases[generation.position.phase].keep_every
    if every and generation.position.step > 0 and generation.position.step % every == 0:
        reasons.append(f"every {every} steps")
    return reasons


def _ends_phase(run: Run, generation: Generation) -> bool:
    return generation.position.step == derive.phase_steps(run.phases[generation.position.phase])


def may_go(run: Run, found: Sequence[Generation]) -> list[Generation]:
    """The generations that no rule keeps, less folders that are links: those somebody made by hand."""
    reasons = reasons_to_keep(run, found)
    return [one for one in found if not reasons[one.folder] and not one.folder.is_symlink()]


def prune(
    run_folder: Path, run: Run, dry_run: bool = False, on_line: Callable[[str], None] | None = None
) -> list[Generation]:
    """Deletes the generations that no rule keeps and returns them; with `dry_run`, only returns and tells them.

    May run beside a job, and beside itself. Ends early where the newest or the newest verified generation, seen at the
    beginning, is no longer there. Raises DiskError where the file system refuses.
    """
    found = generations(run_folder, run)
    gone = []
    for generation in may_go(run, found):
        if not (dry_run or (_still_safe(found) and _delete(generation.folder))):
            continue
        gone.append(generation)
        if on_line:
            said = "would delete" if dry_run else "deleted"
            on_line(f"{said} {generation.label} ({generation.manifest.why}, {format_bytes(generation.manifest.bytes)})")
    return gone


def _still_safe(found: Sequence[Generation]) -> bool:
    """Whether the generations that the run would go on from are still where they were."""
    needed = [found[-1], *[one for one in found if one.verified][-1:]]
    return all((one.folder / MANIFEST).exists() for one in needed)


def _delete(folder: Path) -> bool:
    """Whether the folder is deleted; no, if another process was faster, or it has been given a name meanwhile."""
    pruned = folder.with_name(folder.name + PRUNED)
    files.remove_folder(pruned)  # of an earlier generation at this step, whose deletion was cut short
    with files.disk_errors(folder):
        try:
            os.rename(folder, pruned)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise DiskError(f"{pruned}: cannot be emptied; delete it yourself, then prune again") from error
        if (pruned / KEPT).exists():
            os.rename(pruned, folder)
            return False
        files.fsync_path(folder.parent)  # no crash may bring the name back without all of the files
    files.remove_folder(pruned)
    return True
