"""Checks muP on a config: sizes of activations over widths, and whether the best learning rate stays where it is.

Trains the config's first phase at several widths, briefly, with muP and without: each width at one learning rate for
the coordinate check, and at each rate of a grid for the transfer sweep. The trainings are shared out among the ranks of
a local cluster, or the elements of a Slurm array.

    python tools/mup_sweep.py configs/crystal-demo.yaml --cluster configs/clusters/local.yaml --out mup/demo \\
        --widths 64,128,256 --rates 0.003,0.006,0.012,0.024 --steps 60 model.layers=2
    python tools/mup_sweep.py run.yaml --cluster cluster.yaml --out mup/run --widths 256,512,1024 --workers 16

The same command, given again, goes on: what is finished is not trained again. When all is, it draws report.html,
coordinates.svg and transfer.svg. On Slurm the first call submits, and a later one draws.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from crystal_hpc.config.load import load_cluster, load_run
from crystal_hpc.errors import ConfigError
from crystal_hpc.mup_check import page, sweep
from crystal_hpc.mup_check.points import Point, Sweep
from crystal_hpc.progress import run as run_tool
from crystal_hpc.progress import shown_progress

AGAIN = "give the same command again when it is over"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a run with a `mup` section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config: model.layers=2")
    parser.add_argument("--cluster", type=Path, required=True, help="where to train: a cluster profile")
    parser.add_argument("--out", type=Path, required=True, help="the sweep's folder, made or taken up again")
    parser.add_argument("--widths", required=True, help="values of model.hidden: 64,128,256")
    parser.add_argument("--rates", help="peak learning rates; none: ''; default: 1/16 to 4 times the config's")
    parser.add_argument("--steps", type=int, default=100, help="steps of each training of the transfer sweep")
    parser.add_argument("--coordinate-widths", help="widths of the coordinate check; default: --widths")
    parser.add_argument("--coordinate-rate", type=float, help="its learning rate; default: 1/4 of the config's")
    parser.add_argument("--coordinate-steps", type=int, default=6, help="its steps; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=8, help="elements of the Slurm array, all at once")
    return parser.parse_intermixed_args()


def main() -> int:
    """Submits what is missing, or draws what is there; returns the exit code."""
    arguments = parse()
    run, cluster = load_run(arguments.config, arguments.overrides), load_cluster(arguments.cluster)
    folder = arguments.out.resolve()
    found = sweep.prepare(folder, run, asked(arguments, run.phases[0].learning_rate.peak))
    if queued := sweep.queued(folder):
        print(f"{_done(folder, found)}; job {', '.join(queued)} is at work on the others; {AGAIN}")
        return 0
    if todo := sweep.missing(folder, found):
        jobs = sweep.submit(folder, cluster, max(min(arguments.workers, len(todo)), 1))
        print(f"{_done(folder, found)}; job {jobs[0].job_id.partition('_')[0]} trains the others", flush=True)
        if cluster.executor == "slurm":
            print(f"{AGAIN}; its logs are in {folder / 'logs'}")
            return 0
        with shown_progress() as progress:
            sweep.follow(folder, found, jobs, progress)
    print("\n".join(page.write_page(folder, run, sweep.read_results(folder, found))))
    print(folder / "report.html")
    return 0


def asked(arguments: argparse.Namespace, peak: float) -> Sweep:
    """The sweep that the options describe; `peak` is the config's own learning rate."""
    widths = _widths("--widths", arguments.widths)
    around = [peak * 2.0**power for power in range(-4, 3)]
    others = arguments.coordinate_widths
    return Sweep(
        widths=widths,
        rates=around if arguments.rates is None else _numbers("--rates", arguments.rates),
        steps=arguments.steps,
        coordinate_widths=widths if others is None else _widths("--coordinate-widths", others),
        coordinate_rate=peak / 4 if arguments.coordinate_rate is None else arguments.coordinate_rate,
        coordinate_steps=arguments.coordinate_steps,
    )


def _done(folder: Path, found: list[Point]) -> str:
    return f"{len(found) - len(sweep.missing(folder, found))} of {len(found)} points are done"


def _widths(option: str, words: str) -> list[int]:
    return [int(width) for width in _numbers(option, words, int)]


def _numbers(option: str, words: str, kind: Callable[[str], float] = float) -> list[float]:
    """Numbers with commas between them; raises ConfigError for anything else."""
    try:
        return [kind(word) for word in words.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{words!r}: write numbers with commas between them, as in 64,128,256", option) from None


if __name__ == "__main__":
    run_tool(main)
