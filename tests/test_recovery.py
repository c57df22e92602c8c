"""Recovery: what adapters compute, that masks survive the merge, the training loop, whole runs and how they are resumed."""

import hashlib
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from in_process import llmprune as command
from tiny import build, save_llama
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import card, cli, compare, record, recovery, training
from llmprune.adapters import GAIN, Adapters, Place
from llmprune.checkpoint import Checkpoint
from llmprune.cli import recover
from llmprune.errors import LLMPruneError
from llmprune.models import Skeleton
from llmprune.verify import read_record, verify

PRUNED = {"samples": 16, "seqlen": 16, "device": "cpu"}
SHORT = {"steps": 6, "batch_size": 4, "rank": 2, "learning_rate": 0.01, "samples": 16}

if not any(each.name == "recover" for each in cli.app.registered_commands):
    cli.app.command("recover")(recover.command)


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3, initializer_range=0.2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Something that can be learnt in a few steps: every token is followed by the next one."""
    file = tmp_path_factory.mktemp("text") / "ids.jsonl"
    rows = [{"input_ids": [(7 * row + token) % 61 for token in range(16)]} for row in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture(scope="module")
def pruned_dir(dense_dir, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("pruned") / "model"
    return llmprune.prune(str(dense_dir), method="wanda", sparsity=0.5, output=output, calibration=text, **PRUNED).directory


@pytest.fixture(scope="module")
def whole(pruned_dir, tmp_path_factory):
    """What an uninterrupted recovery gives."""
    result = recovery.recover(pruned_dir, output=tmp_path_factory.mktemp("whole") / "model", **SHORT)
    assert result.record["recovery"]["best_step"] > 0
    return result


def tensors_of(directory):
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def weights_of(directory):
    """The bytes of a model's shards."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob("*.safetensors")}


def loaded(directory, dtype=torch.float32):
    """A skeleton with all its weights in memory, and a batch for it."""
    skeleton = Skeleton(directory, dtype=dtype)
    trainer = training.Trainer.__new__(training.Trainer)
    trainer.skeleton = skeleton
    trainer._load()
    generator = torch.Generator().manual_seed(3)
    return skeleton, torch.randint(3, skeleton.vocab_size, (2, 12), generator=generator)


def with_adapters(skeleton, *, keeps_zeros, seed=0):
    """Adapters on every linear whose B is not zero."""
    places = [Place(linear, 1 + linear.block, keeps_zeros) for linear in skeleton.all_linears()]
    adapters = Adapters(places, seed=seed, device=torch.device("cpu"))
    for adapter in adapters.all:
        adapter.up_OR.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed + 1))
    return adapters


def trainer_of(directory, ids_NT, **options):
    chosen = recovery.request(**{"seqlen": ids_NT.shape[1], "batch_size": 4, "seed": 0, "rank": 2, **options})
    trainer = training.Trainer(Skeleton(directory), ids_NT, chosen, read_record(directory), lambda line: None)
    trainer._begin()
    trainer.adapters.install()
    return trainer


# Ranks ----------------------------------------------------------------------------------------------------------


@st.composite
def shares(draw):
    weights = draw(st.lists(st.floats(0, 1e3), min_size=1, max_size=40))
    rank = draw(st.integers(1, 16))
    return weights, rank, draw(st.integers(1, rank)), draw(st.integers(rank, 5 * rank))


@given(shares())
@example(([0.0, 1.0, 3.6e-120], 2, 1, 3))
@settings(deadline=None)
def test_ranks_sum_to_the_mean_rank_stay_within_bounds_and_follow_the_weights(case):
    weights, rank, least, most = case
    ranks = training.share_ranks(weights, rank=rank, least=least, most=most)
    assert sum(ranks) == rank * len(weights)
    assert all(least <= each <= most for each in ranks)
    # Sorted by weight, and of equals the lower index first, ranks only fall.
    order = sorted(range(len(weights)), key=lambda block: (-weights[block], block))
    assert [ranks[block] for block in order] == sorted(ranks, reverse=True)


def test_ranks_are_proportional_where_bounds_and_whole_numbers_allow_it():
    assert training.share_ranks([1, 2, 3, 6], rank=3, least=1, most=12) == [1, 2, 3, 6]
    assert training.share_ranks([0, 0, 0], rank=4, least=1, most=8) == [4, 4, 4]
    assert training.share_ranks([0, 0, 1], rank=4, least=2, most=6) == [3, 3, 6]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
