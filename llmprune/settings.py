"""Values a recipe leaves open, chosen for the model and the machine, each with its reason."""

from __future__ import annotations

import os

import torch

from . import corpus
from .errors import LLMPruneError
from .methods import Method
from .models import Skeleton
from .recipe import Recipe
from .refinement import observed
from .statistics import Hessian, SplitHessian
from .structure import parameters_asked_for, plan_of

# The papers' calibration set, used where a GPU makes it cheap.
PAPER_SAMPLES, PAPER_SEQLEN = 128, 2048
# On a CPU: what keeps the two forwards of the calibration set near two minutes at 50 GFLOP/s per core, an ordinary
# core's float32 speed. A constant and not a measurement, so that the same machine always settles on the same samples.
CPU_SECONDS, CPU_FLOPS = 120, 50e9
CPU_SEQLEN = 512
MIN_SAMPLES = 8

# With fewer calibration tokens for each input of a linear, what is fitted to them is damped more.
TOKENS_PER_INPUT = 4

# Options that only a method that observes activations has a use for.
CALIBRATION_ONLY = ("calibration", "samples", "micro_batch", "offload_activations")
DEFAULT_ORDER = {"propagate": "pruned", "sequential": "block"}


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(recipe: Recipe) -> tuple[str, str]:
    """(device, reason).

    Raises:
        LLMPruneError: the device asked for is not there.
    """
    if recipe.device is None:
        if torch.cuda.is_available():
            return "cuda", torch.cuda.get_device_name()
        return "cpu", "no CUDA device was found"
    kind, _, index = recipe.device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise LLMPruneError(f"Unknown device {recipe.device!r}: use cpu, cuda or cuda:N.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise LLMPruneError(
            f"Device {recipe.device} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices: use "
            "--device cpu, or install a CUDA build of torch."
        )
    return recipe.device, "as asked"


def choose_dtype(recipe: Recipe, device: str, stored: torch.dtype) -> tuple[str, str]:
    """(dtype, reason)."""
    if recipe.dtype:
        return recipe.dtype, "as asked"
    name = str(stored).removeprefix("torch.")
    if device == "cpu":
        return "float32", "exact, and the fastest matrix product on most CPUs"
    if stored == torch.float32 and torch.cuda.is_bf16_supported():
        return "bfloat16", "the checkpoint's float32 would halve the speed; norms and scores stay in float32"
    return name, "the checkpoint's own"


def fits(recipe: Recipe) -> bool:
    """Whether something is fitted to a damped Hessian."""
    return recipe.refine == "icbs" or "lstsq" in (recipe.reconstruct, recipe.compensate) or recipe.method == "tyr"


def ignored(recipe: Recipe, method: Method) -> list[str]:
    """One warning for each option that was given and has no effect here."""
    given = recipe.model_fields_set
    warnings = []
    if observed(method.STATISTIC, recipe) is None:
        flags = [f"--{key.replace('_', '-')}" for key in (*CALIBRATION_ONLY, *DEFAULT_ORDER) if key in given]
        if flags:
            warnings.append(f"{recipe.method} looks at no data, so {', '.join(flags)} had no effect")
    elif recipe.propagate == "dense" and recipe.sequential == "sublayer":
        warnings.append("--sequential sublayer had no effect: with --propagate dense a block runs once, as it is")
    if "damping" in given and not fits(recipe):
        warnings.append(
            "--damping had no effect: it belongs to --refine icbs, --reconstruct lstsq, --compensate lstsq and --method tyr"
        )
    return warnings


