"""Converts a checkpoint into a Hugging Face folder, or a Hugging Face folder into a checkpoint to begin a run with.

Which of the two, the source decides: a checkpoint has a manifest.json, a Hugging Face folder a config.json. Whatever
the size of the model, a few of its tensors are in memory at a time; run it again after it was killed, and it goes on.
By default the result is read back, and both models compute the same logits on the CPU, in float32; the latter takes
about 5 bytes of memory a parameter (`--verify weights` leaves it out).

    python tools/convert_checkpoint.py runs/demo/checkpoints/code/step_00000400 exports/demo
    python tools/convert_checkpoint.py runs/demo/checkpoints/code/step_00000400 exports/demo --dtype bfloat16
    python tools/convert_checkpoint.py archive/step_00000400 exports/demo --run demo.yaml --format llama
    python tools/convert_checkpoint.py downloads/Crystal weights/crystal
    python tools/convert_checkpoint.py downloads/Crystal weights/crystal --run configs/crystal-7b.yaml
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from crystal_hpc.errors import CheckpointError
from crystal_hpc.progress import Progress, run, shown_progress

if TYPE_CHECKING:
    from crystal_hpc.convert.export import Options


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder checkpoints/<phase>/step_<n>, or a Hugging Face folder")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument(
        "--run", type=Path,
        help="a run's config: of a checkpoint, the one it was trained with (default: run.yaml of its run folder); "
        "of a Hugging Face folder, one that its weights must fit",
    )  # fmt: skip
    parser.add_argument("--format", help="of the Hugging Face folder to write: crystalcoder (default), llama, stablelm")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json or the folder with one (default: the run's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as they are)")
    parser.add_argument("--shard-size", default="5GB", help="largest file of weights (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a conversion that is already there")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--verify", choices=("all", "weights", "none"), default="all", help="default: all")
    how.add_argument("--no-verify", dest="verify", action="store_const", const="none", help="the same as --verify none")
    return parser.parse_args()


def main() -> int:
    """Converts and verifies; returns the exit code."""
    arguments = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison wants plain float32, on a GPU machine too
    # Late: --help and the environment come before torch.
    from crystal_hpc.convert.export import Options, is_checkpoint, parse_size
    from crystal_hpc.convert.weights import FORMAT

    options = Options(
        format=arguments.format or FORMAT.name,
        dtype=arguments.dtype,
        shard_bytes=parse_size(arguments.shard_size),
        verify=arguments.verify,
        overwrite=arguments.overwrite,
    )
    with shown_progress() as on_progress:
        convert = to_hugging_face if is_checkpoint(arguments.source) else to_megatron
        said = convert(arguments, options, on_progress)
    print(said)
    return 0


def to_hugging_face(arguments: argparse.Namespace, options: "Options", on_progress: Progress) -> str:
    from crystal_hpc.convert.export import export_checkpoint
    from crystal_hpc.convert.reader import is_import, run_of

    config = run_of(arguments.source, arguments.run)
    tokenizer = arguments.tokenizer
    if tokenizer is None and (arguments.run or not is_import(arguments.source)):
        tokenizer = Path(config.data.tokenizer)
    return export_checkpoint(arguments.source, config, tokenizer, arguments.out, options, on_progress)


def to_megatron(arguments: argparse.Namespace, options: "Options", on_progress: Progress) -> str:
    from crystal_hpc.config.load import load_run
    from crystal_hpc.convert.export import import_folder

    for option in ("format", "tokenizer"):
        if getattr(arguments, option):
            raise CheckpointError(f"--{option} is for exports, and {arguments.source} is a Hugging Face folder")
    wanted = load_run(arguments.run) if arguments.run else None
    return import_folder(arguments.source, arguments.out, wanted, options, on_progress)


if __name__ == "__main__":
    run(main)
