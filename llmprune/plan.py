"""What a run will cost, predicted from shapes alone: memory, forwards, FLOPs, time and bytes on disk."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .errors import LLMPruneError
from .methods import icbs
from .models import Linear, Skeleton
from .output import free_bytes
from .pruning import Prepared, output_directory
from .statistics import CrossHessian, Hessian, Statistic
from .structure import prunable_parameters, share_to_remove
from .supernet import READER

# Python, torch and transformers before any tensor, measured with `python -m llmprune env` on Linux.
BASELINE_BYTES = 450 << 20
# Matrix products reach this share of the probe's rate in a real block: norms, softmax and attention move bytes too.
EFFICIENCY = 0.7
# Steps that conjugate gradients usually take.
LSTSQ_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """Predictions. Bytes, floating point operations and seconds; a forward is the whole calibration set through all blocks."""

    peak_memory_bytes: int
    memory_parts: dict[str, int]
    forwards: float
    flops: float
    seconds: float
    disk_bytes: int
    free_disk_bytes: int


def make_plan(ready: Prepared) -> Plan:
    """Predict a run from its settled recipe and the checkpoint's headers."""
    recipe, skeleton = ready.recipe, ready.skeleton
    tokens = (recipe.samples or 0) * (recipe.seqlen or 0) if ready.statistic else 0
    forwards = count_forwards(ready)
    statistic = gathered(ready)
    linear_flops = 2 * skeleton.active_parameters()
    attention_flops = 2 * (recipe.seqlen or 0) * skeleton.hidden_size * len(skeleton.blocks)
    flops = forwards * tokens * (linear_flops + attention_flops)
    if statistic and issubclass(statistic, Hessian):
        readers = [linear for linears in skeleton.linears for linear in _first_readers(looked_at(ready, linears))]
        products = sum(tokens * skeleton.share_of_tokens(linear) * linear.shape[1] ** 2 for linear in readers)
        flops += products * (3.3 if recipe.match == "dense" else 1.3)
        flops += sum(linear.shape[1] ** 3 * 4 / 3 for linear in readers)
        # A product of the matrix with the Hessian: SparseGPT's sweep is half of one.
        products = 2 * recipe.rounds + 2 * LSTSQ_STEPS if recipe.reconstruct == "lstsq" else 1
        observed = [linear for linears in skeleton.linears for linear in looked_at(ready, linears)]
        flops += products * sum(linear.shape[0] * linear.shape[1] ** 2 for linear in observed)
    parts = memory_parts(ready)
    if recipe.icbs:
        # Its streaming start is over, and its memory free, when the search begins.
        search = {"python, torch, transformers": BASELINE_BYTES, **icbs.memory_parts(skeleton, recipe, recipe.icbs)}
        parts = max(parts, search, key=lambda each: sum(each.values()))
        batch = recipe.icbs.batch_size * (recipe.seqlen or 0)
        # A step: a forward, a backward of twice that, and a forward of what is held out.
        flops += recipe.icbs.steps * (3 * batch + tokens / recipe.icbs.holdout) * 2 * skeleton.parameters()
    if recipe.search:
        # The search has the dense model in memory, after the streaming that makes its levels.
        search = {"python, torch, transformers": BASELINE_BYTES, "the whole model": _whole(ready)}
        parts = max(parts, search, key=lambda each: sum(each.values()))
    disk = bytes_on_disk(ready)
    overhead = disk / 1e9 + 3e-9 * 8 * skeleton.prunable_parameters()
    return Plan(
        sum(parts.values()),
        parts,
        forwards,
        flops,
        flops / (probe_flops(skeleton.device, skeleton.dtype) * EFFICIENCY) + overhead,
        disk,
        free_bytes(output_directory(ready)),
    )


def count_forwards(ready: Prepared) -> float:
    """Forwards of the calibration set through all blocks, in units of one dense forward."""
    recipe, skeleton = ready.recipe, ready.skeleton
    if ready.statistic is None:
        return 0.0
    if recipe.method == "cfsp":
        # One looks at the dense model, others at what a fit is for.
        return 1.0 + (0.0 if recipe.compensate != "lstsq" else 2.0 if recipe.match == "dense" else 1.0)
    searches = _search_forwards(ready)
    if recipe.match == "dense":
        return searches + 2.0
    if recipe.sequential == "sublayer" or recipe.propagate == "dense":
        return searches + 1.0
    # The observing pass stops before the last linear, and the last block's output is not needed.
    sizes = [linear.numel * skeleton.share_of_tokens(linear) for linear in skeleton.linears[0]]
    last = sizes[-1] / sum(sizes)
    return searches + 2 - last - 1 / len(skeleton.blocks)


