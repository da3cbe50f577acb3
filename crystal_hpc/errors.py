"""The errors a user can cause, each one line that says what is wrong, where, and what would be right.

Everything here derives from `CrystalError`; the command line prints its message without a traceback and exits with
code 2. Anything else that escapes is a fault of ours and keeps its traceback. This module imports nothing, so every
layer may raise from it.
"""


class CrystalError(Exception):
    """A mistake that the user can put right."""

    exit_code = 2


class ConfigError(CrystalError):
    """One or more things wrong in a config; all of them are reported at once."""

    def __init__(self, problems: list[str] | str, where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        super().__init__("\n".join(f"{where}: {problem}" if where else problem for problem in self.problems))


class StoreError(CrystalError):
    """A corpus or token store that is missing, half-written, damaged, or does not fit the run."""


class CheckpointError(CrystalError):
    """A checkpoint that is missing, incomplete, or does not belong to this run."""


class RunError(CrystalError):
    """A run folder in a state that the command cannot work with."""


class BackendError(CrystalError):
    """The machine lacks what the config asks for (a GPU, Transformer Engine, enough ranks)."""


class DiskError(CrystalError):
    """The file system refused: full, read-only, or not ours to write."""


class SlurmError(CrystalError):
    """Slurm is not there, or refused; its own words are part of the message."""
