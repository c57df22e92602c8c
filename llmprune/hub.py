"""Share a pruned model on the Hugging Face Hub.

    llmprune push DIR user/name --private

What is sent is what the run's record names, and the scores beside it; nothing else that lies in the directory. The card and the
report are written for it. Of paths on this machine that the recipe and the record hold, such as a calibration file's, the last
name is sent alone. The directory itself stays as it is. Everything arrives in one commit, after the large files are there: a
reader of the repository sees the whole model or none of it, and an upload that breaks off is continued by the same command,
since the Hub says which large files it has.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    validate_repo_id,
)

from . import __version__, card
from .checkpoint import INDEX, write_text
from .errors import LLMPruneError
from .output import RECIPE, REPORT, write_record
from .progress import bar
from .record import read
from .structure import PLAN
from .surgery import MODELING_FILE
from .tables import weights_bytes
from .verify import pruned_record, steps, verify

# httpx's or httpx2's, whichever the client runs on: a connection that fails raises this, an answer of the Hub its subclass.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
# Files of an earlier model in the repository that would be read beside or instead of this one's.
SUPERSEDED = ("model*.safetensors", f"{card.RESULTS}/llmprune-*.yaml", PLAN, MODELING_FILE)


def check(repo_id: str) -> None:
    """Find out, before hours of work, whether there is a token that the Hub accepts and `repo_id` is a name.

    Raises:
        LLMPruneError: it is not; there is no token or not a valid one; the Hub cannot be reached.
    """
    try:
        if repo_id.count("/") != 1:
            raise HFValidationError
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise LLMPruneError(
            f"{repo_id!r} is no name for a repository on the Hub: give user/name, of letters, digits, '-', '_' and '.'."
        ) from error
    if get_token() is None:
        raise LLMPruneError(
            "There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one that may write "
            "(https://huggingface.co/settings/tokens)."
        )
    with _in_one_sentence(repo_id):
        HfApi().whoami()


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    quiet: bool = False,
) -> str:
    """Upload a finished and verified output directory, its card written afresh; creates the repository if need be.

    Args:
        directory: what `prune` wrote.
        repo_id: `user/name`.
        private: only the owner and their organisation may see a repository that is created.
        revision: branch to commit to, created if missing; by default the main branch.
        create_pr: open a pull request instead of committing to the branch.
        quiet: hide progress bars.

    Returns:
        The address of the repository, its branch or the pull request.

    Raises:
        LLMPruneError: see `check`; the directory is not finished, or not what its record says; no write permission; the
            connection broke.
    """
    record = pruned_record(directory)
    check(repo_id)
    with bar("verify", steps(record), quiet=quiet) as advance:
        problems = verify(directory, advance_progress=advance)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise LLMPruneError(
            f"{directory} is not what was pruned ({problems[0].rstrip('.')}{more}): see `llmprune verify`, and prune again "
            "before you share it."
        )
    api = HfApi()
    with TemporaryDirectory(prefix="llmprune-") as place:
        folder = Path(place)
        _stage(directory, folder, record, repo_id)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
        with _in_one_sentence(repo_id), _calm_client(quiet=quiet):
            # None, not False: an organisation may make its repositories private by default.
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise LLMPruneError(
                    f"{repo_id} is there already and public, against --private: make it private in its settings, or give "
                    "another name."
                )
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = api.list_repo_files(repo_id, revision=revision)
            stale = [name for name in there if name not in files and _is_superseded(name)]
            commit = api.create_commit(
                repo_id,
                operations=[
                    *(CommitOperationAdd(name, folder / name) for name in files),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=f"Upload a model pruned by llmprune {__version__}",
                revision=revision,
                create_pr=create_pr,
            )
    return commit.pr_url or f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _stage(directory: Path, folder: Path, record: dict[str, dict[str, str]], repo_id: str) -> None:
    """Lay out in an empty folder what is uploaded, large files as links."""
    scores = directory / card.RESULTS
    others = [file for file in scores.glob("*.yaml") if not fnmatch(file.name, "llmprune-*")]
    readme = [directory / card.CARD] if not card.is_ours(directory / card.CARD) else []
    for file in [*(directory / name for name in (*record["shards"], *record["copied"], INDEX)), *readme, *others]:
        link = folder / file.relative_to(directory)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(file.resolve())
    recipe = yaml.safe_load((directory / RECIPE).read_text(encoding="utf-8"))
    record, recipe = json.loads(_without_places(json.dumps([record, recipe])))
    digest = write_text(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    write_record(folder, {**record, "recipe_sha256": digest})
    card.write(folder, repo_id)
    if find_spec("matplotlib"):
        from .report import page

        html, _ = page(read(folder), weights_bytes(folder))
        write_text(folder / REPORT, html)


def _without_places(text: str) -> str:
    """JSON in which every path of this machine is cut down to its last name, also inside of sentences."""
    places = re.findall(r'"((?:~|\.{1,2})?/[^"]*[^"/])/?"', text)
    for place in sorted(set(places), key=len, reverse=True):
        # Not the end of another path, or of a name on the Hub such as org/data.
        text = re.sub(rf"(?<![\w./~-]){re.escape(place)}(?!\w)", lambda found: found[0].rsplit("/", 1)[-1], text)
    return text


def _is_superseded(name: str) -> bool:
    # The star of fnmatch reaches into folders.
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in SUPERSEDED)


@contextmanager
def _calm_client(*, quiet: bool) -> Iterator[None]:
    """Let the Hub's client show its bars on a terminal only, and keep its log of every retry to itself."""
    verbosity = logging.get_verbosity()
    hide = (quiet or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            enable_progress_bars()


@contextmanager
def _in_one_sentence(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into an `LLMPruneError`."""
    try:
        yield
    except LLMPruneError:
        raise
    except OfflineModeIsEnabled as error:
        raise LLMPruneError("HF_HUB_OFFLINE is set, which forbids any upload: unset it, then give the same command.") from error
    # A failed upload of one file is a RuntimeError, also from hf_xet; rejected metadata and damaged answers are ValueErrors.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise LLMPruneError(_sentence(error, repo_id)) from error


def _sentence(error: BaseException, repo_id: str) -> str:
    causes = [error]
    # An answer of the Hub has the same in httpx's words for its cause.
    while causes[-1].__cause__ is not None and not isinstance(causes[-1], HfHubHTTPError):
        causes.append(causes[-1].__cause__)
    status = causes[-1].response.status_code if isinstance(causes[-1], HfHubHTTPError) else None
    if status == 401:
        return (
            "The Hub does not accept the Hugging Face token: run `hf auth login` again, or set HF_TOKEN to a valid one "
            "(https://huggingface.co/settings/tokens)."
        )
    if status == 403:
        return (
            f"The Hugging Face token may not write to {repo_id}: give a repository of your own, or a token with write "
            "permission (https://huggingface.co/settings/tokens)."
        )
    said = [getattr(cause, "server_message", None) or str(cause) or type(cause).__name__ for cause in causes]
    reason = "; ".join(dict.fromkeys(" ".join(text.split()).rstrip(".") for text in said))
    if token := get_token():
        reason = reason.replace(token, "[token]")
    if status and 400 <= status < 500 and status != 429:
        return f"The Hub refuses the upload to {repo_id} ({reason}): mend that, then give the same command again."
    return (
        f"The connection to the Hub at {HfApi().endpoint} failed ({reason}): give the same command again, it sends only what "
        "has not arrived."
    )
