"""Models that differ from a dense one at some positions, each evaluated with the whole model in memory.

A search proposes candidates, one level per position (a sub-layer, or a block); a subclass says what a position is at a level.
Going from one candidate to the next touches only positions whose levels differ. The loss is the divergence from the dense
model's predictions (`teacher`), on windows of calibration text: every eighth sample is kept for the final judgement, the rest
is the search's pool. Ranks share candidates, and all get all losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import evolution
from .errors import LLMPruneError
from .evolution import Candidate, Space, Stage, State
from .models import Skeleton
from .options import SearchOptions
from .ranks import Ranks
from .statistics import SplitHessian
from .teacher import Teacher


class Candidates(ABC):
    """The whole model in memory, at any candidate.

    Args:
        skeleton: the model.
        ids_NT: the calibration set, all of it, int64 [samples, tokens].
        positions: how many there are.
        top_k: logits per token that are compared with the dense model's.
        ranks: that share the work.

    Raises:
        LLMPruneError: no sample is left to judge by, or the model does not fit in memory.
    """

    def __init__(self, skeleton: Skeleton, ids_NT: Tensor, positions: int, *, top_k: int, ranks: Ranks) -> None:
        self.skeleton, self.ranks = skeleton, ranks
        held_out_N = torch.tensor([SplitHessian.holds_out(i) for i in range(len(ids_NT))])
        if not held_out_N.any():
            raise LLMPruneError(
                f"The search keeps every {SplitHessian.EVERY}th calibration sample to judge by and got {len(ids_NT)}: give "
                f"--samples {SplitHessian.EVERY} or more."
            )
        # The pool comes first, so that its windows have the numbers that a search draws.
        self.ids_WT = torch.cat([ids_NT[~held_out_N], ids_NT[held_out_N]])
        self.pool = int((~held_out_N).sum())
        self.current: list[int | None] = [None] * positions
        self.teacher = Teacher(self._dense_logits, top_k)
        needed = (skeleton.parameters() + skeleton.prunable_parameters()) * skeleton.dtype.itemsize
        needed += 4 * ids_NT.shape[1] * skeleton.vocab_size * 4
        if needed > skeleton.free_memory():
            raise LLMPruneError(
                f"The search has the whole model in memory, which takes {needed / 1e9:.1f} GB where "
                f"{skeleton.free_memory() / 1e9:.1f} GB are free: use --allocation uniform, which holds one block."
            )

    @abstractmethod
    def apply(self, position: int, level: int | None) -> None:
        """Bring a position to a level; None: as in the dense model."""

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Inside, the dense model is in memory."""
        skeleton = self.skeleton
        try:
            skeleton.fill_outer(head=True)
            for index in range(len(skeleton.blocks)):
                for name in skeleton.block_parameters(index):
                    tensor = skeleton.checkpoint.read(skeleton.stored_names[name])
                    skeleton.check(name, tensor)
                    self.assign(name, tensor.to(skeleton.device, skeleton.dtype))
            yield
        finally:
            for position in range(len(self.current)):
                self._bring(position, None)
            skeleton.empty_outer()
            for index in range(len(skeleton.blocks)):
                skeleton.empty_block(index)

    def assign(self, name: str, tensor: Tensor) -> None:
        """Give a parameter of the model this value."""
        self.skeleton._assign(name, nn.Parameter(tensor, requires_grad=False))

    def losses(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[float]:
        """Mean divergence of each candidate from the dense model on some windows, the same on every rank."""
        self.teacher.look(windows)
        found = torch.zeros(len(candidates), dtype=torch.float64)
        for number in range(self.ranks.rank, len(candidates), self.ranks.size):
            self.become(candidates[number])
            found[number] = sum(self.teacher.kl(window, self.logits(window)) for window in windows) / len(windows)
        self.ranks.sum(found)
        return found.tolist()

    def search(
        self,
        space: Space,
        start: Candidate,
        options: SearchOptions,
        *,
        seed: int,
        on_generation: Callable[[State], None],
        resume: State | None,
    ) -> tuple[Candidate, dict[str, object]]:
        """Look for a better candidate than the start, and judge the two on held-out samples.

        Args:
            space, start, seed, on_generation, resume: as for `evolution.search`.
            options: the recipe's.

        Returns:
            The better one, the start if they are equal, and the search's account for the record.
        """
        window = self.ids_WT.shape[1]
        with self.resident():
            state = evolution.search(
                space,
                start,
                self.losses,
                generations=options.generations,
                offspring=options.offspring,
                stages=[Stage(*stage) for stage in options.stages],
                pool_tokens=self.pool * window,
                window=window,
                seed=seed,
                on_generation=on_generation,
                resume=resume,
            )
            rivals = [start, state.parent]
            held_out = self.held_out_losses(rivals)
        account: dict[str, object] = {
            "held_out": dict(zip(("before", "found"), held_out, strict=True)),
            "generations": state.as_json()["history"],
        }
        return evolution.choose(rivals, held_out), account

    def held_out_losses(self, candidates: Sequence[Candidate]) -> list[float]:
        """The same on the samples that no search has seen."""
        return self.losses(candidates, range(self.pool, len(self.ids_WT)))

    def become(self, candidate: Candidate) -> None:
        """Bring every position to its level."""
        for position, level in enumerate(candidate):
            self._bring(position, level)

    def _bring(self, position: int, level: int | None) -> None:
        if self.current[position] != level:
            self.apply(position, level)
            self.current[position] = level

    def _dense_logits(self, window: int) -> Tensor:
        for position in range(len(self.current)):
            self._bring(position, None)
        return self.logits(window)

    def logits(self, window: int) -> Tensor:
        """The model's logits on a window, [T, V]."""
        ids_BT = self.ids_WT[window : window + 1].to(self.skeleton.device)
        with torch.no_grad():
            return self.skeleton.model(input_ids=ids_BT, use_cache=False).logits[0]