def _search_forwards(ready: Prepared) -> float:
    """What a search reads: its levels' statistics, and the tokens that candidates are compared on."""
    options, calibration = ready.recipe.search, (ready.recipe.samples or 0) * (ready.recipe.seqlen or 0)
    if options is None or ready.recipe.allocation != "searched":
        return 0.0
    assert calibration
    tokens, candidates = 0, options.offspring
    for place, (survivors, each) in enumerate(options.stages, 1):
        # The parent is among those of the last stage.
        tokens += each * (candidates + (place == len(options.stages)))
        candidates = survivors
    return options.iterations * (1 + options.generations * tokens / calibration)


def bytes_on_disk(ready: Prepared) -> int:
    """What the result takes, or the levels of a search where they take more. Blocks that are padded count as whole."""
    recipe, skeleton = ready.recipe, ready.skeleton
    whole = skeleton.checkpoint.nbytes
    if not recipe.structured:
        return whole
    width = next(iter(skeleton.block_entries(0).values())).dtype.itemsize
    removed = share_to_remove(recipe, skeleton)
    smaller = whole - int(removed * prunable_parameters(recipe, skeleton)) * width
    levels = 0
    if recipe.search and recipe.allocation == "searched":
        read = [linear for linears in skeleton.linears for linear in looked_at(ready, linears)]
        levels = int(recipe.search.levels * (1 - removed) * sum(linear.numel for linear in read)) * width
    return max(levels, smaller if recipe.format == "auto" else whole)


def _whole(ready: Prepared) -> int:
    """Bytes of the whole model, of the weights that a candidate has in its own, and of some logits."""
    skeleton = ready.skeleton
    logits = 4 * 4 * (ready.recipe.seqlen or 0) * skeleton.vocab_size
    return (skeleton.parameters() + skeleton.prunable_parameters()) * skeleton.dtype.itemsize + logits


def looked_at(ready: Prepared, linears: list[Linear]) -> list[Linear]:
    """Of a block's linears, those whose inputs the method looks at: all, or those that read what it removes."""
    roles = {"cfsp": ("down",), "reap": ("down",), "tyr": tuple(READER.values())}.get(ready.recipe.method)
    return [linear for linear in linears if roles is None or linear.role in roles]


def gathered(ready: Prepared) -> type[Statistic] | None:
    """The largest statistic of the run."""
    recipe = ready.recipe
    if recipe.method == "cfsp" and recipe.compensate == "lstsq":
        return CrossHessian if recipe.match == "dense" else Hessian
    return ready.statistic


