"""CFSP on experts: each keeps as many channels, its own by the tokens routed to it, and the model is the masked one."""

from __future__ import annotations

import json

import in_process
import pytest
import torch
from checkpoints import no_room_for, tensors
from crash_harness import digests
from mixtures import DATA, built_once, tokens
from safetensors.torch import load_file, save_file
from tiny import build
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from llmprune.expert_surgery import ExpertPlan
from llmprune.methods import cfsp
from llmprune.models import Skeleton
from llmprune.recipe import Recipe
from llmprune.stream import Stream
from llmprune.structure import PLAN
from llmprune.verify import read_record, verify

OPTIONS = {"method": "cfsp", **DATA, "sparsity": 0.5} | {
    "allocation": "uniform",
    "compensate": "none",
    "min_expert_tokens": 1,
}
FAMILIES = {
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
    "deepseek_v2": {"n_shared_experts": 2},
    "deepseek_v3": {},
}
# What half of the channels come to, in multiples of 8, and of those of the shared expert.
HALF = {"mixtral": (24, 0), "qwen3_moe": (16, 0), "qwen2_moe": (16, 24)} | {
    "deepseek_v2": (24, 48),
    "deepseek_v3": (24, 24),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a family's tiny model, and of what half of its experts' channels leave."""
    return built_once(tmp_path_factory.mktemp("models"), FAMILIES, prune)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def prune(model, output, **options):
    return llmprune.prune(str(model), output=output, **{**OPTIONS, **options})


def plan_of(folder):
    return ExpertPlan.from_json((folder / PLAN).read_text())


def kept_of(folder):
    """What every block with experts keeps, by its number."""
    plan = plan_of(folder)
    return dict(zip(plan.mixture.blocks, plan.blocks, strict=True))


def resident(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def shared_of(layer):
    return getattr(layer, "shared_experts", None) or getattr(layer, "shared_expert", None)


def gone(kept, size):
    return torch.tensor(sorted(set(range(size)) - set(kept)))


def test_the_result_is_the_dense_model_with_zeros_in_place_of_the_channels_that_are_gone(models, family):
    folder, ids_NT = models(family, pruned=True), tokens(seed=1)
    dense = resident(models(family))
    before = dense(ids_NT).logits
    for block, kept in kept_of(folder).items():
        layer = dense.model.layers[block].mlp
        for expert, channels in enumerate(kept.channels):
            layer.experts.down_proj[expert][:, gone(channels, layer.experts.down_proj.shape[2])] = 0.0
        if shared := shared_of(layer):
            shared.down_proj.weight[:, gone(kept.shared, shared.down_proj.in_features)] = 0.0
    expected = dense(ids_NT).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(resident(folder)(ids_NT).logits, expected, rtol=1e-5, atol=1e-5)


def test_channels_are_each_experts_own_by_the_tokens_that_were_routed_to_it(models, family):
    model, seen = resident(models(family)), {}

    def see(module, args, block):
        hidden_NI, chosen_NK, _ = args
        seen[block] = []
        for expert in range(len(module.down_proj)):
            routed_RI = hidden_NI[(chosen_NK == expert).any(dim=1)]
            gate_RF, up_RF = (routed_RI @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            seen[block].append((module.act_fn(gate_RF) * up_RF).square().mean(dim=0))

    for block in kept_of(models(family, pruned=True)):
        experts = model.model.layers[block].mlp.experts
        experts.register_forward_pre_hook(lambda module, args, block=block: see(module, args, block))
        if shared := shared_of(model.model.layers[block].mlp):
            shared.down_proj.register_forward_pre_hook(
                lambda _, args, block=block: seen.update({(block, "shared"): args[0].flatten(0, -2).square().mean(dim=0)})
            )
    model(tokens())
    width, shared_width = HALF[family]
    for block, kept in kept_of(models(family, pruned=True)).items():
        expected = [tuple(sorted((-score_F).argsort()[:width].tolist())) for score_F in seen[block]]
        assert list(kept.channels) == expected
        assert len(set(expected)) > 1
        if shared_width:
            assert kept.shared == tuple(sorted((-seen[block, "shared"]).argsort()[:shared_width].tolist()))
        else:
            assert kept.shared is None


def test_every_expert_is_scored_by_its_own_gate_and_up(models):
    skeleton = Skeleton(models("qwen2_moe"))
    found = {}
    for metric in ("rel", "act"):
        recipe = Recipe(model="tiny", method="cfsp", metric=metric, min_expert_tokens=1)
        found[metric], _ = cfsp.experts_looked_at(Stream(skeleton, tokens(), micro_batch=6), recipe)
    dense = tensors(models("qwen2_moe"))
    assert len(found["rel"]) == 3 * 5
    for name, score_D in found["rel"].items():
        place, _, _ = name.rpartition(".")
        gate_DJ, up_DJ, down_JD = (dense[f"{place}.{part}_proj.weight"].abs() for part in ("gate", "up", "down"))
        rms_D = found["act"][name]
        parts = [gate_DJ, up_DJ, down_JD.T * rms_D[:, None]]
        slow_D = rms_D * sum((part / part.sum(dim=0)).mean(dim=1) for part in parts)
        torch.testing.assert_close(score_D, slow_D, rtol=1e-4, atol=0)


def test_tensors_have_the_keys_and_shapes_that_stock_code_writes_and_all_others_their_bytes(models, family, tmp_path):
    folder = models(family, pruned=True)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path)
    dense, out = tensors(models(family)), tensors(folder)
    assert {name: tensor.shape for name, tensor in out.items()} == {name: t.shape for name, t in tensors(tmp_path).items()}
    narrower = {name for name, tensor in out.items() if tensor.shape != dense[name].shape}
    assert narrower == {name for name in dense if ".experts." in name or (".shared_expert" in name and "_gate" not in name)}
    assert all(torch.equal(out[name], dense[name]) for name in out.keys() - narrower)


def test_a_result_is_verified_and_its_budget_said(models, family):
    folder = models(family, pruned=True)
    assert verify(folder) == []
    record = read_record(folder)
    mixture = plan_of(folder).mixture
    width, shared = HALF[family]
    left = len(mixture.blocks) * (mixture.experts * width + shared)
    assert sum(record["kept"]["expert_ffn"]) == left
    whole = len(mixture.blocks) * (mixture.experts * mixture.width + mixture.shared)
    assert record["parameters"]["zero"] == 3 * 36 * (whole - left)
    stored = sum(tensor.numel() for tensor in tensors(models(family)).values())
    assert record["parameters"]["stored"] == stored - record["parameters"]["zero"]
    outcome = in_process.llmprune("verify", folder)
    assert f"as planned (experts' FFN channels {whole} → {left})" in outcome.out


def test_an_expert_without_tokens_is_narrowed_by_its_weights(models, tmp_path):
    build("deepseek_v3", tmp_path / "model", n_routed_experts=6, n_group=1)
    held = load_file(tmp_path / "model" / "model.safetensors")
    held["model.layers.2.mlp.gate.e_score_correction_bias"][4] = -100.0
    save_file(held, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    prune(tmp_path / "model", tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record["linears"]["model.layers.2.mlp.experts.4.down_proj"]["tokens"] == 0
    assert "expert 4 of block 2" in record["warnings"][0]
    norms_F = held["model.layers.2.mlp.experts.4.down_proj.weight"].norm(dim=0)
    assert kept_of(tmp_path / "out")[2].channels[4] == tuple(sorted((-norms_F).argsort()[:24].tolist()))


def test_micro_batches_do_not_change_a_byte(models, tmp_path):
    for micro_batch in (1, 4):
        prune(models("qwen2_moe"), tmp_path / str(micro_batch), micro_batch=micro_batch)
    assert read_record(tmp_path / "1")["shards"] == read_record(tmp_path / "4")["shards"]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_an_interrupted_run_goes_on_to_the_same_bytes_and_looks_only_once(models, tmp_path, monkeypatch, fails_at):
    with no_room_for(block=fails_at):
        prune(models("qwen2_moe"), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(cfsp, "score", None)  # what was seen has been kept
        prune(models("qwen2_moe"), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(models("qwen2_moe", pruned=True))


def test_a_model_in_16_bits_runs_in_stock_code_whatever_is_removed(tmp_path):
    sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48}
    build("mixtral", tmp_path / "model", dtype=torch.bfloat16, **sizes)
    for sparsity in (0.3, 0.6):
        folder = prune(tmp_path / "model", tmp_path / str(sparsity), sparsity=sparsity).directory
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert model(tokens()[:1]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--allocation=block-influence"], "give --allocation uniform --compensate none"),
        (["--compensate=lstsq"], "give --allocation uniform --compensate none"),
        (["--compensate=bias"], "give --allocation uniform --compensate none"),
        (["--format=masked"], "leave --format out"),
        (["--format=padded"], "leave --format out"),
        (["--heads=q_balanced"], "--heads q_balanced has no effect with --method cfsp"),
        (["--multiple-of=4"], "give a multiple of 8"),
        (["--multiple-of=64"], "cannot keep a multiple of 64"),
        (["--sparsity=0.99"], "keep at least 1 each"),
        (["--plan=plan.json"], "leave --plan out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(models, tmp_path, flags, words):
    options = [
        "--method=cfsp",
        "--allocation=uniform",
        "--compensate=none",
        "--calibration=random",
        "--samples=2",
        "--seqlen=8",
    ]
    own = [option for option in options if option.split("=")[0] not in " ".join(flags)]
    outcome = in_process.llmprune("prune", "--model", models("mixtral"), "-q", "--output", tmp_path / "out", *own, *flags)
    assert outcome.code == 2, outcome
    assert words in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_share_of_the_model_is_met_as_near_as_multiples_come(models, tmp_path):
    record = prune(models("mixtral"), tmp_path / "out", of="model", sparsity=0.4).record
    total, prunable = record["parameters"]["total"], record["parameters"]["prunable"]
    wanted = (1 - 0.4 * total / prunable) * 52
    width = plan_of(tmp_path / "out").left.width
    assert abs(width - wanted) <= 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == width