@settings(max_examples=40, deadline=None)
def test_the_direction_decides_who_gets_more(importance):
    straight = training.weights_of(importance, [], "importance")
    order = sorted(range(len(importance)), key=importance.__getitem__)
    assert [straight[i] for i in order] == sorted(straight)
    inverse = training.weights_of(importance, [], "inverse")
    assert [inverse[i] for i in order] == sorted(inverse, reverse=True)
    assert training.weights_of(importance, importance, "pruned") == importance
    assert set(training.weights_of(importance, [], "uniform")) == {1.0}


# Adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_zeros", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_adapters_change_no_bit_of_the_logits(pruned_dir, keeps_zeros, dtype):
    skeleton, ids_BT = loaded(pruned_dir, dtype)
    before = skeleton.model(ids_BT).logits
    places = [Place(linear, 3, keeps_zeros) for linear in skeleton.all_linears()]
    adapters = Adapters(places, seed=0, device=torch.device("cpu"))
    adapters.install()
    assert torch.equal(skeleton.model(ids_BT).logits, before)
    assert all(adapter.down_RI.abs().max() > 0 for adapter in adapters.all)
    adapters.all[0].up_OR.data += 1
    assert not torch.equal(skeleton.model(ids_BT).logits, before)


@pytest.mark.parametrize("keeps_zeros", [True, False])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3"])
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path, variant, keeps_zeros):
    skeleton, ids_BT = loaded(build(variant, tmp_path, num_hidden_layers=2) if variant != "gpt2" else build(variant, tmp_path))
    for linear in skeleton.all_linears():
        linear.parameter.data[::2] = 0
    adapters = with_adapters(skeleton, keeps_zeros=keeps_zeros)
    adapters.install()
    adapted = skeleton.model(ids_BT).logits
    adapters.remove()
    plain = skeleton.model(ids_BT).logits
    for adapter in adapters.all:
        adapter.linear.parameter.data.copy_(adapter.merged(adapter.linear.parameter.data))
    merged = skeleton.model(ids_BT).logits
    assert (merged - plain).norm() > 0.01 * plain.norm()
    assert (merged - adapted).norm() <= 1e-5 * adapted.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_masked_adapter_are_those_of_the_plain_formula(bias):
    torch.manual_seed(0)
    module = torch.nn.Linear(7, 5, bias=bias)
    module.requires_grad_(False).weight[module.weight.abs() < 0.2] = 0
    inputs = torch.randn(2, 3, 7, requires_grad=True)
    linear = llmprune.models.Linear("linear", "q", 0, module, transposed=False)
    adapters = Adapters([Place(linear, 2, keeps_zeros=True)], seed=0, device=torch.device("cpu"))
    adapter = adapters.all[0]
    adapter.up_OR.data.normal_()

    found = adapter.run(inputs)
    found.square().sum().backward()
    gradients = [inputs.grad, adapter.down_RI.grad, adapter.up_OR.grad]

    reference = [each.detach().clone().requires_grad_() for each in (inputs, adapter.down_RI, adapter.up_OR)]
    weight = module.weight + GAIN * (reference[2] @ reference[1]) * (module.weight != 0)
    expected = torch.nn.functional.linear(reference[0], weight, module.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient, wanted.grad)
    # They were added up in the one vector that the optimiser reads.
    assert torch.equal(adapters.slopes_P, torch.cat([gradients[1].flatten(), gradients[2].flatten()]))


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_a_merge_keeps_zeros_plus_zero_and_makes_no_others(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    # Down to numbers that half precision has no room for.
    stored = torch.randn(6, 8, generator=generator) * 10.0 ** torch.randint(-8, 1, (6, 8), generator=generator)
    stored = (stored * (torch.rand(6, 8, generator=generator) < 0.5) + 0.0).to(dtype)
    zero = stored == 0
    stored = torch.where(zero, 0.0, stored)
    module = torch.nn.Linear(8, 6, bias=False).to(dtype)
    linear = llmprune.models.Linear("linear", "q", 0, module, transposed=False)
    adapter = Adapters([Place(linear, 1, keeps_zeros=True)], seed=seed, device=torch.device("cpu")).all[0]
    # Aims at taking some weights to exactly zero.
    adapter.down_RI.data.copy_(stored[:1].float())
    adapter.up_OR.data.fill_(0.25).mul_(torch.tensor([[-2.0], [0], [1], [1e-9], [-1], [3]]))
    merged = adapter.merged(stored)
    assert merged.dtype == dtype
    assert torch.equal(merged == 0, zero)
    assert not merged[zero].signbit().any()
    # A = the first row and g B = -1 there: the sum is zero, and the weight stays as it was.
    assert torch.equal(merged[0], stored[0])


# The loop -------------------------------------------------------------------------------------------------------


def test_every_training_sample_is_seen_once_before_any_is_seen_again_and_no_held_out_one_ever(pruned_dir):
    ids_NT = torch.arange(16 * 5).view(16, 5) % 61
    ids_NT[:, 0] = torch.arange(16)
    trainer = trainer_of(pruned_dir, ids_NT, batch_size=4)
    seen = [int(row[0]) for number in range(1, 15) for row in trainer._batch(number)]
    assert sorted(seen[:14]) == [number for number in range(16) if number % 8 != 7]
    assert all(sorted(seen[14 * turn : 14 * turn + 14]) == sorted(seen[:14]) for turn in range(4))
    assert seen[:14] != seen[14:28]
    assert trainer.held_out_NT[:, 0].tolist() == [7, 15]


def test_steps_are_those_of_torchs_adamw_with_clipped_gradients(pruned_dir, monkeypatch):
    trainer = trainer_of(pruned_dir, torch.randint(3, 61, (8, 6)), learning_rate=0.01)
    parameter = torch.nn.Parameter(trainer.adapters.values_P.clone())
    reference = torch.optim.AdamW([parameter], lr=0.01, betas=training.BETAS, eps=training.EPSILON, weight_decay=training.DECAY)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(parameter.shape, generator=generator) * 10.0 ** (power - 6) for power in range(8)]

    def differentiate(ids_BT):
        trainer.adapters.slopes_P.copy_(gradients[number - 1])
        return 1.0

    monkeypatch.setattr(trainer, "_differentiate", differentiate)
    for number, gradient in enumerate(gradients, 1):
        trainer._step(number, len(gradients))
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], training.CLIP)
        reference.param_groups[0]["lr"] = 0.01 * training.schedule(number, len(gradients))
        reference.step()
        torch.testing.assert_close(trainer.adapters.values_P, parameter.data, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 500))
