"""What a forward of a gated model is about: which tokens it takes, which came before them, and what linears read for them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..activation_plan import Plan
from ..errors import LLMPruneError


@dataclass(frozen=True, eq=False)
class Forward:
    """A call of the module that holds the blocks.

    Args:
        batch, tokens: of this call.
        past: tokens that came before, whose keys and values are cached; None where only a device knows.
        mask: attention mask as it was given, [B, past + tokens] if it is of two dimensions.
        device: of the inputs.
    """

    batch: int
    tokens: int
    past: int | None
    mask: Tensor | None
    device: torch.device

    @property
    def is_decode(self) -> bool:
        """One more token for each sequence. A prompt of one token is a prompt: most of the attention will go to it."""
        return self.tokens == 1 and self.past != 0

    def real_and_position(self) -> tuple[Tensor, Tensor]:
        """Which positions are no padding, bool [B, past + tokens], and what number each of those has, int64, from 0.

        Raises:
            LLMPruneError: the attention mask is of another kind.
        """
        if self.mask is None:
            real = torch.ones((self.batch, (self.past or 0) + self.tokens), dtype=torch.bool, device=self.device)
        elif self.mask.ndim != 2:
            raise LLMPruneError(
                f"Gates cannot tell padding from tokens by an attention mask of shape {list(self.mask.shape)}: give one of two "
                "dimensions [sequences, tokens], or none if nothing is padded."
            )
        else:
            real = self.mask != 0
        return real, real.long().cumsum(dim=1) - 1


def watch(model: nn.Module, plan: Plan, begin: Callable[[Forward], None], end: Callable[[], None]) -> list[RemovableHandle]:
    """Call `begin` before and `end` after every forward of the module that holds a model's blocks, whoever calls it.

    Returns:
        What takes the hooks away again.
    """
    body = model.get_submodule(blocks_path(plan).rpartition(".")[0])
    watcher = _Watcher(body, begin, end)
    return [
        body.register_forward_pre_hook(watcher.before, with_kwargs=True),
        body.register_forward_hook(watcher.after, always_call=True),
    ]


class _Watcher:
    """Two hooks. As methods of one object they belong to a copy of the model when that is copied."""

    def __init__(self, body: nn.Module, begin: Callable[[Forward], None], end: Callable[[], None]) -> None:
        self.order = list(inspect.signature(body.forward).parameters)
        self.begin, self.end = begin, end

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = dict(zip(self.order, args, strict=False)) | kwargs
        inputs = next((given[key] for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
        if isinstance(inputs, Tensor):
            self.begin(_forward(inputs, given))

    def after(self, module: nn.Module, args: object, output: object) -> None:
        self.end()


def blocks_path(plan: Plan) -> str:
    """Where the gated blocks are: `model.layers` if one linear is `model.layers.3.mlp.up_proj`."""
    gate = next(iter(plan.gates.values()))
    return gate.name.split(f".{gate.block}.")[0]


def _forward(inputs: Tensor, given: Mapping[str, object]) -> Forward:
    mask = given.get("attention_mask")
    batch, tokens = inputs.shape[:2]
    past: int | None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        past = mask.shape[1] - tokens
    else:
        length = getattr(given.get("cache", given.get("past_key_values")), "get_seq_length", int)()
        # A cache of fixed size counts on its device, and asking would wait for it.
        past = length if isinstance(length, int) else None
    return Forward(batch, tokens, past, mask if isinstance(mask, Tensor) else None, inputs.device)


class Activity:
    """Which share of their inputs linears read.

    Args:
        plan: whose gates are counted.
    """

    def __init__(self, plan: Plan) -> None:
        self.shapes = {gate.name: gate.shape for gate in plan.gates.values()}
        self._read: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def add(self, name: str, tokens: Tensor, read: Tensor) -> None:
        """Count tokens that a linear ran on, and the inputs of theirs that it read: int64 scalars."""
        if name not in self._read:
            self._read[name], self._tokens[name] = torch.zeros_like(read), torch.zeros_like(tokens)
        self._read[name] += read
        self._tokens[name] += tokens

    @property
    def active(self) -> dict[str, float]:
        """Share of the inputs that was read, by name of the linears that have run on a token."""
        counts = {name: int(tokens) for name, tokens in self._tokens.items()}
        return {name: int(self._read[name]) / (self.shapes[name][1] * counts[name]) for name in self.shapes if counts.get(name)}

    @property
    def share(self) -> float:
        """Share of all those linears' weights that was read for a token; 1 if none has run."""
        sizes = {name: math.prod(self.shapes[name]) for name in self.active}
        return sum(self.active[name] * size for name, size in sizes.items()) / sum(sizes.values()) if sizes else 1.0
