"""One token through a linear that leaves some of its inputs out (WINA, arXiv 2505.19427; TEAL, arXiv 2408.14690).

    y_o = b_o + sum over kept i of W_oi x_i,        i is kept unless |x_i| <= tau_i

With tau_i = t / c_i this is WINA's rule for the norms c of W's columns, with one tau TEAL's. NaN is kept. A weight of an input
that is left out is never used; to leave its memory unread, all weights of one input have to lie side by side, so the weight
is given as [I, O].

    y_O = gemv(x_I, weight_IO, tau_I)

Backends, each equal to `reference` up to rounding and each with the same bits whenever it runs:

- `cpp`: gemv.cpp, float32 and bfloat16 on the CPU.
- `bag`: `torch.nn.functional.embedding_bag`, whose table is the weight and whose bag is what is kept. Needs no compiler.
- `triton`: gemv_triton.py, on CUDA, or in Triton's interpreter.

Nothing of llmprune is imported, and triton only when its kernel runs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import native
from .availability import backends as compute_backends

CPP = {torch.float32: "gemv_float32", torch.bfloat16: "gemv_bfloat16"}
HALF = (torch.float32, torch.bfloat16, torch.float16)


def reference(x_BI: Tensor, weight_OI: Tensor, tau_I: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """What every backend computes, as a masked dense product.

    Args:
        x_BI: inputs, any float dtype.
        weight_OI: in the same dtype.
        tau_I: thresholds, float32; -1 keeps every input, +inf none.
        bias_O: is never left out.

    Returns:
        [B, O] in x's dtype, accumulated in float32, or in float64 for float64.
    """
    wide = torch.promote_types(x_BI.dtype, torch.float32)
    left_out_BI = x_BI.float().abs() <= tau_I
    # A weight may be infinite or NaN where its input is left out.
    used_OI = weight_OI.to(wide).masked_fill(left_out_BI.all(dim=0), 0)
    y_BO = x_BI.to(wide).masked_fill(left_out_BI, 0) @ used_OI.T
    return (y_BO if bias_O is None else y_BO + bias_O.to(wide)).to(x_BI.dtype)


def gemv(
    x_I: Tensor, weight_IO: Tensor, tau_I: Tensor | None, bias_O: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """One token's outputs.

    Args:
        x_I: the token's inputs, contiguous.
        weight_IO: channel-major and contiguous, in x's dtype.
        tau_I: thresholds, float32; None (cpp only) for a dense product of the same making, to compare with.
        bias_O: in x's dtype.
        backend: cpp, bag, triton, or auto: triton on CUDA, else cpp where it builds, else bag.

    Returns:
        [O] in x's dtype, accumulated in float32.

    Raises:
        ValueError: a shape, dtype or memory layout that no kernel takes, or a backend that cannot run here.
    """
    if backend == "auto":
        usable = [name for name, state in backends(x_I.device, x_I.dtype).items() if state.startswith("available")]
        if not usable:
            raise ValueError(f"No backend computes {x_I.dtype} on {x_I.device}.")
        backend = usable[0]
    inputs = len(weight_IO)
    if x_I.shape != (inputs,) or (tau_I is not None and tau_I.shape != (inputs,)):
        raise ValueError(f"x {list(x_I.shape)} and tau are to be [{inputs}] for a weight of shape {list(weight_IO.shape)}.")
    if not (weight_IO.is_contiguous() and x_I.is_contiguous()):
        raise ValueError("The weight is to be contiguous as [inputs, outputs], and so is x.")
    if not (x_I.dtype == weight_IO.dtype and (bias_O is None or bias_O.dtype == x_I.dtype)):
        raise ValueError(f"x is {x_I.dtype}, the weight {weight_IO.dtype}: they are to be of one dtype, and so is the bias.")
    if tau_I is not None and (tau_I.dtype != torch.float32 or not tau_I.is_contiguous()):
        raise ValueError(f"tau is {tau_I.dtype}, and is to be contiguous float32.")
    if backend == "cpp":
        return _cpp(x_I, weight_IO, tau_I, bias_O)
    if tau_I is None:
        raise ValueError(f"Backend {backend!r} needs tau.")
    if backend == "bag":
        return _bag(x_I, weight_IO, tau_I, bias_O)
    if backend == "triton":
        from .gemv_triton import gemv as run

        return run(x_I, weight_IO, tau_I, bias_O)
    raise ValueError(f"Unknown backend {backend!r}: use auto, cpp, bag or triton.")


def backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The backends for tensors of this kind, the fastest first: "available: ..." or "unavailable: ..." with the reason."""
    device = torch.device(device)
    half = f"unavailable: it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    found = {}
    triton = compute_backends()["triton"]
    if device.type != "cuda" and "interpreter" not in triton:
        triton = f"unavailable: the tensors are on {device.type}"
    found["triton"] = triton if dtype in HALF else half
    if device.type != "cpu":
        found["cpp"] = found["bag"] = f"unavailable: the tensors are on {device.type}"
        return found
    missing = "it computes float32 and bfloat16" if dtype not in CPP else native.reason("gemv")
    found["cpp"] = f"unavailable: {missing}" if missing else "available: C++, compiled for this processor"
    found["bag"] = "available: torch's embedding_bag" if dtype in HALF else half
    # The interpreter is there for tests.
    return {name: found[name] for name in ("cpp", "bag", "triton")}


