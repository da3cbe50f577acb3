"""configs/crystal-7b.yaml is the run that LLM360 published, number by number; its relatives follow their own rules.

Everything is derived from the files by the package's own functions, and compared with published values that are written
here, each with its source:

    T1, T2, T3  params.yaml of the three phases, github.com/LLM360/crystalcoder-train, pretrain/params
    HF          the model card and config.json of LLM360/CrystalCoder
    DS          the card of the data set LLM360/CrystalCoderDatasets
    M           the code that trained it, github.com/Cerebras/modelzoo, release 1.9.1
    ABS         the abstract of arXiv 2411.04156
    D           arithmetic on those
"""

import math
import re
from itertools import accumulate
from pathlib import Path

import pytest

from crystal_hpc.config import derive
from crystal_hpc.config.load import check_layout, load_cluster, load_run
from crystal_hpc.config.schema import Phase, Run
from crystal_hpc.config.units import parse_count
from crystal_hpc.convert.export import Options
from crystal_hpc.convert.formats import by_name
from crystal_hpc.convert.names import Shape, size
from crystal_hpc.data.order import run_orders
from crystal_hpc.model import mup

CONFIGS = Path(__file__).parents[2] / "configs"
BILLION = 10**9
TOKENS_A_STEP = 4_325_376  # D of T1: 2112 x 2048

# Share of the samples and billions of tokens by source, in each phase (T1-T3; tokens D: share x tokens of the phase).
MIXTURES = {
    "CommonCrawl": [(0.533458, 183.95), (0.198390, 183.97), (0.058283, 6.99)],
    "C4": [(0.266501, 91.90), (0.099100, 91.90), (0.016857, 2.02)],
    "GitHub": [(0.049626, 17.11), (0.018455, 17.11), None],
    "ArXiv": [(0.043251, 14.91), (0.016084, 14.91), (0.016663, 2.00)],
    "Book": [(0.041312, 14.25), (0.015359, 14.24), (0.008314, 1.00)],
    "Wikipedia": [(0.034171, 11.78), (0.012711, 11.79), None],
    "Wikipedia-tenth": [None, None, (0.058359, 7.00)],  # T3: Wikipedia with data_subset 0.0-0.1
    "StackExchange": [(0.031680, 10.92), (0.011785, 10.93), (0.008380, 1.01)],
    "StarCoder": [None, (0.628118, 582.46), (0.033440, 4.01)],
    "python": [None, None, (0.342701, 41.10)],
    "html": [None, None, (0.185367, 22.23)],
    "javascript": [None, None, (0.183708, 22.03)],
    "css": [None, None, (0.087928, 10.55)],
}
# (phase, step, rate of embeddings, norms and biases, rate of matrices): T1-T3 but for what is marked.
RATES = [
    (0, 0, 0.012 / 86, 0.012 / 86 / 16),  # the first step
    (0, 85, 0.012, 7.5e-4),  # the end of the warm-up
    (0, 86, 0.012, 7.5e-4),  # the beginning of the decay
    (0, 79_721, 0.0087869, 5.4918e-4),  # D: where the line is cut
    (0, 86 + 294_337, 0.00012408, 7.755e-6),  # where it was to end
    (1, 0, 0.0087825 / 86, 0.0087825 / 86 / 16),
    (1, 86, 0.0087825, 5.4891e-4),
    (1, 214_387, 0.00013679, 8.5494e-6),
    (2, 0, 0.002 / 276, 0.002 / 276 / 16),
    (2, 276, 0.002, 1.25e-4),
    (2, 27_728, 0.0002, 1.25e-5),
]


@pytest.fixture(scope="module")
def crystal() -> Run:
    return load_run(CONFIGS / "crystal-7b.yaml")


def consumed(run: Run) -> list[dict[str, int]]:
    """Samples by source in each phase; how large the stores are makes no difference to it."""
    orders = run_orders(run, dict.fromkeys(run.data.sources, 10**12))
    return [order.consumed(derive.phase_samples(phase)) for order, phase in zip(orders, run.phases, strict=True)]


