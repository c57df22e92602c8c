"""What tests of structured pruning of experts share: tiny models, built and pruned once, and their calibration set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tiny import build
from torch import Tensor

from llmprune import calibration

# What `tokens` draws from.
DATA = {"calibration": "random", "samples": 6, "seqlen": 16}


def tokens(seed: int = 0) -> Tensor:
    """The calibration set of `DATA`."""
    options = {"samples": DATA["samples"], "seqlen": DATA["seqlen"], "seed": seed, "sampler": lambda *_: None}
    return calibration.calibration_set("random", None, vocab_size=263, **options).ids_NT


def built_once(
    root: Path, families: Mapping[str, Mapping[str, object]], prune: Callable[[Path, Path], object]
) -> Callable[..., Path]:
    """A function of a family's name that gives the folder of its tiny model, or with `pruned` of what `prune` leaves of it."""

    def get(family: str, pruned: bool = False) -> Path:
        folder = root / (f"{family}-pruned" if pruned else family)
        if not folder.exists():
            if pruned:
                prune(get(family), folder)
            else:
                build(family, folder, **families[family])
        return folder

    return get
