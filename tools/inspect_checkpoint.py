"""Says what a checkpoint holds: position, layout, files, and on demand its tensors with their norms.

    python tools/inspect_checkpoint.py runs/demo/checkpoints/code/step_00000400
    python tools/inspect_checkpoint.py runs/demo/checkpoints/code/step_00000400 --tensors --optimizer
    python tools/inspect_checkpoint.py runs/demo/checkpoints/code/step_00000400 --json | jq .step

All but --optimizer stands in the manifest, and takes no torch.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from crystal_hpc.progress import run
from crystal_hpc.report.inspection import describe, inspect


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder checkpoints/<phase>/step_<n>")
    parser.add_argument("--tensors", action="store_true", help="list the model's tensors: shape, dtype, norm")
    parser.add_argument("--optimizer", action="store_true", help="list the keys of the optimizer's state")
    parser.add_argument("--json", action="store_true", help="print the manifest, and what lies beside it, as JSON")
    return parser.parse_args()


def main() -> int:
    """Reads, prints, and returns the exit code."""
    arguments = parse()
    manifest, notes = inspect(arguments.folder, arguments.optimizer)
    if arguments.json:
        print(json.dumps({**asdict(manifest), **notes}, indent=2))
    else:
        print(describe(arguments.folder, manifest, notes, arguments.tensors))
    return 0


if __name__ == "__main__":
    run(main)
