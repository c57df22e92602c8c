"""The model card: what it says, what the Hub reads from it, and what it never overwrites."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import llmprune
from llmprune import card, gguf
from llmprune.output import RECORD, sealed
from llmprune.verify import read_record

EVALUATION = {
    "tasks": {
        "arc_easy": {
            "metric": "acc_norm",
            "value": 0.41,
            "stderr": 0.01,
            "samples": 200,
            "fewshot": 0,
            "version": 1.0,
            "dense": {"value": 0.5, "stderr": 0.02},
            "difference": {"value": -0.09, "low": -0.12, "high": -0.05, "confidence": 0.95},
        },
        "my_own_task": {"metric": "acc", "value": 0.25},
    },
    "perplexity": {"text": "wikitext2", "protocol": "token perplexity, 8 windows", "token": 30.125, "dense": 20.5}
    | {"difference": {"value": 9.625, "low": 8.5, "high": 11.0, "confidence": 0.95}},
    "protocol": {"lm_eval": "0.4.13", "limit": 200, "suite": None, "seeds": {"numpy": 0}},
}
WHOLE = {**EVALUATION, "protocol": {**EVALUATION["protocol"], "limit": None}}
CALIBRATION = {"source": "c4 (allenai/c4, train)", "sha256": "5e" * 32, "note": "4 samples"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned tiny model; tests work on copies."""
    folder = tmp_path_factory.mktemp("card")
    model = tiny.build("llama", folder / "dense")
    return llmprune.prune(str(model), method="magnitude", pattern="2:4", output=folder / "pruned").directory


@pytest.fixture
def pruned(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "pruned")


def change_record(directory: Path, **changes: object) -> None:
    """Put values into the record; `model__license="mit"` goes into `model`."""
    record = read_record(directory)
    for key, value in changes.items():
        place, _, inner = key.partition("__")
        record |= {place: {**record[place], inner: value} if inner else value}
    (directory / RECORD).write_bytes(sealed(record, indent=2))


def written(directory: Path, **changes: object) -> ModelCard:
    change_record(directory, **changes)
    card.write(directory)
    return ModelCard.load(directory / "README.md")


def rows(text: str) -> dict[str, list[str]]:
    """The first table of a Markdown text, by its first column."""
    shown = cells(text)
    return {shown[i]: shown[i + 1 : i + 4] for i in range(0, len(shown), 4)}


def cells(text: str) -> list[str]:
    """What a reader sees in each cell of a Markdown table."""
    tokens = MarkdownIt().enable("table").parse(text)
    inner = [after for before, after in pairwise(tokens) if before.type in ("td_open", "th_open")]
    return ["".join(part.content for part in token.children or []) for token in inner]


def test_metadata_say_what_the_model_is(pruned: Path) -> None:
    data = written(pruned, model__base_model="org/base", model__license="mit", calibration=CALIBRATION).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "finetune"
    assert data["license"] == "mit"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["llmprune", "pruned", "sparse", "magnitude", "2:4"]
    assert data["datasets"] == ["allenai/c4"]


def test_without_a_base_model_on_the_hub_none_is_named(pruned: Path) -> None:
    data = written(pruned).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index", "model_name"} & data.keys()


@pytest.mark.parametrize(
    ("resolved", "dataset"),
    [
        ("wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, train)", "Salesforce/wikitext"),
        ("c4 (allenai/c4, en/c4-train.00000-of-01024.json.gz, train)", "allenai/c4"),
        ("org/set, config, train[:1%]", "org/set"),
        ("org/set, train", "org/set"),
        ("folder/file.txt", None),
        ("folder/a, b.txt", None),
        ("org/set", None),
        ("random", None),
    ],
)
def test_a_data_set_is_named_if_it_is_on_the_hub(pruned: Path, resolved: str, dataset: str | None) -> None:
    measured = {"dense": 20.0, "pruned": 30.0, "text": resolved, "protocol": "p", "tokens_sha256": "00"}
    data = written(pruned, calibration={**CALIBRATION, "source": resolved}, perplexity=measured).data
    assert data.datasets == ([dataset] if dataset else None)
    assert data.eval_results[0].dataset_type == (dataset or Path(resolved).name)


