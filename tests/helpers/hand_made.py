"""Plans of gates made without the pipeline: thresholds that drop a share of what linears read of random tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.activation_plan import Gate, Plan, frobenius
from llmprune.gating_scores import LENGTH, TOGETHER, rotated
from llmprune.models import FAMILIES

ATTENTION = TOGETHER[0]


def linears(model: PreTrainedModel) -> dict[str, tuple[int, str]]:
    """Block and role of every linear, by its name."""
    family = FAMILIES[model.config.model_type]
    blocks = range(len(model.get_submodule(family.blocks)))
    return {f"{family.blocks}.{i}.{suffix}": (i, role) for i in blocks for suffix, role in family.roles.items()}


def weight_OI(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight").detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def inputs_of(model: PreTrainedModel, names: Iterable[str], ids: Tensor) -> dict[str, Tensor]:
    """What linears read, [tokens, I]."""
    seen: dict[str, Tensor] = {}

    def note(name: str):
        return lambda module, args: seen.__setitem__(name, args[0].detach().reshape(-1, args[0].shape[-1]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def make_plan(
    model: PreTrainedModel, *, sparsity: float = 0.5, share: bool = False, rotate: bool = False, vocabulary: int = 200
) -> Plan:
    """WINA's gates of every linear of a model. With `rotate`, what q, k and v read is taken to a random basis."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (2, 24), generator=generator)
    roles = linears(model)
    inputs = inputs_of(model, roles, ids)
    bases: dict[str, Tensor] = {}
    gates: dict[str, Gate] = {}
    for name, (block, role) in roles.items():
        dense_OI = weight_OI(model.get_submodule(name)).float()
        read_TI, matrix_OI, group, basis = inputs[name].float(), dense_OI, name, None
        if rotate and role in ATTENTION:
            basis = f"attention {block}"
            if basis not in bases:
                size = dense_OI.shape[1]
                orthogonal_II = torch.linalg.qr(torch.randn((size, size), generator=generator)).Q
                bases[basis] = (orthogonal_II * (0.5 + torch.rand(size, generator=generator))[:, None]).contiguous()
            read_TI, matrix_OI = read_TI @ bases[basis], rotated(dense_OI, bases[basis])
        norm_I = matrix_OI.norm(dim=0)
        if share:
            together = [each for each in TOGETHER if role in each]
            friends = [n for n, (b, r) in roles.items() if b == block and together and r in together[0]] or [name]
            group = friends[0]
            norm_I = torch.cat([weight_OI(model.get_submodule(n)).float() for n in friends]).norm(dim=0)
        scores = (read_TI.abs() * norm_I).flatten()
        threshold = float(scores.sort().values[int(sparsity * (len(scores) - 1))])
        measured = float((scores <= threshold).float().mean())
        gates[name] = Gate(
            name=name,
            role=role,
            block=block,
            shape=(dense_OI.shape[0], dense_OI.shape[1]),
            group=group,
            sparsity=sparsity,
            measured=measured,
            threshold=threshold,
            norm_I=norm_I,
            counts=torch.zeros(LENGTH, dtype=torch.int64),
            basis=basis,
            weight_norm=frobenius(dense_OI),
        )
    return Plan(gates, "wina", share, "uniform", "stacked" if rotate else "native", sparsity, bases=bases)
