"""A checkpoint on disk: tensors are read lazily by name, shards are written whole or not at all.

Reading goes through plain `read` calls and not through a memory map, so that an I/O error or a file cut short
while we run is an exception with a name in it and not a SIGBUS, and so that a prefetched block really is in memory.

Matrices that are stored packed (see packing.py) look like any other tensor: they are unpacked when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from . import packing
from .errors import LLMPruneError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in formats that execute code when read, and what each is called.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# In the order in which the library lays tensors out.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Packed:
    """The two tensors that are stored in the place of a matrix."""

    format: packing.Format
    values: Entry
    places: Entry


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. Of a packed one all but `offset`, which is that of its values, is as it is read."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    packed: Packed | None = None

    @property
    def numel(self) -> int:
        return self.nbytes // self.dtype.itemsize

    @property
    def stored(self) -> tuple[Entry, ...]:
        """What lies on the disk: the tensor itself, or what it is packed in."""
        return (self.packed.values, self.packed.places) if self.packed else (self,)


class Checkpoint:
    """The tensors of a safetensors checkpoint, by name, as they are read. Opening one reads headers only."""

    def __init__(self, directory: Path, entries: dict[str, Entry]) -> None:
        self.directory = directory
        self.entries = entries

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Index every tensor below a Hugging Face model directory.

        Raises:
            LLMPruneError: no safetensors there (pickle-only checkpoints are refused), a shard named by the index is
                missing, or a file is truncated or corrupt.
        """
        entries: dict[str, Entry] = {}
        for file in _weight_files(directory):
            entries.update(_weights(file))
        return cls(directory, entries)

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def nbytes(self) -> int:
        """Of all tensors as they are read."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stored_bytes(self) -> int:
        """Of all tensors on the disk."""
        return sum(part.nbytes for entry in self.entries.values() for part in entry.stored)

    @property
    def format(self) -> packing.Format | None:
        """How matrices are packed, if any are."""
        return next((entry.packed.format for entry in self.entries.values() if entry.packed), None)

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, in memory of its own.

        Raises:
            LLMPruneError: the file became shorter than its header says, or holds a packed matrix that is damaged.
        """
        entry = self.entries[name]
        if entry.packed is None:
            return self._read(name, entry)
        values, places = (self._read(name, part) for part in entry.stored)
        try:
            return packing.unpack(values, places, entry.packed.format, entry.shape)
        except ValueError as error:
            raise LLMPruneError(f"{entry.file} is corrupt ({name!r}: {error}): download or copy the file again.") from error

    def _read(self, name: str, entry: Entry) -> Tensor:
        storage = torch.empty(entry.nbytes, dtype=torch.uint8)
        # Unbuffered: each readinto goes straight into the tensor's memory.
        with reading(entry.file), open(entry.file, "rb", buffering=0) as stream:
            _fill(memoryview(storage.numpy().data), stream, entry.offset, name)
        return storage.view(entry.dtype).view(entry.shape)

    def fingerprint(self) -> str:
        """SHA-256 of what identifies these weights: every tensor's name, type, shape and a sample of its bytes.

        Reading tens of gigabytes before starting would cost minutes; 4 KiB from the start, the middle and the end of each
        tensor tell two checkpoints apart in practice.

        Raises:
            LLMPruneError: a file became shorter than its header says.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(4096))
        for file in self.files:
            with reading(file), open(file, "rb", buffering=0) as stream:
                for name, entry in sorted(self.entries.items()):
                    if entry.file == file:
                        digest.update(f"{name}:{entry.dtype}:{entry.shape}".encode())
                        for part in entry.stored:
                            for start in (0, part.nbytes // 2, max(part.nbytes - 4096, 0)):
                                sample = buffer[: part.nbytes - start]
                                _fill(sample, stream, part.offset + start, name)
                                digest.update(sample)
        return digest.hexdigest()


def _fill(view: memoryview, stream: FileIO, offset: int, name: str) -> None:
    """Read until `view` is full; one call may read less, above all from a file that comes over a network."""
    stream.seek(offset)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise LLMPruneError(f"{stream.name} ends in the middle of tensor {name!r}: download or copy the file again.")
        done += count


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.exists():
        with reading(index):
            content = index.read_bytes()
        try:
            names = sorted(set(json.loads(content)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LLMPruneError(f"{index} is not a valid safetensors index ({error!r}): download it again.") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise LLMPruneError(
                f"{directory} lacks {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}, which its index "
                "names: download the missing shards."
            )
        return [directory / name for name in names]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if any(next(directory.glob(pattern), None) for pattern in PICKLED):
        raise LLMPruneError(
            f"{directory} holds its weights only as pickle files, which can run code when they are read: convert it "
            "where you trust it, with AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)."
        )
    raise LLMPruneError(
        f"{directory} holds no {WEIGHTS} and no {INDEX}: give a Hugging Face model directory with safetensors weights."
    )


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, as they are stored.

    Raises:
        LLMPruneError: the file is truncated, corrupt, or holds a dtype we cannot read.
    """
    return _header(file)[0]


