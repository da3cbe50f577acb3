"""Whether two runs ended alike, bit for bit: every tensor of their last checkpoints, and every sample of every step.

The files themselves may differ (a save names itself), so the tensors are read: weights, Adam's moments, main weights.
"""

import warnings
from pathlib import Path
from typing import Any

from crystal_hpc import files
from crystal_hpc.errors import CrystalError
from crystal_hpc.report.ledger import check_ledger


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """Digest by name of everything in a checkpoint, model and optimizer."""
    import torch
    import xxhash
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint)
    # Zeros: Megatron's flat optimizer buffers have gaps that no rank stores.
    wanted: dict[str, Any] = {
        key: torch.zeros(stored.size, dtype=stored.properties.dtype) if isinstance(stored, TensorStorageMetadata) else 0
        for key, stored in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process: so it is
        load(wanted, storage_reader=reader, no_dist=True)
    return {key: xxhash.xxh3_128(_bytes(value)).hexdigest() for key, value in sorted(wanted.items())}


def differences(run: Path, reference: Path) -> list[str]:
    """What tells two finished runs of the same config apart, in words; empty if nothing does."""
    found = []
    ends = sorted(path.relative_to(reference) for path in reference.glob("checkpoints/*/step_*/manifest.json"))
    common = [path for path in ends if (run / path).exists()]
    last = [
        max((path for path in ends if path.parts[1] == phase), default=None) for phase in {p.parts[1] for p in ends}
    ]
    found += [f"{path} is missing" for path in last if path not in common]
    for path in common:
        seen, expected = tensor_digests((run / path).parent), tensor_digests((reference / path).parent)
        changed = [name for name in expected if seen.get(name) != expected[name]]
        if changed or seen.keys() != expected.keys():
            found.append(f"{path.parent}: {len(changed)} tensors differ, first {changed[:1]}")
    evals = sorted(path.relative_to(reference) for path in reference.glob("evals/*.json"))
    for path in evals:
        if (
            not (run / path).exists()
            or files.read_json(run / path)["losses"] != files.read_json(reference / path)["losses"]
        ):
            found.append(f"{path}: other held-out losses")
    try:
        check_ledger(run)
    except CrystalError as error:
        found.append(f"the ledger: {error}")
    return found


def _bytes(value: Any) -> bytes:
    import torch

    if isinstance(value, torch.Tensor):
        return value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return repr(value).encode()
