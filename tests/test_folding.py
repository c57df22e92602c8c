"""A folded model computes what it did, and magnitudes of its activations are WINA's scores in the original."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cutting import cut
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BLOCKS, VARIANTS, VOCABULARY, build
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune import LLMPruneError, folding
from llmprune.activation_plan import Gate, Plan, drop, frobenius
from llmprune.folding import check_foldable, fold_block, foldable_norms, foldings
from llmprune.models import FAMILIES
from llmprune.surgery import Kept

# Name to (variant, changes of its configuration).
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    name: (name, {}) for name in VARIANTS if name not in ("opt_norm_after", "olmo2", "llama_tied")
} | {
    "llama_mha": ("llama", {"num_key_value_heads": 3}),
    "llama_grouped": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "phi3_mha": ("phi3", {"num_key_value_heads": 3}),
    "phi3_grouped": ("phi3", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "opt_gelu": ("opt", {"activation_function": "gelu"}),
    "gpt2_relu": ("gpt2", {"activation_function": "relu"}),
}
GROUPED = ["llama", "llama_grouped", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "phi3", "phi3_grouped"]
BY_MAGNITUDE = ["opt_gelu", "gpt2", "gpt_neox", "gpt_neox_in_series"]
READERS = [("q", "k", "v", "qkv"), ("gate", "up", "gate_up"), ("o",), ("down",)]


class WideNorm(nn.Module):
    """Gemma's norm in the dtype of its input: transformers' own computes in float32 whatever that is."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def load(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm"):
            model.set_submodule(name, WideNorm(module))
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Models of `MODELS` by name and dtype; not to be changed."""

    @functools.cache
    def get(name: str, dtype: torch.dtype) -> PreTrainedModel:
        if dtype != torch.float64:
            return copy.deepcopy(get(name, torch.float64)).to(dtype)
        variant, changes = MODELS[name]
        return load(build(variant, tmp_path_factory.mktemp(name), **changes))

    return lambda name, dtype=torch.float64: get(name, dtype)


def linears(model: PreTrainedModel, index: int) -> dict[str, tuple[str, nn.Module]]:
    """A block's linears by name, with their roles."""
    family = FAMILIES[model.config.model_type]
    modules = dict(model.named_modules())
    names = {f"{family.blocks}.{index}.{suffix}": role for suffix, role in family.roles.items()}
    return {name: (role, modules[name]) for name, role in names.items() if name in modules}


def weight_of(module: nn.Module) -> Tensor:
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def blocks_of(model: PreTrainedModel) -> int:
    return len(model.get_submodule(FAMILIES[model.config.model_type].blocks))


def gates_of(model: PreTrainedModel, thresholds: Mapping[str, float] | float = 0.5) -> dict[str, Gate]:
    """A gate for every linear, with the norms that can be folded."""
    gates = {}
    for index in range(blocks_of(model)):
        here = linears(model, index)
        norms = foldable_norms({name: weight_of(module) for name, (_, module) in here.items()}, model.config)
        for name, (role, module) in here.items():
            weight_OI = weight_of(module)
            group = next(other for other, (its, _) in here.items() if any({its, role} <= set(roles) for roles in READERS))
            threshold = thresholds if isinstance(thresholds, float) else thresholds[group]
            shape = (weight_OI.shape[0], weight_OI.shape[1])
            counts = torch.zeros(4, dtype=torch.int64)
            gates[name] = Gate(name, role, index, shape, group, 0.5, 0.5, threshold, norms[name], counts)
    return gates


def fold(model: PreTrainedModel, gates: Mapping[str, Gate]) -> tuple[PreTrainedModel, dict[str, Gate]]:
    """A folded copy, block by block."""
    other, after = copy.deepcopy(model), {}
    for index in range(blocks_of(model)):
        prefix = f"{FAMILIES[model.config.model_type].blocks}.{index}."
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters() if name.startswith(prefix)}
        here = {name: gate for name, gate in gates.items() if gate.block == index}
        tensors, new = fold_block(tensors, here, model.config)
        other.load_state_dict(tensors, strict=False)
        after |= new
    return other, after


