"""The output directory: finished shards are the state of a run.

    OUT/model-00001-of-00031.safetensors ...   each written to a temporary name, synced, renamed
    OUT/.llmprune/journal.jsonl                one line per finished step, synced after the step's files are
    OUT/.llmprune/lock                         held (flock) by the running process; the kernel frees it if that dies
    OUT/.llmprune/progress*                    what a method that works long before the first block is finished has so far
    OUT/.llmprune/clearing                     there while `--overwrite` removes an earlier model
    OUT/config.json, index, tokenizer, ...     written at the end, so that nothing unfinished loads as a model
    OUT/llmprune.json                          the record; written last, it says the directory is complete

A run with the same identity (recipe, model, data, versions) continues after the last journaled step. A run with another
identity is refused and told what differs. Journal lines and the record carry a hash of themselves, so that damage shows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypedDict, cast

from torch import Tensor

from .checkpoint import INDEX, Checkpoint, Entry, hash_file, read_header, reading, write_file, write_shard, write_text
from .errors import LLMPruneError
from .packing import config_as_stored

RECORD = "llmprune.json"
RECIPE = "recipe.yaml"
STATE = ".llmprune"
JOURNAL = f"{STATE}/journal.jsonl"
LOCK = f"{STATE}/lock"
CLEARING = f"{STATE}/clearing"
PROGRESS = f"{STATE}/progress.json"
SHARD_BYTES = 5 * 10**9
OUTER_BYTES = 5 * 10**8
REPORT = "report.html"
# What other commands write about a model; the model card is written again with every run.
ABOUT = (REPORT, "report/*.png", ".eval_results/llmprune-*.yaml")
# What some methods write beside the weights: a later model of another method must not be taken to have it.
BESIDE = ("llmprune_plan.json", "modeling_llmprune.py", "activation_sparsity.*")
# What makes a checkpoint usable besides its weights. Code is copied only with a model that needs it.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*processor_config.json",
)

Facts = Mapping[str, object]


class Journal:
    """An append-only list of finished steps. A step names its files and carries facts of its own.

    Args:
        file: the journal's path.
        identity: what must be the same for a run to continue, by name.
        settled: the recipe with every open value filled in; a run that continues takes its open values from here.

    Raises:
        LLMPruneError: the journal belongs to a run with another identity, or is damaged before its last line.
    """

    def __init__(self, file: Path, identity: Mapping[str, str], settled: Facts | None = None) -> None:
        self.file = file
        self.steps: dict[str, dict[str, object]] = {}
        if file.exists():
            header, *steps = self._read_lines()
            check_identity(header, identity, file.parent.parent)
            self.steps = {str(step["step"]): step for step in steps}
        else:
            write_file(file, sealed({"identity": dict(identity), "recipe": dict(settled or {})}))

    def _read_lines(self) -> list[dict[str, object]]:
        with reading(self.file):
            lines = self.file.read_bytes().splitlines(keepends=True) or [b""]
        parsed: list[dict[str, object]] = []
        for number, line in enumerate(lines, 1):
            try:
                parsed.append(unsealed(line))
            except ValueError as error:
                if number < len(lines) or number == 1:
                    raise LLMPruneError(
                        f"{self.file} is damaged in line {number} or was written by another version of llmprune: pass "
                        "--overwrite to start afresh or give another --output."
                    ) from error
                # A crash cut the last line short: that step is not finished.
                write_file(self.file, b"".join(lines[:-1]))
        return parsed

    def record(self, step: str, files: Mapping[str, str], facts: Facts) -> None:
        """Say that a step and the files it wrote (name to SHA-256) are finished and on the disk."""
        entry: dict[str, object] = {"step": step, "files": dict(files), "facts": dict(facts)}
        with open(self.file, "ab") as stream:
            stream.write(sealed(entry))
            stream.flush()
            os.fsync(stream.fileno())
        self.steps[step] = entry

    def files(self) -> dict[str, str]:
        """SHA-256 of every file of every finished step."""
        merged: dict[str, str] = {}
        for step in self.steps.values():
            merged.update(step["files"])  # type: ignore[call-overload]
        return merged

    def facts(self, step: str) -> dict[str, object]:
        return dict(self.steps[step]["facts"])  # type: ignore[call-overload]


def sealed(content: Facts, *, indent: int | None = None) -> bytes:
    """A JSON object and a newline, with the SHA-256 of the content as its last entry."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=indent) + "\n").encode()


