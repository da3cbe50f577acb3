"""Converts a checkpoint into a Hugging Face folder, and proves that both compute the same logits.

The folder loads with transformers' AutoModelForCausalLM and trust_remote_code=True. The model is compared on the CPU,
in float32; that takes as much memory as the model has parameters times 4 bytes, about twice over.

    python tools/convert_checkpoint.py runs/demo/checkpoints/code/step_00000400 exports/demo
    python tools/convert_checkpoint.py runs/demo/checkpoints/code/step_00000400 exports/demo --dtype bfloat16
    python tools/convert_checkpoint.py archive/step_00000400 exports/demo --run demo.yaml --no-verify
"""

import argparse
import os
from pathlib import Path

from crystal_hpc.progress import run, shown_progress


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder checkpoints/<phase>/step_<n>")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--run", type=Path, help="the run's config (default: run.yaml of the checkpoint's run folder)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json or the folder with one (default: the run's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as trained)")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is already there")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits with the trained model")
    return parser.parse_args()


def main() -> int:
    """Exports, then compares; returns the exit code."""
    arguments = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison wants plain float32, on a GPU machine too
    # Late: --help, the environment and mistakes in the config come before torch.
    from crystal_hpc.config.load import load_run

    config = load_run(arguments.run or (arguments.checkpoint / "../../../run.yaml").resolve())
    from crystal_hpc.convert.export import export_checkpoint

    tokenizer = arguments.tokenizer or Path(config.data.tokenizer)
    with shown_progress() as on_progress:
        said = export_checkpoint(
            arguments.checkpoint,
            config,
            tokenizer,
            arguments.out,
            arguments.dtype,
            not arguments.no_verify,
            arguments.overwrite,
            on_progress,
        )
    print(said)
    return 0


if __name__ == "__main__":
    run(main)
