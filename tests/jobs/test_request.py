"""What Slurm is asked: the scripts of every shipped profile, word for word; values that try to leave their quotes."""

import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.config.load import load_cluster
from crystal_hpc.config.schema import Cluster, Run
from crystal_hpc.errors import ConfigError, RunError, SlurmError
from crystal_hpc.jobs import executor, queueing, request, slurm

GOLDEN = Path(__file__).parent / "golden"
PROFILES = {path.stem: path for path in Path(__file__).parents[2].glob("configs/clusters/*.yaml")}
ON_SLURM = sorted(name for name, path in PROFILES.items() if load_cluster(path).executor == "slurm")

# Neither an end of quotes nor a command, a variable, a pattern, an escape or a comment: each is a value, and no more.
HOSTILE = [
    "two  words",
    'it\'s "quoted"',
    "'; touch x; '",
    "$(touch x)",
    "`touch x`",
    "; touch x #",
    "&& touch x || touch x",
    "$HOME ${HOME} $1",
    "* ? ~ !! {a,b}",
    "-n",
    "#",
    "back\\slash, at the end, too\\",
    "Zürich 山 🙂",
]
MANY_LINES = "one\ntouch x\n#SBATCH --comment=two"


def phase(name: str) -> dict[str, Any]:
    rate = {"peak": 0.01, "warmup_steps": 1}
    shape = {"sequence_length": 16, "batch_size": 64, "steps": 10}
    return {"name": name, **shape, "mixture": {"prose": 1.0}, "learning_rate": rate}


RUN = Run.model_validate(
    {
        "name": "tiny",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 84, "vocab_size": 536},
        "data": {
            "tokenizer": "/shared/tokenizer",
            "sources": {"prose": "/shared/stores/prose"},
            "held_out": {"prose": "/shared/stores/prose-held-out"},
        },
        "phases": [phase("prose"), phase("code"), phase("adaptation")],
    }
)


def cluster(keys: dict[str, Any] | None = None, **more: Any) -> Cluster:
    """A profile of one rank, with some keys of `slurm`."""
    needed = {"name": "there", "executor": "slurm", "ranks_per_node": 1, "time_limit": "1h"}
    return Cluster.model_validate({**needed, **more, "slurm": keys or {}})


def first_script(folder: Path, where: Cluster) -> str:
    return next(queueing.scripts(folder, RUN, where))[1]


