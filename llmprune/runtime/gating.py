"""Running a gated model: every token it writes reads the inputs that its gates leave, a prompt reads all.

    handle = apply(model, plan)
    model.generate(...)                   # fast where that is faster
    handle.report()                       # what computes each linear, why, and in how many bytes more
    remove(model)                         # the dense model, bit for bit

Modules stay what they are. Only their `forward` is another, so that names and shapes of parameters, saving and `.to()` are the
ordinary model's. For one token of one sequence a linear computes y = W gate(x) + b (`activation_plan`, equation 1) and reads
only the columns of W that gate(x) needs; everything else (prompts, several sequences at a time) is dense.

Reading columns asks for a weight that lies in memory as [I, O]. Where prompts are as fast on that, the parameter itself is
turned: still [O, I], with strides (1, O). Otherwise there are two copies. In a rotated basis decoding reads W T^-T, a second
matrix beside the untouched W; x T is computed once for all linears that read x.

A product with a turned weight may round differently. With MKL, float32 prompts of five tokens and more have the same bits.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

import llmprune.kernels.gemv as kernel

from ..activation_plan import Gate, Plan
from ..errors import LLMPruneError
from ..gating_scores import rotated
from .dispatch import Choice, check_backend, fastest, prefill_on_turned_weights, require, usable
from .forwards import Activity, Forward, watch

Layout = Literal["as stored", "turned", "both", "rotated"]

# A second matrix of a module; a buffer, so that it goes wherever the module goes, and in no state_dict.
SECOND = "gated_weight_IO"
HANDLE = "activation_gates"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def apply(model: nn.Module, plan: Plan, *, backend: str = "auto") -> Gated:
    """Gate a model's linears whenever it writes a token of one sequence.

    The weights must not change until `remove`.

    Args:
        model: with the weights that the plan was made for, on any device and in any float dtype.
        plan: the gates.
        backend: auto (by timing, which may leave linears dense), or for all gates: bag, cpp, triton, reference or dense.

    Returns:
        The handle, which `gated(model)` gives as well.

    Raises:
        LLMPruneError: the model is gated already, lacks a linear of the plan, is quantised or has other weights; there is no
            such backend, or it cannot run here.
    """
    check_backend(backend)
    if gated(model):
        raise LLMPruneError("The model is gated already: remove(model) first.")
    modules = dict(model.named_modules())
    for name in plan.gates:
        if name in modules:
            _check_linear(name, modules[name])
    plan.check(model)
    handle = Gated(model, plan, backend)
    setattr(model, HANDLE, handle)
    return handle


def gated(model: nn.Module) -> Gated | None:
    """The handle of a gated model, None of another."""
    handle = model.__dict__.get(HANDLE)
    assert handle is None or isinstance(handle, Gated)
    return handle


def remove(model: nn.Module) -> None:
    """Make a gated model dense again, bit for bit and in its old memory layout; any other stays as it is."""
    if handle := gated(model):
        handle.undo()
        delattr(model, HANDLE)


def _check_linear(name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        raise LLMPruneError(f"{name!r} is quantised ({type(module).__name__}): gate the unquantised model.")
    if type(module).forward is not nn.Linear.forward and type(module).__name__ != "Conv1D":
        raise LLMPruneError(f"{name!r} is a {type(module).__name__}, which gates know nothing of: gate the plain model.")
    if weight.is_meta:
        raise LLMPruneError(f"{name!r} has no weights in memory: load the whole model on one device.")


@dataclass(frozen=True)
class Running:
    """How one gated linear runs.

    Args:
        name: of its module.
        backend: what computes a token: dense, reference, bag, cpp or triton.
        reason: for that.
        layout: of its weight, see the module's docstring.
        extra_bytes: memory that it takes beside the dense model's weights.
    """

    name: str
    backend: str
    reason: str
    layout: Layout
    extra_bytes: int


class Gated:
    """A model's gates at work.

    Attributes:
        model, plan, backend: as given to `apply`.
        linears: by module name, how each runs.
    """

    def __init__(self, model: nn.Module, plan: Plan, backend: str) -> None:
        self.model, self.plan, self.backend = model, plan, backend
        self.linears = {name: GatedLinear(self, gate, model.get_submodule(name)) for name, gate in plan.gates.items()}
        # Counts what is read, while somebody wants to know.
        self.activity: Activity | None = None
        # T^T by name, as the model computes.
        self.bases: dict[str, Tensor] = {}
        self.dense = False
        self._rests = self._warned = self._running = False
        # By basis, the latest input and what it is there; good within one forward.
        self._latest: dict[str, tuple[Tensor, Tensor]] = {}
        self.settle()
        self._hooks = watch(model, plan, self.begin, self.end) if self.linears else []
        for each in self.linears.values():
            each.module.forward = each

    @property
    def extra_bytes(self) -> int:
        """Memory that the gates take beside the dense model's weights: second matrices, bases, thresholds."""
        return sum(each.extra_bytes for each in self.linears.values()) + sum(each.nbytes for each in self.bases.values())

    def report(self) -> list[Running]:
        """How every gated linear runs."""
        return [
            Running(name, each.choice.backend, each.choice.reason, each.layout, each.extra_bytes)
            for name, each in self.linears.items()
        ]

    def describe(self) -> str:
        """One sentence on how tokens are written."""
        counts = Counter(each.choice.backend for each in self.linears.values())
        layouts = Counter(each.layout for each in self.linears.values() if each.choice.backend != "dense")
        words = ", ".join(f"{count} by {name}" for name, count in sorted(counts.items()))
        lie = ", ".join(f"{count} {name}" for name, count in sorted(layouts.items()))
        return (
            f"Of {len(self.linears)} gated linears a token is computed {words}; weights: {lie or 'as stored'}; "
            f"{self.extra_bytes / 1e6:.1f} MB beside the model."
        )

    @contextmanager
    def counting(self) -> Iterator[Activity]:
        """Inside, count which share of their inputs linears read for the tokens that the model writes: all, where dense."""
        before, self.activity = self.activity, Activity(self.plan)
        try:
            yield self.activity
        finally:
            self.activity = before

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, everything is dense."""
        before = self._rests, self.dense
        self._rests = self.dense = True
        try:
            yield
        finally:
            self._rests, self.dense = before

    def begin(self, forward: Forward) -> None:
        """A forward of the model begins."""
        if self._settled != self._where():
            self.settle()
        self._running = True
        self.dense = self._rests or not forward.is_decode or forward.batch > 1
        if forward.is_decode and forward.batch > 1 and not self._rests and not self._warned:
            self._warned = True
            warnings.warn(
                f"{forward.batch} sequences are decoded at a time, whose gates together leave out little: they run dense.",
                stacklevel=2,
            )

    def end(self) -> None:
        """It is over."""
        self._running, self.dense = False, self._rests
        self._latest.clear()

    def in_basis(self, name: str, inputs: Tensor) -> Tensor:
        """x T, once for all linears that read x in one forward."""
        known = self._latest.get(name)
        if known is not None and known[0] is inputs:
            return known[1]
        rotated_inputs = product(inputs, self.bases[name])
        if self._running:
            self._latest[name] = inputs, rotated_inputs
        return rotated_inputs

    def undo(self) -> None:
        """Take everything back; `remove` does this."""
        for hook in self._hooks:
            hook.remove()
        for each in self.linears.values():
            each.undo()
        self.bases.clear()

    # How linears run ------------------------------------------------------------------------------------------------

    def _where(self) -> tuple[torch.device, torch.dtype] | None:
        first = next(iter(self.linears.values()), None)
        return (first.weight.device, first.weight.dtype) if first else None

    def settle(self) -> None:
        """Decide what computes each linear and how its weight lies: at first, and when the model has moved.

        Raises:
            LLMPruneError: the backend cannot run here.
        """
        for each in self.linears.values():
            each.lie_as_stored()
        self.bases.clear()
        known: dict[object, list[list[GatedLinear]]] = {}
        for unit in self._units():
            known.setdefault(tuple(each.kind for each in unit), []).append(unit)
        # All is decided before anything is changed.
        for units, choice in [(units, self._choose(units)) for units in known.values()]:
            for each in (each for unit in units for each in unit):
                each.settle(choice)
        for each in self.linears.values():
            name = each.gate.basis
            if name is not None and each.choice.backend != "dense" and name not in self.bases:
                basis_II = self.plan.bases[name].to(each.weight.device, each.weight.dtype)
                self.bases[name] = basis_II.t().contiguous()
        self._settled = self._where()

    def _units(self) -> list[list[GatedLinear]]:
        """Linears that run gated together or not at all: those that share a rotated input, otherwise each alone."""
        units: dict[str, list[GatedLinear]] = {}
        for name, each in self.linears.items():
            units.setdefault(f"basis {each.gate.basis}" if each.gate.basis else name, []).append(each)
        return list(units.values())

    def _choose(self, units: list[list[GatedLinear]]) -> Choice:
        """What computes units of one kind."""
        first = units[0]
        weight = first[0].weight
        if self.backend in ("dense", "reference"):
            return Choice(self.backend, "as given")
        if self.backend != "auto":
            require(self.backend, weight.device, weight.dtype)
            return Choice(self.backend, "as given")
        if all(each.keeps_all for each in first):
            return Choice("dense", "its gate keeps everything")
        sparsity = [sum(unit[i].gate.measured for unit in units) / len(units) for i in range(len(first))]
        weights = [[each.weight_OI for each in unit] for unit in units]
        backends = list(usable(weight.device, weight.dtype))
        return fastest(weights, sparsity, rotated=first[0].gate.basis is not None, backends=backends)


class GatedLinear:
    """The forward of a gated linear.

    Args:
        handle: of the model.
        gate: the linear's.
        module: nn.Linear, or transformers' Conv1D, whose weight is [I, O].
    """

    def __init__(self, handle: Gated, gate: Gate, module: nn.Module) -> None:
        self.handle, self.gate, self.module = handle, gate, module
        self.is_conv1d = type(module).__name__ == "Conv1D"
        self.features = gate.shape[1]
        self.keeps_all = gate.threshold < 0
        self.choice = Choice("dense", "")
        self.layout: Layout = "as stored"
        self.tau_I = gate.tau_I
        self._stride = self.weight.stride()
        self._own_forward = module.__dict__.get("forward")
        # What ran before: the class's forward, or one that somebody put into the module.
        self.dense = module.forward

    def __call__(self, inputs: Tensor) -> Tensor:
        """The linear's output for inputs [..., I]: gated for one token, otherwise dense."""
        handle = self.handle
        # Under autocast the two dtypes differ, and what is to be done is torch's business.
        if handle.dense or inputs.numel() != self.features or inputs.dtype != self.weight.dtype:
            return self.dense(inputs)
        with torch.no_grad():
            return self.decode(inputs)

    def decode(self, inputs: Tensor) -> Tensor:
        """The gated output for one token."""
        handle, backend = self.handle, self.choice.backend
        if backend == "dense":
            self._count(None)
            return self.dense(inputs)
        x_I = inputs if self.gate.basis is None else handle.in_basis(self.gate.basis, inputs)
        x_I = x_I.reshape(-1).contiguous()
        if self.tau_I.device != x_I.device:
            self.tau_I = self.tau_I.to(x_I.device)
        self._count(x_I)
        bias_O = self.module._parameters.get("bias")
        if backend == "reference":
            y_O = kernel.reference(x_I[None], self.weight_IO.t(), self.tau_I, bias_O)
        else:
            y_O = kernel.gemv(x_I, self.weight_IO, self.tau_I, bias_O, backend=backend)
        return y_O.reshape(*inputs.shape[:-1], -1)

    def _count(self, x_I: Tensor | None) -> None:
        activity = self.handle.activity
        if activity is not None:
            one = torch.ones((), dtype=torch.int64, device=self.weight.device)
            read = one * self.features if x_I is None else self.features - (x_I.float().abs() <= self.tau_I).sum()
            activity.add(self.gate.name, one, read)

    @property
    def weight(self) -> Tensor:
        """As the module has it."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight_OI(self) -> Tensor:
        """As the model was trained."""
        weight = self.weight.detach()
        return weight.t() if self.is_conv1d else weight

    @property
    def weight_IO(self) -> Tensor:
        """As decoding reads it."""
        second = self.module._buffers.get(SECOND)
        return self.weight_OI.t() if second is None else second

    @property
    def kind(self) -> tuple[object, ...]:
        """Linears of one kind run alike."""
        weight = self.weight
        tenth = None if self.keeps_all else min(int(self.gate.measured * 10), 9)
        return (self.gate.shape, weight.dtype, weight.device, tenth, self.gate.basis is not None)

    @property
    def extra_bytes(self) -> int:
        """Memory beside the module's own."""
        second = self.module._buffers.get(SECOND)
        return self.tau_I.nbytes + (0 if second is None else second.nbytes)

    def settle(self, choice: Choice) -> None:
        """Run as chosen, and let the weight lie as that wants it."""
        if choice.backend != "dense" and self.keeps_all:
            choice = Choice("dense", "its gate keeps everything")
        self.choice = choice
        if choice.backend == "dense":
            return
        weight = self.weight
        if self.gate.basis is not None:
            second_OI = rotated(self.weight_OI, self.handle.plan.bases[self.gate.basis].to(weight.device))
            self._add("rotated", second_OI.to(weight.dtype).t().contiguous())
        elif choice.backend != "reference" and not self.is_conv1d:
            turned_IO = weight.detach().t().contiguous()
            if prefill_on_turned_weights(weight.device, weight.dtype).backend == "one":
                self.layout = "turned"
                weight.data = turned_IO.t()
            else:
                self._add("both", turned_IO)

    def _add(self, layout: Layout, second_IO: Tensor) -> None:
        self.layout = layout
        self.module.register_buffer(SECOND, second_IO, persistent=False)

    def lie_as_stored(self) -> None:
        """The weight as it lay in memory before, and no other."""
        if self.layout == "turned":
            weight = self.weight
            weight.data = torch.empty_strided(weight.shape, self._stride, dtype=weight.dtype, device=weight.device).copy_(
                weight.data
            )
        self.module._buffers.pop(SECOND, None)
        self.module._non_persistent_buffers_set.discard(SECOND)
        self.layout = "as stored"

    def undo(self) -> None:
        """The module as it was."""
        self.lie_as_stored()
        if self._own_forward is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self._own_forward
