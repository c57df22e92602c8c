"""What stays of a mixture of experts when whole experts go, or FFN channels of each, and how tensors and config.json follow.

Experts that stay are numbered anew, in their order, and the router keeps their rows. All layers keep as many experts, and all
experts as many channels (see `mixture`), so that what is written is a plain checkpoint of the stock class.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from .errors import LLMPruneError
from .experts import PARTS
from .mixture import COUNTS, SHARED_WIDTH, Mixture, mixture_of, prunable_parameters
from .models import Linear, Skeleton
from .recipe import Recipe
from .stream import Block
from .structure import PLAN, dense_config
from .surgery import read_plan


@dataclass(frozen=True)
class KeptExperts:
    """What stays of a block's experts, by numbers in ascending order.

    Args:
        experts: of the dense model's.
        channels: of each of these; None where all stay.
        shared: of the expert that all tokens go through; None where all stay.
    """

    experts: tuple[int, ...]
    channels: tuple[tuple[int, ...], ...] | None = None
    shared: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """What stays of the experts of one model.

    Args:
        parent: fingerprint of the model that the numbers are about.
        mixture: of that model.
        blocks: what stays of each block that has experts.
        method: which method chose.

    Raises:
        LLMPruneError: numbers out of range or not ascending, or blocks that are not alike.
    """

    parent: str
    mixture: Mixture
    blocks: tuple[KeptExperts, ...]
    method: str

    def __post_init__(self) -> None:
        whole = self.mixture
        if len(self.blocks) != len(whole.blocks):
            raise LLMPruneError(f"The plan names {len(self.blocks)} of {len(whole.blocks)} blocks with experts: make it anew.")
        for block, kept in zip(whole.blocks, self.blocks, strict=True):
            lists = [(kept.experts, whole.experts), *((each, whole.width) for each in kept.channels or ())]
            if kept.shared is not None:
                lists.append((kept.shared, whole.shared))
            for numbers, size in lists:
                inside = not numbers or 0 <= numbers[0] <= numbers[-1] < size
                if not inside or any(a >= b for a, b in itertools.pairwise(numbers)):
                    raise LLMPruneError(
                        f"The plan's numbers of block {block} are not ascending and below {size}: make it anew."
                    )
            if kept.channels is not None and len(kept.channels) != len(kept.experts):
                raise LLMPruneError(f"The plan has not the channels of every expert of block {block}: make it anew.")
        sizes = {_sizes(kept, whole) for kept in self.blocks}
        if len(sizes) != 1 or any(len(widths) > 1 for _, widths, _ in sizes):
            raise LLMPruneError("The plan's blocks keep different numbers of experts or channels: make it anew.")

    @property
    def left(self) -> Mixture:
        """The mixture that stays."""
        experts, widths, shared = _sizes(self.blocks[0], self.mixture)
        return replace(self.mixture, experts=experts, width=max(widths), shared=shared)

    def to_json(self) -> str:
        return TypeAdapter(ExpertPlan).dump_json(self).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> ExpertPlan:
        """Read what `to_json` wrote.

        Raises:
            LLMPruneError: it is damaged, or says what no plan may say.
        """
        return read_plan(ExpertPlan, text)


def _sizes(kept: KeptExperts, whole: Mixture) -> tuple[int, frozenset[int], int]:
    """How many experts, channels of an expert and channels of the shared expert are kept."""
    widths = frozenset({whole.width} if kept.channels is None else map(len, kept.channels))
    return len(kept.experts), widths, whole.shared if kept.shared is None else len(kept.shared)


class ExpertSurgeon:
    """Takes experts, or channels of them, out of blocks.

    Args:
        skeleton: the model, whole.
        recipe: says which method chooses.
        kept: what is kept of the first blocks that have experts, as far as that is known; `cut` says the rest.
    """

    def __init__(self, skeleton: Skeleton, recipe: Recipe, kept: Sequence[KeptExperts] = ()) -> None:
        self.skeleton, self.recipe = skeleton, recipe
        self.mixture = mixture_of(skeleton)
        # By number of the block.
        self.kept: dict[int, KeptExperts] = dict(zip(self.mixture.blocks, kept, strict=False))

    def plan(self) -> ExpertPlan:
        """What stays of the whole model, once every block is cut."""
        blocks = tuple(self.kept[index] for index in self.mixture.blocks)
        return ExpertPlan(self.skeleton.checkpoint.fingerprint()[:16], self.mixture, blocks, self.recipe.method)

    def cut(self, block: Block, kept: KeptExperts) -> None:
        """Write the block without what is not kept; columns of channels that go are zero from now on."""
        self.kept[block.index] = kept
        for linear in block.linears:
            channels = _channels(linear, kept)
            if linear.role == "down" and channels is not None:
                keep_I = torch.zeros(linear.shape[1], dtype=torch.bool)
                keep_I[list(channels)] = True
                linear.keep(keep_I.expand(linear.shape).to(linear.parameter.device))

    def store(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors as they are written, experts numbered anew."""
        kept = self.kept.get(index)
        if kept is None:
            return tensors
        linears = {linear.name: linear for linear in self.skeleton.linears[index]}
        router = self._router(index)
        written = {}
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner == router:
                tensor = tensor.index_select(0, torch.tensor(kept.experts))
            if linear := linears.get(owner):
                if linear.expert is not None:
                    if linear.expert not in kept.experts:
                        continue
                    name = f"{renamed(linear, kept.experts.index(linear.expert))}.{leaf}"
                tensor = _narrowed(tensor, leaf, linear, _channels(linear, kept))
            written[name] = tensor
        return written

    def _router(self, index: int) -> str:
        """The name of the module that chooses among a block's experts."""
        expert = next(linear for linear in self.skeleton.linears[index] if linear.expert is not None)
        layer = expert.name.rsplit(".", 3)[0]
        return f"{layer}.{self.skeleton.family.routers[0].rpartition('.')[2]}"

    def restore(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("samples run through the dense model only")

    def counts(self) -> tuple[int, int]:
        """Parameters that could be removed, and that were."""
        removed = self.mixture.parameters() - self.plan().left.parameters()
        return prunable_parameters(self.recipe.method, self.skeleton), removed

    def files(self) -> dict[str, bytes]:
        """What lies beside the weights because of the surgery: config.json and the plan."""
        plan = self.plan()
        changed = config_json(dense_config(self.skeleton), plan, self.skeleton)
        return {PLAN: plan.to_json().encode(), "config.json": (json.dumps(changed, indent=2) + "\n").encode()}

    def widths(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """How many experts, or channels of all experts, every block keeps, and has in the dense model."""
        left, whole = self.plan().left, self.mixture
        key, kept, dense = "experts", left.experts, whole.experts
        if left.width < whole.width:
            key, kept, dense = "expert_ffn", left.channels(), whole.channels()
        if kept == dense:
            return {}, {}
        blocks = range(len(self.skeleton.blocks))
        return {key: [kept * (i in whole.blocks) for i in blocks]}, {key: [dense * (i in whole.blocks) for i in blocks]}


def renamed(linear: Linear, number: int) -> str:
    """The name of an expert's linear when the expert is numbered anew."""
    path, _, part = linear.name.rpartition(".")
    return f"{path.rpartition('.')[0]}.{number}.{part}"


def _channels(linear: Linear, kept: KeptExperts) -> tuple[int, ...] | None:
    """The channels of a linear that stay; None where all do, or where it has none."""
    if linear.role not in PARTS:
        return None
    if linear.expert is None:
        return kept.shared
    if kept.channels is None or linear.expert not in kept.experts:
        return None
    return kept.channels[kept.experts.index(linear.expert)]


def _narrowed(tensor: Tensor, leaf: str, linear: Linear, channels: tuple[int, ...] | None) -> Tensor:
    """The weight or bias of an expert's linear with some of its channels."""
    if channels is None or (linear.role == "down" and leaf == "bias"):
        return tensor
    return tensor.index_select(1 if linear.role == "down" else 0, torch.tensor(channels))


def config_json(config: Mapping[str, object], plan: ExpertPlan, skeleton: Skeleton) -> dict[str, object]:
    """The config.json of the pruned model.

    Args:
        config: the content of the original's.
        plan: what stays.
        skeleton: the dense model.
    """
    content: dict[str, object] = copy.deepcopy(dict(config))
    left, whole, known = plan.left, plan.mixture, skeleton.config
    if left.experts != whole.experts:
        # transformers writes another name than was published for some families and reads both.
        names = [name for name in COUNTS if name in content] or [name for name in COUNTS if hasattr(known, name)][:1]
        content |= dict.fromkeys(names, left.experts)
    if left.width != whole.width:
        own = "moe_intermediate_size"
        content[own if hasattr(known, own) else "intermediate_size"] = left.width
        if hasattr(known, SHARED_WIDTH):
            content[SHARED_WIDTH] = left.shared
    return content


def problems(directory: Path, skeleton: Skeleton, record: dict) -> Iterator[str]:  # type: ignore[type-arg]
    """What of a model without some of its experts, or channels of them, is not as its plan and its record have it.

    Raises:
        LLMPruneError: the plan cannot be read.
    """
    plan = ExpertPlan.from_json((directory / PLAN).read_text(encoding="utf-8"))
    found, left = mixture_of(skeleton), plan.left
    said = {"experts": left.experts, "expert_ffn": left.channels()}
    for key, counts in record["kept"].items():
        planned = [said[key] * (index in left.blocks) for index in range(len(skeleton.blocks))]
        if counts != planned:
            yield f"{PLAN} keeps {planned} {key} units of the blocks, the record says {counts}."
    if found != left:
        yield (
            f"config.json does not agree with {PLAN}: {found.experts} experts of {found.width} channels, not {left.experts} of "
            f"{left.width}."
        )
    stored = sum(entry.numel for entry in skeleton.checkpoint.entries.values())
    if stored != record["parameters"]["stored"]:
        yield f"{stored} parameters are stored, the record says {record['parameters']['stored']}."