def bytes_read(shape_IO: tuple[int, int], dtype: torch.dtype, kept: float) -> int:
    """Bytes of weight, inputs and thresholds that a token reads when this share of the inputs is kept."""
    inputs, outputs = shape_IO
    return round(kept * inputs) * outputs * dtype.itemsize + inputs * (dtype.itemsize + 4)


def _cpp(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor | None, bias_O: Tensor | None) -> Tensor:
    if x_I.dtype not in CPP or x_I.device.type != "cpu":
        raise ValueError(f"Backend 'cpp' computes float32 and bfloat16 on the CPU, not {x_I.dtype} on {x_I.device}.")
    inputs, outputs = weight_IO.shape
    y_O = torch.empty(outputs, dtype=x_I.dtype)
    _function(x_I.dtype)(
        x_I.data_ptr(),
        weight_IO.data_ptr(),
        None if tau_I is None else tau_I.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        y_O.data_ptr(),
        inputs,
        outputs,
        torch.get_num_threads(),
    )
    return y_O


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    library = native.library("gemv")
    if isinstance(library, str):
        raise ValueError(f"Backend 'cpp' cannot run: {library}.")
    function = getattr(library, CPP[dtype])
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2 + [ctypes.c_int]
    function.restype = None
    return cast("Callable[..., None]", function)


def _bag(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor, bias_O: Tensor | None) -> Tensor:
    """A bag runs on one thread, so the outputs are cut into as many bags as there are threads and divide them."""
    inputs, outputs = weight_IO.shape
    kept_K = (~(x_I.float().abs() <= tau_I)).nonzero().squeeze(1)
    if not len(kept_K):
        return torch.zeros(outputs, dtype=x_I.dtype) if bias_O is None else bias_O.clone()
    bags = torch.get_num_threads()
    while outputs % bags:
        bags -= 1
    # Row i of the weight is rows i * bags to i * bags + bags - 1 of the table.
    rows_CK = kept_K * bags + torch.arange(bags)[:, None]
    values_K = x_I[kept_K]
    y_CP = embedding_bag(
        rows_CK.flatten(),
        weight_IO.view(inputs * bags, outputs // bags),
        torch.arange(bags) * len(kept_K),
        mode="sum",
        per_sample_weights=values_K.repeat(bags) if bags > 1 else values_K,
    )
    return y_CP.flatten() if bias_O is None else y_CP.flatten() + bias_O
