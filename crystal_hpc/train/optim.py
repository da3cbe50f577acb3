"""The optimizer: Megatron's (plain or distributed) AdamW, with muP's rates and Crystal's weight decay groups."""

from collections.abc import Iterator
from typing import Any

import torch

from crystal_hpc.config.schema import Run
from crystal_hpc.model import backend, mup

with backend.quiet():
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate


def build(run: Run, model: DistributedDataParallel) -> MegatronOptimizer:
    """The optimizer of this rank's parameters. Rates are set by `set_learning_rate` before every step."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=run.optimizer.weight_decay,
        adam_beta1=run.optimizer.beta1,
        adam_beta2=run.optimizer.beta2,
        adam_eps=run.optimizer.epsilon,
        clip_grad=run.optimizer.clip_grad,
        bf16=run.precision == "bf16",
        use_distributed_optimizer=run.parallel.distributed_optimizer,
    )
    return get_megatron_optimizer(config, [model], config_overrides=_groups(run))


def set_learning_rate(optimizer: MegatronOptimizer, rate: float, run: Run) -> None:
    """Gives each group the scheduled rate and the weight decay, times its multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = run.optimizer.weight_decay * group["wd_mult"]


def _groups(run: Run) -> dict[ParamKey, Any]:
    """One group for each pair of (learning-rate multiplier, weight-decay multiplier) in the model."""
    matrix = mup.learning_rate_multiplier(run, "linear_qkv.weight")
    return {
        ParamKey(with_name_predicate=_having(run, rate, decay)): {"lr_mult": rate, "wd_mult": decay}
        for rate, decay in {(1.0, 1.0), (1.0, 0.0), (matrix, 1.0)}
    }


def _having(run: Run, rate: float, decay: float) -> ParamWithNamePredicate:
    def matches(_parameter: Any, name: str) -> bool:
        return (mup.learning_rate_multiplier(run, name), mup.weight_decay_multiplier(name)) == (rate, decay)

    return ParamWithNamePredicate(name=f"lr x {rate:g}, wd x {decay:g}", fn=matches)


@torch.no_grad()
def reset_state(optimizer: MegatronOptimizer) -> None:
    """Forgets Adam's moments and step count, as a phase with `optimizer_state: fresh` asks, and as loading needs.

    Weights, and the float32 main copies that bfloat16 runs keep of them, stay as they are.
    """
    for inner in _inner_optimizers(optimizer):
        inner.state.clear()
        for group in inner.param_groups:
            group.pop("step", None)
            if isinstance(inner, torch.optim.AdamW):
                # Megatron's distributed optimizer reads torch's step count before the first step has made it.
                inner.state.update({parameter: _zero_state(parameter) for parameter in group["params"]})


def restore_step_counts(optimizer: MegatronOptimizer) -> None:
    """Gives each parameter back its step count after loading.

    With torch's AdamW below it, Megatron's distributed optimizer keeps the count in the parameter groups of a
    checkpoint, and leaves every parameter with one shared tensor that says zero: each parameter's step would count
    for all. (Seen with 0.16.1 and 0.19.2.)
    """
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups if isinstance(inner, torch.optim.AdamW) else []:
            count = group.pop("step", None)
            for parameter in group["params"]:
                step = inner.state[parameter]["step"]
                inner.state[parameter]["step"] = torch.full_like(step, count) if count is not None else step.clone()


def _zero_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _inner_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's chain of wrappers."""
    for link in getattr(optimizer, "chained_optimizers", [optimizer]):
        if link.optimizer is not None:
            yield link.optimizer