# --- What is trained.


def test_the_model_has_the_published_number_of_parameters(crystal: Run) -> None:
    assert derive.parameters(crystal.model) == 6_575_278_720  # HF: half the bytes of the released bfloat16 shards
    entries = by_name("crystalcoder").entries(Shape(crystal.model, crystal.mup))
    assert sum(math.prod(size(crystal.model, entry.megatron)) for entry in entries) == 6_575_278_720


def test_the_count_that_the_parameters_name_is_that_of_another_model(crystal: Run) -> None:
    # T3's comment says 6583754752: GPT-2's formula, with positions of its own and a feed-forward part of 4 x hidden.
    model = crystal.model
    h = model.hidden
    assert model.layers * (12 * h * h + 13 * h) + (model.vocab_size + 2048) * h + 2 * h == 6_583_754_752
    assert derive.parameters(model) != 6_583_754_752


def test_the_release_describes_the_same_model(crystal: Run) -> None:
    published = by_name("crystalcoder").published_config(crystal)
    released = {  # HF config.json
        "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_inner": 10922, "n_positions": 2048, "vocab_size": 32032,
        "rotary_dim": 32, "layer_norm_epsilon": 1e-5, "activation_function": "swiglu",
        "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22, "mup_width_scale": 0.0625,
        "mup_scale_qk_dot_by_d": True, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {key: published[key] for key in released} == released


def test_multipliers(crystal: Run) -> None:
    assert derive.embedding_scale(crystal.mup) == 14.6  # T1, HF
    assert derive.output_scale(crystal.model, crystal.mup) == pytest.approx(0.13875, rel=1e-12)  # T1, HF
    assert derive.attention_scale(crystal.model, crystal.mup) == 1 / 128  # T1: scale_qk_dot_by_d


@pytest.mark.parametrize(("role", "std"), [("embedding", 0.073), ("matrix", 0.01825), ("residual", 0.00228125)])
def test_initial_standard_deviations(crystal: Run, role: str, std: float) -> None:
    assert derive.init_std(crystal.model, crystal.mup, role) == pytest.approx(std, rel=1e-9)  # T1


def test_parameters_fall_into_three_groups_of_the_published_sizes(crystal: Run) -> None:
    groups: dict[tuple[float, float], int] = {}
    for entry in by_name("crystalcoder").entries(Shape(crystal.model, crystal.mup)):
        decay = crystal.optimizer.weight_decay * mup.weight_decay_multiplier(entry.megatron)
        key = mup.learning_rate_multiplier(crystal, entry.megatron), decay
        groups[key] = groups.get(key, 0) + math.prod(size(crystal.model, entry.megatron))
    # M: matrices at 0.0625 of the rate; embeddings, norms and all biases at the whole; decay on all but the last two.
    assert groups == {
        (0.0625, 0.1): 32 * (4 * 4096**2 + 3 * 4096 * 10922),
        (1.0, 0.1): 32032 * 4096,
        (1.0, 0.0): 32 * (4 * 4096 + 5 * 4096 + 2 * 10922) + 2 * 4096,
    }


def test_adam(crystal: Run) -> None:
    found = crystal.optimizer
    assert (found.beta1, found.beta2, found.epsilon, found.weight_decay, found.clip_grad) == (0.9, 0.95, 1e-9, 0.1, 1.0)
    assert [phase.optimizer_state for phase in crystal.phases[1:]] == ["carry", "fresh"]  # open; T3
    assert crystal.seed == 1 and crystal.precision == "bf16"


# --- How long, and at what rate.


def test_tokens_of_a_step_of_each_phase_and_in_all(crystal: Run) -> None:
    assert {derive.tokens_per_step(phase) for phase in crystal.phases} == {TOKENS_A_STEP}
    assert [derive.phase_steps(phase) for phase in crystal.phases] == [79_721, 214_387, 27_728]  # T1-T3: max_steps
    tokens = [derive.phase_tokens(phase) for phase in crystal.phases]
    assert [round(count / BILLION, 2) for count in tokens] == [344.82, 927.30, 119.93]  # D; DS says 345 and 927
    totals = [round(count / BILLION / 1000, 4) for count in accumulate(tokens)]
    assert totals[1:] == [1.2721, 1.3921]  # D; HF: 1.27T and 1.4T


def test_the_tokens_that_the_third_phase_names_make_its_steps(crystal: Run) -> None:
    # T3's comment: 119,931,863,040, which is 27,727.5 steps; a length in tokens is rounded up to whole ones.
    adaptation = crystal.phases[2]
    in_tokens = Phase.model_validate(adaptation.model_dump() | {"steps": None, "tokens": 119_931_863_040})
    assert 119_931_863_040 / TOKENS_A_STEP == 27_727.5
    assert derive.phase_steps(in_tokens) == derive.phase_steps(adaptation) == 27_728


@pytest.mark.parametrize(("index", "step", "rate", "of_matrices"), RATES)
def test_the_learning_rate_of_each_group(crystal: Run, index: int, step: int, rate: float, of_matrices: float) -> None:
    scheduled = derive.learning_rate(crystal.phases[index], step)
    for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "mlp.linear_fc1.bias"):
        assert scheduled * mup.learning_rate_multiplier(crystal, name) == pytest.approx(rate, rel=1e-5)
    for name in ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"):
        assert scheduled * mup.learning_rate_multiplier(crystal, name) == pytest.approx(of_matrices, rel=1e-5)


