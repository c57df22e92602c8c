"""Every supported architecture: its matrices are all found, it runs as it does whole, what is written is what was decided."""

import copy
import functools
import gc
import itertools
import json
import math
import re

import matrix
import pytest
import stock
import torch
from in_process import llmprune
from matrix import ANY, DENSE, NAMES, NM, QUICK, SAMPLES, SEQLEN, SPARSITY, SUBLAYER, tensors
from reference import wanda_removed
from safetensors.torch import save_file
from tiny import BLOCKS, LIMIT, VARIANTS, VOCABULARY, build, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from llmprune import calibration, perplexity
from llmprune.checkpoint import Checkpoint
from llmprune.models import Skeleton
from llmprune.stream import Stream

ROLES = {
    "phi3": ["qkv", "o", "gate_up", "down"],
    "opt": ["q", "k", "v", "o", "up", "down"],
    "gpt_neox": ["qkv", "o", "up", "down"],
    "gpt2": ["qkv", "o", "up", "down"],
}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """One thread, because these products are too small to share; and a garbage collector that skips what imports left."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Tiny models, and what was made of them."""
    with stock.Process(tmp_path_factory.mktemp("process")) as process:
        yield matrix.Bench(tmp_path_factory.mktemp("bench"), process)


@pytest.fixture(scope="module")
def folder_of(bench):
    """A variant's model directory, built once."""
    return bench.model


@pytest.fixture(scope="module")
def in_readme():
    return matrix.read_table(matrix.in_readme())


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def folder(variant, folder_of):
    return folder_of(variant)


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(3, VOCABULARY, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(1))


