"""What a person reads in the terminal when a run ends, or before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.table import Table

from .record import Record

if TYPE_CHECKING:
    from .plan import Plan
    from .pruning import Prepared, Result


# How a gated model's perplexity and tasks are measured.
SIMULATED = "inputs are left out as in decoding, but for the first 1 % of a text's tokens"


def show(result: Result) -> None:
    """The summary table of a finished run, and one honest line on what it is good for."""
    record = result.record
    shown = Record.model_validate(record)
    parameters = shown.parameters
    table = Table("", "dense", "pruned", title=f"{shown.recipe['model']}, {shown.method}, {shown.what}")
    if gating := shown.gating:
        table.add_row("weights read for a token, blocks", count(gating.gated), count(gating.read))
        table.add_row("of them left out, asked for", "", f"{gating.sparsity:.2%}")
        table.add_row("of them left out, on calibration text", "", f"{gating.measured:.2%}")
    elif shown.structured:
        for units, (dense, left) in shown.units.items():
            table.add_row(units, str(dense), str(left))
        table.add_row("parameters", count(parameters.total), count(parameters.stored or parameters.left))
        if shown.format != "auto":
            table.add_row("parameters that are in use", count(parameters.total), count(parameters.left))
        table.add_row("removed of what the method can remove", "", f"{shown.sparsity:.2%}")
    else:
        table.add_row("non-zero parameters", count(parameters.total), count(parameters.left))
        table.add_row("sparsity of the prunable weights", "", f"{shown.sparsity:.2%}")
    if text := cast("dict[str, object] | None", record.get("perplexity")):
        table.add_row("token perplexity", f"{text['dense']:.3f}", f"{text['pruned']:.3f}")
    if shown.search:
        table.add_row("held-out loss of the search", "", f"{shown.found:.4f}, from {shown.search[0].held_out:.4f}")
    if shown.evolution:
        first, last = shown.evolution[0], shown.evolution[-1]
        table.add_row("held-out divergence in the search", "", f"{last.after:.4f}, from {first.held_out.before:.4f}")
    if (errors := shown.errors) and errors.fresh is not None:
        table.add_row("held-out output error of linears", "", f"{errors.fresh:.4f}, from {errors.start_fresh:.4f}")
    dense_bytes = parameters.dense_bytes
    table.add_row("weights on disk", size(dense_bytes) if dense_bytes else "", size(weights_bytes(result.directory)))
    table.add_row("time of the run", "", f"{record['seconds']} s")
    table.add_row("peak memory", "", f"{cast(int, record['peak_rss_bytes']) / 1e9:.2f} GB")
    console = Console()
    console.print(table)
    if text:
        gates = f"; {SIMULATED}" if shown.gating else ""
        console.print(f"{text['protocol']}, of {text['text']}{gates}", highlight=False, soft_wrap=True)
    console.print(use_of(shown), highlight=False, soft_wrap=True)
    console.print(f"model: {Path(result.directory)}", highlight=False, soft_wrap=True)


def weights_bytes(directory: Path) -> int:
    """What a model's weights take on the disk."""
    return sum(file.stat().st_size for file in directory.glob("model*.safetensors"))


def budget(record: Record) -> str:
    """What a structured result keeps of its units, as "FFN channels 46080 → 32256"."""
    kept = [f"{units} {dense} → {left}" for units, (dense, left) in record.units.items()]
    return ", ".join(kept) or "nothing was removed"


def use_of(record: Record) -> str:
    """What the removed weights change, and what they do not."""
    loads = loads_with(record)
    if record.storage:
        return (
            f"Stored without loss as {record.storage.format}, in {record.storage.share:.2f} of the bytes on disk; in memory it "
            f"is as large and as fast as before. It {loads}."
        )
    if record.method == "reap" and not record.kept:
        return f"No expert was removed: as large and as fast as before; {loads}."
    if record.method == "reap":
        return (
            "Fewer experts: smaller on disk and in memory, with no special kernel; a token still goes through as many, so it "
            f"takes as long where the weights fit; {loads}."
        )
    if record.structured:
        return {
            "auto": f"Smaller matrices: smaller on disk and faster everywhere, with no special kernel; {loads}.",
            "padded": f"Padded with zeros to the widths of the widest block, so no smaller and no faster than that; {loads}.",
            "masked": f"Zeros in place of whole units: same shapes, same size on disk, no speed-up; {loads}.",
        }[record.format]
    if record.gating:
        rule = "The weights are the dense model's" if record.gating.form == "sidecar" else "The weights compute what they did"
        return (
            f"{rule}, and stock transformers runs them so; `llmprune.load` leaves inputs out while it writes one token after "
            "another, one sequence at a time, and reads less for them. `llmprune bench DIR` measures what that is worth here."
        )
    if record.pattern == "2:4":
        return (
            "2:4 zeros: same size on disk and the same speed with stock kernels; NVIDIA GPUs from Ampere on can run them "
            "faster with sparse tensor-core kernels."
        )
    kind = "Unstructured" if record.pattern == "unstructured" else record.pattern
    return f"{kind} zeros: same size on disk, no speed-up with stock kernels; {loads}."


def loads_with(record: Record) -> str:
    """What is needed to load the model."""
    if record.storage:
        return "loads with `llmprune.load`, and with stock transformers after `llmprune export DIR --format dense`"
    if record.needs_code:
        uneven = record.format == "auto" and any(len(set(widths)) > 1 for widths in record.kept.values())
        why = "widths differ between blocks: " if uneven else ""
        return f"{why}loads after `import llmprune`, or anywhere with trust_remote_code=True"
    return "loads with stock transformers"


def show_plan(ready: Prepared, plan: Plan) -> None:
    """The predictions of `llmprune plan`."""
    console = Console()
    settings = Table("option", "value", "why", title="Settled recipe")
    for key, value in ready.recipe.model_dump(mode="json", exclude_none=True).items():
        settings.add_row(key, str(value), ready.reasons.get(key, ""))
    console.print(settings)
    table = Table("prediction", "value", title="Cost")
    table.add_row("peak memory", f"{plan.peak_memory_bytes / 1e9:.2f} GB")
    for part, size in plan.memory_parts.items():
        table.add_row(f"  {part}", f"{size / 1e9:.3f} GB")
    table.add_row("forwards of the calibration set", f"{plan.forwards:.2f}")
    table.add_row("floating point operations", f"{plan.flops:.2e}")
    table.add_row("time", f"{plan.seconds:.0f} s, if this machine's matrix products set the pace")
    short = "" if plan.disk_bytes < plan.free_disk_bytes else ": TOO LITTLE, give an --output on another disk"
    table.add_row("bytes on disk", f"{plan.disk_bytes / 1e9:.3f} GB, {plan.free_disk_bytes / 1e9:.1f} GB free{short}")
    console.print(table)


def count(number: int) -> str:
    """A number of parameters as people say it."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def size(number: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number / 1000:.1f} kB"
