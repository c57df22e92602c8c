"""Global iCBS: the gradients it takes, the weights it looks at, what its steps may not change, and going on after a crash."""

from pathlib import Path

import psutil
import pytest
import torch
from in_process import llmprune as cli
from safetensors.torch import load_file
from tiny import build

import llmprune
from llmprune.curvature import Probe, differentiate, mean_loss
from llmprune.errors import LLMPruneError
from llmprune.methods import icbs
from llmprune.models import Linear, Skeleton
from llmprune.options import PRESETS, IcbsOptions
from llmprune.output import Output
from llmprune.recipe import Recipe
from llmprune.sampling import sample_from_model
from llmprune.stream import Stream
from llmprune.swaps import Matrix, Swaps, packed, unpacked

SAMPLES, SEQLEN = 16, 24
QUICK = {"steps": 4, "block_size": 64, "positions": 64}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_dir(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=2)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(3, 259, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))


def filled(folder: Path) -> Skeleton:
    """The whole dense model in memory."""
    skeleton = Skeleton(folder)
    skeleton.fill_outer(head=True)
    for block in range(len(skeleton.blocks)):
        names = skeleton.block_parameters(block)
        skeleton.fill_block(block, {name: skeleton.checkpoint.read(skeleton.stored_names[name]) for name in names})
    return skeleton


def search(folder, ids_NT, *, recipe=None, **options):
    """A search before its first step."""
    recipe = Recipe.model_validate({"model": "tiny", "seqlen": ids_NT.shape[1], "micro_batch": 4, **(recipe or {})})
    return icbs.Search(Stream(Skeleton(folder), ids_NT, micro_batch=4), recipe, IcbsOptions(**{**QUICK, **options}))


def finished(folder, ids_NT, **options):
    """A search after its last step."""
    done = search(folder, ids_NT, **options)
    done.run()
    return done


def masks(done):
    return {name: matrix.keep_OI for name, matrix in done.matrices.items()}


def start(folder, ids_NT, **options):
    """The masks that a search starts from."""
    fresh = search(folder, ids_NT, **options)
    fresh._start()
    return masks(fresh)


def matrix(rows, columns, *, pruned=0.5, cell=None, seed=0):
    """A matrix with random weights and a random mask of exact rows, in memory."""
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Linear(columns, rows, bias=False)
    dense = torch.randn(rows, columns, generator=generator)
    linear = Linear("tiny", "q", 0, module, transposed=False, stored=dense)
    keep = torch.rand(rows, columns, generator=generator).argsort(dim=1).argsort(dim=1) >= int(columns * pruned)
    made = Matrix(linear, keep, cell, 1.0)
    made.load(torch.device("cpu"), torch.float32)
    return made


# Gradients.


@pytest.mark.parametrize("fisher", ["sequence", "token"])
def test_a_blocks_gradients_are_those_of_autograd_one_by_one(model_dir, ids_NT, fisher):
    skeleton = filled(model_dir)
    ids_BT = ids_NT[:3]
    probes = []
    for linear in skeleton.all_linears():
        block_N = torch.randperm(linear.numel, generator=torch.Generator().manual_seed(1))[:50]
        probes.append(Probe(linear, block_N, fisher=fisher, stride=1))
    loss = differentiate(skeleton, ids_BT, probes, micro_batch=2)
    assert loss == pytest.approx(mean_loss(skeleton, ids_BT, micro_batch=3), rel=1e-6)
    for linear in skeleton.all_linears():
        linear.parameter.requires_grad_()
    gradients = []
    for ids_T in ids_BT:
        logits_TV = skeleton.model(input_ids=ids_T[None], use_cache=False).logits[0]
        own = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:])
        found = torch.autograd.grad(own, [probe.linear.parameter for probe in probes])
        gradients.append([g.T if probe.linear.transposed else g for g, probe in zip(found, probes, strict=True)])
    for probe, *each in zip(probes, *gradients, strict=True):
        expected_BN = torch.stack(each).flatten(1)[:, probe.block_N]
        torch.testing.assert_close(probe.gradient_OI, torch.stack(each).sum(0), rtol=1e-4, atol=1e-7)
        found_BN = probe.factor_BN
        if fisher == "token":
            # Positions are samples of their own: their mean over a sequence is the sequence's gradient.
            found_BN = found_BN.view(3, SEQLEN, -1).mean(1)
            assert probe.factor_BN.square().sum() / (3 * SEQLEN) > expected_BN.square().sum() / 3
        torch.testing.assert_close(found_BN, expected_BN, rtol=1e-4, atol=1e-7)


