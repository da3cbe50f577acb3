"""The optimizer: Megatron's (plain or distributed) AdamW, with muP's rates and Crystal's weight decay groups."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from crystal_hpc.config.schema import Run
from crystal_hpc.model import backend, mup

with backend.quiet():
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
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
        overlap_param_gather=run.parallel.overlap_parameters,
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
    """Forgets Adam's moments and step count, as a phase with `optimizer_state: fresh` asks: all are zero.

    Weights, and the float32 main copies that bfloat16 runs keep of them, stay as they are.
    """
    for inner in _inner_optimizers(optimizer):
        inner.state.clear()
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    set_steps(optimizer, 0)


def steps(optimizer: MegatronOptimizer) -> int:
    """Steps that Adam has taken since its moments were zero."""
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                return int(inner.state[parameter].get("step", group.get("step", 0)))
    return 0


def set_steps(optimizer: MegatronOptimizer, count: int) -> None:
    """Gives every parameter the same step count. The state must exist."""
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            if not isinstance(inner, torch.optim.AdamW):
                group["step"] = count  # fused optimizers count by the group
                continue
            # Megatron's distributed optimizer reads torch's step count before the first step has made it.
            for parameter in group["params"]:
                inner.state[parameter]["step"] = torch.tensor(float(count), dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Stretch:
    """The part of a parameter that this rank's optimizer updates."""

    main: torch.Tensor
    """Float32 weights; in a float32 run the model's own memory."""
    state: dict[str, torch.Tensor]
    """`exp_avg` and `exp_avg_sq`, of the shape of `main`."""
    distributed: bool
    """Whether other data-parallel ranks have the rest of the parameter; otherwise all have the same whole."""
    start: int = 0
    """First element of the stretch in the flat parameter."""


def states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Stretch]]:
    """Every parameter that this rank updates something of, with its optimizer state, which must exist."""
    for link in getattr(optimizer, "chained_optimizers", [optimizer]):
        if link.optimizer is None:
            continue
        if isinstance(link, DistributedOptimizer):
            for parameter, (group, order) in link.model_param_group_index_map.items():
                main = link.optimizer.param_groups[group]["params"][order]
                start = link._get_model_param_range_map(parameter)["param"].start
                yield parameter, Stretch(main, link.optimizer.state[main], True, start)
        else:
            wrapped = {id(main): half for half, main in _halves(link)}
            for group in link.optimizer.param_groups:
                for main in group["params"]:
                    yield wrapped.get(id(main), main), Stretch(main, link.optimizer.state[main], False)


def _halves(link: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Pairs of a bfloat16 parameter and its float32 main copy."""
    halves, mains = getattr(link, "float16_groups", []), getattr(link, "fp32_from_float16_groups", [])
    for some, theirs in zip(halves, mains, strict=True):
        yield from zip(some, theirs, strict=True)


def _inner_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's chain of wrappers."""
    for link in getattr(optimizer, "chained_optimizers", [optimizer]):
        if link.optimizer is not None:
            yield link.optimizer
