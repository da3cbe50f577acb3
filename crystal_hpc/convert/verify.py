"""Whether an exported folder computes what the trained model computes: logits against logits.

The checkpoint is loaded into the model that was trained, Megatron's, in a world of one process; the export is loaded by
Transformers, with the code inside the folder. Both compute in float32, so that only the order of sums differs.

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
from crystal_hpc.config.schema import Parallel, Run
from crystal_hpc.convert import sample
from crystal_hpc.convert.reader import CheckpointReader
from crystal_hpc.convert.weights import MARKER
from crystal_hpc.errors import CheckpointError
from crystal_hpc.model import backend, gpt, parallel

with backend.quiet():
    from megatron.core import dist_checkpointing

# Float32 rounds to 6e-8 of a value. Sums of some thousand terms, taken in another order, differ by some 1e-6 of the
# largest; a few dozen layers add up to 1e-5. A tensor swapped, transposed or left out changes logits by about 1.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class VerifyResult:
    """How far the two models are apart."""

    max_difference: float
    """Largest absolute difference of any two logits."""
    largest_logit: float
    """Largest absolute logit of the trained model, to measure the difference by."""
    allowed: float
    tokens: int
    """Positions compared, each with a whole vocabulary of logits."""


def fixed_tokens(run: Run, rows: int = 2, longest: int = 64) -> Tensor:
    """The same random token ids each time, int64 (rows, length), over the whole vocabulary."""
    length = min(longest, max(phase.sequence_length for phase in run.phases))
    return torch.randint(run.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def verify(
    checkpoint: Path, run: Run, folder: Path, tokens: Tensor | None = None, tolerance: float = TOLERANCE
) -> VerifyResult:
    """Compares the logits of a checkpoint and of its export, on `tokens` (rows, length) or on fixed random ones.

    Raises CheckpointError when two logits differ by more than `tolerance` times the largest logit, and when either
    cannot be loaded. An export in bfloat16 is compared with the trained weights rounded likewise.
    """
    CheckpointReader(checkpoint, run)  # for its checks
    rows = fixed_tokens(run) if tokens is None else tokens
    published = _published_logits(folder, rows)
    rounded: torch.dtype = getattr(torch, files.read_json(folder / MARKER)["dtype"])
    trained = _trained_logits(checkpoint, run, rows, rounded)
    difference = float((published - trained).abs().max())
    largest = float(trained.abs().max())
    result = VerifyResult(difference, largest, tolerance * largest, rows.numel())
    if not difference <= result.allowed:  # so that NaN fails too
        raise CheckpointError(
            f"{folder}: its logits differ from the checkpoint's by up to {difference:.3g}, and only "
            f"{result.allowed:.3g} is rounding; do not publish it, export {checkpoint} again"
        )
    return result


@torch.no_grad()
def _published_logits(folder: Path, rows: Tensor) -> Tensor:
    logits: Tensor = sample.load(folder, torch.float32)(rows, use_cache=False).logits
    return logits


@torch.no_grad()
def _trained_logits(checkpoint: Path, run: Run, rows: Tensor, rounded: torch.dtype) -> Tensor:
    """Float32 logits (rows, length, vocabulary) of the Megatron model, its weights rounded to a number format."""
    alone = run.model_copy(update={"precision": "fp32", "parallel": Parallel()})
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as meeting:
        layout = parallel.start(alone, 0, 1, 0, Path(meeting, "store"))
        try:
            torch.set_num_threads(threads)
            model = gpt.build(alone, layout).eval()
            _load_model(model, checkpoint)
            for parameter in model.parameters():
                parameter.copy_(parameter.to(rounded))
            ids = rows.to(backend.device())
            positions = torch.arange(rows.shape[1], device=ids.device).expand_as(ids)
            return model(input_ids=ids, position_ids=positions, attention_mask=None).float().cpu()  # type: ignore[no-any-return]
        finally:
            parallel.stop()


def _load_model(model: Any, checkpoint: Path) -> None:
    """Fills the model from a checkpoint's model tensors; the optimizer's are not read."""
    with backend.quiet():
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(loaded["model"])
