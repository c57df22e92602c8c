"""iCBS: from Wanda's masks on, swap pruned and kept weights that lower the loss of the whole model.

"iterative Combinatorial Brain Surgeon" (arXiv 2411.17796). Weights never change, only which of them are zero. A step takes the
gradient g of the loss on a batch at the current, pruned weights, chooses a block of n weights of a matrix, half of them pruned
and half kept, models the loss over it to second order with the empirical Fisher matrix as curvature, and solves for the best
swaps (`quadratic`). A linear keeps its count of zeros, N:M its cells', `--group row` its rows'.

Where we part from the published code, which `--preset paper` follows but for its errors:

- A step changes one block in every linear from one forward and backward, not one block in one linear. Blocks are chosen by the
  gradient of the step before, so that the gradient that decides is not the noise that made the choice.
- Weights are chosen by the sign of what their change does to first order, not only by its size.
- Curvature comes from single positions: the mean over a sequence hides most of it. They also tell how uncertain each gradient
  is, and a change has to be worth more than that.
- Samples that are held out of the batches judge every step. A step that does not lower their loss is tried again with the
  better half of its swaps, then undone: their loss only falls, and the masks at the end are the best.
- What was looked at lately is left alone by visit stamps on each side; one list for both sides runs one of them dry.

The whole model is in memory, with its activations for one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..curvature import Probe, differentiate, mean_loss
from ..errors import LLMPruneError
from ..models import Linear, Skeleton
from ..options import IcbsOptions
from ..patterns import lowest
from ..recipe import Recipe, parse_nm
from ..refinement import is_starved, observed, refined
from ..statistics import InputNorm
from ..stream import Stream
from ..swaps import Matrix, Swaps, packed, propose, unpacked
from .wanda import score

STATISTIC = InputNorm

BLOCK_SIZE = 512
# Gamma's range, and what it changes by after a step that was not accepted whole and after one that was.
GAMMA, DOWN, UP = (0.01, 1.0), 0.5, 1.2


def prune(stream: Stream, recipe: Recipe) -> None:
    assert recipe.icbs
    search = Search(stream, recipe, recipe.icbs)
    search.run()
    for block in stream.blocks():
        for linear in block.linears:
            matrix = search.matrices[linear.name]
            linear.keep(matrix.keep_OI)
            if matrix.fixed:
                linear.facts["fallback"] = "magnitude"


class Search:
    """The masks on their way from Wanda's to better ones."""

    def __init__(self, stream: Stream, recipe: Recipe, options: IcbsOptions) -> None:
        assert stream.ids_NT is not None
        self.stream, self.recipe, self.options = stream, recipe, options
        self.skeleton: Skeleton = stream.skeleton
        self.micro_batch = recipe.micro_batch or 1
        held_out = torch.arange(len(stream.ids_NT)) % options.holdout == options.holdout - 1
        self.ids_NT, self.held_out_NT = stream.ids_NT[~held_out], stream.ids_NT[held_out]
        self.matrices: dict[str, Matrix] = {}
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self._check()
        self.block_size = options.block_size or min(BLOCK_SIZE, *(m.numel // 4 for m in self.skeleton.all_linears()))

    def _check(self) -> None:
        """Raise `LLMPruneError` if there is nothing to do, too little to do it with, or too little memory."""
        options, recipe = self.options, self.recipe
        if self.stream.ranks.size > 1:
            raise LLMPruneError(
                f"iCBS runs the whole model in one process and was started in {self.stream.ranks.size}: start one."
            )
        if not len(self.held_out_NT):
            raise LLMPruneError(
                f"iCBS holds out every {options.holdout}th calibration sample and got {len(self.ids_NT)}: give --samples "
                f"{options.holdout} or more."
            )
        for linear in self.skeleton.all_linears():
            size = linear.numel
            pruned = size - int(size * (1 - recipe.target))
            candidates = 2 * int(min(pruned * (1 - options.fix_pruned), (size - pruned) * (1 - options.fix_kept)))
            if (options.block_size or 2) > candidates:
                raise LLMPruneError(
                    f"iCBS cannot choose {options.block_size or 2} weights, half of them pruned and half kept, among the "
                    f"{candidates} of {linear.name!r} that it may swap at sparsity {recipe.target:g}: lower block_size."
                )
        check_memory(self.skeleton, recipe, options)

    def run(self) -> None:
        """Search, or go on where an earlier run was."""
        output = self.stream.output
        saved = output.read_progress() if output else None
        if saved:
            self._restore(*saved)
        else:
            self._start()
        steps = self.options.steps
        if self._done() < steps:
            with self._resident():
                if not self.history:
                    self._first_look()
                for number in range(self._done() + 1, steps + 1):
                    self._step(number)
                    if number % self.options.save_every == 0 or number == steps:
                        self._save()
                    self.stream.advance_progress(f"step {number}, held-out loss {self.history[-1]['held_out']:.4f}")
        for name, keep_OI in self.best.items():
            self.matrices[name].keep_OI = keep_OI

    def _done(self) -> int:
        return len(self.history) - 1

    # Where it begins ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Wanda's masks, refined where the recipe says so, and which weights are never swapped."""
        kind = observed(STATISTIC, self.recipe)
        assert kind
        wanda = Stream(
            self.skeleton,
            self.stream.ids_NT,
            micro_batch=self.micro_batch,
            propagate=self.stream.propagate,
            sequential=self.stream.sequential,
            offload=self.recipe.offload_activations,
            sparsities=self.stream.sparsities,
        )
        for block in wanda.blocks():
            pattern = self.recipe.competition(default="row", sparsity=block.sparsity)
            for linear, inputs in block.observe(kind):
                if is_starved(linear, inputs, self.recipe):  # few gradients would reach it, too: nothing of it is swapped
                    keep_OI = pattern.keep(linear.weight_OI.abs())
                    free_OI: Tensor | None = torch.zeros_like(keep_OI)
                else:
                    score_OI = score(linear, inputs)
                    keep_OI = refined(linear, pattern.keep(score_OI), score_OI, inputs, pattern, self.recipe)
                    free_OI = self._free(score_OI, keep_OI)
                linear.keep(keep_OI)
                self.matrices[linear.name] = self._matrix(linear, keep_OI, free_OI)
        # As when it is resumed; linears run in another order in some architectures.
        self.matrices = {linear.name: self.matrices[linear.name] for linear in self.skeleton.all_linears()}

    def _matrix(self, linear: Linear, keep_OI: Tensor, free_OI: Tensor | None) -> Matrix:
        nm = parse_nm(self.recipe.pattern)
        # The paper starts from Wanda's rows and then lets all weights of a linear compete.
        cell = nm[1] if nm else linear.shape[1] if self.recipe.group == "row" else None
        return Matrix(linear, keep_OI, cell, self.options.gamma, free_OI)

    def _free(self, score_OI: Tensor, keep_OI: Tensor) -> Tensor | None:
        """All but the pruned weights of the lowest scores and the kept ones of the highest."""
        options = self.options
        if not options.fix_pruned and not options.fix_kept:
            return None
        rows = parse_nm(self.recipe.pattern) is None and self.recipe.group != "layer"
        score_GN, keep_GN = (each if rows else each.reshape(1, -1) for each in (score_OI, keep_OI))
        kept = int(keep_GN[0].sum())
        fixed_GN = lowest(score_GN.masked_fill(keep_GN, torch.inf), int(options.fix_pruned * (keep_GN.shape[1] - kept)))
        fixed_GN |= lowest((-score_GN).masked_fill(~keep_GN, torch.inf), int(options.fix_kept * kept))
        return ~fixed_GN.view_as(score_OI)

    @contextmanager
    def _resident(self) -> Iterator[None]:
        """Inside, the whole pruned model is in memory, and its dense weights beside it."""
        skeleton = self.skeleton
        skeleton.fill_outer(head=True)
        for index in range(len(skeleton.blocks)):
            entries = skeleton.block_entries(index)
            skeleton.fill_block(index, {name: skeleton.checkpoint.read(skeleton.stored_names[name]) for name in entries})
            for linear in skeleton.linears[index]:
                self.matrices[linear.name].load(skeleton.device, skeleton.dtype)
        try:
            yield
        finally:
            skeleton.empty_outer()
            for index in range(len(skeleton.blocks)):
                skeleton.empty_block(index)
            for matrix in self.matrices.values():
                del matrix.dense_OI

    # Steps -------------------------------------------------------------------------------------------------------

    def _first_look(self) -> None:
        """The loss to begin with, and the gradients that choose the first blocks."""
        self._note({"step": 0, "held_out": self._loss(self.held_out_NT)})
        if self.options.scope == "model":
            nothing = torch.zeros(0, dtype=torch.int64, device=self.skeleton.device)
            probes = self._look(0, dict.fromkeys(self._swapped(), nothing))
            self._choose_next(0, probes)

    def _step(self, number: int) -> None:
        options = self.options
        matrices = self._swapped()
        if options.scope == "linear":
            matrices = [matrices[self._draw(len(matrices), number - 1, 1)[0]]]
        probes = self._look(number, {matrix: matrix.block_N for matrix in matrices})
        if options.scope == "linear":
            self._choose_next(number, probes)
            for matrix, probe in probes.items():
                assert matrix.block_N is not None
                probe.look_at(matrix.block_N)
        swaps = [propose(matrix, probe, options, number) for matrix, probe in probes.items()]
        for each in swaps:
            each.matrix.stamp_OI.view(-1)[each.index_N] = number
        self._apply(number, swaps)
        if options.scope == "model":
            self._choose_next(number, probes)
        else:
            matrices[0].block_N = None

    def _swapped(self) -> list[Matrix]:
        return [matrix for matrix in self.matrices.values() if not matrix.fixed]

    def _look(self, number: int, blocks: Mapping[Matrix, Tensor | None]) -> dict[Matrix, Probe]:
        """Show the step's batch to probes."""
        options = self.options
        size = min(options.batch_size, len(self.ids_NT))
        ids_BT = self.ids_NT[self._draw(len(self.ids_NT), number * size, size)]
        stride = max(ids_BT.numel() // options.positions, 1)
        probes = {
            matrix: Probe(matrix.linear, block_N, fisher=options.fisher, stride=stride) for matrix, block_N in blocks.items()
        }
        self.batch_BT = ids_BT
        self.batch_loss = differentiate(
            self.skeleton, ids_BT, list(probes.values()), micro_batch=self.micro_batch, target=options.target
        )
        return probes

    def _draw(self, population: int, start: int, count: int) -> list[int]:
        """Places `start` to `start + count` of an endless sequence, the numbers below `population` shuffled again and again."""
        drawn: list[int] = []
        for position in range(start, start + count):
            turn, place = divmod(position, population)
            if place == 0 or not drawn:
                generator = torch.Generator().manual_seed(self.recipe.seed + turn)
                order = torch.randperm(population, generator=generator).tolist()
            drawn.append(order[place])
        return drawn

    def _choose_next(self, number: int, probes: dict[Matrix, Probe]) -> None:
        """Choose the weights to look at."""
        for matrix, probe in probes.items():
            if self.options.select == "random":
                generator = torch.Generator().manual_seed(self.recipe.seed + number)
                cost_OI = torch.rand(matrix.linear.shape, generator=generator).to(self.skeleton.device)
            else:
                cost_OI = probe.gradient_OI * matrix.dense_OI
                if self.options.select == "gradient":
                    cost_OI.abs_().neg_()
                cost_OI = torch.where(matrix.keep_OI, -cost_OI, cost_OI)
            matrix.block_N = matrix.choose(cost_OI, self.block_size, self.options.tabu)

    def _apply(self, number: int, swaps: list[Swaps]) -> None:
        """Apply as many of the proposed swaps as the accepting samples bear, and learn from it."""
        options = self.options
        before = self.history[-1]["held_out"]
        reference = self.batch_loss if options.accept == "batch" else before
        cost_P = torch.cat([each.cost_P for each in swaps])
        rank_P = torch.empty_like(cost_P, dtype=torch.int64)
        rank_P[cost_P.argsort(stable=True)] = torch.arange(len(cost_P), device=cost_P.device)
        ranks = rank_P.split([len(each.cost_P) for each in swaps])
        count = len(cost_P)
        entry = {"step": number, "batch": self.batch_loss, "gamma": sum(each.matrix.gamma for each in swaps) / len(swaps)}
        for attempt in range(options.retries + 1):
            taken = [rank_P < count for rank_P in ranks]
            predicted = sum(each.change(taken_P) for each, taken_P in zip(swaps, taken, strict=True))
            self._toggle(swaps, taken)
            held_out = self._loss(self.held_out_NT)
            judged = self._loss(self.batch_BT) if options.accept == "batch" else held_out
            if attempt == 0:
                entry["proposed"] = count
                if options.adapt:
                    self._adapt(swaps, DOWN if judged > reference else UP)
            if options.accept == "none" or judged < reference or not count:
                break
            self._toggle(swaps, taken)
            held_out, predicted = before, 0.0
            count = count // 2 if attempt < options.retries else 0
        entry |= {"swaps": count, "predicted": predicted, "held_out": held_out}
        self._note(entry)

    def _note(self, entry: dict[str, float]) -> None:
        """Add to the history, and remember the masks if they are the best so far."""
        options = self.options
        best = min((each["held_out"] for each in self.history), default=float("inf"))
        if options.keep_best and options.accept != "holdout" and entry["held_out"] < best:
            self.best = {name: matrix.keep_OI.clone() for name, matrix in self.matrices.items()}
        self.history.append(entry)

    def _toggle(self, swaps: list[Swaps], taken: list[Tensor]) -> None:
        for each, taken_P in zip(swaps, taken, strict=True):
            each.matrix.toggle(each.index_N[each.part(taken_P)])

    def _adapt(self, swaps: list[Swaps], factor: float) -> None:
        for each in swaps:
            each.matrix.gamma = min(max(each.matrix.gamma * factor, GAMMA[0]), GAMMA[1])

    def _loss(self, ids_BT: Tensor) -> float:
        return mean_loss(self.skeleton, ids_BT, micro_batch=self.micro_batch, target=self.options.target)

    # What outlives the process -----------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self.stream.output:
            return
        tensors = {f"best.{name}": packed(keep_OI) for name, keep_OI in self.best.items()}
        for name, matrix in self.matrices.items():
            tensors |= {f"keep.{name}": packed(matrix.keep_OI), f"stamp.{name}": matrix.stamp_OI.cpu()}
            if matrix.free_OI is not None:
                tensors[f"free.{name}"] = packed(matrix.free_OI)
            if matrix.block_N is not None:
                tensors[f"block.{name}"] = matrix.block_N.cpu()
        gamma = {name: matrix.gamma for name, matrix in self.matrices.items()}
        self.stream.output.write_progress(tensors, {"history": self.history, "gamma": gamma})

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
        device = self.skeleton.device
        for linear in self.skeleton.all_linears():
            name = linear.name
            free = tensors.get(f"free.{name}")
            matrix = self._matrix(
                linear,
                unpacked(tensors[f"keep.{name}"], linear.shape).to(device),
                None if free is None else unpacked(free, linear.shape).to(device),
            )
            matrix.stamp_OI = tensors[f"stamp.{name}"].to(device)
            matrix.gamma = facts["gamma"][name]  # type: ignore[index]
            if f"block.{name}" in tensors:
                matrix.block_N = tensors[f"block.{name}"].to(device)
            if f"best.{name}" in tensors:
                self.best[name] = unpacked(tensors[f"best.{name}"], linear.shape).to(device)
            self.matrices[name] = matrix
        self.history = list(facts["history"])  # type: ignore[call-overload]


def check_memory(skeleton: Skeleton, recipe: Recipe, options: IcbsOptions) -> None:
    """Raise `LLMPruneError` if the search does not fit in memory."""
    needed = sum(memory_parts(skeleton, recipe, options).values())
    available = skeleton.free_memory()
    if needed > available:
        raise LLMPruneError(
            f"iCBS has the whole model and its gradients in memory, which takes {needed / 1e9:.1f} GB where "
            f"{available / 1e9:.1f} GB are free: use --method wanda with --refine icbs, which holds one block."
        )


def memory_parts(skeleton: Skeleton, recipe: Recipe, options: IcbsOptions) -> dict[str, int]:
    """Predicted memory of the search by cause, in bytes."""
    assert recipe.seqlen
    linears = list(skeleton.all_linears())
    prunable, largest = skeleton.prunable_parameters(), max(linear.numel for linear in linears)
    width = skeleton.dtype.itemsize
    tokens = recipe.seqlen * (recipe.micro_batch or 1)
    batch = recipe.seqlen * options.batch_size
    # Each linear's input and output, as much again between them, and logits with their softmax and gradient.
    passed = sum(sum(linear.shape) * skeleton.share_of_tokens(linear) for linear in linears)
    activations = int(2 * tokens * passed * width) + 4 * tokens * skeleton.vocab_size * 4
    block = options.block_size or BLOCK_SIZE
    rows = min(options.positions, batch) if options.fisher == "token" else options.batch_size
    if options.scope == "model":
        looking = prunable * 4 + len(linears) * rows * block * 4
    else:
        looking = largest * 4 + rows * block * 4 + batch * max(sum(linear.shape) for linear in linears) * width
    return {
        "weights": (skeleton.parameters() + prunable) * width,
        "masks and visits": prunable * (3 + (options.fix_pruned + options.fix_kept > 0) + options.keep_best),
        "gradients": looking + 4 * largest * 4,
        "blocks": 6 * block * block * 4,
        "activations": activations,
    }
