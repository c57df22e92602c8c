"""Gated linears: one token reads what its gates leave, everything else is the dense model, and it can all be taken back."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hand_made import inputs_of, linears, make_plan, weight_OI
from safetensors.torch import load_file
from tiny import build
from torch.nn.functional import linear as product
from transformers import AutoModelForCausalLM

from llmprune import LLMPruneError
from llmprune.activation_plan import DENSE, drop
from llmprune.kernels import gemv as kernel
from llmprune.runtime import apply, dispatch, gated, remove

VARIANTS = ["llama", "llama_tied", "qwen2", "gpt2", "phi3", "opt"]
IDS = torch.arange(3, 20).unsqueeze(0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models on the disk, by variant."""
    root = tmp_path_factory.mktemp("models")
    return {variant: build(variant, root / variant) for variant in VARIANTS}


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def model(folders):
    return load(folders["llama"])


def snapshot(model):
    """Bits, shapes and memory layout of every tensor, and what is in every module."""
    tensors = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict(keep_vars=True).items()}
    contents = {name: (set(module.__dict__), set(module._buffers)) for name, module in model.named_modules()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return tensors, contents, hooks


def assert_same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    for name, (tensor, stride) in one[0].items():
        assert torch.equal(tensor, other[0][name][0]), name
        assert stride == other[0][name][1], name


def usable(dtype=torch.float32):
    return [*dispatch.usable(CPU, dtype), "reference"]


@pytest.fixture
def fast_prefill(monkeypatch):
    """One copy of every weight, whatever the machine is like."""
    monkeypatch.setattr("llmprune.runtime.gating.prefill_on_turned_weights", lambda *where: dispatch.Choice("one", ""))


@pytest.fixture
def slow_prefill(monkeypatch):
    """Two copies."""
    monkeypatch.setattr("llmprune.runtime.gating.prefill_on_turned_weights", lambda *where: dispatch.Choice("both", ""))


# One token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["fast_prefill", "slow_prefill"])
def test_a_linear_reads_one_token_through_its_gate(variant, layout, folders, request):
    request.getfixturevalue(layout)
    model = load(folders[variant])
    plan = make_plan(model)
    tokens = inputs_of(model, plan.gates, IDS)
    weights = {name: weight_OI(model.get_submodule(name)).clone() for name in plan.gates}
    for backend in usable():
        apply(model, plan, backend=backend)
        for name, gate in plan.gates.items():
            module = model.get_submodule(name)
            x_I = tokens[name][5]
            wanted_O = product(drop(x_I, gate.tau_I), weights[name], module.bias)
            torch.testing.assert_close(module(x_I[None, None])[0, 0], wanted_O, rtol=1e-5, atol=1e-5)
            if gate.role != "down":  # after a ReLU what is left out may be zero already
                assert not torch.allclose(wanted_O, product(x_I, weights[name], module.bias))
        remove(model)


@pytest.mark.parametrize("backend", usable())
def test_in_a_rotated_basis_the_rotated_token_is_gated(backend, folders):
    model = load(folders["qwen2"])
    plan = make_plan(model, rotate=True)
    tokens = inputs_of(model, plan.gates, IDS)
    weights = {name: weight_OI(model.get_submodule(name)).clone() for name in plan.gates}
    apply(model, plan, backend=backend)
    turned = [name for name, gate in plan.gates.items() if gate.basis]
    assert len(turned) == 3 * len(plan.bases) == 9
    for name in turned:
        module, basis_II = model.get_submodule(name), plan.bases[plan.gates[name].basis].double()
        x_I = tokens[name][5]
        kept_I = drop(x_I.double() @ basis_II, plan.gates[name].tau_I) @ torch.linalg.inv(basis_II)
        wanted_O = product(kept_I.float(), weights[name], module.bias)
        torch.testing.assert_close(module(x_I[None, None])[0, 0], wanted_O, rtol=1e-4, atol=1e-4)


def test_a_rotated_input_is_computed_once_for_all_that_read_it(folders, monkeypatch):
    model = load(folders["llama"])
    plan = make_plan(model, rotate=True)
    handle = apply(model, plan, backend="reference")
    products = []
    monkeypatch.setattr("llmprune.runtime.gating.product", lambda *args: products.append(args) or product(*args), raising=True)
    with torch.inference_mode():
        past = model(IDS, use_cache=True).past_key_values
        model(IDS[:, :1], past_key_values=past)
    assert len(products) == len(plan.bases)
    assert not handle._latest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gate_that_keeps_everything_leaves_the_linear_as_it_is(dtype, folders):
    model = load(folders["qwen2"], dtype)
    plan = make_plan(model)
    plan = replace(plan, gates={name: replace(gate, threshold=DENSE) for name, gate in plan.gates.items()})
    tokens = inputs_of(model, plan.gates, IDS)
    before = {name: model.get_submodule(name)(tokens[name][None, :1]) for name in plan.gates}
    apply(model, plan, backend=usable(dtype)[0])
    for name, wanted in before.items():
        assert torch.equal(model.get_submodule(name)(tokens[name][None, :1]), wanted)


@pytest.mark.parametrize("backend", usable()[:-1])
def test_weights_of_inputs_that_are_left_out_are_not_used(backend, model):
    plan = make_plan(model)
    tokens = inputs_of(model, plan.gates, IDS)
    apply(model, plan, backend=backend)
    for name, gate in plan.gates.items():
        module, x_I = model.get_submodule(name), tokens[name][5]
        left_out = x_I.abs() <= gate.tau_I
        assert left_out.any()
        with torch.no_grad():
            if left_out.all():
                continue
            before = module(x_I[None])
            module.weight[:, left_out] = torch.nan
            second = module._buffers.get("gated_weight_IO")
            if second is not None:
                second[left_out] = torch.nan
            assert torch.equal(module(x_I[None]), before)


def test_a_token_that_is_not_a_number_gives_none(model):
    plan = make_plan(model)
    for backend in usable():
        apply(model, plan, backend=backend)
        module = model.model.layers[0].mlp.up_proj
        x_I = torch.zeros(module.in_features)
        x_I[3] = torch.nan
        assert module(x_I[None, None]).isnan().all()
        remove(model)


def test_equal_column_norms_gate_as_magnitudes_do(model):
    plan = make_plan(model)
    gate = plan.gates["model.layers.0.self_attn.o_proj"]
    common = replace(gate, norm_I=torch.full_like(gate.norm_I, 4.0))
    plain = replace(gate, norm_I=torch.ones_like(gate.norm_I), threshold=gate.threshold / 4)
    assert torch.equal(common.tau_I, plain.tau_I)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_scaling_inputs_against_their_columns_changes_nothing(variant, folders):
    """x D and W / D: the same scores, hence the same gates."""
    model = load(folders[variant])
    plan = make_plan(model)
    name = next(iter(plan.gates))
    module, gate = model.get_submodule(name), plan.gates[name]
    x_I = inputs_of(model, [name], IDS)[name][5]
    scale_I = 2.0 ** torch.randint(-3, 4, x_I.shape, generator=torch.Generator().manual_seed(0))
    apply(model, plan, backend="reference")
    before = module(x_I[None])
    remove(model)
    with torch.no_grad():
        weight_OI(module).div_(scale_I)
    other = replace(gate, norm_I=gate.norm_I / scale_I, weight_norm=None)
    apply(model, replace(plan, gates={name: other}), backend="reference")
    torch.testing.assert_close(module((x_I * scale_I)[None]), before, rtol=1e-6, atol=1e-6)


# Everything else is dense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_has_the_dense_models_logits_bit_for_bit(variant, dtype, folders):
    model = load(folders[variant], dtype)
    plan = make_plan(model, rotate=variant != "phi3")
    for ids in (IDS, IDS.repeat(3, 1)):
        dense = model(ids).logits
        apply(model, plan, backend=usable(dtype)[0])
        assert torch.equal(model(ids).logits, dense)
        remove(model)


def test_a_prompt_of_one_token_is_a_prompt(model):
    dense = model(IDS[:, :1]).logits
    apply(model, make_plan(model), backend="reference")
    assert torch.equal(model(IDS[:, :1]).logits, dense)
    assert torch.equal(model(IDS[:, :1], attention_mask=torch.ones(1, 1)).logits, dense)


def test_backend_dense_gates_nothing(model):
    dense = model.generate(IDS, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        past = model(IDS[:, :-1], use_cache=True).past_key_values
        wanted = model(IDS[:, -1:], past_key_values=past).logits
        handle = apply(model, make_plan(model, sparsity=0.9), backend="dense")
        past = model(IDS[:, :-1], use_cache=True).past_key_values
        assert torch.equal(model(IDS[:, -1:], past_key_values=past).logits, wanted)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), dense)
    assert sum(row.extra_bytes for row in handle.report()) == sum(gate.norm_I.nbytes for gate in handle.plan.gates.values())


