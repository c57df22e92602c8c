"""Mixture-of-experts: every expert is pruned as a matrix of its own, by the tokens that were really routed to it."""

import copy
import functools
import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from checkpoints import tensors
from in_process import llmprune as command
from reference import wanda_removed
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, VOCABULARY, build
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import methods, perplexity, plan, recovery, report
from llmprune.calibration import calibration_set
from llmprune.curvature import Probe, differentiate
from llmprune.errors import LLMPruneError
from llmprune.experts import Experts
from llmprune.models import Skeleton
from llmprune.pruning import prepare
from llmprune.ranks import Ranks
from llmprune.recipe import Recipe, from_options
from llmprune.statistics import Hessian, InputNorm
from llmprune.stream import Stream
from llmprune.verify import verify

SAMPLES, SEQLEN, SPARSITY = 5, 32, 0.45
# Attention's last matrix, then what comes after it.
PARTS = {"gate": 0, "up": 1, "down": 2}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A variant's model directory, built once."""
    return functools.cache(lambda variant: build(variant, tmp_path_factory.mktemp(variant)))


@pytest.fixture(scope="module")
def ids_NT():
    ids = calibration_set("random", None, samples=SAMPLES, seqlen=SEQLEN, seed=0, vocab_size=VOCABULARY).ids_NT
    return ids.clamp_min(3)


@functools.cache
def dense(folder):
    """A model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def fused(model):
    """The modules in which transformers keeps experts, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "gate_up_proj", torch.ones(1)).ndim == 3}


def matrix(module, expert, role):
    """An expert's matrix, as a view of the 3-D parameter."""
    if role == "down":
        return module.down_proj[expert]
    return module.gate_up_proj[expert].chunk(2)[PARTS[role]]


def routed(model, ids_NT):
    """What each expert's matrices read, token by token, by name of the layer: pairs of inputs to gate and up, and to down."""
    seen = {}

    def note(name, module, args):
        hidden_NI, chosen_NK, _ = args
        seen[name] = []
        for expert in range(len(module.down_proj)):
            tokens = [token for token in range(len(hidden_NI)) if expert in chosen_NK[token]]
            inputs_TI = hidden_NI[tokens]
            gate_TF, up_TF = (inputs_TI @ matrix(module, expert, role).T for role in ("gate", "up"))
            seen[name].append((inputs_TI, module.act_fn(gate_TF) * up_TF))

    hooks = [m.register_forward_pre_hook(functools.partial(note, name)) for name, m in fused(model).items()]
    model(ids_NT)
    for hook in hooks:
        hook.remove()
    return seen


def read_by(seen, linear):
    layer = linear.name.partition(".experts")[0] + ".experts"
    return seen[layer][linear.expert][linear.role == "down"]


@dataclass
class Memory:
    """Stands in for the output directory."""

    tensors: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    finished_blocks: int = 0

    def write_outer(self):
        pass

    def write_block(self, index, tensors, facts):
        self.tensors[index] = {name: tensor.clone() for name, tensor in tensors.items()}
        self.facts |= facts["linears"]

    def read_block(self, index):
        return {name: tensor.clone() for name, tensor in self.tensors[index].items()}


def pruned(folder, ids_NT, method, memory=None, recipe=None, **options):
    memory = memory or Memory()
    recipe = Recipe(model="tiny", method=method, sparsity=0.5, damping=0.3, min_expert_tokens=1, **(recipe or {}))
    modes = {"propagate": recipe.propagate, "sequential": recipe.sequential, "match_dense": recipe.match == "dense"}
    stream = Stream(Skeleton(folder), ids_NT, output=memory, **modes | options)
    methods.load(method).prune(stream, recipe)
    return memory


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[block][name], right[block][name]) for block in left for name in left[block]
    )


@pytest.mark.parametrize("variant", EXPERTS)
def test_every_matrix_of_the_blocks_is_found_but_the_routers(folder_of, variant):
    skeleton, model = Skeleton(folder_of(variant)), dense(folder_of(variant))
    blocks = model.model.layers
    router = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")
    expected = sum(p.numel() for name, p in blocks.named_parameters() if p.ndim > 1 and not name.endswith(router))
    assert skeleton.prunable_parameters() == expected
    assert all(skeleton.missed_matrices(index) == [] for index in range(len(blocks)))
    assert skeleton.decoder_parameters() == sum(p.numel() for p in blocks.parameters())
    # Names are those of the checkpoint, and all of it is accounted for.
    inside = {skeleton.stored_name(name) for index in range(len(blocks)) for name in skeleton.block_parameters(index)}
    assert inside | set(skeleton.outer_tensors()) == tensors(folder_of(variant)).keys()
    first = ["q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down"]
    if variant == "deepseek_v3":
        assert [linear.role for linear in skeleton.linears[0]] == first
        assert [linear.expert for linear in skeleton.linears[1]] == [None] * 8 + [e for e in range(4) for _ in range(3)]


