"""What a run writes about itself while it trains: metrics.jsonl, one line a step, and the same for TensorBoard.

Rank 0 alone writes. A step that a later attempt does again after a crash appears twice; readers take the later one.
"""

import time
from pathlib import Path
from typing import Any

from crystal_hpc import files


class Metrics:
    """Appends to a run's metrics; on ranks other than 0, does nothing."""

    def __init__(self, run_folder: Path, rank: int, attempt: int) -> None:
        self._path = run_folder / "metrics.jsonl"
        self._attempt = attempt
        self._board = _TensorBoard(run_folder / "tensorboard") if rank == 0 else None

    def step(self, phase: str, step: int, total_steps: int, values: dict[str, Any]) -> None:
        """Records a step (numbered within its phase; `total_steps` counts the whole run's so far)."""
        if self._board is None:
            return
        line = {"phase": phase, "step": step, "attempt": self._attempt, "time": time.time(), **values}
        files.append_line(self._path, line)
        self._board.write(total_steps, {f"train/{k}": v for k, v in values.items() if isinstance(v, float)})

    def held_out(self, total_steps: int, losses: dict[str, float]) -> None:
        """Shows held-out losses in TensorBoard; `evaluate` keeps them in evals/."""
        if self._board is not None:
            self._board.write(total_steps, {f"held_out/{name}": loss for name, loss in losses.items()})

    def close(self) -> None:
        """Writes out what is still buffered."""
        if self._board is not None:
            self._board.close()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        # Here, because only rank 0 pays for these imports.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        with files.disk_errors(folder):
            self._writer = EventFileWriter(str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        entries = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=entries)))

    def close(self) -> None:
        self._writer.close()
