"""The processes of one run: `torchrun -m llmprune prune ...` gives each rank its share of the calibration samples.

Without torchrun there is one rank and every operation is free.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from .errors import LLMPruneError
from .statistics import Statistic


class Ranks:
    """This process among `size` of them."""

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, samples: int, micro_batch: int) -> slice:
        """This rank's samples: whole micro-batches, so that any number of ranks runs the same forwards.

        Raises:
            LLMPruneError: there are fewer micro-batches than ranks.
        """
        batches = -(-samples // micro_batch)
        if batches < self.size:
            raise LLMPruneError(
                f"{self.size} ranks cannot share {samples} calibration samples in micro-batches of {micro_batch}: start "
                f"at most {batches} processes or take more samples."
            )
        first = batches * self.rank // self.size
        last = batches * (self.rank + 1) // self.size
        return slice(first * micro_batch, min(last * micro_batch, samples))

    def add(self, statistic: Statistic) -> None:
        """Sum a statistic over all ranks, in place."""
        if self.size == 1:
            return
        for tensor in statistic.sums():
            dist.all_reduce(tensor)
        tokens = torch.tensor([statistic.tokens], dtype=torch.int64, device=statistic.sums()[0].device)
        dist.all_reduce(tokens)
        statistic.tokens = int(tokens)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def launch(device: str) -> Ranks:
    """Join the other ranks if a launcher started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks()
