"""Every sub-layer at several levels of sparsity, each with weights that make up for what is gone: what Týr searches in.

A file for every sub-layer holds, per level, which channels or query heads are kept and the columns of down or o that read them;
so a supernet takes about the model's size times the levels' mean density. What later blocks see of a sub-layer while theirs are
made is the expectation over its levels (Týr-the-Pruner, arXiv 2503.09657, equation 5): outputs are linear in the weights, so
averaging weights is averaging outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import evolution
from .anatomy import Anatomy, HeadsMode, Kept, SubLayer
from .candidates import Candidates
from .checkpoint import Checkpoint, read_header, write_shard
from .elimination import FirstOrder, Level, path
from .errors import LLMPruneError
from .models import Linear, Skeleton
from .ranks import Ranks
from .surgery import shrink

# The linear that reads a sub-layer's units.
READER: dict[SubLayer, str] = {"attention": "o", "mlp": "down"}


@dataclass(frozen=True)
class Position:
    """A sub-layer whose units may go, and how they are counted.

    Args:
        block, sublayer: where it is.
        units: it has: multiples of channels, KV groups, or query heads of each KV group.
        inputs: of its reader that a unit is, in each of `balance` runs.
        balance: runs that lose units alike (query heads of every KV group); 1 if all units compete.
        rest: inputs beyond the last whole unit, which go first.
        cost: parameters that go with a unit.
        group: query heads per unit, 0 for channels.
    """

    block: int
    sublayer: SubLayer
    units: int
    inputs: int
    balance: int
    rest: int
    cost: int
    group: int

    @classmethod
    def of(cls, anatomy: Anatomy, block: int, sublayer: SubLayer, *, heads: HeadsMode, multiple: int) -> Position:
        sizes, head_dim = anatomy.blocks[block], anatomy.head_dim
        if sublayer == "mlp":
            units, rest = divmod(sizes.channels, multiple)
            return cls(block, sublayer, units, multiple, 1, rest, multiple * anatomy.channel_cost, 0)
        whole = heads == "kv_group"
        inputs, balance = (sizes.group * head_dim, 1) if whole else (head_dim, sizes.kv_heads)
        cost = anatomy.head_cost(block, heads)
        return cls(block, sublayer, anatomy.head_units(block, heads), inputs, balance, 0, cost, sizes.group if whole else 1)

    def eliminate(
        self,
        weight_OI: Tensor,
        hessian_II: Tensor,
        kept_units: Sequence[int],
        *,
        first_order: FirstOrder,
        step: int,
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """What stays at each number of kept units, from many to few: channels or query heads, and weights [O, K].

        Args:
            weight_OI: the reader's, or what it is to come close to, float32.
            hessian_II: of its inputs, damped.
            kept_units: descending.
            first_order, step: as for `elimination.path`; the step counts channels, heads go one by one.
        """
        if self.sublayer == "mlp":
            dense = self.units * self.inputs + self.rest
            targets = [0 if kept == self.units and not self.rest else dense - kept * self.inputs for kept in kept_units]
            levels = path(weight_OI, hessian_II, targets, step=step, first_order=first_order, damping=0.0)
        else:
            targets = [self.units - kept for kept in kept_units]
            levels = path(
                weight_OI,
                hessian_II,
                targets,
                group=self.inputs,
                balance=self.balance,
                first_order=first_order,
                damping=0.0,
            )
        for level in levels:
            yield self._kept(level), level.weight_OK

    def _kept(self, level: Level) -> tuple[int, ...]:
        if not self.group:
            return tuple(level.keep_U.tolist())
        return tuple(unit * self.group + i for unit in level.keep_U.tolist() for i in range(self.group))

    def columns(self, kept: Sequence[int], head_dim: int) -> Tensor:
        """The reader's inputs that kept channels or query heads are, int64."""
        at = torch.tensor(kept, dtype=torch.int64)
        return at if not self.group else (at[:, None] * head_dim + torch.arange(head_dim)).flatten()