def unsealed(text: bytes, *, indent: int | None = None) -> dict[str, object]:
    """The content of what `sealed` wrote. Raises `ValueError` if a byte of it has changed."""
    content = json.loads(text)
    if isinstance(content, dict) and content.pop("sha256", None) and sealed(content, indent=indent) == text:
        return content
    raise ValueError("it is not what was written")


def check_identity(found: Mapping[str, object], wanted: Mapping[str, str], directory: Path) -> None:
    """Raise `LLMPruneError` naming what differs between a directory's run and this one."""
    have = found.get("identity")
    if not isinstance(have, dict):
        raise LLMPruneError(
            f"{directory} was written by another version of llmprune: pass --overwrite to start afresh or give "
            "another --output."
        )
    changed = [key for key in wanted if have.get(key) != wanted[key]]
    if changed:
        shown = ", ".join(f"{key} was {have.get(key)}, is {wanted[key]}" for key in changed[:4])
        raise LLMPruneError(
            f"{directory} holds a run of another kind ({shown}): pass --overwrite to start afresh or give another --output."
        )


class Output:
    """A pruned checkpoint being written.

    Args:
        directory: where to.
        checkpoint: the source checkpoint.
        blocks: names of each block's tensors.
        outer: names of the tensors outside the blocks; they are copied as they are.
        identity, settled: see `Journal`.
        overwrite: start afresh whatever is there.
        follow: only read, as the ranks do that are not the main one: no lock, no journal, nothing written.

    Raises:
        LLMPruneError: the directory holds something else, is the input, is not writable, or another process holds it.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        blocks: Sequence[Sequence[str]],
        outer: Sequence[str],
        identity: Mapping[str, str],
        *,
        settled: Facts | None = None,
        overwrite: bool = False,
        follow: bool = False,
    ) -> None:
        self.directory, self.checkpoint, self.identity = directory, checkpoint, dict(identity)
        self.settled = settled
        self._lock: TextIO | None = None
        # What lies outside the blocks is copied a shard at a time, so these shards decide how much memory that takes.
        groups = [_split(outer, checkpoint.entries, OUTER_BYTES)]
        groups += [_split(names, checkpoint.entries, SHARD_BYTES) for names in blocks]
        total = sum(len(group) for group in groups)
        self._shards: list[list[tuple[str, list[str]]]] = []
        number = 0
        for group in groups:
            self._shards.append([])
            for names in group:
                number += 1
                self._shards[-1].append((f"model-{number:05}-of-{total:05}.safetensors", names))
        self.complete = False
        # Blocks, from the first, that an earlier run had finished.
        self.finished_blocks = 0
        self._created = not directory.exists()
        if not follow:
            try:
                self._prepare(overwrite)
            except BaseException:
                self.release()
                raise

    def _prepare(self, overwrite: bool) -> None:
        directory = self.directory
        check_directory(directory, self.checkpoint.directory, overwrite=overwrite)
        with self.writing("the run's state"):
            self._lock = _lock(directory)
            if overwrite or (directory / CLEARING).exists():
                self._clear()
        if (directory / RECORD).exists():
            check_identity(self.read_record(), self.identity, directory)
            self.complete = True
            return
        with self.writing("the journal"):
            self.journal = Journal(directory / JOURNAL, self.identity, self.settled)
        self._check_finished_files()
        while f"block {self.finished_blocks}" in self.journal.steps:
            self.finished_blocks += 1

    def _clear(self) -> None:
        """Remove an earlier model: its weights and index, and whatever else an earlier run put here. Other files stay.

        What a crash interrupts here, the next run takes up.
        """
        record, marker = self.directory / RECORD, self.directory / CLEARING
        if record.exists():
            os.replace(record, marker)
        else:
            marker.touch()
        ours = (RECIPE, *COPIED, *BESIDE, *ABOUT) if marker.stat().st_size else ()
        for pattern in (
            JOURNAL,
            f"{STATE}/progress*",
            f"{STATE}/supernet*",
            INDEX,
            "model*.safetensors",
            "pytorch_model*.bin*",
            ".*.tmp",
            *ours,
        ):
            for file in self.directory.glob(pattern):
                file.unlink()
                if file.parent not in (self.directory, self.directory / STATE):
                    with suppress(OSError):  # unless something else is in it
                        file.parent.rmdir()
        marker.unlink()

    def _check_finished_files(self) -> None:
        for file, digest in self.journal.files().items():
            path = self.directory / file
            if not path.is_file():
                raise LLMPruneError(
                    f"{path}, which the interrupted run had finished, is missing: put it back, or pass --overwrite to "
                    "start afresh."
                )
            if hash_file(path) != digest:
                raise LLMPruneError(
                    f"{path} is not what the interrupted run had written (truncated or changed): pass --overwrite to start "
                    "afresh."
                )

    def check_space(self) -> None:
        """Raise `LLMPruneError` if what remains to be written does not fit on the disk."""
        check_space(self.directory, sum(self.checkpoint.entries[name].nbytes for name in self.unwritten()))

    def write_outer(self) -> None:
        """Copy everything outside the blocks, one shard's worth in memory at a time."""
        if "outer" in self.journal.steps:
            return

        def write(path: Path, names: Sequence[str]) -> str:
            return write_shard(path, {name: self.checkpoint.read(name) for name in names})

        self._write("outer", self._shards[0], write, {})

    def write_block(self, index: int, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Write a finished block's shards, then say so in the journal."""
        left, shards = dict(tensors), self._shards[index + 1]

        def write(path: Path, names: Sequence[str]) -> str:
            # A block may have lost tensors; what it has gained goes into its last shard.
            taken = list(left) if path.name == shards[-1][0] else [name for name in names if name in left]
            return write_shard(path, {name: left.pop(name).contiguous() for name in taken})

        self._write(f"block {index}", shards, write, facts)

    def write_group(self, index: int, write: Callable[[Path, Sequence[str]], str]) -> None:
        """As `write_block`, but a function writes each shard: it gets the file and the names of what it holds, and returns its
        SHA-256."""
        self._write(f"block {index}", self._shards[index + 1], write, {})

    def _write(
        self, step: str, shards: Sequence[tuple[str, list[str]]], write: Callable[[Path, Sequence[str]], str], facts: Facts
    ) -> None:
        """Write a step's shards, then say so in the journal."""
        files = {}
        for file, names in shards:
            with self.writing(file):
                files[file] = write(self.directory / file, names)
        with self.writing("the journal"):
            self.journal.record(step, files, facts)

    def unwritten(self) -> list[str]:
        """The names of what no finished step has written."""
        done = set(self.journal.files())
        return [name for group in self._shards for file, names in group if file not in done for name in names]

    def write_progress(self, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Keep what a method has so far, in place of what it had before. A crash leaves one of the two."""
        earlier = _progress(self.directory)
        file = f"{STATE}/progress-{1 if earlier and earlier['file'].endswith('-0.safetensors') else 0}.safetensors"
        with self.writing("the search's progress"):
            digest = write_shard(self.directory / file, {name: tensor.contiguous() for name, tensor in tensors.items()})
            write_file(self.directory / PROGRESS, sealed({"file": file, "digest": digest, "facts": dict(facts)}))
            if earlier:
                (self.directory / earlier["file"]).unlink(missing_ok=True)

    def read_progress(self) -> tuple[dict[str, Tensor], dict[str, object]] | None:
        """What `write_progress` kept last, if anything.

        Raises:
            LLMPruneError: it is damaged.
        """
        found = _progress(self.directory)
        if found is None:
            return None
        path = self.directory / found["file"]
        if not path.is_file() or hash_file(path) != found["digest"]:
            raise LLMPruneError(
                f"{path} is not what the interrupted run had written (missing or changed): pass --overwrite to start afresh."
            )
        shard = Checkpoint(self.directory, read_header(path))
        return {name: shard.read(name) for name in shard.entries}, found["facts"]

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """A disk that is full or fails is the user's to mend, and costs no finished block."""
        try:
            yield
        except OSError as error:
            raise LLMPruneError(
                f"Could not write {what} in {self.directory} ({error}): finished blocks are kept; make room or mend the "
                "disk, then give the same command again (without --overwrite)."
            ) from error

    def read_block(self, index: int) -> dict[str, Tensor]:
        """A finished block's tensors by checkpoint name."""
        tensors: dict[str, Tensor] = {}
        for file, _ in self._shards[index + 1]:
            path = self.directory / file
            shard = Checkpoint(self.directory, read_header(path))
            tensors.update({name: shard.read(name) for name in shard.entries})
        return tensors

    def read_record(self) -> dict[str, object]:
        """The content of llmprune.json."""
        return read_record(self.directory)

    def write_record(self, record: Facts) -> None:
        with self.writing(RECORD):
            write_record(self.directory, record)

    def block_facts(self, count: int | None = None) -> list[dict[str, object]]:
        """What was said of every block, or the first few, when it was written; by the file, so that any rank may ask."""
        blocks = range(len(self._shards) - 1 if count is None else count)
        with reading(self.directory / JOURNAL):
            lines = (self.directory / JOURNAL).read_bytes().splitlines(keepends=True)[1:]
        steps = {str(step["step"]): step["facts"] for step in map(unsealed, lines)}
        return [cast("dict[str, object]", steps[f"block {index}"]) for index in blocks]

    def finish(self, recipe: str | None, record: Facts, changed: Mapping[str, bytes] | None = None) -> None:
        """Make the directory a model: configuration, tokenizer, index, recipe, and last the record.

        Args:
            recipe: as YAML; None where nothing was pruned.
            record: what the record says besides hashes.
            changed: files that are not, or not as they are, copied from the source, by name.
        """
        source = self.checkpoint.directory
        changed = changed or {}
        patterns = (*COPIED, "*.py") if _needs_code(source) else COPIED
        entries = self.written_entries()
        weight_map = {name: entry.file.name for name, entry in entries.items()}
        total = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        copied = {}
        with self.writing("the model's configuration"):
            for pattern in patterns:
                for file in sorted(source.glob(pattern)):
                    if file.is_file() and file.name not in changed:
                        with reading(file):
                            content = file.read_bytes()
                        if file.name == "config.json":
                            content = config_as_stored(content, None)
                        copied[file.name] = write_file(self.directory / file.name, content)
            for name, content in changed.items():
                copied[name] = write_file(self.directory / name, content)
            full = {
                "identity": self.identity,
                **({} if recipe is None else {"recipe_sha256": write_text(self.directory / RECIPE, recipe)}),
                # With its index the directory is a model, so everything else has been written.
                "index_sha256": write_text(self.directory / INDEX, json.dumps(index, indent=2) + "\n"),
                "copied": copied,
                "shards": self._shard_digests(),
                **record,
            }
        self.write_record(full)
        self.complete = True

    def written_entries(self) -> dict[str, Entry]:
        """Every tensor that has been written."""
        entries: dict[str, Entry] = {}
        for group in self._shards:
            for file, _ in group:
                entries |= read_header(self.directory / file)
        return entries

    def _shard_digests(self) -> dict[str, str]:
        names = {file for group in self._shards for file, _ in group}
        return {file: digest for file, digest in self.journal.files().items() if file in names}

    def release(self) -> None:
        """Free the directory. One where a run is finished, or has finished no step, loses its journal."""
        if self._lock is None:
            return
        journal = getattr(self, "journal", None)
        started = any(self.directory.glob("model-*.safetensors")) or (self.directory / PROGRESS).exists()
        if (self.directory / RECORD).exists() or (journal and not journal.steps and not started):
            # What cannot be removed hinders no later run.
            with suppress(OSError):
                self._remove_state()
        self._lock.close()
        self._lock = None

    def _remove_state(self) -> None:
        _remove_state(self.directory)
        if self._created:
            self.directory.rmdir()  # unless something is in it


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other runs out of a finished directory.

    Raises:
        LLMPruneError: a run is in it.
    """
    lock = _lock(directory)
    try:
        yield
    finally:
        with suppress(OSError):
            _remove_state(directory)
        lock.close()


def _lock(directory: Path) -> TextIO:
    """Lock a directory. Raises `LLMPruneError` if another run holds it."""
    while True:
        # The run before may be removing its state, and this very lock file, at the same moment.
        with suppress(FileNotFoundError):
            return _try_lock(directory)


def _try_lock(directory: Path) -> TextIO:
    """Raises `FileNotFoundError` if the lock file has gone before it was ours."""
    file = directory / LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = open(file, "a+")  # noqa: SIM115 - held for the whole run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock on a file that another run has removed keeps nobody out.
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
            raise FileNotFoundError(file)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise LLMPruneError(
            f"{directory} is in use by another llmprune run (process {holder}): wait for it, or give another --output."
        ) from error
    except BaseException:
        lock.close()
        raise
    return lock


def _remove_state(directory: Path) -> None:
    lock = directory / LOCK
    # The lock goes last: from then on another run may begin here.
    for file in sorted(lock.parent.iterdir(), key=lock.__eq__):
        file.unlink()
    lock.parent.rmdir()


class _Progress(TypedDict):
    file: str
    digest: str
    facts: dict[str, object]


def _progress(directory: Path) -> _Progress | None:
    file = directory / PROGRESS
    if not file.is_file():
        return None
    with reading(file):
        content = file.read_bytes()
    try:
        return cast(_Progress, unsealed(content))
    except ValueError as error:
        raise LLMPruneError(f"{file} is damaged: pass --overwrite to start afresh or give another --output.") from error


def read_record(directory: Path) -> dict[str, object]:
    """The content of a directory's llmprune.json. Raises `LLMPruneError` if it cannot be read or is damaged."""
    file = directory / RECORD
    with reading(file):
        content = file.read_bytes()
    try:
        return unsealed(content, indent=2)
    except ValueError as error:
        raise LLMPruneError(
            f"{file} is damaged or was written by another version of llmprune: prune again with --overwrite."
        ) from error


def write_record(directory: Path, record: Facts) -> None:
    """Write a directory's llmprune.json as `read_record` reads it."""
    write_file(directory / RECORD, sealed(record, indent=2))


def check_space(directory: Path, needed: int) -> None:
    """Raise `LLMPruneError` if `needed` bytes and a little more do not fit on the disk that `directory` is or will be on."""
    needed += 64 << 20
    free = free_bytes(directory)
    if free < needed:
        raise LLMPruneError(
            f"{directory} has {free / 1e9:.2f} GB free and the pruned model needs {needed / 1e9:.2f} GB: make room, or give an "
            "--output on another disk."
        )


def free_bytes(directory: Path) -> int:
    """Bytes free on the disk that a directory is or will be on."""
    return shutil.disk_usage(existing_parent(directory)).free


def existing_parent(directory: Path) -> Path:
    """The directory itself or the nearest of its parents that is there, as far as this user may see."""
    return next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))


