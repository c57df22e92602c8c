"""CFSP from recipe to directory: scores against slow formulas, budgets, compensation, formats, resumption, bad input."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import forked
import in_process
import pytest
import torch
from checkpoints import changed, no_room_for
from crash_harness import digests
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import BLOCKS, HIDDEN, build
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import allocation, calibration
from llmprune.anatomy import anatomy
from llmprune.checkpoint import Checkpoint
from llmprune.methods import cfsp
from llmprune.models import Skeleton
from llmprune.recipe import Recipe
from llmprune.statistics import Moments
from llmprune.stream import Stream
from llmprune.structure import PLAN
from llmprune.surgery import Plan
from llmprune.verify import verify

HARNESS = Path(__file__).parent / "helpers" / "crash_harness.py"
OPTIONS = {"method": "cfsp", "calibration": "random", "samples": 8, "seqlen": 24, "sparsity": 0.5, "compensate": "none"}
METRICS = ("act", "wanda_sp", "rel", "out_energy", "wifv", "magnitude", "random")
BY_INPUT = ("act", "wanda_sp", "rel", "out_energy", "wifv")
BY_OUTPUT = ("wanda_sp", "out_energy", "wifv", "magnitude")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def ids_NT():
    return tokens()


def tokens(vocab_size=263, samples=8, seqlen=24, seed=0):
    """The calibration set of `OPTIONS`."""
    options = {"samples": samples, "seqlen": seqlen, "seed": seed, "sampler": lambda *_: None}
    return calibration.calibration_set("random", None, vocab_size=vocab_size, **options).ids_NT


def prune(model, output, **options):
    return llmprune.prune(str(model), output=output, **{**OPTIONS, **options})


def plan_of(folder):
    return Plan.from_json((folder / PLAN).read_text())


def channels(folder):
    """The channels that every block keeps."""
    return [kept.channels for kept in plan_of(folder).blocks]


def widths(folder):
    return [len(kept) for kept in channels(folder)]


def ffn(tensors, block):
    """Gate, up and down of a Llama's block."""
    return (tensors[f"model.layers.{block}.mlp.{role}_proj.weight"] for role in ("gate", "up", "down"))


def logits(folder, ids_BT=None, dtype=torch.float32):
    ids_BT = tokens(seed=1)[:2] if ids_BT is None else ids_BT
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids_BT).logits


