"""A plan: what its gates keep, that its files lose nothing, and that it is only used on the weights it was made for."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmprune.activation_allocation import GRID
from llmprune.activation_plan import DENSE, FILE, TENSORS, Gate, Plan, drop, frobenius
from llmprune.errors import LLMPruneError
from llmprune.gating_scores import Curve, column_norms, histogram

# (role, group's role, outputs, inputs): all in one block, but for down.
LINEARS = [("q", "q", 48, 32), ("k", "k", 24, 32), ("gate", "gate", 80, 32), ("up", "gate", 80, 32), ("down", "down", 32, 80)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        for number, (role, _, outputs, inputs) in enumerate(LINEARS):
            linear = nn.Linear(inputs, outputs, bias=False)
            linear.weight.data.copy_(noise(outputs, inputs, seed=seed + number))
            self.add_module(role, linear)


def made(model, allocation="uniform", **options):
    """A plan for such a model."""
    gates, groups = {}, {}
    for number, (role, leader, outputs, inputs) in enumerate(LINEARS):
        weight_OI = model.get_submodule(role).weight.data
        if role == leader:
            norm_I = column_norms(weight_OI)
            groups[role] = norm_I, histogram(noise(200, inputs, seed=90 + number).abs() * norm_I)
        norm_I, counts = groups[leader]
        gates[role] = Gate(
            role,
            role,
            int(role == "down"),
            (outputs, inputs),
            leader,
            sparsity=0.0,
            measured=0.0,
            threshold=DENSE,
            norm_I=norm_I,
            counts=counts,
            weight_norm=frobenius(weight_OI),
            sensitivity=1.0 + number,
        )
    tables = {}
    if allocation == "greedy":
        rows = torch.tensor(GRID, dtype=torch.float64)[:, None]
        tables = {0: rows.expand(-1, 3).clone(), 1: rows.clone()}
    return Plan(gates, "wina", True, allocation, "native", 0.0, tables=tables, **options)


@pytest.fixture
def plan():
    return made(Model(), bases={"q": noise(32, 32)}, compared={"native": 0.25}, calibration="8 samples", weights="abc").at(0.5)


def test_a_plan_is_the_same_after_its_files(plan, tmp_path):
    plan.save(tmp_path)
    found = Plan.load(tmp_path)
    assert found is not None
    assert found.files() == plan.files()
    for name, gate in plan.gates.items():
        other = found.gates[name]
        assert torch.equal(gate.tau_I, other.tau_I)
        assert (gate.shape, gate.group, gate.threshold, gate.measured) == (
            other.shape,
            other.group,
            other.threshold,
            other.measured,
        )
    assert torch.equal(found.bases["q"], plan.bases["q"])
    settled = ("score", "share", "allocation", "basis", "sparsity", "form", "calibration", "weights", "compared")
    assert all(getattr(found, key) == getattr(plan, key) for key in settled)
    assert found.at(0.3).files() == plan.at(0.3).files()


def test_a_greedy_plans_table_comes_along(tmp_path):
    plan = made(Model(), "greedy").at(0.4)
    plan.save(tmp_path)
    assert Plan.load(tmp_path).at(0.7).files() == plan.at(0.7).files()


def test_gates_of_a_group_drop_the_same_inputs(plan):
    assert [gate.name for gate in plan.groups["gate"]] == ["gate", "up"]
    assert torch.equal(plan.gates["gate"].tau_I, plan.gates["up"].tau_I)
    assert list(plan.groups) == ["q", "k", "gate", "down"]


@given(sparsity=st.floats(0, 0.99), allocation=st.sampled_from(["uniform", "greedy", "closed-form"]))
@settings(max_examples=30, deadline=None)
def test_every_sparsity_drops_that_share_of_every_blocks_weights(sparsity, allocation):
    plan = made(Model(), allocation).at(sparsity)
    for block in (0, 1):
        gates = [gate for gate in plan.gates.values() if gate.block == block]
        total = sum(gate.numel for gate in gates)
        assert sum(gate.sparsity * gate.numel for gate in gates) / total == pytest.approx(sparsity, abs=1e-9)
    assert plan.measured == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= gate.sparsity <= 1 and gate.error is None for gate in plan.gates.values())


@given(low=st.floats(0, 0.9), more=st.floats(0, 0.09), allocation=st.sampled_from(["uniform", "greedy", "closed-form"]))
@settings(max_examples=30, deadline=None)
def test_what_a_lower_sparsity_drops_a_higher_one_drops_too(low, more, allocation):
    plan = made(Model(), allocation)
    one, other = plan.at(low), plan.at(low + more)
    assert all((one.gates[name].tau_I <= other.gates[name].tau_I).all() for name in plan.gates)


def test_at_sparsity_zero_exact_zeros_are_all_that_is_dropped(plan):
    inputs = noise(20, 32)
    inputs[3, 4] = 0
    assert all(gate.threshold == 0 for gate in plan.at(0.0).gates.values())
    assert torch.equal(drop(inputs, plan.at(0.0).gates["q"].tau_I), inputs)


def test_a_plans_threshold_is_the_quantile_of_its_scores(plan):
    gate = plan.gates["q"]
    scores = noise(200, 32, seed=90).abs() * gate.norm_I
    assert float((scores <= gate.threshold).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert Curve(gate.counts).share(gate.threshold) == pytest.approx(0.5)


def test_a_gate_without_a_threshold_keeps_zeros_and_columns_of_zeros(plan):
    gate = replace(plan.gates["q"], threshold=DENSE, norm_I=torch.tensor([0.0, 1.0]))
    assert gate.tau_I.tolist() == [-1.0, -1.0]
    assert replace(gate, threshold=1.0).tau_I.tolist() == [float("inf"), 1.0]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(plan, sparsity):
    with pytest.raises(LLMPruneError, match="outside"):
        plan.at(sparsity)


def test_there_is_no_plan_where_none_was_written(tmp_path):
    assert Plan.load(tmp_path) is None


def broken_text(folder):
    (folder / FILE).write_text((folder / FILE).read_text()[:-40])


def broken_tensors(folder):
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)


def other_format(folder):
    facts = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**facts, "format": 99}))


def no_object(folder):
    (folder / FILE).write_text("[]")


def lacking(folder):
    facts = json.loads((folder / FILE).read_text())
    del facts["gates"]["q"]["threshold"]
    (folder / FILE).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage",
    [broken_text, broken_tensors, other_format, no_object, lacking, lambda folder: (folder / TENSORS).unlink()],
)
def test_a_damaged_plan_is_refused_in_one_sentence(plan, tmp_path, damage):
    plan.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(LLMPruneError, match="activation_sparsity") as caught:
        Plan.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_plan_fits_the_weights_it_was_made_for_in_any_dtype(plan):
    plan.check(Model())
    plan.check(Model().to(torch.bfloat16))


def test_a_plan_does_not_fit_other_weights(plan):
    pruned = Model()
    pruned.down.weight.data[:, 0] = 0
    for model in (Model(seed=7), pruned):
        with pytest.raises(LLMPruneError, match="have changed"):
            plan.check(model)
    wide = Model()
    wide.k = nn.Linear(32, 23, bias=False)
    with pytest.raises(LLMPruneError, match=r"shape \[24, 32\]"):
        plan.check(wide)
    lacking_one = Model()
    del lacking_one.k
    with pytest.raises(LLMPruneError, match="does not have"):
        plan.check(lacking_one)