def test_scores_are_in_the_model_index_as_measured(pruned: Path) -> None:
    entries = {entry.dataset_name: entry for entry in written(pruned, evaluation=EVALUATION).data.eval_results}
    assert entries["arc_easy"].metric_value == 0.41
    assert entries["arc_easy"].metric_type == "acc_norm"
    assert (entries["arc_easy"].dataset_type, entries["arc_easy"].dataset_config) == ("allenai/ai2_arc", "ARC-Easy")
    assert entries["my_own_task"].metric_value == 0.25
    assert (entries["wikitext2"].metric_type, entries["wikitext2"].metric_value) == ("perplexity", 30.125)


def test_a_task_with_a_data_set_on_the_hub_has_an_eval_results_file(pruned: Path) -> None:
    written(pruned, evaluation=WHOLE)
    (file,) = (pruned / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "arc_easy", 0.41)
    assert entry.notes == "lm-eval 0.4.13, acc_norm, 0-shot, 200 documents, task version 1.0, standard error 0.0100"


def test_a_score_on_a_part_of_a_task_has_no_eval_results_file(pruned: Path) -> None:
    assert "0.4100" in written(pruned, evaluation=EVALUATION).text
    assert not (pruned / ".eval_results").exists()


def test_eval_results_that_no_longer_hold_are_removed_and_others_stay(pruned: Path) -> None:
    written(pruned, evaluation=WHOLE)
    (pruned / ".eval_results" / "theirs.yaml").write_text("[]")
    written(pruned, evaluation=None)
    assert [file.name for file in (pruned / ".eval_results").iterdir()] == ["theirs.yaml"]


def test_a_value_that_is_no_number_is_shown_but_not_published_as_a_score(pruned: Path) -> None:
    broken = {"dense": 20.0, "pruned": float("inf"), "text": "t", "protocol": "p", "tokens_sha256": "00"}
    found = written(pruned, perplexity=broken)
    assert found.data.eval_results is None
    assert rows(found.text)["token perplexity"][1] == "inf"


def test_a_score_names_the_harness_that_measured_it_and_not_the_last_one(pruned: Path) -> None:
    task = {**EVALUATION["tasks"]["arc_easy"], "protocol": {"lm_eval": "0.4.12"}}
    written(pruned, evaluation={**EVALUATION, "tasks": {"arc_easy": task}})
    assert "lm-eval 0.4.12," in (pruned / ".eval_results" / "llmprune-arc_easy.yaml").read_text()


def test_the_table_shows_dense_and_pruned_side_by_side(pruned: Path) -> None:
    record = read_record(pruned)
    total, zero = record["parameters"]["total"], record["parameters"]["zero"]
    table = rows(written(pruned, evaluation=EVALUATION).text)
    assert table[""] == ["dense", "pruned", "difference"]
    assert table["non-zero parameters"][:2] == [f"{total / 1e3:.1f} k", f"{(total - zero) / 1e3:.1f} k"]
    assert table["arc_easy: acc_norm, 0-shot, 200 documents, task version 1.0"] == [
        "0.5000 ± 0.0200",
        "0.4100 ± 0.0100",
        "-0.0900 (95%: -0.1200 to -0.0500)",
    ]
    assert table["my_own_task: acc"] == ["", "0.2500", ""]
    assert table["token perplexity (llmprune eval)"] == ["20.500", "30.125", "+9.625 (95%: +8.500 to +11.000)"]


def test_a_card_without_measurements_says_so(pruned: Path) -> None:
    assert "quality of this model has not been measured" in written(pruned).text
    assert "quality of this model has not been measured" not in written(pruned, evaluation=EVALUATION).text


def test_a_card_tells_how_the_model_was_made_and_is_used(pruned: Path) -> None:
    text = written(pruned, calibration=CALIBRATION).text
    assert f"```yaml\n{(pruned / 'recipe.yaml').read_text()}```" in text
    assert CALIBRATION["sha256"] in text
    assert f"torch {read_record(pruned)['versions']['torch']}".replace("_", r"\_") in text
    assert 'AutoModelForCausalLM.from_pretrained("pruned")' in text
    assert 'llmprune.load("pruned")' in text
    assert "sparse tensor-core kernels" in text


