"""A run's checkpoint as a verified Hugging Face folder: picks it, converts it, compares the logits, says so.

What `crystal export` and `tools/convert_checkpoint.py` call. The comparison needs a process of its own (see `verify`).
"""

from pathlib import Path

from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import weights
from crystal_hpc.convert.verify import verify
from crystal_hpc.errors import CheckpointError, RunError
from crystal_hpc.progress import Progress
from crystal_hpc.train.generations import generations


def export_run(
    folder: Path,
    out: Path | None = None,
    phase: str | None = None,
    step: int | None = None,
    dtype: weights.Dtype | None = None,
    check: bool = True,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> str:
    """Exports the newest checkpoint of a run, of one phase of it, or of one step; returns what to tell the user.

    `out` defaults to `exports/<phase>-<step>` in the run folder. Raises CrystalError as `export_checkpoint`.
    """
    if not (folder / "run.yaml").exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    run = load_run(folder / "run.yaml")
    checkpoint = find_checkpoint(folder, run, phase, step)
    out = out or folder / "exports" / f"{checkpoint.parent.name}-{checkpoint.name.removeprefix('step_')}"
    return export_checkpoint(checkpoint, run, Path(run.data.tokenizer), out, dtype, check, overwrite, on_progress)


def find_checkpoint(folder: Path, run: Run, phase: str | None, step: int | None) -> Path:
    """The newest checkpoint that fits. Raises CheckpointError where there is none, naming those that exist."""
    found = generations(folder, run)
    wanted = [
        generation
        for generation in found
        if (phase is None or generation.manifest.phase == phase) and (step is None or generation.position.step == step)
    ]
    if not wanted:
        there = ", ".join(f"{one.manifest.phase} {one.position.step}" for one in found) or "none yet"
        raise CheckpointError(f"{folder}: no such checkpoint; there are: {there}")
    return wanted[-1].folder


def export_checkpoint(
    checkpoint: Path,
    run: Run,
    tokenizer: Path,
    out: Path,
    dtype: weights.Dtype | None = None,
    check: bool = True,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> str:
    """Converts one checkpoint folder, in its own number format unless told otherwise; compares the logits if `check`.

    Raises CheckpointError for what cannot be converted, and where the logits differ by more than rounding.
    """
    dtype = dtype or weights.trained_dtype(run)
    summary = weights.export(checkpoint, run, tokenizer, out, dtype=dtype, overwrite=overwrite, on_progress=on_progress)
    said = f"{out}: {summary.parameters:,} parameters, {summary.weight_bytes:,} bytes of {summary.dtype}"
    if not check:
        return said
    result = verify(checkpoint, run, out)
    return (
        f"{said}\nverified on {result.tokens} tokens: logits as large as {result.largest_logit:.3g} "
        f"differ by at most {result.max_difference:.2g} ({result.allowed:.2g} allowed)"
    )
