"""A trainer's state in Megatron-core's distributed checkpoint format, `torch_dist`: to files, and back.

Any layout writes it, and another reads it: every tensor is stored under its name in the whole model. Megatron does the
naming and the sharding; the writing is torch.distributed.checkpoint's own, inside this process. Megatron's writer
starts helper processes for each save, which cost seconds and would need shielding from the job's signals.

`checkpoint` decides where a save goes and when it counts.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_files

from crystal_hpc.model import backend
from crystal_hpc.train import optim
from crystal_hpc.train.step import Trainer

with backend.quiet():
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import torch as megatron_torch


class _InProcessSave(megatron_torch.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's `torch_dist` format, written by this process alone."""

    def __init__(self) -> None:
        if backend.megatron_version() < (0, 19):
            super().__init__("torch_dist", 1)
        else:
            super().__init__()

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        named, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        save_files(
            megatron_torch.mcore_to_pyt_state_dict(named, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=megatron_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@torch.no_grad()
def save(trainer: Trainer, folder: Path) -> None:
    """Writes model and optimizer into an empty folder; a collective call."""
    try:
        with backend.quiet():
            dist_checkpointing.save(_state(trainer, loading=False), str(folder), _InProcessSave())
    except CheckpointException as error:
        # torch wraps what went wrong on any rank and raises it on all; the first of them is the cause.
        raise next(iter(error.failures.values()))[0] from error


@torch.no_grad()
def load(trainer: Trainer, folder: Path) -> None:
    """Reads model and optimizer back, whatever the layout that wrote them; a collective call."""
    optim.reset_state(trainer.optimizer)
    with backend.quiet():
        loaded = dist_checkpointing.load(_state(trainer, loading=True), str(folder))
    module(trainer).load_state_dict(loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    optim.restore_step_counts(trainer.optimizer)


@torch.no_grad()
def load_model(trainer: Trainer, folder: Path) -> None:
    """Reads the weights alone, into whatever layout; a collective call."""
    inner = module(trainer)
    with backend.quiet():
        loaded = dist_checkpointing.load({"model": _model_state(inner)}, str(folder))
    inner.load_state_dict(loaded["model"])


def module(trainer: Trainer) -> torch.nn.Module:
    """The model itself, out of Megatron's data-parallel and precision wrappers."""
    inner: Any = trainer.model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner  # type: ignore[no-any-return]


def _state(trainer: Trainer, loading: bool) -> dict[str, Any]:
    model = _model_state(module(trainer))
    optimizer: Any = trainer.optimizer
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=_metadata())
    if not loading:
        _zero_padding(state)
    return {"model": model, "optimizer": state}


def _zero_padding(state: Any) -> None:
    """The gaps between parameters in Megatron's flat buffers, saved along, would hold whatever was in memory."""
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    if isinstance(state, dict) and getattr(state.get("padding"), "obj", False):
        for part in parts:
            if isinstance(part, ShardedTensor):
                part.data.zero_()
    for part in parts:
        _zero_padding(part)


def _model_state(inner: Any) -> Any:
    return inner.sharded_state_dict(metadata=_metadata())


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "chained_optim_avoid_prefix": True,
    }
