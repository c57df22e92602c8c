"""Linears whose weight is packed 2:4 (sparse24.py): one product, whichever kernel is fastest for it here.

    y = linear24(x, pack24(weight_OI), bias_O)
    report = convert_model(model)             # every nn.Linear that is 2:4 and that a kernel makes faster

Backends, each equal to `unpack` up to rounding:

- `cpp`: sparse24.cpp on the CPU, for any number of tokens, from the vector layout.
- `mma_sp`: sparse24_gluon.py on the sparse tensor cores of NVIDIA, up to 32 tokens, from the fragment layout.
- `gemv`: sparse24_triton.py, up to 4 tokens, and `expand` for more: any GPU of Triton's, from the simple layout.
- `cusparselt`: torch's semi-structured product, on a copy of its own that is made when it is first used.
- `unpack`: the dense weight made anew for every product. Needs nothing, and is slow.

A kernel that is given another layout makes a copy in its own, which lives as long as the weight.

Which one `auto` takes depends on device, dtype, layout, shape and the number of tokens, rounded up to a power of two: the
fastest of what was timed (`record`, in a file for each device), else `_default`'s. A `Linear24` may keep its dense weight too;
then that product takes part as `dense`, and where it is the fastest, prompts run on it. Gradients reach x and the bias, but no
weight.

A kernel's module offers `matmul(x_NI, packed, bias_O) -> y_NO`, as sparse24.py describes, and is imported when it first runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

from . import native
from .availability import backends as compute_backends
from .sparse24 import DTYPES, Layout, Packed24, check24, pack24, part_shapes

BACKENDS = ("cpp", "mma_sp", "gemv", "expand", "cusparselt", "unpack")
# The layouts that kernels read.
READS: dict[str, Layout] = {"cpp": "vector", "mma_sp": "fragment", "gemv": "simple", "expand": "simple"}
# What `auto` decides for together: numbers of tokens up to each of these, and all beyond the last.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_TOKENS = {"mma_sp": 32, "gemv": 4}
# Kernels with fewer tokens than these are not offered.
FEWEST_TOKENS = {"expand": 5}


def linear24(x: Tensor, packed: Packed24, bias_O: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + b.

    Args:
        x: [..., I], in the dtype and on the device of the weight.
        packed: W [O, I].
        bias_O: likewise.
        backend: one of `BACKENDS`, or auto.

    Returns:
        [..., O], accumulated in float32.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that cannot run here.
    """
    outputs, inputs = packed.shape
    if x.shape[-1] != inputs or x.dtype != packed.dtype or x.device != packed.words.device:
        raise ValueError(f"x is {_describe(x)}, and is to be [..., {inputs}], {_name(packed.dtype)} and on {packed.device}.")
    if bias_O is not None and (bias_O.shape != (outputs,) or bias_O.dtype != x.dtype or bias_O.device != x.device):
        wanted = f"[{outputs}], {_name(packed.dtype)} and on {packed.device}"
        raise ValueError(f"The bias is {_describe(bias_O)}, and is to be {wanted}.")
    if backend == "auto":
        backend = choose(packed, x.numel() // inputs)
    if torch.is_grad_enabled() and (x.requires_grad or (bias_O is not None and bias_O.requires_grad)):
        return cast(Tensor, _Product.apply(x, bias_O, packed, backend))
    return _run(x, packed, bias_O, backend)


def backends(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """The backends for tensors of this kind: "available: ..." or "unavailable: ..." with the reason."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return dict.fromkeys(BACKENDS, f"unavailable: it computes float32, bfloat16 and float16, not {_name(dtype)}")
    found = dict.fromkeys(BACKENDS, f"unavailable: the tensors are on {device.type}")
    found["unpack"] = "available: torch, slower than a dense weight"
    if device.type == "cpu":
        function = _function(dtype)
        reason = isinstance(function, str)
        found["cpp"] = f"unavailable: {function}" if reason else "available: C++, compiled for this processor"
    triton = compute_backends()["triton"]
    if device.type == "cuda" or "interpreter" in triton:
        found["gemv"] = found["expand"] = triton
    if device.type == "cuda":
        found["mma_sp"] = _state(_no_mma_sp(device, dtype, triton), "mma.sp, written in Gluon")
        found["cusparselt"] = _state(_no_cusparselt(dtype), "torch.sparse.to_sparse_semi_structured")
    return found


def choose(packed: Packed24, tokens: int, *, has_dense: bool = False) -> str:
    """What computes a product of so many tokens; "dense" only if `has_dense`, when the dense weight is there as well."""
    bucket = min(1 << max(tokens - 1, 0).bit_length(), BUCKETS[-1])
    return _choose(packed.words.device, packed.dtype, packed.layout, packed.shape, bucket, has_dense)


@functools.cache
def _choose(
    device: torch.device, dtype: torch.dtype, layout: Layout, shape: tuple[int, int], bucket: int, has_dense: bool
) -> str:
    names = usable(device, dtype, shape, bucket)
    timed = {
        name: seconds
        for name, seconds in _tuned(device).get(_key(dtype, layout, shape, bucket), {}).items()
        if name in names or (name == "dense" and has_dense)
    }
    return min(timed, key=lambda name: timed[name]) if timed else _default(layout, names, has_dense=has_dense)


def usable(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], bucket: int) -> list[str]:
    """Backends that take a product of this size here."""
    fits = {"mma_sp": shape[0] % 16 == 0 and shape[1] % 64 == 0, "cusparselt": shape[0] % 16 == 0}
    return [
        name
        for name, state in backends(device, dtype).items()
        if state.startswith("available")
        and fits.get(name, True)
        and FEWEST_TOKENS.get(name, 1) <= bucket <= MOST_TOKENS.get(name, bucket)
    ]


def _default(layout: Layout, names: Sequence[str], *, has_dense: bool) -> str:
    """Where nothing was timed: a kernel that reads the layout as it is, and no second copy; on the CPU the only one."""
    ready = [name for name in names if READS.get(name) == layout]
    if ready and not (has_dense and ready == ["expand"]):
        return ready[0]
    return "dense" if has_dense else "cpp" if "cpp" in names else "unpack"


def best_layout(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> Layout:
    """That of the kernel which computes one token."""
    return next((READS[name] for name in usable(device, dtype, shape, 1) if name in READS), "simple")


def _run(x: Tensor, packed: Packed24, bias_O: Tensor | None, backend: str) -> Tensor:
    if backend == "cpp":
        return _cpp(x.contiguous(), _in(packed, "vector"), bias_O)
    if backend == "unpack" or not x.numel():
        return linear(x, packed.to_dense(), bias_O)
    x_NI = x.reshape(-1, packed.shape[1]).contiguous()
    return _on_gpu(x_NI, packed, bias_O, backend).view(*x.shape[:-1], packed.shape[0])


def _on_gpu(x_NI: Tensor, packed: Packed24, bias_O: Tensor | None, backend: str) -> Tensor:
    _require(backend, x_NI.device, x_NI.dtype)
    if len(x_NI) > MOST_TOKENS.get(backend, len(x_NI)):
        raise ValueError(f"Backend {backend!r} takes up to {MOST_TOKENS[backend]} tokens, not {len(x_NI)}: use auto.")
    if backend == "mma_sp":
        from .sparse24_gluon import matmul as of_fragments

        return of_fragments(x_NI, _in(packed, "fragment"), bias_O)
    if backend == "cusparselt":
        return _cusparselt(x_NI, packed, bias_O)
    from .sparse24_triton import matmul

    return matmul(x_NI, _in(packed, "simple"), bias_O)


@functools.cache
def _require(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `ValueError` if a backend cannot run here."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: use auto, {', '.join(BACKENDS)}.")
    state = backends(device, dtype)[backend]
    if not state.startswith("available"):
        raise ValueError(f"Backend {backend!r} cannot run here ({state}): use auto.")


# Second copies, for kernels that do not read a weight as it is.
_copies: WeakKeyDictionary[Packed24, dict[Layout, Packed24]] = WeakKeyDictionary()


def _in(packed: Packed24, layout: Layout) -> Packed24:
    """The weight in a layout."""
    if packed.layout == layout:
        return packed
    copies = _copies.setdefault(packed, {})
    if layout not in copies:
        copies[layout] = packed.to_layout(layout)
    return copies[layout]


class _Product(torch.autograd.Function):
    """The product with a gradient, for which the weight is unpacked."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bias_O: Tensor | None, packed: Packed24, backend: str) -> Tensor:
        ctx.packed = packed  # type: ignore[attr-defined]
        return _run(x, packed, bias_O, backend)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_bias = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        grad_of_x = grad @ ctx.packed.to_dense() if of_x else None  # type: ignore[attr-defined]
        return grad_of_x, grad.reshape(-1, grad.shape[-1]).sum(dim=0) if of_bias else None, None, None


# On the CPU.


def _cpp(x: Tensor, packed: Packed24, bias_O: Tensor | None) -> Tensor:
    function = _function(x.dtype) if x.is_cpu else f"the tensors are on {x.device.type}"
    if isinstance(function, str):
        raise ValueError(f"Backend 'cpp' cannot run here (unavailable: {function}): use auto.")
    outputs, inputs = packed.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    function(
        x.data_ptr(),
        packed.words.data_ptr(),
        packed.meta.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        y.data_ptr(),
        x.numel() // inputs,
        outputs,
        inputs,
        torch.get_num_threads(),
    )
    return y


@functools.cache
def _function(dtype: torch.dtype) -> Callable[..., None] | str:
    """The C++ function for a dtype, or why there is none."""
    library = native.library("sparse24")
    if isinstance(library, str):
        return library
    function = getattr(library, f"matmul24_{_name(dtype)}", None)
    if function is None:
        return "this processor has no AVX2 and FMA, or does not convert float16"
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    function.restype = None
    return cast("Callable[..., None]", function)


# On GPUs.


def _state(reason: str, what: str) -> str:
    return f"unavailable: {reason}" if reason else f"available: {what}"


def _no_mma_sp(device: torch.device, dtype: torch.dtype, triton: str) -> str:
    """Why a GPU cannot run it; empty if it can."""
    if not triton.startswith("available"):
        return triton.removeprefix("unavailable: ")
    if "interpreter" in triton:
        return "triton's interpreter knows no Gluon"
    if torch.version.hip is not None:
        return "mma.sp is an instruction of NVIDIA's"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"mma.sp needs compute capability 8.0, and this GPU has {torch.cuda.get_device_capability(device)}"
    if dtype.itemsize != 2:
        return "it computes bfloat16 and float16"
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        return f"it needs triton 3.7, and this is {version('triton')}"
    return ""


def _no_cusparselt(dtype: torch.dtype) -> str:
    if not torch.backends.cusparselt.is_available():
        return "this torch comes without cuSPARSELt"
    return "" if dtype.itemsize == 2 else "it computes bfloat16 and float16"


_semi_structured: WeakKeyDictionary[Packed24, Tensor] = WeakKeyDictionary()


def _cusparselt(x_NI: Tensor, packed: Packed24, bias_O: Tensor | None) -> Tensor:
    if packed not in _semi_structured:
        _semi_structured[packed] = torch.sparse.to_sparse_semi_structured(packed.to_dense())
    return linear(x_NI, _semi_structured[packed], bias_O)


# What was timed.


def record(device: torch.device, rows: Mapping[tuple[torch.dtype, Layout, tuple[int, int], int], dict[str, float]]) -> Path:
    """Keep times for `auto`, in this process and in later ones.

    Args:
        rows: by dtype, layout, shape and number of tokens, one of `BUCKETS`: seconds of one product, by backend, and as "dense"
            those of torch's product with a dense weight.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    table = dict(_tuned(device)) | {_key(*key): seconds for key, seconds in rows.items()}
    file = table_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one step, since another process may be reading or writing the same.
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)
    _tuned.cache_clear()
    _choose.cache_clear()
    return file


def _key(dtype: torch.dtype, layout: Layout, shape: tuple[int, int], bucket: int) -> str:
    return f"{_name(dtype)} {layout} {shape[0]}x{shape[1]} {bucket}"


def table_file(device: torch.device) -> Path:
    """Where a device's times are kept; those of another torch are not its own."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        processor = hashlib.sha256(native.processor().encode()).hexdigest()[:8]
        name = f"{platform.machine()} {processor} {torch.get_num_threads()} threads"
    return native.folder() / f"linear24 {name} torch {torch.__version__}.json".replace(" ", "-").replace("/", "-")


@functools.cache
def _tuned(device: torch.device) -> dict[str, dict[str, float]]:
    """By `_key` and backend: seconds. Nothing where there is no file that can be read."""
    try:
        table = json.loads(table_file(device).read_text(encoding="utf-8"))
        return {str(key): {str(name): float(seconds) for name, seconds in row.items()} for key, row in table.items()}
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError):
        return {}


# Modules.


class Linear24(nn.Module):
    """`nn.Linear` with a packed weight, whose two tensors are what its state_dict holds in the weight's place.

    Args:
        in_features, out_features: I and O.
        bias: whether there is one.
        dtype, device, layout: of the weight.
    """

    words: Tensor
    meta: Tensor
    dense: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        layout: Layout = "simple",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype, self.layout = in_features, out_features, dtype, layout
        words, meta, meta_dtype = part_shapes((out_features, in_features), dtype, layout)
        self.register_buffer("words", torch.zeros(words, dtype=torch.int32, device=device))
        self.register_buffer("meta", torch.zeros(meta, dtype=meta_dtype, device=device))
        self.register_buffer("dense", None, persistent=False)
        zeros = torch.zeros(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(zeros, requires_grad=False) if bias else None)
        self._packed: Packed24 | None = None

    @classmethod
    def from_linear(cls, module: nn.Module, *, layout: Layout = "simple", keep_dense: bool = False) -> Linear24:
        """Pack an `nn.Linear`'s weight, or that of a `Conv1D` of transformers, which is [I, O].

        Args:
            keep_dense: keep the dense weight as well, for numbers of tokens at which its product is faster.
        """
        weight_OI = _weight(module)
        packed = pack24(weight_OI, layout)
        found = cls.from_packed(packed, getattr(module, "bias", None))
        found.dense = weight_OI.contiguous() if keep_dense else None
        return found.train(module.training)

    @classmethod
    def from_packed(cls, packed: Packed24, bias_O: Tensor | None = None) -> Linear24:
        outputs, inputs = packed.shape
        found = cls(inputs, outputs, bias=bias_O is not None, dtype=packed.dtype, device="meta", layout=packed.layout)
        found.words, found.meta = packed.words, packed.meta
        if bias_O is not None:
            found.bias = nn.Parameter(bias_O.detach(), requires_grad=bias_O.requires_grad)
        return found

    @property
    def packed(self) -> Packed24:
        """The weight, wherever the module is."""
        words, meta = self._buffers["words"], self._buffers["meta"]
        if self._packed is None or self._packed.words is not words or self._packed.meta is not meta:
            assert words is not None
            assert meta is not None
            self._packed = Packed24(words, meta, (self.out_features, self.in_features), self.dtype, self.layout)
        return self._packed

    @property
    def nbytes(self) -> int:
        """Of all copies of the weight."""
        dense_OI = self._buffers["dense"]
        return self.packed.nbytes + (0 if dense_OI is None else dense_OI.nbytes)

    def to_linear(self) -> nn.Linear:
        """The dense module."""
        found = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=self.dtype, device="meta")
        found.weight = nn.Parameter(self.packed.to_dense())
        if self.bias is not None:
            found.bias = self.bias
        return found.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        packed, dense_OI, bias_O = self.packed, self._buffers["dense"], self._parameters["bias"]
        if dense_OI is None:
            return linear24(x, packed, bias_O)
        backend = choose(packed, x.numel() // self.in_features, has_dense=True)
        return linear(x, dense_OI, bias_O) if backend == "dense" else linear24(x, packed, bias_O, backend=backend)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{_name(self.dtype)}, {self.layout}"
        )


