"""Týr from recipe to directory: budgets, known redundancy, resumption, ranks, bad input."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from checkpoints import changed
from crash_harness import digests
from tiny import HIDDEN, build
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import structure
from llmprune.anatomy import Anatomy, Cut, Sizes
from llmprune.checkpoint import Checkpoint
from llmprune.elimination import restricted
from llmprune.errors import LLMPruneError
from llmprune.methods import tyr
from llmprune.output import STATE
from llmprune.structure import PLAN
from llmprune.supernet import Position, Shrunk, Supernet

HARNESS = Path(__file__).parent / "helpers" / "crash_harness.py"
GROUPS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}
SEARCH = {"iterations": 1, "generations": 2, "offspring": 4, "stages": [[2, 32], [1, 48]], "top_k": 32}
OPTIONS = {"method": "tyr", "calibration": "random", "samples": 16, "seqlen": 16, "sparsity": 0.5}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"), **GROUPS)


def prune(model, output, *, search=None, **options):
    return llmprune.prune(str(model), output=output, **{**OPTIONS, "search": {**SEARCH, **(search or {})}, **options})


def logits(folder, ids_BT=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if ids_BT is None:
        ids_BT = torch.randint(3, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids_BT).logits


def kept(folder):
    """Channels and query heads that every block keeps."""
    blocks = json.loads((folder / PLAN).read_text())["blocks"]
    return [len(block["channels"]) for block in blocks], [len(block["heads"]) for block in blocks]


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "options", "channels", "query_heads"),
    [
        (0.5, {}, 78, 10),
        (0.3, {"search": {"iterations": 2}}, 109, 12),
        (0.5, {"heads": "q_balanced"}, 78, 9),
        (0.5, {"multiple_of": 16}, 80, 10),
        (0.25, {"multiple_of": 8}, 120, 14),
        (0.75, {"allocation": "uniform"}, 39, 4),
        (0.0, {"allocation": "uniform"}, 156, 18),
    ],
)
def test_channels_and_heads_that_stay_are_the_budget_to_the_unit(model_dir, tmp_path, sparsity, options, channels, query_heads):
    prune(model_dir, tmp_path / "out", sparsity=sparsity, **options)
    ffn, heads = kept(tmp_path / "out")
    assert (sum(ffn), sum(heads)) == (channels, query_heads)
    assert all(width % options.get("multiple_of", 1) == 0 for width in ffn)


@pytest.mark.parametrize("options", [{}, {"heads": "q_balanced", "multiple_of": 8}, {"type_coupling": "joint"}])
def test_no_candidate_leaves_the_budget(model_dir, tmp_path, monkeypatch, options):
    seen = []
    losses = Shrunk.losses

    def spy(self, candidates, windows):
        for candidate in candidates:
            units = [self.supernet.kept_units(number, level) for number, level in enumerate(candidate)]
            seen.append([(each, count) for each, count in zip(self.supernet.positions, units, strict=True)])
        return losses(self, candidates, windows)

    monkeypatch.setattr(Shrunk, "losses", spy)
    prune(model_dir, tmp_path / "out", search={"iterations": 2, "offspring": 8}, **options)
    assert len({tuple(count for _, count in candidate) for candidate in seen}) > 5
    start = seen[0] if not options.get("type_coupling") else None
    per_type = {
        tuple(sum(count for position, count in candidate if position.sublayer == which) for which in ("attention", "mlp"))
        for candidate in seen
    }
    if start:
        assert len(per_type) == 1
        return
    removed = [sum(position.cost * (position.units - count) for position, count in candidate) for candidate in seen]
    uniform = 9 - 5, 156 - 78
    head, channel = (next(p.cost for p, _ in seen[0] if p.sublayer == which) for which in ("attention", "mlp"))
    least = uniform[0] * head + uniform[1] * channel
    # A level is a head, or in the first iteration an eighth of the channels: less than the smaller of the two in all.
    assert all(0 <= each - least < min(head, 7 * channel) for each in removed)


def test_joint_coupling_lets_heads_trade_with_channels(model_dir, tmp_path):
    options = {"iterations": 1, "generations": 6, "offspring": 12}
    result = prune(model_dir, tmp_path / "out", type_coupling="joint", search=options)
    candidates = [generation["best"] for generation in result.record["evolution"][0]["generations"]]
    assert any(sum(candidate[0::2]) for candidate in candidates)


@pytest.mark.parametrize(("units", "share"), [(10, 0.5), (7, 0.33), (1, 0.4), (12, 0.999), (9, 0.01)])
def test_uniform_is_as_even_as_whole_units_can_be(units, share, monkeypatch):
    monkeypatch.setattr(tyr, "share_to_remove", lambda recipe, skeleton: share)
    positions = [Position(block, "mlp", units, 4, 1, 0, 1, 0) for block in range(5)]
    total = round((1 - share) * 5 * units)
    if total:
        found = tyr.uniform(SimpleNamespace(heads="kv_group"), SimpleNamespace(skeleton=None), positions)
        assert sum(found) == total
        assert max(found) - min(found) <= 1
    else:
        with pytest.raises(LLMPruneError, match="would leave none of the model's 60 4 channels: ask for less"):
            tyr.uniform(SimpleNamespace(heads="kv_group"), SimpleNamespace(skeleton=None), positions)


@pytest.mark.parametrize("widths", [(52, 52, 40), (52, 20, 20)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_uneven_blocks_and_rests_never_keep_more_than_there_is(widths, share, monkeypatch):
    monkeypatch.setattr(tyr, "share_to_remove", lambda recipe, skeleton: share)
    bodies = Anatomy("llama", 24, 4, tuple(Sizes(width, 2, 2) for width in widths), {"mlp.down_proj": Cut(None, "channel")})
    positions = [Position.of(bodies, block, "mlp", heads="kv_group", multiple=16) for block in range(3)]
    found = tyr.uniform(SimpleNamespace(heads="kv_group"), SimpleNamespace(skeleton=None), positions)
    assert all(0 <= count <= position.units for count, position in zip(found, positions, strict=True))
    assert abs(sum(found) - (1 - share) * sum(widths) / 16) <= sum(width % 16 for width in widths) / 16 + 0.5


# What is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["kv_group", "q_balanced"])
def test_all_formats_are_one_model(model_dir, tmp_path, heads):
    for format in ("auto", "padded", "masked"):
        prune(model_dir, tmp_path / format, format=format, heads=heads, search={"generations": 1})
        assert kept(tmp_path / format) == kept(tmp_path / "auto")
        torch.testing.assert_close(logits(tmp_path / format), logits(tmp_path / "auto"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tmp_path / "auto"), logits(model_dir), atol=0.1)


def test_a_share_of_zero_leaves_every_bit(model_dir, tmp_path):
    prune(model_dir, tmp_path / "out", sparsity=0.0)
    before, after = Checkpoint.open(model_dir), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.entries)


def test_weights_that_stay_make_up_for_those_that_went(model_dir, tmp_path, monkeypatch):
    """Against the closed form on the inputs that the pruned model gives."""
    hessians = {}
    damped = tyr.reconstruction.damped

    def spy(hessian_II, damping):
        made = damped(hessian_II, damping)
        hessians[len(hessians)] = made.clone()
        return made

    monkeypatch.setattr(tyr.reconstruction, "damped", spy)
    prune(model_dir, tmp_path / "out", allocation="uniform", format="masked")
    plan, dense, pruned = (
        json.loads((tmp_path / "out" / PLAN).read_text()),
        Checkpoint.open(model_dir),
        Checkpoint.open(tmp_path / "out"),
    )
    for index, block in enumerate(plan["blocks"]):
        name = f"model.layers.{index}.mlp.down_proj.weight"
        keep = torch.tensor(block["channels"])
        wanted = restricted(dense.read(name), hessians[2 * index + 1], keep, 0.0)
        torch.testing.assert_close(pruned.read(name)[:, keep], wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, dense.read(name)[:, keep], atol=1e-2)


def test_later_blocks_see_the_middle_level_and_not_the_dense_model(model_dir, tmp_path, monkeypatch):
    accumulate = tyr.accumulate
    checked = []

    def spy(supernet, number, linear, anatomy, options):
        accumulate(supernet, number, linear, anatomy, options)
        kept_, weight_OK = supernet.read(number, 0)
        columns = supernet.positions[number].columns(kept_, 12)
        assert torch.equal(linear.weight_OI[:, columns], weight_OK)
        assert torch.count_nonzero(linear.weight_OI) <= weight_OK.numel() < linear.numel
        checked.append(number)

    monkeypatch.setattr(tyr, "accumulate", spy)
    prune(model_dir, tmp_path / "out", search={"accumulate": "center"})
    assert checked == list(range(6))


def test_each_way_to_accumulate_shows_later_blocks_something_else(model_dir, tmp_path, monkeypatch):
    make_levels = tyr.make_levels
    seen = {}

    def spy(supernet, number, linear, inputs, recipe, stream):
        seen.setdefault(recipe.search.accumulate, {})[number] = inputs.mean_II
        make_levels(supernet, number, linear, inputs, recipe, stream)

    monkeypatch.setattr(tyr, "make_levels", spy)
    for way in ("expectation", "uniform", "center", "none"):
        prune(model_dir, tmp_path / way, search={"accumulate": way, "generations": 0})
    ways = list(seen)
    for i, one in enumerate(ways):
        for other in ways[:i]:
            assert torch.equal(seen[one][0], seen[other][0])
            assert all(not torch.allclose(seen[one][n], seen[other][n], rtol=1e-3) for n in range(1, 6))


def test_fitting_to_the_dense_model_comes_out_otherwise(model_dir, tmp_path):
    for match in ("block", "dense"):
        prune(model_dir, tmp_path / match, match=match, allocation="uniform", damping=0.1)
    assert not torch.allclose(logits(tmp_path / "block"), logits(tmp_path / "dense"), atol=1e-3)


# Known redundancy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "sparsity"), [("kv_group", 1 / 3), ("q_balanced", 1 / 2)])
def test_what_the_model_does_not_need_goes_first_and_its_logits_stay(model_dir, tmp_path, heads, sparsity):
    idle_channels, idle_heads = [1, 5, *range(20, 44)], [2, 3] if heads == "kv_group" else [0, 3, 5]

    def change(tensors):
        for index in range(3):
            tensors[f"model.layers.{index}.mlp.down_proj.weight"][:, idle_channels] = 0
            for head in idle_heads:
                tensors[f"model.layers.{index}.self_attn.o_proj.weight"][:, 12 * head : 12 * head + 12] = 0

    source = changed(model_dir, tmp_path / "source", change)
    prune(source, tmp_path / "out", sparsity=sparsity, heads=heads)
    for block in json.loads((tmp_path / "out" / PLAN).read_text())["blocks"]:
        assert set(range(HIDDEN)) - set(block["channels"]) <= set(idle_channels)
        assert set(range(6)) - set(block["heads"]) == set(idle_heads)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=1e-4, atol=1e-4)


def test_an_mlp_that_does_nothing_goes_whole_and_the_others_keep_more(tmp_path):
    source = build("llama", tmp_path / "dense", intermediate_size=48, **GROUPS)
    source = changed(source, tmp_path / "source", lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].zero_())
    prune(source, tmp_path / "out", search={"generations": 8, "offspring": 16, "stages": [[2, 96], [1, 192]]})
    ffn, _ = kept(tmp_path / "out")
    assert ffn[1] == 0
    assert sum(ffn) == 72
    assert min(ffn[0], ffn[2]) > 24


# The search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_however_the_search_errs_the_result_is_no_worse_than_the_centre_on_held_out_samples(
    model_dir, tmp_path, monkeypatch, seed
):
    losses, noise = Shrunk.losses, random.Random(seed)

    def erring(self, candidates, windows):
        found = losses(self, candidates, windows)
        # The farther from the centre, the better it seems.
        return found if min(windows) >= self.pool else [noise.random() - sum(map(abs, each)) for each in candidates]

    monkeypatch.setattr(Shrunk, "losses", erring)
    result = prune(model_dir, tmp_path / "out", seed=seed, search={"iterations": 2, "generations": 3})
    iterations = result.record["evolution"]
    assert len(iterations) == 2
    for iteration in iterations:
        before, after = iteration["held_out"]["before"], iteration["held_out"]["found"]
        assert (iteration["kept"]["after"] == iteration["kept"]["before"]) == (before <= after)
    assert iterations[1]["kept"]["before"] == iterations[0]["kept"]["after"]


def test_the_seed_decides(model_dir, tmp_path):
    # Samples of their own would make any search another one.
    calibration = tmp_path / "text.txt"
    calibration.write_text(" ".join(f"line {i} of {i * i}." for i in range(400)))
    made = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        made[name] = prune(model_dir, tmp_path / name, calibration=str(calibration), seed=seed)
    assert digests(tmp_path / "one") == digests(tmp_path / "again")
    assert made["one"].record["evolution"] == made["again"].record["evolution"]
    assert made["one"].record["evolution"] != made["other"].record["evolution"]


@pytest.mark.parametrize("coupling", ["separate", "joint"])
def test_a_model_of_one_block_ends_where_it_started(tmp_path, coupling):
    source = build("llama", tmp_path / "source", num_hidden_layers=1, **GROUPS)
    result = prune(source, tmp_path / "out", type_coupling=coupling)
    (iteration,) = result.record["evolution"]
    if coupling == "separate":
        assert iteration["generations"] == []
        assert kept(tmp_path / "out") == ([26], [4])
    assert result.record["sparsity"] > 0.3


# Resumption -----------------------------------------------------------------------------------------------------------

TWO = {"iterations": 2}


@pytest.fixture(scope="module")
def undisturbed(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    prune(model_dir, folder, search=TWO)
    assert not (folder / STATE).exists()
    return digests(folder)


PLACES = {
    "levels of the second block": (Supernet, "write", 4),
    "a generation": (Shrunk, "losses", 2),
    "the judgement": (Shrunk, "held_out_losses", 1),
    "the end of an iteration": (Supernet, "remove", 1),
    "the second supernet": (Supernet, "write", 10),
    "the last pruning": (tyr, "fit", 1),
    "the last pruning's middle": (tyr, "fit", 4),
}


QUICK = ("levels of the second block", "a generation", "the last pruning's middle")


@pytest.mark.parametrize("place", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in PLACES])
def test_a_run_interrupted_anywhere_goes_on_to_the_same_bytes(model_dir, tmp_path, monkeypatch, undisturbed, place):
    owner, name, count = PLACES[place]
    work, left = getattr(owner, name), [count]

    def failing(*args, **options):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return work(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(KeyboardInterrupt):
            prune(model_dir, tmp_path / "out", search=TWO)
    assert not (tmp_path / "out" / "config.json").exists()
    prune(model_dir, tmp_path / "out", search=TWO)
    assert digests(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out" / STATE).exists()


def test_levels_that_an_interrupted_run_has_made_are_not_made_again(model_dir, tmp_path, monkeypatch):
    write, made = Supernet.write, []

    def failing(self, number, levels, dtype):
        if len(made) == 4:
            made.append(None)
            raise KeyboardInterrupt
        write(self, number, levels, dtype)
        made.append(number)

    monkeypatch.setattr(Supernet, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        prune(model_dir, tmp_path / "out")
    prune(model_dir, tmp_path / "out")
    assert made == [0, 1, 2, 3, None, 4, 5]


def test_overwrite_forgets_an_interrupted_search(model_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Shrunk, "held_out_losses", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(model_dir, tmp_path / "out")
    assert list((tmp_path / "out" / STATE).glob("supernet*"))
    with pytest.raises(LLMPruneError, match=r"sparsity was 0\.5, is 0\.4"):
        prune(model_dir, tmp_path / "out", sparsity=0.4)
    prune(model_dir, tmp_path / "out", sparsity=0.4, overwrite=True)
    prune(model_dir, tmp_path / "fresh", sparsity=0.4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(model_dir, tmp_path):
    recipe = {**OPTIONS, "search": SEARCH}
    kills = os.environ.get("LLMPRUNE_KILLS", "2")
    process = forked.python(HARNESS, model_dir, tmp_path, "--kills", kills, "--recipe", json.dumps(recipe))
    counts, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    assert json.loads(counts)["kills"] == int(kills)


# Ranks --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_find_and_write_what_one_does(model_dir, tmp_path):
    one = prune(model_dir, tmp_path / "one")
    flags = ["--quiet", "--output", tmp_path / "two", "--search", json.dumps(SEARCH)[1:-1]]
    flags += [part for key, value in OPTIONS.items() for part in (f"--{key}", str(value))]
    codes, errors = forked.ranks(*[["prune", "--model", model_dir, *flags]] * 2)
    assert codes == [0, 0], errors
    assert (tmp_path / "two" / PLAN).read_bytes() == (tmp_path / "one" / PLAN).read_bytes()
    two = json.loads((tmp_path / "two" / "llmprune.json").read_text())
    for ours, theirs in zip(one.record["evolution"], two["evolution"], strict=True):
        # Hessians are sums in float32 whose order depends on the number of ranks.
        assert ours["kept"] == theirs["kept"]
        assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-3)
    torch.testing.assert_close(logits(tmp_path / "two"), logits(tmp_path / "one"), rtol=1e-3, atol=1e-3)


# Bad input ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "few samples": ({"samples": 7}, "every 8th sample, but 7 samples of 16"),
    "few tokens": ({"search": {"stages": [[1, 4096]]}}, "up to 4096 tokens.*leave it 224: give more --samples, or smaller"),
    "even levels": ({"search": {"levels": 4}}, "levels are 4: give an odd number"),
    "no survivors": ({"search": {"stages": [[0, 10]]}}, "at least one survivor and one token"),
    "an unknown option": ({"search": {"speed": 3}}, "Unknown option 'search.speed'"),
    "a negative number": ({"search": {"iterations": -1}}, "Option search.iterations is -1"),
    "a wide multiple": ({"multiple_of": 64}, "--multiple-of 64 is more than the 52 channels of a block"),
    "no head left": ({"sparsity": 0.98}, "98.00% would leave none of the model's 9 KV groups: ask for less, or --heads"),
    "no channel left": ({"sparsity": 0.85, "heads": "q_balanced", "multiple_of": 52}, "none of the model's 3 52 channels"),
    "single weights": ({"pattern": "2:4"}, "--pattern 2:4 is about single weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence_and_leaves_nothing(model_dir, tmp_path, case):
    options, message = REFUSED[case]
    with pytest.raises(LLMPruneError, match=message) as refusal:
        prune(model_dir, tmp_path / "out", **options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_family_that_cannot_be_smaller_is_named(tmp_path):
    source = build("gpt2", tmp_path / "gpt2")
    for format in ("auto", "masked"):
        with pytest.raises(LLMPruneError, match=r"'gpt2'.*--format masked"):
            prune(source, tmp_path / "out", format=format)


def test_a_pruned_model_is_pruned_further(model_dir, tmp_path):
    prune(model_dir, tmp_path / "once", sparsity=0.3)
    ffn, heads = kept(tmp_path / "once")
    prune(tmp_path / "once", tmp_path / "twice", sparsity=0.3)
    more_ffn, more_heads = kept(tmp_path / "twice")
    assert abs(sum(more_ffn) - 0.7 * sum(ffn)) <= 0.5
    assert abs(sum(more_heads) - 0.7 * sum(heads)) <= 1
    assert logits(tmp_path / "twice").isfinite().all()


# A real model ---------------------------------------------------------------------------------------------------------


def test_on_a_trained_model_the_search_beats_uniform_and_making_up_beats_cutting(stories260k, data_dir, tmp_path, monkeypatch):
    """On text that neither has seen."""
    options = {
        "calibration": str(data_dir / "wikitext-2-raw-v1" / "validation.parquet"),
        "samples": 16,
        "seqlen": 64,
        "sparsity": 0.3,
        "search": {"generations": 4, "offspring": 8, "stages": [[2, 256], [1, 512]]},
    }
    ids_BT = torch.randint(3, 500, (1, 8), generator=torch.Generator().manual_seed(0))
    ids_BT = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).generate(
        ids_BT.expand(8, -1), do_sample=True, max_new_tokens=100, pad_token_id=0
    )
    dense = logits(stories260k, ids_BT).log_softmax(-1)

    def divergence(folder):
        return float((dense.exp() * (dense - logits(folder, ids_BT).log_softmax(-1))).sum(-1).mean())

    prune(stories260k, tmp_path / "uniform", allocation="uniform", **options)
    found = prune(stories260k, tmp_path / "searched", **options)
    monkeypatch.setattr(tyr, "fit", lambda linear, weight_OK, at: structure.fit(linear, linear.weight_OI[:, at], at))
    prune(stories260k, tmp_path / "cut", allocation="uniform", **options)
    (iteration,) = found.record["evolution"]
    assert iteration["held_out"]["found"] < iteration["held_out"]["before"]
    assert divergence(tmp_path / "searched") < divergence(tmp_path / "uniform") < divergence(tmp_path / "cut")