def test_the_second_phase_goes_on_along_the_line_of_the_first(crystal: Run) -> None:
    first, second = crystal.phases[:2]
    for step, precision in ((86, 2e-4), (100_000, 2e-4), (214_387, 1e-4)):
        line = derive.learning_rate(first, 79_721 + step)
        assert derive.learning_rate(second, step) == pytest.approx(line, rel=precision)


def test_floating_point_operations_are_near_the_published_number(crystal: Run) -> None:
    """T3: 95,083,236,884,480 a sequence, without a formula; none that is usual gives it, so it is only compared.

    Ours is the PaLM paper's, 6 a weight of a matrix and 12 L h s. The 3.77 GFLOP a token between them are 8.8 %: more
    than the looked-up embeddings (0.79) or the count that the comment beside it names (0.06) would add, less than a
    second counting of attention with both (4.07). MFU by our formula is thus the lower of the two.
    """
    ours, theirs = derive.flops_per_token(crystal.model, 2048), 95_083_236_884_480 / 2048
    h, layers = 4096, 32
    assert ours == 6 * (layers * (4 * h * h + 3 * h * 10922) + 32032 * h) + 12 * layers * h * 2048
    assert (round(ours / BILLION, 2), round(theirs / BILLION, 2)) == (42.66, 46.43)
    assert theirs / ours == pytest.approx(1.088, abs=0.001)
    assert derive.total_tokens(crystal) * theirs == pytest.approx(6.46e22, rel=1e-3)  # D


# --- On what.


@pytest.mark.parametrize("index", range(3))
def test_tokens_and_share_of_each_source(crystal: Run, index: int) -> None:
    published = {name: cells[index] for name, cells in MIXTURES.items() if cells[index]}
    phase, found = crystal.phases[index], consumed(crystal)[index]
    assert found.keys() == phase.mixture.keys() == published.keys()
    for name, cell in published.items():
        assert cell is not None
        assert phase.mixture[name] == cell[0]
        tokens = found[name] * phase.sequence_length
        assert tokens / BILLION == pytest.approx(cell[1], abs=0.0065), name  # two decimals, of weights rounded to six
        assert tokens / derive.phase_tokens(phase) == pytest.approx(cell[0], abs=3e-6), name


