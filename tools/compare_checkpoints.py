"""Compares two checkpoints tensor by tensor, whatever layouts wrote them; or two Hugging Face folders.

Exit code 0: the same; 1: different; 2: a mistake, or a folder that cannot be read. Memory is some 900 MB, however large
the model.

    python tools/compare_checkpoints.py runs/a/checkpoints/code/step_00000400 runs/b/checkpoints/code/step_00000400
    python tools/compare_checkpoints.py A B --optimizer --all
    python tools/compare_checkpoints.py exports/a exports/b --tolerance 1e-6
"""

import argparse
from pathlib import Path

from crystal_hpc.progress import run, shown_progress


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="a folder checkpoints/<phase>/step_<n>, or one with *.safetensors")
    parser.add_argument("b", type=Path, help="another of the same kind")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference to allow (default: 0, bits)")
    parser.add_argument("--all", action="store_true", help="name every tensor that differs, not only the first")
    parser.add_argument("--optimizer", action="store_true", help="Adam's state and main weights, too")
    return parser.parse_args()


def main() -> int:
    """Compares, prints, and returns the exit code."""
    arguments = parse()
    from crystal_hpc.convert.compare import compare, describe  # late: --help comes before torch

    with shown_progress() as on_progress:
        found = compare(arguments.a, arguments.b, arguments.tolerance, arguments.optimizer, on_progress)
    print(describe(found, arguments.all, arguments.tolerance))
    return 0 if found.equal else 1


if __name__ == "__main__":
    run(main)
