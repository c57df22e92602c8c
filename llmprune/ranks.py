"""The processes of one run: `torchrun -m llmprune prune ...` gives each rank its share of the calibration samples.

Without a launcher there is one rank and every operation here is free. Every rank decides every mask itself, from the same sums,
so nothing but sums travels; the main rank alone writes.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import LLMPruneError
from .statistics import Ends, Statistic

T = TypeVar("T")
MESSAGE_BYTES = 4096


class SharedError(LLMPruneError):
    """An error that every rank raises, so that one of them may speak for all."""


class LostRank(SharedError):
    """Another rank has died. Its own message, or the launcher's, says why."""


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

        Where there are fewer micro-batches than ranks, single samples are shared out: more forwards of fewer samples.

        Raises:
            LLMPruneError: there are fewer samples than ranks.
        """
        if samples < self.size:
            raise LLMPruneError(
                f"{self.size} ranks cannot share {samples} calibration samples: start at most {samples} processes or take "
                "more samples."
            )
        unit = micro_batch if -(-samples // micro_batch) >= self.size else 1
        units = -(-samples // unit)
        first = units * self.rank // self.size
        last = units * (self.rank + 1) // self.size
        return slice(first * unit, min(last * unit, samples))

    def add(self, statistic: Statistic | Ends) -> None:
        """Sum a statistic over all ranks, in place.

        Raises:
            LostRank: another rank has died.
        """
        for tensor in statistic.sums():
            self.sum(tensor)

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place.

        Raises:
            LostRank: another rank has died.
        """
        if self.size > 1:
            _contact(lambda: dist.all_reduce(tensor))

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it is bad input on any of them, that is everybody's error.

        Raises:
            LLMPruneError: the first rank's that failed, on all ranks.
        """
        if self.size == 1:
            return work()
        error = ""
        result: T | None = None
        try:
            result = work()
        except LLMPruneError as caught:
            error = str(caught) or "bad input"
        for rank, message in enumerate(self._gather(error)):
            if message:
                raise SharedError(message if rank == 0 else f"On rank {rank}: {message}")
        return result  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """Do `work` on the main rank, then on the others, which find what it has cached."""
        early = self.together(lambda: work() if self.is_main else None)
        late = self.together(lambda: None if self.is_main else work())
        return early if self.is_main else late  # type: ignore[return-value]

    def check_same(self, identity: Mapping[str, str]) -> None:
        """Raise `LLMPruneError` if ranks see different models, data or versions."""
        if self.size == 1:
            return
        own = {key: hashlib.sha256(value.encode()).hexdigest()[:16] for key, value in identity.items()}
        everyone = [json.loads(text) for text in self._gather(json.dumps(own))]
        for rank, other in enumerate(everyone):
            for key, digest in everyone[0].items():
                if other.get(key) != digest:
                    raise SharedError(f"Rank {rank} and rank 0 differ in {key}: give every rank the same files and versions.")

    def from_main(self, number: int) -> int:
        """The main rank's number, on every rank."""
        if self.size == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.int64)
        _contact(lambda: dist.broadcast(tensor, 0))
        return int(tensor)

    def _gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order."""
        own = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        content = text.encode()[:MESSAGE_BYTES]
        own[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        everyone = [torch.zeros_like(own) for _ in range(self.size)]
        _contact(lambda: dist.all_gather(everyone, own))
        return [_decode(received) for received in everyone]


def _decode(text: Tensor) -> str:
    return bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore")


def _contact(exchange: Callable[[], object]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise LostRank(
            f"Lost contact with another rank ({reason}): see its message; the same command resumes the run, also with "
            "another number of ranks."
        ) from error


def launch() -> Ranks:
    """Join the other ranks if a launcher started this process. Sums on a GPU go by nccl, everything else by gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # The main rank may evaluate or write for hours; a rank that dies is noticed by its closed connection.
        dist.init_process_group(backend, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return Ranks()


def local_device(device: str) -> str:
    """`cuda` as this rank's own GPU. Raises `LLMPruneError` if there is none left for it."""
    local = os.environ.get("LOCAL_RANK")
    if device != "cuda" or local is None:
        return device
    if int(local) >= torch.cuda.device_count():
        raise LLMPruneError(
            f"Process {local} of this machine has no GPU of its own, torch sees {torch.cuda.device_count()}: start one process "
            "per GPU."
        )
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"
