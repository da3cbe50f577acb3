"""The memory that a run takes of each GPU, by arithmetic on its config: what `crystal plan` prints of it.

Weights, gradients and optimizer state are counted tensor by tensor, as Megatron lays them out. Activations are what one
forward pass keeps for its backward pass: the terms of Korthikanti et al. (arXiv 2205.05198, section 4) for this model,
that is with SwiGLU, without dropout, and with the attention scores kept or not as the attention kernel does. All
numbers are of one rank. No torch here. Which kernels there are is taken for granted: on a GPU, Transformer Engine and
Triton, unless the config says otherwise; on the CPU rig, neither.

Left out: CUDA's and NCCL's own memory and what the allocator cannot use (`allowance`), and buffers of a few megabytes.
"""

import math
from dataclasses import dataclass

from crystal_hpc.config import derive
from crystal_hpc.config.devices import GIB
from crystal_hpc.config.schema import Phase, Run

ALIGNED = 128
"""On a GPU each rank's feed-forward width is padded to a multiple of this: the block of `blockwise`, and what tensor
cores want (NVIDIA's guide to matrix multiplication: 128 bytes at least)."""
FLOAT, INDEX = 4, 8  # bytes of a float32 and of a token's id
ALLOWANCE = 2 * GIB
ALLOWANCE_SHARE = 0.05


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of a pipeline stage."""

    stage: int
    in_flight: int
    """Micro-batches whose activations are held at a time."""
    weights: int
    """In the format of the forward pass; with FP8, the 8-bit copies too."""
    gradients: int
    """Float32, all of them on every data-parallel rank."""
    optimizer: int
    """Adam's two moments and, in bf16 runs, the main weights: float32, shared out by the distributed optimizer."""
    activations: int
    """Kept for the backward pass, of all micro-batches in flight."""
    working: int
    """Beside these at the peak: gradients of activations, a recomputed block, a weight gradient not yet added."""

    @property
    def total(self) -> int:
        """What `torch.cuda.max_memory_allocated` is to show."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    @property
    def allowance(self) -> int:
        """Assumed, not measured: 2 GiB for driver, CUDA context, NCCL and cuBLAS, and 5 % for fragmentation."""
        return ALLOWANCE + int(ALLOWANCE_SHARE * self.total)


def stages(run: Run, phase: Phase, ranks: int, gpu: bool = True) -> list[StageMemory]:
    """One entry for each pipeline stage, in order; `ranks` of the whole job, which fit the layout."""
    if gpu:
        run = run.model_copy(update={"model": run.model.model_copy(update={"ffn": padded_ffn(run)})})
    return [_stage(run, phase, ranks, stage, gpu) for stage in range(run.parallel.pipeline)]


def padded_ffn(run: Run, gpu: bool = True) -> int:
    """The feed-forward width in memory: on a GPU, a multiple of 128 for each tensor-parallel rank.

    What is added is zero and stays zero for ever: silu(0) * 0 is 0, so the added columns of fc2 get no gradient; they
    are zero, so the added rows of fc1 get none; and neither Adam nor weight decay moves a zero without a gradient.
    Checkpoints leave it out (`train.sharding`).
    """
    multiple = (ALIGNED if gpu else 1) * run.parallel.tensor
    return math.ceil(run.model.ffn / multiple) * multiple


def _stage(run: Run, phase: Phase, ranks: int, stage: int, gpu: bool) -> StageMemory:
    parallel = run.parallel
    count, number = weights(run, stage), Activations(run, phase, gpu)
    state = (8 if run.precision == "fp32" else 12) * count
    if parallel.distributed_optimizer:
        state = math.ceil(state / (derive.data_parallel(run, ranks) * parallel.context))
    # One forward, one backward (1F1B): the first stage runs ahead by as many micro-batches as there are stages.
    in_flight = min(parallel.pipeline - stage, derive.micro_batches(run, phase, ranks))
    return StageMemory(
        stage=stage,
        in_flight=in_flight,
        weights=count * number.size + _eight_bit_copies(run, stage),
        gradients=FLOAT * count,
        optimizer=state,
        activations=in_flight * (number.saved(stage) + number.sent(stage)),
        working=number.working(stage),
    )


def weights(run: Run, stage: int) -> int:
    """Weights on one rank of a stage. A last stage has its own copy of a tied embedding."""
    model, tensor = run.model, run.parallel.tensor
    h, f, first, last = model.hidden, model.ffn, *_ends(run, stage)
    norm = 2 * h if model.norm == "layernorm" else h
    biases = (3 * h + 2 * f) // tensor + 2 * h if model.bias else 0  # those of the two that write the stream are whole
    table = model.vocab_size * h // tensor
    tables = max(first, last) if model.tied_embeddings else first + last
    layers = model.layers // run.parallel.pipeline
    return layers * (_matrices(run) + biases + 2 * norm) + tables * table + last * norm


def _matrices(run: Run) -> int:
    """Weights of a block's matrices on one rank."""
    h, f = run.model.hidden, run.model.ffn
    return (4 * h * h + 3 * h * f) // run.parallel.tensor


def _eight_bit_copies(run: Run, stage: int) -> int:
    """Transformer Engine keeps each FP8 matrix in 8 bits twice, as it is and transposed."""
    return 2 * _matrices(run) * sum(_is_eight_bit(run, layer) for layer in _layers(run, stage))


def _is_eight_bit(run: Run, layer: int) -> bool:
    fp8 = run.fp8
    return fp8 is not None and fp8.bf16_first_layers <= layer < run.model.layers - fp8.bf16_last_layers


