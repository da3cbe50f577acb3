"""What a run will consume, before anything runs: steps, tokens, and epochs of each source in each phase.

All of it is arithmetic on the config and the sizes of the stores (`data.order`), so it needs no torch and a fraction of
a second, on a login node. `crystal submit` keeps it as plan.json: the run's data as it stood when the run began.
"""

from typing import Any

from crystal_hpc.config import derive
from crystal_hpc.config.schema import Run
from crystal_hpc.config.units import format_count
from crystal_hpc.data.catalog import rows
from crystal_hpc.data.order import run_orders
from crystal_hpc.data.sources import Sources


def make_plan(run: Run, sources: Sources) -> dict[str, Any]:
    """The content of plan.json."""
    orders = run_orders(run, sources.tokens)
    phases = []
    for phase, order in zip(run.phases, orders, strict=True):
        consumed = order.consumed(derive.phase_samples(phase))
        phases.append(
            {
                "name": phase.name,
                "steps": derive.phase_steps(phase),
                "tokens": derive.phase_tokens(phase),
                "samples": derive.phase_samples(phase),
                "sources": {
                    name: {
                        "samples": count,
                        "tokens": count * phase.sequence_length,
                        "epochs": count / rows(sources.tokens[name], phase.sequence_length),
                    }
                    for name, count in consumed.items()
                },
            }
        )
    return {
        "run": run.name,
        "digest": derive.run_digest(run),
        "tokenizer": sources.tokenizer,
        "parameters": derive.parameters(run.model),
        "tokens": derive.total_tokens(run),
        "sources": {
            name: {"store": str(info.folder), "tokens": info.tokens, "digest": info.digest}
            for name, info in sources.training.items()
        },
        "phases": phases,
    }


def describe_plan(run: Run, plan: dict[str, Any]) -> str:
    """The plan as text: a line a phase, a line a source in it."""
    lines = [
        f"{run.name}: {format_count(plan['parameters'])} parameters, {format_count(plan['tokens'])} tokens, "
        f"{sum(phase['steps'] for phase in plan['phases']):,} steps in {len(plan['phases'])} phases",
        f"{'phase / source':<24}{'steps':>10}{'tokens':>12}{'share':>9}{'epochs':>9}",
    ]
    for phase in plan["phases"]:
        lines.append(f"{phase['name']:<24}{phase['steps']:>10,}{format_count(phase['tokens']):>12}")
        for name, used in phase["sources"].items():
            share = used["tokens"] / phase["tokens"]
            tokens = format_count(used["tokens"])
            lines.append(f"  {name:<22}{'':>10}{tokens:>12}{share:>9.1%}{used['epochs']:>9.2f}")
    totals = {
        name: sum(p["sources"].get(name, {}).get("tokens", 0) for p in plan["phases"]) for name in plan["sources"]
    }
    lines.append("whole run")
    for name, tokens in totals.items():
        epochs = tokens / plan["sources"][name]["tokens"]
        share = tokens / plan["tokens"]
        lines.append(f"  {name:<22}{'':>10}{format_count(tokens):>12}{share:>9.1%}{epochs:>9.2f}")
    return "\n".join(lines)
