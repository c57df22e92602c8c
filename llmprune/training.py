"""Trains low-rank adapters on a pruned model: their ranks, the steps, the best of them, and what outlives the process.

AdamW (arXiv 1711.05101) on next-token cross-entropy, the learning rate up over 3 % of the steps and down like a cosine, with
gradients clipped. The numbers to train, their gradients and both moments are one vector each. Samples that are held out judge
the adapters a few times on the way; the best are remembered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from . import allocation
from .adapters import Adapters, Place
from .curvature import mean_loss, sequence_losses
from .errors import LLMPruneError
from .models import Skeleton
from .output import Output
from .progress import bar
from .statistics import Ends

if TYPE_CHECKING:
    from .recovery import Options, Say

# Every so many-th sample is held out, of those no more than so many, and they are looked at so many times on the way.
HOLDOUT, MOST_HELD_OUT, LOOKS = 8, 16, 5
WARM_UP, CLIP, DECAY = 0.03, 1.0, 0.01
BETAS, EPSILON = (0.9, 0.999), 1e-8
# Seconds of training that a crash may cost.
SAVE_SECONDS = 30.0
# Tokens that run at once, on a CPU and on a GPU.
MICRO_TOKENS = (512, 8192)


def share_ranks(weight_B: Sequence[float], *, rank: int, least: int, most: int) -> list[int]:
    """A rank for every block, proportional to its weight as far as bounds and whole numbers let it be.

    Args:
        weight_B: of every block, at least 0; all 0 means the same for all.
        rank: the mean.
        least, most: bounds around it.

    Returns:
        Ranks whose sum is `rank` times the number of blocks; a block of larger weight never has the lower rank.
    """
    total = math.fsum(weight_B)
    shares = [weight / total if total else 1 / len(weight_B) for weight in weight_B]
    units = rank * len(weight_B)
    ranks = allocation.apportion([units * share / most for share in shares], [most] * len(shares), units, low=least)
    # Rounding makes equals of weights that are far below the others; in order of weight they are none.
    order = sorted(range(len(shares)), key=lambda block: (-weight_B[block], block))
    return [rank for _, rank in sorted(zip(order, sorted(ranks, reverse=True), strict=True))]


def weights_of(importance_B: Sequence[float], removed_B: Sequence[float], direction: str) -> list[float]:
    """What ranks are proportional to.

    Args:
        importance_B: mean angle between each block's input and output, over pi.
        removed_B: share of each block's weights that was removed.
        direction: `importance` as in the paper, `inverse` its reciprocal, `pruned` the share removed, or `uniform`.
    """
    if direction == "uniform":
        return [1.0] * len(importance_B)
    if direction == "pruned":
        return list(removed_B)
    mean = math.fsum(importance_B) / len(importance_B)
    sigmoid_B = [1 / (1 + math.exp(-allocation.TEMPERATURE * (importance - mean))) for importance in importance_B]
    return [1 / value for value in sigmoid_B] if direction == "inverse" else sigmoid_B


def _recorded(parent: dict[str, object], count: int) -> list[float] | None:
    """The blocks' importance where the pruning measured it for all of them."""
    blocks = cast("list[dict[str, float | None]]", parent.get("blocks") or [])
    found = [importance for block in blocks if (importance := block.get("importance")) is not None]
    return found if len(found) == count else None


def _removed(parent: dict[str, object], skeleton: Skeleton) -> list[float]:
    """The share of each block's weights, or of its channels and heads, that was removed."""
    kept = cast("dict[str, list[int]]", parent.get("kept") or {})
    dense = cast("dict[str, int | list[int]]", parent.get("dense_widths") or {})
    count = len(skeleton.blocks)
    shares: list[list[float]] = []
    for key, values in kept.items():
        full = dense.get(key, max(values))
        full_B = full if isinstance(full, list) else [full] * count
        shares.append([1 - value / width for value, width in zip(values, full_B, strict=True)])
    if shares:
        return [math.fsum(each) / len(shares) for each in zip(*shares, strict=True)]
    facts = cast("dict[str, dict[str, int]]", parent["linears"])
    removed_B = []
    for linears in skeleton.linears:
        size = sum(linear.numel for linear in linears)
        zeros = sum(facts[linear.name]["zeros"] for linear in linears if linear.name in facts)
        removed_B.append(zeros / size if size else 0.0)
    return removed_B


