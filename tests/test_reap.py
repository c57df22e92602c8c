"""REAP from recipe to directory: saliencies against a slow loop, the model that is left, budgets, resumption, bad input."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import in_process
import pytest
import torch
from checkpoints import changed, no_room_for, tensors
from crash_harness import digests
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import DATA, built_once, tokens
from records import amend
from tiny import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from llmprune.checkpoint import hash_file
from llmprune.errors import LLMPruneError
from llmprune.expert_surgery import ExpertPlan, KeptExperts
from llmprune.methods import reap
from llmprune.mixture import Mixture, mixture_of
from llmprune.models import Skeleton
from llmprune.recipe import Recipe
from llmprune.report import write_report
from llmprune.stream import Stream
from llmprune.structure import PLAN
from llmprune.verify import read_record, verify

OPTIONS = {"method": "reap", **DATA, "sparsity": 0.5}
# Routers of every kind: weights that are normalised among a token's experts or not, a choice among groups first, and scores
# that are corrected.
FAMILIES = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6},
    "olmoe": {"num_experts": 6, "norm_topk_prob": False},
    "deepseek_v2": {"n_routed_experts": 8, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v3": {"n_routed_experts": 8},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a family's tiny model, and of what half of its experts leave."""
    return built_once(tmp_path_factory.mktemp("models"), FAMILIES, prune)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def prune(model, output, **options):
    return llmprune.prune(str(model), output=output, **{**OPTIONS, **options})


def kept_of(folder):
    """The numbers of the experts that stay, by block."""
    plan = ExpertPlan.from_json((folder / PLAN).read_text())
    return {block: kept.experts for block, kept in zip(plan.mixture.blocks, plan.blocks, strict=True)}


def fused(model):
    """The layers of experts of a model of transformers, by block."""
    blocks = enumerate(model.model.layers)
    return {index: block.mlp for index, block in blocks if hasattr(block.mlp, "experts")}


