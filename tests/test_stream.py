"""The stream: every mode, cut and interruption gives what a plain pass over the resident model gives."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_llama
from transformers import LlamaForCausalLM

from llmprune import methods
from llmprune.errors import LLMPruneError
from llmprune.models import Skeleton
from llmprune.ranks import Ranks
from llmprune.recipe import Recipe
from llmprune.statistics import InputNorm
from llmprune.stream import Stream

BLOCKS = 3
MODES = [
    {"sequential": "block", "propagate": "pruned"},
    {"sequential": "sublayer", "propagate": "pruned"},
    {"sequential": "block", "propagate": "dense"},
    {"sequential": "sublayer", "propagate": "dense"},
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), intermediate_size=44, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(0, 61, (6, 20), generator=torch.Generator().manual_seed(1))


@dataclass
class Memory:
    """Stands in for the output directory."""

    tensors: dict = field(default_factory=dict)
    finished_blocks: int = 0
    stop_at: int | None = None

    def write_outer(self):
        pass

    def write_block(self, index, tensors, facts):
        self.tensors[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    def read_block(self, index):
        return {name: tensor.clone() for name, tensor in self.tensors[index].items()}


def pruned(model_dir, ids_NT, method="wanda", memory=None, sparsity=0.5, **options):
    memory = memory or Memory()
    stream = Stream(Skeleton(model_dir), ids_NT, output=memory, **options)
    methods.load(method).prune(stream, Recipe(model="tiny", method=method, sparsity=sparsity))
    return memory.tensors, stream


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[block][name], right[block][name]) for block in left for name in left[block]
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode.values()))
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_micro_batches_and_offloading_do_not_change_a_bit(model_dir, ids_NT, tmp_path, method, mode):
    one, _ = pruned(model_dir, ids_NT, method, **mode)
    for micro_batch in (2, 4, 6):
        assert same(one, pruned(model_dir, ids_NT, method, micro_batch=micro_batch, **mode)[0])
    assert same(one, pruned(model_dir, ids_NT, method, offload=tmp_path, **mode)[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_scores_and_kept_weights_come_from_the_stored_weights_whatever_the_forward_computes_in(model_dir, ids_NT, method):
    memory = Memory()
    stream = Stream(Skeleton(model_dir, dtype=torch.bfloat16), ids_NT, output=memory)
    methods.load(method).prune(stream, Recipe(model="tiny", method=method, sparsity=0.0 if method == "sparsegpt" else 0.5))
    if method == "magnitude":
        assert same(memory.tensors, pruned(model_dir, ids_NT, method)[0])
    dense = load_file(model_dir / "model.safetensors")
    for tensors in memory.tensors.values():
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0])


def test_the_order_of_samples_does_not_change_wandas_masks(model_dir, ids_NT):
    masks, _ = pruned(model_dir, ids_NT)
    shuffled, _ = pruned(model_dir, ids_NT[torch.randperm(6)])
    assert same(masks, shuffled)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode.values()))
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("finished", range(1, BLOCKS))
def test_a_resumed_run_gives_the_same_bits(model_dir, ids_NT, mode, method, finished):
    whole, _ = pruned(model_dir, ids_NT, method, **mode)
    memory = Memory({block: whole[block] for block in range(finished)}, finished)
    assert same(whole, pruned(model_dir, ids_NT, method, memory, **mode)[0])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # (first samples through the whole block, others without its last linear) + the pruned pass, none for the last.
        (MODES[0], {"q_proj": 6 * (2 * BLOCKS - 1), "down_proj": 6 * (BLOCKS - 1) + 1}),
        (MODES[1], {"q_proj": 6 * BLOCKS, "down_proj": 6 * (BLOCKS - 1)}),
        (MODES[2], {"q_proj": 6 * BLOCKS, "down_proj": 6 * (BLOCKS - 1)}),
    ],
    ids=["block", "sublayer", "dense"],
)
def test_each_mode_runs_as_few_products_as_its_mathematics_needs(model_dir, ids_NT, mode, expected):
    skeleton = Skeleton(model_dir)
    calls = Counter()
    for linear in skeleton.all_linears():
        linear.module.register_forward_hook(lambda *_, name=linear.name: calls.update([name.rsplit(".", 1)[1]]))
    methods.load("wanda").prune(Stream(skeleton, ids_NT, **mode), Recipe(model="tiny"))
    assert {name: calls[name] for name in expected} == expected


@pytest.mark.parametrize("mode", MODES[:2], ids=["block", "sublayer"])
def test_the_stream_ends_where_the_pruned_model_ends(model_dir, ids_NT, mode):
    tensors, stream = pruned(model_dir, ids_NT, keep_last=True, micro_batch=4, **mode)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.load_state_dict({k: v for block in tensors.values() for k, v in block.items()}, strict=False)
    model.model.norm = torch.nn.Identity()
    expected = model.model(input_ids=ids_NT, use_cache=False).last_hidden_state
    torch.testing.assert_close(stream.activations.states_NTI, expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_resident_models_hooks(model_dir, ids_NT):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: expected.update(
                    {name: args[0].detach().flatten(0, 1).double().square().mean(0).sqrt()}
                )
            )
    model(ids_NT)
    seen = {}
    for block in Stream(Skeleton(model_dir), ids_NT).blocks():
        for linear, norm in block.observe(InputNorm):
            seen[linear.name] = norm
            torch.testing.assert_close(norm.rms_I.double(), expected[linear.name], rtol=1e-4, atol=1e-6)
    assert seen.keys() == expected.keys()
    # Linears that read the same tensor share one statistic.
    assert len({id(norm) for norm in seen.values()}) == 4 * BLOCKS


@pytest.mark.parametrize("mode", MODES[:2], ids=["block", "sublayer"])
def test_an_error_inside_a_block_is_not_swallowed_and_hooks_are_removed(model_dir, ids_NT, mode):
    skeleton = Skeleton(model_dir)

    def broken(*_):
        raise ValueError("from the model's own code")

    handle = skeleton.blocks[1].mlp.act_fn.register_forward_hook(broken)
    stream = Stream(skeleton, ids_NT, **mode)
    with pytest.raises(ValueError, match="from the model's own code"):
        methods.load("wanda").prune(stream, Recipe(model="tiny"))
    handle.remove()
    for linear in skeleton.all_linears():
        assert not linear.module._forward_pre_hooks
    for block in skeleton.blocks:
        assert "forward" not in vars(block)


def test_only_one_block_is_in_memory(model_dir, ids_NT):
    skeleton = Skeleton(model_dir)
    for block in Stream(skeleton, ids_NT).blocks():
        filled = [
            index for index, module in enumerate(skeleton.blocks) if any(p.device.type != "meta" for p in module.parameters())
        ]
        assert filled == [block.index]
        assert skeleton.model.model.embed_tokens.weight.device.type == "meta"


def test_infinite_weights_are_named(model_dir, tmp_path, ids_NT):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(LLMPruneError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN or infinite"):
        pruned(tmp_path, ids_NT)


def test_infinite_activations_name_the_block(model_dir, tmp_path, ids_NT):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e6
    model.model.layers[1].mlp.down_proj.weight.data *= 1e38
    model.save_pretrained(tmp_path)
    with pytest.raises(LLMPruneError, match="Block 1 produced NaN or infinite"):
        pruned(tmp_path, ids_NT, sparsity=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("samples", "micro_batch"), [(4, 1), (7, 1), (9, 2), (32, 3)])
def test_ranks_share_all_samples(size, samples, micro_batch):
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.size, ranks.rank = size, rank
        shares += list(range(samples))[ranks.share(samples, micro_batch)]
    assert shares == list(range(samples))


def test_more_ranks_than_samples_are_refused():
    ranks = Ranks()
    ranks.size = 5
    with pytest.raises(LLMPruneError, match="5 ranks cannot share 4 calibration samples"):
        ranks.share(4, 1)


def test_ranks_get_whole_micro_batches_where_there_are_enough():
    ranks = Ranks()
    ranks.size, ranks.rank = 3, 1
    assert ranks.share(12, 2) == slice(4, 8)
    assert ranks.share(12, 6) == slice(4, 8)