def seen(folder, ids_NT):
    """What the resident model computes, in float64: per block what down reads [T, D], and the block's input and output."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(requires_grad=False)
    inputs, ends = {}, {}
    for index, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=index: inputs.update({i: args[0].flatten(0, 1)}))
        block.register_forward_hook(lambda _, args, output, i=index: ends.update({i: (args[0], output)}))
    with torch.no_grad():
        model(ids_NT)
    return model, inputs, ends


# Scores -------------------------------------------------------------------------------------------------------------


def slow_score(metric, inputs_TD, gate_DJ, up_DJ, down_JD):
    """Channel by channel, from the formulas."""
    found = []
    rms_D = [float(inputs_TD[:, i].square().mean().sqrt()) for i in range(inputs_TD.shape[1])]
    hidden = len(down_JD)
    for i, rms in enumerate(rms_D):
        u_T, down_J = inputs_TD[:, i], down_JD[:, i]
        match metric:
            case "act":
                found.append(rms)
            case "wanda_sp":
                found.append(rms * sum(abs(float(w)) for w in down_J) / hidden)
            case "out_energy":
                found.append(rms**2 * sum(float(w) ** 2 for w in down_J))
            case "wifv":
                found.append(float((u_T - u_T.mean()).square().mean()) * sum(float(w) ** 2 for w in down_J))
            case "magnitude":
                found.append(sum(float(w) ** 2 for w in down_J) ** 0.5)
            case "rel":
                share = 0.0
                for j in range(hidden):
                    reads = [abs(float(down_JD[j, k])) * rms_D[k] for k in range(len(rms_D))]
                    share += reads[i] / sum(reads) / hidden
                    for weight_DJ in (up_DJ, gate_DJ):
                        share += float(weight_DJ[i, j].abs() / weight_DJ[:, j].abs().sum()) / hidden
                found.append(rms * share)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "random"])
def test_scores_are_those_of_the_formulas_in_float64(model_dir, ids_NT, metric):
    model, inputs, _ = seen(model_dir, ids_NT)
    recipe = Recipe(model="tiny", method="cfsp", metric=metric)
    _, score_BD, mean_BD = cfsp.looked_at(Stream(Skeleton(model_dir), ids_NT), recipe)
    for block in range(3):
        mlp = model.model.layers[block].mlp
        slow_D = slow_score(metric, inputs[block], mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        torch.testing.assert_close(score_BD[block].double(), slow_D, rtol=1e-4, atol=0)
        torch.testing.assert_close(mean_BD[block].double(), inputs[block].mean(dim=0), rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 2**31), b=st.floats(0.1, 4), c=st.floats(0.1, 4))
@settings(max_examples=40, deadline=None)
def test_act_ranks_channels_as_the_published_codes_three_terms_do(seed, b, c):
    generator = torch.Generator().manual_seed(seed)
    gate_DJ, up_DJ, down_DJ, inputs_TD = (torch.randn(n, k, generator=generator) for n, k in [(9, 5)] * 3 + [(20, 9)])
    inputs = Moments(9, torch.device("cpu"))
    inputs.update(inputs_TD[None])
    act_D = cfsp.score(None, SimpleNamespace(weight_OI=down_DJ.T), inputs, Recipe(model="x", method="cfsp", metric="act"))
    a_D = inputs_TD.double().square().sum(dim=0).sqrt()
    terms = [down_DJ.double().abs() * a_D[:, None] ** b, up_DJ.double().abs(), gate_DJ.double().abs()]
    published_D = sum(term_DJ / term_DJ.sum(dim=1, keepdim=True) for term_DJ in terms).mean(dim=1) * a_D**c
    assert act_D.argsort().tolist() == published_D.argsort().tolist()


def test_random_scores_depend_on_the_seed_and_on_nothing_else(model_dir, ids_NT):
    def scores(seed, ids):
        recipe = Recipe(model="tiny", method="cfsp", metric="random", seed=seed)
        return torch.stack(cfsp.looked_at(Stream(Skeleton(model_dir), ids), recipe)[1])

    assert torch.equal(scores(3, ids_NT), scores(3, ids_NT[:2]))
    assert not torch.equal(scores(3, ids_NT), scores(4, ids_NT))
    assert len({tuple(score_D.tolist()) for score_D in scores(3, ids_NT)}) == 3


def test_importance_is_the_mean_angle_between_a_blocks_input_and_output_and_widths_follow_it(model_dir, ids_NT, tmp_path):
    record = prune(model_dir, tmp_path / "out").record
    _, _, ends = seen(model_dir, ids_NT)
    importance_B = [block["importance"] for block in record["blocks"]]
    for block, (before_BTI, after_BTI) in ends.items():
        cosine_BT = (before_BTI * after_BTI).sum(dim=-1) / before_BTI.norm(dim=-1) / after_BTI.norm(dim=-1)
        assert importance_B[block] == pytest.approx(float(cosine_BT.arccos().mean()) / torch.pi, rel=1e-5)
    ratios = allocation.keep_ratios(importance_B, 0.5)
    assert widths(tmp_path / "out") == record["kept"]["ffn"] == allocation.widths(ratios, [HIDDEN] * 3, 78, multiple=1)
    assert len(set(widths(tmp_path / "out"))) > 1
    prune(model_dir, tmp_path / "even", allocation="uniform")
    assert widths(tmp_path / "even") == [26] * 3


# Which channels go --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "random"])
def test_dead_channels_go_first_and_leave_the_model_as_it_was(model_dir, tmp_path, metric):
    dead = {block: torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(block))[:13] for block in range(3)}

    def kill(tensors):
        for block, gone in dead.items():
            gate, up, down = ffn(tensors, block)
            gate[gone], up[gone], down[:, gone] = 0.0, 0.0, 0.0

    source = changed(model_dir, tmp_path / "dead", kill)
    options = {"metric": metric, "sparsity": 0.25, "allocation": "uniform"}
    prune(source, tmp_path / "out", **options)
    alive = [tuple(i for i in range(HIDDEN) if i not in dead[block].tolist()) for block in range(3)]
    assert channels(tmp_path / "out") == alive
    prune(source, tmp_path / "masked", format="masked", **options)
    assert torch.equal(logits(tmp_path / "masked"), logits(source))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "part"),
    [*itertools.product(BY_OUTPUT, ["down"]), *itertools.product(BY_INPUT, ["up"])],
    ids=lambda value: str(value),
)
def test_channels_that_write_or_read_nothing_go_first(model_dir, tmp_path, metric, part):
    gone = [3, 20, 21, 40]

    def kill(tensors):
        for block in range(3):
            _, up, down = ffn(tensors, block)
            (up if part == "up" else down.T)[gone] = 0.0

    source = changed(model_dir, tmp_path / "dead", kill)
    prune(source, tmp_path / "out", metric=metric, sparsity=4 / HIDDEN, allocation="uniform")
    assert channels(tmp_path / "out") == [tuple(i for i in range(HIDDEN) if i not in gone)] * 3


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
@settings(deadline=None)
def test_of_equal_scores_the_first_stay_and_exactly_so_many(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    slow = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
    assert cfsp.highest(torch.tensor(scores, dtype=torch.float32), count) == tuple(slow)


def test_permuted_channels_are_the_same_channels(model_dir, tmp_path):
    order = {block: torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(block)) for block in range(3)}

    def permute(tensors):
        for block, order_D in order.items():
            for role in ("gate", "up", "down"):
                name = f"model.layers.{block}.mlp.{role}_proj.weight"
                tensors[name] = tensors[name][:, order_D] if role == "down" else tensors[name][order_D]

    source = changed(model_dir, tmp_path / "permuted", permute)
    for model, out in ((model_dir, "one"), (source, "two")):
        prune(model, tmp_path / out)
    for block, (one, two) in enumerate(zip(channels(tmp_path / "one"), channels(tmp_path / "two"), strict=True)):
        assert sorted(order[block][list(two)].tolist()) == list(one)
    torch.testing.assert_close(logits(tmp_path / "one"), logits(tmp_path / "two"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["wanda_sp", "out_energy", "wifv", "act"])
def test_moving_scale_from_up_to_down_changes_no_score_but_acts(model_dir, ids_NT, tmp_path, metric):
    scale_D = 2.0 ** torch.randint(-3, 4, (HIDDEN,), generator=torch.Generator().manual_seed(0))

    def rescale(tensors):
        for block in range(3):
            _, up, down = ffn(tensors, block)
            up *= scale_D[:, None]
            down /= scale_D

    source = changed(model_dir, tmp_path / "scaled", rescale)
    recipe = Recipe(model="tiny", method="cfsp", metric=metric)
    one, two = (torch.stack(cfsp.looked_at(Stream(Skeleton(model), ids_NT), recipe)[1]) for model in (model_dir, source))
    torch.testing.assert_close(two, one * scale_D if metric == "act" else one, rtol=1e-5, atol=0)


def test_the_same_tokens_again_change_neither_importance_nor_plan(model_dir, ids_NT):
    recipe, skeleton = Recipe(model="tiny", method="cfsp", sparsity=0.5, compensate="none"), Skeleton(model_dir)
    once, often = (cfsp.looked_at(Stream(skeleton, ids), recipe) for ids in (ids_NT, ids_NT.repeat(8, 1)))
    assert often[0] == pytest.approx(once[0], rel=1e-12)
    torch.testing.assert_close(torch.stack(often[1]), torch.stack(once[1]), rtol=1e-6, atol=0)
    assert cfsp.chosen(skeleton, recipe, *once[:2]) == cfsp.chosen(skeleton, recipe, *often[:2])


@pytest.mark.parametrize("compensate", ["none", "bias"])
def test_micro_batches_do_not_change_a_byte(model_dir, tmp_path, compensate):
    for micro_batch in (1, 3, 8):
        prune(model_dir, tmp_path / str(micro_batch), micro_batch=micro_batch, compensate=compensate)
    shards = [{file.name: file.read_bytes() for file in folder.glob("*.safetensors")} for folder in tmp_path.iterdir()]
    assert shards[0] == shards[1] == shards[2]


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "multiple"), [(0.0, 8), (0.013, 1), (0.37, 8), (0.5, 3), (0.8, 8), (0.95, 1)])
def test_widths_meet_the_budget_to_half_a_unit_and_parameters_are_counted(model_dir, tmp_path, sparsity, multiple):
    record = prune(model_dir, tmp_path / "out", sparsity=sparsity, multiple_of=multiple).record
    found = widths(tmp_path / "out")
    assert abs(sum(found) - (1 - sparsity) * 3 * HIDDEN) <= multiple / 2
    assert all(width % multiple == 0 or width == HIDDEN for width in found)
    assert min(found) >= multiple
    stored = sum(tensor.numel() for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values())
    dense = sum(tensor.numel() for tensor in load_file(model_dir / "model.safetensors").values())
    assert stored == dense - 3 * 36 * (3 * HIDDEN - sum(found))
    assert record["parameters"]["stored"] == stored
    assert record["parameters"]["zero"] == dense - stored
    assert sum(p.numel() for p in llmprune.load(tmp_path / "out").parameters()) == stored


def test_nothing_to_remove_leaves_every_weight_and_the_configuration(model_dir, tmp_path):
    for compensate in ("none", "lstsq"):
        prune(model_dir, tmp_path / compensate, sparsity=0.0, compensate=compensate)
        dense, out = load_file(model_dir / "model.safetensors"), Checkpoint.open(tmp_path / compensate)
        assert dense.keys() == out.entries.keys()
        for name, tensor in dense.items():
            torch.testing.assert_close(out.read(name), tensor, rtol=0, atol=0 if compensate == "none" else 1e-4)
        assert json.loads((tmp_path / compensate / "config.json").read_text())["model_type"] == "llama"


def test_a_share_of_the_model_and_a_number_of_parameters_are_met_to_a_channel(model_dir, tmp_path):
    dense = sum(tensor.numel() for tensor in load_file(model_dir / "model.safetensors").values())
    half_a_unit = 3 * 36 / 2
    for name, options, wanted in (
        ("of", {"of": "model", "sparsity": 0.2}, 0.8 * dense),
        ("target", {"target_params": "0.04M", "sparsity": None}, 40_000),
        ("plain", {"target_params": "35000", "sparsity": None}, 35_000),
    ):
        record = prune(model_dir, tmp_path / name, **options).record
        assert abs(record["parameters"]["stored"] - wanted) <= half_a_unit


# Compensation -------------------------------------------------------------------------------------------------------


def test_a_bias_makes_up_exactly_for_channels_that_are_constant(tmp_path):
    build("llama", tmp_path / "model", mlp_bias=True)
    gone = [0, 7, 30, 51]

    def fix(tensors):
        for block in range(3):
            for role, value in (("gate", 1.5), ("up", 0.7)):
                tensors[f"model.layers.{block}.mlp.{role}_proj.weight"][gone] = 0.0
                tensors[f"model.layers.{block}.mlp.{role}_proj.bias"][gone] = value

    source = changed(tmp_path / "model", tmp_path / "constant", fix)
    options = {"metric": "wifv", "sparsity": 4 / HIDDEN, "allocation": "uniform"}
    for compensate in ("bias", "none"):
        prune(source, tmp_path / compensate, compensate=compensate, **options)
        assert channels(tmp_path / compensate) == [tuple(i for i in range(HIDDEN) if i not in gone)] * 3
    torch.testing.assert_close(logits(tmp_path / "bias"), logits(source), rtol=1e-4, atol=1e-4)
    assert (logits(tmp_path / "none") - logits(source)).abs().max() > 0.01
    down, bias = (
        load_file(source / "model.safetensors")[f"model.layers.1.mlp.down_proj.{leaf}"] for leaf in ("weight", "bias")
    )
    there = Checkpoint.open(tmp_path / "bias").read("model.layers.1.mlp.down_proj.bias")
    constant = 0.7 * silu(torch.tensor(1.5))
    torch.testing.assert_close(there, bias + constant * down[:, gone].sum(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_bias_makes_up_for_constant_channels_of_other_families(tmp_path, family):
    build(family, tmp_path / "model")
    gone = [1, 2, 50]

    def fix(tensors):
        for name in [name for name in tensors if name.endswith(("fc1.weight", "c_fc.weight"))]:
            (tensors[name] if family == "opt" else tensors[name].T)[gone] = 0.0
            tensors[name.replace("weight", "bias")][gone] = 0.9

    source = changed(tmp_path / "model", tmp_path / "constant", fix)
    options = {"metric": "wifv", "sparsity": 3 / HIDDEN, "allocation": "uniform", "format": "masked"}
    for compensate in ("bias", "none"):
        prune(source, tmp_path / compensate, compensate=compensate, **options)
    torch.testing.assert_close(logits(tmp_path / "bias"), logits(source), rtol=1e-4, atol=1e-4)
    assert (logits(tmp_path / "none") - logits(source)).abs().max() > 0.01


def test_a_bias_keeps_the_mean_of_what_an_ffn_adds(model_dir, ids_NT, tmp_path):
    prune(model_dir, tmp_path / "out", compensate="bias")
    model, inputs, _ = seen(model_dir, ids_NT)
    out = Checkpoint.open(tmp_path / "out")
    kept = list(channels(tmp_path / "out")[0])
    weight, bias = (out.read(f"model.layers.0.mlp.down_proj.{leaf}").double() for leaf in ("weight", "bias"))
    dense_TJ = inputs[0] @ model.model.layers[0].mlp.down_proj.weight.T
    pruned_TJ = inputs[0][:, kept] @ weight.T + bias
    torch.testing.assert_close(pruned_TJ.mean(dim=0), dense_TJ.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_least_squares_recovers_what_channels_that_are_alike_gave(model_dir, tmp_path):
    half = HIDDEN // 2

    def double(tensors):
        for block in range(3):
            gate, up, _ = ffn(tensors, block)
            gate[half:], up[half:] = gate[:half], 2 * up[:half]

    source = changed(model_dir, tmp_path / "model", double)
    sizes = anatomy(AutoModelForCausalLM.from_pretrained(source).config)
    kept = [sizes.blocks[0].everything()] * 3
    kept = [type(one)(tuple(range(half)), one.heads) for one in kept]
    plan = Plan.of(sizes, kept, parent=Checkpoint.open(source).fingerprint()[:16], method="by hand")
    (tmp_path / "plan.json").write_text(plan.to_json())
    options = {"plan": tmp_path / "plan.json", "sparsity": None}
    prune(source, tmp_path / "lstsq", compensate="lstsq", damping=1e-6, **options)
    prune(source, tmp_path / "none", **options)
    assert channels(tmp_path / "lstsq") == channels(tmp_path / "none") == [tuple(range(half))] * 3
    away = {name: float((logits(tmp_path / name) - logits(source)).abs().max()) for name in ("lstsq", "none")}
    assert away["lstsq"] < 0.01 * away["none"]


def test_least_squares_minimise_the_damped_error_and_so_never_lose_more_than_weights_left_alone(model_dir, ids_NT, tmp_path):
    prune(model_dir, tmp_path / "lstsq", compensate="lstsq", damping=0.1)
    model, inputs, _ = seen(model_dir, ids_NT)
    kept = list(channels(tmp_path / "lstsq")[0])
    dense_JD = model.model.layers[0].mlp.down_proj.weight
    fitted_JK = Checkpoint.open(tmp_path / "lstsq").read("model.layers.0.mlp.down_proj.weight").double()
    hessian_DD = inputs[0].T @ inputs[0] / len(inputs[0])
    hessian_DD = 0.9 * hessian_DD + 0.1 * hessian_DD.diagonal().diag()
    slow_JK = torch.linalg.solve(hessian_DD[kept][:, kept], hessian_DD[kept] @ dense_JD.T).T
    torch.testing.assert_close(fitted_JK, slow_JK, rtol=1e-3, atol=1e-4)

    def loss(weight_JK):
        error_JD = dense_JD.clone()
        error_JD[:, kept] -= weight_JK
        return float((error_JD @ hessian_DD * error_JD).sum())

    assert loss(fitted_JK) < 0.99 * loss(dense_JD[:, kept])


# On the disk --------------------------------------------------------------------------------------------------------


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "llmprune" not in sys.modules
for compensate in ("none", "lstsq"):
    found = {}
    for name in ("auto", "padded", "masked"):
        folder = f"{compensate}/{name}"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=name == "auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        batch = tokenizer(["a", "a longer text"], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
            found[name] = model(**batch).logits[batch.attention_mask.bool()], out
    for name in ("padded", "masked"):
        torch.testing.assert_close(found[name][0], found["auto"][0], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[name][1], found["auto"][1])
    try:
        AutoModelForCausalLM.from_pretrained(f"{compensate}/auto", trust_remote_code=False)
    except ValueError as error:
        print(compensate, "trust_remote_code" in str(error))
"""


