"""WINA's calibration: a plan drops what it says, weights stay as they are, and interruptions change no byte of either."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, build, save_llama
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.activation_allocation import Unit, closed_form, greedy_path, on_path
from llmprune.activation_plan import FILE, TENSORS, Plan
from llmprune.errors import LLMPruneError
from llmprune.gating_scores import Curve, ScoreHistogram, column_norms, gate_norms, rotated
from llmprune.gating_trial import Trial, trial_stream
from llmprune.methods import wina
from llmprune.models import Skeleton
from llmprune.output import STATE, Output
from llmprune.recipe import from_options
from llmprune.stream import Stream

QUICK = {"calibration": "random", "samples": 4, "seqlen": 24}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Greedy in large steps: what is looked at here does not depend on it."""
    monkeypatch.setattr("llmprune.activation_allocation.STEP", 0.5)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"))


def random_ids(vocabulary=61, samples=4, tokens=24):
    return torch.randint(3, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(0))


def calibrated(folder, ids_NT=None, micro_batch=1, sparsity=0.5, **options):
    """The plan of a model, without an output directory."""
    recipe = from_options({"model": str(folder), "method": "wina", "sparsity": sparsity, **QUICK, **options})
    stream = Stream(Skeleton(folder), random_ids() if ids_NT is None else ids_NT, propagate="dense", micro_batch=micro_batch)
    stream.calibration_NT = stream.ids_NT
    wina.prune(stream, recipe)
    return stream.plan


def dropped(folder, ids_NT, plan):
    """The share of every gated linear's inputs that the dense model's are below their thresholds."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}

    def look(name, module, args):
        found[name] = float((args[0].float().abs() <= plan.gates[name].tau_I).double().mean())

    for name in plan.gates:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: look(name, module, args))
    with torch.no_grad():
        model(input_ids=ids_NT)
    return found


@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {}, {"share": True}, {"score": "teal"}], ids=str)
def test_on_the_calibration_set_every_linear_drops_what_its_gate_says(stories260k, options):
    ids_NT = random_ids(500, 6, 64)
    plan = calibrated(stories260k, ids_NT, **options)
    found = dropped(stories260k, ids_NT, plan)
    for name, gate in plan.gates.items():
        assert found[name] == pytest.approx(gate.measured, abs=0.01)
        assert gate.measured == pytest.approx(gate.sparsity, abs=1e-9)
    assert plan.measured == pytest.approx(0.5, abs=1e-9)


def test_inputs_that_are_zero_are_dropped_beyond_what_was_asked_for(tmp_path):
    """OPT's ReLU: more than half of what down reads is zero."""
    plan = calibrated(build("opt", tmp_path), sparsity=0.1, allocation="uniform")
    downs = [gate for gate in plan.gates.values() if gate.role == "down"]
    assert all(gate.threshold == 0 and gate.measured > 0.3 and gate.sparsity == 0.1 and gate.error == 0 for gate in downs)


