"""What a run with `--method wina` leaves behind, and what the other commands make of it."""

import json
import shutil

import pytest
import torch
from in_process import llmprune
from tiny import build

from llmprune.activation_plan import FILE, TENSORS, Plan
from llmprune.models import Skeleton
from llmprune.perplexity import window_losses
from llmprune.record import read
from llmprune.runtime import simulate

COMMON = ("--method", "wina", "--samples", "4", "--seqlen", "24", "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("gated")
    build("llama", folder / "model")
    (folder / "text.txt").write_text("The fox ran over the hill and back again. " * 120)
    assert prune(folder, folder / "sidecar", "--evaluate", folder / "text.txt").code == 0
    assert prune(folder, folder / "folded", "--form", "folded").code == 0
    return folder


def prune(folder, output, *options):
    return llmprune(
        *("prune", "--model", folder / "model", "--calibration", folder / "text.txt", "--output", output, *COMMON, *options)
    )


def test_the_record_says_what_a_token_does_without(material):
    record, plan = read(material / "sidecar"), Plan.load(material / "sidecar")
    assert record.gating.measured == pytest.approx(plan.measured)
    assert record.gating.gated == sum(gate.numel for gate in plan.gates.values())
    assert record.gating.read == round((1 - plan.measured) * record.gating.gated)
    assert {name: linear.gate_measured for name, linear in record.linears.items()} == {
        name: gate.measured for name, gate in plan.gates.items()
    }
    assert record.sparsity < 0.01  # no weight was removed


def test_perplexity_is_measured_with_the_gates_closed_as_in_decoding(material):
    record, plan = read(material / "sidecar"), Plan.load(material / "sidecar")
    ids_NT = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(0))
    dense, gated = Skeleton(material / "model"), Skeleton(material / "sidecar")
    with simulate(gated.model, plan):
        losses = window_losses(gated, ids_NT)
    assert losses != window_losses(gated, ids_NT) == window_losses(dense, ids_NT)
    assert record.perplexity.pruned != record.perplexity.dense


def test_folded_weights_compute_the_same_with_thresholds_of_magnitudes(material):
    plan = Plan.load(material / "folded")
    assert (plan.form, plan.share) == ("folded", True)
    assert all(bool((gate.norm_I == 1).all()) for gate in plan.gates.values())
    ids_NT = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(0))
    folded, dense = (window_losses(Skeleton(material / name), ids_NT) for name in ("folded", "model"))
    assert folded == pytest.approx(dense, rel=1e-4)


@pytest.mark.parametrize("form", ["sidecar", "folded"])
def test_a_gated_result_is_whole_until_its_weights_or_its_plan_change(material, tmp_path, form):

    copy = shutil.copytree(material / form, tmp_path / "copy")
    assert llmprune("verify", copy).code == 0
    (copy / FILE).write_bytes((copy / FILE).read_bytes().replace(b'"threshold": ', b'"threshold":  ', 1))
    changed = llmprune("verify", copy)
    assert (changed.code, FILE in changed.out + changed.err) == (1, True)


def test_card_page_and_table_speak_of_inputs_and_not_of_removed_weights(material, capsys):
    directory = material / "sidecar"
    card = (directory / "README.md").read_text()
    assert "activation-sparsity" in card
    assert "need not be read" in card
    assert "prunable weights removed" not in card
    assert llmprune("report", directory).code == 0
    page = (directory / "report.html").read_text()
    assert "What is left out" in page
    assert "Where the zeros are" not in page
    table = llmprune("compare", directory, material / "folded").out
    assert "inputs" in table
    assert "folded" in table


def test_another_method_in_the_same_place_leaves_no_plan_behind(material, tmp_path):
    output = tmp_path / "out"
    assert prune(material, output).code == 0
    assert {FILE, TENSORS} <= {file.name for file in output.iterdir()}
    assert prune(material, output, "--method", "wanda", "--overwrite").code == 0
    assert Plan.load(output) is None


def test_a_family_that_cannot_be_folded_is_refused_before_anything_is_written(material, tmp_path):
    build("opt", tmp_path / "opt")
    config = json.loads((tmp_path / "opt" / "config.json").read_text())
    (tmp_path / "opt" / "config.json").write_text(json.dumps(config | {"do_layer_norm_before": False}))
    refused = llmprune(
        *("prune", "--model", tmp_path / "opt", "--calibration", "random", "--output", tmp_path / "out", *COMMON),
        *("--form", "folded"),
    )
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "cannot be stored folded" in refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pattern", "2:4"), "--pattern 2:4"),
        (("--allocation", "owl"), "--allocation owl"),
        (("--propagate", "pruned"), "--propagate pruned"),
        (("--form", "folded", "--basis", "kgate"), "--basis kgate"),
        (("--form", "folded", "--score", "wina-released"), "--score wina-released"),
        (("--method", "wanda", "--share"), "--share True"),
        (("--method", "wanda", "--allocation", "greedy"), "--allocation greedy"),
    ],
)
def test_options_that_contradict_each_other_are_refused(material, tmp_path, options, said):
    refused = prune(material, tmp_path / "out", *options)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert said in refused.err
