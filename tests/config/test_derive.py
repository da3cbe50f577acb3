"""The arithmetic agrees with what Crystal published.

The numbers come from shared/facts/crystal.md: its parameters (params.yaml of the three phases in
LLM360/crystalcoder-train), the Hugging Face card, and the size of the released weights. They are not computed here.
"""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Data, Model, Mup, Phase, Run

CRYSTAL = Model(layers=32, hidden=4096, heads=32, ffn=10922, vocab_size=32032, init_std=0.073)  # section 1
CRYSTAL_MUP = Mup(base_hidden=256, embedding_multiplier=14.6, output_multiplier=2.22)  # section 2


def phase(name: str = "p", **changes: Any) -> Phase:
    content = {"name": name, "sequence_length": 2048, "batch_size": 2112, "mixture": {"a": 1.0}}
    return Phase.model_validate(content | {"learning_rate": {"peak": 0.012}} | changes)


# Section 3, "Optimizer and schedule".
PHASES = [
    phase(
        "slimpajama",
        steps=79_721,
        learning_rate={"peak": 0.012, "warmup_steps": 86, "end": 0.00012408, "decay_steps": 294_337},
    ),
    phase(
        "starcoder",
        steps=214_387,
        learning_rate={"peak": 0.0087825, "warmup_steps": 86, "end": 0.00013679, "decay_steps": 214_301},
    ),
    phase(
        "adaptation",
        steps=27_728,
        learning_rate={"peak": 0.002, "warmup_steps": 276, "end": 0.0002, "decay_steps": 27_452},
    ),
]


def crystal(**changes: Any) -> Run:
    data = Data(tokenizer="t", sources={"a": "a"})
    return Run(name="crystal", model=CRYSTAL, mup=CRYSTAL_MUP, phases=PHASES, data=data, **changes)


def test_crystal_has_its_published_number_of_parameters() -> None:
    # Section 1: twice this is the size of the three released bfloat16 shards, less their headers.
    assert derive.parameters(CRYSTAL) == 6_575_278_720


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_sum_over_all_tensors(bias: bool, norm: Any, tied: bool) -> None:
    h, f, vocab, layers = 12, 20, 31, 3
    model = Model(layers=layers, hidden=h, heads=3, ffn=f, vocab_size=vocab, bias=bias, norm=norm, tied_embeddings=tied)
    norms = [h, h] if norm == "layernorm" else [h]
    matrices = [3 * h * h, h * h, 2 * f * h, f * h]
    biases = [3 * h, h, 2 * f, h] if bias else []
    layer = [*norms, *norms, *matrices, *biases]
    assert derive.parameters(model) == sum(layer) * layers + sum(norms) + vocab * h * (1 if tied else 2)


def test_crystal_takes_four_million_tokens_a_step_and_1_4_trillion_in_all() -> None:
    run = crystal()
    assert [derive.tokens_per_step(p) for p in run.phases] == [4_325_376] * 3  # section 3
    assert (
        derive.phase_tokens(run.phases[2]) == 119_934_025_728
    )  # the yaml comment, 119,931,863,040, is half a step less
    assert [round(derive.phase_tokens(p) / 1e9, 2) for p in run.phases] == [344.82, 927.30, 119.93]  # section 3
    assert round(derive.total_tokens(run) / 1e12, 4) == 1.3921  # section 3
    assert derive.phase_samples(run.phases[0]) == 79_721 * 2112


def test_tokens_seen_grow_through_the_phases() -> None:
    run = crystal()
    ends = [derive.tokens_until(run, n, derive.phase_steps(p)) for n, p in enumerate(run.phases)]
    starts = [derive.tokens_until(run, n, 0) for n in range(4)]
    assert starts == [0, *ends]
    assert ends[-1] == derive.total_tokens(run)
    assert derive.tokens_until(run, 1, 7) == ends[0] + 7 * 4_325_376


def test_a_length_in_tokens_is_rounded_up_to_whole_steps() -> None:
    assert derive.phase_steps(phase(tokens=1)) == 1
    assert derive.phase_steps(phase(tokens=4_325_376)) == 1
    assert derive.phase_steps(phase(tokens=4_325_377)) == 2
    assert derive.phase_steps(phase(tokens="344.82B")) == 79_721


