"""`llmprune eval`: what it writes, what it keeps, and what it refuses."""

import fcntl
import json
import shutil

import datasets
import pytest
import torch
from in_process import llmprune
from safetensors.torch import load_file, save_file
from tiny import build, tokenizer
from transformers import AutoModelForCausalLM

from llmprune import evaluation
from llmprune.calibration import evaluation_set
from llmprune.models import Skeleton
from llmprune.output import STATE
from llmprune.perplexity import perplexity
from llmprune.record import read
from llmprune.scores import Documents, Scores
from llmprune.verify import read_record, verify

TASKS = ("--tasks", "copa,piqa", "--limit", "4", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "scores"


@pytest.fixture
def runs(monkeypatch):
    """The harness replaced: (label, limit, fewshot, batch size) of every task that would have been scored."""
    seen = []

    def score(model, tokenizer, loaded, *, limit, fewshot, batch_size, seeds, label, quiet):
        seen.append((label.split(",")[0], loaded.name, limit, fewshot, batch_size))
        zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
        values = [float(zeros == 0), 1.0, 0.0, 1.0]
        mean = sum(values) / 4
        metrics = {"acc": mean, "acc_stderr": 0.1}
        return Scores(4, fewshot or 0, 1.0, metrics, {"acc": True}, {"acc": Documents("mean", values)}, "same")

    monkeypatch.setattr(evaluation, "score", score)
    return seen


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "pruned"
    assert llmprune("prune", "--model", dense, "--method", "magnitude", "--device", "cpu", "--output", out, "-q").code == 0
    return out


@pytest.fixture
def pruned(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "pruned")


def test_the_record_gets_the_scores_beside_the_dense_ones_and_stays_a_whole_record(data_dir, pruned, dense, runs):
    before = read_record(pruned)
    outcome = llmprune("eval", pruned, "--baseline", dense, *TASKS, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    record = read_record(pruned)
    evaluated = record.pop("evaluation")
    assert record == before
    assert verify(pruned) == []
    assert json.loads(outcome.out)["evaluation"] == evaluated
    task = evaluated["tasks"]["copa"]
    assert (task["value"], task["dense"]["value"], task["difference"]["value"]) == (0.5, 0.75, -0.25)
    assert (task["difference"]["low"], task["difference"]["high"]) == (-0.75, 0)
    assert task["data"]["source"] == "local"
    protocol = evaluated["protocol"]
    assert (protocol["limit"], protocol["dtype"], protocol["baseline"]) == (4, "float32", str(dense))
    shown = read(pruned).evaluation
    assert shown.tasks["piqa"].difference.value == -0.25


def test_tasks_of_several_evaluations_come_together_each_with_its_protocol(data_dir, pruned, runs):
    for task, limit in (("copa", "3"), ("piqa", "4")):
        assert llmprune("eval", pruned, "--tasks", task, "--limit", limit, "--device", "cpu", "-q").code == 0
    tasks = read_record(pruned)["evaluation"]["tasks"]
    assert {name: task["protocol"]["limit"] for name, task in tasks.items()} == {"copa": 3, "piqa": 4}


def test_a_dense_model_is_scored_once_for_all_that_is_pruned_from_it(data_dir, pruned, dense, runs):
    llmprune("eval", dense, *TASKS, "-q")
    outcome = llmprune("eval", pruned, "--baseline", dense, *TASKS)
    assert [name for name, *_ in runs] == ["dense", "dense", "pruned", "pruned"]
    assert "dense: copa, piqa read from the cache" in outcome.out
    llmprune("eval", pruned, "--baseline", dense, *TASKS, "-q")
    assert len(runs) == 4


@pytest.mark.parametrize(
    "change",
    [("--limit", "3"), ("--fewshot", "1"), ("--batch-size", "2"), ("--seed", "3"), ("--dtype", "bfloat16")],
    ids=" ".join,
)
def test_what_decides_a_score_decides_what_is_read_from_the_cache(data_dir, dense, runs, change):
    llmprune("eval", dense, *TASKS, "-q")
    llmprune("eval", dense, *TASKS, *change, "-q")
    assert len(runs) == 4


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "weights"])
def test_a_changed_model_is_scored_again(data_dir, dense, tmp_path, runs, file):
    other = shutil.copytree(dense, tmp_path / "other")
    if file == "weights":
        tensors = load_file(other / "model.safetensors")
        tensors["lm_head.weight"][0, 0] += 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    else:
        (other / file).write_text((other / file).read_text() + "\n")
    for folder in (dense, other):
        llmprune("eval", folder, *TASKS, "-q")
    assert len(runs) == 4