@pytest.mark.parametrize("variant", EXPERTS)
def test_the_stream_computes_what_transformers_computes_in_any_micro_batch(folder_of, variant, ids_NT):
    model, outputs = dense(folder_of(variant)), []
    hook = model.model.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    model(ids_NT)
    hook.remove()
    streamed = []
    for micro_batch in (1, 3):
        stream = Stream(Skeleton(folder_of(variant)), ids_NT, micro_batch=micro_batch, keep_last=True)
        for _ in stream.blocks():
            pass
        streamed.append(stream.activations.states_NTI)
    torch.testing.assert_close(streamed[0], outputs[0], rtol=1e-4, atol=1e-4 * float(outputs[0].abs().max()))
    assert torch.equal(*streamed)


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v2"])
@pytest.mark.parametrize("kind", [InputNorm, Hessian])
def test_an_experts_statistics_are_those_of_the_tokens_routed_to_it(folder_of, variant, kind, ids_NT):
    seen = routed(dense(folder_of(variant)), ids_NT)
    found = 0
    for block in Stream(Skeleton(folder_of(variant)), ids_NT, micro_batch=2, propagate="dense").blocks():
        shared = {}
        for linear, statistic in block.observe(kind):
            if linear.expert is not None:
                inputs_TI = read_by(seen, linear).double()
                assert linear.facts["tokens"] == statistic.seen == len(inputs_TI)
                expected_I = inputs_TI.square().mean(dim=0).sqrt()
                torch.testing.assert_close(statistic.rms_I.double(), expected_I, rtol=1e-4, atol=1e-6)
                if kind is Hessian:
                    mean_II = inputs_TI.T @ inputs_TI / len(inputs_TI)
                    torch.testing.assert_close(statistic.mean_II.double(), mean_II, rtol=1e-3, atol=1e-4 * float(mean_II.max()))
                shared.setdefault(linear.expert, []).append(id(statistic))
                found += 1
        # Gate and up read one tensor.
        assert all(len(set(each)) == 2 for each in shared.values())
    assert found == 12 * len(seen)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_the_written_model_has_each_experts_own_mask_and_loads_with_transformers(folder_of, variant, tmp_path, ids_NT):
    folder = folder_of(variant)
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids_NT.tolist()))
    options = {"calibration": str(ids), "samples": SAMPLES, "seqlen": SEQLEN, "micro_batch": 2, "device": "cpu"}
    options |= {"sparsity": SPARSITY, "propagate": "dense", "min_expert_tokens": 20}
    result = llmprune.prune(str(folder), method="wanda", output=tmp_path / "out", **options)
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert verify(tmp_path / "out") == []

    model, loaded, seen = copy.deepcopy(dense(folder)), dense(tmp_path / "out"), routed(dense(folder), ids_NT)
    written = fused(loaded)
    starved = 0
    for name, module in fused(model).items():
        for expert, role in ((expert, role) for expert in range(4) for role in PARTS):
            weight_OI, inputs_TI = matrix(module, expert, role), seen[name][expert][role == "down"]
            few = len(inputs_TI) < 20
            # Magnitude is Wanda with inputs that are all alike.
            removed_OI = wanda_removed(weight_OI, torch.ones(1, weight_OI.shape[1]) if few else inputs_TI, SPARSITY)
            weight_OI[removed_OI] = 0.0
            assert torch.equal(matrix(written[name], expert, role), weight_OI), (name, expert, role)
            starved += few
    assert len([1 for fact in result.record["linears"].values() if "fallback" in fact]) == starved
    # All else is the same or has the declared zeros.
    for name, parameter in loaded.named_parameters():
        zeros = (parameter == 0).sum(-1)
        if parameter.ndim == 2 and ".layers." in name and "gate.weight" not in name:
            assert (zeros == math.floor(parameter.shape[1] * SPARSITY)).all(), name
            model.get_parameter(name)[parameter == 0] = 0.0
    assert torch.equal(loaded(ids_NT).logits, model(ids_NT).logits)


