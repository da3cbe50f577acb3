"""From a file to a config: what is wrong is said at once, with its line, and with what would be right."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal_hpc.config.load import check_layout, dump_yaml, load_cluster, load_run
from crystal_hpc.config.schema import LearningRate, Run
from crystal_hpc.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
TEXT = """\
name: tiny
model: {layers: 2, hidden: 32, heads: 4, ffn: 84, vocab_size: 128}
optimizer:
  epsilon: 1e-9
data:
  tokenizer: t
  sources: {prose: a, code: b}
phases:
- name: first
  sequence_length: 16
  batch_size: 8
  steps: 10
  mixture: {prose: 1.0}
  learning_rate: {peak: 1e-2, warmup_steps: 3}
- name: second
  sequence_length: 16
  batch_size: 8
  tokens: 1.5k
  mixture:
    prose: 0.25
    code: 0.75
  learning_rate:
    peak: 0.01
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_text(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return caught.value.problems


def test_numbers_are_read_as_people_write_them(write: Write) -> None:
    run = load_run(write(TEXT))
    assert run.optimizer.epsilon == 1e-9
    assert run.phases[0].learning_rate.peak == 0.01
    assert run.phases[1].tokens == 1500


@pytest.mark.parametrize("text", ["1e-9", "1E-9", "+1e-9", "1.0e-9", ".1e-8", "0.000000001"])
def test_every_way_to_write_a_small_number_is_that_number(write: Write, text: str) -> None:
    assert load_run(write(TEXT.replace("1e-9", text))).optimizer.epsilon == pytest.approx(1e-9)


def test_an_unknown_key_names_its_line_and_the_nearest_valid_one(write: Write) -> None:
    assert problems(write(TEXT.replace("batch_size: 8\n  steps", "batchsize: 8\n  steps"))) == [
        "line 9: phases.0.batch_size: this key is required",
        "line 11: phases.0.batchsize: unknown key; did you mean 'batch_size'?",
    ]
    assert problems(write(TEXT + "precison: bf16\n")) == ["line 24: precison: unknown key; did you mean 'precision'?"]
    assert problems(write(TEXT + "mup: {base_hidden: 8, base_hiden: 8}\n")) == [
        "line 24: mup.base_hiden: unknown key; did you mean 'base_hidden'?"
    ]


def test_an_unknown_key_like_no_other_lists_the_valid_ones(write: Write) -> None:
    assert problems(write(TEXT + "evaluation: {qqq: 1}\n")) == [
        "line 24: evaluation.qqq: unknown key; choose from rows"
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("layers: 2", "layers: two", "line 2: model.layers: input should be a valid integer, not 'two'"),
        ("layers: 2", "layers: 2.0", "line 2: model.layers: input should be a valid integer, not 2.0"),
        ("layers: 2", "layers: yes", "line 2: model.layers: input should be a valid integer, not True"),
        ("layers: 2", "layers: 0", "line 2: model.layers: input should be greater than 0, not 0"),
        ("1e-9", ".inf", "line 4: optimizer.epsilon: input should be a finite number, not inf"),
        ("1.5k", "1.5q", "line 18: phases.1.tokens: '1.5q' is not a count; write for example 500k, 1.5M, 345B or 1.3T"),
        ("code: 0.75", "code: 75", "line 21: phases.1.mixture.code: input should be less than or equal to 1, not 75"),
    ],
)
def test_a_wrong_value_names_its_line_and_what_is_valid(write: Write, old: str, new: str, expected: str) -> None:
    assert problems(write(TEXT.replace(old, new, 1))) == [expected]


def test_a_name_that_is_no_word_is_refused(write: Write) -> None:
    (problem,) = problems(write(TEXT.replace("name: tiny", "name: ../tiny")))
    assert problem.startswith("line 1: name: string should match pattern")


def test_everything_wrong_is_said_at_once(write: Write) -> None:
    path = write(TEXT.replace("layers: 2", "layers: -2").replace("steps: 10", "steps: ten") + "seed: x\ncolour: red\n")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 24", "line 2", "line 12", "line 25"]
    assert all(line.startswith(f"{path}: line ") for line in str(caught.value).splitlines())


def test_keys_that_do_not_agree_are_said_at_once_with_their_lines(write: Write) -> None:
    path = write(
        TEXT.replace("heads: 4", "heads: 5").replace("code: 0.75", "code: 0.5").replace("{prose: 1.", "{p: 1.")
    )
    assert problems(path) == [
        "line 2: model.heads: 5 does not divide model.hidden = 32",
        "line 13: phases.0.mixture.p: no such source; choose from code, prose",
        "line 19: phases.1.mixture: the weights sum to 0.75, not 1",
    ]


def test_an_override_reaches_any_key(write: Write) -> None:
    overrides = [
        "seed=7",
        "model.layers=4",
        "mup.base_hidden=8",
        "phases.0.steps=11",
        "phases.second.tokens=2M",
        "phases.second.mixture={code: 1.0}",
        "phases.first.learning_rate.peak=1e-3",
    ]
    run = load_run(write(TEXT), overrides)
    assert (run.seed, run.model.layers, run.phases[0].steps, run.phases[1].tokens) == (7, 4, 11, 2_000_000)
    assert run.mup and run.mup.base_hidden == 8
    assert run.phases[1].mixture == {"code": 1.0}
    assert run.phases[0].learning_rate == LearningRate(peak=1e-3, warmup_steps=3)