@dataclass(frozen=True)
class Conversion:
    """One linear of a model.

    Attributes:
        name: of its module.
        shape: O and I.
        converted: whether it is a `Linear24`.
        reason: what computes one token, or why it was left as it was.
        bytes_before, bytes_after: of its weight.
    """

    name: str
    shape: tuple[int, int]
    converted: bool
    reason: str
    bytes_before: int
    bytes_after: int


def convert_model(
    model: nn.Module,
    *,
    layout: Layout | Literal["auto"] = "auto",
    skip: Sequence[str] = ("lm_head",),
    min_inputs: int = 512,
    strict: bool = True,
    keep_dense: bool = False,
) -> list[Conversion]:
    """Replace a model's linears by `Linear24`, in place, where a kernel computes one token faster than torch does dense.

    Args:
        layout: auto is that of the kernel which computes one token.
        skip: last parts of names of modules to leave.
        min_inputs: leave those with fewer.
        strict: refuse the model, before anything is changed, if a weight that could be packed is not 2:4; else leave it.
        keep_dense: keep the dense weights as well, for numbers of tokens at which their product is faster.

    Returns:
        A row for every linear, in the model's order.

    Raises:
        ValueError: strict, and a weight is not 2:4; the sentence names it and the first offending group.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)}
    plans: dict[str, Layout | str] = {}
    for name, module in linears.items():
        plans[name] = _plan(name, module, layout, skip, min_inputs)
        if plans[name] not in get_args(Layout):
            continue
        try:
            check24(_weight(module))
        except ValueError as error:
            if strict:
                raise ValueError(f"{name}: {error}") from None
            plans[name] = str(error)
    report = []
    for name, module in linears.items():
        weight_OI, plan = _weight(module), plans[name]
        converted = None
        if plan in get_args(Layout):
            converted = Linear24.from_linear(module, layout=cast(Layout, plan), keep_dense=keep_dense)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, converted)
            plan = f"{choose(converted.packed, 1)}, {plan} layout"
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        after = weight_OI.nbytes if converted is None else converted.nbytes
        report.append(Conversion(name, shape, converted is not None, plan, weight_OI.nbytes, after))
    return report


def restore_model(model: nn.Module) -> None:
    """Replace every `Linear24` by an `nn.Linear` with the same weight, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear24):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.to_linear())


