"""Conversions as users ask for them: pick the checkpoint, convert, verify, and say so in a line or two.

What `crystal export` and `tools/convert_checkpoint.py` call. The comparison of logits needs a process of its own (see
`verify`); it is made before a folder appears under its name.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from crystal_hpc import files
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import formats, from_hf, memory, names, resume, weights
from crystal_hpc.convert.hf_folder import MARKER, is_hf_folder
from crystal_hpc.convert.readback import check_export, check_import
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.errors import CheckpointError, CrystalError, RunError
from crystal_hpc.progress import Progress
from crystal_hpc.train.generations import generations
from crystal_hpc.train.manifest import MANIFEST

VERIFY: tuple[weights.Verify, ...] = get_args(weights.Verify)


@dataclass(frozen=True)
class Options:
    """How to convert; the same for one checkpoint and for many."""

    format: str = weights.FORMAT.name
    """Of the Hugging Face folder, where that is what is written."""
    dtype: weights.Dtype | None = None
    """Of the weights written; None: as they are."""
    shard_bytes: int = weights.SHARD_BYTES
    verify: weights.Verify = "all"
    """`weights`: digests and norms, read back; `all`: logits too; `none`: not even the source's digests."""
    overwrite: bool = False
    """Whether an export that is there already is made again; counts more than `skip_done`."""
    skip_done: bool = False
    """Whether an export that is there already, of the same checkpoint and options, is what was asked for."""
    name: str | None = None
    """How folders are called, with `{phase}` and `{step}` in it (`{step:06d}`); None: by phase and step."""

    def __post_init__(self) -> None:
        """Raises CheckpointError for a name that would not give each phase and step a folder of its own."""
        name = self.name if self.name is not None else "{phase}-{step}"
        plain = re.sub(r"\{phase\}|\{step(:0?\d+d)?\}", "", name)
        if re.search(r"[{}/]", plain) or "{phase}" not in name or "{step" not in name:
            raise CheckpointError(f"--name {name!r}: write it with {{phase}} and {{step}} or {{step:06d}} in it")
        if re.search(r"\{phase\}\d*\{step|\{step[^}]*\}\d*\{phase", name):  # p1 and 12, p11 and 2
            raise CheckpointError(f"--name {name!r}: write something that is no digit between {{phase}} and {{step}}")


def export_run(
    folder: Path,
    out: Path | None = None,
    phase: str | None = None,
    step: int | None = None,
    options: Options = Options(),
    on_progress: Progress | None = None,
) -> str:
    """Exports the newest checkpoint of a run, of one phase of it, or of one step; returns what to tell the user.

    `out` defaults to `exports/<phase>-<step>` in the run folder. Raises CrystalError as `export_checkpoint`.
    """
    run = _load_run(folder)
    wanted = find_checkpoints(folder, run, phase, step)[-1]
    return export_checkpoint(
        wanted, run, Path(run.data.tokenizer), out or _place(folder, wanted, options), options, on_progress
    )


def export_share(
    folder: Path,
    share: tuple[int, int],
    phase: str | None = None,
    options: Options = Options(),
    on_progress: Progress | None = None,
) -> Iterator[str]:
    """Exports every n-th checkpoint of a run, or of a phase, from the i-th on, `share` = (i, n); yields what to tell.

    What is there already is left as it is, what was cut short goes on. A checkpoint that cannot be exported does not
    stop the others. Shares make up all only as long as no checkpoint comes or goes. Raises CheckpointError in the end,
    if there was one.
    """
    run = _load_run(folder)
    mine = find_checkpoints(folder, run, phase, None)[share[0] :: share[1]]
    options = dataclasses.replace(options, skip_done=True)
    failed = 0
    for checkpoint in mine:
        try:
            out = _place(folder, checkpoint, options)
            yield export_checkpoint(checkpoint, run, Path(run.data.tokenizer), out, options, on_progress)
        except CrystalError as error:
            failed += 1
            yield f"error: {error}"
    if failed:
        raise CheckpointError(f"{failed} of {len(mine)} checkpoints could not be exported, see above")


def find_checkpoints(folder: Path, run: Run, phase: str | None, step: int | None) -> list[Path]:
    """The checkpoints that fit, oldest first. Raises CheckpointError where there is none, naming those that exist."""
    found = generations(folder, run)
    wanted = [one.folder for one in found if phase in (None, one.manifest.phase) and step in (None, one.position.step)]
    if not wanted:
        there = ", ".join(f"{one.manifest.phase} {one.position.step}" for one in found) or "none yet"
        raise CheckpointError(f"{folder}: no such checkpoint; there are: {there}")
    return wanted


def _load_run(folder: Path) -> Run:
    if not (folder / "run.yaml").exists():
        raise RunError(f"{folder}: not a run folder (it has no run.yaml); runs are made by: crystal submit")
    return load_run(folder / "run.yaml")


def _place(folder: Path, checkpoint: Path, options: Options) -> Path:
    phase, step = checkpoint.parent.name, int(checkpoint.name.removeprefix("step_"))
    if options.name is not None:
        return folder / "exports" / options.name.format(phase=phase, step=step)
    suffix = "" if options.format == weights.FORMAT.name else f"-{options.format}"
    return folder / "exports" / f"{phase}-{step:08d}{suffix}"


