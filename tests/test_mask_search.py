"""A sparsity of single weights shared among blocks by search, and by OWL: from masks to whole runs."""

import json
import math
import random

import forked
import pytest
import torch
from crash_harness import digests
from in_process import llmprune as command
from tiny import build
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import mask_search
from llmprune.candidates import Candidates
from llmprune.mask_search import LARGEST, Masked, spread
from llmprune.models import Skeleton
from llmprune.options import SearchOptions
from llmprune.output import STATE
from llmprune.ranks import Ranks
from llmprune.recipe import Recipe
from llmprune.statistics import InputNorm
from llmprune.stream import Stream

SEARCH = {"iterations": 2, "generations": 2, "offspring": 4, "stages": [[2, 32], [1, 48]], "top_k": 32}
OPTIONS = {"method": "wanda", "calibration": "random", "samples": 16, "seqlen": 16, "sparsity": 0.5}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family_dir(request, model_dir, tmp_path_factory):
    return model_dir if request.param == "llama" else build("gpt2", tmp_path_factory.mktemp("gpt2"))


def prune(model, output, *, search=None, **options):
    return llmprune.prune(
        str(model), output=output, **{**OPTIONS, "allocation": "searched", "search": {**SEARCH, **(search or {})}, **options}
    )


def sparsities_of(result):
    return [block["sparsity"] for block in result.record["blocks"]]


def samples(count=16, tokens=12):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(0))


def masked(folder, ids_NT):
    """Candidates, and the root mean square of every linear's inputs that they are ranked by."""
    skeleton = Skeleton(folder)
    stream = Stream(skeleton, ids_NT)
    rms = {linear.name: inputs.rms_I for block in stream.survey().blocks() for linear, inputs in block.observe(InputNorm)}
    return Masked(skeleton, ids_NT, rms, top_k=32, ranks=Ranks()), rms


def stored(skeleton, linear):
    """A weight as [O, I]."""
    weight = skeleton.checkpoint.read(skeleton.stored_names[f"{linear.name}.weight"]).float()
    return weight.T if linear.transposed else weight


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["row", "layer"])
def test_a_level_keeps_what_wanda_keeps_at_its_sparsity(family_dir, group):
    recipe = Recipe(model="tiny", sparsity=0.4, group=group)
    candidates, rms = masked(family_dir, samples())
    skeleton = candidates.skeleton
    space, sparsities = spread(skeleton, [0.4] * 3, 0.05, SearchOptions())
    candidates.rank(sparsities, list(space.lowest), recipe)
    for block, linears in enumerate(skeleton.linears):
        for linear in linears:
            weight, code = stored(skeleton, linear), candidates.kept_by[linear.name]
            code = code.T if linear.transposed else code
            assert code.dtype == torch.uint8
            masks = []
            for level in range(space.lowest[block], space.highest[block] + 1):
                score = (weight.abs() * rms[linear.name]).contiguous()
                wanted = recipe.competition(default="row", sparsity=0.4 + 0.05 * level).keep(score)
                assert torch.equal(code > level - space.lowest[block], wanted), (linear.name, level)
                masks.append(wanted)
            for fewer, more in zip(masks[1:], masks, strict=False):
                assert (more | ~fewer).all()
                assert more.sum() > fewer.sum()


def test_levels_may_be_more_than_a_byte_counts(model_dir):
    candidates, rms = masked(model_dir, samples())
    skeleton, recipe = candidates.skeleton, Recipe(model="tiny", sparsity=0.5, group="layer")
    skeleton.linears = [skeleton.linears[0][:1]]
    space, sparsities = spread(skeleton, [0.5], 0.001, SearchOptions(levels=601))
    candidates.rank(sparsities, list(space.lowest), recipe)
    (linear,) = skeleton.linears[0]
    for level in (-300, 0, 300):
        pattern = recipe.competition(default="row", sparsity=0.5 + level / 1000)
        wanted = pattern.keep(stored(skeleton, linear).abs() * rms[linear.name])
        assert torch.equal(candidates.kept_by[linear.name] > level + 300, wanted)