def settle(recipe: Recipe, skeleton: Skeleton, method: Method) -> tuple[Recipe, dict[str, str]]:
    """Fill in samples, sequence length, micro-batch and calibration source.

    Returns:
        The recipe without open values, and the reason for each value that was open.

    Raises:
        LLMPruneError: a sequence length beyond the model's own limit.
    """
    values: dict[str, object] = {}
    reasons: dict[str, str] = {}

    def choose(key: str, value: object, reason: str) -> None:
        if getattr(recipe, key) is None and key not in values:
            values[key], reasons[key] = value, reason

    if plan := plan_of(recipe, skeleton):
        values["heads"] = plan.heads_mode
        choose("sparsity", 1 - plan.channels_left, "what the plan removes of the FFN channels")
    if recipe.target_params:
        wanted, there = parameters_asked_for(recipe.target_params), skeleton.parameters()
        if not 0 < wanted <= there:
            raise LLMPruneError(
                f"--target-params {recipe.target_params} is not within the {there / 1e6:.1f} M parameters that the model "
                "has: ask for fewer."
            )
        values["of"] = "model"
        choose("sparsity", 1 - wanted / there, f"what leaves {recipe.target_params} parameters")
    choose("sparsity", recipe.target, "what the pattern removes" if recipe.pattern != "unstructured" else "a half")
    limit = skeleton.max_tokens
    if recipe.seqlen and limit and recipe.seqlen > limit:
        raise LLMPruneError(f"--seqlen {recipe.seqlen} is beyond the {limit} tokens this model takes: use at most {limit}.")
    statistic = observed(method.STATISTIC, recipe)
    if statistic is None and recipe.allocation != "uniform":
        raise LLMPruneError(
            f"--allocation {recipe.allocation} looks at activations, and --method {recipe.method} at none: take another "
            "method, or leave --allocation out."
        )
    if statistic is None:
        return recipe.model_copy(update=values | dict.fromkeys(CALIBRATION_ONLY) | DEFAULT_ORDER), reasons

    on_gpu = skeleton.device.type == "cuda"
    seqlen = recipe.seqlen or min(limit or PAPER_SEQLEN, PAPER_SEQLEN if on_gpu else CPU_SEQLEN)
    choose("seqlen", seqlen, "the papers' length" if on_gpu else "enough for masks, and quick on a CPU")
    if limit and seqlen == limit:
        reasons["seqlen"] = "the model takes no longer sequence"
    if on_gpu:
        samples, why = PAPER_SAMPLES, "the papers' number"
    else:
        budget = CPU_SECONDS * CPU_FLOPS * cores()
        idle = skeleton.prunable_parameters() - skeleton.active_parameters()
        affordable = budget / (4 * (skeleton.decoder_parameters() - idle) * seqlen)
        samples = MIN_SAMPLES
        while samples * 2 <= min(affordable, PAPER_SAMPLES):
            samples *= 2
        why = f"about two minutes of forwards on {cores()} CPU cores; the papers' {PAPER_SAMPLES} if given"
        if affordable < MIN_SAMPLES:
            why = "few, since this model is slow on a CPU"
    choose("samples", samples, why)
    tokens = 8192 if on_gpu else 512
    choose(
        "micro_batch",
        min(max(tokens // seqlen, 1), recipe.samples or samples),
        f"{tokens} tokens fill a {'GPU' if on_gpu else 'CPU'}",
    )
    if recipe.calibration is None:
        if corpus.hub_reachable():
            choose("calibration", "c4", "the papers' text")
        else:
            choose("calibration", "self", "the Hub cannot be reached, so the model writes its own text")
    if recipe.propagate == "dense":
        values["sequential"] = "block"
    elif (
        issubclass(statistic, Hessian)
        and skeleton.experts
        and not recipe.structured
        and "sequential" not in recipe.model_fields_set
    ):
        values["sequential"] = "sublayer"
        reasons["sequential"] = f"the Hessians of {skeleton.experts} experts one after the other, not all of them in memory"
    if fits(recipe):
        all_tokens = (recipe.samples or samples) * seqlen * (1 - 1 / SplitHessian.EVERY)
        fitted = min(all_tokens * skeleton.share_of_tokens(linear) / linear.shape[1] for linear in skeleton.all_linears())
        if recipe.structured and recipe.match != "dense":
            choose("damping", 0.3, "where errors on held-out samples are least")
        if recipe.match == "dense":
            choose("damping", 0.5, "much of what the dense model's outputs ask for is noise")
        few = fitted < TOKENS_PER_INPUT
        choose("damping", 0.3 if few else 0.1, f"{fitted:.0f} tokens per input of the widest linear{', few' if few else ''}")
    settled = recipe.model_copy(update=values)
    if settled.allocation == "searched" and settled.search and settled.search.iterations:
        _check_pool(settled)
    return settled, reasons


def _check_pool(recipe: Recipe) -> None:
    """Raise `LLMPruneError` if a stage of the search wants more tokens than the calibration set has for it."""
    assert recipe.search
    assert recipe.samples
    assert recipe.seqlen
    every = SplitHessian.EVERY
    pool, wanted = recipe.samples - recipe.samples // every, max(tokens for _, tokens in recipe.search.stages)
    if recipe.samples < every or wanted > pool * recipe.seqlen:
        raise LLMPruneError(
            f"The search compares candidates on up to {wanted} tokens and judges on every {every}th sample, but "
            f"{recipe.samples} samples of {recipe.seqlen} leave it {pool * recipe.seqlen}: give more --samples, or smaller "
            "stages by --search."
        )