def test_what_is_read_in_all_is_what_the_data_set_holds(crystal: Run) -> None:
    text, code, adaptation = ({name: n * 2048 / BILLION for name, n in used.items()} for used in consumed(crystal))
    starcoder = code.pop("StarCoder")
    assert sum(text.values()) == pytest.approx(345, abs=0.5)  # DS: half of SlimPajama
    assert sum(text.values()) + sum(code.values()) == pytest.approx(690, abs=0.5)  # DS: SlimPajama
    assert starcoder / 2 == pytest.approx(291, abs=0.5)  # DS: StarCoder, read twice
    languages = sum(adaptation[name] for name in ("python", "html", "javascript", "css"))
    assert languages == pytest.approx(95.9, abs=0.05)  # D of T3; HF says 100
    assert adaptation["StarCoder"] == pytest.approx(4.0, abs=0.05)
    assert sum(adaptation.values()) - languages - adaptation["StarCoder"] == pytest.approx(20.0, abs=0.05)  # HF: 10
    # T3: a tenth of Wikipedia, whose two halves phases 1 and 2 read once each.
    tenth = (text["Wikipedia"] + code["Wikipedia"]) / 10
    assert adaptation["Wikipedia-tenth"] / tenth == pytest.approx(3.0, abs=0.05)


def test_phase_2_reads_the_half_of_slimpajama_that_phase_1_left(crystal: Run) -> None:
    text, code, _ = consumed(crystal)
    tokens = {name: (text[name] + code[name]) * 2048 + 1 for name in text}
    orders = run_orders(crystal, dict.fromkeys(crystal.data.sources, 10**12) | tokens)
    for name in text:
        assert orders[1].start[orders[1].sources.index(name)] == text[name]
        assert all(orders[n].first_repeat(name, derive.phase_samples(crystal.phases[n])) is None for n in (0, 1))


def test_fill_in_the_middle_by_source_and_phase(crystal: Run) -> None:
    rates = [{name: fim.rate for name, fim in phase.fim.items()} for phase in crystal.phases]
    languages = dict.fromkeys(("python", "html", "javascript", "css"), 0.3)
    assert rates == [{}, {"StarCoder": 0.9}, languages | {"StarCoder": 0.9}]  # data-prep's scripts for stages 2 and 3
    used = {(fim.spm_rate, fim.spm_variant, fim.level, fim.loss) for p in crystal.phases for fim in p.fim.values()}
    assert used == {(0.5, 2, "character", "all")}


# --- What is kept, and under which name.


def test_checkpoints_are_kept_and_called_as_published(crystal: Run) -> None:
    assert [phase.checkpoint_every for phase in crystal.phases] == [1500, 1500, 1000]  # T1-T3
    kept = []
    for phase in crystal.phases:
        steps, every = derive.phase_steps(phase), phase.keep_every
        assert every
        kept.append(len({*range(every, steps, every), steps}))
    assert kept == [54, 72, 10] and sum(kept) == 136  # ABS: 136
    found = re.search(r"--name '(.*)'", (CONFIGS / "crystal-7b.yaml").read_text())
    assert found
    name, ends = Options(name=found[1]).name, [(phase.name, derive.phase_steps(phase)) for phase in crystal.phases]
    assert name
    assert name.format(phase=ends[0][0], step=1500) == "CrystalCoder_phase1_checkpoint_001500"  # HF: branches
    assert name.format(phase=ends[1][0], step=ends[1][1]) == "CrystalCoder_phase2_checkpoint_214387"
    assert name.format(phase=ends[2][0], step=ends[2][1]) == "CrystalCoder_phase3_checkpoint_027728"


# --- Its relatives, and what they run on.