def test_a_block_named_after_the_backward_has_the_same_gradients(llama_dir, ids_NT):
    skeleton = filled(llama_dir)
    linear = skeleton.linears[1][2]
    block_N = torch.arange(0, linear.numel, 7)
    early, late = (Probe(linear, block, fisher="token", stride=3) for block in (block_N, None))
    differentiate(skeleton, ids_NT[:4], [early, late], micro_batch=2)
    late.look_at(block_N)
    assert torch.equal(early.factor_BN, late.factor_BN)


def test_no_gradient_is_taken_below_the_linear_that_is_looked_at(llama_dir, ids_NT):
    skeleton = filled(llama_dir)
    below = []
    skeleton.blocks[1].register_forward_pre_hook(lambda module, args: below.append(args[0].requires_grad))
    differentiate(skeleton, ids_NT[:1], [Probe(skeleton.linears[1][0], None, fisher="token", stride=1)], micro_batch=1)
    assert below == [False]


def test_the_dense_models_predictions_are_the_target_and_leave_the_pruned_weights_alone(llama_dir, ids_NT):
    skeleton = filled(llama_dir)
    for linear in skeleton.all_linears():
        linear.module._parameters["weight"] = torch.nn.Parameter(linear.parameter * 0, requires_grad=False)
    pruned = mean_loss(skeleton, ids_NT, micro_batch=4, target="dense")
    assert all(not linear.parameter.any() for linear in skeleton.all_linears())
    entropy = mean_loss(filled(llama_dir), ids_NT, micro_batch=4, target="dense")
    assert pruned > entropy + 0.01


# Blocks.


