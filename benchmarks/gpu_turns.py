"""What `gpu.py` does once there is a GPU: turns, figures, and what they say of the aims."""

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_contestants as contestants
import gpu_curves as curves
import torch

from crystal_hpc.config import derive, devices, memory
from crystal_hpc.config.load import load_run
from crystal_hpc.config.schema import LearningRate, Run
from crystal_hpc.model import backend, parallel, precision
from crystal_hpc.model.machine import probe

MICRO_BATCHES = 8
LENGTH = 2048
AIMS = {"ours / bare Megatron-core + TE": 0.98, "MFU": 0.5, "FP8 / BF16": 1.25, "memory": 0.1}
TOY = {"hidden": 64, "heads": 4, "ffn": 176, "layers": 2, "vocab_size": 536}


def measure(arguments: argparse.Namespace) -> bool:
    """All that the options ask for; whether all aims are met."""
    figures: dict[str, Any] = {"shapes": {}, "losses": {"apart": {}}, "failed": {}, "aims": {}}
    with tempfile.TemporaryDirectory() as folder:
        layout = parallel.start(shape_of("crystal-160m", arguments.rig, 1), 0, 1, 0, Path(folder) / "meeting")
        _describe(figures, arguments.rig)
        attempt("matrix products", figures["failed"], _measure_ceiling, figures, arguments.rig)
        for name, config in arguments.models.items():
            run = shape_of(config, arguments.rig, MICRO_BATCHES)
            with contestants.quick_weights():
                figures["shapes"][name] = _shape(name, run, layout, arguments, figures["failed"])
            torch._dynamo.reset()  # the next shape is to be compiled for itself, not for any shape
            _keep(figures, arguments)
        figures["losses"] = _curves(layout, arguments, figures["failed"])
        parallel.stop()
    figures["aims"] = judge(figures)
    _keep(figures, arguments)
    for aim, (value, met) in figures["aims"].items():
        print(f"{'met' if met else 'NOT MET'}: {aim}: {value}")
    return all(met for _, met in figures["aims"].values())


def shape_of(config: str, rig: bool, micro_batches: int) -> Run:
    """A shape's run: one phase of steps of so many micro-batches, at the config's own micro-batch."""
    run = load_run(Path(__file__).parents[1] / "configs" / f"{config}.yaml")
    if rig:
        run = run.model_copy(
            update={
                "model": run.model.model_copy(update=TOY),
                "parallel": run.parallel.model_copy(update={"micro_batch": 2}),
            }
        )
    size = run.parallel.micro_batch * (2 if rig else micro_batches)
    shape = {"sequence_length": 64 if rig else LENGTH, "batch_size": size, "checkpoint_every": None, "keep_every": None}
    run = run.model_copy(update={"phases": [run.phases[0].model_copy(update=shape)]})
    return _slice(run) if config == "crystal-7b" and not rig else run


def _slice(run: Run) -> Run:
    """As many layers as fit the GPU, in every format, with the allowance for what the formula leaves out."""
    _, most = torch.cuda.mem_get_info()
    for layers in range(run.model.layers, 0, -1):
        fewer = run.model_copy(update={"model": run.model.model_copy(update={"layers": layers})})
        needs = [
            memory.stages(contestants.run_of(name, fewer), fewer.phases[0], 1)[0]
            for name in ("ours bf16", "ours tensorwise")
        ]
        if max(need.total + need.allowance for need in needs) <= most:
            return fewer
    raise SystemExit(f"error: not one layer of {run.name} fits this GPU's {most / devices.GIB:.0f} GiB")


def _describe(figures: dict[str, Any], rig: bool) -> None:
    machine = probe()
    figures["machine"] = asdict(machine) | {"torch": torch.__version__, "megatron": backend.megatron_version()}
    if rig:
        figures["note"] = "CPU rig, toy shapes: shows that it runs, measures nothing"
    print(figures.get("note") or f"{machine.gpu}, torch {torch.__version__}", flush=True)


def _shape(
    name: str, run: Run, layout: parallel.Layout, arguments: argparse.Namespace, failed: dict[str, str]
) -> dict[str, Any]:
    """All contestants on one shape: each turn in the other direction, so that a warm card favours nobody."""
    order, done = contestants.names(arguments.rig), derive.tokens_per_step(run.phases[0])
    turns: dict[str, list[contestants.Turn]] = {contestant: [] for contestant in order}
    for number in range(arguments.turns):
        for contestant in order if number % 2 == 0 else order[::-1]:
            if f"{name} {contestant}" in failed:
                continue
            began = time.perf_counter()
            turn = attempt(
                f"{name} {contestant}", failed, contestants.take_turn, contestant, run, layout, arguments.steps
            )
            if turn is None:
                continue
            turns[contestant].append(turn)
            print(
                f"{name} turn {number} {contestant}: {done / turn.seconds:,.0f} tokens/s, "
                f"{turn.peak / devices.GIB:.2f} GiB, {time.perf_counter() - began:.0f} s in all",
                flush=True,
            )
    return {
        "layers": run.model.layers,
        "parameters": derive.parameters(run.model),
        "micro_batch": run.parallel.micro_batch,
        "tokens_per_step": done,
        "contestants": {who: _figures(who, run, took) for who, took in turns.items() if took},
        "ratios": _ratios(turns),
    }