def test_norms_scores_and_masks_are_shared_as_asked_for(tiny_llama):
    weights = load_file(tiny_llama / "model.safetensors")

    def gates(**options):
        return calibrated(tiny_llama, allocation="uniform", **options).gates

    own, shared, teal, released = gates(), gates(share=True), gates(score="teal"), gates(score="wina-released")
    for name, gate in own.items():
        weight_OI = weights[f"{name}.weight"]
        assert torch.equal(gate.norm_I, column_norms(weight_OI))
        assert torch.equal(teal[name].norm_I, torch.ones(weight_OI.shape[1]))
        expected = gate.norm_I if gate.role in ("k", "gate") else torch.ones(weight_OI.shape[1])
        assert torch.equal(released[name].norm_I, expected)
        assert gate.group == name
    first = {role: f"model.layers.1.{role}" for role in ("self_attn.q_proj", "mlp.gate_proj", "self_attn.o_proj")}
    for group, members in (
        ("self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("self_attn.o_proj", ("self_attn.o_proj",)),
    ):
        names = [f"model.layers.1.{name}" for name in members]
        norm_I = gate_norms([("", weights[f"{name}.weight"]) for name in names], "wina")
        for name in names:
            assert shared[name].group == first[group]
            assert torch.equal(shared[name].norm_I, norm_I)
            assert torch.equal(shared[name].tau_I, shared[names[0]].tau_I)


def test_micro_batches_do_not_change_a_plan(tiny_llama):
    one = calibrated(tiny_llama)
    for micro_batch in (3, 4):
        assert calibrated(tiny_llama, micro_batch=micro_batch).files() == one.files()


@pytest.mark.parametrize(
    "options",
    [{"allocation": "greedy"}, {"allocation": "uniform", "basis": "stacked"}, {"share": True}],
    ids=str,
)
def test_a_plan_at_another_sparsity_is_what_a_calibration_for_that_gives(tiny_llama, options):
    plan = calibrated(tiny_llama, **options)
    for sparsity in (0.0, 0.93):
        other = calibrated(tiny_llama, sparsity=sparsity, **options)
        # What no calibration of its own has measured is left out.
        assert plan.at(sparsity).files() == other.at(sparsity).files()
        assert all(gate.error is not None for gate in other.gates.values())


@pytest.mark.parametrize(
    ("variant", "basis"), [*((variant, "stacked") for variant in VARIANTS), ("llama", "kgate"), ("opt", "kgate")]
)
def test_every_family_has_a_gate_for_every_linear_in_a_basis(tmp_path, variant, basis):
    folder = build(variant, tmp_path)
    plan = calibrated(folder, basis=basis)
    skeleton = Skeleton(folder)
    assert list(plan.gates) == [linear.name for linear in skeleton.all_linears()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plan.check(model)
    turned = {gate.role for gate in plan.gates.values() if gate.basis}
    # An FFN without a gate has nothing that the published rotation is made from.
    plain = {"up"} if (variant, basis) == ("opt", "kgate") else set()
    assert turned == {gate.role for gate in plan.gates.values()} - {"o", "down"} - plain
    for linear in skeleton.linears[1]:
        gate, module = plan.gates[linear.name], model.get_submodule(linear.name)
        weight_OI = module.weight.detach().T if linear.transposed else module.weight.detach()
        read_OI = rotated(weight_OI, plan.bases[gate.basis]) if gate.basis else weight_OI
        torch.testing.assert_close(gate.norm_I, column_norms(read_OI), rtol=1e-5, atol=1e-6)
        assert gate.error is not None
        assert 0 <= gate.error < 1


def test_weights_stay_as_they_are_and_the_plan_lies_beside_them(tiny_llama, tmp_path):
    result = llmprune.prune(str(tiny_llama), method="wina", sparsity=0.5, output=tmp_path / "out", **QUICK)
    dense = load_file(tiny_llama / "model.safetensors")
    written = {}
    for shard in (tmp_path / "out").glob("model*.safetensors"):
        written |= load_file(shard)
    assert written.keys() == dense.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in dense.items())
    plan = Plan.load(tmp_path / "out")
    assert plan is not None
    plan.check(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert not (tmp_path / "out" / STATE).exists()
    facts = result.record["linears"]["model.layers.0.mlp.down_proj"]
    gate = plan.gates["model.layers.0.mlp.down_proj"]
    assert facts["gate_sparsity"] == gate.sparsity
    assert facts["gate_error"] == gate.error
    assert facts["teal_error"] > 0


class Killed(Exception):
    pass


def contents(folder):
    """All files but those that hold timings and the directory's name."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("llmprune.json", "README.md")
    }


@pytest.mark.parametrize(
    ("finished", "options"),
    [(1, {"allocation": "greedy"}), (0, {"share": True}), (3, {"share": True}), (2, {"basis": "auto"})],
    ids=str,
)
def test_an_interrupted_run_ends_with_the_same_bytes(tiny_llama, tmp_path, monkeypatch, options, finished):
    def run(name):
        llmprune.prune(str(tiny_llama), method="wina", sparsity=0.5, output=tmp_path / name, **QUICK, **options)

    run("whole")
    write, finish = Output.write_block, Output.finish

    def stop(self, index, *args):
        if index == finished:
            raise Killed
        write(self, index, *args)

    def stop_at_the_end(self, *args):
        raise Killed

    monkeypatch.setattr(Output, "write_block", stop)
    monkeypatch.setattr(Output, "finish", stop_at_the_end)
    with pytest.raises(Killed):
        run("cut")
    monkeypatch.setattr(Output, "write_block", write)
    monkeypatch.setattr(Output, "finish", finish)
    counted = []
    block_plan = wina.block_plan
    monkeypatch.setattr(wina, "block_plan", lambda block, *args: counted.append(block.index) or block_plan(block, *args))
    run("cut")
    assert counted == list(range(finished, 3))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_damaged_part_of_an_interrupted_plan_is_refused(tiny_llama, tmp_path, monkeypatch, damage):
    def run():
        llmprune.prune(str(tiny_llama), method="wina", sparsity=0.5, output=tmp_path / "out", **QUICK)

    def stop(self, *args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", stop)
        with pytest.raises(Killed):
            run()
    (file,) = (tmp_path / "out" / STATE).glob("*gates-0001.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8] + b"12345678")
    with pytest.raises(LLMPruneError, match="gates-0001") as caught:
        run()
    assert "\n" not in str(caught.value)


def low_rank(folder):
    """A Llama whose attention and FFN each look at 6 directions of 32, in no one's axes."""
    save_llama(folder, intermediate_size=512, num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if any(role in name for role in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            part = "attention" if "self_attn" in name else "mlp"
            seed = {"attention": 1, "mlp": 2}[part]
            seen = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
            heads = torch.randn(tensor.shape[0], 6, generator=torch.Generator().manual_seed(seed + len(name)))
            tensors[name] = heads @ seen
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_auto_takes_the_basis_that_loses_least_for_what_it_reads(tmp_path, tiny_llama):
    plan = calibrated(low_rank(tmp_path), basis="auto", allocation="uniform")
    assert plan.basis == "stacked"
    assert plan.compared["stacked"] < 0.5 * plan.compared["native"]
    assert plan.bases
    # Where a rotation is a good part of what is read, it does not pay.
    plain = calibrated(tiny_llama, basis="auto", allocation="uniform")
    assert plain.basis == "native"
    assert plain.compared["native"] == min(plain.compared.values())
    assert not plain.bases


def test_a_basis_that_costs_more_than_can_be_dropped_is_out_of_the_question(tiny_llama):
    plan = calibrated(tiny_llama, basis="auto", sparsity=0.9, allocation="uniform")
    assert list(plan.compared) == ["native"]


@pytest.fixture
def trial(stories260k):
    """The second block of a trained model, its calibration and a trial of it."""
    ids_NT = random_ids(500, 6, 64)
    stream = Stream(Skeleton(stories260k), ids_NT, propagate="dense")
    samples = trial_stream(stream)
    samples.capture()
    samples.skip(1)
    blocks = stream.blocks()
    next(blocks)
    block = next(blocks)
    groups = wina.groups_of(block, {}, score="wina", share=False)
    norms = {group.name: group.norm_I for group in groups}
    counts = dict(block.observe_each(lambda linear: ScoreHistogram(linear.shape[1], torch.device("cpu"), norms[linear.name])))
    units = [
        Unit(group.linears[0].shape[0], len(group.norm_I), Curve(seen.counts))
        for group, seen in zip(groups, counts.values(), strict=True)
    ]
    return Trial(samples, block.linears, {}), groups, units


def test_a_trial_without_gates_loses_nothing_and_one_that_drops_an_ffn_loses_what_it_adds(trial):
    block, groups, _ = trial
    assert block.error({}) == 0.0
    down = groups[-1].linears[0]
    outputs = []
    handle = down.module.register_forward_hook(lambda module, args, output: outputs.append(output))
    block.error({})
    handle.remove()
    hidden = block.stream.hidden(0)
    added = block.output_NTI - hidden
    lost = float(outputs[0][:, 48:].double().square().sum() / added[:, 48:].double().square().sum())
    assert block.error({down.name: torch.full((down.shape[1],), torch.inf)}) == pytest.approx(lost, rel=1e-5)


def test_the_first_positions_are_not_gated(trial):
    block, groups, _ = trial
    name = groups[0].name
    inputs = block.inputs[name]
    gated = block.gated(name, inputs, torch.full(inputs.shape[-1:], torch.inf))
    assert torch.equal(gated[:, :1], inputs[:, :1])
    assert not gated[:, 1:].any()


def test_a_linears_error_is_that_of_its_own_output(trial):
    block, groups, units = trial
    for group, unit in zip(groups, units, strict=True):
        (linear,) = group.linears
        tau_I = unit.curve.threshold(0.5) / group.norm_I
        inputs = block.inputs[linear.name][:, 1:].reshape(-1, linear.shape[1]).double()
        lost = torch.where(inputs.abs() <= tau_I, inputs, 0.0) @ linear.weight_OI.double().T
        expected = float(lost.square().sum() / (inputs @ linear.weight_OI.double().T).square().sum())
        assert block.linear_errors(linear, [tau_I]) == [pytest.approx(expected, rel=1e-4)]


def test_the_closed_form_comes_close_to_greedy_at_a_hundredth_of_its_forwards(trial, monkeypatch):
    monkeypatch.setattr("llmprune.activation_allocation.STEP", 0.1)
    block, groups, units = trial
    error = wina.block_error(block, groups, units)
    before = block.forwards
    sensitivities = wina.sensitivities(block, groups, units)
    assert block.forwards - before == len(units)
    known = [Unit(unit.outputs, unit.inputs, unit.curve, each) for unit, each in zip(units, sensitivities, strict=True)]
    sizes = [unit.size for unit in units]
    path = greedy_path(sizes, error)
    for sparsity in (0.25, 0.5, 0.65):
        found, best = closed_form(known, sparsity), on_path(path, sizes, sparsity)
        assert error(found) ** 0.5 < 1.04 * error(best) ** 0.5
        assert error(found) < error([sparsity] * len(sizes))


def test_a_plan_says_what_it_was_made_from(tiny_llama):
    plan = calibrated(tiny_llama, score="teal", share=True)
    facts = json.loads(plan.files()[FILE])
    assert facts["calibration"] == "4 samples of 24 tokens, random"
    assert facts["weights"] == Skeleton(tiny_llama).checkpoint.fingerprint()[:16]
    assert (facts["score"], facts["share"], facts["allocation"], facts["basis"]) == ("teal", True, "closed-form", "native")
    assert set(plan.files()) == {FILE, TENSORS}
