"""Running a 2:4 pruned model on packed weights: 0.5625 of their bytes in 16-bit types, and the products that read them.

    report = enable_sparse24(model)           # in place
    model.generate(...)
    disable_sparse24(model)                   # the dense model, bit for bit

A linear is replaced where a kernel computes one token faster than torch does with the dense weight; the report says of every
linear what became of it. The weights must be 2:4: `llmprune prune --pattern 2:4`. Save the model before it is packed, or after
`disable_sparse24`: the packed one refuses, because what it would write loads with random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import LLMPruneError
from ..kernels.linear24 import Conversion, Linear24, convert_model, restore_model

if TYPE_CHECKING:
    from torch import nn

SAVE = "save_pretrained"


def enable_sparse24(
    model: nn.Module,
    *,
    skip: Sequence[str] = ("lm_head",),
    min_inputs: int = 512,
    strict: bool = True,
    keep_dense: bool = False,
) -> list[Conversion]:
    """Pack a model's linears, in place.

    Args:
        model: on any device, in float32, bfloat16 or float16.
        skip: last parts of names of modules to leave dense.
        min_inputs: leave linears with fewer inputs dense.
        strict: refuse a model of which a linear that could be packed is not 2:4; otherwise such linears stay dense.
        keep_dense: keep the dense weights as well, for numbers of tokens at which their product is faster.

    Returns:
        A row for every linear.

    Raises:
        LLMPruneError: strict, and a weight is not 2:4 (nothing has been changed then); no linear could be packed; or some are
            already.
    """
    if any(isinstance(module, Linear24) for module in model.modules()):
        raise LLMPruneError(f"This {type(model).__name__} is packed already: disable_sparse24(model) first.")
    try:
        report = convert_model(model, skip=skip, min_inputs=min_inputs, strict=strict, keep_dense=keep_dense)
    except ValueError as error:
        raise LLMPruneError(str(error)) from None
    if not any(row.converted for row in report):
        reasons = Counter(row.reason for row in report).most_common(1)
        why = f"most often because {reasons[0][0]}" if reasons else "since it has none"
        raise LLMPruneError(f"No linear of this model could be packed 2:4, {why.rstrip('.;')}: run it as it is.")
    if hasattr(model, SAVE):
        setattr(model, SAVE, _refuse_to_save)
    return report


def disable_sparse24(model: nn.Module) -> None:
    """Make a packed model dense again; any other stays as it is."""
    restore_model(model)
    model.__dict__.pop(SAVE, None)


def _refuse_to_save(*args: object, **options: object) -> None:
    raise LLMPruneError("A packed model cannot be saved as transformers saves one: disable_sparse24(model) first.")


def describe(report: Sequence[Conversion]) -> str:
    """One sentence on what was packed."""
    packed = [row for row in report if row.converted]
    before, after = sum(row.bytes_before for row in packed), sum(row.bytes_after for row in packed)
    by = ", ".join(f"{count} by {reason}" for reason, count in Counter(row.reason for row in packed).items())
    left = len(report) - len(packed)
    return (
        f"Of {len(report)} linears {len(packed)} are packed 2:4 ({by}), in {after / 1e6:.1f} MB in place of "
        f"{before / 1e6:.1f}; {left} are left dense."
    )
