"""A pruning run from recipe to directory: resolve, check, calibrate, prune, write, evaluate, record."""

from __future__ import annotations

import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from . import __version__, allocation, calibration, card, folding, mask_search, methods, sampling, settings, structure
from .activation_plan import Plan
from .calibration import TokenSet
from .checkpoint import Checkpoint, hash_file
from .errors import LLMPruneError
from .expert_surgery import ExpertSurgeon
from .methods import Method, icbs
from .models import Skeleton, Source, load_tokenizer, resolve
from .output import Facts, Output, check_directory, check_space, settled_recipe
from .perplexity import described, measure
from .progress import bar
from .ranks import Ranks, launch, local_device
from .recipe import DECISIVE, Recipe, from_options, parse_nm
from .refinement import FITTED_TOKENS, observed
from .scores import difference
from .statistics import Statistic
from .stream import Stream
from .structure import Surgeon
from .verify import block_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Windows of the evaluation text on a CPU, where a whole test set takes an hour; the gold protocol's number.
CPU_WINDOWS = 32
COVERAGE_WARNING = 0.5
# Open values that an unfinished run has settled already: the machine or the network may look different by now.
CONTINUED = ("calibration", "samples", "seqlen", "dtype", "micro_batch", "damping")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no weights."""

    recipe: Recipe
    reasons: dict[str, str]
    warnings: list[str]
    source: Source
    skeleton: Skeleton
    method: Method
    statistic: type[Statistic] | None
    coverage: float


@dataclass(frozen=True)
class Result:
    """A finished run: where the model is, and its record (the content of llmprune.json)."""

    directory: Path
    record: dict[str, object]


def prune(model: str, *, progress: bool = False, **options: object) -> Result:
    """Prune a model and write it to a directory that transformers loads.

        result = llmprune.prune("llama", method="wanda", sparsity=0.5, output="llama-sparse")

    Args:
        model: directory, Hub id, GGUF file or alias.
        progress: show bars and say what happens.
        options: the fields of `Recipe`, by name.

    Raises:
        LLMPruneError: bad input; nothing half-written looks whole.
    """
    recipe = from_options({"model": model, **options})
    return run(recipe, say=print if progress else lambda line: None, quiet=not progress)


def prepare(recipe: Recipe, say: Say) -> Prepared:
    """Resolve the model and check everything that can be checked from headers.

    Raises:
        LLMPruneError: see the individual steps; also an N:M pattern whose M does not divide a dimension.
    """
    method = methods.load(recipe.method)
    device, why_device = settings.choose_device(recipe)
    source = resolve(recipe.model, revision=recipe.revision, say=say)
    skeleton = Skeleton(source.directory, device=local_device(device), trust_remote_code=recipe.trust_remote_code)
    _check_pattern(recipe, skeleton)
    if skeleton.is_vision_language and (recipe.structured or recipe.method == "wina"):
        raise LLMPruneError(
            f"--method {recipe.method} is not for vision-language models, of whose text decoder single weights can be zeroed: "
            "use a method with a mask, such as wanda or sparsegpt."
        )
    if recipe.structured:
        structure.check(recipe, skeleton)
    if skeleton.experts and recipe.method == "wina":
        raise LLMPruneError(
            f"--method wina gates linears that every token runs through, and {source.name} has experts that run for some: use "
            "a method that prunes weights (see `llmprune methods`)."
        )
    if recipe.form == "folded":
        folding.check_foldable(skeleton.config)
    warnings = settings.ignored(recipe, method)
    if not skeleton.experts and recipe.min_expert_tokens != Recipe.model_fields["min_expert_tokens"].default:
        warnings.append("--min-expert-tokens had no effect: no block has experts")
    recipe, continued = _continue(recipe, recipe.output or default_output(recipe, source))
    stored = next(iter(skeleton.block_entries(0).values())).dtype
    dtype, why_dtype = settings.choose_dtype(recipe, device, stored)
    skeleton.dtype = getattr(torch, dtype)
    reasons = {"device": why_device} if recipe.device is None else {}
    reasons |= {"dtype": why_dtype} if recipe.dtype is None else {}
    recipe, settled = settings.settle(recipe.model_copy(update={"device": device, "dtype": dtype}), skeleton, method)
    coverage = skeleton.prunable_parameters() / skeleton.decoder_parameters()
    if coverage < COVERAGE_WARNING:
        missed = ", ".join(skeleton.missed_matrices(0)[:5])
        warnings.append(f"less than half of the decoder's parameters will be pruned; not covered: {missed}")
    for warning in warnings:
        say(f"warning: {warning}.")
    return Prepared(
        recipe, reasons | continued | settled, warnings, source, skeleton, method, observed(method.STATISTIC, recipe), coverage
    )


def _continue(recipe: Recipe, directory: Path) -> tuple[Recipe, dict[str, str]]:
    """Fill open values from the run that the output directory holds, if any. Returns also the reason for each."""
    earlier = {} if recipe.overwrite else settled_recipe(directory)
    values = {key: earlier[key] for key in CONTINUED if getattr(recipe, key) is None and earlier.get(key) is not None}
    return recipe.model_copy(update=values), dict.fromkeys(values, f"as in the run that {directory} holds")


def _check_pattern(recipe: Recipe, skeleton: Skeleton) -> None:
    nm = parse_nm(recipe.pattern)
    for linear in skeleton.all_linears() if nm else ():
        if nm and linear.shape[1] % nm[1]:
            raise LLMPruneError(
                f"Pattern {recipe.pattern} does not fit {linear.name!r}: its {linear.shape[1]} inputs do not divide into "
                f"groups of {nm[1]}; use another M."
            )


def run(recipe: Recipe, *, say: Say, quiet: bool) -> Result:
    """Carry out a recipe. `say` gets a line at a time for people; `quiet` hides progress bars."""
    started = time.time()
    _reset_peak_rss()
    ranks = launch()
    if not ranks.is_main:
        say, quiet = _silence, True
    ready = ranks.main_first(lambda: prepare(recipe, say))
    recipe, skeleton = ready.recipe, ready.skeleton
    if skeleton.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(skeleton.device)
    for key in ("device", "dtype", "calibration", "samples", "seqlen", "micro_batch", "sequential", "damping"):
        if key in ready.reasons:
            say(f"  {key} = {getattr(recipe, key)}: {ready.reasons[key]}")
    say(coverage_line(ready))
    if skeleton.experts:
        from .plan import check_experts  # which predicts from what is prepared here

        ranks.together(lambda: check_experts(ready))
    if recipe.icbs:
        needed = sum(icbs.memory_parts(skeleton, recipe, recipe.icbs).values())
        say(f"iCBS searches with the whole model in memory, which takes about {needed / 1e9:.1f} GB")
    ranks.together(lambda: check_run(ready))
    evaluation = _evaluation_set(ready) if recipe.evaluate and ranks.is_main else None
    tokens = ranks.main_first(lambda: _calibration_set(ready, quiet)) if ready.statistic else None
    if tokens:
        say(f"calibration: {tokens.source}: {tokens.note}")
    identity = _identity(ready, tokens)
    ranks.check_same(identity)
    output = ranks.together(lambda: _open_output(ready, identity, ranks))
    try:
        output.complete = bool(ranks.from_main(output.complete))
        if output.complete:
            say(f"{output.directory} already holds this run's finished result: nothing to do but what is left to measure.")
        else:
            output.finished_blocks = ranks.from_main(output.finished_blocks)
            stream = _stream_blocks(ready, output, tokens, ranks, say, quiet)
            if ranks.is_main:
                surgeon = stream.cutter if isinstance(stream.cutter, Surgeon | ExpertSurgeon) else None
                record = _record(ready, output, tokens, stream, surgeon)
                for warning in cast(list[str], record["warnings"])[len(ready.warnings) :]:
                    say(f"warning: {warning}.")
                record |= {"seconds": round(time.time() - started, 1), "peak_rss_bytes": peak_rss()}
                if skeleton.device.type == "cuda":
                    record["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(skeleton.device)
                settled = recipe.model_copy(update={"output": None, "overwrite": False}).to_yaml()
                beside = surgeon or stream.plan
                output.finish(settled, record, beside.files() if beside else None)
        # A perplexity that cannot be measured takes nothing away from the model, which is finished.
        if evaluation and not _measured(record := output.read_record(), evaluation):
            record["perplexity"] = _evaluate(ready, output.directory, evaluation, quiet)
            output.write_record(record)
        if ranks.is_main:
            card.write(output.directory)
        ranks.from_main(0)
        return Result(output.directory, output.read_record())
    finally:
        output.release()


def _open_output(ready: Prepared, identity: dict[str, str], ranks: Ranks) -> Output:
    skeleton = ready.skeleton
    output = Output(
        check_run(ready),
        skeleton.checkpoint,
        [[skeleton.stored_names[name] for name in skeleton.block_parameters(i)] for i in range(len(skeleton.blocks))],
        skeleton.outer_tensors(),
        identity,
        settled=ready.recipe.model_dump(mode="json", exclude_none=True),
        overwrite=ready.recipe.overwrite,
        follow=not ranks.is_main,
    )
    if ranks.is_main and not output.complete:
        try:
            output.check_space()
            if "outer" not in output.journal.steps:
                skeleton.check_outer()
        except LLMPruneError:
            output.release()
            raise
    return output


def output_directory(ready: Prepared) -> Path:
    """Where a run writes."""
    return ready.recipe.output or default_output(ready.recipe, ready.source)


def check_run(ready: Prepared) -> Path:
    """The output directory, if this run may write there. Creates nothing."""
    directory = output_directory(ready)
    check_directory(directory, ready.source.directory, overwrite=ready.recipe.overwrite)
    if not directory.exists():
        check_space(directory, ready.skeleton.checkpoint.nbytes)
    return directory


def _stream_blocks(ready: Prepared, output: Output, tokens: TokenSet | None, ranks: Ranks, say: Say, quiet: bool) -> Stream:
    """Prune every block that is not finished yet."""
    recipe, skeleton = ready.recipe, ready.skeleton
    if output.finished_blocks:
        say(f"resuming: {output.finished_blocks} of {len(skeleton.blocks)} blocks were already finished.")
    ids_NT, first = None, 0
    if tokens:
        share = ranks.together(lambda: ranks.share(len(tokens.ids_NT), recipe.micro_batch or 1))
        ids_NT, first = tokens.ids_NT[share], share.start
    sparsities = None
    # The others share their budgets themselves.
    if tokens and recipe.allocation in ("owl", "block-influence", "searched") and not recipe.structured:
        sparsities = _allotted(ready, output, tokens.ids_NT, ids_NT, first, ranks, say, quiet)
    with bar(recipe.method, progress_steps(ready), quiet=quiet) as advance:
        stream = Stream(
            skeleton,
            ids_NT,
            output=output,
            micro_batch=recipe.micro_batch or 1,
            propagate=recipe.propagate,
            sequential=recipe.sequential,
            offload=recipe.offload_activations,
            advance_progress=advance,
            ranks=ranks,
            match_dense=recipe.match == "dense",
            first_sample=first,
            sparsities=sparsities,
        )
        stream.calibration_NT = tokens.ids_NT if tokens else None
        ready.method.prune(stream, recipe)
    return stream


def _allotted(
    ready: Prepared,
    output: Output,
    ids_NT: torch.Tensor,
    own_NT: torch.Tensor | None,
    first: int,
    ranks: Ranks,
    say: Say,
    quiet: bool,
) -> list[float]:
    """The sparsity of every block.

    Args:
        ids_NT: the calibration set.
        own_NT, first: this rank's part of it, and where that begins.
    """
    recipe, skeleton = ready.recipe, ready.skeleton
    if recipe.search:
        steps = len(skeleton.blocks) + recipe.search.iterations * recipe.search.generations
        with bar("search", steps, quiet=quiet) as advance:
            micro_batch, offload = recipe.micro_batch or 1, recipe.offload_activations
            stream = Stream(
                skeleton,
                own_NT,
                micro_batch=micro_batch,
                offload=offload,
                ranks=ranks,
                first_sample=first,
                advance_progress=advance,
            )
            sparsities, _ = mask_search.search_sparsities(
                skeleton, ids_NT, recipe, output=output, stream=stream, advance_progress=advance
            )
        say(f"sparsity by search: {min(sparsities):.1%} to {max(sparsities):.1%} of a block's weights")
        return sparsities
    outliers = recipe.allocation == "owl"
    measure = allocation.measure_outliers if outliers else allocation.measure_influence
    with bar(recipe.allocation, len(skeleton.blocks), quiet=quiet) as advance:
        measured_B = measure(
            skeleton,
            ids_NT,
            micro_batch=recipe.micro_batch or 1,
            offload=recipe.offload_activations,
            advance_progress=advance,
        )
    sizes_B = [sum(linear.numel for linear in linears) for linears in skeleton.linears]
    sparsities = (allocation.by_owl if outliers else allocation.by_influence)(measured_B, sizes_B, recipe.target)
    say(f"sparsity by {recipe.allocation}: {min(sparsities):.1%} to {max(sparsities):.1%} of a block's weights")
    return sparsities


def progress_steps(ready: Prepared) -> int:
    """How often a method advances its bar."""
    blocks, recipe = len(ready.skeleton.blocks), ready.recipe
    if recipe.method == "cfsp":  # looked at, then written
        return 2 * blocks
    if recipe.method == "tyr" and recipe.search and recipe.allocation == "searched":
        return blocks + recipe.search.iterations * (blocks + recipe.search.generations)
    return blocks + (recipe.icbs.steps if recipe.icbs else 0)


def _record(
    ready: Prepared, output: Output, tokens: TokenSet | None, stream: Stream, surgeon: Surgeon | ExpertSurgeon | None
) -> dict[str, object]:
    """What llmprune.json says, but for measurements that come after it."""
    recipe, skeleton = ready.recipe, ready.skeleton
    facts = output.block_facts()
    linears = {name: fact for block in facts for name, fact in cast(dict[str, Facts], block["linears"]).items()}
    prunable = skeleton.prunable_parameters()
    zeros = sum(int(str(fact["zeros"])) for fact in linears.values())
    widths: dict[str, object] = {}
    if surgeon:
        prunable, zeros = surgeon.counts()
        widths["kept"], widths["dense_widths"] = surgeon.widths()
    searched = output.read_progress() if recipe.icbs or recipe.search else None
    return {
        "complete": True,
        "model": {
            "given": recipe.model,
            "name": ready.source.name,
            **card.inherited(ready.source.directory, ready.source.base_model),
        },
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "reasons": ready.reasons,
        "warnings": ready.warnings + _starved(linears, recipe),
        "versions": versions(),
        "calibration": {"source": tokens.source, "sha256": tokens.sha256, "note": tokens.note} if tokens else None,
        "sparsity": zeros / prunable,
        "coverage": ready.coverage,
        "parameters": {
            "total": skeleton.parameters(),
            "decoder": skeleton.decoder_parameters(),
            "prunable": prunable,
            "zero": zeros,
            "dense_bytes": skeleton.checkpoint.nbytes,
            "stored": sum(entry.numel for entry in output.written_entries().values()),
        },
        "blocks": [
            {key: value for key, value in block.items() if key in ("influence", "importance", "sparsity", "experts")}
            for block in facts
        ],
        "linears": linears,
        **widths,
        **({"gating": _gating(stream.plan)} if stream.plan else {}),
        **({"search" if recipe.icbs else "evolution": searched[1]["history"]} if searched else {}),
        "clock_seconds": {key: round(value, 3) for key, value in asdict(stream.clock).items()},
    }


def _starved(linears: Mapping[str, Facts], recipe: Recipe) -> list[str]:
    """Warnings that count and name the experts that too few tokens reached for the method, if there are any."""
    of_experts = {name: fact for name, fact in linears.items() if "expert" in fact}
    experts = {(block_of(name), fact["expert"]): fact.get("fallback") == "magnitude" for name, fact in of_experts.items()}
    found = [f"{expert} of block {block}" for (block, expert), starved in experts.items() if starved]
    unfitted = sum(fact.get("fallback") == "wanda" for fact in of_experts.values())
    warnings = []
    if unfitted:
        warnings.append(
            f"{unfitted} of {len(of_experts)} matrices of experts saw fewer than {FITTED_TOKENS} calibration tokens for each "
            "input and have Wanda's mask without SparseGPT's updates; more --samples would change that"
        )
    if found:
        others = f" and {len(found) - 5} others" if len(found) > 5 else ""
        warnings.append(
            f"{len(found)} of {len(experts)} experts saw fewer than {recipe.min_expert_tokens} calibration tokens and were "
            f"pruned by magnitude: expert {', '.join(found[:5])}{others}; more --samples would reach them"
        )
    return warnings


def _gating(plan: Plan) -> dict[str, object]:
    """What the record says of a plan of gates; what it says of single linears is among their facts."""
    settled = ("score", "share", "allocation", "basis", "form", "sparsity", "measured", "compared")
    return {
        **{key: getattr(plan, key) for key in settled},
        "gated": sum(gate.numel for gate in plan.gates.values()),
        "bases": sum(basis_II.numel() for basis_II in plan.bases.values()),
    }


def _calibration_set(ready: Prepared, quiet: bool) -> TokenSet:
    recipe, skeleton = ready.recipe, ready.skeleton
    assert recipe.calibration
    assert recipe.samples
    assert recipe.seqlen

    def write_own(samples: int, seqlen: int, seed: int) -> torch.Tensor:
        check_self_memory(skeleton)
        return sampling.sample_from_model(
            ready.source.directory,
            samples,
            seqlen,
            seed,
            model_key=skeleton.checkpoint.fingerprint(),
            device=str(skeleton.device),
            dtype=skeleton.dtype,
            trust_remote_code=recipe.trust_remote_code,
            quiet=quiet,
        )

    return calibration.calibration_set(
        recipe.calibration,
        _tokenizer(ready),
        vocab_size=skeleton.vocab_size,
        samples=recipe.samples,
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        sampler=write_own,
    )


def check_self_memory(skeleton: Skeleton) -> None:
    """Raise `LLMPruneError` if the whole model, which `self` calibration runs, does not fit in memory."""
    needed = int(skeleton.parameters() * skeleton.dtype.itemsize * 1.3)
    available = skeleton.free_memory()
    if needed > available:
        raise LLMPruneError(
            f"Calibration on `self` runs the whole model, which takes {needed / 1e9:.1f} GB where {available / 1e9:.1f} GB are "
            "free: give --calibration a text file or a dataset instead."
        )


def _tokenizer(ready: Prepared) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(ready.source.directory, trust_remote_code=ready.recipe.trust_remote_code)


def _evaluation_set(ready: Prepared) -> TokenSet:
    recipe = ready.recipe
    assert recipe.evaluate
    limit = ready.skeleton.max_tokens
    seqlen = recipe.seqlen or min(limit or settings.PAPER_SEQLEN, settings.CPU_SEQLEN)
    windows = None if ready.skeleton.device.type == "cuda" else CPU_WINDOWS
    return calibration.evaluation_set(
        recipe.evaluate,
        _tokenizer(ready),
        seqlen=seqlen,
        windows=windows,
        vocab_size=ready.skeleton.vocab_size,
    )


def _measured(record: dict[str, object], text: TokenSet) -> bool:
    found = record.get("perplexity")
    return isinstance(found, dict) and found.get("tokens_sha256") == text.sha256


def _evaluate(ready: Prepared, directory: Path, text: TokenSet, quiet: bool) -> dict[str, object]:
    """Token perplexity of the dense and of the pruned model on the same windows."""
    dense = measure(ready.skeleton, text, label="dense", quiet=quiet)
    if ready.recipe.structured:
        pruned = Skeleton(directory, dtype=ready.skeleton.dtype, device=ready.skeleton.device)
    else:
        pruned = ready.skeleton.with_checkpoint(Checkpoint.open(directory))
    found = measure(pruned, text, label="pruned", quiet=quiet)
    return {
        "dense": dense.metrics["perplexity"],
        "pruned": found.metrics["perplexity"],
        "difference": asdict(difference(found.documents["perplexity"], dense.documents["perplexity"])),
        **described(text),
    }


def _identity(ready: Prepared, tokens: TokenSet | None) -> dict[str, str]:
    """What must be equal for two runs to give the same bytes."""
    recipe = ready.recipe.model_dump(mode="json")
    # Without calibration the sequence length is only the evaluation's.
    idle = set() if tokens else {"seqlen"}
    if not ready.skeleton.experts:
        idle.add("min_expert_tokens")
    identity = {key: str(recipe[key]) for key in DECISIVE if key not in idle}
    if ready.recipe.plan:
        identity["plan"] = hash_file(ready.recipe.plan)[:16]
    identity["device"] = ready.skeleton.device.type
    if ready.skeleton.device.type == "cuda":
        # GPU libraries choose their kernels, and so their rounding, by shape.
        identity["micro-batch"] = str(recipe["micro_batch"])
    identity["model weights"] = ready.skeleton.checkpoint.fingerprint()[:16]
    identity["model config"] = hash_file(ready.source.directory / "config.json")[:16]
    identity["calibration tokens"] = tokens.sha256[:16] if tokens else "none"
    return identity | {f"{name} version": version for name, version in versions().items() if name != "python"}


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    import transformers

    return {
        "llmprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _reset_peak_rss() -> None:
    """Let the kernel measure anew: one process may carry out several runs."""
    with suppress(OSError):  # only Linux can; elsewhere it is the process's peak
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The largest resident memory of this process since its run began, in bytes."""
    # getrusage's figure survives exec: it would be the parent's, where that was larger.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def default_output(recipe: Recipe, source: Source) -> Path:
    """`MODEL-METHOD-SPARSITY` or `MODEL-METHOD-2of4` in the current directory."""
    amount = recipe.pattern.replace(":", "of") if ":" in recipe.pattern else recipe.target_params or f"{recipe.target:g}"
    return Path(re.sub(r"[^\w.-]+", "-", f"{source.name}-{recipe.method}-{amount}"))