# Choice of what computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("faster", "chosen"), [(True, "gated"), (False, "dense")])
def test_a_gate_is_used_only_where_it_is_faster(faster, chosen, model, monkeypatch):
    seconds = {"dense": 1.0}

    def timed(runs, device):
        for run in runs.values():
            run()
        return seconds | dict.fromkeys((name for name in runs if name != "dense"), 0.5 if faster else 1.0)

    monkeypatch.setattr(dispatch, "_least_seconds", timed)
    handle = apply(model, make_plan(model, rotate=True))
    backends = {row.backend for row in handle.report()}
    assert ("dense" in backends) == (chosen == "dense")
    assert len(backends) == 1
    assert all(row.reason for row in handle.report())
    if not faster:
        assert not handle.bases
        assert {row.layout for row in handle.report()} == {"as stored"}


def test_linears_of_one_kind_are_timed_once(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "llmprune.runtime.gating.fastest", lambda units, *args, **kw: calls.append(len(units)) or dispatch.Choice("dense", "")
    )
    plan = make_plan(model)
    plan = replace(plan, gates={name: replace(gate, measured=0.5) for name, gate in plan.gates.items()})
    apply(model, plan)
    shapes = {gate.shape for gate in plan.gates.values()}
    assert len(calls) == len(shapes)
    assert sum(calls) == len(plan.gates)