@contextmanager
def gated(model: PreTrainedModel, gates: Mapping[str, Gate], seen: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Gate every linear's input, or, with `seen`, only keep what it reads."""

    def hook(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if seen is None:
            return (drop(args[0], gates[name].tau_I), *args[1:])
        seen[name] = args[0]
        return None

    handles = [model.get_submodule(name).register_forward_pre_hook(functools.partial(hook, name)) for name in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tokens_of() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def inputs_of(model: PreTrainedModel, gates: Mapping[str, Gate]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with gated(model, gates, seen):
        model(tokens_of())
    return {name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}


def thresholds_of(model: PreTrainedModel) -> dict[str, float]:
    """Thresholds that leave out 70 % (ReLU alone leaves out half)."""
    gates = gates_of(model)
    inputs = inputs_of(model, gates)
    return {name: float((inputs[name].abs() * gate.norm_I).quantile(0.7)) for name, gate in gates.items()}


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_computes_what_it_did(name, dtype, tolerance, dense):
    model = dense(name, dtype)
    other, _ = fold(model, gates_of(model))
    assert difference(other(tokens_of()).logits, model(tokens_of()).logits) < tolerance
    folded_names = [n for n, p in other.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(folded_names) >= 4 * blocks_of(model)


@pytest.mark.parametrize("name", MODELS)
def test_magnitudes_above_t_are_the_scores_above_t(name, dense):
    model = dense(name)
    gates = gates_of(model, thresholds_of(model))
    other, after = fold(model, gates)
    before, now = inputs_of(model, gates), inputs_of(other, after)
    for linear, gate in gates.items():
        scores = before[linear].abs() * gate.norm_I.double()
        clear = (scores / gate.threshold - 1).abs() > 1e-6
        wanted = ~(before[linear].float().abs() <= gate.tau_I)
        plain = now[linear].float().abs() > after[linear].threshold
        assert torch.equal(plain[clear], wanted[clear])
        assert clear.float().mean() > 0.99
        assert 0.2 < wanted.float().mean() < 0.4
        torch.testing.assert_close(now[linear].abs(), scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_gated_everywhere_both_forms_compute_the_same(name, dense):
    model = dense(name)
    gates = gates_of(model, thresholds_of(model))
    other, after = fold(model, gates)
    with gated(model, gates), gated(other, after):
        original, folded = model(tokens_of()).logits, other(tokens_of()).logits
    assert difference(folded, original) < 1e-9
    assert difference(original, model(tokens_of()).logits) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_the_columns_that_share_a_scale(name, dense):
    model = dense(name)
    gates = gates_of(model)
    heads = model.config.num_attention_heads
    group = heads // (getattr(model.config, "num_key_value_heads", None) or heads)
    kinds = foldings(model.config)
    for index in range(blocks_of(model)):
        here = linears(model, index)
        for linear, (role, module) in here.items():
            columns = weight_of(module).shape[1]
            sharing = [weight_of(other) for its, other in here.values() if any({its, role} <= set(r) for r in READERS)]
            stacked = torch.cat(sharing)
            for i in range(columns):
                channels = [i]
                if role == "o":
                    width = columns // heads
                    first = i // width // group * group
                    channels = [head * width + i % width for head in range(first, first + group)]
                wanted = stacked[:, channels].pow(2).sum().sqrt()
                if kinds[role] == "magnitude":
                    wanted = torch.tensor(1.0)
                assert gates[linear].norm_I[i].item() == pytest.approx(wanted.item(), rel=1e-6)
    assert all((gate.norm_I.dtype, gate.norm_I.shape) == (torch.float32, gate.shape[1:]) for gate in gates.values())


@pytest.mark.parametrize("name", MODELS)
def test_roles_say_how_they_are_folded(name):
    variant, changes = MODELS[name]
    model_type, options = VARIANTS[variant]
    kinds = foldings(AutoConfig.for_model(model_type, **{**options, **changes}))
    expected = dict.fromkeys(FAMILIES[model_type].roles.values(), "exact")
    if name in GROUPED:
        expected["o"] = "group norm"
    if name in BY_MAGNITUDE:
        expected["down"] = "magnitude"
    assert kinds == expected


def test_gates_keep_their_thresholds_and_know_the_folded_weights(dense):
    model = dense("gpt2")
    gates = gates_of(model, thresholds_of(model))
    gates = {n: replace(g, weight_norm=frobenius(weight_of(model.get_submodule(n)))) for n, g in gates.items()}
    other, after = fold(model, gates)
    assert list(after) == list(gates)
    for name, gate in after.items():
        assert (gate.norm_I == 1).all()
        assert (gate.tau_I == torch.tensor(gates[name].threshold)).all()
        assert gate.counts is gates[name].counts
    plan = Plan(after, "wina", True, "uniform", "native", 0.5, "folded")
    plan.check(other)
    with pytest.raises(LLMPruneError, match="have changed"):
        plan.check(model)


@pytest.mark.parametrize("name", MODELS)
def test_norms_of_ones_change_no_bit(name, dense):
    model = dense(name, torch.float32)
    gates = {n: replace(gate, norm_I=torch.ones_like(gate.norm_I)) for n, gate in gates_of(model).items()}
    other, after = fold(model, gates)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in other.named_parameters())
    assert after.keys() == gates.keys()


@pytest.mark.parametrize("name", ["llama_mha", "llama_grouped", "gemma2", "phi3_mha", "opt", "gpt_neox", "gpt2"])
def test_an_input_without_weights_never_opens_its_gate(name, dense):
    model = copy.deepcopy(dense(name))
    dead = 5
    for index in range(blocks_of(model)):
        for role, module in linears(model, index).values():
            weight_OI = weight_of(module)
            # In o, the channel of every head.
            step = weight_OI.shape[1] // (model.config.num_attention_heads if role == "o" else 1)
            weight_OI[:, dead::step] = 0
    gates = gates_of(model, 0.0)
    other, after = fold(model, gates)
    assert difference(other(tokens_of()).logits, model(tokens_of()).logits) < 1e-10
    before, now = inputs_of(model, gates), inputs_of(other, after)
    for linear, gate in gates.items():
        magnitude = foldings(model.config)[gate.role] == "magnitude"
        assert gate.norm_I[dead] == float(magnitude)
        assert before[linear][:, dead].any()
        assert now[linear][:, dead].any() == magnitude
        if not magnitude:
            assert gate.tau_I[dead] == torch.inf


@given(
    family=st.sampled_from(["llama", "gemma2", "opt"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.0, 2.0),
)
@settings(max_examples=40, deadline=None)
def test_rounding_a_gain_does_not_change_the_function(family, dtype, seed, spread):
    """Gain times column is what it was but for one rounding of the column: also where Gemma's gain - 1 keeps few bits."""
    generator = torch.Generator().manual_seed(seed)
    model_type, options = VARIANTS[family]
    config = AutoConfig.for_model(model_type, **options)
    width, offset = config.hidden_size, 1.0 if family == "gemma2" else 0.0
    prefix = f"{BLOCKS[model_type]}.0."
    norm = f"{prefix}{'self_attn_layer_norm' if family == 'opt' else 'input_layernorm'}"
    gain_I = (spread * torch.randn(width, generator=generator)).exp()
    tensors = {f"{norm}.weight": (gain_I - offset).to(dtype), f"{norm}.bias": torch.randn(width, generator=generator).to(dtype)}
    if family != "opt":
        del tensors[f"{norm}.bias"]
    scale_I = (spread * torch.randn(width, generator=generator)).exp()
    weight_OI = (scale_I * torch.randn(20, width, generator=generator)).to(dtype)
    for role in "qkv":
        tensors[f"{prefix}self_attn.{role}_proj.weight"] = weight_OI
    names = [name.removesuffix(".weight") for name in tensors if "proj" in name]
    norms = foldable_norms(dict.fromkeys(names, weight_OI), config)
    gates = {n: Gate(n, n[-6], 0, (20, width), names[0], 0.5, 0.5, 1.0, norms[n], torch.zeros(4)) for n in names}
    folded, _ = fold_block(tensors, gates, config)

    def product(these: Mapping[str, Tensor], leaf: str, plus: float) -> Tensor:
        return (these[f"{norm}.{leaf}"].double() + plus) * these[f"{names[0]}.weight"].double()

    assert all(folded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    eps = torch.finfo(dtype).eps
    # Below float16's normal numbers rounding is absolute.
    smallest = torch.finfo(dtype).tiny * eps
    real_I = folded[f"{norm}.weight"].double() + offset
    slack_I = smallest * real_I.abs()
    wanted = product(tensors, "weight", offset)
    assert ((product(folded, "weight", offset) - wanted).abs() <= eps * wanted.abs() + slack_I).all()
    if family == "opt":
        torch.testing.assert_close(product(folded, "bias", 0.0), product(tensors, "bias", 0.0), rtol=3 * eps, atol=0.05 * eps)


def test_a_weight_beyond_float16_asks_for_a_wider_dtype(dense):
    model = copy.deepcopy(dense("llama", torch.float32)).half()
    block = linears(model, 0)
    up, down = (next(m for role, m in block.values() if role == wanted) for wanted in ("up", "down"))
    up.weight[0, 0] = 50.0  # nearly all of its column's norm
    down.weight[:, 0] = 4e4
    with pytest.raises(LLMPruneError, match=r"up_proj.weight' leaves the range of float16: save .* bfloat16 or float32"):
        fold(model, gates_of(model))
    wider = model.bfloat16()
    other, _ = fold(wider, gates_of(wider))
    assert all(tensor.isfinite().all() for tensor in other.parameters())


def test_a_gain_too_small_for_its_dtype_is_refused_rather_than_lost(dense):
    model = copy.deepcopy(dense("gemma2", torch.float32)).bfloat16()
    for name, (role, module) in linears(model, 0).items():
        if role in "qkv":
            module.weight[:, 3].fill_(1e-4)
            model.get_submodule(name.rpartition(".self_attn")[0]).input_layernorm.weight[3] = 0.0
    with pytest.raises(LLMPruneError, match=r"input_layernorm.weight' leaves the range of bfloat16: save it in float32"):
        fold(model, gates_of(model))


def refused(gates: Mapping[str, Gate], model: PreTrainedModel, match: str) -> None:
    with pytest.raises(LLMPruneError, match=match) as caught:
        fold(model, gates)
    assert str(caught.value).count(". ") == 0
    assert str(caught.value).endswith(".")


def test_norms_that_no_scale_stands_for_are_refused(dense):
    model = dense("llama_grouped")
    gates = gates_of(model)
    heads = next(name for name, gate in gates.items() if gate.role == "o")
    own = weight_of(model.get_submodule(heads)).norm(dim=0).float()
    refused({**gates, heads: replace(gates[heads], norm_I=own)}, model, "differ among query heads")
    key = next(name for name, gate in gates.items() if gate.role == "k")
    refused({**gates, key: replace(gates[key], norm_I=torch.ones_like(gates[key].norm_I))}, model, "norms of their own")
    refused({**gates, key: replace(gates[key], basis="basis.0")}, model, "rotated basis")
    closed = gates[key].norm_I.clone().index_fill(0, torch.tensor(2), 0.0)
    never = {n: replace(gate, norm_I=closed) if gate.group == gates[key].group else gate for n, gate in gates.items()}
    refused(never, model, "never opens for an input that has weights")
    model = dense("gpt2")
    gates = gates_of(model)
    down = next(name for name, gate in gates.items() if gate.role == "down")
    own = weight_of(model.get_submodule(down)).norm(dim=0).float()
    refused({**gates, down: replace(gates[down], norm_I=own)}, model, "activation function")


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "norms come after attention and MLP"),
        ("opt", {"layer_norm_elementwise_affine": False}, "no gain"),
        ("olmo2", {}, "not known to feed nothing but"),
        ("gptj", {}, "not known to feed nothing but"),
    ],
)
def test_families_without_a_norm_to_fold_into_are_refused(model_type, changes, reason):
    config = AutoConfig.for_model(model_type, **changes)
    for refuse in (check_foldable, foldings, functools.partial(foldable_norms, {}), functools.partial(fold_block, {}, {})):
        with pytest.raises(LLMPruneError, match=f"^This {model_type} model cannot be stored folded .*{reason}.*leave out"):
            refuse(config)


def test_blocks_of_their_own_widths_are_folded(tmp_path):
    source = build("llama", tmp_path / "dense", num_attention_heads=6, num_key_value_heads=3, mlp_bias=False)
    kept = [Kept((1, 2, 3), (0, 1, 4, 5)), Kept((), (0, 1, 2, 3, 4, 5)), Kept((0, 5), ())]
    cut(source, kept, tmp_path / "cut")
    model = load(tmp_path / "cut")
    other, after = fold(model, gates_of(model))
    assert [sum(gate.block == index for gate in after.values()) for index in range(3)] == [7, 4, 3]
    assert difference(other(tokens_of()).logits, model(tokens_of()).logits) < 1e-10


@pytest.mark.parametrize("name", ["llama_grouped", "gpt2"])
def test_pieces_of_any_size_fold_to_the_same_bits(name, dense, monkeypatch):
    model = dense(name, torch.float32)
    whole, _ = fold(model, gates_of(model))
    monkeypatch.setattr(folding, "_PIECE", 100)
    pieces, _ = fold(model, gates_of(model))
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in pieces.named_parameters())


def test_only_what_is_gated_is_folded(dense):
    model = dense("llama_mha")
    gates = {name: gate for name, gate in gates_of(model).items() if gate.role in ("gate", "up")}
    other, after = fold(model, gates)
    assert after.keys() == gates.keys()
    changed = {n for n, p in other.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    prefixes = {f"model.layers.{index}." for index in range(3)}
    leaves = ("post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
    assert changed == {prefix + leaf for prefix in prefixes for leaf in leaves}
    assert difference(other(tokens_of()).logits, model(tokens_of()).logits) < 1e-10