def prune(model, output, *options):
    """Prune through the command line and return the record."""
    outcome = llmprune("prune", "--json", "--model", model, "--output", output, *QUICK, *options)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def resident(folder, dtype=torch.float32):
    """A model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


@functools.lru_cache(maxsize=2)
def _resident_once(folder):
    return resident(folder)


def dense(folder):
    """The same for a directory that no test changes: loaded once, copied for each."""
    return copy.deepcopy(_resident_once(folder))


def matrices(model):
    """Every linear of the blocks by name, one dictionary a block, found by its type."""
    path = BLOCKS[model.config.model_type]
    return [
        {f"{path}.{i}.{name}": module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        for i, block in enumerate(model.get_submodule(path))
    ]


def weight_OI(module):
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def has_negative_zeros(tensor):
    return bool((torch.signbit(tensor) & (tensor == 0)).any())


def test_the_readmes_table_has_all_families_and_all_methods(in_readme):
    assert list(in_readme) == [(NAMES[family], method) for family in matrix.rows() for method in matrix.columns()]


def test_the_readme_names_the_releases_of_transformers_that_are_tested():
    lowest = re.search(r"transformers>=([\d.]+)", (matrix.README.parent / "pyproject.toml").read_text())[1]
    newest = re.search(r"^NEWEST := (.*)$", (matrix.README.parent / "Makefile").read_text(), re.MULTILINE)[1]
    pinned = re.search(r"^transformers==(.*)$", (matrix.README.parent / "constraints.txt").read_text(), re.MULTILINE)[1]
    said = " ".join(matrix.README.read_text(encoding="utf-8").split())
    assert f"the pinned release of transformers ({pinned})" in said
    assert f"the lowest release that llmprune accepts ({lowest}) and on {newest}" in said


@pytest.mark.parametrize(("variant", "method"), list(matrix.tested()))
def test_a_method_makes_of_a_family_what_the_readmes_table_says(variant, method, bench, in_readme):
    """Runs, checks and loads it: see matrix.py."""
    assert (
        bench.cell(variant, method, [matrix.in_turn(variant, method)]) == in_readme[NAMES[matrix.VARIANTS[variant][0]], method]
    )


def test_every_matrix_of_the_blocks_is_found_with_its_role(folder):
    skeleton, model = Skeleton(folder), dense(folder)
    for linears, expected in zip(skeleton.linears, matrices(model), strict=True):
        assert sorted(linear.name for linear in linears) == sorted(expected)
        assert all(linear.shape == tuple(weight_OI(expected[linear.name]).shape) for linear in linears)
        assert [linear.role for linear in linears] == ROLES.get(
            model.config.model_type, ["q", "k", "v", "o", "gate", "up", "down"]
        )
    assert skeleton.missed_matrices(0) == []
    matrix_parameters = sum(m.weight.numel() for block in matrices(model) for m in block.values())
    assert skeleton.prunable_parameters() == matrix_parameters
    blocks = model.get_submodule(BLOCKS[model.config.model_type])
    assert skeleton.decoder_parameters() == sum(p.numel() for p in blocks.parameters())
    assert skeleton.parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_stream_computes_what_the_whole_model_computes(folder, ids_NT, micro_batch, dtype):
    model = resident(folder, dtype)
    outputs = []
    model.get_submodule(BLOCKS[model.config.model_type])[-1].register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    for part in ids_NT.split(micro_batch):
        model(part)
    skeleton = Skeleton(folder)
    skeleton.dtype = dtype
    stream = Stream(skeleton, ids_NT, micro_batch=micro_batch, keep_last=True)
    for _ in stream.blocks():
        pass
    streamed = [stream.hidden(batch) for batch in range(len(stream.batches))]
    assert torch.equal(torch.cat(streamed), torch.cat(outputs))


def test_streamed_perplexity_is_that_of_the_whole_model(folder, ids_NT, monkeypatch):
    logits = dense(folder)(ids_NT).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten()).exp()
    # Positions of a window are evaluated in pieces; 11 predictions make three.
    monkeypatch.setattr(perplexity, "POSITIONS", 5)
    for micro_batch in (1, 3):
        found = perplexity.perplexity(Skeleton(folder), ids_NT, micro_batch=micro_batch)
        assert found == pytest.approx(float(expected), rel=1e-5)


def test_the_written_tokenizer_is_the_sources(variant, bench):
    pruned = bench.prune(variant, "wanda", *matrix.in_turn(variant, "wanda"))
    text = "An odd – sentence,\n\n twice."
    loaded, source = AutoTokenizer.from_pretrained(pruned.folder), AutoTokenizer.from_pretrained(bench.model(variant))
    assert loaded(text).input_ids == source(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text


def inputs_of(modules, model, ids_NT):
    """What each of the modules is called with when the model runs, by name."""
    inputs = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in modules.items()
    ]
    model(ids_NT)
    for handle in handles:
        handle.remove()
    return inputs


def removed_by_the_paper(model, ids_NT, sequential, propagate):
    """Wanda on a model that is whole in memory, its linears found by type and observed by hooks.

    Section 3 with section 4's order: a unit's statistics come from a model in which all earlier units are pruned. A unit is
    a block, one linear (sublayer), or the whole model (dense).
    """
    blocks = matrices(model)
    if propagate == "dense":
        units = [dict(itertools.chain.from_iterable(block.items() for block in blocks))]
    elif sequential == "sublayer":
        units = [{name: module} for block in blocks for name, module in block.items()]
    else:
        units = blocks
    removed = {}
    for unit in units:
        inputs = inputs_of(unit, model, ids_NT)
        for name, module in unit.items():
            weight = weight_OI(module)
            removed[name] = wanda_removed(weight, inputs[name].reshape(-1, weight.shape[1]), SPARSITY)
            weight[removed[name]] = 0.0
    return removed


@pytest.mark.parametrize("order", [("block", "pruned"), ("sublayer", "pruned"), ("block", "dense")], ids="-".join)
@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox", "gemma3_text", "opt", "qwen3", "olmo2"], indirect=True)
def test_streamed_wanda_removes_what_the_paper_removes(folder, variant, bench, order):
    sequential, propagate = order
    options = {("sublayer", "pruned"): (*ANY, *SUBLAYER), ("block", "dense"): (*ANY, *DENSE)}.get(order, ANY)
    samples = calibration.calibration_set("random", None, samples=SAMPLES, seqlen=SEQLEN, seed=0, vocab_size=VOCABULARY)
    expected = removed_by_the_paper(dense(folder), samples.ids_NT, sequential, propagate)
    found = tensors(bench.prune(variant, "wanda", *options).folder)
    for block in matrices(dense(folder)):
        for name, module in block.items():
            zero = found[f"{name}.weight"] == 0
            assert torch.equal(zero.T if isinstance(module, Conv1D) else zero, expected[name]), name


@pytest.mark.parametrize("variant", ["llama", "gpt2"], indirect=True)
def test_the_three_orders_of_work_differ(folder, ids_NT):
    """Else the comparison above would not tell them apart."""
    masks = [
        torch.cat([mask.flatten() for mask in removed_by_the_paper(dense(folder), ids_NT, *order).values()])
        for order in (("block", "pruned"), ("sublayer", "pruned"), ("block", "dense"))
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("variant", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_stays_in_its_dtype(variant, tmp_path, method, dtype):
    source = build(variant, tmp_path / "source", dtype=dtype)
    prune(source, tmp_path / "out", "--method", method, *NM)
    written = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    for block in matrices(loaded):
        for module in block.values():
            assert ((weight_OI(module) == 0).reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("variant", ["llama_tied", "gpt2", "opt"])
def test_tied_weights_are_written_once_and_loaded_tied(variant, folder_of, tmp_path):
    prune(folder_of(variant), tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    loaded = resident(tmp_path / "out")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def rewritten(source, target, change):
    """A copy of a model directory whose tensors went through `change`, a function of the dictionary of them."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    save_file({k: v.contiguous() for k, v in change(tensors(source)).items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("copies", ["twice", "under the head's name", "with other values"])
