"""The process groups of a run: which rank holds which part of the model, and which share of each batch.

Wraps torch.distributed and Megatron's `parallel_state` so that the rest of the package asks one small object.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store

from crystal_hpc.comm import TorchComm
from crystal_hpc.config.schema import Run
from crystal_hpc.model import backend, precision

with backend.quiet():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@dataclass(frozen=True)
class Layout:
    """This rank's place: data-parallel index, share of a sequence, and whether it holds the first or last layers."""

    comm: TorchComm
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    first_stage: bool
    last_stage: bool
    context_rank: int = 0
    context_size: int = 1

    @property
    def speaks_for_its_rows(self) -> bool:
        """Whether this is the one, of the ranks that work on the same rows, that counts them."""
        return self.tensor_rank == 0 and self.context_rank == 0 and self.first_stage


def start(run: Run, rank: int, size: int, local_rank: int, meeting: Store | Path) -> Layout:
    """Joins the job's ranks into Megatron's groups: through a store that they share, or a file for a new one."""
    precision.prepare_process(run)
    backend.choose_backend()
    if backend.device().type == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())  # a task may see its own GPU alone
    else:
        torch.set_num_threads(1)  # the ranks share this machine's cores; one thread also keeps sums in one order
    dist.init_process_group(
        backend.collective_backend(),
        store=FileStore(str(meeting), size) if isinstance(meeting, Path) else meeting,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=10),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.parallel.tensor,
        pipeline_model_parallel_size=run.parallel.pipeline,
        context_parallel_size=run.parallel.context,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=True,
    )
    model_parallel_cuda_manual_seed(run.seed)
    return Layout(
        comm=TorchComm(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        first_stage=parallel_state.is_pipeline_first_stage(),
        last_stage=parallel_state.is_pipeline_last_stage(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
    )


def stop() -> None:
    """Leaves the process groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
