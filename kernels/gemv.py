"""One token through a linear that leaves some of its inputs out (WINA, arXiv 2505.19427; TEAL, arXiv 2408.14690).

    y_o = b_o + sum over kept i of W_oi x_i,        i is kept unless |x_i| <= tau_i

With tau_i = t / c_i this is WINA's rule for the norms c of W's columns, with one tau TEAL's. NaN is kept. A weight of an input
that is left out is never used; to leave its memory unread, all weights of one input have to lie side by side, so the weight
is given as [I, O].

    y_O = gemv(x_I, weight_IO, tau_I)

Backends, each equal to `reference` up to rounding and each with the same bits whenever it runs:

- `cpp`: gemv.cpp on the CPU; float16 where the processor converts it.
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

# What every backend computes, by the name of the C++ function.
DTYPES = {torch.float32: "gemv_float32", torch.bfloat16: "gemv_bfloat16", torch.float16: "gemv_float16"}


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
        backend = _fastest(x_I.device.type, x_I.dtype)
    _check(x_I, weight_IO, tau_I, bias_O)
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
    names = ("cpp", "bag", "triton") if device.type == "cpu" else ("triton", "cpp", "bag")
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return dict.fromkeys(names, f"unavailable: it computes float32, bfloat16 and float16, not {name}")
    elsewhere = f"unavailable: the tensors are on {device.type}"
    found = dict.fromkeys(names, elsewhere)
    triton = compute_backends()["triton"]
    if device.type == "cuda" or "interpreter" in triton:
        found["triton"] = triton
    if device.type == "cpu":
        function = _function(dtype)
        usable = "available: C++, compiled for this processor"
        found["cpp"] = f"unavailable: {function}" if isinstance(function, str) else usable
        found["bag"] = "available: torch's embedding_bag"
    return found


def bytes_read(shape_IO: tuple[int, int], dtype: torch.dtype, kept: float) -> int:
    """Bytes of weight, inputs and thresholds that a token reads when this share of the inputs is kept."""
    inputs, outputs = shape_IO
    return round(kept * inputs) * outputs * dtype.itemsize + inputs * (dtype.itemsize + 4)


def _check(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor | None, bias_O: Tensor | None) -> None:
    """Raise `ValueError` for what a kernel, which gets addresses and two sizes, would read wrongly or beyond the end."""
    inputs, outputs = weight_IO.shape if weight_IO.ndim == 2 else (-1, -1)
    if x_I.shape != (inputs,) or (tau_I is not None and tau_I.shape != (inputs,)):
        raise ValueError(f"x {list(x_I.shape)} and tau are to be [I] for a weight [I, O], which is {list(weight_IO.shape)}.")
    if bias_O is not None and bias_O.shape != (outputs,):
        raise ValueError(f"The bias is {list(bias_O.shape)}, and is to be [{outputs}].")
    device, dtype = x_I.device, x_I.dtype
    for each in (x_I, weight_IO, tau_I, bias_O):
        if each is None:
            continue
        if not each.is_contiguous():
            raise ValueError("The weight is to be contiguous as [inputs, outputs], and so are x, tau and the bias.")
        if each.device != device:
            raise ValueError(f"x is on {device}, and the weight, tau and the bias are to be on the same device.")
        if each.dtype != (torch.float32 if each is tau_I else dtype):
            raise ValueError(f"x is {dtype}: the weight and the bias are to be of one dtype with it, and tau is to be float32.")


@functools.cache
def _fastest(device: str, dtype: torch.dtype) -> str:
    """The first of the backends that are available."""
    for name, state in backends(torch.device(device), dtype).items():
        if state.startswith("available"):
            return name
    raise ValueError(f"No backend computes {dtype} on {device}.")


def _cpp(x_I: Tensor, weight_IO: Tensor, tau_I: Tensor | None, bias_O: Tensor | None) -> Tensor:
    function = _function(x_I.dtype) if x_I.is_cpu else f"the tensors are on {x_I.device.type}"
    if isinstance(function, str):
        raise ValueError(f"Backend 'cpp' cannot run: {function}.")
    inputs, outputs = weight_IO.shape
    y_O = torch.empty(outputs, dtype=x_I.dtype)
    function(
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
def _function(dtype: torch.dtype) -> Callable[..., None] | str:
    """The C++ function for a dtype, or why there is none."""
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    library = native.library("gemv")
    if isinstance(library, str):
        return library
    function = getattr(library, DTYPES[dtype], None)
    if function is None:
        return "this processor does not convert float16"
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
