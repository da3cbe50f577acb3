"""The scripts for people who use sbatch themselves: what shellcheck says, and what they run, word for word.

No Slurm here: the scripts run in bash, in a checkout and on run folders of the worst names, where srun and Python only
note how they were called, and answer as they are told.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from crystal_hpc.jobs.request import NOTHING_TO_DO, SHIELD, STOPPED

SLURM = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))
FILES = sorted([*SCRIPTS, *(path.name for path in SLURM.glob("*.sh"))])
HOSTILE = 'it\'s  "a" $(touch x) `touch x` ; touch x # ü山'

# How each option that the scripts ask for may be written; anything else in them is a slip.
OPTIONS = {
    "job-name": r"crystal(-[a-z]+)?",
    "nodes": r"1",
    "ntasks": r"1",
    "ntasks-per-node": r"1",
    "cpus-per-task": r"\d+",
    "time": r"\d\d?:00:00",
    "signal": r"USR2@120",
    "requeue": r"",
    "open-mode": r"append",
    "output": r"crystal(-[a-z]+)?-%j\.out",
}

# Notes its words, and does as it is told: prints a line, sends signals to itself and to the script, ends with a code.
STUB = f"""\
#!{sys.executable} -IS
import json, os, signal, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
what = "srun" if name == "srun" else words[2] if words[1].endswith("batch") else "export"
told = json.load(open(os.environ["TOLD"])).get(what, {{}})
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([what, sys.argv[0], words, dict(os.environ)]) + "\\n")
for number in told.get("signals", []):
    os.kill(os.getppid(), number)
for number in told.get("hears", []):
    os.kill(os.getpid(), number)
print(told.get("print", ""))
sys.exit(told.get("exit", 0))
"""


@dataclass
class Call:
    """One call of srun or Python: of `srun`, or which word of Python's."""

    what: str
    program: str
    words: list[str]
    environ: dict[str, str]


@dataclass
class Desk:
    """A place to run scripts from, as sbatch would: from a copy, with the folder of submission in a variable."""

    home: Path
    runs: Path
    tmp: Path
    told: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, *words: str) -> tuple[int, list[Call], str]:
        """Exit code, the calls in order, and what was said."""
        calls = self.tmp / "calls"
        calls.unlink(missing_ok=True)
        (self.tmp / "told").write_text(json.dumps(self.told))
        spooled = shutil.copy(SLURM / script, self.tmp / "slurm_script")
        ours = {"CALLS": str(calls), "TOLD": str(self.tmp / "told"), "SLURM_SUBMIT_DIR": str(self.home)}
        path = {"PATH": f"{self.tmp / 'bin'}:/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", spooled, *words],
            cwd=self.environ.get("SLURM_SUBMIT_DIR") or self.home,
            env={**path, **ours, **self.environ},
            capture_output=True,
            text=True,
        )
        assert not list(self.tmp.rglob("x"))
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, [Call(*json.loads(line)) for line in lines], done.stderr


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    home, runs = tmp_path / f"home {HOSTILE}", tmp_path / f"runs {HOSTILE}"
    (home / "slurm").mkdir(parents=True)
    runs.mkdir()
    shutil.copy(SLURM / "env.sh", home / "slurm")
    for program in (tmp_path / "bin" / "srun", tmp_path / "bin" / "python3", home / ".venv" / "bin" / "python"):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(STUB)
        program.chmod(0o755)
    return Desk(home, runs, tmp_path, told={"prepare": {"print": str(runs)}})


def shellcheck() -> str:
    """The program, from PATH or beside this Python."""
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.prefix) / "bin"))
    return found or pytest.skip("shellcheck is not installed")


# --- What they are.


def test_all_scripts_are_here() -> None:
    assert FILES == ["build.sbatch", "convert.sbatch", "env.sh", "evaluate.sbatch", "stage.sbatch", "train.sbatch"]


@pytest.mark.parametrize("name", FILES)
def test_bash_can_read_a_script(name: str) -> None:
    subprocess.run(["bash", "-n", SLURM / name], check=True)