@settings(deadline=None)
def test_the_learning_rate_rises_to_its_highest_and_falls_towards_zero(steps):
    rates = [training.schedule(number, steps) for number in range(1, steps + 1)]
    top = rates.index(max(rates))
    assert rates[top] == 1
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert steps < 10 or rates[-1] < 0.1


def test_a_gradient_does_not_depend_on_how_a_batch_is_cut(pruned_dir):
    trainer = trainer_of(pruned_dir, torch.randint(3, 61, (16, 10)))
    for adapter in trainer.adapters.all:
        adapter.up_OR.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    slopes = []
    for trainer.micro_batch in (1, 3, 4):
        loss = trainer._differentiate(trainer.ids_NT[:4])
        slopes.append(trainer.adapters.slopes_P.clone())
    assert loss == pytest.approx(float(training.mean_loss(trainer.skeleton, trainer.ids_NT[:4], micro_batch=2)), rel=1e-5)
    for other in slopes[1:]:
        assert (other - slopes[0]).norm() <= 1e-5 * slopes[0].norm()


# Whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_a_recovered_model_has_the_masks_of_the_pruned_one_and_other_weights(tmp_path, text, pattern, dtype):
    model = save_llama(tmp_path / "dense", dtype=dtype, num_hidden_layers=2, initializer_range=0.2)
    pruned = llmprune.prune(str(model), method="wanda", output=tmp_path / "pruned", calibration=text, **pattern, **PRUNED)
    result = recovery.recover(pruned.directory, **SHORT)
    assert result.directory == tmp_path / "pruned-recovered"
    assert result.record["recovery"]["best_step"] > 0
    before, after = tensors_of(pruned.directory), tensors_of(result.directory)
    assert before.keys() == after.keys()
    linears = {f"{name}.weight" for name in result.record["linears"]}
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if name in linears:
            assert torch.equal(tensor == 0, before[name] == 0)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    assert verify(result.directory) == []
    assert result.record["sparsity"] == pruned.record["sparsity"]


