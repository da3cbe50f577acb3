"""Starts a command with the job's signals held back until it asks for them.

    python -S -E shield.py COMMAND [ARGUMENT ...]

Slurm may preempt a job in the seconds that Python needs to import torch and Megatron-core, when SIGUSR2 would still
kill it and submitit would throw SIGTERM away. Blocked signals are neither: they wait until `train/preemption.watch`
has its handlers in place. Run as a script, with as little of Python as possible, so that the window before is short.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    os.execvp(sys.argv[1], sys.argv[1:])
