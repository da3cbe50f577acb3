"""Every key a config may have, with its type, unit and default.

`Run` is what is trained: model, data, phases. `Cluster` is where: the same run moves between clusters unchanged.
Unknown keys and wrong types are errors (`load` reports all of them at once); what several keys must agree on is in
`check`. The docstring under a field is its documentation: `describe` puts it into the JSON Schema that editors read.
"""

from typing import Annotated, Literal

from pydantic import Field

from crystal_hpc.config.compute import Fp8, Kernels, Parallel, Recompute
from crystal_hpc.config.fields import Count, Fraction, Name, Positive, Seconds, Strict


class Model(Strict):
    """The architecture: a decoder-only transformer with rotary positions and SwiGLU."""

    layers: Positive
    """Transformer blocks."""
    hidden: Positive
    """Width of the residual stream."""
    heads: Positive
    """Attention heads; each is hidden / heads wide."""
    ffn: Positive
    """Width of each of the two SwiGLU input matrices (Crystal: 8/3 of hidden, rounded down)."""
    vocab_size: Positive
    """Rows of the embedding table; at least as many as the tokenizer has ids."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each attention and feed-forward part, and after the last block."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the variance before its square root."""
    bias: bool = True
    """Biases on every linear layer but the output head."""
    rotary_fraction: Fraction = 0.25
    """Share of each head's dimensions that is rotated."""
    rotary_base: Positive = 10000
    """Base of the rotary wavelengths."""
    rotary_interleaved: bool = True
    """Pairs (0,1), (2,3), ... as GPT-J does, rather than (0, n/2), (1, n/2+1), ..."""
    tied_embeddings: bool = True
    """One table for the embedding and the output head."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial embedding; with muP, of matrices at the base width too."""


