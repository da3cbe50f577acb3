"""Claim: on a GPU, training is within 2 % of bare Megatron-core with Transformer Engine, and near the card's own speed.

Peers, in the same run, at sequence length 2048: a bare Megatron-core + Transformer Engine loop on the same model, plain
PyTorch (SDPA, torch.compile, fused AdamW) of the same shape, and the card's matrix products. Ours is `train.step` as a
job calls it, in BF16 and with each FP8 recipe. The shapes are those of crystal-160m.yaml, crystal-1b.yaml, and as many
layers of crystal-7b.yaml as fit this GPU by the memory formula. They take turns; ratios are medians over the turns.
Also: losses over 200 steps of real text (Python's standard library, a byte a token) in FP8 against BF16.

    python benchmarks/gpu.py [--models 1b,7b-slice,160m] [--turns 3] [--steps 3] [--json FILE] [--quick]

Made for a quarter of an hour of an H100 or H200, not timed on one yet; figures are written after every shape. Exit code
0 if all aims are met, 1 if not, 2 without a GPU. `--rig` runs all of it that a CPU can, at toy size: it shows that it
runs, and measures nothing.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one process, which need not know its host's name

import torch

CONFIGS = {"160m": "crystal-160m", "1b": "crystal-1b", "7b-slice": "crystal-7b"}
CURVE_STEPS = 200


def main() -> int:
    arguments = _arguments()
    if not torch.cuda.is_available() and not arguments.rig:
        print("error: no GPU here; --rig shows at toy size, on the CPU, that all of this runs", file=sys.stderr)
        return 2
    if torch.cuda.is_available() and arguments.rig:
        print("error: --rig is for machines without a GPU, and this one has one; leave it out", file=sys.stderr)
        return 2
    sys.path.append(str(Path(__file__).parent))  # from where `tokenize`, which torch imports, has taken it
    import gpu_turns

    met = gpu_turns.measure(arguments)
    return 0 if met else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,7b-slice,160m", help="shapes, in this order (default: all)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contestant (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn that count (default: 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one turn of one step, 160m, 20 steps of text")
    parser.add_argument("--rig", action="store_true", help="toy shapes on the CPU; no figure of it means anything")
    arguments = parser.parse_args()
    arguments.curve_steps = CURVE_STEPS
    if arguments.quick:
        arguments.models, arguments.turns, arguments.steps, arguments.curve_steps = "160m", 1, 1, 20
    asked = arguments.models.split(",")
    if unknown := set(asked) - set(CONFIGS):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(CONFIGS)}")
    arguments.models = {name: CONFIGS[name] for name in asked}
    return arguments


if __name__ == "__main__":
    sys.exit(main())
