"""Whole models with gates: what they write, and what simulation says of it."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hand_made import make_plan
from hypothesis import given
from hypothesis import strategies as st
from tiny import build
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import LLMPruneError
from llmprune.activation_plan import FILE, drop
from llmprune.models import Skeleton
from llmprune.perplexity import window_losses
from llmprune.runtime import TEAL_PAPER, Activity, apply, dispatch, gated, remove, simulate, simulate_decode
from llmprune.runtime.simulation import _Simulation

VARIANTS = ["llama", "qwen2", "gpt2", "phi3", "opt"]
IDS = torch.randint(3, 250, (1, 16), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models on the disk, by variant."""
    root = tmp_path_factory.mktemp("models")
    return {variant: build(variant, root / variant) for variant in VARIANTS}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def model(folders):
    return load(folders["llama"])


def fast(dtype=torch.float32):
    return list(dispatch.usable(CPU, dtype))


def each_token(model, ids, prompt):
    """Logits of a prompt, then of one token after another, as a cache makes them."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for t in range(prompt, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def by_hand(model, plan, ids, prompt):
    """The same, every linear's input gated by a hook for all tokens after the prompt; no basis."""
    decoding = False
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, gate=gate: (drop(args[0], gate.tau_I),) if decoding else None
        )
        for name, gate in plan.gates.items()
    ]
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    decoding = True
    for t in range(prompt, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    for hook in hooks:
        hook.remove()
    return torch.cat(logits, dim=1)


# Writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_tokens_are_the_masked_references(variant, folders):
    model = load(folders[variant])
    plan = make_plan(model)
    wanted = by_hand(model, plan, IDS, 8)
    dense = model(IDS).logits
    assert not torch.allclose(wanted[:, 8:], dense[:, 8:], atol=0.1)
    for backend in [*fast(), "reference"]:
        apply(model, plan, backend=backend)
        found = each_token(model, IDS, 8)
        remove(model)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("share", [False, True])
def test_greedy_text_is_the_references(share, model):
    plan = make_plan(model, share=share)
    texts = {}
    for backend in [*fast(), "reference"]:
        apply(model, plan, backend=backend)
        texts[backend] = model.generate(IDS, max_new_tokens=20, do_sample=False).tolist()
        remove(model)
    assert all(text == texts["reference"] for text in texts.values())
    assert texts["reference"] != model.generate(IDS, max_new_tokens=20, do_sample=False).tolist()


def test_a_plan_that_shares_masks_leaves_out_the_same_inputs(model):
    plan = make_plan(model, share=True)
    for gates in plan.groups.values():
        assert all(torch.equal(gate.tau_I, gates[0].tau_I) for gate in gates)
    apply(model, plan, backend="reference")
    with gated(model).counting() as activity:
        each_token(model, IDS, 8)
    for gates in plan.groups.values():
        assert len({activity.active[gate.name] for gate in gates}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotate", [False, True])
def test_generate_runs_in_every_dtype(dtype, rotate, folders):
    model = load(folders["qwen2"], dtype)
    apply(model, make_plan(model, rotate=rotate))
    text = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.shape == (1, IDS.shape[1] + 4)
    remove(model)
    apply(model, make_plan(model, rotate=rotate), backend=fast(dtype)[0])
    logits = each_token(model, IDS, 8)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_a_cache_of_fixed_size_will_do(model):
    apply(model, make_plan(model), backend=fast()[0])
    options = {"max_new_tokens": 6, "do_sample": False}
    with gated(model).counting() as activity:
        fixed = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert activity.share < 0.9
    assert torch.equal(fixed, model.generate(IDS, **options))


def test_several_sequences_are_dense_with_one_warning(model):
    ids = torch.cat([IDS, IDS.flip(1)])
    options = {"max_new_tokens": 5, "do_sample": False}
    dense = model.generate(ids, **options)
    apply(model, make_plan(model, sparsity=0.9), backend=fast()[0])
    with pytest.warns(UserWarning, match="2 sequences") as caught:
        assert torch.equal(model.generate(ids, **options), dense)
    assert len([each for each in caught if "sequences" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, **options), dense)


def test_padded_sequences_are_written_as_by_the_dense_model(model):
    ids = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(ids)
    ids[0, :7] = 0
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    dense = model.generate(ids, **options)
    apply(model, make_plan(model), backend=fast()[0])
    with pytest.warns(UserWarning, match="sequences"):
        assert torch.equal(model.generate(ids, **options), dense)


def test_what_was_read_is_counted(model):
    plan = make_plan(model, sparsity=0.4)
    handle = apply(model, plan, backend="reference")
    read = dict.fromkeys(plan.gates, 0)

    def note(name):
        tau_I = plan.gates[name].tau_I
        return lambda module, args: read.__setitem__(name, read[name] + int((args[0].abs() > tau_I).sum()))

    out = model(IDS, use_cache=True)
    for name in plan.gates:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    with handle.counting() as activity:
        for token in range(3, 8):
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    model(torch.tensor([[9]]), past_key_values=out.past_key_values)
    shares = {name: activity.active[name] * 5 * gate.shape[1] for name, gate in plan.gates.items()}
    assert sum(round(each) for each in shares.values()) < sum(read.values())
    assert 0.4 < activity.share < 0.8
    total = sum(activity.active[name] * gate.numel for name, gate in plan.gates.items())
    assert activity.share == pytest.approx(total / sum(gate.numel for gate in plan.gates.values()))


def test_what_runs_dense_reads_everything(model):
    handle = apply(model, make_plan(model), backend="dense")
    with handle.counting() as activity:
        assert activity.share == 1
        assert activity.active == {}
        each_token(model, IDS, 12)
    assert set(activity.active.values()) == {1.0}


# Simulation -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(0, 100),
    st.integers(1, 9),
)
def test_the_first_real_tokens_stay_dense(rows, percent, tokens):
    real = torch.tensor(rows)
    simulation = _Simulation(llmprune_plan(), percent / 100)
    found, kept = simulation.gated_and_real(real, real.long().cumsum(dim=1) - 1, tokens)
    assert torch.equal(kept, real[:, -tokens:])
    for row, row_found in zip(rows, found.tolist(), strict=True):
        first = max(1, math.ceil(Fraction(percent, 100) * sum(row)))
        wanted = [sum(row[: i + 1]) > first for i in range(len(row))][-tokens:]
        # Padding may be gated or not.
        assert [a for a, is_real in zip(row_found, row[-tokens:], strict=True) if is_real] == [
            a for a, is_real in zip(wanted, row[-tokens:], strict=True) if is_real
        ]


def llmprune_plan():
    from llmprune.activation_plan import Plan

    return Plan({}, "wina", False, "uniform", "native", 0.5)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_teals_preset_leaves_the_first_half_dense(length):
    real = torch.ones((1, length), dtype=torch.bool)
    gated_, _ = _Simulation(llmprune_plan(), TEAL_PAPER).gated_and_real(real, real.long().cumsum(1) - 1, length)
    assert gated_.tolist() == [[i >= length - length // 2 for i in range(length)]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rotate", [False, True])
def test_simulation_is_what_writing_does(variant, rotate, folders):
    """One token dense, then token by token through the gates: the logits of one simulated forward."""
    model = load(folders[variant])
    plan = make_plan(model, rotate=rotate)
    with simulate(model, plan) as activity:
        wanted = model(IDS).logits
    assert 0.3 < activity.share < 0.7
    assert set(activity.active) == set(plan.gates)
    for backend in [*fast(), "reference"]:
        apply(model, plan, backend=backend)
        found = each_token(model, IDS, 1)
        remove(model)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_simulated_prompt_and_then_writing_is_the_simulated_whole(model):
    plan = make_plan(model)
    apply(model, plan, backend=fast()[0])
    with simulate_decode(model):
        whole = model(IDS).logits
        out = model(IDS[:, :9], use_cache=True)
        inside = model(IDS[:, 9:10], past_key_values=out.past_key_values).logits
        out = model(IDS[:, :9], use_cache=True)
        together = model(IDS[:, 9:12], past_key_values=out.past_key_values).logits
        out = model(IDS[:, :9], use_cache=True)
    after = model(IDS[:, 9:10], past_key_values=out.past_key_values).logits
    for found, wanted in ((inside, whole[:, 9:10]), (together, whole[:, 9:12]), (after, whole[:, 9:10])):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("skip", [0.01, 0.3])
def test_padding_on_either_side_changes_nothing(variant, skip, folders):
    model = load(folders[variant])
    plan = make_plan(model, rotate=variant == "llama")
    lengths = (5, 14)
    with simulate(model, plan, skip) as alone_activity:
        alone = [model(IDS[:, :length]).logits[0] for length in lengths]
    for side in ("left", "right"):
        ids, mask = torch.zeros((2, 14), dtype=torch.int64), torch.zeros((2, 14), dtype=torch.int64)
        places = [slice(14 - length, 14) if side == "left" else slice(length) for length in lengths]
        for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
            ids[row, place], mask[row, place] = IDS[0, :length], 1
        positions = {} if variant == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with simulate(model, plan, skip) as activity:
            logits = model(ids, attention_mask=mask, **positions).logits
        assert activity.active == pytest.approx(alone_activity.active)
        for row, place in enumerate(places):
            scale = float(alone[row].abs().max())
            torch.testing.assert_close(logits[row, place], alone[row], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("variant", ["llama", "opt", "gpt2"])
def test_block_by_block_it_is_the_same(variant, folders):
    model = load(folders[variant])
    plan = make_plan(model, rotate=True)
    ids = torch.cat([IDS, IDS.flip(1)])
    skeleton = Skeleton(folders[variant])
    with simulate(skeleton, plan, 0.2) as activity:
        losses = window_losses(skeleton, ids, micro_batch=2)
    with simulate(model, plan, 0.2) as whole:
        wanted = [float(model(row[None], labels=row[None]).loss) for row in ids]
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert losses != pytest.approx([float(model(row[None], labels=row[None]).loss) for row in ids], rel=1e-2)
    assert activity.active == pytest.approx(whole.active)


def test_simulation_leaves_no_trace(model):
    def hooks():
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    before, dense = hooks(), model(IDS).logits
    plan = make_plan(model)
    with simulate(model, plan):
        assert hooks() != before
    assert hooks() == before
    assert torch.equal(model(IDS).logits, dense)
    with pytest.raises(LLMPruneError, match="two dimensions"), simulate(model, plan):
        model(IDS, attention_mask=torch.ones((1, 1, 16, 16)))
    assert hooks() == before


def test_gates_rest_while_they_are_simulated(model):
    plan = make_plan(model)
    handle = apply(model, plan, backend="reference")
    with handle.counting() as counted, simulate_decode(model) as activity:
        each_token(model, IDS, 8)
    assert counted.active == {}
    assert 0.3 < activity.share < 0.7
    with handle.counting() as counted:
        each_token(model, IDS, 8)
    assert counted.share < 0.7


def test_simulation_of_a_dense_model_wants_a_plan(model):
    with pytest.raises(LLMPruneError, match="not gated"), simulate_decode(model):
        pass
    plan = make_plan(model)
    with pytest.raises(LLMPruneError, match="skip"), simulate(model, plan, 1.5):
        pass
    gate = replace(plan.gates["model.layers.2.mlp.up_proj"], name="model.layers.7.mlp.up_proj", block=7)
    with pytest.raises(LLMPruneError, match=r"layers\.7"), simulate(model, replace(plan, gates={gate.name: gate})):
        pass
    with simulate(model, llmprune_plan()) as activity:
        model(IDS)
    assert activity.share == 1
    assert isinstance(activity, Activity)


def test_a_token_that_is_not_a_number_stays_one_in_simulation(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 12]] = torch.nan
    plan = make_plan(model)
    with simulate(model, plan):
        assert model(IDS).logits[0, 12].isnan().all()


# Loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(folders, tmp_path):
    """A model with a plan beside it."""
    folder = shutil.copytree(folders["llama"], tmp_path / "gated")
    make_plan(load(folder)).save(folder)
    return folder


def test_a_directory_with_a_plan_loads_gated(directory):
    loaded = llmprune.load(directory, device="cpu")
    assert gated(loaded) is not None
    assert gated(loaded).linears.keys() == make_plan(load(directory)).gates.keys()
    dense = llmprune.load(directory, device="cpu", gated=False)
    assert gated(dense) is None
    assert gated(llmprune.load(directory, device="cpu", dtype="float16")) is not None
    assert not loaded.training


def test_a_plan_for_other_weights_stops_loading(directory):
    facts = json.loads((directory / FILE).read_text())
    facts["gates"]["model.layers.1.mlp.up_proj"]["weight_norm"] *= 2
    (directory / FILE).write_text(json.dumps(facts))
    with pytest.raises(LLMPruneError, match=r"layers\.1\.mlp\.up_proj"):
        llmprune.load(directory, device="cpu")
    assert gated(llmprune.load(directory, device="cpu", gated=False)) is None