class Mup(Strict):
    """Maximal update parametrization as Crystal used it: multipliers tuned at a base width, rescaled to this one."""

    base_hidden: Positive
    """Width at which the learning rate, init and multipliers were tuned."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """Embedded tokens are multiplied by this."""
    output_multiplier: float = Field(default=1.0, gt=0)
    """Logits are multiplied by this times base_hidden / hidden."""
    scale_attention_by_head: bool = True
    """Attention scores divided by the head width rather than by its square root."""


class Optimizer(Strict):
    """AdamW with decoupled weight decay on matrices and embeddings, none on biases and norms."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients, a step."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients, a step."""
    epsilon: float = Field(default=1e-9, gt=0)
    """Added to the root of the mean squared gradient."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Share of a matrix or embedding taken away in a step, times its learning rate."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class Data(Strict):
    """Token stores by source name. Paths are relative to the folder in which the command runs."""

    tokenizer: str
    """A tokenizer.json, or a folder that holds one."""
    sources: dict[Name, str] = Field(min_length=1)
    """Training stores: name -> folder."""
    held_out: dict[Name, str] = Field(default_factory=dict)
    """Stores that are evaluated at the end of each phase and never trained on: name -> folder."""
    check: bool = True
    """Whether each 64 KiB of tokens is compared with its digest when something of it is first read."""
    most_epochs: dict[Name, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """How often the whole run may read a source, by source; one that is not named may be read any number of times."""


class LearningRate(Strict):
    """One phase's piece of the schedule: warm up from zero to `peak`, then decay towards `end`."""

    peak: float = Field(gt=0)
    """Rate of embeddings, norms and biases; with muP, matrices get this times base_hidden / hidden."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the rate rises evenly to `peak`."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """The way from `peak` to `end`; `constant` stays at the peak."""
    end: float = Field(default=0.0, ge=0)
    """Rate at the end of the decay; at most `peak`."""
    decay_steps: Positive | None = None
    """Steps from the peak to `end`; more than the phase has cuts the decay short. Default: the rest of the phase."""


class Fim(Strict):
    """Fill-in-the-middle of a source: documents cut in three, and written as prefix, suffix, middle."""

    rate: Fraction
    """Share of the document segments in a row that are rewritten (Crystal: 0.9, then 0.3)."""
    spm_rate: Fraction = 0.5
    """Share of those that are written suffix first (SPM); the others begin with the prefix (PSM)."""
    spm_variant: Literal[1, 2] = 2
    """1: suffix, prefix, middle with a sentinel before each; 2: prefix and middle together behind the last sentinel."""
    level: Literal["character", "token"] = "character"
    """Where a segment may be cut: between characters, its parts then encoded anew, or only between its tokens."""
    loss: Literal["all", "middle"] = "all"
    """What a rewritten segment trains: every token, or only its middle and the end of the document."""


class Phase(Strict):
    """A stretch of training with one data mixture and one piece of learning-rate schedule."""

    name: Name
    """Names the phase in checkpoints, metrics and overrides; also keys its order of samples."""
    sequence_length: Positive
    """Tokens predicted in one sequence."""
    batch_size: Positive
    """Sequences in a step, over all ranks."""
    steps: Positive | None = None
    """Length of the phase; give this or `tokens`."""
    tokens: Count | None = None
    """Length of the phase in tokens (1.5M, 345B), rounded up to whole steps."""
    mixture: dict[Name, Fraction] = Field(min_length=1)
    """Share of the samples by source; sums to one."""
    fim: dict[Name, Fim] = Field(default_factory=dict)
    """Fill-in-the-middle by source; a source that is not named is read as it is."""
    learning_rate: LearningRate
    """The phase's piece of the schedule."""
    optimizer_state: Literal["carry", "fresh"] = "carry"
    """Whether Adam's moments come along from the phase before."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; one is always made at the end of the phase."""
    keep_every: Positive | None = None
    """Checkpoints of each so many steps are kept for good, as the end of the phase is; a multiple of
    `checkpoint_every`."""


class Checkpoints(Strict):
    """When the state is saved, beside `checkpoint_every` and the ends of phases, and how much of it is kept."""

    every: Seconds | None = None
    """Time between checkpoints (30min), whatever the number of steps."""
    asynchronous: bool = True
    """Whether training goes on while a periodic checkpoint is written, from a copy of the state in memory."""
    keep_last: Positive = 3
    """Periodic checkpoints to keep, the newest ones. Ends of phases, `keep_every` and those kept by name come on top; a
    save on preemption or at the time limit is deleted when a newer checkpoint has been made."""


class Evaluation(Strict):
    """Held-out loss at the end of each phase."""

    rows: Positive = 64
    """Sequences of each held-out store, always the first ones; fewer where the store has fewer."""


class Run(Strict):
    """A whole pretraining run."""

    name: Name
    """Names the run's folder and its jobs."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """Decides the initial weights and the order of the samples."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the forward and backward pass; main weights and gradients are float32 either way."""
    fp8: Fp8 | None = None
    """Matrix products in 8 bits; needs `precision: bf16`. Without it, none are."""
    model: Model
    """The architecture."""
    mup: Mup | None = None
    """Maximal update parametrization; without it, one learning rate for all."""
    optimizer: Optimizer = Optimizer()
    """AdamW's numbers, the same in every phase."""
    parallel: Parallel = Parallel()
    """How the ranks share the model."""
    recompute: Recompute = Recompute()
    """What the backward pass computes again rather than keep in memory."""
    kernels: Kernels = Kernels()
    """Which implementations of the model's parts are used."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, which costs speed; on the CPU rig it is always so."""
    data: Data
    """The tokenizer and the token stores."""
    evaluation: Evaluation = Evaluation()
    """Held-out loss at the end of each phase."""
    checkpoints: Checkpoints = Checkpoints()
    """When the state is saved, and how much is kept."""
    start_from: str | None = None
    """A checkpoint, of a run or converted from elsewhere, whose weights the first phase begins with; without it they
    are random."""
    phases: list[Phase] = Field(min_length=1)
    """The stretches of training, in order."""


class Container(Strict):
    """Where the ranks run, if not on the node as it is."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: srun's --container-image (Enroot); `apptainer`: each rank inside `apptainer exec`."""
    image: str = Field(min_length=1)
    """What the runtime calls its image: a registry name, a .sqsh or a .sif file."""
    mounts: list[str] = Field(default_factory=list)
    """Folders to see inside, as `/path` or `/outside:/inside`; runs, stores and the package must be among them."""
    python: str = Field(default="python3", min_length=1)
    """The interpreter inside, with crystal_hpc installed."""


class SideJob(Strict):
    """A job of the chain beside the training."""

    time_limit: Seconds
    """Its time limit."""
    ranks: Positive = 1
    """Its processes, all on one node."""
    partition: str | None = None
    """Partition, if not that of the training."""


class Slurm(Strict):
    """What is asked of Slurm. Each key is sbatch's own option unless it says otherwise."""

    partition: str | None = None
    """--partition; Slurm's default without it."""
    account: str | None = None
    """--account"""
    qos: str | None = None
    """--qos"""
    constraint: str | None = None
    """--constraint: features that each node must have."""
    exclude: list[str] = Field(default_factory=list)
    """--exclude: nodes to leave out. Nodes that failed a run twice are added."""
    gpus: bool = True
    """One GPU for each rank (--gpus-per-node). Off where nodes have none: the ranks then run on the CPU rig."""
    cpus_per_rank: Positive | None = None
    """--cpus-per-task"""
    memory: str | None = None
    """--mem, of each node; `0` asks for all of it."""
    exclusive: bool = False
    """--exclusive: nodes to ourselves."""
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    """Any other option of sbatch by its long name (reservation: night); `true` for one without a value."""
    resume_by: Literal["requeue", "slices"] = "requeue"
    """How a phase goes on at its time limit: `requeue`: one job that goes back to the queue; `slices`: an array of
    jobs, one after the other, for sites that do not allow requeueing."""
    slices: Positive = 20
    """With `slices`, how many at most for each phase; those that are not needed are taken from the queue."""
    modules: list[str] = Field(default_factory=list)
    """Loaded with `module load` before anything runs."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines for the batch script, after the modules."""
    container: Container | None = None
    """Where the ranks run, if not on the node as it is."""
    scratch: str | None = None
    """Node-local disk for staged data, as the shell spells it (/scratch/$USER); CRYSTAL_SCRATCH in the job."""
    network: dict[str, str] = Field(default_factory=dict)
    """Environment variables of NCCL, Gloo and the fabric (NCCL_SOCKET_IFNAME: hsn0)."""
    stage: SideJob | None = None
    """A job before each phase that reads its token stores against their digests; without it, nobody does."""
    evaluate: SideJob | None = None
    """A job after each phase for the held-out losses; without it, the training job evaluates."""


class Staging(Strict):
    """What of the training data comes to the nodes' own disks. Where it cannot, shared storage is read."""

    mode: Literal["whole", "slice"]
    """`whole`: every store of the phase on every node, before it begins; `slice`: the rows that a node will read next,
    while it trains."""
    folder: str = "$CRYSTAL_SCRATCH"
    """The node's own disk; $NAME is replaced by its value on each node (/local/$SLURMD_NODENAME)."""
    span: Positive = 500
    """With `slice`: steps in one slice; two slices lie on the disk at a time."""
    mpi: str = Field(default="pmi2", pattern=r"^[A-Za-z0-9_]+$")
    """With `whole`: the kind of MPI that srun starts the copying with, so that shared storage is read once (`srun
    --mpi=list` knows them); where srun or mpi4py cannot, each node copies for itself."""


class Cluster(Strict):
    """A machine to run on."""

    name: Name
    """Names the cluster in messages."""
    executor: Literal["local", "slurm"]
    """`local`: the ranks are processes of this machine; `slurm`: jobs. Both are started by submitit."""
    nodes: Positive = 1
    """Nodes of a training job."""
    ranks_per_node: Positive
    """Processes on each node, one for each GPU (or share of the CPU)."""
    gpu: str | None = None
    """The nodes' GPUs (a100-80gb, h100-sxm, h200, ...): `crystal plan` compares a run's memory with theirs."""
    time_limit: Seconds
    """Longest life of one attempt (30min, 24h)."""
    signal_delay: Seconds = Field(default=90, json_schema_extra={"default": "90s"})
    """How long before the time limit the job is told to save."""
    hang_limit: Seconds = Field(default=900, json_schema_extra={"default": "900s"})
    """How long start-up, a first step or a save may take before the attempt is given up; a later step may take 20
    times what the slowest so far took, at least a minute, and never longer than this."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank."""
    staging: Staging | None = None
    """What of the data comes to the nodes' own disks; without it, all is read from shared storage."""
    slurm: Slurm = Field(default_factory=Slurm)
    """What is asked of Slurm."""

    @property
    def ranks(self) -> int:
        """Processes of a training job."""
        return self.nodes * self.ranks_per_node
