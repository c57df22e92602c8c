"""Comparing pruned models: numbers stand side by side only where they were measured alike."""

from __future__ import annotations

import json
import shutil

import pytest
from in_process import llmprune
from records import PERPLEXITY, amend, evaluation, structured, task
from tiny import build

from llmprune.compare import PERPLEXITY as COLUMN
from llmprune.compare import Comparison, cell, compare, notes
from llmprune.verify import read_record


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model = build("llama", folder / "model")
    outcome = llmprune("prune", "--model", model, "--method", "magnitude", "--output", folder / "pruned", "--quiet")
    assert outcome.code == 0, outcome
    return folder / "pruned"


@pytest.fixture
def variant(original, tmp_path):
    """Copies of a pruned model with other records: `variant("name", key=value)`."""

    def make(name: str, **changes: object):
        directory = shutil.copytree(original, tmp_path / name)
        amend(directory, **changes)
        return directory

    return make


def marked(comparison: Comparison) -> set[tuple[str, str]]:
    return {(comparison.rows[number].name, column) for number, column in comparison.marks}


def test_a_row_is_what_the_record_says(variant):
    pruned = variant("one", perplexity=PERPLEXITY, evaluation=evaluation({"boolq": task(0.5, 0.625)}))
    dense, row = compare([pruned]).rows
    record = read_record(pruned)
    parameters = record["parameters"]
    assert (row.name, row.method, row.pattern) == ("one", "magnitude", "unstructured")
    assert (row.sparsity, row.nonzero) == (record["sparsity"], parameters["total"] - parameters["zero"])
    assert row.disk_bytes == sum(file.stat().st_size for file in pruned.glob("*.safetensors"))
    assert {name: (value.value, value.difference) for name, value in row.values.items()} == {
        COLUMN: (PERPLEXITY["pruned"], None),
        "boolq": (0.5, -0.125),
    }
    assert (dense.name, dense.method, dense.nonzero) == ("model", "", parameters["total"])
    assert {name: value.value for name, value in dense.values.items()} == {COLUMN: PERPLEXITY["dense"], "boolq": 0.625}


def test_one_parent_stands_once_before_all_its_prunings(variant):
    first, second = variant("first"), variant("second")
    other = variant("other", identity={**read_record(first)["identity"], "model weights": "another"})
    assert [row.name for row in compare([first, other, second]).rows] == ["model", "first", "second", "model", "other"]


def test_what_was_measured_alike_is_not_marked(variant):
    tasks = {"boolq": task(0.5, 0.625)}
    comparison = compare(
        [
            variant("one", perplexity=PERPLEXITY, evaluation=evaluation(tasks, batch_size=1)),
            variant("two", perplexity={**PERPLEXITY, "pruned": 40.0}, evaluation=evaluation(tasks, batch_size=8)),
            variant("without baseline", evaluation=evaluation({"boolq": task(0.5)}, baseline=None)),
        ]
    )
    assert comparison.marks == comparison.notes == {}


def test_a_smaller_model_says_what_it_lost_and_does_not_lend_its_size_to_its_parent(variant):
    own = structured()
    smaller = variant("smaller", **{key: own[key] for key in ("recipe", "parameters", "kept", "dense_widths", "sparsity")})
    dense, row = compare([smaller]).rows
    assert (row.pattern, row.sparsity, row.nonzero) == ("channels", 0.2, own["parameters"]["total"] - 288)
    assert dense.disk_bytes is None
    assert notes(compare([smaller])) == []
    dense, _, masked = compare([smaller, variant("zeros")]).rows
    assert dense.disk_bytes == masked.disk_bytes
    assert notes(compare([smaller, variant("others")]))[0].startswith("Sparsity is a share of what a method may remove")
    known = variant("known", **{**own, "parameters": {**own["parameters"], "dense_bytes": 4321}})
    assert compare([known]).rows[0].disk_bytes == 4321
    assert (
        "channels, masked"
        in llmprune("compare", variant("kept", recipe={**own["recipe"], "format": "masked"}, kept=own["kept"])).out
    )


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"protocol": "token perplexity, 9 disjoint windows of 64 tokens"}, "windows: token perplexity, 9 disjoint"),
        ({"tokens_sha256": "cd" * 32}, "tokens: cdcdcdcdcdcd instead of abababababab"),
        ({"text": "c4"}, "text: c4 instead of wikitext2"),
    ],
)
def test_a_perplexity_of_another_protocol_is_marked(variant, change, note):
    comparison = compare([variant("one", perplexity=PERPLEXITY), variant("two", perplexity={**PERPLEXITY, **change})])
    assert marked(comparison) == {("two", COLUMN)}
    assert note in notes(comparison)[0]
    assert cell(comparison, 1, COLUMN) == "31.062"
    assert cell(comparison, 2, COLUMN) == "31.062 [a]"


