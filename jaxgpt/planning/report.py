"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxgpt.planning.advice import Change, join_settings
from jaxgpt.trainer.report import format_duration

if TYPE_CHECKING:
    from jaxgpt.planning.plan import Plan

GIB = 2**30


def format_plan(plan: Plan) -> str:
    """Format a plan for the console."""
    parts = {name: size for name, size in plan.parameters.items() if size and name != "total"}
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    how = {"compiled": "from the compiled step", "estimated": "estimated; nothing was compiled"}
    lines = [
        f"plan        {plan.name} on {plan.device}{f' ({mesh})' if mesh else ''}",
        f"parameters  {plan.parameters['total']:,}: "
        + ", ".join(f"{name} {size:,}" for name, size in parts.items()),
        f"FLOPs       {format_count(plan.flops_per_token)} per token, "
        f"{format_count(plan.flops_per_step)} per step of {plan.tokens_per_step:,} tokens",
        f"memory      {format_memory(plan)} ({how[plan.source]})",
        f"batch       {plan.batch:,} rows in {plan.microbatches} part(s); "
        + format_largest_batch(plan),
        f"tokens      {format_count(plan.tokens)} in {plan.steps:,} steps"
        + (f"; about {plan.epochs:.2g} epochs" if plan.epochs is not None else ""),
        f"time        {format_seconds(plan.seconds_per_step)} a step, about "
        f"{format_duration(plan.seconds)} in all, at {plan.mfu:.0%} MFU ({plan.time_source})",
    ]
    if plan.exchanges:
        lines.append("sent        by one device in one step, around a ring:")
        lines += [
            f"  {x.sent / 1e6:12,.1f} MB  {x.kind} of {x.arrays:,} arrays along "
            f"{' x '.join(x.axes)}{'' if x.is_whole else ', at least'}"
            for x in plan.exchanges
        ]
    elif plan.devices > 1 and plan.source == "estimated":
        lines.append("sent        not known without the compiler of these devices")
    if not plan.is_fitting:
        lines += ["It does not fit. What needs less memory:", *map(format_change, plan.changes)]
        if not any(change.fits for change in plan.changes):
            lines.append(
                "  None of these is enough: use more devices or devices with more memory, or a "
                "smaller model.width or model.layers."
            )
    return "\n".join(lines)


def format_memory(plan: Plan) -> str:
    """Format "1.2 GiB: 0.9 of state and batch, 0.3 of temporaries; 31% of 4.0 GiB"."""
    memory = plan.memory
    text = (
        f"{memory['peak'] / GIB:,.2f} GiB on each device: {memory['arguments'] / GIB:,.2f} of "
        f"state and batch, {memory['temporaries'] / GIB:,.2f} of temporaries"
    )
    if memory["available"]:
        fraction = memory["peak"] / memory["available"]
        text += f"; {fraction:.0%} of the {memory['available'] / GIB:,.1f} GiB to use"
    return text


def format_largest_batch(plan: Plan) -> str:
    """Format the largest batch that fits."""
    if plan.largest_batch:
        return f"the largest that fits: {plan.largest_batch:,} ({plan.largest_batch_source})"
    if plan.memory["available"]:
        return "not even the smallest batch fits"
    return plan.largest_batch_source


def format_change(change: Change) -> str:
    """Format a change of settings as a line."""
    mark = "fits        " if change.fits else "is too large"
    return (
        f"  {change.peak / GIB:8,.2f} GiB  {mark}  {join_settings(change.settings)}"
        f"  ({change.cost}; {change.source})"
    )


def format_count(number: float) -> str:
    """Format a large number: 82.6 M, 1.3 T."""
    for size, unit in ((1e21, " Z"), (1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"),
                       (1e6, " M"), (1e3, " k")):  # fmt: skip
        if number >= size:
            return f"{number / size:,.3g}{unit}"
    return f"{number:,.3g}"


def format_seconds(seconds: float) -> str:
    """Format the time of a step."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