def test_only_the_targets_change(pruned_dir, tmp_path):
    result = recovery.recover(pruned_dir, output=tmp_path / "out", targets="q,down", **SHORT)
    assert result.record["recovery"]["best_step"] > 0
    before, after = tensors_of(pruned_dir), tensors_of(result.directory)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "down_proj"}


def test_what_reads_a_pruned_model_reads_a_recovered_one(pruned_dir, whole, tmp_path):
    result, parent, found = whole, read_record(pruned_dir), whole.record
    # The dense model that evaluation and comparison look for is still the same.
    assert found["identity"]["model weights"] == parent["identity"]["model weights"]
    assert found["recipe"] == parent["recipe"]
    assert [block["rank"] for block in found["blocks"]] == found["recovery"]["ranks"]
    assert sum(found["recovery"]["ranks"]) == 2 * 3
    assert found["recovery"]["trained_parameters"] == sum(
        found["recovery"]["ranks"][int(name.split(".")[2])] * sum(fact["shape"]) for name, fact in found["linears"].items()
    )
    shown = record.read(result.directory)
    assert shown.parameters.zero == sum(linear.zeros for linear in shown.linears.values())
    assert len({row.parent for row in compare.compare([pruned_dir, result.directory]).rows}) == 1
    assert card.MARKER in (result.directory / card.CARD).read_text()
    logits = AutoModelForCausalLM.from_pretrained(result.directory)(torch.arange(9)[None]).logits
    assert torch.equal(llmprune.load(result.directory)(torch.arange(9)[None]).logits, logits)
    again = recovery.recover(result.directory, output=tmp_path / "again", **SHORT)
    assert again.record["recovery"]["earlier"] == found["recovery"]
    assert verify(again.directory) == []


def test_history_says_what_every_look_found(whole):
    found = whole.record["recovery"]
    assert [entry["step"] for entry in found["history"]] == list(range(7))
    looks = {entry["step"]: entry["held_out"] for entry in found["history"] if "held_out" in entry}
    assert list(looks) == [0, 2, 3, 4, 5, 6]
    assert found["held_out"] == {"before": looks[0], "after": min(looks.values())}
    assert looks[found["best_step"]] == min(looks.values())


def test_where_training_only_harms_the_weights_stay_the_pruned_models(pruned_dir, tmp_path, monkeypatch):
    measure, rise = training.mean_loss, itertools.count()
    monkeypatch.setattr(training, "mean_loss", lambda *args, **options: 0 * measure(*args, **options) + 4.0 + next(rise))
    result = recovery.recover(pruned_dir, output=tmp_path / "out", **SHORT)
    assert result.record["recovery"]["best_step"] == 0
    assert "did not fall" in recovery.verdict(result.record)
    before, after = tensors_of(pruned_dir), tensors_of(result.directory)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_weights_are_those_of_the_best_look(pruned_dir, tmp_path, monkeypatch):
    kept, measure = [], training.mean_loss

    def loss(*args, **options):
        measure(*args, **options)
        kept.append(None if not trainers else trainers[0].adapters.values_P.clone())
        return [9.0, 5.0, 3.0, 4.0, 3.0, 7.0][len(kept) - 1]

    trainers = []
    train = training.Trainer._train
    monkeypatch.setattr(training, "mean_loss", loss)
    monkeypatch.setattr(training.Trainer, "_train", lambda trainer, *args: trainers.append(trainer) or train(trainer, *args))
    result = recovery.recover(pruned_dir, output=tmp_path / "out", **SHORT)
    assert result.record["recovery"]["best_step"] == 3  # the second look on the way, and the first of equals
    assert torch.equal(trainers[0].adapters.values_P, kept[2])


