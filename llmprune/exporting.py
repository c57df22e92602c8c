"""A model's directory, stored in another way: matrices with zeros packed, or turned back (see packing.py for the formats).

    llmprune export llama-sparse --format packed24
    llmprune export llama-sparse-packed24 --format dense

Every tensor is read twice, first for how many bytes it comes to, then to be written, one at a time: what is in memory is one
tensor, and of the shard in work the places of values that are written already (a ninth of it). Files of weights keep their
division, so that turning back what llmprune wrote gives every shard byte by byte. What lies beside the weights goes along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from torch import Tensor

from . import card, packing
from .checkpoint import Checkpoint, hash_file, reading, stream_shard
from .errors import LLMPruneError
from .loading import check_model
from .models import quantisation, resolve
from .output import RECIPE, RECORD, Output, check_directory, check_space
from .packing import Fit, Format, Part
from .progress import bar
from .tables import size
from .verify import read_record

Say = Callable[[str], None]
# What of the source's record is not so for the export; the last is said afresh.
OUTDATED = ("identity", "recipe_sha256", "index_sha256", "copied", "shards", "storage")


@dataclass(frozen=True)
class Exported:
    """A finished export: where it is, and its record."""

    directory: Path
    record: dict[str, object]


def export(
    model: str | Path,
    format: Format | Literal["dense"],
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Exported:
    """Store a model in another way, without loss, in another directory.

    Args:
        model: what llmprune wrote, or any Hugging Face directory or Hub id with zeros in safetensors.
        format: packed24 packs matrices that are 2:4, bitmask those with zeros enough; dense turns either back.
        output: where to; by default `DIR-FORMAT`, beside the directory.
        overwrite: replace the model there.
        progress: show a bar and say what happens.

    Raises:
        LLMPruneError: bad input, nothing to pack, too little room; nothing half-written looks whole.
    """
    place = Path(output) if output else None
    return run(model, format, place, overwrite=overwrite, say=print if progress else lambda line: None, quiet=not progress)


def run(model: str | Path, format: str, place: Path | None, *, overwrite: bool, say: Say, quiet: bool) -> Exported:
    """`export`, which has the arguments. `say` gets a line at a time for people; `quiet` hides the progress bar."""
    if format not in (formats := (*get_args(Format), "dense")):
        raise LLMPruneError(f"Unknown --format {format!r}: use {', '.join(formats[:-1])} or {formats[-1]}.")
    wanted = None if format == "dense" else cast(Format, format)
    source = resolve(str(model), say=say)
    checkpoint = check_model(source.directory, trust_remote_code=True)  # which is copied and not run
    _check_source(checkpoint, wanted)
    if place is None:
        # What is in the Hub's cache, or made from a GGUF file, has no place that is the user's own.
        beside = source.directory.resolve().parent if Path(model).expanduser().is_dir() else Path()
        place = beside / f"{source.name}-{format}"
    check_directory(place, source.directory, overwrite=overwrite)
    record = read_record(source.directory) if (source.directory / RECORD).is_file() else {}
    fingerprint = checkpoint.fingerprint()[:16]
    identity = {
        **record.get("identity", {"model weights": fingerprint}),
        "exported weights": fingerprint,
        "exported config": hash_file(source.directory / "config.json")[:16],
        "exported as": format,
    }
    groups = [[name for name, entry in checkpoint.entries.items() if entry.file == file] for file in checkpoint.files]
    output = Output(place, checkpoint, groups, [], identity, overwrite=overwrite)
    try:
        if output.complete:
            say(f"{place} already holds this export's finished result: nothing to do.")
        else:
            with bar(format, len(checkpoint.entries) + len(output.unwritten()), quiet=quiet) as advance:
                packer = _Packer(checkpoint, wanted, _fits(checkpoint, wanted, advance), advance)
                check_space(place, sum(packer.stored_bytes(name) for name in output.unwritten()))
                for index in range(output.finished_blocks, len(groups)):
                    output.write_group(index, packer.write)
            say(packer.said())
            recipe = (source.directory / RECIPE).read_text(encoding="utf-8") if "recipe" in record else None
            kept = {key: value for key, value in record.items() if key not in OUTDATED}
            kept |= {"storage": packer.storage()} if wanted else {}
            output.finish(recipe, kept, _beside(source.directory, record, wanted))
        if "recipe" in record:
            card.write(place)
        return Exported(place, output.read_record())
    finally:
        output.release()


def _check_source(checkpoint: Checkpoint, wanted: Format | None) -> None:
    """Raise `LLMPruneError` if there is nothing to do."""
    directory = checkpoint.directory
    method = quantisation(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    if method not in (None, packing.METHOD):
        raise LLMPruneError(f"{directory} is quantised ({method}): give the unquantised model.")
    if checkpoint.format == wanted:
        now = f"packed as {wanted}" if wanted else "dense"
        raise LLMPruneError(f"{directory} is {now} already: give another --format, or use it as it is.")


def _beside(directory: Path, record: Mapping[str, dict[str, str]], wanted: Format | None) -> dict[str, bytes]:
    """What goes along with the weights, by name: config.json, and whatever else made the directory a model of llmprune."""
    contents = {}
    for name in dict.fromkeys(("config.json", *record.get("copied", {}))):
        with reading(directory / name):
            contents[name] = (directory / name).read_bytes()
    contents["config.json"] = packing.config_as_stored(contents["config.json"], wanted)
    return contents


def _fits(checkpoint: Checkpoint, wanted: Format | None, advance: Callable[[str], None]) -> dict[str, Fit]:
    """What every matrix comes to, by name. Raises `LLMPruneError` if none is to be packed."""
    fits = {}
    for name, entry in checkpoint.entries.items():
        if wanted and len(entry.shape) == 2 and entry.dtype.is_floating_point:
            fits[name] = packing.fit(checkpoint.read(name), wanted)
        advance(name)
    if wanted is None or any(fit.parts for fit in fits.values()):
        return fits
    if not fits:
        raise LLMPruneError(f"{checkpoint.directory} holds no matrix of floating point numbers: there is nothing to pack.")
    # An embedding is far from 2:4 and comes first in most files; what is nearest was meant to be.
    name, fit = min(fits.items(), key=lambda item: item[1].excess)
    if wanted == "packed24" and fit.excess == math.inf:
        raise LLMPruneError(
            f"No matrix in {checkpoint.directory} is 2:4 sparse with a multiple of 16 inputs: {name}, for one, {fit.reason}; "
            "use --format bitmask, which takes any zeros."
        )
    if wanted == "packed24":
        raise LLMPruneError(
            f"No matrix in {checkpoint.directory} is 2:4 sparse: {name}, the nearest to it, {fit.reason}; prune with --pattern "
            "2:4, or use --format bitmask, which takes any zeros."
        )
    raise LLMPruneError(
        f"No matrix in {checkpoint.directory} gets smaller as a bitmask: {name}, for one, {fit.reason}; prune it first, or use "
        "it as it is."
    )


@dataclass(frozen=True)
class _Packer:
    """Writes shards of a checkpoint in a format, or dense. `fits` says what every matrix comes to, by name."""

    checkpoint: Checkpoint
    format: Format | None
    fits: Mapping[str, Fit]
    advance: Callable[[str], None]

    @property
    def dense(self) -> dict[str, Fit]:
        """Matrices that stay as they are."""
        return {name: fit for name, fit in self.fits.items() if fit.parts is None}

    def layout(self, name: str) -> dict[str, Part]:
        """What is stored of a tensor."""
        entry, fit = self.checkpoint.entries[name], self.fits.get(name)
        if fit is None or fit.parts is None or self.format is None:
            return {name: Part(entry.dtype, entry.shape)}
        return dict(zip((name, name + packing.PLACES[self.format]), fit.parts, strict=True))

    def stored_bytes(self, name: str) -> int:
        return sum(part.nbytes for part in self.layout(name).values())

    def write(self, file: Path, names: Sequence[str]) -> str:
        """Write a shard. Returns its SHA-256."""
        layouts = {name: self.layout(name) for name in names}
        owners = {part: name for name, layout in layouts.items() for part in layout}
        waiting: dict[str, Tensor] = {}

        def read(part: str) -> Tensor:
            if part not in waiting:
                name = owners[part]
                waiting.update(self._parts(name, layouts[name]))
                self.advance(name)
            return waiting.pop(part)

        layout = {part: what for layout in layouts.values() for part, what in layout.items()}
        shapes = {name: list(self.checkpoint.entries[name].shape) for name in names if len(layouts[name]) > 1}
        metadata = packing.described(self.format, shapes) if self.format else {}
        return stream_shard(file, layout, read, metadata)

    def _parts(self, name: str, layout: Mapping[str, Part]) -> dict[str, Tensor]:
        """A tensor as it is stored. Raises `LLMPruneError` if it is not what it was when it was looked at."""
        tensor = self.checkpoint.read(name)
        parts = (tensor,) if len(layout) == 1 or self.format is None else packing.pack(tensor, self.format)
        if [Part(part.dtype, tuple(part.shape)) for part in parts] != list(layout.values()):
            raise LLMPruneError(
                f"{self.checkpoint.directory} changed while it was exported ({name}): wait until nothing writes there, then "
                "give the same command again."
            )
        return dict(zip(layout, parts, strict=True))

    @property
    def total_bytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(self.stored_bytes(name) for name in self.checkpoint.entries)

    def said(self) -> str:
        """What came of it, for people."""
        before, after = self.checkpoint.stored_bytes, self.total_bytes
        left = "".join(f"\n  {name} stays dense: it {fit.reason}" for name, fit in self.dense.items())
        count = f"{len(self.fits) - len(self.dense)} matrices packed: " if self.format else ""
        return f"{count}{size(before)} became {size(after)} ({after / before:.3f}){left}"

    def storage(self) -> dict[str, object]:
        """What the record says of it."""
        return {
            "format": self.format,
            "bytes": self.total_bytes,
            "dense_bytes": self.checkpoint.nbytes,
            "packed": len(self.fits) - len(self.dense),
            "dense": list(self.dense),
        }
