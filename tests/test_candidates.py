"""Candidates of a search: on which samples, by which loss, with which memory, and shared by ranks."""

import pytest
import torch
from tiny import VOCABULARY, build
from transformers import AutoModelForCausalLM

from llmprune.candidates import Candidates
from llmprune.errors import LLMPruneError
from llmprune.models import Skeleton
from llmprune.ranks import Ranks


class Scaled(Candidates):
    """Block i at level z has its down matrix times 1 + z / 10."""

    def __init__(self, skeleton, ids_NT, **options):
        super().__init__(skeleton, ids_NT, len(skeleton.blocks), **{"top_k": VOCABULARY, "ranks": Ranks(), **options})
        self.dense, self.applied = {}, []

    def apply(self, position, level):
        self.applied.append((position, level))
        linear = next(each for each in self.skeleton.linears[position] if each.role == "down")
        dense = self.dense.setdefault(position, linear.parameter.data)
        self.assign(f"{linear.name}.weight", dense if level is None else dense * (1 + level / 10))


def samples(count=16, tokens=12):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("llama_tied", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def skeleton(folder):
    return Skeleton(folder)


def test_every_eighth_sample_judges_and_is_in_no_pool(skeleton):
    ids_NT = samples(20)
    candidates = Scaled(skeleton, ids_NT)
    held_out = [7, 15]
    assert candidates.pool == 18
    assert torch.equal(candidates.ids_WT[:18], ids_NT[[i for i in range(20) if i not in held_out]])
    assert torch.equal(candidates.ids_WT[18:], ids_NT[held_out])


def test_losses_are_those_of_whole_models_in_float64(folder, skeleton):
    ids_NT = samples()
    candidates = Scaled(skeleton, ids_NT)
    wanted = []
    dense, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    for block, level in enumerate((3, -2, 1)):
        other.model.layers[block].mlp.down_proj.weight.data *= 1 + level / 10
    for window in (0, 4, 14, 15):
        with torch.no_grad():
            p, q = (
                model(candidates.ids_WT[window : window + 1]).logits[0, :-1].double().log_softmax(-1)
                for model in (dense, other)
            )
        wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
    with candidates.resident():
        zero, loss = candidates.losses([(0, 0, 0), (3, -2, 1)], [0, 4])
        held_out = candidates.held_out_losses([(3, -2, 1)])
    assert zero == 0
    assert loss == pytest.approx(sum(wanted[:2]) / 2, rel=1e-4)
    assert held_out == pytest.approx([sum(wanted[2:]) / 2], rel=1e-4)


def test_only_positions_whose_level_changes_are_touched(skeleton):
    candidates = Scaled(skeleton, samples())
    with candidates.resident():
        for candidate in ((1, 0, 0), (1, 0, 2), (1, 0, 2), (0, 0, 2)):
            candidates.become(candidate)
        applied = list(candidates.applied)
    assert applied == [(0, 1), (1, 0), (2, 0), (2, 2), (0, 0)]


def test_the_dense_model_is_asked_once_about_a_window(skeleton, monkeypatch):
    candidates = Scaled(skeleton, samples())
    asked = []
    monkeypatch.setattr(candidates, "_dense_logits", lambda window: asked.append(window) or torch.zeros(12, VOCABULARY))
    object.__setattr__(candidates.teacher, "logits_of", candidates._dense_logits)
    with candidates.resident():
        for windows in ([1, 2], [2, 3], [1, 3]):
            candidates.losses([(0, 0, 0), (1, 0, 0)], windows)
    assert asked == [1, 2, 3]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_stays_in_memory(skeleton, fails):
    candidates = Scaled(skeleton, samples())

    def use():
        with candidates.resident():
            assert all(parameter.device.type == "cpu" for parameter in skeleton.model.parameters())
            candidates.become((1, 2, 3))
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            use()
    else:
        use()
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    assert candidates.current == [None] * 3


def test_tied_embeddings_are_one_matrix_in_memory(skeleton):
    candidates = Scaled(skeleton, samples())
    with candidates.resident():
        model = skeleton.model
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_damaged_checkpoint_is_one_sentence(folder, skeleton, monkeypatch):
    read = skeleton.checkpoint.read
    broken = "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(
        type(skeleton.checkpoint), "read", lambda self, name: read(name).fill_(torch.nan) if name == broken else read(name)
    )
    with pytest.raises(LLMPruneError, match=f"{broken}.*NaN"), Scaled(skeleton, samples()).resident():
        pass
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_too_few_samples_to_judge_by_are_refused(skeleton):
    Scaled(skeleton, samples(8))
    with pytest.raises(LLMPruneError, match=r"every 8th calibration sample to judge by and got 7: give --samples 8"):
        Scaled(skeleton, samples(7))


def test_a_model_that_does_not_fit_in_memory_is_refused_with_a_way_out(skeleton, monkeypatch):
    monkeypatch.setattr(Skeleton, "free_memory", lambda self: 1000)
    with pytest.raises(LLMPruneError, match=r"has the whole model in memory.*--allocation uniform"):
        Scaled(skeleton, samples())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_share_candidates_and_come_to_the_losses_of_one(folder, count):
    levels = [(i, -i, 2) for i in range(count)]
    whole = Scaled(Skeleton(folder), samples())
    with whole.resident():
        wanted = whole.losses(levels, [0, 3])

    class Third(Ranks):
        def __init__(self, rank):
            self.size, self.rank, self.part = 3, rank, None

        def sum(self, tensor):
            self.part = tensor.clone()

    parts = []
    for rank in range(3):
        one = Scaled(Skeleton(folder), samples(), ranks=Third(rank))
        with one.resident():
            one.losses(levels, [0, 3])
        parts.append(one.ranks.part)
        assert torch.count_nonzero(one.ranks.part) <= -(-count // 3)
    assert sum(parts).tolist() == wanted