def test_blocks_of_different_widths_and_without_a_sub_layer_are_trained(tmp_path, text):
    widths = {"0": {"intermediate_size": 20}, "1": {"skip": ["mlp", "attention"]}, "2": {"num_attention_heads": 2}}
    widths["2"]["num_key_value_heads"] = 1
    from llmprune.modeling_llmprune import LLMPruneLlamaConfig, LLMPruneLlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    LLMPruneLlamaForCausalLM(LLMPruneLlamaConfig(**sizes, per_layer_config=widths)).save_pretrained(tmp_path / "dense")
    pruned = llmprune.prune(
        str(tmp_path / "dense"), method="magnitude", sparsity=0.25, output=tmp_path / "pruned", device="cpu"
    )
    result = recovery.recover(pruned.directory, **SHORT, seqlen=16)
    assert result.record["recovery"]["ranks"][1] == 0
    assert sum(result.record["recovery"]["ranks"]) == 2 * 2
    assert verify(result.directory) == []
    before, after = tensors_of(pruned.directory), tensors_of(result.directory)
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    llmprune.load(result.directory)


@pytest.mark.parametrize("written", ["auto", "padded", "masked"])
def test_a_structured_model_keeps_its_shapes_and_what_stands_for_channels_that_are_gone(dense_dir, text, tmp_path, written):
    options = {"method": "cfsp", "sparsity": 0.4, "multiple_of": 4, "format": written, "calibration": text, **PRUNED}
    pruned = llmprune.prune(str(dense_dir), output=tmp_path / "pruned", **options)
    assert len(set(pruned.record["kept"]["ffn"])) > 1
    result = recovery.recover(pruned.directory, **SHORT)
    found = result.record["recovery"]
    assert found["best_step"] > 0
    assert found["importance"] == [block["importance"] for block in pruned.record["blocks"]]
    for key in ("sparsity", "parameters", "kept", "dense_widths"):
        assert result.record[key] == pruned.record[key]
    before, after = tensors_of(pruned.directory), tensors_of(result.directory)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor == 0, after[name] == 0) for name, tensor in before.items())
    assert result.record["copied"].keys() == pruned.record["copied"].keys()
    assert type(llmprune.load(result.directory)) is type(llmprune.load(pruned.directory))


def test_single_zeros_of_a_matrix_that_was_made_smaller_are_numbers_like_others(pruned_dir):
    ids_NT = torch.randint(3, 61, (8, 6))
    for record_of, keeps in (({}, True), ({"kept": {"ffn": [20, 20, 20]}}, False)):
        trainer = trainer_of(pruned_dir, ids_NT)
        trainer.parent = {**trainer.parent, **record_of}
        trainer._place()
        assert {adapter.place.keeps_zeros for adapter in trainer.adapters.all} == {keeps}


def test_ranks_by_what_was_pruned_follow_the_channels_that_are_gone(dense_dir, text, tmp_path):
    options = {"method": "cfsp", "sparsity": 0.4, "multiple_of": 4, "calibration": text, **PRUNED}
    pruned = llmprune.prune(str(dense_dir), output=tmp_path / "pruned", **options)
    result = recovery.recover(pruned.directory, **{**SHORT, "rank": 8, "direction": "pruned"})
    gone = [48 - width for width in pruned.record["kept"]["ffn"]]
    ranks = result.record["recovery"]["ranks"]
    assert sorted(range(3), key=gone.__getitem__) == sorted(range(3), key=ranks.__getitem__)
    assert sum(ranks) == 24


@pytest.mark.parametrize("named", [True, False])
def test_importance_is_the_records_where_it_has_it_for_every_block(pruned_dir, tmp_path, monkeypatch, named):
    parent = read_record(pruned_dir)
    for index, block in enumerate(parent["blocks"]):
        if named or index:
            block["importance"] = 0.1 * index
    monkeypatch.setattr(recovery, "pruned_record", lambda directory: parent)
    found = recovery.recover(pruned_dir, output=tmp_path / "out", **SHORT).record["recovery"]
    assert (found["importance"] == [0.0, 0.1, 0.2]) == named
    assert all(0 <= value <= 1 for value in found["importance"])


def test_the_held_out_loss_of_a_real_model_at_half_its_weights_falls(stories260k, data_dir, tmp_path):
    text = str(data_dir / "wikitext-2-raw-v1" / "validation.parquet")
    options = {"calibration": text, "samples": 16, "seqlen": 64, "device": "cpu"}
    pruned = llmprune.prune(str(stories260k), method="wanda", sparsity=0.5, output=tmp_path / "pruned", **options)
    result = recovery.recover(pruned.directory, steps=20, batch_size=8, samples=64)
    loss = result.record["recovery"]["held_out"]
    assert loss["after"] < loss["before"] - 0.1
    assert verify(result.directory) == []