@pytest.mark.parametrize(("pruned", "size"), [(0.5, 20), (0.9, 20), (0.1, 30), (0.5, 1000)])
def test_a_block_holds_the_cheapest_of_each_side(pruned, size):
    made = matrix(10, 20, pruned=pruned)
    cost_OI = torch.randn(10, 20)
    chosen = made.choose(cost_OI, size, 0.0)
    assert len(chosen.unique()) == len(chosen)
    for side in (~made.keep_OI.flatten(), made.keep_OI.flatten()):
        members = side.nonzero()[:, 0]
        wanted = members[cost_OI.flatten()[members].argsort()][: size // 2]
        assert set(wanted.tolist()) == set(chosen[side[chosen]].tolist())


@pytest.mark.parametrize("tabu", [0.0, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("pruned", [0.1, 0.5, 0.9])
def test_blocks_leave_alone_what_was_looked_at_latest_and_never_lose_a_side(tabu, pruned):
    made = matrix(10, 20, pruned=pruned)
    made.free_OI = torch.rand(10, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    for step in range(1, 40):
        able = made.free_OI.flatten()
        chosen = made.choose(torch.randn(10, 20), 10, tabu)
        assert able[chosen].all()
        stamps = made.stamp_OI.flatten()
        for side in (~made.keep_OI.flatten() & able, made.keep_OI.flatten() & able):
            assert side[chosen].any()
            for index in chosen[side[chosen] & (stamps[chosen] > 0)]:
                assert (side & (stamps >= stamps[index])).sum() > tabu * side.sum()
        made.stamp_OI.view(-1)[chosen] = step
        made.toggle(torch.cat([chosen[:1], chosen[-1:]]))


@pytest.mark.parametrize("cell", [4, 20])
def test_blocks_of_cells_hold_as_many_pruned_as_kept_weights_of_each(cell):
    made = matrix(10, 20, cell=cell)
    if cell == 4:
        made.keep_OI = (torch.arange(200) % 4 < 2).view(10, 20)
    chosen = made.choose(torch.randn(10, 20), 16, 0.0)
    assert len(chosen) == 16
    kept = made.keep_OI.flatten()[chosen]
    for member in (chosen // cell).unique():
        here = chosen // cell == member
        assert kept[here].sum() == (~kept[here]).sum()


def test_toggling_revives_the_dense_bits_and_toggling_back_changes_nothing():
    made = matrix(10, 20)
    before, keep = made.linear.parameter.clone(), made.keep_OI.clone()
    index = torch.randperm(200)[:50]
    made.toggle(index)
    assert (made.keep_OI ^ keep).flatten().nonzero()[:, 0].tolist() == sorted(index.tolist())
    assert torch.equal(made.linear.parameter, made.dense_OI * made.keep_OI)
    made.toggle(index)
    assert torch.equal(made.linear.parameter, before)


def test_the_predicted_change_is_exact_where_the_loss_is_quadratic():
    made = matrix(6, 8)
    torch.manual_seed(0)
    inputs_TI, wanted_TO = torch.randn(40, 8).double(), torch.randn(40, 6).double()

    def loss():
        return (inputs_TI @ made.linear.parameter.double().T - wanted_TO).square().sum() / 80

    weight = made.linear.parameter.double().requires_grad_()
    ((inputs_TI @ weight.T - wanted_TO).square().sum() / 80).backward()
    index_N = torch.arange(16, 24)  # one row: its Hessian is that of the inputs
    pruned_N = ~made.keep_OI[2]
    move_N = torch.where(pruned_N, made.dense_OI[2], -made.dense_OI[2]).double()
    pairs = (pruned_N.nonzero()[:, 0], (~pruned_N).nonzero()[:, 0])
    swaps = Swaps(made, index_N, move_N, weight.grad[2], inputs_TI, *pairs, torch.zeros(4))
    taken_P = torch.tensor([True, False, True, True])
    before, predicted = loss(), swaps.change(taken_P)
    made.toggle(swaps.index_N[swaps.part(taken_P)])
    assert predicted == pytest.approx(float(loss() - before), rel=1e-10)


def test_masks_survive_packing():
    keep = torch.rand(7, 13) < 0.5
    assert torch.equal(unpacked(packed(keep), (7, 13)), keep)


# The search.


@pytest.mark.parametrize(("scope", "gamma"), [("model", 0.05), ("linear", 0.5)])
def test_a_step_changes_the_loss_of_its_own_batch_by_about_what_is_predicted(llama_dir, ids_NT, scope, gamma):
    options = {"scope": scope, "gamma": gamma, "accept": "none", "batch_size": 14, "keep_best": False, "adapt": False}
    done = search(llama_dir, ids_NT, **options)
    done._start()
    true = predicted = 0.0
    with done._resident():
        done._first_look()
        for number in range(1, 5):
            done._step(number)
            true += done._loss(done.batch_BT) - done.batch_loss
            predicted += done.history[-1]["predicted"]
    assert predicted < 0
    # Linears do not know of each other's swaps, and the model is one of a random network that every swap changes a lot.
    assert 0.25 < true / predicted < 1.5


@pytest.mark.parametrize("scope", ["model", "linear"])
def test_the_held_out_loss_only_falls(llama_dir, ids_NT, scope):
    done = finished(llama_dir, ids_NT, scope=scope, steps=8)
    losses = [entry["held_out"] for entry in done.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all((entry["swaps"] == 0) == (losses[i + 1] == losses[i]) for i, entry in enumerate(done.history[1:]))


@pytest.mark.parametrize("accept", ["none", "batch"])
def test_the_best_masks_are_kept_whatever_the_steps_do(llama_dir, ids_NT, accept):
    options = {"accept": accept, "select": "random", "adapt": False, "steps": 5, "retries": 0}
    done = finished(llama_dir, ids_NT, **options)
    best = min(entry["held_out"] for entry in done.history)
    with done._resident():
        assert done._loss(done.held_out_NT) == pytest.approx(best, rel=1e-6)


def test_no_batch_holds_a_held_out_sample(llama_dir, ids_NT):
    fresh = search(llama_dir, ids_NT)
    assert torch.equal(fresh.held_out_NT, ids_NT[[7, 15]])
    rows = {tuple(row) for row in fresh.ids_NT.tolist()}
    assert len(rows) == 14
    assert not rows & {tuple(row) for row in fresh.held_out_NT.tolist()}


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ({}, (1, -1)),
        ({"sparsity": 0.7}, (1, -1)),
        ({"group": "row"}, None),
        ({"group": "layer"}, (1, -1)),
        ({"pattern": "2:4"}, (-1, 4)),
    ],
    ids=["layer", "sparser", "row", "all layer", "2:4"],
)
@pytest.mark.parametrize("options", [{}, {"scope": "linear", "steps": 8}], ids=["model", "linear"])
def test_counts_of_zeros_stay_where_they_compete(llama_dir, ids_NT, recipe, shape, options):
    before = start(llama_dir, ids_NT, recipe=recipe)
    after = masks(finished(llama_dir, ids_NT, recipe=recipe, **options))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in before:
        left, right = (each[name] if shape is None else each[name].reshape(shape) for each in (before, after))
        assert torch.equal(left.sum(1), right.sum(1))


def test_fixed_weights_are_never_swapped(llama_dir, ids_NT):
    options = {"fix_pruned": 0.5, "fix_kept": 0.4, "accept": "none", "keep_best": False}
    before = start(llama_dir, ids_NT, **options)
    done = finished(llama_dir, ids_NT, **options)
    for name, each in done.matrices.items():
        pruned, kept = int((~before[name]).sum()), int(before[name].sum())
        rows = before[name].shape[0]
        assert int((~each.free_OI & ~before[name]).sum()) == rows * int(0.5 * (pruned // rows))
        assert int((~each.free_OI & before[name]).sum()) == rows * int(0.4 * (kept // rows))
        assert torch.equal(each.keep_OI[~each.free_OI], before[name][~each.free_OI])


def test_micro_batches_do_not_change_the_masks(llama_dir, ids_NT):
    one, other = (finished(llama_dir, ids_NT, recipe={"micro_batch": size}) for size in (1, 4))
    assert all(torch.equal(masks(one)[name], masks(other)[name]) for name in masks(one))


def test_the_papers_options_run(llama_dir, ids_NT):
    done = finished(llama_dir, ids_NT, **{**PRESETS["icbs"]["paper"], "steps": 3, "block_size": 64, "solver": "descent"})
    assert all(entry["swaps"] == entry["proposed"] for entry in done.history[1:])


# Whole runs.


def run(folder, output, **options):
    given = {
        "calibration": "random",
        "samples": 16,
        "seqlen": SEQLEN,
        "output": output,
        "method": "icbs",
        "icbs": {**QUICK, "save_every": 2},
        **options,
    }
    return llmprune.prune(str(folder), **given)


def shards(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}], ids=["unstructured", "2:4"])
def test_kept_weights_have_their_dense_bits_and_half_of_them_are_zero(model_dir, tmp_path, options):
    result = run(model_dir, tmp_path / "out", **options)
    dense = load_file(model_dir / "model.safetensors")
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0])
    assert result.record["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert cli("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_search_goes_on_to_the_same_bytes(llama_dir, tmp_path, monkeypatch, stop):
    run(llama_dir, tmp_path / "whole")
    step, taken = icbs.Search._step, []

    def interrupted(self, number):
        if number == stop and len(taken) < stop:
            raise KeyboardInterrupt
        taken.append(number)
        step(self, number)

    monkeypatch.setattr(icbs.Search, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llama_dir, tmp_path / "out")
    taken += [0] * stop
    done = len(taken)
    run(llama_dir, tmp_path / "out")
    assert taken[done:] == list(range((stop - 1) // 2 * 2 + 1, 5))
    assert shards(tmp_path / "whole") == shards(tmp_path / "out")
    assert not (tmp_path / "out" / ".llmprune").exists()


def test_a_run_killed_while_it_writes_blocks_does_not_search_again(llama_dir, tmp_path, monkeypatch):
    run(llama_dir, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_block", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(llama_dir, tmp_path / "out")
    monkeypatch.setattr(icbs.Search, "_step", lambda *args: pytest.fail("searched again"))
    run(llama_dir, tmp_path / "out")
    assert shards(tmp_path / "whole") == shards(tmp_path / "out")


def test_overwriting_forgets_the_search(llama_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_block", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(llama_dir, tmp_path / "out")
    steps = []
    step = icbs.Search._step
    monkeypatch.setattr(icbs.Search, "_step", lambda self, number: (steps.append(number), step(self, number)))
    run(llama_dir, tmp_path / "out", overwrite=True)
    assert steps == [1, 2, 3, 4]


def test_damaged_progress_is_named(llama_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_block", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(llama_dir, tmp_path / "out")
    (file,) = (tmp_path / "out" / ".llmprune").glob("progress-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LLMPruneError, match=r"progress-.*safetensors is not what the interrupted run had written"):
        run(llama_dir, tmp_path / "out")


# Bad input.


@pytest.mark.parametrize(
    ("options", "recipe", "message"),
    [
        ({"block_size": 1000}, {}, r"cannot choose 1000 weights, half .* among the 432 of '.*k_proj'"),
        ({"fix_pruned": 0.9}, {}, "cannot choose 64 weights"),
        ({}, {"sparsity": 0.0}, "cannot choose 64 weights, .* among the 0 of"),
        ({"holdout": 20}, {}, "holds out every 20th calibration sample and got 16"),
    ],
)
def test_what_cannot_be_searched_is_refused(llama_dir, ids_NT, options, recipe, message):
    with pytest.raises(LLMPruneError, match=message):
        search(llama_dir, ids_NT, recipe=recipe, **options)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps"):
        IcbsOptions(steps=0)


def test_a_model_too_large_for_memory_is_refused_with_what_it_takes(llama_dir, ids_NT, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=100_000))
    with pytest.raises(LLMPruneError, match=r"takes 0\.0 GB where 0\.0 GB are free: use --method wanda"):
        search(llama_dir, ids_NT)


def test_several_ranks_are_refused(llama_dir, ids_NT):
    stream = Stream(Skeleton(llama_dir), ids_NT)
    stream.ranks.size = 2
    with pytest.raises(LLMPruneError, match="in one process and was started in 2"):
        icbs.Search(stream, Recipe(model="tiny", seqlen=SEQLEN), IcbsOptions(**QUICK))


# Quality.


def test_a_trained_model_predicts_fresh_text_better_than_with_wandas_masks(stories260k):
    skeleton = Skeleton(stories260k)
    key = skeleton.checkpoint.fingerprint()
    ids_NT = sample_from_model(stories260k, 64, 64, 0, model_key=key, device="cpu", dtype=torch.float32, quiet=True)
    done = search(stories260k, ids_NT[:32], steps=6, block_size=256, positions=256, recipe={"micro_batch": 8})
    done._start()
    with done._resident():
        wanda = mean_loss(done.skeleton, ids_NT[32:], micro_batch=8)
        done._first_look()
        for number in range(1, 7):
            done._step(number)
        found = mean_loss(done.skeleton, ids_NT[32:], micro_batch=8)
    assert done.history[-1]["held_out"] < done.history[0]["held_out"] - 0.2
    assert found < wanda - 0.2