def export_checkpoint(
    checkpoint: Path,
    run: Run,
    tokenizer: Path | None,
    out: Path,
    options: Options = Options(),
    on_progress: Progress | None = None,
) -> str:
    """Converts one checkpoint folder, in its own number format unless told otherwise; returns what to tell the user.

    Raises CheckpointError for what cannot be converted, for what comes out other than it went in, and where the logits
    differ by more than rounding.
    """
    dtype = options.dtype or weights.trained_dtype(run)
    target = formats.by_name(options.format)
    shape = names.Shape(run.model, run.mup)
    target.check(shape)
    if options.verify == "all":
        memory.check_room_for_logits(run.model)
    verified: list[str] = []

    def check(folder: Path) -> None:
        if options.verify != "none":
            verified.append(f"{check_export(folder, run, target, on_progress)} tensors")
        if options.verify == "all":
            from crystal_hpc.convert.verify import verify

            verified.append(_describe_logits(verify(checkpoint, run, folder)))

    if options.skip_done and not options.overwrite:
        resume.settle(out.resolve(), MARKER)
        marker = _find(checkpoint, run, tokenizer, out, target, dtype, options.shard_bytes)
        if marker:
            if VERIFY.index(marker["verified"]) > VERIFY.index(options.verify):
                check(out)
                files.write_json(out / MARKER, marker | {"verified": options.verify})
            return _with_verified(f"{out}: was exported already", verified)
    summary = weights.export(
        checkpoint, run, tokenizer, out, dtype, options.shard_bytes, options.overwrite, on_progress, target,
        options.verify, check,
    )  # fmt: skip
    said = f"{out}: {summary.parameters:,} parameters, {summary.weight_bytes:,} bytes of {summary.dtype}"
    return _with_verified(said, verified)


def import_folder(
    folder: Path, out: Path, run: Run | None, options: Options = Options(), on_progress: Progress | None = None
) -> str:
    """Converts a Hugging Face folder into a checkpoint that runs can begin with; returns what to tell the user.

    Raises CheckpointError for what cannot be converted, does not fit `run`, comes out other than it went in, and where
    the logits differ by more than rounding.
    """
    with from_hf.opened(folder, run) as source:
        if options.verify == "all":
            memory.check_room_for_logits(source.shape.model)
        verified: list[str] = []

        def check(pending: Path) -> None:
            if options.verify != "none":
                verified.append(f"{check_import(pending, source, on_progress)} tensors")
            if options.verify == "all":
                from crystal_hpc.convert.verify import verify

                kind = source.format.architecture
                result = verify(pending, source.run(), folder, architecture=kind, rounded=options.dtype)
                verified.append(_describe_logits(result))

        summary = from_hf.convert(
            source, out, options.dtype, options.shard_bytes, options.overwrite, on_progress, check
        )
    said = f"{out}: {summary.parameters:,} parameters, {summary.weight_bytes:,} bytes of {summary.dtype}"
    return _with_verified(f"{said}, from {source.format.title}'s format", verified)


def _with_verified(said: str, verified: list[str]) -> str:
    return f"{said}\nverified on {' and '.join(verified)}" if verified else said


def _describe_logits(result: object) -> str:
    from crystal_hpc.convert.verify import VerifyResult

    assert isinstance(result, VerifyResult)
    return (
        f"{result.tokens} tokens: logits as large as {result.largest_logit:.3g} "
        f"differ by at most {result.max_difference:.2g} ({result.allowed:.2g} allowed)"
    )


def _find(
    checkpoint: Path, run: Run, tokenizer: Path | None, out: Path, target: names.Format, dtype: str, shard_bytes: int
) -> dict[str, Any] | None:
    """The marker of an export that is there, of this checkpoint and these options, with all its files."""
    try:
        wanted = weights.conversion(CheckpointReader(checkpoint, run), tokenizer, target, dtype, shard_bytes)
        marker: dict[str, Any] = files.read_json(out / MARKER)
        whole = all((out / name).stat().st_size == about["bytes"] for name, about in marker["files"].items())
        whole = whole and all(files.digest_file(out / name) == digest for name, digest in marker["beside"].items())
        same = marker["verified"] in VERIFY and all(marker.get(key) == value for key, value in wanted.items())
        return marker if whole and same else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def is_checkpoint(source: Path) -> bool:
    """Whether a folder is a checkpoint, rather than a Hugging Face folder. Raises CheckpointError if it is neither."""
    checkpoint, hf = (source / MANIFEST).is_file(), is_hf_folder(source)
    if checkpoint == hf:
        what = "both a checkpoint and" if checkpoint else "neither a checkpoint (manifest.json) nor"
        raise CheckpointError(f"{source}: is {what} a Hugging Face folder (config.json)")
    return checkpoint


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `500 MB`, `2GiB` or a plain number. Raises CheckpointError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(I?)B?\s*", text.upper())
    try:
        if match is None:
            raise ValueError
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
        if size < 1:
            raise ValueError
    except ValueError:
        raise CheckpointError(f"{text!r} is no size of a file; write it like 5GB or 500MB") from None
    return size