@pytest.mark.parametrize(
    ("index", "step", "rate"),
    [
        (0, 0, 0.012 / 86),  # the first step moves
        (0, 85, 0.012),  # the last of the warm-up is at the peak, and so is the first of the decay
        (0, 86, 0.012),
        (0, 79_721, 0.0087869),  # section 3: where phase 1 was cut, and phase 2 goes on with 0.0087825
        (0, 86 + 294_337, 0.00012408),  # where its decay was laid out to end
        (1, 86, 0.0087825),
        (1, 214_387, 0.00013679),
        (2, 275, 0.002),
        (2, 27_728, 0.0002),
    ],
)
def test_the_learning_rate_of_crystal_at_named_steps(index: int, step: int, rate: float) -> None:
    assert derive.learning_rate(PHASES[index], step) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(("index", "rate"), [(0, 7.5e-4), (1, 5.489e-4), (2, 1.25e-4)])
def test_the_peak_learning_rate_of_matrices(index: int, rate: float) -> None:
    peak = PHASES[index].learning_rate.peak
    assert peak * derive.width_multiplier(CRYSTAL, CRYSTAL_MUP) == pytest.approx(rate, rel=1e-4)  # section 3


def test_crystals_multipliers() -> None:
    # Section 2.
    assert derive.width_multiplier(CRYSTAL, CRYSTAL_MUP) == 0.0625
    assert derive.embedding_scale(CRYSTAL_MUP) == 14.6
    assert derive.output_scale(CRYSTAL, CRYSTAL_MUP) == pytest.approx(0.13875)
    assert derive.attention_scale(CRYSTAL, CRYSTAL_MUP) == 1 / 128


def test_without_mup_nothing_is_scaled() -> None:
    assert derive.width_multiplier(CRYSTAL, None) == 1
    assert derive.embedding_scale(None) == 1
    assert derive.output_scale(CRYSTAL, None) == 1
    assert derive.attention_scale(CRYSTAL, None) == 1 / math.sqrt(128)
    assert derive.init_std(CRYSTAL, None, "matrix") == 0.073


@pytest.mark.parametrize(("role", "std"), [("embedding", 0.073), ("matrix", 0.01825), ("residual", 0.00228125)])
def test_crystals_initial_standard_deviations(role: str, std: float) -> None:
    assert derive.init_std(CRYSTAL, CRYSTAL_MUP, role) == pytest.approx(std, rel=1e-9)  # section 1, "Init"


def test_flops_of_crystal_are_near_its_own_count() -> None:
    # Section 1: 46.4 GFLOP a token; by which formula is not said, so it can only be near the PaLM paper's.
    assert derive.flops_per_token(CRYSTAL, 2048) == pytest.approx(46.4e9, rel=0.1)


@settings(deadline=None)
@given(
    warmup=st.integers(0, 50),
    decay=st.sampled_from(["linear", "cosine", "constant"]),
    length=st.none() | st.integers(1, 300),
    steps=st.integers(50, 200),
)
def test_a_learning_rate_rises_to_its_peak_and_then_only_falls(
    warmup: int, decay: str, length: int | None, steps: int
) -> None:
    rate = {"peak": 0.5, "end": 0.1, "warmup_steps": warmup, "decay": decay, "decay_steps": length}
    piece = phase(steps=steps, learning_rate=rate)
    rates = [derive.learning_rate(piece, step) for step in range(warmup + 400)]
    assert all(0 < low <= high for low, high in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert rates[warmup] == pytest.approx(0.5)
    assert all(high >= low >= 0.1 - 1e-12 for high, low in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    if decay != "constant":
        assert rates[-1] == pytest.approx(0.1)


def test_data_parallel_ranks_are_what_tensor_and_pipeline_leave() -> None:
    run = crystal(parallel={"tensor": 4, "pipeline": 2, "micro_batch": 2})
    assert derive.data_parallel(run, 64) == 8
    assert derive.micro_batches(run, run.phases[0], 64) == 2112 // (8 * 2)
    assert derive.data_parallel(crystal(parallel={"tensor": 4, "context": 2}), 64) == 8


def test_the_digest_of_a_run_leaves_out_where_it_runs_and_where_data_lie() -> None:
    digest = derive.run_digest(crystal())
    assert derive.run_digest(crystal(parallel={"tensor": 8})) == digest
    moved = crystal().model_copy(update={"data": crystal().data.model_copy(update={"tokenizer": "elsewhere"})})
    assert derive.run_digest(moved) == digest
    assert derive.run_digest(crystal(seed=2)) != digest
    assert derive.run_digest(crystal(precision="fp32")) != digest
    assert derive.run_digest(crystal(fp8={"recipe": "tensorwise"})) != digest
    how: dict[str, Any] = {"recompute": {"mode": "full"}, "kernels": {"layers": "megatron"}, "deterministic": True}
    assert derive.run_digest(crystal(**how)) == digest
