"""Sharing a pruned model: pushed to a Hub on this machine by the real client, and loaded back from it."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import in_process
import pytest
import tiny
import torch
from hub_server import READ_TOKEN, TOKEN, HubServer, Repository
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import report
from llmprune.structure import PLAN
from llmprune.surgery import MODELING_FILE
from llmprune.verify import verify

NAME = "user/tiny"
PAGE = report.page
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("user/tiny").eval()
ids = AutoTokenizer.from_pretrained("user/tiny")("pruned", return_tensors="pt").input_ids
torch.save({"ids": ids, "logits": model(ids).logits.detach(), "weights": model.state_dict()}, sys.argv[1])
"""

Push = Callable[..., in_process.Outcome]
RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned tiny model of several shards; tests work on copies."""
    folder = tmp_path_factory.mktemp("hub")
    model = tiny.build("llama", folder / "dense")
    return llmprune.prune(str(model), method="magnitude", sparsity=0.5, output=folder / "pruned").directory


@pytest.fixture
def pruned(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "pruned")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def push(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Push:
    """`llmprune push` in this process, against the local Hub; what it prints never holds a token."""
    # What `hub.env` sets in a process of its own: the client reads these variables once.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Between attempts, on a Hub that is gone, the client waits half a minute in all.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    # Drawing takes longer than all the rest.
    monkeypatch.setattr(report, "page", lambda record, disk_bytes: ("<html></html>", []))

    # The client's own handler holds on to the standard error stream that it found at first.
    log = io.StringIO()
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [logging.StreamHandler(log)])

    def run(*args: str | Path) -> in_process.Outcome:
        log.truncate(0)
        outcome = in_process.llmprune("push", *args)
        printed = capfd.readouterr()
        outcome = in_process.Outcome(outcome.code, outcome.out + printed.out, outcome.err + printed.err + log.getvalue())
        assert not any(token in outcome.out + outcome.err for token in (TOKEN, READ_TOKEN))
        return outcome

    return run


def sentence(outcome: in_process.Outcome) -> str:
    """The one sentence of a refusal."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    return outcome.err


def shards(directory: Path) -> list[str]:
    """SHA-256 of every shard."""
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob("*.safetensors"))


@pytest.mark.slow
def test_a_pushed_model_loads_in_a_fresh_process_and_is_the_same_model(
    finished: Path,
    pruned: Path,
    hub: HubServer,
    run_cli: RunCli,
    run_python: Callable[..., str],
    tmp_path: Path,
) -> None:
    outcome = run_cli("push", pruned, NAME, env=hub.env)
    assert (outcome.returncode, outcome.stdout) == (0, f"{hub.url}/{NAME}\n")
    assert TOKEN not in outcome.stderr
    target = tmp_path / "loaded.pt"
    code = LOAD.replace("sys.argv[1]", repr(str(target)))
    run_python(code, env={**hub.env, "HF_HOME": str(tmp_path / "empty")})
    loaded = torch.load(target)
    local = AutoModelForCausalLM.from_pretrained(finished).eval()
    assert torch.equal(local(loaded["ids"]).logits, loaded["logits"])
    weights = local.state_dict()
    assert weights.keys() == loaded["weights"].keys()
    assert all(torch.equal(weights[name], loaded["weights"][name]) for name in weights)


def test_exactly_the_models_files_are_sent(pruned: Path, hub: HubServer, push: Push) -> None:
    (pruned / "report.html").write_text("<html></html>")
    (pruned / ".eval_results").mkdir()
    (pruned / ".eval_results" / "mine.yaml").write_text("[]")
    (pruned / ".env").write_text("SECRET=1")
    (pruned / "notes.txt").write_text("mine")
    (pruned / ".llmprune").mkdir()
    (pruned / ".llmprune" / "journal.jsonl").write_text("{}")
    assert push(pruned, NAME).code == 0
    sent = hub.repositories[NAME].refs["main"][-1]
    secret = {".env", "notes.txt", ".llmprune/journal.jsonl"}
    here = {str(file.relative_to(pruned)) for file in pruned.rglob("*") if file.is_file()} - secret
    assert sent.keys() - {".gitattributes"} == here
    for name in here - {"README.md", "report.html", "recipe.yaml", "llmprune.json"}:
        assert sent[name] == (pruned / name).read_bytes()
    assert {"README.md", "recipe.yaml", "llmprune.json", "report.html", ".eval_results/mine.yaml", "tokenizer.json"} < here