def _plan(name: str, module: nn.Module, layout: str, skip: Sequence[str], min_inputs: int) -> str:
    """The layout that a linear gets, or why it gets none."""
    weight_OI = _weight(module)
    outputs, inputs = weight_OI.shape
    if name.rpartition(".")[2] in skip:
        return "it was to be left"
    if not (type(module) is nn.Linear or _is_conv1d(module)) or "forward" in module.__dict__:
        return f"it is no plain linear, but {type(module).__name__} with a forward of its own"
    if weight_OI.is_meta:
        return "it has no weights in memory"
    if inputs < min_inputs:
        return f"it has {inputs} inputs, fewer than {min_inputs}"
    if inputs % 16:
        return f"it has {inputs} inputs, which is no multiple of 16"
    if usable(weight_OI.device, weight_OI.dtype, (outputs, inputs), 1) == ["unpack"]:
        states = backends(weight_OI.device, weight_OI.dtype)
        return f"no kernel computes it here (cpp {states['cpp']}; gemv {states['gemv']})"
    wanted = best_layout(weight_OI.device, weight_OI.dtype, (outputs, inputs)) if layout == "auto" else cast(Layout, layout)
    seconds = _tuned(weight_OI.device).get(_key(weight_OI.dtype, wanted, (outputs, inputs), 1), {})
    if seconds and min(seconds, key=lambda each: seconds[each]) == "dense":
        return "by the times that were kept, the dense product is the fastest for one token"
    return wanted


def _weight(module: nn.Module) -> Tensor:
    """As [O, I]."""
    weight = cast(Tensor, module.weight).detach()
    return weight.t() if _is_conv1d(module) else weight


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}, {_name(tensor.dtype)} and on {tensor.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