@pytest.mark.parametrize("name", FILES)
def test_shellcheck_finds_nothing_wrong(name: str) -> None:
    done = subprocess.run([shellcheck(), "--external-sources", SLURM / name], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_for_sbatch_is_one_and_stands_before_the_first_command(name: str) -> None:
    lines = (SLURM / name).read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match and number < first, line
            assert re.fullmatch(OPTIONS[match[1]], match[2] or ""), line
            assert match[1] not in options, line
            options[match[1]] = match[2]
    assert {"job-name", "nodes", "time", "requeue", "open-mode", "output"} <= options.keys()


@pytest.mark.parametrize("name", ["train.sbatch", "stage.sbatch", "evaluate.sbatch"])
def test_scripts_by_hand_agree_with_those_of_crystal_submit(name: str) -> None:
    assert SHIELD in (SLURM / "env.sh").read_text()
    assert f"case $? in 0) ;; {NOTHING_TO_DO}) exit 0 ;; *) exit 1 ;; esac" in (SLURM / name).read_text()


# --- What they run.


def shield() -> list[str]:
    """The words before a rank's Python, as far as this machine's coreutils know them."""
    blocked = ["env", "--block-signal=TERM,USR2"]
    return blocked if subprocess.run([*blocked, "true"], capture_output=True).returncode == 0 else ["env"]


def expected_srun(desk: Desk, *task: str, job: str = "%j") -> list[str]:
    ours = ["--unbuffered", "--kill-on-bad-exit=1", "--wait=120", "--output", f"{desk.runs}/logs/{job}_%t_log.out"]
    python = str(desk.home / ".venv/bin/python")
    return [*ours, *shield(), python, "-u", "-m", "crystal_hpc.jobs.rank", *task, str(desk.runs)]


def test_a_run_is_prepared_begun_trained_and_ended(desk: Desk) -> None:
    run_file, override = f"{HOSTILE}.yaml", f"data.tokenizer={HOSTILE}"
    code, (prepare, begin, srun, end), said = desk.run("train.sbatch", run_file, override)
    assert (code, said) == (0, "")
    batch = ["-m", "crystal_hpc.jobs.batch"]
    assert prepare.words == [*batch, "prepare", run_file, override]
    assert begin.words == [*batch, "begin", str(desk.runs)]
    assert srun.words == expected_srun(desk, "--train")
    assert end.words == [*batch, "end", str(desk.runs), "--status", "0"]
    assert {call.program for call in (prepare, begin, end)} == {str(desk.home / ".venv/bin/python")}
    assert srun.environ["PYTHONPATH"] == str(desk.home)


def test_stores_are_copied_by_one_task_a_node_before_the_ranks(desk: Desk) -> None:
    (desk.runs / "logs").mkdir()
    desk.environ = {"CRYSTAL_STAGING": "whole", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "7", "CRYSTAL_MPI": "pmix"}
    desk.told["srun"] = {"print": "none pmi2 pmix"}
    code, (_, _, asked, copy, ranks, end), said = desk.run("train.sbatch", "run.yaml")
    assert (code, said, asked.words) == (0, "", ["--mpi=list"])
    assert copy.words[:5] == ["--unbuffered", "--mpi=pmix", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1"]
    assert copy.words[-4:] == ["-m", "crystal_hpc.jobs.rank", str(desk.runs), "--copy"]
    assert ranks.words == expected_srun(desk, "--train") and end.what == "end"
    desk.told["srun"] = {"print": "none"}
    assert "--mpi=none" in desk.run("train.sbatch", "run.yaml")[1][3].words


def test_copying_that_fails_is_a_warning_and_copying_told_to_leave_is_the_end(desk: Desk) -> None:
    (desk.runs / "logs").mkdir()
    desk.environ = {"CRYSTAL_STAGING": "whole", "SLURM_JOB_NUM_NODES": "1"}
    desk.told["srun"] = {"exit": 2}
    _, calls, said = desk.run("train.sbatch", "run.yaml")
    assert calls[-2].words == expected_srun(desk, "--train")
    assert said.startswith("warning: the stores were not staged")
    desk.told |= {"srun": {"exit": STOPPED}, "end": {"exit": 1}}
    code, calls, said = desk.run("train.sbatch", "run.yaml")
    assert (code, said) == (1, "")
    assert [call.what for call in calls] == ["prepare", "begin", "srun", "srun", "end"], "no ranks"
    assert calls[-1].words[-2:] == ["--status", "0"]


@pytest.mark.parametrize("kind", ["stage", "evaluate"])
def test_a_side_job_is_begun_run_and_ended(kind: str, desk: Desk) -> None:
    code, (begin, srun, end), said = desk.run(f"{kind}.sbatch", str(desk.runs), "code")
    assert (code, said) == (0, "")
    about = [str(desk.runs), "--kind", kind, "--phase", "code"]
    assert begin.words == ["-m", "crystal_hpc.jobs.batch", "begin", *about]
    assert srun.words == expected_srun(desk, f"--{kind}", "code")
    assert end.words == ["-m", "crystal_hpc.jobs.batch", "end", *about, "--status", "0"]


def calls_of(desk: Desk, script: str) -> tuple[int, list[Call], str]:
    return desk.run(script, "run.yaml") if script == "train.sbatch" else desk.run(script, str(desk.runs), "code")


with_ranks = pytest.mark.parametrize("script", ["train.sbatch", "stage.sbatch", "evaluate.sbatch"])


@with_ranks
def test_an_element_of_an_array_has_logs_of_its_own(script: str, desk: Desk) -> None:
    desk.environ = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    _, calls, _ = calls_of(desk, script)
    assert f"{desk.runs}/logs/%A_%a_%t_log.out" in calls[-2].words


@with_ranks
def test_a_job_with_nothing_to_do_succeeds_at_once(script: str, desk: Desk) -> None:
    desk.told["begin"] = {"exit": NOTHING_TO_DO}
    code, calls, _ = calls_of(desk, script)
    assert (code, calls[-1].what) == (0, "begin")


@with_ranks
def test_a_job_that_may_not_begin_fails_without_ranks(script: str, desk: Desk) -> None:
    desk.told["begin"] = {"exit": 2}
    code, calls, _ = calls_of(desk, script)
    assert (code, calls[-1].what) == (1, "begin")


@with_ranks
def test_the_last_step_hears_how_the_ranks_ended_and_decides_how_the_job_did(script: str, desk: Desk) -> None:
    desk.told |= {"srun": {"exit": 137}, "end": {"exit": 1}}
    code, calls, _ = calls_of(desk, script)
    assert (code, calls[-1].words[-2:]) == (1, ["--status", "137"])
    desk.told["end"] = {"exit": 0}
    assert calls_of(desk, script)[0] == 0


@with_ranks
def test_signals_end_neither_the_script_nor_its_last_step(script: str, desk: Desk) -> None:
    both = [signal.SIGTERM, signal.SIGUSR2]
    desk.told |= {"begin": {"signals": both}, "srun": {"signals": both, "exit": 143}, "end": {"hears": both}}
    code, calls, _ = calls_of(desk, script)
    assert (code, calls[-1].words[-2:]) == (0, ["--status", "143"])


def test_a_run_that_cannot_be_prepared_fails_with_what_python_said(desk: Desk) -> None:
    desk.told["prepare"] = {"exit": 2}
    code, calls, _ = desk.run("train.sbatch", "missing.yaml")
    assert (code, [call.what for call in calls]) == (2, ["prepare"])


def test_a_build_passes_on_its_words_and_goes_back_to_the_queue_when_it_was_cut_short(desk: Desk) -> None:
    words = ["corpus/", "--tokenizer", "tok enizer", "--out", "stores/ü"]
    code, calls, _ = desk.run("build.sbatch", *words)
    assert code == 0 and [call.what for call in calls] == ["srun"]
    assert calls[0].words[-len(words) - 4 :] == ["-m", "crystal_hpc.cli", "data", "build", *words]
    desk.told = {"srun": {"signals": [signal.SIGTERM, signal.SIGUSR2], "exit": 3}}
    code, calls, _ = desk.run("build.sbatch", *words)
    assert code == 3 and [call.what for call in calls] == ["srun", "again"]


def test_an_export_passes_on_its_options_and_its_exit_code(desk: Desk) -> None:
    desk.told["export"] = {"exit": 2}
    code, (export,), _ = desk.run("convert.sbatch", str(desk.runs), "--out", HOSTILE)
    assert code == 2
    assert export.words == ["-m", "crystal_hpc.cli", "export", str(desk.runs), "--out", HOSTILE]


def test_an_export_that_was_requeued_leaves_alone_what_it_had_written(desk: Desk) -> None:
    desk.environ = {"SLURM_RESTART_COUNT": "1"}
    _, (export,), _ = desk.run("convert.sbatch", str(desk.runs), "--no-verify")
    assert export.words[2:] == ["export", str(desk.runs), "--no-verify", "--skip-done"]


def test_the_tasks_of_an_array_share_the_checkpoints(desk: Desk) -> None:
    desk.environ = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MAX": "7"}
    _, (export,), _ = desk.run("convert.sbatch", str(desk.runs), "--phase", "code")
    assert export.words[2:] == ["export", str(desk.runs), "--phase", "code", "--share", "3/8"]
    desk.environ |= {"SLURM_RESTART_COUNT": "1"}
    assert desk.run("convert.sbatch", str(desk.runs))[1][0].words[2:] == ["export", str(desk.runs), "--share", "3/8"]
    desk.environ |= {"SLURM_ARRAY_TASK_COUNT": "7"}
    code, calls, said = desk.run("convert.sbatch", str(desk.runs))
    assert (code, calls) == (2, []) and "the array must count from 0 without gaps" in said


# --- Where they look.


def test_without_a_virtual_environment_it_is_the_python_on_the_path(desk: Desk) -> None:
    shutil.rmtree(desk.home / ".venv")
    _, calls, _ = desk.run("train.sbatch", "run.yaml")
    assert [Path(call.program).name for call in calls] == ["python3", "python3", "srun", "python3"]
    assert "python3" in calls[2].words


def test_a_python_that_was_named_comes_before_all_others(desk: Desk) -> None:
    named = desk.tmp / HOSTILE / "python"
    named.parent.mkdir()
    named.symlink_to(desk.tmp / "bin" / "python3")
    desk.environ = {"CRYSTAL_PYTHON": str(named)}
    _, calls, _ = desk.run("train.sbatch", "run.yaml")
    assert [calls[0].program, calls[3].program] == [str(named)] * 2
    assert str(named) in calls[2].words


def test_cores_and_threads_of_a_rank_are_those_that_were_asked_for(desk: Desk) -> None:
    desk.environ = {"SLURM_CPUS_PER_TASK": "6"}
    _, calls, _ = desk.run("train.sbatch", "run.yaml")
    assert (calls[2].environ["SRUN_CPUS_PER_TASK"], calls[2].environ["OMP_NUM_THREADS"]) == ("6", "6")


def test_a_container_is_a_matter_of_the_environment_file_alone(desk: Desk) -> None:
    with open(desk.home / "slurm" / "env.sh", "a") as env:
        env.write('CRYSTAL_SRUN=(--container-image="$CRYSTAL_HOME/i.sqsh")\nCRYSTAL_RANK=($CRYSTAL_SHIELD python3)\n')
    _, calls, _ = desk.run("train.sbatch", "run.yaml")
    inside = [f"--container-image={desk.home}/i.sqsh", *shield(), "python3"]
    assert calls[2].words[5 : 5 + len(inside)] == inside


@pytest.mark.parametrize("script", SCRIPTS)
def test_outside_of_a_checkout_it_says_where_to_submit_from(script: str, desk: Desk) -> None:
    desk.environ = {"CRYSTAL_HOME": str(desk.runs)}
    code, calls, said = desk.run(script, str(desk.runs), "code")
    assert (code, calls) == (2, [])
    assert f"no checkout of crystal_hpc in '{desk.runs}': submit from one, or set CRYSTAL_HOME to it" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_outside_of_slurm_it_says_what_it_is_for(script: str, desk: Desk) -> None:
    desk.environ = {"SLURM_SUBMIT_DIR": ""}
    code, calls, said = desk.run(script, str(desk.runs), "code")
    assert code != 0 and not calls
    assert "this script is for sbatch" in said


@pytest.mark.parametrize("script", ["stage.sbatch", "evaluate.sbatch", "convert.sbatch"])
def test_a_missing_word_is_told_with_the_usage_and_a_missing_folder_by_its_name(script: str, desk: Desk) -> None:
    code, calls, said = desk.run(script)
    assert code != 0 and not calls
    assert f"usage: sbatch slurm/{script} RUN_FOLDER" in said
    code, calls, said = desk.run(script, "no-such-run", "code")
    assert (code, calls) == (2, [])
    assert "no-such-run" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_can_be_submitted_from_anywhere_once_the_checkout_is_named(script: str, desk: Desk) -> None:
    desk.environ = {"SLURM_SUBMIT_DIR": str(desk.tmp), "CRYSTAL_HOME": str(desk.home)}
    code, calls, _ = desk.run(script, str(desk.runs), "code")
    assert code == 0 and str(desk.home / ".venv/bin/python") in (calls[-1].program, *calls[-1].words)