def settled_recipe(directory: Path) -> dict[str, object]:
    """The recipe, without open values, of the run that a directory holds; empty where there is none."""
    try:
        if (directory / RECORD).is_file():
            found = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        else:
            with open(directory / JOURNAL, encoding="utf-8") as stream:
                found = json.loads(stream.readline())
        return dict(found["recipe"])
    # Whatever is wrong with these files is reported when they are opened for good.
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_directory(directory: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that is the input, is not writable, or holds something that is not ours.

    Nothing is created or changed. Raises `LLMPruneError`.
    """
    if directory.resolve() == source.resolve():
        raise LLMPruneError(
            f"--output {directory} is the input model itself: give another directory, llmprune never overwrites a source."
        )
    parent = existing_parent(directory)
    if parent == directory and not directory.is_dir():
        raise LLMPruneError(f"--output {directory} is a file: give a directory.")
    if not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        raise LLMPruneError(f"Cannot write to {parent}: give an --output where you may read and write.")
    ours = any((directory / name).exists() for name in (RECORD, JOURNAL, CLEARING))
    if parent == directory and {file.name for file in directory.iterdir()} - {STATE} and not ours and not overwrite:
        raise LLMPruneError(
            f"{directory} exists and holds other files: give another --output, or pass --overwrite to replace the model in it."
        )


def _split(names: Sequence[str], entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Cut a list of tensors into shards of at most `limit` bytes (one larger tensor is a shard of its own)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = entries[name].nbytes
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards if shards[0] else []


def _needs_code(directory: Path) -> bool:
    with reading(directory / "config.json"):
        return bool(json.loads((directory / "config.json").read_text()).get("auto_map"))