def test_changed_documents_are_scored_again(data_dir, dense, tmp_path, runs, monkeypatch):
    folder = shutil.copytree(data_dir / "lm_eval" / "copa", tmp_path / "data" / "lm_eval" / "copa")
    monkeypatch.setenv("LLMPRUNE_DATA", str(tmp_path / "data"))
    only = ("--tasks", "copa", "--device", "cpu", "-q")
    llmprune("eval", dense, *only)
    lines = (folder / "validation.jsonl").read_text().splitlines()
    (folder / "validation.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    llmprune("eval", dense, *only)
    assert len(runs) == 2


def test_an_interrupted_evaluation_keeps_finished_tasks_and_goes_on(data_dir, dense, runs, monkeypatch):
    working = evaluation.score

    def interrupted(*args, **options):
        if runs:
            raise KeyboardInterrupt
        return working(*args, **options)

    monkeypatch.setattr(evaluation, "score", interrupted)
    outcome = llmprune("eval", dense, *TASKS)
    assert outcome.code == 130
    assert f"To go on: llmprune eval {dense} --tasks" in outcome.err
    monkeypatch.setattr(evaluation, "score", working)
    assert llmprune("eval", dense, *TASKS, "-q").code == 0
    assert [task for _, task, *_ in runs] == ["copa", "piqa"]


def test_a_score_that_is_no_number_is_refused_and_not_kept(data_dir, dense, cache, monkeypatch):
    nan = Scores(4, 0, 1.0, {"acc": float("nan")}, {"acc": True}, {}, "same")
    monkeypatch.setattr(evaluation, "score", lambda *args, **options: nan)
    refused(dense, *TASKS, words=["nan", "acc of copa"])
    assert not cache.exists()


def test_whole_texts_go_one_at_a_time_unless_asked_otherwise(data_dir, dense, runs):
    for batch in ((), ("--batch-size", "4")):
        assert llmprune("eval", dense, "--tasks", "copa,wikitext", "--limit", "2", "--device", "cpu", *batch, "-q").code == 0
    assert [batch for *_, batch in runs] == [8, 1, 4, 4]


def test_a_suite_brings_its_limit_and_metric(data_dir, dense, runs):
    outcome = llmprune("eval", dense, "--suite", "quick", "--device", "cpu", "--json")
    assert {limit for _, _, limit, *_ in runs} == {200}
    assert json.loads(outcome.out)["evaluation"]["protocol"]["suite"] == "quick"


def test_a_model_that_llmprune_did_not_write_stays_as_it_is(data_dir, dense, tmp_path, runs):
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    assert llmprune("eval", dense, *TASKS, "--output", tmp_path / "scores.json", "-q").code == 0
    assert {file.name: file.read_bytes() for file in dense.iterdir()} == before
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["evaluation"]["tasks"].keys() == {"copa", "piqa"}


def test_the_card_tells_the_scores_that_the_record_got(data_dir, pruned, dense, runs):
    assert "has not been measured" in (pruned / "README.md").read_text()
    llmprune("eval", pruned, "--baseline", dense, *TASKS, "-q")
    assert (
        "| copa: acc, 0-shot, 4 documents, task version 1.0 | 0.7500 ± 0.1000 | 0.5000 ± 0.1000 |"
        in (pruned / "README.md").read_text()
    )


def test_scores_do_not_get_into_a_directory_that_another_run_holds(data_dir, pruned, runs):
    before = read_record(pruned)
    (pruned / STATE).mkdir()
    with open(pruned / STATE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(pruned, *TASKS, words=["in use by another llmprune run"])
        assert read_record(pruned) == before
    assert llmprune("eval", pruned, *TASKS, "-q").code == 0
    assert len(runs) == 2, "finished tasks are kept"
    assert not (pruned / STATE).exists()


def test_scores_of_a_model_that_was_replaced_meanwhile_are_neither_kept_nor_recorded(
    data_dir, pruned, dense, runs, cache, monkeypatch
):
    working = evaluation.score

    def replaced(*args, **options):
        again = ("--model", dense, "--method", "random", "--device", "cpu", "--output", pruned, "--overwrite", "-q")
        assert llmprune("prune", *again).code == 0
        return working(*args, **options)

    monkeypatch.setattr(evaluation, "score", replaced)
    refused(pruned, *TASKS, words=["changed while it was being evaluated"])
    assert "evaluation" not in read_record(pruned)
    assert not cache.exists()


def test_a_baseline_that_is_not_the_parent_is_named(data_dir, pruned, dense, tmp_path, runs):
    other = shutil.copytree(dense, tmp_path / "other")
    assert "warning" not in llmprune("eval", pruned, "--baseline", other, *TASKS).out
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    said = llmprune("eval", pruned, "--baseline", other, *TASKS).out
    assert f"warning: --baseline {other} is not the model that pruned was pruned from" in said


def test_quiet_says_nothing_and_a_table_says_it_all(data_dir, pruned, dense, runs):
    command = ("eval", pruned, "--baseline", dense, *TASKS)
    quiet, loud = llmprune(*command, "-q"), llmprune(*command)
    assert (quiet.out, quiet.err, loud.err) == ("", "", "")
    assert "-0.2500 [-0.7500, +0.0000]" in loud.out


def test_a_real_evaluation_leaves_nothing_in_the_current_folder(data_dir, stories260k, tmp_path, monkeypatch, capfd):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    outcome = llmprune("eval", stories260k, "--baseline", stories260k, *TASKS, "--json")
    tasks = json.loads(outcome.out)["evaluation"]["tasks"]
    assert outcome.err == ""
    assert not list(here.iterdir())
    assert "".join(capfd.readouterr()) == ""
    for task in tasks.values():
        assert [task["difference"][key] for key in ("value", "low", "high")] == [0, 0, 0]
        assert task["samples"] == 4


@pytest.mark.parametrize("variant", ["llama", "gemma2", "opt", "gpt_neox", "gpt2"])
def test_token_perplexity_is_the_resident_models(data_dir, variant, tmp_path, monkeypatch):
    folder = build(variant, tmp_path / variant)
    text = tmp_path / "wikitext-2-raw-v1" / "test.parquet"
    text.parent.mkdir()
    datasets.Dataset.from_dict({"text": ["The streamed result is that of the resident model. " * 20]}).to_parquet(text)
    monkeypatch.setenv("LLMPRUNE_DATA", str(tmp_path))
    outcome = llmprune("eval", folder, "--tasks", "perplexity", "--limit", "3", "--device", "cpu", "--json")
    found = json.loads(outcome.out)["evaluation"]["perplexity"]
    assert found["protocol"] == "token perplexity, 3 disjoint windows of 64 tokens"

    bos = variant not in ("gpt_neox", "gpt2")
    ids_NT = evaluation_set(str(text), tokenizer(with_bos=bos), seqlen=64, windows=3).ids_NT
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(ids_NT).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_NT[:, 1:].flatten())
    assert found["token"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert perplexity(Skeleton(folder), ids_NT) == found["token"]


def test_token_perplexities_are_compared_in_pairs_of_windows(pruned, dense, tmp_path, monkeypatch):
    text = tmp_path / "wikitext-2-raw-v1" / "test.parquet"
    text.parent.mkdir()
    datasets.Dataset.from_dict({"text": ["One day a girl saw a big red ball in the park. " * 99]}).to_parquet(text)
    monkeypatch.setenv("LLMPRUNE_DATA", str(tmp_path))
    options = ["--baseline", dense, "--tasks", "perplexity", "--limit", "3", "--device", "cpu", "--json"]
    found = json.loads(llmprune("eval", pruned, *options).out)["evaluation"]["perplexity"]
    gap = found["difference"]
    assert gap["value"] == pytest.approx(found["token"] - found["dense"], abs=1e-9)
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert gap["low"] < gap["high"]


# Bad input.


def refused(*args, words):
    outcome = llmprune("eval", *args)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--suite", "quik"), ["quik", "quick", "paper-zero-shot"]),
        (("--suite", "quick", "--tasks", "copa"), ["--tasks", "--suite"]),
        (("--tasks", " , "), ["names no task"]),
        (("--limit", "0"), ["limit"]),
        (("--batch-size", "auto"), ["batch_size"]),
        (("--fewshot", "-1"), ["fewshot"]),
        (("--dtype", "int8"), ["dtype", "bfloat16"]),
        (("--device", "tpu"), ["tpu", "cpu"]),
        (("--output", "nowhere/scores.json"), ["nowhere/scores.json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_options_are_refused(data_dir, dense, options, words):
    refused(dense, *options, words=words)


def test_a_directory_that_is_no_model_is_refused(tmp_path, dense):
    refused(tmp_path, words=["config.json"])
    refused(dense, "--baseline", tmp_path, words=["config.json"])


def test_an_unfinished_run_is_refused(dense, tmp_path):
    other = shutil.copytree(dense, tmp_path / "other")
    (other / STATE).mkdir()
    refused(other, words=["unfinished"])


def test_a_model_without_a_tokenizer_is_refused(dense, tmp_path):
    other = shutil.copytree(dense, tmp_path / "other")
    for file in other.glob("tokenizer*"):
        file.unlink()
    refused(other, words=["no tokenizer"])


def test_a_baseline_that_cuts_text_otherwise_is_refused(data_dir, dense, stories260k):
    refused(dense, "--baseline", stories260k, *TASKS, words=["--baseline", "stories260K", "other tokens"])


def test_a_missing_data_folder_is_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_DATA", str(tmp_path / "gone"))
    refused(dense, *TASKS, words=["LLMPRUNE_DATA", "gone/lm_eval/copa/validation.jsonl"])


def test_without_the_harness_the_extra_is_named(run_python, dense):
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        f"from llmprune.cli import main; sys.argv = ['llmprune', 'eval', {str(dense)!r}]\n"
        "sys.stderr = sys.stdout\n"
        "try: main()\nexcept SystemExit as error: print(error.code)"
    )
    sentence, exit_code = run_python(code).splitlines()
    assert "pip install 'llmprune[eval]'" in sentence
    assert exit_code == "2"


def test_a_smaller_model_scores_what_the_masked_one_does_by_the_harness_and_block_by_block(data_dir, dense, tmp_path):
    evaluated = {}
    for written in ("auto", "masked"):
        out = tmp_path / written
        flags = ("--method", "cfsp", "--format", written, "--calibration", "random", "--samples", "8", "--seqlen", "24", "-q")
        assert llmprune("prune", "--model", dense, "--device", "cpu", "--output", out, *flags).code == 0
        flags = ("--tasks", "copa,perplexity", "--limit", "4", "--device", "cpu", "--baseline", dense, "-q")
        outcome = llmprune("eval", out, *flags)
        assert (outcome.code, outcome.err) == (0, "")
        assert verify(out) == []
        evaluated[written] = read_record(out)["evaluation"]
    one, other = evaluated["auto"], evaluated["masked"]
    assert one["tasks"]["copa"]["value"] == other["tasks"]["copa"]["value"]
    assert one["perplexity"]["token"] == pytest.approx(other["perplexity"]["token"], rel=1e-5)
    assert one["perplexity"]["dense"] == other["perplexity"]["dense"] != pytest.approx(one["perplexity"]["token"], rel=1e-3)
    assert "copa: acc" in (tmp_path / "auto" / "README.md").read_text()