def test_a_card_calls_the_model_by_the_name_it_is_given(pruned: Path) -> None:
    card.write(pruned, "user/name")
    text = (pruned / "README.md").read_text()
    assert "\n# user/name\n" in text
    assert 'from_pretrained("user/name")' in text


def test_the_same_record_gives_the_same_bytes(pruned: Path) -> None:
    written(pruned, evaluation=EVALUATION)
    first = {file: file.read_bytes() for file in pruned.rglob("*") if file.is_file()}
    card.write(pruned)
    assert {file: file.read_bytes() for file in pruned.rglob("*") if file.is_file()} == first


@pytest.mark.parametrize("content", [b"# My own card\n", b"\xff\xfe not text"])
def test_a_readme_of_somebody_else_is_left_alone(pruned: Path, content: bytes) -> None:
    (pruned / "README.md").write_bytes(content)
    card.write(pruned)
    assert (pruned / "README.md").read_bytes() == content


def test_an_edited_card_is_kept_once_its_marker_is_gone(pruned: Path) -> None:
    card.write(pruned)
    edited = (pruned / "README.md").read_text().replace(card.MARKER, "") + "My words.\n"
    (pruned / "README.md").write_text(edited)
    card.write(pruned)
    assert (pruned / "README.md").read_text() == edited


def test_an_unknown_licence_is_said_and_not_invented(pruned: Path) -> None:
    text = written(pruned).text
    assert "Unknown: the base model came without a statement of its licence." in text


def test_copied_licence_files_are_named(pruned: Path) -> None:
    (pruned / "LICENSE.txt").write_text("terms")
    found = written(pruned, model__license="other", model__license_name="some-terms", model__license_link="LICENSE.txt")
    assert "The base model's card states some-terms." in found.text
    assert "beside the weights: LICENSE.txt." in found.text
    assert found.data.to_dict()["license_link"] == "LICENSE.txt"


# Text that a record may hold: paths, names and notes come from outside.
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
TRICKY = st.text("`*_|<>[]()\\#&!~$-:\n' \"x", min_size=1, max_size=30)


@given(TEXTS | TRICKY)
@settings(max_examples=300, deadline=None)
def test_escaped_text_is_shown_as_it_is_in_a_cell(text: str) -> None:
    assert cells(f"| a | b |\n|---|---|\n| x{card.escape(text)}x | c |\n") == ["a", "b", f"x{' '.join(text.split())}x", "c"]


@given(TEXTS | st.text("`\n ~a", min_size=1, max_size=20))
@example("a\n```\nb")
@settings(max_examples=200, deadline=None)
def test_a_code_block_ends_where_it_should(text: str) -> None:
    block, _, after, _ = MarkdownIt().parse(f"{card.fenced(text)}\n\nafter\n")
    assert (block.type, block.content, after.content) == ("fence", f"{text}\n", "after")


@pytest.mark.parametrize("text", ["a|b`c\n---\n# Fake", "{{ 7 * 7 }}", "'''\n---\nlicense: evil", "<script>x</script>"])
def test_nothing_in_a_record_breaks_the_card(pruned: Path, text: str) -> None:
    evaluation = {**EVALUATION, "tasks": {text: EVALUATION["tasks"]["arc_easy"]}}
    found = written(
        pruned, evaluation=evaluation, model__name=text, model__base_model=text, warnings=[text], model__license=text
    )
    assert found.data.license == text
    assert found.data.base_model == text
    assert {entry.dataset_name for entry in found.data.eval_results} == {text, "wikitext2"}
    assert any(key.startswith(" ".join(text.split())) for key in rows(found.text))
    assert "<script>" not in found.text.replace("`", "")