def test_a_timing_says_how_fast_each_is():
    weights = [[torch.randn(64, 48)] for _ in range(3)]
    names = list(dispatch.usable(CPU, torch.float32))
    choice = dispatch.fastest(weights, [0.5], rotated=False, backends=names)
    assert choice.backend in ("dense", *names)
    assert "times as fast" in choice.reason
    assert dispatch.fastest(weights, [0.5], rotated=True, backends=[]).backend == "dense"


def test_whether_prompts_are_slow_on_turned_weights_is_measured():
    choice = dispatch.prefill_on_turned_weights(CPU, torch.float32)
    assert choice.backend in ("one", "both")
    assert "times as long" in choice.reason


# Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["fast_prefill", "slow_prefill"])
def test_removing_gates_gives_the_dense_model_bit_for_bit(variant, layout, folders, request):
    request.getfixturevalue(layout)
    model = load(folders[variant])
    before, logits = snapshot(model), model(IDS).logits
    for rotate in (False, True):
        handle = apply(model, make_plan(model, rotate=rotate), backend=usable()[0])
        assert gated(model) is handle
        names = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert names == {name: tensor.shape for name, (tensor, _) in before[0].items()}
        remove(model)
        assert gated(model) is None
        assert_same(before, snapshot(model))
        assert torch.equal(model(IDS).logits, logits)
    remove(model)
    assert_same(before, snapshot(model))


def test_one_copy_of_a_weight_takes_no_memory(model, fast_prefill):
    handle = apply(model, make_plan(model), backend=usable()[0])
    assert {row.layout for row in handle.report()} == {"turned"}
    assert model.model.layers[0].mlp.up_proj.weight.t().is_contiguous()
    assert handle.extra_bytes == sum(gate.norm_I.nbytes for gate in handle.plan.gates.values())


def test_two_copies_and_bases_are_counted(model, slow_prefill):
    plan = make_plan(model, rotate=True)
    handle = apply(model, plan, backend=usable()[0])
    wanted = sum(4 * gate.numel + gate.norm_I.nbytes for gate in plan.gates.values())
    assert handle.extra_bytes == wanted + sum(basis.nbytes for basis in plan.bases.values())
    assert "MB" in handle.describe()


