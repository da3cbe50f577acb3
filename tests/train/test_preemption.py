"""Signals that only set a flag, and those that come before there is one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from crystal_hpc.train.preemption import SIGNALS, Stop, held_back, watch


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
def test_a_signal_that_comes_before_the_handlers_is_held_back_until_they_stand(number: signal.Signals) -> None:
    # The signal comes at once, while Python itself is still starting, and reaches a child of the child.
    program = "from crystal_hpc.train.preemption import watch; print(watch().signal)"
    inner = [sys.executable, "-c", program]
    outer = [sys.executable, "-c", f"import os; os.execv({sys.executable!r}, {inner!r})"]
    with held_back():
        process = subprocess.Popen(outer, stdout=subprocess.PIPE, text=True)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (0, signal.Signals(number).name)