def test_logits_of_a_candidate_are_those_of_a_model_masked_by_hand(family_dir):
    recipe, ids_NT = Recipe(model="tiny", sparsity=0.5), samples()
    candidates, rms = masked(family_dir, ids_NT)
    skeleton = candidates.skeleton
    space, sparsities = spread(skeleton, [0.5] * 3, 0.1, SearchOptions())
    candidates.rank(sparsities, list(space.lowest), recipe)
    by_hand = AutoModelForCausalLM.from_pretrained(family_dir, dtype=torch.float32)
    for linears, level in zip(skeleton.linears, (2, -3, 1), strict=True):
        for linear in linears:
            weight = stored(skeleton, linear)
            scores = weight.abs() * rms[linear.name]
            removed = int(round(0.5 + 0.1 * level, 6) * weight.shape[1] + 1e-9)
            order = scores.argsort(dim=1, stable=True)[:, :removed]
            weight = weight.scatter(1, order, 0)
            target = by_hand.get_parameter(f"{linear.name}.weight").data
            target.copy_(weight.T if linear.transposed else weight)
    with candidates.resident(), torch.no_grad():
        candidates.become((0, 4, -1))
        candidates.become((2, -3, 1))
        found = candidates.logits(3)
    wanted = by_hand(candidates.ids_WT[3:4]).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_dense_model_comes_back_bit_for_bit(family_dir):
    candidates, _ = masked(family_dir, samples())
    skeleton, dense = candidates.skeleton, AutoModelForCausalLM.from_pretrained(family_dir, dtype=torch.float32)
    space, sparsities = spread(skeleton, [0.5] * 3, 0.1, SearchOptions())
    candidates.rank(sparsities, list(space.lowest), Recipe(model="tiny", sparsity=0.5))
    with candidates.resident():
        candidates.become((4, -4, 0))
        changed = [skeleton.model.get_parameter(f"{linear.name}.weight") for linear in skeleton.all_linears()]
        assert all((weight == 0).any() for weight in changed)
        candidates._dense_logits(0)
        for name, parameter in dense.named_parameters():
            assert torch.equal(skeleton.model.get_parameter(name), parameter), name


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0.03125, 0.0078125, 0.00024])
def test_levels_have_no_gap_and_their_sparsities_are_sparsities(model_dir, interval):
    skeleton = Skeleton(model_dir)
    centre = [0.0, 0.02, 0.5, 0.93, 0.951, 0.96, 0.99]
    skeleton.linears = [skeleton.linears[0]] * len(centre)
    space, sparsities = spread(skeleton, centre, interval, SearchOptions())
    for sparsity, low, high, levels in zip(centre, space.lowest, space.highest, sparsities, strict=True):
        assert low <= 0 <= high
        assert levels == pytest.approx([sparsity + z * interval for z in range(low, high + 1)], abs=1e-6)
        assert all(0 <= each <= max(LARGEST, sparsity) for each in levels)


@pytest.mark.parametrize("options", [{"sparsity": 0.37}, {"group": "layer"}, {"sparsity": 0.03}, {"sparsity": 0.99}], ids=str)
def test_no_candidate_leaves_the_budget(model_dir, tmp_path, monkeypatch, options):
    losses, seen = Candidates.losses, set()

    def spy(self, candidates, windows):
        seen.update(candidates)
        return losses(self, candidates, windows)

    monkeypatch.setattr(Candidates, "losses", spy)
    result = prune(model_dir, tmp_path / "out", **options)
    assert len(seen) > (1 if options.get("sparsity") != 0.99 else 0)
    assert all(sum(candidate) == 0 for candidate in seen)
    found, target = sparsities_of(result), options.get("sparsity", 0.5)
    assert sum(found) / len(found) == pytest.approx(target, abs=1e-6)
    # A row of 36 or 52 weights, or a matrix of them, loses whole weights.
    assert result.record["sparsity"] == pytest.approx(target, abs=1e-3 if "group" in options else 1 / 36)


def test_blocks_of_different_sizes_lose_what_was_declared_but_for_less_than_a_level_of_the_smallest(model_dir, monkeypatch):
    skeleton = Skeleton(model_dir)
    first, second, third = skeleton.linears
    monkeypatch.setattr(skeleton, "linears", [first, second[:3], third])
    space, _ = spread(skeleton, [0.5] * 3, 0.03125, SearchOptions())
    sizes = [sum(linear.numel for linear in linears) for linears in skeleton.linears]
    assert list(space.costs) == sizes
    assert space.slack == min(sizes) - 1


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_however_the_search_errs_the_result_is_no_worse_than_uniform_on_held_out_samples(model_dir, tmp_path, monkeypatch):
    losses, noise = Candidates.losses, random.Random(0)

    def erring(self, candidates, windows):
        found = losses(self, candidates, windows)
        # The farther from where it started, the better it seems.
        return found if min(windows) >= self.pool else [noise.random() - sum(map(abs, each)) for each in candidates]

    monkeypatch.setattr(Candidates, "losses", erring)
    iterations = prune(model_dir, tmp_path / "out", search={"generations": 3}).record["evolution"]
    assert len(iterations) == 2
    assert iterations[0]["sparsities"]["before"] == [0.5] * 3
    for iteration in iterations:
        before, after = iteration["held_out"]["before"], iteration["held_out"]["found"]
        assert (iteration["sparsities"]["after"] == iteration["sparsities"]["before"]) == (before <= after)
    assert iterations[1]["sparsities"]["before"] == iterations[0]["sparsities"]["after"]
    start = min(iterations[0]["held_out"].values())
    assert iterations[1]["held_out"]["before"] == pytest.approx(start, rel=1e-6)