@pytest.mark.parametrize("name", ["crystal-1b", "crystal-160m"])
def test_a_relative_follows_the_rules_it_states(crystal: Run, name: str) -> None:
    run = load_run(CONFIGS / f"{name}.yaml")
    model = run.model
    assert run.mup == crystal.mup and run.optimizer == crystal.optimizer
    own = {"layers", "hidden", "heads", "ffn"}
    assert model.model_dump(exclude=own) == crystal.model.model_dump(exclude=own)
    assert model.hidden / model.heads == 128
    assert abs(model.ffn - 8 / 3 * model.hidden) <= 32 and model.ffn % 64 == 0
    assert derive.total_tokens(run) / derive.parameters(model) == pytest.approx(20, abs=0.01)
    for ours, theirs in zip(run.phases, crystal.phases, strict=True):
        share, of_crystal = (
            derive.phase_tokens(p) / derive.total_tokens(r) for p, r in ((ours, run), (theirs, crystal))
        )
        assert share == pytest.approx(of_crystal, rel=1e-3)
        assert ours.mixture == {key.removesuffix("-tenth"): weight for key, weight in theirs.mixture.items()}
        assert ours.fim == theirs.fim and ours.optimizer_state == theirs.optimizer_state
    text, code, adaptation = run.phases
    assert (text.learning_rate.peak, adaptation.learning_rate.peak) == (0.012, 0.002)
    assert (adaptation.learning_rate.end, code.learning_rate.end) == (0.0002, text.learning_rate.end)
    assert text.learning_rate.warmup_steps == code.learning_rate.warmup_steps == 86
    assert adaptation.learning_rate.warmup_steps == round(derive.phase_steps(adaptation) / 100)
    for step in (86, 1000, derive.phase_steps(code)):
        line = derive.learning_rate(text, derive.phase_steps(text) + step)
        assert derive.learning_rate(code, step) == pytest.approx(line, rel=1e-5)


@pytest.mark.parametrize(("name", "parameters"), [("llama-7b", 6_738_415_616), ("llama-160m", 162_417_408)])
def test_a_llama_has_the_size_of_the_published_one_and_its_format(name: str, parameters: int) -> None:
    run = load_run(CONFIGS / f"{name}.yaml")
    assert derive.parameters(run.model) == parameters  # of huggyllama/llama-7b and JackFram/llama-160m
    by_name("llama").check(Shape(run.model, run.mup))
    fields = by_name("llama").published_config(run)
    assert by_name("llama").read_config(fields)[0] == Shape(run.model, None)


@pytest.mark.parametrize(
    ("run", "cluster"),
    [
        *((big, site) for big in ("crystal-7b", "llama-7b") for site in ("requeue", "pyxis", "apptainer", "slices")),
        ("crystal-1b", "one-node"),
        ("crystal-160m", "one-gpu"),
        ("llama-160m", "one-gpu"),
    ],
)
def test_a_run_fits_the_clusters_that_it_is_for(run: str, cluster: str) -> None:
    place = CONFIGS / "clusters" / (f"{cluster}.yaml" if cluster == "one-gpu" else f"slurm-{cluster}.yaml")
    check_layout(load_run(CONFIGS / f"{run}.yaml"), load_cluster(place))


def test_crystal_fits_the_numbers_of_nodes_that_it_names(crystal: Run) -> None:
    said = re.search(r"eight\n# GPUs, ([\d, or]+) will do", (CONFIGS / "crystal-7b.yaml").read_text())
    assert said
    numbers = [int(number) for number in re.findall(r"\d+", said[1])]
    assert numbers == [n for n in range(1, 2112) if 2112 % (8 * n) == 0]
    for nodes in numbers:
        overrides = [f"nodes={nodes}", "slurm.evaluate=null"]
        check_layout(crystal, load_cluster(CONFIGS / "clusters/slurm-requeue.yaml", overrides))


def test_the_page_about_the_recipe_gives_the_sizes_of_the_configs() -> None:
    page = (CONFIGS.parent / "docs/recipe.md").read_text()
    lines = re.findall(r"^\| ((?:crystal|llama)-\w+) \| ([\d,]+) \| ([\d.]+[BT]) \| ([\d,]+) \|", page, re.MULTILINE)
    assert len(lines) == 5
    for name, parameters, tokens, steps in lines:
        run = load_run(CONFIGS / f"{name}.yaml")
        assert f"{derive.parameters(run.model):,}" == parameters
        assert derive.total_tokens(run) == pytest.approx(parse_count(tokens), rel=2e-3)
        assert f"{sum(map(derive.phase_steps, run.phases)):,}" == steps
