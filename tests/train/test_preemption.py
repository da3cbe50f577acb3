"""Signals that only set a flag, and the shield that keeps early ones."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from crystal_hpc.jobs import shield
from crystal_hpc.train.preemption import SIGNALS, Stop, watch


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_sets_the_flag_and_nothing_else() -> None:
    flag = watch()
    assert (flag.stop, flag.signal, flag.time) == (Stop.NO, None, None)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert (flag.stop, flag.signal) == (Stop.TIME_LIMIT, "SIGUSR2")
    assert flag.time is not None


def test_preemption_outweighs_the_time_limit_and_the_first_signal_starts_the_clock() -> None:
    flag = watch()
    os.kill(os.getpid(), signal.SIGUSR2)
    first = flag.time
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert (flag.stop, flag.signal, flag.time) == (Stop.PREEMPTED, "SIGTERM", first)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_comes_before_the_handlers_waits_behind_the_shield(number: signal.Signals) -> None:
    # Says that it has started, and looks for handlers only after a line on stdin: the signal comes in between.
    program = "print('up', flush=True); input(); from crystal_hpc.train.preemption import watch; print(watch().signal)"
    words = [sys.executable, "-S", "-E", shield.__file__, sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        said, _ = process.communicate("\n", timeout=60)
    assert (process.returncode, said.strip()) == (0, signal.Signals(number).name)