def test_a_tied_checkpoint_means_what_it_means_to_transformers(copies, folder_of, tmp_path, ids_NT):
    def change(saved):
        embedding = saved["model.embed_tokens.weight"]
        if copies == "with other values":
            return {**saved, "lm_head.weight": embedding.flip(0)}
        if copies == "twice":
            return {**saved, "lm_head.weight": embedding.clone()}
        del saved["model.embed_tokens.weight"]
        return {**saved, "lm_head.weight": embedding}

    source = rewritten(folder_of("llama_tied"), tmp_path / "source", change)
    assert ("model.embed_tokens.weight" in tensors(source)) == (copies != "under the head's name")
    logits = resident(source)(ids_NT).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NT[:, 1:].flatten())
    assert math.log(perplexity.perplexity(Skeleton(source), ids_NT)) == pytest.approx(float(loss), rel=1e-5)
    prune(source, tmp_path / "out", "--sparsity", 0)
    assert torch.equal(resident(tmp_path / "out")(ids_NT).logits, logits)


@pytest.mark.parametrize(("variant", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])
def test_a_checkpoint_without_the_base_models_prefix_gives_the_same_weights(variant, prefix, folder_of, tmp_path, ids_NT):
    bare = rewritten(folder_of(variant), tmp_path / "bare", lambda saved: {k.removeprefix(prefix): v for k, v in saved.items()})
    prune(folder_of(variant), tmp_path / "out")
    prune(bare, tmp_path / "bare_out")
    expected, found = tensors(tmp_path / "out"), tensors(tmp_path / "bare_out")
    assert found.keys() == {name.removeprefix(prefix) for name in expected}
    assert all(torch.equal(found[name.removeprefix(prefix)], tensor) for name, tensor in expected.items())
    assert torch.equal(resident(tmp_path / "bare_out")(ids_NT).logits, resident(tmp_path / "out")(ids_NT).logits)


def test_tensors_the_model_does_not_know_are_copied(folder_of, tmp_path, ids_NT):
    extra = {
        "transformer.h.0.attn.bias": torch.ones(LIMIT, LIMIT).tril().to(torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-torch.inf),
        "transformer.h.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "steps": torch.arange(3),
        "empty": torch.empty(0, 4),
    }
    source = rewritten(folder_of("gpt2"), tmp_path / "source", lambda saved: saved | extra)
    prune(source, tmp_path / "out")
    found = tensors(tmp_path / "out")
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    prune(folder_of("gpt2"), tmp_path / "plain")
    assert torch.equal(resident(tmp_path / "out")(ids_NT).logits, resident(tmp_path / "plain")(ids_NT).logits)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_sharded_checkpoint_gives_the_same_weights(variant, folder_of, tmp_path):
    sharded = build(variant, tmp_path / "sharded", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    prune(sharded, tmp_path / "sharded_out")
    prune(folder_of(variant), tmp_path / "out")
    expected, found = tensors(tmp_path / "out"), tensors(tmp_path / "sharded_out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_no_negative_zero_survives(variant, method, folder_of, tmp_path):
    pruned = {name + ".weight" for block in matrices(resident(folder_of(variant))) for name in block}

    def plant(saved):
        for name in pruned:
            saved[name][::3] = -0.0
        return saved

    source = rewritten(folder_of(variant), tmp_path / "source", plant)
    prune(source, tmp_path / "out", "--method", method, "--sparsity", 0.2)
    written = tensors(tmp_path / "out")
    assert not any(has_negative_zeros(written[name]) for name in pruned)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_the_tiny_tokenizers_put_bos_where_the_published_ones_do(variant, folder_of):
    """The models above are only as good as their tokenizers: both kinds must be among them."""
    loaded = AutoTokenizer.from_pretrained(folder_of(variant))
    assert loaded("a").input_ids == tokenizer(with_bos=variant == "llama")("a").input_ids
    assert (loaded("a").input_ids[0] == loaded.bos_token_id) == (variant == "llama")


def test_a_checkpoint_is_read_as_safetensors_reads_it(folder):
    checkpoint = Checkpoint.open(folder)
    expected = tensors(folder)
    assert checkpoint.entries.keys() == expected.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())