RUNS = [
    ("deepseek_v3", "wanda", {"sequential": "sublayer"}),
    ("mixtral", "sparsegpt", {}),
    ("deepseek_v3", "sparsegpt", {"sequential": "sublayer", "pattern": "2:4"}),
    ("mixtral", "dsnot", {"propagate": "dense"}),
    ("deepseek_v3", "best", {"allocation": "uniform", "rounds": 2}),
    ("qwen2_moe", "best", {"allocation": "uniform"}),
]


@pytest.mark.parametrize(("variant", "method", "recipe"), RUNS, ids=lambda each: each if isinstance(each, str) else "")
def test_neither_micro_batches_nor_interruptions_change_a_bit(folder_of, variant, method, recipe, ids_NT):
    one = pruned(folder_of(variant), ids_NT, method, recipe=recipe)
    assert same(one.tensors, pruned(folder_of(variant), ids_NT, method, recipe=recipe, micro_batch=3).tensors)
    half = Memory({0: one.tensors[0]}, finished_blocks=1)
    assert same(one.tensors, pruned(folder_of(variant), ids_NT, method, half, recipe, micro_batch=2).tensors)
    total, zeros = (sum(f(t) for block in one.tensors.values() for n, t in block.items() if ".experts." in n) for f in COUNTS)
    assert zeros / total == pytest.approx(0.5, abs=0.02)


COUNTS = (torch.Tensor.numel, lambda tensor: int((tensor == 0).sum()))


def test_ranks_sum_to_the_statistics_of_one(folder_of, ids_NT):
    def statistics(samples, first):
        stream = Stream(Skeleton(folder_of("mixtral")), samples, propagate="dense", first_sample=first, ranks=Ranks())
        return {linear.name: each for block in stream.blocks() for linear, each in block.observe(InputNorm)}

    whole, parts = statistics(ids_NT, 0), [statistics(ids_NT[:2], 0), statistics(ids_NT[2:], 2)]
    for name, statistic in whole.items():
        merged = {id(part[name]): part[name] for part in parts}
        first, second = merged.values()
        assert torch.equal(first.squares_I + second.squares_I, statistic.squares_I)
        assert first.seen + second.seen == statistic.seen


def test_orders_of_work_differ_only_after_the_first_linear(folder_of, ids_NT):
    block, sublayer = (pruned(folder_of("olmoe"), ids_NT, "wanda", recipe={"sequential": s}) for s in ("block", "sublayer"))
    equal = {name: torch.equal(tensor, sublayer.tensors[0][name]) for name, tensor in block.tensors[0].items()}
    assert equal["model.layers.0.self_attn.q_proj.weight"]
    assert not all(equal.values())


@pytest.fixture(scope="module")
def starving(folder_of, tmp_path_factory):
    """A DeepSeek whose router never sends a token to two of its experts."""
    folder = tmp_path_factory.mktemp("starving")
    for file in folder_of("deepseek_v3").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("e_score_correction_bias"):
            tensor[2:] = -100.0
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


STARVED = [
    ("wanda", {"sequential": "sublayer"}),
    ("sparsegpt", {"pattern": "2:4"}),
    ("best", {}),
    ("dsnot", {}),
    ("wanda", {"refine": "icbs"}),
    ("icbs", {"icbs": {"steps": 2, "holdout": 4}, "min_expert_tokens": 1}),
    ("wanda", {"allocation": "owl"}),
]