def _layers(run: Run, stage: int) -> range:
    count = run.model.layers // run.parallel.pipeline
    return range(stage * count, (stage + 1) * count)


def _ends(run: Run, stage: int) -> tuple[bool, bool]:
    """Whether the stage has the embedding, and whether it has the head."""
    return stage == 0, stage == run.parallel.pipeline - 1


class Activations:
    """Bytes of activations, of one micro-batch on one rank."""

    def __init__(self, run: Run, phase: Phase, gpu: bool) -> None:
        self.run, self.length, self.gpu = run, phase.sequence_length, gpu
        self.size = FLOAT if run.precision == "fp32" else 2
        parallel, kernels = run.parallel, run.kernels
        self.tokens = parallel.micro_batch * phase.sequence_length // parallel.context
        # Of the residual stream and the norms: the tensor ranks share it with sequence parallelism.
        self.stream = self.tokens // (parallel.tensor if parallel.sequence else 1)
        self.engine = gpu and kernels.layers != "megatron"
        # Flash and fused attention compute in 16 bits.
        self.scores_kept = not self.engine or kernels.attention == "unfused" or run.precision == "fp32"
        self.recomputed = set(run.recompute.modules) if run.recompute.mode == "selective" else set()

    def saved(self, stage: int) -> int:
        """What autograd keeps in a stage."""
        first, last = _ends(self.run, stage)
        return (
            sum(self._kept(layer, place) for place, layer in enumerate(_layers(self.run, stage)))
            + first * self.tokens * INDEX
            + last * (self._norm(self.size) + self._logits() * self._loss_size())
        )

    def sent(self, stage: int) -> int:
        """A stage's output, which the schedule holds until its gradient comes."""
        return 0 if _ends(self.run, stage)[1] else self._hidden()

    def working(self, stage: int) -> int:
        """The larger of what the head and a block need in their backward pass."""
        run, (_, last) = self.run, _ends(self.run, stage)
        model, tensor = run.model, run.parallel.tensor
        # The gradient of the logits; then that of the head's weights, which waits for the embedding's where they are
        # tied. In a block, of what SwiGLU made and was made of; and of a matrix, unless its kernel adds it to the rest.
        head = last * max(self._logits(), model.vocab_size * model.hidden // tensor) * self.size
        apart = run.kernels.gradient_accumulation == "unfused" or not self.engine
        block = (self.tokens * 3 * model.ffn + apart * 2 * model.ffn * model.hidden) // tensor * self.size
        again = max(self._block(layer) - self._kept(layer, place) for place, layer in enumerate(_layers(run, stage)))
        return max(head, block + again)

    def _kept(self, layer: int, place: int) -> int:
        """Of a block, `place` counted in its stage, with recomputation."""
        recompute = self.run.recompute
        if recompute.mode == "full" and (recompute.layers is None or place < recompute.layers):
            return self._hidden()
        kept = self._block(layer)
        if "core_attn" in self.recomputed:
            kept -= self._scores()
        if "mlp" in self.recomputed:
            kept -= self._mlp(layer) + (self._norm(self._input_size(layer)) - self._hidden() if self.engine else 0)
        return kept

    def _block(self, layer: int) -> int:
        """Of a block, without recomputation: two norms, attention, the feed-forward part."""
        return 2 * self._norm(self._input_size(layer)) + self._attention(layer) + self._mlp(layer)

    def _norm(self, output_size: int) -> int:
        """Its input, its output (which is a matrix's input), and mean and deviation of each token."""
        statistics = 2 if self.run.model.norm == "layernorm" else 1
        return self._hidden() + self.stream * (self.run.model.hidden * output_size + statistics * FLOAT)

    def _attention(self, layer: int) -> int:
        """Rotated queries and keys, the values, the output; and what the kernel keeps of the softmax.

        Megatron's layers use the values where they were made, so queries and keys from before the rotation stay, too;
        Transformer Engine copies them. Flash and fused attention keep the softmax's denominator; others its result, for
        all pairs of tokens.
        """
        model, tensor = self.run.model, self.run.parallel.tensor
        copies = 4 if self.engine else 6
        width = copies * self.size + _is_eight_bit(self.run, layer)  # FP8: the output once more, for the next matrix
        denominator = 0 if self.scores_kept else self.tokens * model.heads // tensor * FLOAT
        return self.tokens * width * model.hidden // tensor + denominator + self._scores()

    def _scores(self) -> int:
        """The softmax in float32, and once more in the format of the products."""
        if not self.scores_kept:
            return 0
        pairs = self.tokens * self.length * self.run.model.heads // self.run.parallel.tensor
        return pairs * (FLOAT if self.run.precision == "fp32" else FLOAT + self.size)

    def _mlp(self, layer: int) -> int:
        """Both halves of SwiGLU's input and, if it is not one kernel, the two factors; the input of the second matrix.

        Inputs of matrices are in 8 bits with FP8.
        """
        plain = self.run.kernels.activation == "unfused" or not self.gpu
        width = (4 if plain else 2) * self.size + self._input_size(layer)
        return self.tokens * width * self.run.model.ffn // self.run.parallel.tensor

    def _input_size(self, layer: int) -> int:
        return 1 if _is_eight_bit(self.run, layer) else self.size

    def _hidden(self) -> int:
        return self.stream * self.run.model.hidden * self.size

    def _logits(self) -> int:
        return self.tokens * self.run.model.vocab_size // self.run.parallel.tensor

    def _loss_size(self) -> int:
        """Bytes of a logit that the loss keeps: the softmax in float32, or the gradient in its place."""
        plain = self.run.kernels.cross_entropy == "unfused" or self.run.deterministic or not self.engine
        return FLOAT if plain else self.size