def test_no_path_of_this_machine_is_published(
    hub: HubServer, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "page", PAGE)
    model = tiny.build("llama", tmp_path / "home" / "dense")
    (text := tmp_path / "home" / "text.txt").write_text("It was a dark and stormy night; the rain fell.\n" * 40)
    options = {"calibration": str(text), "samples": 2, "seqlen": 8, "evaluate": str(text), "output": tmp_path / "home" / "out"}
    directory = llmprune.prune(str(model), device="cpu", **options).directory
    before = {file: file.read_bytes() for file in directory.iterdir()}
    assert push(directory, NAME).code == 0
    sent = hub.repositories[NAME].refs["main"][-1]
    assert sorted(name for name, content in sent.items() if str(tmp_path).encode() in content) == []
    assert b"calibration: text.txt" in sent["recipe.yaml"]
    assert b"text.txt" in sent["README.md"]
    assert b"<svg" in sent["report.html"]
    for name, content in sent.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert verify(tmp_path / "copy") == []
    assert {file: file.read_bytes() for file in directory.iterdir()} == before


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose blocks have different widths."""
    folder = tmp_path_factory.mktemp("smaller")
    model = tiny.build("llama", folder / "dense")
    options = {"calibration": "random", "samples": 8, "seqlen": 24, "device": "cpu", "output": folder / "smaller"}
    return llmprune.prune(str(model), method="cfsp", sparsity=0.5, **options).directory


def test_a_smaller_model_is_sent_with_its_plan_and_code_and_a_later_one_takes_them_away(
    smaller: Path, pruned: Path, hub: HubServer, push: Push, tmp_path: Path
) -> None:
    assert push(smaller, NAME).code == 0
    sent = hub.repositories[NAME].refs["main"][-1]
    assert {PLAN, MODELING_FILE} < sent.keys()
    for name, content in sent.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert verify(tmp_path / "copy") == []
    assert push(pruned, NAME).code == 0
    assert not {PLAN, MODELING_FILE} & hub.repositories[NAME].refs["main"][-1].keys()


@pytest.mark.slow
def test_a_smaller_model_loads_from_the_hub_by_its_own_code_and_by_ours(
    smaller: Path, hub: HubServer, push: Push, run_python: Callable[..., str], tmp_path: Path
) -> None:
    push(smaller, NAME)
    by_code, by_ours = (
        LOAD.replace('tiny").eval', 'tiny", trust_remote_code=True).eval'),
        LOAD.replace("import sys,", "import llmprune,"),
    )
    targets = [tmp_path / "code.pt", tmp_path / "ours.pt"]
    code = "\n".join(
        [
            by_code.replace("sys.argv[1]", repr(str(targets[0]))),
            'assert "llmprune" not in sys.modules and type(model).__module__.startswith("transformers_modules.")',
            by_ours.replace("sys.argv[1]", repr(str(targets[1]))),
            'assert type(model).__module__ == "llmprune.modeling_llmprune"',
        ]
    )
    run_python(code, env={**hub.env, "HF_HOME": str(tmp_path / "home")})
    local = llmprune.load(smaller)
    for target in targets:
        loaded = torch.load(target)
        assert torch.equal(local(loaded["ids"]).logits, loaded["logits"])


def test_the_card_in_the_repository_calls_the_model_by_its_id(pruned: Path, hub: HubServer, push: Push) -> None:
    push(pruned, NAME)
    content = ModelCard(hub.repositories[NAME].refs["main"][-1]["README.md"].decode()).text
    assert f'from_pretrained("{NAME}")' in content


def test_what_is_on_the_hub_is_not_sent_again(pruned: Path, hub: HubServer, push: Push) -> None:
    push(pruned, NAME)
    assert sorted(hub.received) == shards(pruned)
    again = push(pruned, NAME)
    assert (again.code, again.out) == (0, f"{hub.url}/{NAME}\n")
    assert sorted(hub.received) == shards(pruned)
    assert len(hub.repositories[NAME].refs["main"]) == 2


def test_large_files_arrive_whole_in_parts(pruned: Path, hub: HubServer, push: Push) -> None:
    hub.chunk_size = 10_000
    assert push(pruned, NAME).code == 0
    assert any("part 3" in name for name in hub.received)
    assert sorted(hub.blobs) == shards(pruned)


def test_one_dropped_connection_is_mended_at_once(pruned: Path, hub: HubServer, push: Push) -> None:
    hub.drop_upload = 2
    assert push(pruned, NAME).code == 0
    assert sorted(hub.received) == shards(pruned)


def test_a_broken_upload_is_continued_with_what_is_missing(pruned: Path, hub: HubServer, push: Push) -> None:
    hub.drop_upload, hub.stay_down = 3, True
    said = sentence(push(pruned, NAME))
    assert "connection to the Hub" in said
    assert "same command again" in said
    assert len(hub.received) == 2
    assert hub.repositories[NAME].refs["main"][-1].keys() == {".gitattributes"}
    hub.drop_upload = None
    assert push(pruned, NAME).code == 0
    assert sorted(hub.received) == shards(pruned)
    assert len(hub.repositories[NAME].refs["main"]) == 2


def test_weights_and_scores_of_an_earlier_model_leave_the_repository(pruned: Path, hub: HubServer, push: Push) -> None:
    earlier = {"model.safetensors": b"x", ".eval_results/llmprune-boolq.yaml": b"[]"}
    others = {".eval_results/theirs.yaml": b"[]", "models/a.safetensors": b"x", "picture.png": b"x"}
    hub.repositories[NAME] = Repository(private=False, refs={"main": [earlier | others]})
    assert push(pruned, NAME).code == 0
    there = hub.repositories[NAME].refs["main"][-1]
    assert not earlier.keys() & there.keys()
    assert others.keys() < there.keys()


def test_a_private_repository_is_seen_by_its_owner_only(pruned: Path, hub: HubServer, push: Push) -> None:
    assert push(pruned, NAME, "--private").code == 0
    assert huggingface_hub.HfApi().model_info(NAME).private
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        huggingface_hub.HfApi(token=False).model_info(NAME)


def test_a_public_repository_is_not_taken_for_a_private_one(pruned: Path, hub: HubServer, push: Push) -> None:
    hub.repositories[NAME] = Repository(private=False)
    assert "public, against --private" in sentence(push(pruned, NAME, "--private"))
    assert not hub.received


def test_a_revision_is_a_branch_of_its_own(pruned: Path, hub: HubServer, push: Push) -> None:
    for _ in range(2):
        outcome = push(pruned, NAME, "--revision", "half")
        assert (outcome.code, outcome.out) == (0, f"{hub.url}/{NAME}/tree/half\n")
    refs = hub.repositories[NAME].refs
    assert refs["main"][-1].keys() == {".gitattributes"}
    assert "llmprune.json" in refs["half"][-1]
    assert len(refs["half"]) == 2


def test_a_pull_request_leaves_the_branch_as_it_is(pruned: Path, hub: HubServer, push: Push) -> None:
    outcome = push(pruned, NAME, "--create-pr")
    assert (outcome.code, outcome.out) == (0, f"{hub.url}/{NAME}/discussions/1\n")
    refs = hub.repositories[NAME].refs
    assert refs["main"][-1].keys() == {".gitattributes"}
    assert "llmprune.json" in refs["refs/pr/1"][-1]


def test_a_pull_request_may_go_to_somebody_elses_repository(pruned: Path, hub: HubServer, push: Push) -> None:
    hub.repositories["other/tiny"] = Repository(private=False)
    outcome = push(pruned, "other/tiny", "--create-pr")
    assert (outcome.code, outcome.out) == (0, f"{hub.url}/other/tiny/discussions/1\n")


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("", "There is no Hugging Face token: run `hf auth login`"),
        ("hf_wrong", "The Hub does not accept the Hugging Face token"),
        (READ_TOKEN, "The Hugging Face token may not write to user/tiny"),
    ],
)
def test_a_token_that_will_not_do_is_named_before_anything_is_sent(
    token: str, expected: str, pruned: Path, hub: HubServer, push: Push, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert expected in sentence(push(pruned, NAME))
    assert not hub.received
    assert not hub.repositories


def test_somebody_elses_repository_is_refused(pruned: Path, hub: HubServer, push: Push) -> None:
    hub.repositories["other/tiny"] = Repository(private=False)
    assert "may not write to other/tiny" in sentence(push(pruned, "other/tiny"))
    assert not hub.received


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/tiny", "user/", "us er/tiny", "user/ti--ny", "https://hf.co/user/tiny"])
def test_a_name_that_is_none_is_refused(name: str, pruned: Path, hub: HubServer, push: Push) -> None:
    said = sentence(push(pruned, name))
    assert repr(name) in said
    assert "give user/name" in said
    assert not hub.log


@pytest.mark.parametrize(
    ("prefix", "status", "expected"),
    [
        ("/api/whoami-v2", 503, "same command again"),
        ("/api/validate-yaml", 400, "The Hub refuses the upload to user/tiny"),
        ("/api/models/user/tiny/preupload", 403, "may not write to user/tiny"),
        ("/user/tiny.git", 500, "same command again"),
        ("/api/models/user/tiny/commit", 403, "may not write to user/tiny"),
        ("/api/models/user/tiny/commit", 413, "The Hub refuses the upload to user/tiny"),
        ("/api/models/user/tiny/commit", 429, "same command again"),
        ("/api/models/user/tiny/commit", 504, "same command again"),
    ],
)
def test_every_answer_of_the_hub_is_one_sentence_without_the_token(
    prefix: str, status: int, expected: str, pruned: Path, hub: HubServer, push: Push
) -> None:
    hub.status = {prefix: status}
    hub.echo_token = True
    said = sentence(push(pruned, NAME))
    assert expected in said
    assert ("as the test wishes" in said) is (status != 403)
    hub.status = {}
    assert push(pruned, NAME).code == 0
    assert sorted(hub.received) == shards(pruned)


def test_a_hub_that_cannot_be_reached_is_named(pruned: Path, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 failed" in sentence(push(pruned, NAME))


def test_offline_mode_is_named(pruned: Path, hub: HubServer, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in sentence(push(pruned, NAME))
    assert not hub.log


def test_only_a_finished_run_is_pushed(hub: HubServer, push: Push, tmp_path: Path) -> None:
    assert "holds no llmprune.json" in sentence(push(tmp_path, NAME))
    (tmp_path / ".llmprune").mkdir()
    assert "unfinished run" in sentence(push(tmp_path, NAME))
    assert not hub.log


def test_a_model_that_is_not_what_was_pruned_is_not_pushed(pruned: Path, hub: HubServer, push: Push) -> None:
    shard = sorted(pruned.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    said = sentence(push(pruned, NAME))
    assert shard.name in said
    assert "not what was pruned" in said
    assert not hub.repositories