def attempt(what: str, failed: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; None, with the reason in `failed`, where it raises: the others have their turn yet."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        failed[what] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"{what}: {failed[what]}", flush=True)
        return None


def _figures(who: str, run: Run, turns: list[contestants.Turn]) -> dict[str, Any]:
    own, phase = contestants.run_of(who, run), run.phases[0]
    rate = derive.tokens_per_step(phase) / statistics.median(turn.seconds for turn in turns)
    found: dict[str, Any] = {"tokens_per_second": rate, "turns": [asdict(turn) for turn in turns]}
    found["peak_bytes"] = max(turn.peak for turn in turns)
    if peak := devices.peak(_device(), own):
        found["mfu"] = derive.flops_per_token(run.model, phase.sequence_length) * rate / peak  # as train.measure's
    if who.startswith("ours"):
        found["used"] = precision.choose(own, probe()).line()
        found["formula_bytes"] = memory.stages(own, phase, 1, gpu=_device_type() == "cuda")[0].total
        if found["peak_bytes"]:
            found["formula_over_peak"] = found["formula_bytes"] / found["peak_bytes"]
    said = [f"{rate:,.0f} tokens/s", f"MFU {found['mfu']:.1%}" if "mfu" in found else "MFU not known here"]
    said.append(f"{found['peak_bytes'] / devices.GIB:.2f} GiB")
    if "formula_over_peak" in found:
        said.append(f"by the formula {found['formula_bytes'] / devices.GIB:.2f}")
    print(f"  {who}: {', '.join(said)}", flush=True)
    return found


def _ratios(turns: dict[str, list[contestants.Turn]]) -> dict[str, float]:
    """Medians over the turns of how much faster the first is than the second."""
    pairs = [("ours bf16", "megatron bf16"), ("ours bf16", "plain bf16")]
    pairs += [(f"ours {recipe}", "ours bf16") for recipe in contestants.RECIPES]
    found = {}
    for first, second in pairs:
        both = zip(turns.get(first, []), turns.get(second, []), strict=False)
        if ratios := [theirs.seconds / own.seconds for own, theirs in both]:
            found[f"{first} / {second}"] = statistics.median(ratios)
            print(f"  {first} / {second}: {found[f'{first} / {second}']:.3f}", flush=True)
    return found


def _device() -> devices.Device | None:
    return devices.find(torch.cuda.get_device_name()) if _device_type() == "cuda" else None


def _device_type() -> str:
    return backend.device().type


def _measure_ceiling(figures: dict[str, Any], rig: bool) -> None:
    sizes = {"toy": (128, 64, 128)} if rig else {"8192^3": (8192, 8192, 8192), "7B's fc1": (LENGTH, 4096, 22016)}
    figures["matrix_products"] = curves.ceiling(sizes, rig)
    print("\n".join(curves.in_words(figures["matrix_products"], _device())), flush=True)


def _curves(layout: parallel.Layout, arguments: argparse.Namespace, failed: dict[str, str]) -> dict[str, Any]:
    """Losses on text by format, and how far each is from bfloat16's."""
    steps, run = arguments.curve_steps, shape_of("crystal-160m", arguments.rig, 1)
    rate = LearningRate(peak=0.012, warmup_steps=max(1, steps // 10), end=0.0012)
    phase = run.phases[0].model_copy(update={"steps": steps, "learning_rate": rate})
    run = run.model_copy(update={"phases": [phase]})
    batches, digest = curves.text_batches(run, steps)
    others = ["fp32"] if arguments.rig else list(contestants.RECIPES)
    found = {}
    for kind in ("bf16", *others):
        own = contestants.run_of(f"ours {kind}", run)
        if curve := attempt(f"losses of {kind}", failed, curves.losses, own, layout, batches):
            found[kind] = curve
    apart = {kind: curves.distances(found[kind], found["bf16"]) for kind in others if {kind, "bf16"} <= found.keys()}
    for kind, (whole, end) in apart.items():
        print(f"losses of {kind} and bf16 over {steps} steps: {whole:.2%} apart at most, {end:.2%} at the end")
    return {"steps": steps, "text_digest": digest, "curves": found, "apart": apart}


def judge(figures: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """Each aim that was measured: what was found, and whether it is met. On the CPU rig, only that all of it ran."""
    found: dict[str, tuple[Any, bool]] = {"all of it ran": (figures["failed"] or True, not figures["failed"])}
    if not figures["machine"]["gpu"]:
        return found
    for name, shape in figures["shapes"].items():
        ratio = shape["ratios"].get("ours bf16 / megatron bf16")
        if ratio:
            found[f"{name}: ours / bare Megatron-core + TE >= 0.98"] = (
                ratio,
                ratio >= AIMS["ours / bare Megatron-core + TE"],
            )
        mfu = shape["contestants"].get("ours bf16", {}).get("mfu")
        if mfu and name != "160m":
            found[f"{name}: BF16 MFU >= 50 %"] = mfu, mfu >= AIMS["MFU"]
        fastest = max((ratio for pair, ratio in shape["ratios"].items() if pair.endswith("/ ours bf16")), default=None)
        if fastest and name == "7b-slice":
            found["7b-slice: fastest FP8 / BF16 >= 1.25"] = fastest, fastest >= AIMS["FP8 / BF16"]
        for who, one in shape["contestants"].items():
            if "formula_over_peak" in one:
                off = one["formula_over_peak"]
                found[f"{name} {who}: memory formula within 10 % of the peak"] = off, abs(off - 1) <= AIMS["memory"]
    for kind, (whole, end) in figures["losses"]["apart"].items():
        met = whole <= curves.BAND_ALL and end <= curves.BAND_END
        found[f"losses of {kind} within 2 % of BF16's, 1 % at the end"] = (whole, end), met
    return found


def _keep(figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