@pytest.mark.parametrize(("method", "options"), STARVED, ids=lambda each: each if isinstance(each, str) else "-".join(each))
def test_an_expert_that_saw_too_few_tokens_is_pruned_by_magnitude_and_named(starving, tmp_path, method, options):
    options = {"min_expert_tokens": 20, **({} if "pattern" in options else {"sparsity": 0.5}), **options}
    shared = {"calibration": "random", "samples": 8, "seqlen": 12, "device": "cpu", "micro_batch": 3}
    record = llmprune.prune(str(starving), method=method, output=tmp_path / "out", **shared, **options).record
    before, after = tensors(starving), tensors(tmp_path / "out")
    fallen = {name: fact for name, fact in record["linears"].items() if fact.get("fallback") == "magnitude"}
    assert {fact["expert"] for fact in fallen.values()} >= {2, 3}
    assert sum(fact["expert"] in (2, 3) for fact in fallen.values()) == 2 * 2 * 3
    for name in fallen:
        kept, source = after[f"{name}.weight"], before[f"{name}.weight"]
        assert torch.equal(kept[kept != 0], source[kept != 0])
        if method == "wanda" and options.get("allocation") is None:
            assert (kept == 0).equal(wanda_removed(source, torch.ones(1, source.shape[1]), 0.5))
    [warning] = [warning for warning in record["warnings"] if "by magnitude" in warning]
    assert warning.startswith(f"{len(fallen) // 3} of 8 experts saw fewer than {options['min_expert_tokens']} calibration")
    assert "expert 2 of block 1, 3 of block 1" in warning
    # SparseGPT fits the others' gate and up to 96 tokens, but not down, which has 52 inputs.
    unfitted = [name for name, fact in record["linears"].items() if fact.get("fallback") == "wanda"]
    assert bool(unfitted) == (method == "sparsegpt")
    for name in unfitted:
        kept, source = after[f"{name}.weight"], before[f"{name}.weight"]
        assert torch.equal(kept[kept != 0], source[kept != 0])
    said = [warning for warning in record["warnings"] if f"{len(unfitted)} of 24 matrices of experts saw fewer" in warning]
    assert len(said) == (method == "sparsegpt")
    if method != "icbs":
        assert {fact["tokens"] for fact in fallen.values() if fact["expert"] in (2, 3)} == {0}


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_that_stores_experts_as_3d_tensors_is_read_as_others(folder_of, variant, tmp_path, ids_NT):
    dense(folder_of(variant)).save_pretrained(tmp_path, save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in tensors(tmp_path).values())
    plain, own = (pruned(folder, ids_NT, "magnitude").tensors for folder in (folder_of(variant), tmp_path))
    for block, each in plain.items():
        plain[block] = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in each.items()}
    assert same(plain, own)


def test_a_3d_checkpoint_prunes_to_one_that_loads(folder_of, tmp_path, ids_NT):
    dense(folder_of("mixtral")).save_pretrained(tmp_path / "fused", save_original_format=False)
    logits = []
    for name, source in (("plain", folder_of("mixtral")), ("fused", tmp_path / "fused")):
        out = tmp_path / f"out-{name}"
        llmprune.prune(str(source), method="magnitude", output=out)
        logits.append(dense(out)(ids_NT).logits)
        assert verify(out) == []
    assert torch.equal(*logits)


def test_streamed_perplexity_is_that_of_the_whole_model(folder_of, ids_NT):
    logits = dense(folder_of("mixtral"))(ids_NT).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten()).exp()
    found = perplexity.perplexity(Skeleton(folder_of("mixtral")), ids_NT, micro_batch=2)
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("fisher", ["sequence", "token"])
def test_gradients_of_experts_are_those_of_autograd(folder_of, fisher, ids_NT):
    folder, ids_BT = folder_of("mixtral"), ids_NT[:2]
    skeleton = Skeleton(folder)
    skeleton.fill_outer(head=True)
    for index in range(len(skeleton.blocks)):
        names = skeleton.block_parameters(index)
        skeleton.fill_block(index, {name: skeleton.checkpoint.read(skeleton.stored_names[name]) for name in names})
    linears = [linear for linear in skeleton.all_linears() if linear.expert is not None]
    blocks = [torch.arange(0, linear.numel, 37) for linear in linears]
    probes = [Probe(linear, block, fisher=fisher, stride=1) for linear, block in zip(linears, blocks, strict=True)]
    differentiate(skeleton, ids_BT, probes, micro_batch=2)
    model = copy.deepcopy(dense(folder)).requires_grad_()
    experts = fused(model)
    each = []
    for ids_T in ids_BT:
        model.zero_grad()
        logits_TV = model(ids_T[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits_TV, ids_T[1:]).backward()
        gradients = {}
        for linear in linears:
            module = experts[linear.name.partition(".experts")[0] + ".experts"]
            grad = module.down_proj.grad if linear.role == "down" else module.gate_up_proj.grad
            one = grad[linear.expert]
            gradients[linear.name] = (one if linear.role == "down" else one.chunk(2)[PARTS[linear.role]]).flatten().clone()
        each.append(gradients)
    for probe, block in zip(probes, blocks, strict=True):
        expected_BP = torch.stack([gradients[probe.linear.name] for gradients in each])
        scale = float(expected_BP.abs().max()) + 1e-12
        torch.testing.assert_close(probe.gradient_OI.flatten(), expected_BP.sum(0), rtol=1e-3, atol=1e-4 * scale)
        # Positions that went to other experts count as well: the mean over all of a sequence is the sequence's gradient.
        found_BN = probe.factor_BN.view(2, -1, len(block)).mean(1)
        torch.testing.assert_close(found_BN, expected_BP[:, block], rtol=1e-3, atol=1e-4 * scale)


def test_recovery_trains_experts_and_keeps_their_zeros(folder_of, tmp_path):
    options = {"calibration": "random", "samples": 8, "seqlen": 16, "device": "cpu"}
    llmprune.prune(str(folder_of("mixtral")), method="wanda", output=tmp_path / "pruned", **options)
    recovery.recover(tmp_path / "pruned", output=tmp_path / "out", steps=2, batch_size=4, rank=1, learning_rate=0.01, samples=8)
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "out")
    experts = [name for name in before if ".experts." in name]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in experts)
    assert verify(tmp_path / "out") == []


