"""What several keys of a config must agree on. Each rule yields a line that says what is wrong and what would be right.

Types and unknown keys are `load`'s concern; what needs the disk (stores, tokenizer) is `report.plan`'s and the job's.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator

from crystal_hpc.config import check_compute as compute
from crystal_hpc.config import derive, devices
from crystal_hpc.config.schema import Cluster, Phase, Run, Slurm

# Options of sbatch that a job of ours cannot work without.
OURS = {"array", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "ntasks-per-node", "open-mode"}
OURS |= {"output", "requeue", "signal", "time"}
SMALLEST_WEIGHT = 1e-9
BAD_VARIABLE = re.compile(r"\$(?![A-Za-z_]|\{[A-Za-z_]\w*\})|`|^~")  # of a path in which only variables are replaced
SUM_TOLERANCE = 1e-5  # published weights are rounded: Crystal's phase 1 sums to 0.999999


def run_problems(run: Run) -> Iterator[str]:
    """Everything in a run that cannot work whatever the cluster."""
    model, parallel = run.model, run.parallel
    if model.hidden % model.heads:
        yield f"model.heads: {model.heads} does not divide model.hidden = {model.hidden}"
    elif int(model.hidden // model.heads * model.rotary_fraction) % 2:
        yield f"model.rotary_fraction: {model.rotary_fraction} of a head of {model.hidden // model.heads} is odd"
    if model.heads % parallel.tensor:
        yield (
            f"parallel.tensor: {parallel.tensor} does not divide model.heads = {model.heads}; "
            f"choose one of {_divisors(model.heads)}"
        )
    if model.vocab_size % parallel.tensor:
        # Megatron would pad the vocabulary, and the loss of a layout would count tokens that do not exist.
        fits = math.ceil(model.vocab_size / parallel.tensor) * parallel.tensor
        yield (
            f"model.vocab_size: {model.vocab_size} is not a multiple of parallel.tensor = {parallel.tensor}; "
            f"make it {fits}"
        )
    if model.layers % parallel.pipeline:
        yield (
            f"parallel.pipeline: {parallel.pipeline} does not divide model.layers = {model.layers}; "
            f"choose one of {_divisors(model.layers)}"
        )
    yield from compute.problems(run)
    names = [phase.name for phase in run.phases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"phases: two phases are called {name!r}; give each its own name"
    for name in sorted(set(run.data.held_out.values()) & set(run.data.sources.values())):
        yield f"data.held_out: {name} is also a training source; held-out documents must not be trained on"
    for name in run.data.most_epochs:
        if name not in run.data.sources:
            yield f"data.most_epochs.{name}: no such source{did_you_mean(name, run.data.sources)}"
    for index, phase in enumerate(run.phases):
        yield from (f"phases.{index}.{problem}" for problem in _phase_problems(run, phase))


def _phase_problems(run: Run, phase: Phase) -> Iterator[str]:
    if (phase.steps is None) == (phase.tokens is None):
        yield "steps: give exactly one of steps and tokens"
    for source in phase.mixture:
        if source not in run.data.sources:
            yield f"mixture.{source}: no such source{did_you_mean(source, run.data.sources)}"
        if 0 < phase.mixture[source] < SMALLEST_WEIGHT:
            yield f"mixture.{source}: {phase.mixture[source]:g} is less than {SMALLEST_WEIGHT:g}; leave the source out"
    for source in phase.fim:
        if source not in phase.mixture:
            yield f"fim.{source}: no such source in the phase's mixture{did_you_mean(source, phase.mixture)}"
    total = math.fsum(phase.mixture.values())
    if abs(total - 1) > SUM_TOLERANCE:
        yield f"mixture: the weights sum to {total:g}, not 1"
    if phase.batch_size % run.parallel.micro_batch:
        yield f"batch_size: {phase.batch_size} is not a multiple of parallel.micro_batch = {run.parallel.micro_batch}"
    if phase.keep_every and phase.keep_every % (phase.checkpoint_every or phase.keep_every + 1):
        made = phase.checkpoint_every or "not set"
        yield f"keep_every: {phase.keep_every} is not a multiple of checkpoint_every, which is {made}"
    if phase.learning_rate.end > phase.learning_rate.peak:
        yield f"learning_rate.end: {phase.learning_rate.end:g} is above the peak {phase.learning_rate.peak:g}"
    if phase.steps or phase.tokens:
        steps, warmup = derive.phase_steps(phase), phase.learning_rate.warmup_steps
        if warmup > steps:
            yield f"learning_rate.warmup_steps: {warmup} is more than the phase's {steps}"


def cluster_problems(cluster: Cluster) -> Iterator[str]:
    """Everything in a cluster profile that cannot work whatever the run."""
    if cluster.signal_delay >= cluster.time_limit:
        yield f"signal_delay: {cluster.signal_delay}s leaves nothing of the time limit of {cluster.time_limit}s"
    for kind, side in (("stage", cluster.slurm.stage), ("evaluate", cluster.slurm.evaluate)):
        if side and side.time_limit <= cluster.signal_delay:
            said = f"{side.time_limit}s is not longer than signal_delay: {cluster.signal_delay}s"
            yield f"slurm.{kind}.time_limit: {said}"
    if cluster.gpu is not None and cluster.gpu not in devices.DEVICES:
        yield f"gpu: {cluster.gpu!r} is not known{did_you_mean(cluster.gpu, devices.DEVICES)}"
    if cluster.executor == "local":
        if cluster.nodes != 1:
            yield f"nodes: {cluster.nodes}; the local executor has this machine alone: make it 1, or executor: slurm"
        if cluster.slurm != Slurm():
            yield "slurm: is for executor: slurm; this profile says local"
    yield from _staging_problems(cluster)
    for name in cluster.slurm.options:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            yield f"slurm.options: {name!r} is no long option of sbatch"
        elif name.replace("_", "-") in OURS:
            yield f"slurm.options.{name}: crystal sets this one itself"
    if BAD_VARIABLE.search(cluster.slurm.scratch or ""):
        yield f"slurm.scratch: {cluster.slurm.scratch!r}: only $NAME and ${{NAME}} are replaced by their values"
    for mount in cluster.slurm.container.mounts if cluster.slurm.container else ():
        if "," in mount:
            yield f"slurm.container.mounts: {mount!r}: one folder an entry, no commas"
    for variables in ("environment", "slurm.network"):
        found = cluster.environment if variables == "environment" else cluster.slurm.network
        for name, value in found.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
                yield f"{variables}.{name}: not a name of an environment variable, or not a value that one can have"


def _staging_problems(cluster: Cluster) -> Iterator[str]:
    staging = cluster.staging
    if staging is None:
        return
    if BAD_VARIABLE.search(staging.folder):
        yield f"staging.folder: {staging.folder!r}: only $NAME and ${{NAME}} are replaced by their values"
    elif not staging.folder.startswith(("/", "$")):
        yield f"staging.folder: {staging.folder!r} is not an absolute path; name a folder on the nodes' own disks"
    known = cluster.slurm.scratch or "CRYSTAL_SCRATCH" in cluster.environment
    if re.search(r"\$\{?CRYSTAL_SCRATCH\b", staging.folder) and not known:
        how = "slurm.scratch" if cluster.executor == "slurm" else "environment.CRYSTAL_SCRATCH"
        yield f"staging.folder: {staging.folder} is set by {how}, which is missing; add it, or name a folder here"


def layout_problems(run: Run, cluster: Cluster) -> Iterator[str]:
    """Everything in a run that cannot work on this cluster."""
    if run.fp8 and run.fp8.recipe == "delayed":
        yield (
            "fp8.recipe: delayed keeps scales from step to step, which checkpoints do not carry: a resumed job would "
            "not compute the same; choose tensorwise or blockwise"
        )
    block = derive.model_parallel(run)
    product = "tensor x pipeline" + " x context" * (run.parallel.context > 1)
    if cluster.ranks % block:
        yield (f"parallel: {product} = {block} does not divide the {cluster.ranks} ranks of cluster {cluster.name!r}")
        return
    evaluate = cluster.slurm.evaluate
    if evaluate and evaluate.ranks % block:
        yield (
            f"slurm.evaluate.ranks: {evaluate.ranks} is not a multiple of parallel: {product} = {block}, "
            f"the ranks that the model needs; make it {math.ceil(evaluate.ranks / block) * block}"
        )
    share = run.parallel.micro_batch * derive.data_parallel(run, cluster.ranks)
    if run.data.held_out and run.evaluation.rows % share:
        yield (
            f"evaluation.rows: {run.evaluation.rows} is not a multiple of micro_batch x data-parallel ranks = {share}; "
            f"choose for example {math.ceil(run.evaluation.rows / share) * share}"
        )
    for index, phase in enumerate(run.phases):
        if phase.batch_size % share:
            yield (
                f"phases.{index}.batch_size: {phase.batch_size} is not a multiple of micro_batch x data-parallel "
                f"ranks = {share}"
            )


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` or, with nothing near, the list of choices."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(sorted(choices))}"


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