@pytest.fixture(scope="module")
def formats(model_dir, tmp_path_factory, run_python):
    """A folder of models in every format, and what a process without llmprune says of them."""
    folder = tmp_path_factory.mktemp("formats")
    for compensate in ("none", "lstsq"):
        for format in ("auto", "padded", "masked"):
            prune(model_dir, folder / compensate / format, format=format, compensate=compensate)
    return folder, run_python(FRESH, cwd=folder).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("compensate", ["none", "lstsq"])
def test_all_formats_are_one_model_in_a_process_without_llmprune(formats, compensate):
    folder, said = formats
    auto, padded, masked = (channels(folder / compensate / format) for format in ("auto", "padded", "masked"))
    assert auto == padded == masked
    assert any(line.endswith(f"{compensate} True") for line in said)


@pytest.mark.parametrize("family", ["llama_tied", "mistral", "qwen2", "qwen3"])
def test_every_family_that_can_be_smaller_is_the_masked_model(tmp_path, family):
    build(family, tmp_path / "model")
    for format in ("auto", "masked"):
        prune(tmp_path / "model", tmp_path / format, format=format, dtype="float32")
        assert verify(tmp_path / format) == []
    torch.testing.assert_close(logits(tmp_path / "auto"), logits(tmp_path / "masked"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("compensate", ["none", "lstsq"])
def test_a_masked_model_of_any_family_is_the_dense_one_without_its_channels(tmp_path, family, compensate):
    build(family, tmp_path / "model")
    prune(tmp_path / "model", tmp_path / "out", format="masked", compensate=compensate)
    assert verify(tmp_path / "out") == []
    assert sum(widths(tmp_path / "out")) == 3 * HIDDEN // 2
    if compensate == "none":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        path = "model.decoder.layers" if family == "opt" else BLOCKS[family]
        down = {"opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}.get(family, "mlp.down_proj")
        for block, kept in zip(model.get_submodule(path), channels(tmp_path / "out"), strict=True):
            keep_D = torch.zeros(HIDDEN).index_fill(0, torch.tensor(kept), 1.0)
            block.get_submodule(down).register_forward_pre_hook(lambda _, args, keep_D=keep_D: (args[0] * keep_D,))
        with torch.no_grad():
            expected = model(tokens(seed=1)[:2]).logits
        torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", ["cfsp", "wanda", "sparsegpt"])
def test_a_model_of_uneven_widths_is_pruned_again(model_dir, tmp_path, again):
    prune(model_dir, tmp_path / "once", sparsity=0.3)
    first = widths(tmp_path / "once")
    assert len(set(first)) > 1
    options = {"calibration": "random", "samples": 8, "seqlen": 24, "sparsity": 0.5, "output": tmp_path / "twice"}
    record = llmprune.prune(str(tmp_path / "once"), method=again, **options).record
    assert verify(tmp_path / "twice") == []
    model = llmprune.load(tmp_path / "twice")
    second = [block.mlp.down_proj.in_features for block in model.model.layers]
    if again == "cfsp":
        assert sum(second) == pytest.approx(sum(first) / 2, abs=0.5)
        assert [sizes.channels for sizes in plan_of(tmp_path / "twice").sizes] == first
    else:
        assert second == first
        assert record["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert torch.isfinite(logits(tmp_path / "twice")).all()


def test_a_smaller_model_is_measured_block_by_block_as_it_is_whole(model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 4)
    record = prune(model_dir, tmp_path / "out", evaluate=str(tmp_path / "text.txt")).record
    text = calibration.evaluation_set(
        str(tmp_path / "text.txt"), llmprune.models.load_tokenizer(model_dir), seqlen=24, windows=32, vocab_size=263
    )
    assert text.sha256 == record["perplexity"]["tokens_sha256"]
    for folder, key in ((model_dir, "dense"), (tmp_path / "out", "pruned")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            losses = [model(ids_T[None], labels=ids_T[None]).loss for ids_T in text.ids_NT]
        assert record["perplexity"][key] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


# The run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"q_proj": 8 * 3, "down_proj": 8 * 3}),
        ({"compensate": "bias"}, {"q_proj": 8 * 3, "down_proj": 8 * 3}),
        # Once more, but nobody needs what the last block gives.
        ({"compensate": "lstsq", "damping": 0.1}, {"q_proj": 2 * 8 * 3, "down_proj": 8 * 3 + 8 * 2}),
    ],
    ids=["none", "bias", "lstsq"],
)
def test_the_dense_model_runs_once_and_once_more_for_least_squares(model_dir, ids_NT, options, expected):
    skeleton, calls = Skeleton(model_dir), Counter()
    for linear in skeleton.all_linears():
        linear.module.register_forward_hook(lambda *_, name=linear.name: calls.update([name.rsplit(".", 1)[1]]))
    recipe = Recipe(**{"model": "tiny", "method": "cfsp", "compensate": "none", **options})
    cfsp.prune(Stream(skeleton, ids_NT, sequential="sublayer"), recipe)
    assert {name: calls[name] for name in expected} == expected


@pytest.mark.parametrize(
    "options", [{}, {"format": "padded"}, {"compensate": "lstsq", "format": "padded"}, {"compensate": "bias"}], ids=str
)
@pytest.mark.parametrize("fails_at", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes_and_looks_only_once(model_dir, tmp_path, monkeypatch, options, fails_at):
    prune(model_dir, tmp_path / "whole", **options)
    with no_room_for(block=fails_at):
        prune(model_dir, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(cfsp, "score", None)  # what was seen has been kept
        prune(model_dir, tmp_path / "out", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


KILLED = {
    "bias": {"compensate": "bias"},
    "padded": {"compensate": "lstsq", "format": "padded"},
    "dense": {"compensate": "lstsq", "match": "dense"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(model_dir, tmp_path, case):
    kills = os.environ.get("LLMPRUNE_KILLS", "2")
    recipe = json.dumps({**OPTIONS, **KILLED[case]})
    process = forked.python(HARNESS, model_dir, tmp_path, "--kills", kills, "--recipe", recipe)
    counts, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert json.loads(counts)["kills"] == int(kills)


@pytest.mark.slow
@pytest.mark.parametrize("compensate", ["none", "lstsq"])
def test_two_ranks_write_the_plan_of_one(model_dir, tmp_path, compensate):
    prune(model_dir, tmp_path / "one", compensate=compensate)
    flags = [f"--{key}={value}" for key, value in {**OPTIONS, "compensate": compensate}.items()]
    codes, errors = forked.ranks(*[["prune", "--model", model_dir, "--output", tmp_path / "two", *flags]] * 2)
    assert codes == [0, 0], errors
    assert (tmp_path / "two" / PLAN).read_text() == (tmp_path / "one" / PLAN).read_text()
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    assert one.entries.keys() == two.entries.keys()
    for name in one.entries:
        torch.testing.assert_close(two.read(name), one.read(name), rtol=0, atol=0 if compensate == "none" else 1e-4)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sparsity=0.999"], "0 units cannot be shared among 3 blocks"),
        (["--sparsity=0.9", "--multiple-of=16"], "keep at least 1 each"),
        (["--multiple-of=64"], "cannot keep a multiple of 64"),
        (["--multiple-of=0"], "multiple_of"),
        (["--sparsity=1"], "outside [0, 1)"),
        (["--sparsity=0.5", "--of=model"], "can remove 95% of"),
        (["--target-params=many"], "--target-params 'many' is no number of parameters"),
        (["--target-params=-5M"], "--target-params '-5M' is no number of parameters"),
        (["--target-params=1B"], "not within the 0.0 M parameters"),
        (["--target-params=0"], "not within the 0.0 M parameters"),
        (["--target-params=40k", "--sparsity=0.5"], "give one of them"),
        (["--target-params=1k"], "can remove 95% of"),
        (["--pattern=2:4"], "--pattern 2:4 is about single weights"),
        (["--group=row"], "--group row is about single weights"),
        (["--refine=dsnot"], "--refine dsnot is about single weights"),
        (["--reconstruct=lstsq"], "--reconstruct lstsq is about single weights"),
        (["--allocation=owl"], "not by owl"),
        (["--metric=best"], "metric"),
        (["--heads=q_balanced"], "--heads q_balanced has no effect"),
        (["--type-coupling=joint"], "--type-coupling joint has no effect"),
        (["--compensate=bias", "--format=padded"], "no bias in the FFN"),
        (["--method=wanda", "--metric=rel"], "for methods that remove channels or heads"),
        (["--method=wanda", "--format=masked"], "for methods that remove channels or heads"),
        (["--method=wanda", "--target-params=40k"], "for methods that remove channels or heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(model_dir, tmp_path, flags, words):
    outcome = refused(model_dir, tmp_path, *flags)
    assert words in outcome.err


def refused(model, folder, *flags):
    options = ["--calibration=random", "--samples=2", "--seqlen=8", "-q", "--output", folder / "out"]
    outcome = in_process.llmprune("prune", "--model", model, "--method=cfsp", *options, *flags)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert not (folder / "out" / "config.json").exists()
    return outcome


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
@pytest.mark.parametrize("format", ["auto", "padded"])
def test_families_that_cannot_be_smaller_are_named_and_offered_masks(tmp_path, family, format):
    outcome = refused(build(family, tmp_path / "model"), tmp_path, f"--format={format}")
    assert f"Architecture '{family}' cannot be stored with fewer channels or heads" in outcome.err
    assert "--format masked" in outcome.err
