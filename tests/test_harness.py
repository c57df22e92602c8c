"""The harness's tasks over local files are the harness's own tasks, and so are the scores."""

import io
import json
import sys
from pathlib import Path

import datasets
import pytest

from llmprune import harness
from llmprune.errors import LLMPruneError
from llmprune.harness import HARNESS_TASKS, PERPLEXITY, Seeds, load_suite, load_tasks, local_tasks, score
from llmprune.loading import load
from llmprune.models import load_tokenizer

DOCUMENTS = 25
# In the schema of the Hub's data sets; not in the data folder.
SYNTHETIC = {
    "hellaswag": {
        "ind": 1,
        "activity_label": "Baking",
        "ctx_a": "She opens the oven. [title] Wait",
        "ctx_b": "then she",
        "endings": ["eats  it.", "[step] sings.", "runs.", "sleeps."],
        "label": "2",
    },
    "winogrande": {"sentence": "The cup fell so _ broke.", "option1": "the cup", "option2": "the floor", "answer": "1"},
}


@pytest.fixture
def data(data_dir, tmp_path, monkeypatch):
    """A data folder with the first documents of every task."""
    for name, local in local_tasks().items():
        folder = tmp_path / "data" / "lm_eval" / name
        folder.mkdir(parents=True)
        for file in local.splits.values():
            source = data_dir / "lm_eval" / name / file
            lines = source.read_text().splitlines()[:DOCUMENTS] if source.exists() else [json.dumps(SYNTHETIC[name])] * 2
            (folder / file).write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("LLMPRUNE_DATA", str(tmp_path / "data"))
    # Where `datasets` would keep a copy of every test's files for good.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "data" / "lm_eval"


def own_task(name, folder):
    """The harness's task as it stands, over a data set whose every split holds the documents of the local files' last split."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    local = local_tasks()[name]
    index = TaskManager(include_defaults=False, include_path=HARNESS_TASKS / local.defined_in).task_index
    config = load_yaml(index[name].yaml_path, resolve_func=True)
    file = folder / name / list(local.splits.values())[-1]
    documents = datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), documents))
    config.pop("tag", None)
    return ConfigurableTask(config=config)


def prompts(task):
    """Every request and target of a task's documents, rendered by the task itself."""
    rendered = []
    for number, document in enumerate(task.eval_docs):
        context = task.fewshot_context(document, 0)
        requests = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, number, 1))
        requests = requests if isinstance(requests, list) else [requests]
        rendered.append(([request.arguments for request in requests], task.doc_to_target(document)))
    return rendered


@pytest.mark.parametrize("name", sorted(local_tasks()))
def test_a_local_task_has_the_prompts_metrics_and_version_of_the_harness(name, data):
    (loaded,) = load_tasks([name])
    own = own_task(name, data)
    assert loaded.source == "local"
    assert prompts(loaded.task) == prompts(own)
    assert len(prompts(own)) == len(own.eval_docs) > 1
    assert loaded.task.aggregation() == own.aggregation()
    assert loaded.task.higher_is_better() == own.higher_is_better()
    assert (loaded.task.VERSION, loaded.task.OUTPUT_TYPE) == (own.VERSION, own.OUTPUT_TYPE)
    fixed = own.get_config("num_fewshot")
    assert loaded.task.get_config("num_fewshot") == fixed


@pytest.fixture(scope="module")
def resident(stories260k):
    return load(stories260k, device="cpu"), load_tokenizer(stories260k)


SETTINGS = {"limit": 12, "fewshot": None, "batch_size": 4, "seeds": Seeds(), "quiet": True}


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "lambada_openai", "wikitext"])
def test_scores_are_those_of_the_harness_on_the_same_directory(name, data, resident, stories260k):
    import lm_eval
    from lm_eval.tasks import TaskManager

    limit = 2 if name == "wikitext" else 12
    (loaded,) = load_tasks([name])
    found = score(*resident, loaded, **{**SETTINGS, "limit": limit})
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={stories260k},dtype=float32",
        tasks=[own_task(name, data)],
        batch_size=4,
        device="cpu",
        limit=limit,
        task_manager=TaskManager(include_defaults=False),
    )
    assert found.samples == results["n-samples"][name]["effective"] == limit
    for metric, value in found.metrics.items():
        expected = results["results"][name][f"{metric},none"]
        assert value == (None if expected == "N/A" else expected)
    assert {f"{metric},none" for metric in found.metrics} == {key for key in results["results"][name] if key.endswith(",none")}


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "wikitext"])
def test_the_bar_ends_where_it_says(name, data, resident, monkeypatch):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def counted(description, total, *, quiet):
        seen.append([total, 0])

        def advance(name):
            seen[-1][1] += 1

        yield advance

    monkeypatch.setattr(harness, "bar", counted)
    (loaded,) = load_tasks([name])
    score(*resident, loaded, **{**SETTINGS, "limit": 1})
    ((total, finished),) = seen
    assert total == finished > 0