# Structured results.


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with fewer channels, more in some blocks than in others."""
    folder = tmp_path_factory.mktemp("smaller")
    model = tiny.build("llama", folder / "dense")
    options = {"calibration": "random", "samples": 8, "seqlen": 24, "device": "cpu", "output": folder / "smaller"}
    return llmprune.prune(str(model), method="cfsp", sparsity=0.5, **options).directory


def test_a_smaller_model_is_called_structured_and_not_sparse(smaller: Path) -> None:
    found = written(smaller)
    assert found.data.to_dict()["tags"] == ["llmprune", "pruned", "structured-pruning", "cfsp"]
    table = rows(found.text)
    assert table["FFN channels"] == ["156", "78", "-50.0 %"]
    assert table["parameters"] == ["46.4 k", "38.0 k", "-18.2 %"]
    assert "non-zero parameters" not in table
    assert "unstructured" not in found.text.split("## Before and after")[0]


def test_the_snippet_of_a_smaller_model_loads_it(smaller: Path, run_python: Callable[..., str]) -> None:
    text = written(smaller).text
    assert "loads after \\`import llmprune\\`, or anywhere with trust\\_remote\\_code=True" in text
    first, second = (token.content for token in MarkdownIt().parse(text) if token.info == "python")
    assert "trust_remote_code=True" in first
    name = "print(type(model).__name__)"
    anywhere = 'import sys; assert "llmprune" not in sys.modules; del model'
    names = run_python("\n".join([first, name, anywhere, second, name]), cwd=smaller.parent).splitlines()
    assert [line for line in names if line.startswith("LLMPrune")] == ["LLMPruneLlamaForCausalLM"] * 2


def test_what_recovery_did_is_said(smaller: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(smaller, tmp_path / "recovered")
    assert "nothing was trained afterwards" in written(copy).text
    recovery = {"held_out": {"before": 5.0, "after": 4.5}, "best_step": 7, "train_tokens": 12_800}
    text = written(copy, recovery=recovery).text
    assert "trained on 12,800 tokens" in text
    assert "5.0000 before, 4.5000 after" in text
    assert "nothing was trained afterwards" not in text


# What is taken over from the base model.


def test_licence_and_base_model_come_from_the_sources_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\nlanguage: [en]\nbase_model: org/parent\n---\n"
    )
    terms = {"license": "other", "license_name": "terms", "license_link": "LICENSE", "language": ["en"]}
    assert card.inherited(tmp_path, None) == {"base_model": "org/parent", **terms}
    assert card.inherited(tmp_path, "org/itself") == {"base_model": "org/itself", **terms}


@pytest.mark.parametrize("readme", [None, "no metadata", "---\n[broken\n---\n", "---\n- a list\n---\n", "\x00"])
def test_a_source_without_a_usable_card_has_an_unknown_licence(tmp_path: Path, readme: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert card.inherited(tmp_path, None) == {"base_model": None}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"general.license": "mit"}, {"license": "mit"}),
        (
            {"general.license": "other", "general.license.name": "a: b", "general.license.link": "https://x.org/l"},
            {"license": "other", "license_name": "a: b", "license_link": "https://x.org/l"},
        ),
        ({"general.source.repo_url": "https://huggingface.co/org/name/"}, {"base_model": "org/name"}),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/parent"}, {"base_model": "org/parent"}),
        ({"general.source.url": "https://example.org/org/name"}, {}),
    ],
)
def test_a_gguf_files_licence_and_origin_reach_the_converted_directorys_card(
    fields: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    header = gguf._Header("llama", "name", gguf._metadata(fields.get), None, {}, (), has_rope_factors=False)
    (tmp_path / "README.md").write_text(gguf._card(tmp_path / "x.gguf", header, "00"))
    assert card.inherited(tmp_path, None) == {"base_model": None, **expected}


def test_data_sets_of_tasks_are_the_harness_own() -> None:
    harness = pytest.importorskip("lm_eval.tasks")
    root = Path(harness.__file__).parent
    folders = ["arc", "glue", "gsm8k", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue", "wikitext"]
    # Only some of the harness's folders: indexing all of its tasks takes half a minute.
    paths = [root / folder for folder in (*folders, "winogrande")]
    index = harness.TaskManager(include_defaults=False, include_path=paths).task_index
    for task, expected in card.TASK_DATA.items():
        defined = index[task].cfg
        split = defined.get("test_split") or defined["validation_split"]
        assert (defined["dataset_path"], defined.get("dataset_name"), split) == expected