def test_a_conv1d_needs_no_second_copy(folders, slow_prefill):
    handle = apply(load(folders["gpt2"]), make_plan(load(folders["gpt2"])), backend=usable()[0])
    assert {row.layout for row in handle.report()} == {"as stored"}


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("layout", ["fast_prefill", "slow_prefill"])
def test_a_gated_model_is_saved_as_the_ordinary_one(variant, rotate, layout, folders, request, tmp_path):
    request.getfixturevalue(layout)
    model = load(folders[variant])
    model.save_pretrained(tmp_path / "before")
    apply(model, make_plan(model, rotate=rotate), backend=usable()[0])
    model.save_pretrained(tmp_path / "gated")
    one, other = (tmp_path / name / "model.safetensors" for name in ("before", "gated"))
    assert one.read_bytes() == other.read_bytes()
    assert load_file(other).keys() == load_file(folders[variant] / "model.safetensors").keys()


@pytest.mark.parametrize("rotate", [False, True])
def test_gates_go_where_the_model_goes(rotate, model, monkeypatch):
    monkeypatch.setattr(
        "llmprune.runtime.gating.prefill_on_turned_weights",
        lambda device, dtype: dispatch.Choice("one" if dtype == torch.float32 else "both", ""),
    )
    plan = make_plan(model, rotate=rotate)
    handle = apply(model, plan, backend="reference" if "bag" not in usable(torch.bfloat16) else "bag")
    moved = copy.deepcopy(model).to(torch.bfloat16)
    other = gated(moved)
    assert other is not handle
    assert other.model is moved
    with torch.no_grad():
        past = moved(IDS, use_cache=True).past_key_values
        assert {row.layout for row in other.report()} <= {"both", "rotated", "as stored"}
        assert all(moved.get_submodule(name).weight.is_contiguous() for name in plan.gates)
        with other.counting() as activity:
            logits = moved(IDS[:, :1], past_key_values=past).logits
    assert logits.dtype == torch.bfloat16
    assert set(activity.active) == set(plan.gates)
    assert not handle._latest
    remove(moved)
    assert gated(model) is handle
    dense = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.bfloat16).eval()
    for (name, one), two in zip(moved.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.stride() == two.stride(), name


# Refusals ---------------------------------------------------------------------------------------------------------


def refused(model, plan, *words, **options):
    before = snapshot(model)[1:]
    with pytest.raises(LLMPruneError) as caught:
        apply(model, plan, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert before == snapshot(model)[1:]
    assert gated(model) is None


def test_an_unknown_backend_is_refused(model):
    refused(model, make_plan(model), "'turbo'", "auto, dense", backend="turbo")


def test_a_backend_that_cannot_run_here_is_refused(model, monkeypatch):
    monkeypatch.setattr(kernel, "backends", lambda device, dtype: {"bag": "unavailable: it is Sunday"})
    refused(model, make_plan(model), "Sunday", backend="bag")


def test_a_plan_for_other_weights_is_refused(model):
    plan = make_plan(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    refused(model, plan, "layers.1.mlp.up_proj", "changed")


def test_a_plan_with_a_linear_that_the_model_lacks_is_refused(model):
    plan = make_plan(model)
    gate = replace(plan.gates["model.layers.2.mlp.up_proj"], name="model.layers.7.mlp.up_proj", block=7)
    refused(model, replace(plan, gates={**plan.gates, gate.name: gate}), "layers.7.mlp.up_proj")


def test_a_quantised_linear_is_refused(model):
    plan = make_plan(model)
    up = model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    refused(model, plan, "layers.0.mlp.up_proj", "quantised")


def test_a_wrapped_linear_is_refused(model):
    plan = make_plan(model)

    class Wrapped(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) * 2

    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Wrapped(old.in_features, old.out_features, bias=False)
    refused(model, plan, "Wrapped")


def test_a_linear_without_weights_in_memory_is_refused(model):
    plan = make_plan(model)
    model.model.layers[0].mlp.up_proj.to("meta")
    refused(model, plan, "no weights in memory")


def test_gates_are_not_applied_twice(model):
    plan = make_plan(model)
    apply(model, plan, backend="reference")
    with pytest.raises(LLMPruneError, match="already"):
        apply(model, plan)


def test_a_plan_without_gates_changes_nothing(model):
    before = model(IDS).logits
    plan = make_plan(model)
    handle = apply(model, replace(plan, gates={}))
    assert handle.report() == []
    assert torch.equal(model(IDS).logits, before)


def test_applying_warns_of_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, make_plan(model))
    assert linears(model).keys() == gated(model).linears.keys()