def memory_parts(ready: Prepared) -> dict[str, int]:
    """Predicted peak resident memory on the computing device and the host together, by cause, in bytes."""
    recipe, skeleton = ready.recipe, ready.skeleton
    width = skeleton.dtype.itemsize
    entries = [skeleton.block_entries(index).values() for index in range(len(skeleton.blocks))]
    block = max(sum(entry.nbytes for entry in block) for block in entries)
    largest = max(linear.numel for linear in skeleton.all_linears())
    stored = next(iter(entries[0])).dtype
    # One block computing, one being read.
    weights = 2 * block
    if stored.itemsize < width:  # one matrix at a time is widened
        weights += largest * width
    elif stored != skeleton.dtype:
        weights += block * width // stored.itemsize
    # The largest matrix in float32, its scores and its keep mask.
    deciding = largest * (4 + 4 + 1)
    # The block before is being written, until deciding starts.
    writing = block
    parts = {"python, torch, transformers": BASELINE_BYTES, "weights": weights}
    if ready.statistic:
        assert recipe.samples
        assert recipe.seqlen
        assert recipe.micro_batch
        tokens = recipe.samples * recipe.seqlen
        if not recipe.offload_activations:
            parts["activations"] = tokens * skeleton.hidden_size * width * (2 if recipe.match == "dense" else 1)
        live = recipe.micro_batch * recipe.seqlen
        only_looks = recipe.method == "cfsp" and recipe.compensate != "lstsq"
        one_pass = not only_looks and recipe.sequential == "sublayer" and recipe.propagate == "pruned"
        if one_pass:
            live = tokens * (2 if recipe.match == "dense" else 1)
        widest = max(_width(skeleton, linears) for linears in skeleton.linears)
        forward = int(2 * live * (widest + 4 * skeleton.hidden_size) * width)
        statistic = gathered(ready)
        assert statistic
        sizes_B = [
            [statistic.size(linear.shape[1]) for linear in _first_readers(looked_at(ready, linears))]
            for linears in skeleton.linears
        ]
        # In one pass a statistic goes when the next is complete.
        parts["statistics"] = max(2 * max(sizes) if one_pass and not recipe.structured else sum(sizes) for sizes in sizes_B)
        hessian = max(Hessian.size(linear.shape[1]) for linears in skeleton.linears for linear in looked_at(ready, linears))
        if recipe.reconstruct == "sparsegpt":
            # The largest Hessian is inverted in float64: the matrix, its factor, the identity and the inverse.
            deciding += 9 * hessian
        elif recipe.reconstruct == "lstsq":
            # The matrices of conjugate gradients, and the Hessian in float32 (fit, held out, damped, scaled) and float64.
            deciding += 5 * 4 * largest + 8 * hessian
        elif recipe.method == "tyr" or (recipe.method == "cfsp" and recipe.compensate == "lstsq"):
            # A damped copy, its part of the kept inputs and the factor of that in float64.
            deciding += 6 * hessian
        elif recipe.refine == "icbs":
            deciding += 3 * 4 * largest + 3 * hessian
        parts["writing and a forward, or scores"] = max(writing + forward, deciding)
    else:
        parts["writing and scores"] = writing + deciding
    outer = sum(skeleton.checkpoint.entries[name].numel for name in skeleton.outer_tensors()) * width
    if recipe.calibration == "self":
        outer = int(skeleton.parameters() * width * 1.3)
    parts["embedding"] = max(outer - sum(parts.values()) + BASELINE_BYTES, 0)
    return parts


def _first_readers(linears: list[Linear]) -> list[Linear]:
    """One linear for each distinct input: of a layer's q, k and v, which read one tensor, and of its gate and up."""
    shared = {"k": "q", "v": "q", "up": "gate"}
    there = {(_layer(linear), linear.role) for linear in linears}
    return [linear for linear in linears if (_layer(linear), shared.get(linear.role)) not in there]


def _layer(linear: Linear) -> str:
    """What a linear is part of: attention, a feed-forward layer, an expert."""
    return linear.name.rpartition(".")[0]


def _width(skeleton: Skeleton, linears: list[Linear]) -> float:
    """Numbers that a block's linears put out for a token. One expert runs at a time, here on twice its share of the tokens."""
    common = sum(linear.shape[0] for linear in linears if linear.expert is None)
    expert = sum(linear.shape[0] for linear in linears if linear.expert == 0)
    return common + expert * min(2 * skeleton.share_of_tokens(linears[-1]) if expert else 1.0, 1.0)


def check_experts(ready: Prepared) -> None:
    """Raise `LLMPruneError` if a block of many experts, which is in memory whole, does not fit there with their statistics."""
    parts, available = memory_parts(ready), ready.skeleton.free_memory()
    needed = parts["weights"] + parts.get("statistics", 0)
    if needed > available:
        advice = "run where there is more memory"
        one_pass = ready.recipe.sequential == "sublayer" and ready.recipe.propagate == "pruned"
        if ready.statistic and not one_pass and not ready.recipe.structured:
            one_by_one = "give --sequential sublayer --propagate pruned, which has one expert's statistics at a time"
            advice = f"{one_by_one}, or {advice}"
        raise LLMPruneError(
            f"A block of {ready.skeleton.experts} experts, the next one and their statistics take {needed / 1e9:.1f} GB where "
            f"{available / 1e9:.1f} GB are free: {advice}."
        )


def probe_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's rate for matrix products of a typical size, in FLOP/s: a tenth of a second's work."""
    size = 4096 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=dtype)
    float((left @ left)[0, 0])
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        float((left @ left)[0, 0])  # waits for the device
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)
