"""What a gated model needs to know besides its weights: which inputs every linear may leave out for a token.

A gate changes what a linear reads: y = W gate(x) + b, where gate(x)_i = x_i if |x_i| c_i > t, else 0. With c_i the norm of
column i of W that is WINA (arXiv 2505.19427, section 3), with c_i = 1 TEAL (arXiv 2408.14690, section 4). Written per channel,

    keep = not (|x_i| <= tau_i),    tau_i = t / c_i,                                                                       (1)

needs no product and lets NaN through. In a rotated basis T [I, I], z = x T is gated instead, and W~ = W T^-T reads it.

A plan lies beside untouched weights in two files, `activation_sparsity.json` (what people read) and
`activation_sparsity.safetensors` (norms, histograms of scores, bases). Its histograms make it good for any sparsity: `Plan.at`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .activation_allocation import Unit, shares_of
from .checkpoint import reading, write_file
from .errors import LLMPruneError
from .gating_scores import Curve, channel_thresholds, drop

__all__ = ["DENSE", "FILE", "TENSORS", "Gate", "Plan", "drop", "frobenius"]

Score = Literal["wina", "wina-released", "teal"]
Basis = Literal["native", "stacked", "kgate"]
Form = Literal["sidecar", "folded"]

FILE, TENSORS = "activation_sparsity.json", "activation_sparsity.safetensors"
FORMAT = 1
# The threshold of a gate that keeps everything, zeros too.
DENSE = -1.0
# Weights are a plan's own if their Frobenius norms are. Rounding to 16 bits changes those by less.
TOLERANCE = 5e-4


@dataclass(frozen=True, eq=False)
class Gate:
    """Which inputs of one linear are left out.

    Args:
        name: of the linear's module.
        role: it has in its block.
        block: index.
        shape: of the weight, (outputs, inputs).
        group: gates of one group read one tensor and leave out the same inputs. The name of the first of them, or its own.
        sparsity: share of the inputs that is to be left out, over all calibration tokens.
        measured: share that the threshold leaves out there. It is more where that many scores are exactly zero.
        threshold: t in units of the score; -1 keeps everything.
        norm_I: c, float32 [I]; ones for TEAL.
        counts: histogram of the scores |x_i| c_i, int64 (`gating_scores.BINS` and two more).
        basis: name of its basis among the plan's, None where x is gated as it is.
        weight_norm: Frobenius norm of the weight, by which a plan knows it again.
        sensitivity: squared error of the block's output over that of this linear's own, where the allocation uses it.
        error: ||W x - W gate(x)||^2 / ||W x||^2 over calibration tokens, where it was measured.
    """

    name: str
    role: str
    block: int
    shape: tuple[int, int]
    group: str
    sparsity: float
    measured: float
    threshold: float
    norm_I: Tensor
    counts: Tensor
    basis: str | None = None
    weight_norm: float | None = None
    sensitivity: float | None = None
    error: float | None = None

    @property
    def tau_I(self) -> Tensor:
        """The threshold of every channel (1), float32 [I]: +inf for a column of zeros, -1 in a gate that keeps everything."""
        return channel_thresholds(self.threshold, self.norm_I)

    @property
    def numel(self) -> int:
        """Weights of the linear."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class Plan:
    """The gates of a model, by module name, in the order of the blocks.

    Args:
        gates: one for every gated linear.
        bases: T, float32 [I, I], by name.
        score, share, allocation, basis, form: as in the recipe; `basis` is what was settled on where that says `auto`.
        sparsity: of the whole, weighted by the sizes of the weights.
        calibration: what the scores were seen on.
        weights: hash of the checkpoint that the plan was made for.
        tables: every block's path of greedy steps, float64 [steps, groups] of sparsities, where the allocation has one.
        compared: mean relative error of every basis, where they were compared.
    """

    gates: dict[str, Gate]
    score: Score
    share: bool
    allocation: str
    basis: Basis
    sparsity: float
    form: Form = "sidecar"
    calibration: str = ""
    weights: str = ""
    bases: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[int, Tensor] = field(default_factory=dict)
    compared: dict[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, list[Gate]]:
        """Gates that leave out the same inputs together, by the group's name."""
        found: dict[str, list[Gate]] = {}
        for gate in self.gates.values():
            found.setdefault(gate.group, []).append(gate)
        return found

    @property
    def measured(self) -> float:
        """Share of all gated weights that was not needed, over calibration tokens."""
        total = sum(gate.numel for gate in self.gates.values())
        return sum(gate.measured * gate.numel for gate in self.gates.values()) / total if total else 0.0

    def at(self, sparsity: float) -> Plan:
        """The plan for another sparsity: what a calibration for it would give, but for the errors, which nothing has measured.

        Raises:
            LLMPruneError: a sparsity outside [0, 1).
        """
        if not 0 <= sparsity < 1:
            raise LLMPruneError(f"Sparsity {sparsity} is outside [0, 1): give the share of inputs to drop, such as 0.5.")
        groups_B: dict[int, list[list[Gate]]] = {}
        for gates in self.groups.values():
            groups_B.setdefault(gates[0].block, []).append(gates)
        changed: dict[str, Gate] = {}
        for block, groups in groups_B.items():
            units = [
                Unit(sum(gate.shape[0] for gate in gates), gates[0].shape[1], Curve(gates[0].counts), gates[0].sensitivity)
                for gates in groups
            ]
            shares = shares_of(self.allocation, units, self.tables.get(block), sparsity)
            for gates, unit, share in zip(groups, units, shares, strict=True):
                threshold = unit.curve.threshold(share)
                measured = unit.curve.share(threshold)
                for gate in gates:
                    changed[gate.name] = replace(gate, sparsity=share, threshold=threshold, measured=measured, error=None)
        return replace(self, gates={name: changed[name] for name in self.gates}, sparsity=sparsity)

    def check(self, model: nn.Module) -> None:
        """Raise `LLMPruneError` if a model's weights are not those that the plan was made for."""
        modules = dict(model.named_modules())
        for gate in self.gates.values():
            module = modules.get(gate.name)
            if module is None:
                raise LLMPruneError(f"The plan gates {gate.name!r}, which the model does not have: it is another model's plan.")
            weight = module.get_parameter("weight").detach()
            self.check_weight(gate.name, weight.T if type(module).__name__ == "Conv1D" else weight)

    def check_weight(self, name: str, weight_OI: Tensor) -> None:
        """Raise `LLMPruneError` if a linear's weight is not the one that its gate was made for."""
        gate = self.gates[name]
        if tuple(weight_OI.shape) != gate.shape:
            raise LLMPruneError(
                f"The plan's {name!r} is of shape {list(gate.shape)}, the model's of {list(weight_OI.shape)}: it is another "
                "model's plan."
            )
        if gate.weight_norm is None:
            return
        norm = frobenius(weight_OI)
        if not abs(norm - gate.weight_norm) <= TOLERANCE * gate.weight_norm:
            raise LLMPruneError(
                f"The weights of {name!r} have changed since the plan was made (norm {norm:.6g}, then {gate.weight_norm:.6g}): "
                "make the plan anew with --method wina from this model."
            )

    def files(self) -> dict[str, bytes]:
        """The plan as files, by name: the same bytes for the same plan."""
        tensors: dict[str, Tensor] = {}
        for name, gates in self.groups.items():
            tensors |= {f"norm.{name}": gates[0].norm_I, f"counts.{name}": gates[0].counts}
        tensors |= {f"basis.{name}": basis_II for name, basis_II in self.bases.items()}
        tensors |= {f"table.{block}": table_SG for block, table_SG in self.tables.items()}
        content = save_tensors({name: tensor.cpu().contiguous() for name, tensor in sorted(tensors.items())})
        facts = {
            "format": FORMAT,
            "score": self.score,
            "share": self.share,
            "allocation": self.allocation,
            "basis": self.basis,
            "form": self.form,
            "sparsity": self.sparsity,
            "measured": self.measured,
            "calibration": self.calibration,
            "weights": self.weights,
            "compared": self.compared,
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
            "gates": {name: _facts(gate) for name, gate in self.gates.items()},
        }
        return {FILE: (json.dumps(facts, indent=1) + "\n").encode(), TENSORS: content}

    def save(self, directory: Path) -> None:
        """Write the plan's two files, the one that says it is there last."""
        files = self.files()
        for name in (TENSORS, FILE):
            write_file(directory / name, files[name])

    @classmethod
    def load(cls, directory: Path) -> Plan | None:
        """The plan that lies in a directory, None where there is none.

        Raises:
            LLMPruneError: it is damaged, or of another version of llmprune.
        """
        file = directory / FILE
        if not file.is_file():
            return None
        with reading(file):
            text = file.read_bytes()
        with reading(directory / TENSORS):
            content = (directory / TENSORS).read_bytes()
        return cls.from_files(text, content, file)

    @classmethod
    def from_files(cls, text: bytes, content: bytes, file: Path) -> Plan:
        """A plan from what `files` gave; `file` is what errors name.

        Raises:
            LLMPruneError: it is damaged, or of another version of llmprune.
        """
        try:
            facts = json.loads(text)
            if facts["format"] != FORMAT:
                raise LLMPruneError(f"{file} is of format {facts['format']}, which this llmprune cannot read: update it.")
            if hashlib.sha256(content).hexdigest() != facts["tensors_sha256"]:
                raise ValueError("the tensors beside it are not those that it was written with")
            tensors = load_tensors(content)
            gates = {name: _gate(name, fact, tensors) for name, fact in facts["gates"].items()}
            return cls(
                gates,
                facts["score"],
                facts["share"],
                facts["allocation"],
                facts["basis"],
                facts["sparsity"],
                facts["form"],
                facts["calibration"],
                facts["weights"],
                bases=_starting(tensors, "basis."),
                tables={int(block): table_SG for block, table_SG in _starting(tensors, "table.").items()},
                compared=facts["compared"],
            )
        except LLMPruneError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LLMPruneError(f"{file} is damaged ({error}): make the plan anew with --method wina.") from error


def frobenius(weight_OI: Tensor) -> float:
    """The norm of a matrix, by which a plan knows it again."""
    return float(weight_OI.float().square().sum(dim=1).double().sum().sqrt())


# What is readable of a gate. A group's norms and histogram are tensors.
_FACTS = (
    "role",
    "block",
    "shape",
    "group",
    "sparsity",
    "measured",
    "threshold",
    "basis",
    "weight_norm",
    "sensitivity",
    "error",
)


def _facts(gate: Gate) -> dict[str, object]:
    return {key: getattr(gate, key) for key in _FACTS}


def _gate(name: str, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Gate:
    given = {key: facts[key] for key in _FACTS}
    rows, columns = cast("list[int]", given.pop("shape"))
    group = facts["group"]
    return Gate(
        name=name,
        shape=(int(rows), int(columns)),
        norm_I=tensors[f"norm.{group}"],
        counts=tensors[f"counts.{group}"],
        **given,  # type: ignore[arg-type]
    )


def _starting(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