def test_a_block_that_the_model_hardly_needs_loses_more(tmp_path):
    source = build("llama", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.model.layers[1].named_parameters():
        if "proj" in name and ("o_proj" in name or "down_proj" in name):
            parameter.data.mul_(1e-3)
    model.save_pretrained(source)
    # All that there is to search, on all tokens.
    search = {"iterations": 1, "interval": 0.25, "levels": 5, "generations": 4, "offspring": 8, "stages": [[1, 112]]}
    result = prune(source, tmp_path / "out", search=search, samples=8)
    first, second, third = sparsities_of(result)
    assert second == 0.625
    assert second > max(first, third)
    assert result.record["evolution"][0]["held_out"]["found"] < result.record["evolution"][0]["held_out"]["before"]


def test_the_record_says_what_the_search_found_and_blocks_were_pruned_by_it(model_dir, tmp_path):
    result = prune(model_dir, tmp_path / "out", group="layer")
    iterations = result.record["evolution"]
    assert [len(iteration["generations"]) for iteration in iterations] == [2, 2]
    found = sparsities_of(result)
    assert found == iterations[-1]["sparsities"]["after"]
    for name, facts in result.record["linears"].items():
        (block,) = [int(part) for part in name.split(".") if part.isdigit()]
        assert facts["zeros"] / math.prod(facts["shape"]) == pytest.approx(found[block], abs=2e-3), name


def test_without_iterations_it_is_uniform(model_dir, tmp_path):
    result = prune(model_dir, tmp_path / "out", search={"iterations": 0}, samples=4)
    uniform = llmprune.prune(str(model_dir), output=tmp_path / "uniform", **{**OPTIONS, "samples": 4})
    assert "evolution" not in result.record
    assert shards(tmp_path / "out") == shards(uniform.directory)


def shards(directory):
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


@pytest.mark.parametrize("options", [{"reconstruct": "lstsq", "method": "magnitude"}, {"method": "best"}], ids=str)
def test_whatever_prunes_uses_the_shares(model_dir, tmp_path, options):
    result = prune(model_dir, tmp_path / "out", group="layer", **options)
    assert sparsities_of(result) == result.record["evolution"][-1]["sparsities"]["after"]
    assert result.record["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_a_model_of_one_block_ends_where_it_started(tmp_path):
    source = build("llama", tmp_path / "source", num_hidden_layers=1)
    result = prune(source, tmp_path / "out")
    assert sparsities_of(result) == [0.5]
    assert all(iteration["generations"] == [] for iteration in result.record["evolution"])


def test_micro_batches_do_not_change_a_byte(model_dir, tmp_path):
    for micro_batch, name in ((1, "one"), (4, "four")):
        prune(model_dir, tmp_path / name, micro_batch=micro_batch, search={"iterations": 1})
    assert shards(tmp_path / "one") == shards(tmp_path / "four")


# Resumption -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = prune(model_dir, folder)
    assert not (folder / STATE).exists()
    return digests(folder), sparsities_of(result)


# What fails, and at which call: a generation is two calls of `losses`, a judgement one.
PLACES = {
    "the first generation": ("losses", 1),
    "the second generation": ("losses", 3),
    "the judgement": ("held_out_losses", 1),
    "the second iteration": ("losses", 7),
    "the last judgement": ("held_out_losses", 2),
}


QUICK = ("the second generation", "the judgement")


@pytest.mark.parametrize("place", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in PLACES])
def test_a_search_interrupted_anywhere_goes_on_to_the_same_bytes(model_dir, tmp_path, monkeypatch, undisturbed, place):
    name, count = PLACES[place]
    work, left = getattr(Candidates, name), [count]

    def failing(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return work(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Candidates, name, failing)
        with pytest.raises(KeyboardInterrupt):
            prune(model_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert sparsities_of(prune(model_dir, tmp_path / "out")) == undisturbed[1]
    assert digests(tmp_path / "out") == undisturbed[0]


def test_a_generation_that_is_finished_is_not_searched_again(model_dir, tmp_path, monkeypatch):
    write, search, saved, resumed = mask_search.Output.write_progress, Candidates.search, [], []

    def failing(self, tensors, facts):
        write(self, tensors, facts)
        saved.append(facts)
        if len(saved) == 4:  # after a first iteration: two generations and their end
            raise KeyboardInterrupt

    def spy(*args, resume, **options):
        resumed.append(resume)
        return search(*args, resume=resume, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mask_search.Output, "write_progress", failing)
        with pytest.raises(KeyboardInterrupt):
            prune(model_dir, tmp_path / "out")
    monkeypatch.setattr(Candidates, "search", spy)
    prune(model_dir, tmp_path / "out")
    (state,) = resumed
    assert len(state.history) == 1
    assert json.dumps(state.as_json()) == json.dumps(saved[-1]["state"])


def test_when_all_is_searched_only_pruning_goes_on(model_dir, tmp_path, monkeypatch, undisturbed):
    write, blocks = mask_search.Output.write_block, []

    def failing(self, *args):
        blocks.append(args[0])
        if len(blocks) == 2:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(mask_search.Output, "write_block", failing)
        with pytest.raises(KeyboardInterrupt):
            prune(model_dir, tmp_path / "out")
    monkeypatch.setattr(Candidates, "search", lambda *args, **options: pytest.fail("searched again"))
    prune(model_dir, tmp_path / "out")
    assert digests(tmp_path / "out") == undisturbed[0]


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_find_and_write_what_one_does(model_dir, tmp_path):
    one = prune(model_dir, tmp_path / "one")
    flags = ["--quiet", "--allocation=searched", "--output", tmp_path / "two", "--search", json.dumps(SEARCH)[1:-1]]
    flags += [part for key, value in OPTIONS.items() for part in (f"--{key}", str(value))]
    codes, errors = forked.ranks(*[["prune", "--model", model_dir, *flags]] * 2)
    assert codes == [0, 0], errors
    assert json.loads((tmp_path / "two" / "llmprune.json").read_text())["evolution"] == one.record["evolution"]
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


# OWL ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_by_owl_blocks_stay_within_its_bounds_and_the_whole_loses_what_was_declared(model_dir, tmp_path, sparsity):
    options = {**OPTIONS, "sparsity": sparsity, "allocation": "owl", "group": "layer"}
    result = llmprune.prune(str(model_dir), output=tmp_path / "out", **options)
    found = sparsities_of(result)
    assert len(set(found)) > 1
    assert max(abs(each - sparsity) for each in found) == pytest.approx(0.08, abs=1e-3)
    assert sum(found) / len(found) == pytest.approx(sparsity, abs=1e-3)
    assert result.record["sparsity"] == pytest.approx(sparsity, abs=1e-3)


# What makes no sense --------------------------------------------------------------------------------------------------

REFUSED = {
    "no data": (["--method", "magnitude"], ["--allocation searched looks at activations", "--method magnitude at none"]),
    "two searches": (["--method", "icbs"], ["--allocation searched and --method icbs are two searches"]),
    "N:M": (["--pattern", "2:4"], ["--allocation searched has no meaning with pattern 2:4"]),
    "few samples": (["--samples", "4"], ["every 8th sample", "4 samples of 16 leave it", "give more --samples"]),
    "few samples, default stages": (["--samples", "4", "--search", "generations: 6"], ["4 samples of 16", "--search"]),
    "few tokens": (["--search", "stages: [[1, 4096]]"], ["up to 4096 tokens", "leave it 224"]),
    "a search that is not made": (["--allocation", "owl"], ["--search has no effect", "--allocation searched"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence_and_leaves_nothing(model_dir, tmp_path, case):
    flags, words = REFUSED[case]
    given = {**{f"--{key}": str(value) for key, value in OPTIONS.items() if key != "sparsity"}, "--allocation": "searched"}
    given |= {"--search": json.dumps(SEARCH)[1:-1]} | dict(zip(flags[::2], flags[1::2], strict=True))
    outcome = command(
        "prune", "--model", model_dir, "--output", tmp_path / "out", *(part for pair in given.items() for part in pair)
    )
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err
    assert list(tmp_path.iterdir()) == []
