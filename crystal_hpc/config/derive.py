"""Arithmetic on a config, and nothing else: steps, tokens, parameters, multipliers, learning rates.

Every number that is a consequence of the config is computed here, once, so that the plan printed before a run, the
training loop and the report cannot disagree. Pure functions; no torch, no files.
"""

import hashlib
import json
import math

from crystal_hpc.config.schema import Model, Mup, Phase, Run

MAY_CHANGE = ("parallel", "recompute", "kernels", "deterministic", "data")
"""Sections of a run that may be others in its next attempt: they say how and where, not what is trained."""


def phase_steps(phase: Phase) -> int:
    """Optimizer steps in a phase."""
    if phase.steps is not None:
        return phase.steps
    assert phase.tokens is not None
    return math.ceil(phase.tokens / tokens_per_step(phase))


def tokens_per_step(phase: Phase) -> int:
    """Tokens predicted in one step, over all ranks."""
    return phase.batch_size * phase.sequence_length


def phase_samples(phase: Phase) -> int:
    """Sequences in a whole phase."""
    return phase_steps(phase) * phase.batch_size


def phase_tokens(phase: Phase) -> int:
    """Tokens in a whole phase."""
    return phase_steps(phase) * tokens_per_step(phase)


def total_tokens(run: Run) -> int:
    """Tokens in the whole run."""
    return sum(phase_tokens(phase) for phase in run.phases)


def tokens_until(run: Run, phase_index: int, step: int) -> int:
    """Tokens seen by the run once `step` steps of phase `phase_index` are done."""
    before = sum(phase_tokens(phase) for phase in run.phases[:phase_index])
    return before + (step * tokens_per_step(run.phases[phase_index]) if phase_index < len(run.phases) else 0)


def parameters(model: Model) -> int:
    """Trainable parameters. Crystal-7B gives 6,575,278,720, its published count."""
    h, f = model.hidden, model.ffn
    matrices = 4 * h * h + 3 * h * f
    biases = (4 * h + 2 * f + h) if model.bias else 0
    norm = 2 * h if model.norm == "layernorm" else h
    embeddings = model.vocab_size * h * (1 if model.tied_embeddings else 2)
    return model.layers * (matrices + biases + 2 * norm) + norm + embeddings


def flops_per_token(model: Model, sequence_length: int) -> int:
    """Model FLOPs of forward and backward for one token: 6 a weight of a matrix, plus attention over a full sequence.

    Formula of the PaLM paper (arXiv 2204.02311, appendix B): 6 N + 12 L h s, the head counted, embeddings looked up.
    """
    matrices = model.layers * (4 * model.hidden**2 + 3 * model.hidden * model.ffn) + model.vocab_size * model.hidden
    return 6 * matrices + 12 * model.layers * model.hidden * sequence_length


def width_multiplier(model: Model, mup: Mup | None) -> float:
    """base_hidden / hidden with muP, else 1: how much smaller the learning rate of a matrix is."""
    return mup.base_hidden / model.hidden if mup else 1.0


def output_scale(model: Model, mup: Mup | None) -> float:
    """Factor on the logits."""
    return mup.output_multiplier * width_multiplier(model, mup) if mup else 1.0


def embedding_scale(mup: Mup | None) -> float:
    """Factor on the embedded tokens."""
    return mup.embedding_multiplier if mup else 1.0


def attention_scale(model: Model, mup: Mup | None) -> float:
    """Factor on query-key products: 1/d with muP, 1/sqrt(d) without."""
    head = model.hidden // model.heads
    return 1 / head if mup and mup.scale_attention_by_head else 1 / math.sqrt(head)


def init_std(model: Model, mup: Mup | None, role: str) -> float:
    """Standard deviation of an initial weight by role: `embedding`, `matrix` or `residual` (written to the stream).

    Matrices shrink with sqrt(base_hidden / hidden) under muP; those that write to the residual stream also with
    sqrt(2 layers), as in GPT-2. An untied head counts as an embedding: its width is dealt with by the factor on the
    logits (muP, arXiv 2203.03466, table 8).
    """
    if role == "embedding":
        return model.init_std
    std = model.init_std * math.sqrt(width_multiplier(model, mup))
    return std / math.sqrt(2 * model.layers) if role == "residual" else std


def learning_rate(phase: Phase, step: int) -> float:
    """Rate of embeddings, norms and biases in step `step` of the phase (0-based).

    The first step already moves: with W warm-up steps, step s < W uses peak * (s + 1) / W, and step W is the first of
    the decay, at the peak.
    """
    rate = phase.learning_rate
    if step < rate.warmup_steps:
        return rate.peak * (step + 1) / rate.warmup_steps
    if rate.decay == "constant":
        return rate.peak
    length = rate.decay_steps or max(phase_steps(phase) - rate.warmup_steps, 1)
    done = min((step - rate.warmup_steps) / length, 1.0)
    if rate.decay == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return rate.peak + (rate.end - rate.peak) * done


def data_parallel(run: Run, ranks: int) -> int:
    """Data-parallel ranks among `ranks` ranks (which `check` has found divisible)."""
    return ranks // model_parallel(run)


def model_parallel(run: Run) -> int:
    """Ranks that work on the same rows together."""
    return run.parallel.tensor * run.parallel.pipeline * run.parallel.context


def micro_batches(run: Run, phase: Phase, ranks: int) -> int:
    """Micro-batches that each data-parallel rank accumulates in a step."""
    return phase.batch_size // (run.parallel.micro_batch * data_parallel(run, ranks))


def run_digest(run: Run) -> str:
    """Identity of what is trained.

    Leaves out the parallel layout, how the same numbers are computed and the keeping of checkpoints, which may change
    between attempts, and where data and first weights lie (plan.json keeps the stores' digests).
    """
    content = run.model_dump(mode="json", exclude={*MAY_CHANGE, "checkpoints", "start_from"})
    if run.fp8 is None:
        del content["fp8"]  # so that a run keeps the identity that it had before there was the key
    for phase in content["phases"]:
        del phase["checkpoint_every"], phase["keep_every"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
