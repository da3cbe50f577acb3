"""Every key a config may have, with its type, unit and default.

`Run` is what is trained: model, data, phases. `Cluster` is where: the same run moves between clusters unchanged.
Unknown keys and wrong types are errors (`load` reports all of them at once); what several keys must agree on is in
`check`. A field's description is its documentation: it appears in the JSON Schema that editors read.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from crystal_hpc.config.units import parse_count, parse_seconds

Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Seconds = Annotated[int, BeforeValidator(parse_seconds), Field(gt=0)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A name becomes a folder, a job name and a word in a shell line.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Strict(BaseModel):
    """Immutable; no key beyond those declared; no silent change of type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Model(Strict):
    """The architecture: a decoder-only transformer with rotary positions and SwiGLU."""

    layers: Positive
    hidden: Positive
    """Width of the residual stream."""
    heads: Positive
    ffn: Positive
    """Width of each of the two SwiGLU input matrices (Crystal: 8/3 of hidden, rounded down)."""
    vocab_size: Positive
    """Rows of the embedding table; at least as many as the tokenizer has ids."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    bias: bool = True
    """Biases on every linear layer but the output head."""
    rotary_fraction: Fraction = 0.25
    """Share of each head's dimensions that is rotated."""
    rotary_base: Positive = 10000
    rotary_interleaved: bool = True
    """Pairs (0,1), (2,3), ... as GPT-J does, rather than (0, n/2), (1, n/2+1), ..."""
    tied_embeddings: bool = True
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial embedding; with muP, of matrices at the base width too."""


class Mup(Strict):
    """Maximal update parametrization as Crystal used it: multipliers tuned at a base width, rescaled to this one."""

    base_hidden: Positive
    """Width at which the learning rate, init and multipliers were tuned."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    output_multiplier: float = Field(default=1.0, gt=0)
    """Logits are multiplied by this times base_hidden / hidden."""
    scale_attention_by_head: bool = True
    """Attention scores divided by the head width rather than by its square root."""


class Optimizer(Strict):
    """AdamW with decoupled weight decay on matrices and embeddings, none on biases and norms."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: float = Field(default=1e-9, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class Parallel(Strict):
    """How the ranks share the model; data-parallel ranks are what is left. May change between attempts of a run."""

    tensor: Positive = 1
    pipeline: Positive = 1
    micro_batch: Positive = 1
    """Sequences in one forward pass of one data-parallel rank."""
    distributed_optimizer: bool = True
    """Share the optimizer's state among the data-parallel ranks."""


class Data(Strict):
    """Token stores by source name. Paths are relative to the folder in which the command runs."""

    tokenizer: str
    """A tokenizer.json, or a folder that holds one."""
    sources: dict[Name, str] = Field(min_length=1)
    """Training stores: name -> folder."""
    held_out: dict[Name, str] = Field(default_factory=dict)
    """Stores that are evaluated at the end of each phase and never trained on: name -> folder."""


class LearningRate(Strict):
    """One phase's piece of the schedule: warm up from zero to `peak`, then decay towards `end`."""

    peak: float = Field(gt=0)
    """Rate of embeddings, norms and biases; with muP, matrices get this times base_hidden / hidden."""
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["linear", "cosine", "constant"] = "linear"
    end: float = Field(default=0.0, ge=0)
    decay_steps: Positive | None = None
    """Steps from the peak to `end`; more than the phase has cuts the decay short. Default: the rest of the phase."""


class Phase(Strict):
    """A stretch of training with one data mixture and one piece of learning-rate schedule."""

    name: Name
    sequence_length: Positive
    batch_size: Positive
    """Sequences in a step, over all ranks."""
    steps: Positive | None = None
    """Length of the phase; give this or `tokens`."""
    tokens: Count | None = None
    """Length of the phase in tokens (1.5M, 345B), rounded up to whole steps."""
    mixture: dict[Name, Fraction] = Field(min_length=1)
    """Share of the samples by source; sums to one."""
    learning_rate: LearningRate
    optimizer_state: Literal["carry", "fresh"] = "carry"
    """Whether Adam's moments come along from the phase before."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; the end of the phase is always kept."""


class Evaluation(Strict):
    """Held-out loss at the end of each phase."""

    rows: Positive = 64
    """Sequences of each held-out store, always the first ones; fewer where the store has fewer."""


class Run(Strict):
    """A whole pretraining run."""

    name: Name
    seed: int = Field(default=1, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    model: Model
    mup: Mup | None = None
    optimizer: Optimizer = Optimizer()
    parallel: Parallel = Parallel()
    data: Data
    evaluation: Evaluation = Evaluation()
    phases: list[Phase] = Field(min_length=1)


class Cluster(Strict):
    """A machine to run on."""

    name: Name
    executor: Literal["local"]
    """`local`: the ranks are processes of this machine, started by submitit."""
    ranks: Positive
    time_limit: Seconds
    """Longest life of one attempt (30min, 24h)."""
    signal_delay: Seconds = 90
    """How long before the time limit the job is told to save."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
