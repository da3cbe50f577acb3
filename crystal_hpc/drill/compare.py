"""Whether two runs ended alike, bit for bit: every tensor of their last checkpoints, and every sample of every step.

Ranks may have divided the work otherwise, so not the files but the tensors are compared: weights, Adam's moments,
main weights.
"""

from pathlib import Path

from crystal_hpc import files
from crystal_hpc.errors import CrystalError
from crystal_hpc.report.ledger import check_ledger


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """Digest by name of everything in a checkpoint, model and optimizer."""
    import torch
    import xxhash

    from crystal_hpc.train.distcp import Reader, Request

    reader, found = Reader(checkpoint), {}
    for key in sorted(reader.tensors):
        tensor = torch.empty(reader.shape(key), dtype=reader.dtype(key))
        reader.read([Request(key, (0,) * tensor.ndim, tensor)])
        found[key] = xxhash.xxh3_128_hexdigest(tensor.view(-1).view(torch.uint8).numpy().data)
    return found


def differences(run: Path, reference: Path) -> list[str]:
    """What tells two finished runs of the same config apart, in words; empty if nothing does."""
    found = []
    ends = sorted(path.relative_to(reference) for path in reference.glob("checkpoints/*/step_????????/manifest.json"))
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