@pytest.fixture(autouse=True)
def fixed_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked must depend on the profile alone: Python has one path, and no Slurm says how long arrays may be."""

    def no_answer(**_: object) -> dict[str, str]:
        raise SlurmError("not asked here")

    monkeypatch.setattr(sys, "executable", "/opt/crystal/bin/python")
    monkeypatch.setattr(slurm, "configuration", no_answer)
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL", raising=False)


# --- The scripts of the shipped profiles, word for word.


@pytest.mark.parametrize("profile", ON_SLURM)
def test_the_scripts_of_a_shipped_profile_are_those_that_were_read_and_accepted(profile: str) -> None:
    scripts = queueing.scripts(Path("/shared/runs/tiny"), RUN, load_cluster(PROFILES[profile]))
    made = "\n\n".join(f"##### {link.kind} {link.phase}\n{text}" for link, text in scripts) + "\n"
    path = GOLDEN / f"{profile}.txt"
    if os.environ.get("CRYSTAL_ACCEPT") == "1":
        path.write_text(made)
    accepted = path.read_text() if path.exists() else ""
    diff = difflib.unified_diff(accepted.splitlines(), made.splitlines(), str(path), "made now", lineterm="")
    if made != accepted:
        pytest.fail(
            "\n".join([*diff, "if this is as it should be: CRYSTAL_ACCEPT=1 pytest " + __file__]), pytrace=False
        )


def test_no_accepted_script_is_left_of_a_profile_that_is_gone() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == ON_SLURM


@pytest.mark.parametrize("profile", ON_SLURM)
def test_bash_and_shellcheck_find_nothing_wrong_with_an_accepted_script(profile: str, tmp_path: Path) -> None:
    scripts = re.split(r"^##### .*\n", (GOLDEN / f"{profile}.txt").read_text(), flags=re.M)[1:]
    assert len(scripts) >= 3
    paths = [tmp_path / f"{number}.sh" for number, _ in enumerate(scripts)]
    for path, text in zip(paths, scripts, strict=True):
        path.write_text(text)
        subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.prefix) / "bin"))
    if not shellcheck:
        pytest.skip("shellcheck is not installed: the scripts were parsed, and no more")
    # SC2016: what a container runs is not for this shell. SC2086: the shield is meant to be split into words.
    # SC2209: `env` is one of them, and nothing to run.
    done = subprocess.run([shellcheck, "--exclude=SC2016,SC2086,SC2209", *paths], capture_output=True, text=True)
    assert done.stdout == ""


def test_an_array_of_workers_asks_for_one_rank_each_and_belongs_to_no_chain(tmp_path: Path) -> None:
    keys = {"account": "mine", "cpus_per_rank": 3, "memory": "0", "modules": ["cuda"], "options": {"comment": "x"}}
    where = cluster(keys, nodes=4, ranks_per_node=1, environment={"A": "b"})
    parameters = request.worker_parameters("demo.mup", where, at_once=5)
    script = executor.Executor(tmp_path, request.python_command(where), parameters).script(slices=5)
    wanted = ("nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "cpus-per-task=3", "account=mine", "comment=x")
    assert all(f"#SBATCH --{option}\n" in script for option in (*wanted, "array=0-4%5", "requeue", "time=60"))
    assert "--mem" not in script, "a whole node's memory is not for one rank"
    assert "module load cuda\nexport A=b\n" in script
    assert "crystal_hpc.jobs.batch" not in script


# --- Values that try to leave their quotes. Scripts run in a real bash, where srun and Python only note their words.


NOTES = """\
#!/bin/bash
# Notes the words it was called with, and its environment.
number=$(find "$CALLS" -name '*.words' | wc -l)
printf '%s\\0' "${0##*/}" "$@" > "$CALLS/$number.words"
env -0 > "$CALLS/$number.env"
"""


@pytest.fixture
def run_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[tuple[list[str], dict[str, str]]]]:
    """Runs a script of the profile in bash, in a folder where no file `x` may appear; returns who was called how."""
    programs = tmp_path / "it's $(touch x) ü"
    here, calls = tmp_path / "here", tmp_path / "calls"
    for made in (programs, here):
        made.mkdir()
    for name in ("srun", "python", "module"):
        (programs / name).write_text(NOTES)
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))

    def run(folder: Path, where: Cluster) -> list[tuple[list[str], dict[str, str]]]:
        shutil.rmtree(calls, ignore_errors=True)
        calls.mkdir()
        (here / "script").write_text(first_script(folder, where))
        environ = {"PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(calls), "HOME": "/home/me", "USER": "me"}
        done = subprocess.run(["bash", "script"], cwd=here, env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert [path.name for path in here.iterdir()] == ["script"]
        return [(words(path), environment(path.with_suffix(".env"))) for path in sorted(calls.glob("*.words"))]

    return run


def words(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


def environment(path: Path) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in words(path)]
    return {name: value for name, _, value in pairs}


def shield() -> list[str]:
    """The words before a rank's Python, as far as this machine's coreutils know them."""
    blocked = ["env", "--block-signal=TERM,USR2"]
    return blocked if subprocess.run([*blocked, "true"], capture_output=True).returncode == 0 else ["env"]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("value", [*HOSTILE, MANY_LINES])
def test_a_hostile_value_reaches_ranks_and_batch_steps_as_it_is(
    value: str, runtime: str, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    folder = tmp_path / (value if "\\" not in value and "\n" not in value else "runs")
    container = {"runtime": runtime, "image": f"/i{value}", "mounts": [f"/m{value}"], "python": value}
    keys = {"modules": [value], "network": {"FABRIC": value}, "container": container, "gpus": False}
    module, begin, srun, end = run_script(folder, cluster(keys, environment={"ANYTHING": value}))
    assert module[0] == ["module", "load", value]
    about = [str(folder), "--kind", "train", "--phase", "prose"]
    assert begin[0] == ["python", "-m", "crystal_hpc.jobs.batch", "begin", *about]
    assert end[0] == ["python", "-m", "crystal_hpc.jobs.batch", "end", *about, "--status", "0"]
    for variables in (begin[1], srun[1], end[1]):
        assert (variables["FABRIC"], variables["ANYTHING"]) == (value, value)
    ours = ["--unbuffered", "--output", f"{folder}/logs/%j_%t_log.out", "--kill-on-bad-exit=1", "--wait=120"]
    rank = ["sh", "-c", request.SHIELD_INSIDE, "rank", value, "-u", "-m", "crystal_hpc.jobs.rank", f"{folder}/logs"]
    inside = {
        "pyxis": [f"--container-image=/i{value}", f"--container-mounts=/m{value}:/m{value}", *rank],
        "apptainer": ["apptainer", "exec", "--bind", f"/m{value}", f"/i{value}", *rank],
    }
    assert srun[0] == ["srun", *ours, *inside[runtime]]


@pytest.mark.parametrize("value", [*HOSTILE, "runs"])
def test_stores_are_copied_before_the_ranks_by_one_task_a_node(
    value: str, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    folder = tmp_path / value.replace("\\", "")
    (folder / "logs").mkdir(parents=True)
    where = cluster({"gpus": False}, nodes=3, staging={"mode": "whole", "folder": "/scratch"})
    begin, asked, copy, srun, _ = run_script(folder, where)
    assert begin[0][3] == "begin" and asked[0] == ["srun", "--mpi=list"]
    output = f"{folder}/logs/_copy_%t.out"  # SLURM_JOB_ID is not set here
    ours = ["--unbuffered", "--mpi=none", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--output", output]
    assert copy[0][: len(ours) + 1] == ["srun", *ours]
    assert copy[0][-5:] == ["-m", "crystal_hpc.jobs.rank", str(folder), "--copy", "prose"]
    assert srun[0][-1] == f"{folder}/logs"
    sliced = cluster({"gpus": False}, staging={"mode": "slice", "folder": "/scratch"})
    assert first_script(folder, sliced) == first_script(folder, cluster({"gpus": False}))


def test_a_rank_in_a_container_begins_with_its_signals_held_back() -> None:
    program = "import signal as s; print(*sorted(s.Signals(n).name for n in s.pthread_sigmask(s.SIG_BLOCK, [])))"
    words = ["sh", "-c", request.SHIELD_INSIDE, "rank", "python3", "-c", program]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert said == (["SIGTERM", "SIGUSR2"] if len(shield()) > 1 else [])


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_scratch_is_a_path_like_any_other(value: str, tmp_path: Path, run_script: Callable[..., Any]) -> None:
    begin, *_ = run_script(tmp_path, cluster({"scratch": value}))
    assert begin[1]["CRYSTAL_SCRATCH"] == value.replace("$HOME", "/home/me").replace("${HOME}", "/home/me")


def test_scratch_may_name_variables_and_nothing_else_of_the_shell(
    tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    begin, *_ = run_script(tmp_path, cluster({"scratch": "/scratch/$USER/${USER}s/$(id)/$USER-${HOME:-x}"}))
    assert begin[1]["CRYSTAL_SCRATCH"] == "/scratch/me/mes/$(id)/me-${HOME:-x}"


def read_by_sbatch(script: str, tmp_path: Path) -> dict[str, str]:
    """The options that sbatch itself reads out of a script's comments. It is ended before it looks for a Slurm."""
    sbatch = shutil.which("sbatch")
    if not sbatch:
        pytest.skip("sbatch is not installed: nobody can say how it reads #SBATCH")
    (tmp_path / "script").write_text(script)
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\nNodeName=none\n")
    environ = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf"), "LC_ALL": "C.UTF-8"}
    command = [sbatch, "-vvv", "--test-only", str(tmp_path / "script")]
    found, said = {}, []
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            said.append(line)
            if match := re.search(r'Found in script, argument "--([a-z-]+)=?(.*)"$', line):
                found[match[1]] = match[2]
            if "defined options" in line:
                break
        process.kill()
    assert found, "".join(said)
    return found