class Supernet:
    """The files of one iteration.

    Args:
        folder: where they are.
        iteration: of the search, from 0.
        positions: the sub-layers.
        centre: units that each keeps at level 0.
        steps: units between two of its levels.
        levels: how many, at most.
    """

    def __init__(
        self,
        folder: Path,
        iteration: int,
        positions: Sequence[Position],
        centre: Sequence[int],
        steps: Sequence[int],
        levels: int,
    ) -> None:
        self.folder, self.iteration, self.positions = folder, iteration, positions
        self.centre, self.steps = list(centre), list(steps)
        removed = [position.units - kept for position, kept in zip(positions, centre, strict=True)]
        self.bounds = [
            evolution.levels(position.units, gone, step, levels)
            for position, gone, step in zip(positions, removed, steps, strict=True)
        ]

    def kept_units(self, number: int, level: int) -> int:
        return self.centre[number] - level * self.steps[number]

    def levels(self, number: int) -> range:
        low, high = self.bounds[number]
        return range(low, high + 1)

    def file(self, number: int) -> Path:
        return self.folder / f"supernet-{self.iteration}-{number:04}.safetensors"

    def write(self, number: int, levels: Sequence[tuple[tuple[int, ...], Tensor]], dtype: torch.dtype) -> None:
        """Keep a position's levels, from the densest."""
        tensors: dict[str, Tensor] = {}
        for level, (kept, weight_OK) in zip(self.levels(number), levels, strict=True):
            tensors[f"keep.{level}"] = torch.tensor(kept, dtype=torch.int32)
            tensors[f"weight.{level}"] = weight_OK.to("cpu", dtype).contiguous()
        write_shard(self.file(number), tensors)

    def read(self, number: int, level: int) -> tuple[tuple[int, ...], Tensor]:
        """What stays of a position at a level, and its reader's weights [O, K].

        Raises:
            LLMPruneError: the file is damaged, or from another run.
        """
        shard = Checkpoint(self.folder, read_header(self.file(number)))
        if f"keep.{level}" not in shard.entries:
            raise LLMPruneError(f"{self.file(number)} is from another search: pass --overwrite to start afresh.")
        return tuple(shard.read(f"keep.{level}").tolist()), shard.read(f"weight.{level}")

    def expected(self, number: int, linear: Linear, head_dim: int, accumulate: str) -> Tensor:
        """What later blocks see of a position: the mean of its levels' weights, float32 [O, I].

        Args:
            accumulate: `expectation` weights levels by their density, `uniform` alike, `center` takes level 0 alone.
        """
        position = self.positions[number]
        mean_OI = torch.zeros(linear.shape)
        total = 0.0
        for level in self.levels(number):
            density = self.kept_units(number, level) / position.units
            share = {"expectation": density, "uniform": 1.0, "center": float(level == 0)}[accumulate]
            if share:
                kept, weight_OK = self.read(number, level)
                mean_OI[:, position.columns(kept, head_dim)] += share * weight_OK.float()
                total += share
        return mean_OI / total if total else mean_OI

    def remove(self) -> None:
        for file in self.folder.glob(f"supernet-{self.iteration}-*.safetensors"):
            file.unlink()

    def remove_others(self) -> None:
        """Remove what an iteration left that was killed before it could."""
        for file in self.folder.glob("supernet-*.safetensors"):
            if not file.name.startswith(f"supernet-{self.iteration}-"):
                file.unlink()


class Shrunk(Candidates):
    """Candidates of a supernet: the model really smaller, so that it is faster, too."""

    def __init__(
        self, skeleton: Skeleton, ids_NT: Tensor, supernet: Supernet, anatomy: Anatomy, *, top_k: int, ranks: Ranks
    ) -> None:
        super().__init__(skeleton, ids_NT, len(supernet.positions), top_k=top_k, ranks=ranks)
        self.supernet, self.anatomy = supernet, anatomy
        self.dense: dict[int, dict[str, Tensor]] = {}

    def apply(self, position: int, level: int | None) -> None:
        where = self.supernet.positions[position]
        index, sublayer = where.block, where.sublayer
        prefix = f"{self.skeleton.blocks_path}.{index}."
        block = self.skeleton.blocks[index]
        name = "self_attn" if sublayer == "attention" else "mlp"
        module = block.get_submodule(name)
        if position not in self.dense:
            self.dense[position] = {
                f"{name}.{own}": parameter.data
                for own, parameter in module.named_parameters()
                if f"{name}.{own}".rpartition(".")[0] in self.anatomy.linears
            }
        module.__dict__.pop("forward", None)
        everything = self.anatomy.blocks[index].everything()
        tensors, kept = self.dense[position], everything.heads if where.group else everything.channels
        if level is not None:
            reader = next(own for own, cut in self.anatomy.linears.items() if own.startswith(name) and cut.into)
            kept, weight_OK = self.supernet.read(position, level)
            if not kept:
                module.forward = partial(_only_bias_pair if where.group else _only_bias, tensors.get(f"{reader}.bias"))
                return
            stays = Kept(everything.channels, kept) if where.group else Kept(kept, everything.heads)
            others = {own: tensor for own, tensor in tensors.items() if own != f"{reader}.weight"}
            tensors = shrink(others, stays, self.anatomy, index)
            tensors[f"{reader}.weight"] = weight_OK.to(self.skeleton.device, self.skeleton.dtype)
        if where.group:
            sizes = self.anatomy.blocks[index]
            kv_heads = len({head // sizes.group for head in kept})
            # What transformers repeats keys and values by.
            module.__dict__["num_key_value_groups"] = len(kept) // kv_heads
        for own, tensor in tensors.items():
            self.assign(prefix + own, tensor)


def _only_bias(bias_O: Tensor | None, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """What is left of a sub-layer without units: its reader's bias, if it has one."""
    return torch.zeros_like(hidden_states) if bias_O is None else bias_O.expand_as(hidden_states)


def _only_bias_pair(bias_O: Tensor | None, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
    """The same of an attention, which in transformers returns a pair."""
    return _only_bias(bias_O, hidden_states), None
