"""Sweeps: every combination is a run of its own, done once, and all of them are in the summary."""

from __future__ import annotations

import json
import shutil

import pytest
from in_process import llmprune
from tiny import build

from llmprune import perplexity
from llmprune.compare import PERPLEXITY, Comparison, Row, Value
from llmprune.errors import LLMPruneError
from llmprune.pruning import peak_rss
from llmprune.recipe import Recipe
from llmprune.sweep import combinations, frontiers
from llmprune.verify import read_record

QUICK = ("--device", "cpu", "--calibration", "random", "--samples", "2", "--seqlen", "8")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("material")
    build("llama", folder / "model")
    (folder / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents.\n" * 4)
    return folder


def sweep(material, output, *more):
    return llmprune(
        "sweep", "--model", material / "model", "--evaluate", material / "text.txt", "--output", output, *QUICK, *more
    )


GRID = ("--methods", "wanda,magnitude", "--sparsities", "0.25,0.5", "--patterns", "2:4")
RUNS = [f"{method}-{amount}" for method in ("wanda", "magnitude") for amount in ("0.25", "0.5", "2of4")]


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("swept") / "grid"
    outcome = sweep(material, output, *GRID)
    assert outcome.code == 0, outcome
    return output, outcome.out


def stamps(folder):
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*-of-*.safetensors")}


def test_every_combination_is_a_run_with_its_own_directory(finished):
    output, _ = finished
    assert sorted(folder.name for folder in output.iterdir() if (folder / "llmprune.json").exists()) == sorted(RUNS)
    recipe = read_record(output / "magnitude-2of4")["recipe"]
    assert (recipe["method"], recipe["pattern"], recipe["sparsity"]) == ("magnitude", "2:4", 0.5)


def test_the_summary_holds_every_runs_own_numbers_and_the_dense_models(finished):
    output, printed = finished
    dense, *rows = json.loads((output / "sweep.json").read_text())["rows"]
    assert [row["model"] for row in rows] == RUNS
    for row in rows:
        record = read_record(output / row["model"])
        assert row["sparsity"] == record["sparsity"]
        assert row["values"][PERPLEXITY]["value"] == record["perplexity"]["pruned"]
        assert dense["values"][PERPLEXITY]["value"] == record["perplexity"]["dense"]
        assert f"{record['perplexity']['pruned']:.3f}" in printed
    page = (output / "sweep.html").read_text()
    assert all(f">{name}</th>" in page for name in RUNS)
    assert (output / "sweep" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_sweep_again_prunes_nothing_and_writes_the_same(finished, material):
    output, _ = finished
    before, summary, page = stamps(output), (output / "sweep.json").read_bytes(), (output / "sweep.html").read_bytes()
    assert sweep(material, output, *GRID).code == 0
    assert stamps(output) == before
    assert (output / "sweep.json").read_bytes() == summary
    assert (output / "sweep.html").read_bytes() == page


def test_a_sweep_goes_on_with_what_is_missing(finished, material, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "grid")
    shutil.rmtree(output / "wanda-0.5")
    before = stamps(output)
    assert sweep(material, output, *GRID).code == 0
    after = stamps(output)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"wanda-0.5"}
    assert {name: after[name] for name in before} == before


def test_a_changed_recipe_is_refused_by_name(finished, material):
    outcome = sweep(material, finished[0], *GRID, "--samples", "3")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "samples was 2, is 3" in outcome.err


def test_what_cannot_work_is_refused_before_the_first_run(material, tmp_path):
    outcome = sweep(material, tmp_path / "grid", "--sparsities", "0.5", "--patterns", "2:4,2:8")
    assert outcome.code == 2
    assert "2:8 does not fit" in outcome.err
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to sweep over"),
        (("--sparsities", ""), "--sparsities is ''"),
        (("--sparsities", "0.5,,0.7"), "--sparsities is '0.5,,0.7'"),
        (("--sparsities", "0.5,1"), "outside [0, 1)"),
        (("--sparsities", "half"), "'half'"),
        (("--patterns", "4:2"), "0 < N < M"),
        (("--sparsities", "0.5", "--methods", "wonder"), "Unknown method 'wonder'"),
        (("--sparsities", "0.5", "--limit", "5"), "--limit 5 has no meaning without tasks"),
        (("--sparsities", "0.5", "--suite", "slow"), "Unknown suite 'slow'"),
        (("--sparsities", "0.5", "--tasks", "boolq", "--limit", "some"), "'some'"),
    ],
)
def test_bad_input_is_one_sentence(material, tmp_path, arguments, words):
    outcome = sweep(material, tmp_path / "grid", *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err
    assert not (tmp_path / "grid").exists()


def test_a_sweep_needs_a_folder():
    with pytest.raises(LLMPruneError, match="pass --output"):
        combinations(Recipe(model="m"), [], ["0.5"], [])


def test_the_recipes_own_values_stand_where_no_others_are_given(tmp_path):
    recipe = Recipe(model="m", method="magnitude", pattern="2:4", seed=7, output=tmp_path)
    (own,) = combinations(recipe, [], [], [])
    assert (own.method, own.pattern, own.seed, own.output) == ("magnitude", "2:4", 7, tmp_path / "magnitude-2of4")
    wanda, sparsegpt = combinations(recipe, ["wanda", "sparsegpt"], ["0.3", "0.30"], [])
    assert [(one.method, one.pattern, one.target) for one in (wanda, sparsegpt)] == [
        ("wanda", "unstructured", 0.3),
        ("sparsegpt", "unstructured", 0.3),
    ]


def test_every_run_is_evaluated_beside_the_dense_model(material, tmp_path, monkeypatch):
    asked, looked_up = [], []
    monkeypatch.setattr("llmprune.evaluation.evaluate", lambda request, say, quiet: asked.append(request))
    monkeypatch.setattr("llmprune.harness.load_tasks", lambda names: looked_up.append((names, list(tmp_path.iterdir()))))
    options = ("--methods", "magnitude", "--sparsities", "0.25,0.5", "--tasks", "boolq,perplexity", "--limit", "3")
    assert sweep(material, tmp_path, *options).code == 0
    assert [(one.model, one.baseline, one.tasks, one.limit) for one in asked] == [
        (str(tmp_path / f"magnitude-{sparsity}"), str(material / "model"), "boolq,perplexity", 3)
        for sparsity in ("0.25", "0.5")
    ]
    assert looked_up == [(["boolq"], [])], "tasks are looked up before anything is pruned"


def test_the_dense_models_perplexity_is_measured_once(material, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    measured = []
    working = perplexity.window_losses
    monkeypatch.setattr(
        perplexity,
        "window_losses",
        lambda skeleton, *args, **options: (
            measured.append(skeleton.checkpoint.directory.name) or working(skeleton, *args, **options)
        ),
    )
    assert sweep(material, tmp_path / "grid", "--methods", "magnitude", "--sparsities", "0.25,0.5").code == 0
    assert measured == ["model", "magnitude-0.25", "magnitude-0.5"]


def test_peak_memory_is_that_of_the_run_and_not_of_what_came_before_it(material, tmp_path):
    before = bytearray(1 << 30)
    peak = peak_rss()
    del before
    assert sweep(material, tmp_path, "--methods", "magnitude", "--sparsities", "0.5").code == 0
    assert read_record(tmp_path / "magnitude-0.5")["peak_rss_bytes"] < peak - (1 << 29)


def test_methods_that_remove_different_things_are_compared_as_shares_of_the_model(material, tmp_path):
    options = ("--methods", "magnitude,cfsp", "--sparsities", "0.5", "--samples", "8", "--seqlen", "24")
    assert sweep(material, tmp_path / "grid", *options).code == 0
    dense, zeros, smaller = json.loads((tmp_path / "grid" / "sweep.json").read_text())["rows"]
    assert (zeros["pattern"], smaller["pattern"]) == ("unstructured", "channels")
    assert smaller["disk_bytes"] < zeros["disk_bytes"] == dense["disk_bytes"]
    page = (tmp_path / "grid" / "sweep.html").read_text()
    assert "share of the model" in page
    for one in (zeros, smaller):
        assert f"{1 - one['nonzero_parameters'] / dense['nonzero_parameters']:.0%}: " in page


def test_a_number_of_parameters_is_an_amount_of_its_own(tmp_path):
    recipe = Recipe(model="m", method="cfsp", target_params="40k", output=tmp_path)
    (own,) = combinations(recipe, [], [], [])
    assert own.output == tmp_path / "cfsp-40k"


def row(name: str, method: str, sparsity: float, **values: float) -> Row:
    return Row(
        name, "parent", method, "unstructured", sparsity, 10, 10, {key: Value(value, {}) for key, value in values.items()}
    )


def test_a_frontier_shows_what_was_measured_alike():
    rows = [
        row("dense", "", 0.0, **{PERPLEXITY: 10.0}, boolq=0.75, rte=0.5),
        row("one", "wanda", 0.5, **{PERPLEXITY: 12.0}, boolq=0.5, rte=0.5),
        row("two", "wanda", 0.6, **{PERPLEXITY: 14.0}, boolq=0.25),
    ]
    drawn = {picture.name: picture for picture in frontiers(Comparison(rows, [PERPLEXITY, "boolq", "rte"], {}, {}), 100, 80)}
    assert drawn["perplexity"].alt == "token perplexity against sparsity. dense: 10; wanda 50%: 12; wanda 60%: 14"
    assert drawn["tasks"].alt == "mean score of boolq, rte against sparsity. dense: 0.625; wanda 50%: 0.5"
    rows[1].values["wikitext"] = Value(99.0, {}, higher_is_better=False)
    columns = [PERPLEXITY, "boolq", "rte", "wikitext"]
    marks = {(1, PERPLEXITY): "a"}
    marked, tasks = frontiers(Comparison(rows, columns, {"a": "other"}, marks), 100, 80)
    assert marked.alt == "token perplexity against sparsity. dense: 10; wanda 60%: 14"
    assert tasks.alt == drawn["tasks"].alt