class Trainer:
    """Adapters on their way from nothing to a lower loss.

    Args:
        skeleton: the pruned model, without weights; they are loaded when they are needed.
        ids_NT: samples; every `HOLDOUT`-th is held out.
        options: settled but for the steps.
        parent: the pruned model's record.
        say: gets a line for every look at the held-out samples.
    """

    def __init__(self, skeleton: Skeleton, ids_NT: Tensor, options: Options, parent: dict[str, object], say: Say) -> None:
        assert options.seqlen
        assert options.batch_size
        assert options.seed is not None
        self.skeleton, self.options, self.parent, self.say = skeleton, options, parent, say
        held_out = torch.arange(len(ids_NT)) % HOLDOUT == HOLDOUT - 1
        self.ids_NT, self.held_out_NT = ids_NT[~held_out], ids_NT[held_out][:MOST_HELD_OUT]
        self.seed, self.batch_size = options.seed, min(options.batch_size, len(self.ids_NT))
        self.micro_batch = max(MICRO_TOKENS[skeleton.device.type == "cuda"] // options.seqlen, 1)
        self.adapters: Adapters | None = None
        self.importance_B: list[float] = []
        self.rank_B: list[int] = []
        # The first entry is the pruned model's, before any step.
        self.history: list[dict[str, float]] = []
        self.seconds = {"train": 0.0, "look": 0.0}

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history) - 1

    @property
    def best(self) -> dict[str, float]:
        """The look with the lowest held-out loss, the first of equals."""
        return min((entry for entry in self.history if "held_out" in entry), key=lambda entry: entry["held_out"])

    def run(self, steps: int, output: Output, *, quiet: bool) -> None:
        """Train, or go on where an earlier run was, and end with the best adapters."""
        saved = output.read_progress()
        if saved:
            self._restore(*saved)
        else:
            self._begin()
            self._save(output)
        if self.done < steps:
            self._load()
            assert self.adapters
            self.adapters.install()
            with torch.enable_grad(), bar("recover", steps - self.done, quiet=quiet) as advance:
                self._train(steps, output, advance)
        self._unload()
        assert self.adapters
        self.adapters.values_P.copy_(self.best_P)

    def measure_step(self) -> tuple[float, float]:
        """Seconds that one step and one look at the held-out samples take, by trying. Changes nothing."""
        self._begin()
        assert self.adapters
        self.adapters.install()
        for _ in range(2):  # the first one also sets up what later ones find ready
            started = time.perf_counter()
            self._differentiate(self._batch(1))
            seconds = time.perf_counter() - started
        return seconds, self.seconds["look"]

    def _train(self, steps: int, output: Output, advance: Callable[[str], None]) -> None:
        looks = {math.ceil(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
        saved = begun = time.perf_counter()
        already = self.done
        for number in range(self.done + 1, steps + 1):
            started = time.perf_counter()
            loss = self._step(number, steps)
            self.seconds["train"] += time.perf_counter() - started
            self.history.append({"step": number, "loss": loss})
            if number in looks:
                self._look()
                left = (time.perf_counter() - begun) / (number - already) * (steps - number)
                self.say(f"step {number} of {steps}: {self._described()}, {left / 60:.1f} minutes left")
            if time.perf_counter() - saved >= SAVE_SECONDS or number == steps:
                self._save(output)
                saved = time.perf_counter()
            advance(self._described())

    def _described(self) -> str:
        """The loss lately, and the held-out loss at the last look beside the first."""
        lately = [entry["loss"] for entry in self.history[1:][-10:]]
        looked = [entry["held_out"] for entry in self.history if "held_out" in entry]
        return f"loss {sum(lately) / len(lately):.4f}, held out {looked[-1]:.4f} from {looked[0]:.4f}"

    # Where it begins

    def _begin(self) -> None:
        """Look at the model as it is, and place the adapters."""
        if self.history:
            return
        self._load()
        ends = [Ends() for _ in self.skeleton.blocks]

        def see(index: int, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            ends[index].update(hidden, cast(Tensor, after))

        handles = [
            block.register_forward_hook(partial(see, index), with_kwargs=True)
            for index, block in enumerate(self.skeleton.blocks)
        ]
        try:
            self.history = [{"step": 0}]
            self._look()
        finally:
            for handle in handles:
                handle.remove()
        self.importance_B = _recorded(self.parent, len(ends)) or [each.angle for each in ends]
        self._place()
        assert self.adapters
        self.best_P = self.adapters.values_P.clone()
        self.moment_P, self.square_P = torch.zeros_like(self.best_P), torch.zeros_like(self.best_P)

    def _place(self) -> None:
        """Choose the ranks and make the adapters."""
        options, targets = self.options, self.options.targets
        chosen = [[linear for linear in linears if not targets or linear.role in targets] for linears in self.skeleton.linears]
        # A block that lost its sub-layers has nothing to adapt.
        able = [index for index, linears in enumerate(chosen) if linears]
        weight_B = weights_of(self.importance_B, _removed(self.parent, self.skeleton), options.direction)
        ranks = share_ranks([weight_B[i] for i in able], rank=options.rank, least=options.least, most=options.most)
        self.rank_B = [0] * len(chosen)
        for index, rank in zip(able, ranks, strict=True):
            self.rank_B[index] = rank
        facts = cast("dict[str, dict[str, int]]", self.parent["linears"])
        recipe = cast("dict[str, object]", self.parent["recipe"])
        # In matrices that were made smaller a zero is a number like others, as dequantised weights have many.
        smaller = bool(self.parent.get("kept")) and recipe.get("format", "auto") == "auto"
        places = [
            Place(linear, self.rank_B[linear.block], facts.get(linear.name, {}).get("zeros", 0) > 0 and not smaller)
            for linears in chosen
            for linear in linears
        ]
        self.adapters = Adapters(places, seed=self.seed, device=self.skeleton.device)

    def _load(self) -> None:
        """Have the whole model in memory, in the dtype that forwards compute in."""
        skeleton = self.skeleton
        if all(parameter.device.type != "meta" for parameter in skeleton.model.parameters()):
            return
        skeleton.fill_outer(head=True)
        for index in range(len(skeleton.blocks)):
            names = skeleton.block_parameters(index)
            skeleton.fill_block(index, {name: skeleton.checkpoint.read(skeleton.stored_names[name]) for name in names})
            for linear in skeleton.linears[index]:
                # A backward needs every weight to be there, not the last one that was widened.
                linear.module.__dict__.pop("forward", None)
                assert linear.stored is not None
                weight = linear.stored.to(skeleton.device, skeleton.dtype)
                linear.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
                linear.stored = None

    def _unload(self) -> None:
        if self.adapters:
            self.adapters.remove()
        self.skeleton.empty_outer()
        for index in range(len(self.skeleton.blocks)):
            self.skeleton.empty_block(index)

    # Steps

    def _look(self) -> None:
        """Measure the held-out loss, and remember the adapters if they are the best so far."""
        started = time.perf_counter()
        loss = mean_loss(self.skeleton, self.held_out_NT, micro_batch=self.micro_batch)
        if not math.isfinite(loss) and self.done == 0:
            raise LLMPruneError(
                f"The pruned model's loss is not finite in {self.skeleton.dtype}: give --dtype float32, or check the weights."
            )
        self.history[-1]["held_out"] = loss
        if self.adapters and self.best is self.history[-1]:
            self.best_P.copy_(self.adapters.values_P)
        self.seconds["look"] += time.perf_counter() - started

    def _step(self, number: int, steps: int) -> float:
        """One step of AdamW. Returns the batch's loss before it."""
        assert self.adapters
        loss = self._differentiate(self._batch(number))
        slopes_P, values_P = self.adapters.slopes_P, self.adapters.values_P
        norm = float(slopes_P.norm())
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise LLMPruneError(
                f"The loss or its gradient is not finite at step {number} in {self.skeleton.dtype}: lower --learning-rate, or "
                "give --dtype float32."
            )
        slopes_P.mul_(min(CLIP / max(norm, 1e-12), 1.0))
        rate = self.options.learning_rate * schedule(number, steps)
        first, second = BETAS
        self.moment_P.lerp_(slopes_P, 1 - first)
        self.square_P.mul_(second).addcmul_(slopes_P, slopes_P, value=1 - second)
        scale_P = (self.square_P / (1 - second**number)).sqrt_().add_(EPSILON)
        values_P.mul_(1 - rate * DECAY).addcdiv_(self.moment_P, scale_P, value=-rate / (1 - first**number))
        return loss

    def _differentiate(self, ids_BT: Tensor) -> float:
        """Put the gradient of a batch's mean loss into the adapters' slopes. Returns the loss."""
        assert self.adapters
        self.adapters.slopes_P.zero_()
        total = 0.0
        with torch.enable_grad():
            for part_BT in ids_BT.split(self.micro_batch):
                loss = sequence_losses(self.skeleton, part_BT, "text").sum() / len(ids_BT)
                loss.backward()
                total += float(loss.detach())
        return total

    def _batch(self, number: int) -> Tensor:
        """A step's samples: all of them in a shuffled order, then all again in another."""
        start, count = (number - 1) * self.batch_size, len(self.ids_NT)
        rows = []
        for turn in range(start // count, (start + self.batch_size - 1) // count + 1):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + turn))
            rows.append(order[max(start - turn * count, 0) : start + self.batch_size - turn * count])
        return self.ids_NT[torch.cat(rows)]

    # What outlives the process

    def _save(self, output: Output) -> None:
        assert self.adapters
        tensors = {
            "values": self.adapters.values_P,
            "moment": self.moment_P,
            "square": self.square_P,
            "best": self.best_P,
        }
        facts = {"history": self.history, "importance": self.importance_B, "seconds": self.seconds}
        output.write_progress({name: tensor.detach().cpu() for name, tensor in tensors.items()}, facts)

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
        self.history = list(cast("list[dict[str, float]]", facts["history"]))
        self.importance_B = list(cast("list[float]", facts["importance"]))
        self.seconds = dict(cast("dict[str, float]", facts["seconds"]))
        self._place()
        assert self.adapters
        self.adapters.values_P.copy_(tensors["values"])
        self.moment_P, self.square_P, self.best_P = (
            tensors[name].to(self.skeleton.device) for name in ("moment", "square", "best")
        )


def schedule(number: int, steps: int) -> float:
    """The learning rate of step `number` from 1 to `steps`, relative to the highest: a line up, then half a cosine down."""
    warm_up = max(math.ceil(WARM_UP * steps), 1)
    if number <= warm_up:
        return number / warm_up
    return (1 + math.cos(math.pi * (number - warm_up) / (steps - warm_up + 1))) / 2
