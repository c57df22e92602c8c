"""A plan's gates inside whole sequences: what log-likelihoods are of a model that gates every token it writes.

    with simulate(model, plan) as activity:
        loss = model(ids, labels=ids).loss
    activity.active["model.layers.0.mlp.down_proj"]      # share of its inputs that was read

Decoding gates one token at a time and leaves the prompt alone, so that a task which only scores its prompt would see no gate
at all. Here every linear reads gate(x) for all tokens but the first ones of a sequence: 1 % of them, at least one, as in the
published evaluation of WINA (arXiv 2505.19427), or half of them as in that of TEAL (arXiv 2408.14690): `TEAL_PAPER`. The first
token takes most of the attention, and gating it costs more than it tells. Tokens are counted by the attention mask, so that
padding on either side changes nothing; without a mask every position is a token.

All of this is done by hooks on inputs, which need no weights: any tree of modules with the plan's names will do, blocks that
are filled one at a time among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..activation_plan import Gate, Plan
from ..errors import LLMPruneError
from ..models import Skeleton
from .forwards import Activity, Forward, blocks_path, watch
from .gating import gated

# How much of a sequence stays dense.
DEFAULT, TEAL_PAPER = 0.01, 0.5


@contextmanager
def simulate(model: nn.Module | Skeleton, plan: Plan, skip: float = DEFAULT) -> Iterator[Activity]:
    """Inside, the plan's linears read gate(x), whatever the number of sequences and tokens.

    Gates that `apply` put into the model rest meanwhile. In a rotated basis x' = gate(x T) T^-1 is computed in float32.

    Args:
        model: a model, or any tree of modules with the plan's names; weights may come and go.
        plan: the gates.
        skip: share of a sequence's tokens, from the first on, that stays dense: at least one token.

    Returns:
        What of their inputs the linears have read, padding and tokens that stayed dense left out.

    Raises:
        LLMPruneError: the model lacks a linear of the plan; a share outside [0, 1]; later, an attention mask that does not say
            what is padding.
    """
    tree = model.model if isinstance(model, Skeleton) else model
    if not 0 <= skip <= 1:
        raise LLMPruneError(f"skip is {skip}: give the share of a sequence's tokens that stays dense, from 0 to 1.")
    simulation = _Simulation(plan, skip)
    with ExitStack() as stack:
        if plan.gates:
            for hook in simulation.hooks(tree):
                stack.callback(hook.remove)
        if handle := gated(tree):
            stack.enter_context(handle.resting())
        yield simulation.activity


@contextmanager
def simulate_decode(model: nn.Module, skip: float = DEFAULT) -> Iterator[Activity]:
    """`simulate` with the plan that a model runs by.

    Raises:
        LLMPruneError: it runs by none.
    """
    handle = gated(model)
    if handle is None:
        raise LLMPruneError("The model is not gated: load it from a directory with a plan, or apply one to it.")
    with simulate(model, handle.plan, skip) as activity:
        yield activity


class _Simulation:
    """Hooks that gate inputs, and what they have seen."""

    def __init__(self, plan: Plan, skip: float) -> None:
        self.plan, self.skip = plan, skip
        self.activity = Activity(plan)
        # Sequences and tokens of the block that runs, and of the forward that it runs in what is gated and what is real.
        self.shape = torch.Size()
        self.known: tuple[Tensor, Tensor] | None = None
        self.thresholds: dict[str, Tensor] = {}
        # T and T^-1, float32.
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}

    def hooks(self, tree: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        modules = dict(tree.named_modules())
        for name in self.plan.gates:
            if name not in modules:
                raise LLMPruneError(f"The plan gates {name!r}, which the model does not have: it is another model's plan.")
        # Some linears see the tokens of all sequences in one row, so that what their blocks see is noted.
        blocks = {f"{blocks_path(self.plan)}.{gate.block}" for gate in self.plan.gates.values()} & set(modules)
        return [
            *watch(tree, self.plan, self.begin, self.end),
            *(modules[name].register_forward_pre_hook(self.note_shape, with_kwargs=True) for name in sorted(blocks)),
            *(
                modules[gate.name].register_forward_pre_hook(partial(self.gate_inputs, gate))
                for gate in self.plan.gates.values()
            ),
        ]

    def begin(self, forward: Forward) -> None:
        real, position = forward.real_and_position()
        self.known = self.gated_and_real(real, position, forward.tokens)

    def end(self) -> None:
        self.known = None

    def note_shape(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def gated_and_real(self, real: Tensor, position: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Of the last tokens of sequences those to be gated, and those that are no padding; bool [B, tokens]."""
        # A product that is a whole number may come out above it.
        first = (self.skip * real.sum(dim=1, keepdim=True).double() - 1e-9).ceil().clamp(min=1)
        return (position >= first)[:, -tokens:], real[:, -tokens:]

    def gate_inputs(self, gate: Gate, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = args[0]
        known = self.known
        if known is None:
            batch, tokens = inputs.shape[:2] if inputs.ndim == 3 else self.shape
            real = torch.ones((batch, tokens), dtype=torch.bool, device=inputs.device)
            known = self.gated_and_real(real, real.long().cumsum(dim=1) - 1, tokens)
        gated_, real = (which.to(inputs.device).reshape(*inputs.shape[:-1], 1) for which in known)
        tau_I = self.threshold(gate, inputs.device)
        if gate.basis is None:
            left_out = (inputs.float().abs() <= tau_I) & gated_
            read = inputs.masked_fill(left_out, 0)
        else:
            basis_II, inverse_II = self.basis(gate.basis, inputs.device)
            rotated = inputs.float() @ basis_II
            left_out = (rotated.abs() <= tau_I) & gated_
            # What is kept stays exact.
            lost = rotated.masked_fill(~left_out, 0) @ inverse_II
            read = torch.where(left_out.any(dim=-1, keepdim=True), inputs - lost, inputs).to(inputs.dtype)
        counted = gated_ & real
        tokens_seen = counted.sum()
        self.activity.add(gate.name, tokens_seen, tokens_seen * inputs.shape[-1] - (left_out & real).sum())
        return read, *args[1:]

    def threshold(self, gate: Gate, device: torch.device) -> Tensor:
        tau_I = self.thresholds.get(gate.name)
        if tau_I is None or tau_I.device != device:
            tau_I = self.thresholds[gate.name] = gate.tau_I.to(device)
        return tau_I

    def basis(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        pair = self.bases.get(name)
        if pair is None or pair[0].device != device:
            basis_II = self.plan.bases[name]
            inverse_II = torch.linalg.inv(basis_II.double()).float()
            pair = self.bases[name] = basis_II.float().to(device), inverse_II.to(device)
        return pair
