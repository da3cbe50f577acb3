"""Whether a Hugging Face folder computes what a checkpoint computes: logits against logits, whichever came first.

The checkpoint's weights go into the model that is trained, Megatron's, in a world of one process; the folder is loaded
by Transformers: an export with the code inside it, a folder from elsewhere with code of ours or Transformers' own. Both
compute in float32, so that only the order of sums differs.

Megatron takes a process for itself, and without a GPU the CPU rig changes torch for good: call this from a process
that does nothing else. On a GPU machine set CUDA_VISIBLE_DEVICES to nothing before torch is imported, and the
comparison is made on the CPU.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crystal_hpc import files
from crystal_hpc.config.compute import Kernels, Parallel
from crystal_hpc.config.schema import Run
from crystal_hpc.convert import sample
from crystal_hpc.convert.hf_folder import MARKER
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.errors import CheckpointError
from crystal_hpc.model import backend, gpt, parallel
from crystal_hpc.train.restore import load_weights

# Float32 rounds to 6e-8 of a value. Sums of some thousand terms, taken in another order, differ by some 1e-6 of the
# largest; a few dozen layers add up to 1e-5. A tensor swapped, transposed or left out changes logits by about 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class VerifyResult:
    """How far the two models are apart."""

    max_difference: float
    """Largest absolute difference of any two logits."""
    largest_logit: float
    """Largest absolute logit of Megatron's model, to measure the difference by."""
    allowed: float
    tokens: int
    """Positions compared, each with a whole vocabulary of logits."""


def fixed_tokens(run: Run, rows: int = 2, longest: int = 64) -> Tensor:
    """The same random token ids each time, int64 (rows, length), over the whole vocabulary."""
    length = min(longest, max(phase.sequence_length for phase in run.phases))
    return torch.randint(run.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def verify(
    checkpoint: Path,
    run: Run,
    folder: Path,
    tokens: Tensor | None = None,
    tolerance: float = TOLERANCE,
    architecture: str | None = None,
    rounded: str | None = None,
) -> VerifyResult:
    """Compares the logits of a checkpoint and of a Hugging Face folder, on `tokens` (rows, length), or fixed ones.

    A folder of ours is loaded with the code in it; one from elsewhere as the class named `architecture`, of ours or of
    Transformers. Weights are rounded to `rounded` on both sides, by default to what an export is in. Raises
    CheckpointError when two logits differ by more than `tolerance` times the largest, and when either cannot be loaded.
    """
    reader = CheckpointReader(checkpoint, run)
    rows = fixed_tokens(run) if tokens is None else tokens
    if architecture is None:
        rounded = files.read_json(folder / MARKER)["dtype"]
    dtype: torch.dtype | None = getattr(torch, rounded) if rounded else None
    published = _published_logits(folder, architecture, rows, dtype)
    trained = _trained_logits(reader, run, rows, dtype)
    difference = float((published - trained).abs().max())
    largest = float(trained.abs().max())
    result = VerifyResult(difference, largest, tolerance * largest, rows.numel())
    if not difference <= result.allowed:  # so that NaN fails too
        raise CheckpointError(
            f"{folder}: its logits differ from the checkpoint's by up to {difference:.3g}, and only "
            f"{result.allowed:.3g} is rounding; do not use what was converted, and report this of {checkpoint}"
        )
    return result


@torch.no_grad()
def _published_logits(folder: Path, architecture: str | None, rows: Tensor, rounded: torch.dtype | None) -> Tensor:
    model = sample.load(folder, torch.float32) if architecture is None else sample.load_as(folder, architecture)
    _round(model, rounded)
    logits: Tensor = model(rows, use_cache=False).logits
    return logits


@torch.no_grad()
def _trained_logits(reader: CheckpointReader, run: Run, rows: Tensor, rounded: torch.dtype | None) -> Tensor:
    """Float32 logits (rows, length, vocabulary) of the Megatron model."""
    plain = {"precision": "fp32", "fp8": None, "parallel": Parallel(), "kernels": Kernels()}
    alone = run.model_copy(update=plain)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as meeting:
        layout = parallel.start(alone, 0, 1, 0, Path(meeting, "store"))
        try:
            torch.set_num_threads(threads)
            model = gpt.build(alone, layout).eval()
            load_weights(model, reader.folder, layout.comm)
            _round(model, rounded)
            ids = rows.to(backend.device())
            positions = torch.arange(rows.shape[1], device=ids.device).expand_as(ids)
            return model(input_ids=ids, position_ids=positions, attention_mask=None).float().cpu()  # type: ignore[no-any-return]
        finally:
            parallel.stop()


def _round(model: Any, dtype: torch.dtype | None) -> None:
    for parameter in model.parameters() if dtype else ():
        parameter.copy_(parameter.to(dtype))