def test_on_a_terminal_the_bar_is_all_that_shows(data, resident, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    (loaded,) = load_tasks(["lambada_openai"])
    score(*resident, loaded, **{**SETTINGS, "limit": 2, "label": "tiny, lambada", "quiet": False})
    assert "tiny, lambada" in terminal.getvalue()
    for noise in ("it/s", "bootstrapping", "loglikelihood requests", "pretrained"):
        assert noise not in terminal.getvalue()


def test_nothing_of_the_harness_reaches_the_terminal(data, resident, capfd, tmp_path, monkeypatch):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    for loaded in load_tasks(["lambada_openai", "wikitext"]):
        score(*resident, loaded, **{**SETTINGS, "limit": 2})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not list(here.iterdir())


def test_a_perplexity_beyond_all_numbers_is_refused(data, stories260k):
    model = load(stories260k, device="cpu")
    model.model.norm.weight.data.mul_(1e6)
    (loaded,) = load_tasks(["lambada_openai"])
    with pytest.raises(LLMPruneError, match="too large"):
        score(model, load_tokenizer(stories260k), loaded, **{**SETTINGS, "limit": 2})


def test_every_suite_names_tasks_that_local_files_can_serve():
    names = [file.stem for file in harness.SUITES.glob("*.yaml")]
    assert sorted(names) == ["paper-zero-shot", "perplexity", "quick"]
    for name in names:
        assert set(load_suite(name).tasks) <= {PERPLEXITY, *local_tasks()}


def refused(names, *words):
    with pytest.raises(LLMPruneError) as caught:
        load_tasks(names)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_empty_file_is_refused(data):
    (data / "piqa" / "validation.jsonl").write_text("\n")
    refused(["piqa"], "piqa/validation.jsonl is empty")


@pytest.mark.parametrize("line", ['{"goal": "x", "so', '{"goal": "x"}', "[1]"])
def test_a_damaged_file_is_refused(data, line):
    (data / "piqa" / "validation.jsonl").write_text(line + "\n")
    refused(["piqa"], "piqa/validation.jsonl", "cannot be read")


def test_tasks_without_data_are_named_with_what_is_missing_and_how_to_go_on(data, monkeypatch):
    for name in ("hellaswag", "winogrande"):
        (data / name / "validation.jsonl").unlink()
    refused(
        load_suite("paper-zero-shot").tasks,
        "hellaswag, winogrande",
        str(Path("hellaswag") / "validation.jsonl"),
        "--tasks boolq,rte,arc_easy,arc_challenge,openbookqa",
    )
    monkeypatch.delenv("LLMPRUNE_DATA")
    refused(["piqa"], "LLMPRUNE_DATA", "is not set")


def test_without_local_files_the_documents_are_those_of_the_hub(data, monkeypatch):
    documents = [json.loads(line) for line in (data / "piqa" / "validation.jsonl").read_text().splitlines()]
    asked = []

    def hub(path, name=None, **options):
        asked.append(path)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation"), datasets.Dataset.from_list(documents)))

    (local,) = load_tasks(["piqa"])
    monkeypatch.delenv("LLMPRUNE_DATA")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    (loaded,) = load_tasks(["piqa"])
    assert (loaded.source, asked) == ("hub", ["baber/piqa"])
    assert prompts(loaded.task) == prompts(local.task)
    documents.pop()
    (fewer,) = load_tasks(["piqa"])
    assert fewer.sha256 != loaded.sha256


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("LLMPRUNE_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(harness, "hub_reachable", lambda: False)
    refused(["piqa", "copa"], "piqa, copa", "does not answer")


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_the_nearest_names(data):
    refused(["arc_esy"], "arc_esy", "arc_easy")


@pytest.mark.slow
def test_a_tag_stands_for_its_tasks(data):
    assert [loaded.name for loaded in load_tasks(["ai2_arc"])] == ["arc_challenge", "arc_easy"]