@pytest.mark.parametrize("value", HOSTILE)
def test_sbatch_reads_a_hostile_value_as_it_is(value: str, tmp_path: Path) -> None:
    keys = dict.fromkeys(("partition", "account", "qos", "constraint"), value)
    where = cluster({**keys, "exclude": [value], "options": {"comment": value, "mail_user": value}})
    folder = Path("/shared") / (value if "\\" not in value else "runs")
    found = read_by_sbatch(first_script(folder, where), tmp_path)
    for name in (*keys, "exclude", "comment", "mail-user"):
        assert found[name] == value, name
    assert found["output"] == f"{folder}/logs/%j_0_log.out"


@pytest.mark.parametrize("value", ["one\ntouch x", "\rx", "x\0", "bell\a"])
@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "memory", "exclude", "options", "stage"])
def test_a_value_that_would_break_a_line_of_sbatch_is_refused(key: str, value: str) -> None:
    shaped: dict[str, Any] = {
        "exclude": [value],
        "options": {"comment": value},
        "stage": {"time_limit": "1h", "partition": value},
    }
    with pytest.raises(ConfigError, match="has a control character in it"):
        first_script(Path("/shared/runs"), cluster({key: shaped.get(key, value)}))


@pytest.mark.parametrize("name", ["comment\ntouch x", "comment=1 --wrap", "--comment", "Comment", "", " x"])
def test_an_option_whose_name_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no long option of sbatch"):
        first_script(Path("/shared/runs"), cluster({"options": {name: "1"}}))


@pytest.mark.parametrize("name", ["100%", "%j", "back\\slash", "two\nlines", "a\ttab", "nul\0", "\x7f"])
def test_a_run_folder_that_slurm_would_read_as_another_is_refused(name: str) -> None:
    with pytest.raises(RunError, match="choose another folder"):
        queueing.check_path(Path("/shared") / name / "run")


@pytest.mark.parametrize("name", [value for value in HOSTILE if "\\" not in value])
def test_a_run_folder_of_any_other_name_is_welcome(name: str) -> None:
    queueing.check_path(Path("/shared") / name / "run")