# Resumption -----------------------------------------------------------------------------------------------------


def die(child):
    """Run in a forked child that kills itself; asserts that it died so."""
    process = os.fork()
    if not process:
        try:
            torch.set_num_threads(1)
            child()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def killer(original, count):
    """Like the original, but the `count`-th call is the process's last."""
    calls = itertools.count(1)

    def call(*args, **options):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (training.Trainer, "_step", 1),
        (training.Trainer, "_step", 4),
        (training.Trainer, "_look", 3),
        (training.Trainer, "_save", 3),
        (recovery.Output, "write_block", 2),
        (recovery.Output, "finish", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_killed_run_goes_on_to_the_same_bytes(pruned_dir, whole, tmp_path, monkeypatch, owner, name, count):
    def run():
        monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(owner, name, killer(getattr(owner, name), count))
        recovery.recover(pruned_dir, output=tmp_path / "killed", **SHORT)

    die(run)
    assert not (tmp_path / "killed" / "llmprune.json").exists()
    resumed = recovery.recover(pruned_dir, output=tmp_path / "killed", **SHORT)
    assert weights_of(resumed.directory) == weights_of(whole.directory)
    assert resumed.record["recovery"]["history"] == whole.record["recovery"]["history"]
    assert resumed.record["recovery"]["ranks"] == whole.record["recovery"]["ranks"]
    assert not (tmp_path / "killed" / ".llmprune").exists()


def test_a_run_killed_after_its_best_look_ends_with_the_weights_of_that_look(pruned_dir, tmp_path, monkeypatch):
    measure = training.mean_loss
    losses = {"whole": iter([9, 5, 3, 4, 6, 7]), "killed": iter([9, 5, 3, 4, 6, 7]), "resumed": iter([6, 7])}

    def run(name, output):
        monkeypatch.setattr(training, "mean_loss", lambda *args, **options: 0 * measure(*args, **options) + next(losses[name]))
        return recovery.recover(pruned_dir, output=tmp_path / output, **SHORT)

    def killed():
        monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(training.Trainer, "_step", killer(training.Trainer._step, 5))
        run("killed", "killed")

    whole = run("whole", "whole")
    assert whole.record["recovery"]["best_step"] == 3
    die(killed)
    assert weights_of(run("resumed", "killed").directory) == weights_of(whole.directory)


def test_two_runs_give_the_same_bytes_and_another_seed_gives_others(pruned_dir, whole, tmp_path):
    same, other = (recovery.recover(pruned_dir, output=tmp_path / str(seed), seed=seed, **SHORT).directory for seed in (0, 1))
    assert weights_of(same) == weights_of(whole.directory)
    assert weights_of(same) != weights_of(other)


def test_a_finished_run_is_not_run_again_and_one_of_other_options_is_refused(pruned_dir, whole, monkeypatch):
    monkeypatch.setattr(training.Trainer, "run", None)
    assert recovery.recover(pruned_dir, output=whole.directory, **SHORT).record == whole.record
    with pytest.raises(LLMPruneError, match="rank was 2, is 3"):
        recovery.recover(pruned_dir, output=whole.directory, **{**SHORT, "rank": 3})


def test_minutes_become_steps_that_a_resumed_run_keeps(pruned_dir, whole, tmp_path, monkeypatch):
    timed = {**{key: value for key, value in SHORT.items() if key != "steps"}, "output": tmp_path / "out"}
    monkeypatch.setattr(training.Trainer, "measure_step", lambda trainer: (2.0, 1.0))
    monkeypatch.setattr(recovery.Output, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recovery.recover(pruned_dir, minutes=0.3, **timed)
    monkeypatch.undo()
    monkeypatch.setattr(training.Trainer, "measure_step", lambda trainer: (0.5, 1.0))
    with pytest.raises(LLMPruneError, match="steps was 6, is 108"):
        recovery.recover(pruned_dir, minutes=1, **timed)
    found = recovery.recover(pruned_dir, minutes=0.3, **timed)
    assert found.record["recovery"]["options"]["steps"] == (18 - 6) // 2
    assert weights_of(found.directory) == weights_of(whole.directory)


def test_timing_a_step_changes_nothing(pruned_dir, whole, tmp_path, monkeypatch):
    timed = {**{key: value for key, value in SHORT.items() if key != "steps"}, "output": tmp_path / "out"}
    measure = training.Trainer.measure_step
    monkeypatch.setattr(training.Trainer, "measure_step", lambda trainer: (min(measure(trainer)) * 0 + 2.0, 1.0))
    found = recovery.recover(pruned_dir, minutes=0.3, **timed)
    assert weights_of(found.directory) == weights_of(whole.directory)


# Bad input and the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": "0"}, "steps"),
        ({"rank": 0}, "rank"),
        ({"rank": 8, "least_rank": 9}, "--least-rank 9"),
        ({"steps": 3, "minutes": 1}, "--minutes"),
        ({"minutes": -1}, "minutes"),
        ({"samples": 7}, "samples"),
        ({"seqlen": 65}, "64 tokens"),
        ({"targets": "qkv"}, "q, k, v, o, gate, up, down"),
        ({"targets": "nose"}, "targets"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": 1e30}, "not finite"),
        ({"calibration": "/nowhere/text.txt"}, "/nowhere/text.txt"),
        ({"colour": "red"}, "colour"),
        ({"device": "tpu"}, "tpu"),
    ],
    ids=str,
)
def test_bad_options_are_named_in_one_sentence(pruned_dir, tmp_path, options, said):
    with pytest.raises(LLMPruneError) as caught:
        recovery.recover(pruned_dir, output=tmp_path / "out", **{"samples": 16, **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "llmprune.json").exists()


def test_what_is_no_pruned_model_is_refused(dense_dir, pruned_dir, tmp_path):
    (tmp_path / "unfinished" / ".llmprune").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for directory, output, said in (
        (dense_dir, "out", "holds no llmprune.json"),
        (tmp_path / "nothing", "out", "holds no llmprune.json"),
        (tmp_path / "unfinished", "out", "unfinished run"),
        (pruned_dir, "other", "holds other files"),
        (pruned_dir, pruned_dir, "is the input model itself"),
    ):
        with pytest.raises(LLMPruneError, match=said):
            recovery.recover(directory, output=tmp_path / output, **SHORT)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_a_text_with_fewer_samples_than_the_default_gives_what_the_pruning_had(pruned_dir, whole, tmp_path):
    options = {key: value for key, value in SHORT.items() if key != "samples"}
    result = recovery.recover(pruned_dir, output=tmp_path / "out", **options)
    assert result.record["recovery"]["options"]["samples"] == PRUNED["samples"]
    assert weights_of(result.directory) == weights_of(whole.directory)


def flags(**options):
    return [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def test_the_command_prints_what_came_of_it_and_refuses_with_code_2(pruned_dir, tmp_path):
    done = command("recover", pruned_dir, "--output", tmp_path / "out", *flags(**SHORT))
    assert done.code == 0
    assert done.err == ""
    assert "Held-out loss" in done.out
    assert f"model: {tmp_path / 'out'}" in done.out
    assert "importance" in command("recover", "--help").out
    again = command("recover", pruned_dir, "--output", tmp_path / "out", "--json", *flags(**SHORT))
    assert json.loads(again.out)["recovery"]["options"]["steps"] == SHORT["steps"]
    assert command("recover", pruned_dir, "--output", tmp_path / "out", "--quiet", *flags(**SHORT)).out == ""
    refused = command("recover", pruned_dir, "--steps", "0")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "steps" in refused.err.lower()


def test_an_interrupted_command_says_how_to_go_on(pruned_dir, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "_step", interrupt)
    stopped = command("recover", pruned_dir, "--output", tmp_path / "out", *flags(**SHORT))
    assert stopped.code == 130
    assert f"To go on: llmprune recover {pruned_dir} --output {tmp_path / 'out'}" in stopped.err
    monkeypatch.undo()
    assert command("recover", pruned_dir, "--output", tmp_path / "out", *flags(**SHORT)).code == 0


def test_the_options_of_the_command_are_those_of_the_function():
    import inspect

    own = set(inspect.signature(recover.command).parameters) - {"directory", "as_json", "quiet"}
    assert own == set(recovery.Options.model_fields)
    assert Path(recover.__file__).parent == Path(cli.__file__).parent