def _weights(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, as they are read."""
    entries, metadata = _header(file)
    if packing.KEY not in metadata:
        return entries
    try:
        described = json.loads(metadata[packing.KEY])
        format = described["format"]
        if format not in packing.PLACES:
            raise LLMPruneError(
                f"{file} stores its matrices as {format!r}, which this version of llmprune cannot read: upgrade llmprune."
            )
        for name, shape in described["shapes"].items():
            values, places = entries[name], entries.pop(name + packing.PLACES[format])
            found = tuple(packing.Part(part.dtype, part.shape) for part in (values, places))
            if found != packing.parts(format, tuple(shape), values.dtype, values.numel):
                raise ValueError(f"{name!r} does not fill its shape")
            nbytes = _product(shape) * values.dtype.itemsize
            packed = Packed(format, values, places)
            entries[name] = Entry(file, values.offset, nbytes, values.dtype, tuple(shape), packed)
    except LLMPruneError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LLMPruneError(f"{file} is corrupt ({error}): download or copy the file again.") from error
    return entries


def _header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of one safetensors file, as they are stored, and its metadata."""
    try:
        with reading(file), open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
        metadata = dict(header.pop("__metadata__", None) or {})
        entries = {}
        end = 0
        for name, info in header.items():
            if info["dtype"] not in DTYPES:
                raise LLMPruneError(
                    f"{file} stores {name!r} as {info['dtype']}, which llmprune cannot read: give a checkpoint in "
                    "float32, float16 or bfloat16."
                )
            begin, stop = info["data_offsets"]
            entry = Entry(file, 8 + length + begin, stop - begin, DTYPES[info["dtype"]], tuple(info["shape"]))
            if entry.nbytes != entry.dtype.itemsize * _product(entry.shape):
                raise ValueError(f"{name!r} does not fill its shape")
            entries[name] = entry
            end = max(end, stop)
    except LLMPruneError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LLMPruneError(f"{file} is truncated or corrupt ({error}): download or copy the file again.") from error
    if 8 + length + end != size:
        raise LLMPruneError(
            f"{file} is {size} bytes long but its header describes {8 + length + end}: it is truncated or corrupt, "
            "download or copy it again."
        )
    return entries, metadata


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """A file that cannot be read is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise LLMPruneError(f"Could not read {file} ({error.strerror}): check the disk and the file's rights.") from error


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file, byte for byte as the library would, so that it is either complete and on the disk or absent.

    The library itself writes under a random name, which a killed process leaves behind for good, and gives its files to
    their owner alone; besides, the hash comes for free here.

    Args:
        file: where to.
        tensors: contiguous, on the CPU.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    layout = {name: packing.Part(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return stream_shard(file, layout, tensors.__getitem__)


def stream_shard(
    file: Path,
    layout: Mapping[str, packing.Part],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """`write_shard` of tensors that need not be in memory together.

    Args:
        file: where to.
        layout: dtype and shape of every tensor.
        read: called with each name once, in the order of the file, for a contiguous tensor on the CPU.
        metadata: what the file says besides.
    """
    # The widest types first, so that every tensor is aligned to its own type.
    names = sorted(layout, key=lambda name: (list(NAMES).index(layout[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        begin, end = end, end + layout[name].nbytes
        header[name] = {
            "dtype": NAMES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    parts = (read(name).view(-1).view(torch.uint8).numpy().data for name in names)
    return _write_parts(file, chain([struct.pack("<Q", len(text)), text], parts))


def write_file(file: Path, content: bytes) -> str:
    """Write a small file atomically and durably. Returns its SHA-256."""
    return _write_parts(file, [content])


def _write_parts(file: Path, parts: Iterable[bytes | memoryview]) -> str:
    temporary = file.with_name(f".{file.name}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as stream:
            for part in parts:
                stream.write(part)
                digest.update(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(file.parent)
    return digest.hexdigest()


def write_text(file: Path, text: str) -> str:
    """Write a small text file atomically and durably. Returns its SHA-256."""
    return write_file(file, text.encode())


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's bytes. Raises `LLMPruneError` if it cannot be read."""
    with reading(file), open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make a rename inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