@pytest.mark.parametrize(
    ("entry", "protocol", "note"),
    [
        ({"fewshot": 5}, {}, "few-shot: 5 instead of 0"),
        ({"data": {"sha256": "beef"}}, {}, 'data: {"sha256": "beef"} instead of'),
        ({}, {"limit": None}, "limit: none instead of 200"),
        ({}, {"baseline": "another"}, "baseline: another instead of dense"),
        ({}, {"lm_eval": "0.5"}, "lm_eval: 0.5 instead of 0.4.13"),
    ],
)
def test_a_score_of_another_protocol_is_marked(variant, entry, protocol, note):
    one = variant("one", evaluation=evaluation({"boolq": task(0.5, 0.625), "rte": task(0.5, 0.625)}))
    two = variant("two", evaluation=evaluation({"boolq": task(0.5, 0.625, **entry), "rte": task(0.5, 0.625)}, **protocol))
    comparison = compare([one, two])
    assert ("two", "boolq") in marked(comparison)
    # What concerns a single task marks no other.
    assert (("two", "rte") in marked(comparison)) == bool(protocol)
    assert len(comparison.notes) == 1
    assert note in next(iter(comparison.notes.values()))


def test_a_task_of_an_earlier_evaluation_keeps_its_own_protocol(variant):
    early = {**evaluation({})["protocol"], "limit": 50}
    one = variant("one", evaluation=evaluation({"boolq": task(0.5, 0.625), "rte": task(0.5, 0.625)}))
    two = variant("two", evaluation=evaluation({"boolq": task(0.5, 0.625, protocol=early), "rte": task(0.5, 0.625)}))
    assert marked(compare([one, two])) == {("two", "boolq")}


def test_every_number_is_in_the_table_and_its_note_below(variant):
    one = variant("one", perplexity=PERPLEXITY, evaluation=evaluation({"boolq": task(0.5, 0.625)}))
    two = variant("two", perplexity={**PERPLEXITY, "pruned": 77.5, "text": "c4"})
    for directories in ([one, two], [one, two, *(variant(f"more-{number}") for number in range(9))]):
        out = llmprune("compare", *directories).out
        for word in ("20.125", "31.062", "77.500", "[a]", "0.625", "(-0.125)", "50.00%", "text: c4 instead of wikitext2"):
            assert word in out, word


def test_json_holds_the_numbers_unrounded(variant):
    one, two = variant("one", perplexity=PERPLEXITY), variant("two", perplexity={**PERPLEXITY, "text": "c4"})
    rows = json.loads(llmprune("compare", one, two, "--json").out)["rows"]
    assert [row["model"] for row in rows] == ["model", "one", "two"]
    assert [row["values"][COLUMN]["value"] for row in rows] == [20.125, 31.0625, 31.0625]
    assert [row["values"][COLUMN]["note"] is None for row in rows] == [True, True, False]


def test_a_directory_that_is_not_ours_is_one_sentence(original, tmp_path):
    outcome = llmprune("compare", original, tmp_path)
    assert outcome.code == 2
    assert outcome.err == f"error: {tmp_path} holds no llmprune.json: give a directory that llmprune wrote.\n"