def test_a_later_override_wins(write: Write) -> None:
    assert load_run(write(TEXT), ["seed=7", "seed=8"]).seed == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "write key.subkey=value"),
        ("=3", "write key.subkey=value"),
        ("seed=[", "'[' is not a YAML value"),
        ("seed=!!int x", "'!!int x' is not a YAML value"),
        ("phases.third.steps=3", "no element 'third'; choose from first, second"),
        ("phases.2.steps=3", "no element '2'; choose from first, second"),
        ("phases.-1.steps=3", "no element '-1'; choose from first, second"),
        ("phases.².steps=3", "no element '²'; choose from first, second"),
        ("model.layers.x=3", "model.layers has no keys"),
        ("model.layers.x.y=3", "there is no key 'x'"),
    ],
)
def test_a_bad_override_is_named_with_what_would_be_right(write: Write, override: str, expected: str) -> None:
    (problem,) = problems(write(TEXT), override)
    assert problem == f"override {override!r}: {expected}"


def test_an_override_of_an_unknown_key_names_the_nearest_valid_one(write: Write) -> None:
    assert problems(write(TEXT), "model.layer=3") == ["line 2: model.layer: unknown key; did you mean 'layers'?"]
    assert problems(write(TEXT), "sed=3") == ["sed: unknown key; did you mean 'seed'?"]


def test_a_key_that_stands_twice_is_refused(write: Write) -> None:
    assert problems(write(TEXT + "seed: 1\nseed: 2\n")) == ["line 25: not valid YAML: the key 'seed' stands twice"]
    twice = TEXT.replace("prose: 0.25", "code: 0.25")
    assert problems(write(twice)) == ["line 21: not valid YAML: the key 'code' stands twice"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT + "\tseed: 1\n", "line 24: not valid YAML: found character '\\t' that cannot start any token"),
        (TEXT + "seed: !!int x\n", "not valid YAML: invalid literal for int() with base 10: 'x'"),
        (TEXT + "? [a]\n: 1\n", "line 24: not valid YAML: a key must be a plain word"),
        (TEXT + "seed: &a [*a]\n", "line 24: not valid YAML: found unconstructable recursive node"),
        (TEXT + "seed: \a\n", "not valid YAML: unacceptable character #x0007: special characters are not allowed"),
        ("", "holds no mapping of keys to values"),
        ("- a\n", "holds no mapping of keys to values"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(write: Write, text: str, expected: str) -> None:
    assert problems(write(text)) == [expected]


def test_yaml_that_would_run_code_is_refused(write: Write) -> None:
    (problem,) = problems(write(TEXT + "seed: !!python/object/apply:os.getpid []\n"))
    assert "could not determine a constructor" in problem


def test_a_part_can_be_merged_into_others(write: Write) -> None:
    text = TEXT.replace("{peak: 1e-2, warmup_steps: 3}", "&rate {peak: 1e-2, warmup_steps: 3}")
    run = load_run(write(text.replace("    peak: 0.01\n", "    <<: *rate\n    peak: 0.02\n")))
    assert run.phases[1].learning_rate == LearningRate(peak=0.02, warmup_steps=3)


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ConfigError, match="missing.yaml: no such file"):
        load_run(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)
    write(TEXT).write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path / "run.yaml")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_we_ship_is_valid_and_survives_a_dump(path: Path, write: Write) -> None:
    run = load_run(path)
    assert load_run(write(dump_yaml(run))) == run


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_we_ship_is_valid_and_survives_a_dump(path: Path, write: Write) -> None:
    cluster = load_cluster(path)
    assert load_cluster(write(dump_yaml(cluster))) == cluster


POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@settings(deadline=None, max_examples=50)
@given(
    name=NAMES,
    peak=POSITIVE,
    epsilon=POSITIVE,
    tokens=st.integers(1, 10**15),
    folder=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30),
)
def test_a_dumped_run_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, name: str, peak: float, epsilon: float, tokens: int, folder: str
) -> None:
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    phase = {"name": name, "sequence_length": 16, "batch_size": 8, "tokens": tokens, "mixture": {name: 1.0}}
    content = {
        "name": name,
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 128},
        "optimizer": {"epsilon": epsilon},
        "data": {"tokenizer": folder, "sources": {name: folder}},
        "phases": [phase | {"learning_rate": {"peak": peak}}],
    }
    run = Run.model_validate(content)
    path.write_text(dump_yaml(run), encoding="utf-8")
    assert load_run(path) == run


def test_a_run_that_does_not_fit_a_cluster_names_both(write: Write, tmp_path: Path) -> None:
    run = load_run(write(TEXT), ["parallel.tensor=4"])
    (tmp_path / "cluster.yaml").write_text("name: small\nexecutor: local\nranks_per_node: 6\ntime_limit: 30min\n")
    cluster = load_cluster(tmp_path / "cluster.yaml")
    assert cluster.time_limit == 1800
    with pytest.raises(ConfigError, match="run tiny on small: parallel: tensor x pipeline = 4 does not divide the 6"):
        check_layout(run, cluster)


def test_a_duration_without_a_unit_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="line 4: time_limit: 30 is not a duration; write for example 90s"):
        load_cluster(write("name: small\nexecutor: local\nranks_per_node: 6\ntime_limit: 30\n"))