def resident(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


# Saliency -----------------------------------------------------------------------------------------------------------


def slow_saliency(folder, ids_NT):
    """Token by token and expert by expert, from the stock model's fused matrices: tokens and saliencies by block."""
    model, found = resident(folder), {}

    def see(module, args, block):
        hidden_NI, chosen_NK, weight_NK = args[0].double(), *args[1:]
        count = len(module.down_proj)
        tokens_E, sums_E = [0] * count, [0.0] * count
        for token in range(len(hidden_NI)):
            for expert, weight in zip(chosen_NK[token].tolist(), weight_NK[token].tolist(), strict=True):
                gate_F, up_F = (module.gate_up_proj[expert].double() @ hidden_NI[token]).chunk(2)
                output_O = module.down_proj[expert].double() @ (module.act_fn(gate_F) * up_F)
                tokens_E[expert] += 1
                sums_E[expert] += weight * float(output_O.square().sum()) ** 0.5
        found[block] = tokens_E, [total / max(n, 1) for total, n in zip(sums_E, tokens_E, strict=True)]

    for block, layer in fused(model).items():
        layer.experts.register_forward_pre_hook(lambda module, args, block=block: see(module, args, block))
    model(ids_NT)
    return found


def test_saliency_is_the_mean_of_router_weight_times_output_norm_over_an_experts_tokens(models, family):
    blocks = read_record(models(family, pruned=True))["blocks"]
    slow = slow_saliency(models(family), tokens())
    assert [index for index, block in enumerate(blocks) if "experts" in block] == list(slow)
    for index, (tokens_E, saliency_E) in slow.items():
        noted = blocks[index]["experts"]
        assert noted["tokens"] == tokens_E
        assert noted["saliency"] == pytest.approx(saliency_E, rel=1e-4)
        groups = 2 if family.startswith("deepseek") else 1
        size = len(tokens_E) // groups
        expected = []
        for first in range(0, len(tokens_E), size):
            group = sorted(range(first, first + size), key=lambda expert: -saliency_E[expert])
            expected += sorted(group[: size // 2])
        assert noted["kept"] == list(kept_of(models(family, pruned=True))[index]) == expected


def test_an_expert_without_tokens_scores_zero_goes_first_and_is_named(models, tmp_path):
    def starve(held):
        held["model.layers.1.mlp.gate.e_score_correction_bias"][[2, 5]] = -100.0

    source = changed(models("deepseek_v3"), tmp_path / "model", starve)
    prune(source, tmp_path / "out", sparsity=0.25)
    noted = read_record(tmp_path / "out")["blocks"][1]["experts"]
    assert [noted["tokens"][i] for i in (2, 5)] == [0, 0]
    assert [noted["saliency"][i] for i in (2, 5)] == [0.0, 0.0]
    assert noted["kept"] == [0, 1, 3, 4, 6, 7]
    assert "no token went to 2, 5" in write_report(tmp_path / "out").read_text()


def test_baselines_count_tokens_or_draw_by_the_seed(models, tmp_path):
    for name, options in (
        ("frequency", {"metric": "frequency"}),
        ("one", {"metric": "random", "seed": 1}),
        ("again", {"metric": "random", "seed": 1, "micro_batch": 5}),
        ("two", {"metric": "random", "seed": 2}),
    ):
        prune(models("mixtral"), tmp_path / name, **options)
    for block, kept in kept_of(tmp_path / "frequency").items():
        tokens_E = read_record(tmp_path / "frequency")["blocks"][block]["experts"]["tokens"]
        assert kept == tuple(sorted(sorted(range(6), key=lambda expert: -tokens_E[expert])[:3]))
    assert kept_of(tmp_path / "one") == kept_of(tmp_path / "again") != kept_of(tmp_path / "two")
    assert len(set(kept_of(tmp_path / "one").values())) > 1


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.data())
@settings(deadline=None, max_examples=50)
def test_of_equal_experts_the_first_go(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    gone = reap.lowest(torch.tensor([scores], dtype=torch.float64), count)[0].nonzero().flatten().tolist()
    assert gone == sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_micro_batches_do_not_change_a_byte(models, tmp_path, name):
    for micro_batch in (1, 4):
        prune(models(name), tmp_path / str(micro_batch), micro_batch=micro_batch)
    one, four = (read_record(tmp_path / str(n)) for n in (1, 4))
    assert one["blocks"] == four["blocks"]
    assert one["shards"] == four["shards"]


def test_the_dense_model_runs_once(models):
    skeleton, calls = Skeleton(models("qwen3_moe")), []
    for linear in skeleton.all_linears():
        linear.module.register_forward_hook(lambda *_, name=linear.place: calls.append(name))
    recipe = Recipe(model="tiny", method="reap")
    reap.prune(Stream(skeleton, tokens(), micro_batch=6, propagate="dense"), recipe)
    assert calls.count("self_attn.q_proj") == 3
    assert calls.count("mlp.experts.5.down_proj") == 2


# What is left -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without(model, kept_B):
    """Inside, the dense model's router logits of the experts that are gone are minus infinity."""
    linear = nn.functional.linear
    for block, layer in fused(model).items():
        gone = torch.tensor(sorted(set(range(len(layer.experts.down_proj))) - set(kept_B[block])))
        if hasattr(layer.gate, "e_score_correction_bias"):  # what it corrects is no logit, so it would choose them still
            layer.gate.e_score_correction_bias[gone] = -torch.inf

        def run(hidden, gone=gone, forward=layer.gate.forward):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nn.functional, "linear", lambda x, w: linear(x, w).index_fill(-1, gone, -torch.inf))
                return forward(hidden)

        layer.gate.forward = run
    yield


def test_the_result_is_the_dense_model_whose_router_cannot_choose_what_is_gone(models, family):
    folder, ids_NT = models(family, pruned=True), tokens(seed=1)
    dense = resident(models(family))
    before = dense(ids_NT).logits
    with without(dense, kept_of(folder)):
        expected = dense(ids_NT).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(resident(folder)(ids_NT).logits, expected, rtol=1e-4, atol=1e-4)


def test_tensors_are_the_dense_models_bytes_under_the_keys_that_stock_code_writes(models, family, tmp_path):
    folder, kept_B = models(family, pruned=True), kept_of(models(family, pruned=True))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path)
    dense, out = tensors(models(family)), tensors(folder)
    assert {name: tensor.shape for name, tensor in out.items()} == {name: t.shape for name, t in tensors(tmp_path).items()}
    assert len(out) < len(dense)
    for name, tensor in out.items():
        expected = dense.get(name)
        if ".experts." in name:
            left, right = name.split(".experts.")
            block, (number, part) = int(left.split(".")[2]), right.split(".", 1)
            expected = dense[f"{left}.experts.{kept_B[block][int(number)]}.{part}"]
        elif ".gate." in name:
            expected = dense[name][list(kept_B[int(name.split(".")[2])])]
        assert torch.equal(tensor, expected), name


def test_the_result_is_verified_reported_measured_and_pruned_again(models, tmp_path):
    (tmp_path / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 4)
    record = prune(models("mixtral"), tmp_path / "out", evaluate=str(tmp_path / "text.txt")).record
    outcome = in_process.llmprune("verify", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "as planned (experts 18 → 9)" in outcome.out
    assert record["kept"] == {"experts": [3, 3, 3]}
    assert record["parameters"]["zero"] == record["parameters"]["total"] - record["parameters"]["stored"]
    assert record["sparsity"] == 0.5
    assert record["perplexity"]["pruned"] != record["perplexity"]["dense"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| experts | 18 | 9 | -50.0 % |" in card
    assert "a token still goes through as many" in card
    page = write_report(tmp_path / "out").read_text()
    assert "What every expert adds" in page
    prune(tmp_path / "out", tmp_path / "twice", sparsity=0.34)
    assert verify(tmp_path / "twice") == []
    assert len(kept_of(tmp_path / "twice")[0]) == 2
    prune(tmp_path / "out", tmp_path / "wanda", method="wanda")
    assert verify(tmp_path / "wanda") == []


def test_where_nothing_was_removed_nothing_is_said_to_be_smaller(models, tmp_path):
    record = prune(models("mixtral"), tmp_path / "out", sparsity=0.0).record
    assert record["kept"] == {}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No expert was removed" in card
    assert "smaller on disk" not in card


def test_what_does_not_agree_with_the_plan_is_named(models, tmp_path):
    def edited(name, file, edit):
        folder = shutil.copytree(models("mixtral", pruned=True), tmp_path / name)
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))
        amend(folder, copied={**read_record(folder)["copied"], file: hash_file(folder / file)})
        return " ".join(verify(folder))

    def other(content):
        content["blocks"][1]["experts"] = [0, 1]

    def wide(content):
        content["mixture"]["experts"] = 9
        for kept in content["blocks"]:
            kept["experts"] = [0, 1, 2, 8]

    assert "different numbers of experts" in edited("other", PLAN, other)
    assert "3 experts of 52 channels, not 4 of 52" in edited("wide", PLAN, wide)
    assert "[2, 36]" in edited("config", "config.json", lambda content: content.update(num_local_experts=2))


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([KeptExperts((0, 1))], "1 of 2 blocks"),
        ([KeptExperts((0, 1)), KeptExperts((0,))], "different numbers"),
        ([KeptExperts((1, 0)), KeptExperts((0, 1))], "not ascending"),
        ([KeptExperts((0, 4)), KeptExperts((0, 1))], "below 4"),
        ([KeptExperts((0,), ((0, 9),)), KeptExperts((0,), ((0, 1),))], "below 8"),
        ([KeptExperts((0,), ((0,), (1,))), KeptExperts((0,), ((0,),))], "every expert of block 1"),
        ([KeptExperts((0, 1), ((0,), (1, 2))), KeptExperts((0, 1), ((0,), (1, 2)))], "different numbers"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_sentence(kept, words):
    mixture = Mixture("mixtral", 16, (1, 3), 4, 8, 0, 2, 1, 2)
    with pytest.raises(LLMPruneError, match=words) as caught:
        ExpertPlan("abc", mixture, tuple(kept), "reap")
    assert "\n" not in str(caught.value)
    whole = ExpertPlan("abc", mixture, (KeptExperts((0, 3)), KeptExperts((1, 2))), "reap")
    assert ExpertPlan.from_json(whole.to_json()) == whole
    with pytest.raises(LLMPruneError, match="make it anew"):
        ExpertPlan.from_json(whole.to_json()[:-20])


# Budgets ------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 64), st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(0, 100))
@settings(deadline=None)
def test_experts_go_by_the_share_rounded_down_equally_from_every_group_or_the_share_is_refused(size, groups, fewest, percent):
    mixture = Mixture("m", 8, (0,), size * groups, 4, 0, 2, groups, min(fewest, size))
    expected = mixture.experts * percent // 100
    possible = expected % groups == 0 and mixture.experts - expected >= mixture.fewest * groups and (expected or not percent)
    try:
        left = mixture.without_experts(percent / 100)
    except LLMPruneError as error:
        assert not possible
        advice = str(error).rpartition("--sparsity ")[2].rstrip(".")
        # What is advised works, unless nothing does.
        if size > mixture.fewest:
            mixture.without_experts(float(advice))
    else:
        assert possible
        assert left.experts == mixture.experts - expected


def test_a_number_of_parameters_is_met_from_below_by_as_few_experts_as_can_be(models, tmp_path):
    dense = mixture_of(Skeleton(models("mixtral")))
    total = read_record(models("mixtral", pruned=True))["parameters"]["total"]
    expert = len(dense.blocks) * dense.expert_parameters()
    for name, options in (
        ("target", {"target_params": f"{total - 2 * expert + 1}", "sparsity": None}),
        ("exact", {"target_params": f"{total - 2 * expert}", "sparsity": None}),
        ("of", {"of": "model", "sparsity": 1.9 * expert / total}),
    ):
        assert prune(models("mixtral"), tmp_path / name, **options).record["parameters"]["stored"] == total - 2 * expert


# The run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes(models, tmp_path, fails_at):
    with no_room_for(block=fails_at):
        prune(models("deepseek_v3"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    prune(models("deepseek_v3"), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(models("deepseek_v3", pruned=True))
    assert read_record(tmp_path / "out")["blocks"] == read_record(models("deepseek_v3", pruned=True))["blocks"]


def test_a_plan_of_the_cost_counts_what_is_left(models):
    for method in (["--method=reap"], ["--method=cfsp", "--allocation=uniform", "--compensate=none"]):
        flags = ["--calibration=random", "--samples=2", "--seqlen=8", "--sparsity=0.5"]
        outcome = in_process.llmprune("plan", "--model", models("mixtral"), *method, *flags)
        assert outcome.code == 0, outcome
        assert "1.00" in next(line for line in outcome.out.splitlines() if "forwards of the calibration" in line)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("mixtral", ["--sparsity=0.9"], "5 of 6 experts are to go, and the router needs 2"),
        ("mixtral", ["--sparsity=0.1"], "less than one of 6 experts: give --sparsity 0.1667"),
        ("deepseek_v3", ["--sparsity=0.4"], "cannot go equally from the 2 groups"),
        ("deepseek_v3", ["--sparsity=0.7"], "at most 4 can, --sparsity 0.5"),
        ("mixtral", ["--sparsity=0.65", "--of=model"], "--sparsity 0.6667 and without --of and --target-params"),
        ("mixtral", ["--pattern=2:4"], "removes whole experts"),
        ("mixtral", ["--metric=act"], "--metric act is none of --method reap's"),
        ("mixtral", ["--method=cfsp", "--metric=frequency"], "--metric frequency is none of --method cfsp's"),
        ("mixtral", ["--format=padded"], "--format padded has no effect with --method reap"),
        ("mixtral", ["--multiple-of=8"], "--multiple-of 8 has no effect with --method reap"),
        ("mixtral", ["--compensate=lstsq"], "--compensate lstsq has no effect with --method reap"),
        ("mixtral", ["--heads=q_balanced"], "--heads q_balanced has no effect with --method reap"),
        ("mixtral", ["--plan=plan.json"], "--plan plan.json has no effect with --method reap"),
        ("mixtral", ["--allocation=block-influence"], "by uniform, not by block-influence"),
        ("mixtral", ["--propagate=pruned"], "--method reap looks at the dense model"),
        ("mixtral", ["--pattern=2:4"], "--pattern 2:4 is about single weights"),
        ("mixtral", ["--of=model", "--sparsity=0.9"], "can remove 95% of"),
        ("mixtral", ["--method=tyr"], "use --method reap"),
        ("llama", [], "No block of this llama has experts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(models, tmp_path, name, flags, words):
    model = build("llama", tmp_path / "llama") if name == "llama" else models(name)
    options = ["--calibration=random", "--samples=2", "--seqlen=8", "-q", "--output", tmp_path / "out"]
    outcome = in_process.llmprune("prune", "--model", model, "--method=reap", *options, *flags)
    assert outcome.code == 2, outcome
    assert words in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert not Path(tmp_path / "out" / "config.json").exists()