def test_the_page_says_what_every_expert_saw(starving, tmp_path):
    options = ("--calibration", "random", "--samples", 8, "--seqlen", 16, "--device", "cpu", "--min-expert-tokens", 3)
    outcome = command("prune", "--model", starving, "--output", tmp_path / "out", *options)
    assert outcome.code == 0
    assert "with 4 experts" in outcome.out
    assert "4 of 8 experts saw fewer than 3 calibration tokens" in " ".join(outcome.out.split())
    rows = report.routed_table(report.read(tmp_path / "out"))
    assert [(row.block, row.tokens, row.starved) for row in rows] == [(block, [0, 0, 128, 128], "2, 3") for block in (1, 2)]
    assert "What every expert saw" in report.write_report(tmp_path / "out").read_text()


def planned(folder, **options):
    recipe = from_options({"model": str(folder), "calibration": "random", "samples": 64, "device": "cpu", **options})
    return prepare(recipe, lambda line: None)


def test_the_plan_counts_every_experts_statistic_or_two_where_they_go_one_by_one(folder_of):
    folder = folder_of("mixtral")
    own = planned(folder, method="sparsegpt")
    assert own.recipe.sequential == "sublayer"
    assert "4 experts" in own.reasons["sequential"]
    whole = planned(folder, method="sparsegpt", sequential="block")
    assert whole.recipe.sequential == "block"
    # q, k and v; o; four times gate and up; four times down.
    assert plan.memory_parts(whole)["statistics"] == 4 * (6 * 36**2 + 4 * 52**2)
    assert plan.memory_parts(own)["statistics"] == 4 * 2 * 52**2
    # Two of four experts run for a token.
    skeleton = own.skeleton
    of_experts = sum(linear.numel for linear in skeleton.all_linears() if linear.expert is not None)
    assert skeleton.active_parameters() == skeleton.prunable_parameters() - of_experts / 2


def test_a_block_of_experts_that_does_not_fit_says_what_it_needs(folder_of, monkeypatch):
    ready = planned(folder_of("mixtral"), method="sparsegpt", sequential="block")
    plan.check_experts(ready)
    monkeypatch.setattr(Skeleton, "free_memory", lambda self: 1000)
    with pytest.raises(LLMPruneError, match=r"A block of 4 experts.*0\.0 GB are free: give --sequential sublayer"):
        plan.check_experts(ready)


def test_only_one_statistic_of_many_experts_is_in_memory_in_one_pass(folder_of, ids_NT):
    most = 0
    stream = Stream(Skeleton(folder_of("mixtral")), ids_NT, sequential="sublayer")
    for block in stream.blocks():
        pairs = block.observe(Hessian)
        for _ in pairs:
            frame = pairs.gi_frame.f_locals["pairs"].gi_frame
            most = max(most, len({id(each) for each in frame.f_locals["statistics"].values()}))
    assert most == 1


def test_gating_is_refused_in_one_sentence(folder_of):
    with pytest.raises(LLMPruneError, match="--method wina gates linears that every token runs through"):
        planned(folder_of("mixtral"), method="wina")


def test_all_experts_run_in_order_even_without_tokens():
    experts = Experts(3, 4, 8, ("w1", "w3", "w2"), torch.nn.functional.silu)
    experts.length, ran = 2, []
    for number, expert in enumerate(experts):
        expert.down.register_forward_pre_hook(lambda module, args, number=number: ran.append((number, args[1])))
    hidden_NI = torch.randn(4, 4)
    with torch.no_grad():
        output_NI = experts(hidden_NI, torch.tensor([[2], [2], [2], [0]]), torch.ones(4, 1))
    assert ran == [(0, [0, 1]), (1, [0, 0]), (2, [2, 1])]
    torch.testing.assert_close(output_NI[3:], experts[0](hidden_NI[3:], [1]).detach())