def coverage_line(ready: Prepared) -> str:
    """Which matrices will be pruned."""
    skeleton = ready.skeleton
    if ready.recipe.structured:
        what = "experts" if ready.recipe.method == "reap" else "FFN channels"
        if ready.recipe.method == "cfsp" and structure.has_experts(skeleton):
            what = "FFN channels of experts"
        what += " and attention heads" if ready.recipe.method == "tyr" else ""
        prunable = structure.prunable_parameters(ready.recipe, skeleton)
        return (
            f"prunable: {what} of {len(skeleton.blocks)} blocks, {prunable / 1e6:.1f} M parameters = "
            f"{prunable / skeleton.parameters():.1%} of the model"
        )
    roles = list(dict.fromkeys(linear.role for linear in skeleton.all_linears()))
    experts = f" with {skeleton.experts} experts" if skeleton.experts else ""
    verb = "gated" if ready.recipe.method == "wina" else "prunable"
    return (
        f"{verb}: {', '.join(roles)} of {len(skeleton.blocks)} blocks{experts}, "
        f"{skeleton.prunable_parameters() / 1e6:.1f} M parameters = {ready.coverage:.1%} of the decoder, "
        f"{skeleton.prunable_parameters() / skeleton.parameters():.1%} of the model"
    )


def _silence(line: str) -> None:
    """Say nothing."""
