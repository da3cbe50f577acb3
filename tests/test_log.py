"""Every line of the log says when, which job, which attempt and which rank."""

import re
import subprocess
import sys

PROGRAM = """
import logging, sys
from crystal_hpc.log import log, setup_logging
logging.basicConfig(stream=sys.stdout)  # what a library might do
setup_logging(int(sys.argv[1]), job="123_4", attempt=2)
setup_logging(int(sys.argv[1]), job="123_4", attempt=2)
log.debug("details")
log.info("step %d", 7)
log.warning("slow")
logging.getLogger("crystal_hpc.part").error("broken")
"""


def lines(rank: int) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(rank)], capture_output=True, text=True, check=True)
    assert done.stdout == "", "a line went to a handler that is not ours"
    return done.stderr.splitlines()


def test_rank_zero_says_what_happens_once_and_with_its_place() -> None:
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
    expected = ["INFO {} step 7", "WARNING {} slow", "ERROR {} broken"]
    found = lines(0)
    assert len(found) == len(expected)
    for line, text in zip(found, expected, strict=True):
        assert re.fullmatch(f"{time} {text.format('job=123_4 attempt=2 rank=0')}", line)


def test_other_ranks_speak_only_when_something_is_wrong() -> None:
    assert [line.split(" ", 1)[1] for line in lines(3)] == [
        "WARNING job=123_4 attempt=2 rank=3 slow",
        "ERROR job=123_4 attempt=2 rank=3 broken",
    ]
