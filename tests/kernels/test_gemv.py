"""The gated product of one token: every backend computes the reference, and what is left out is never touched."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmprune.kernels import native
from llmprune.kernels.gemv import backends, bytes_read, gemv, reference

CPU = torch.device("cpu")
# Fewer outputs than a vector, odd ones, more than the C++ kernel sums up at a time; fewer inputs than it adds in one pass.
SHAPES = [(1, 1), (33, 65), (96, 200), (257, 300), (16421, 9)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=["cpp", "bag"])
def backend(request):
    state = backends(CPU, torch.float32)[request.param]
    if not state.startswith("available"):
        pytest.skip(state)
    return request.param


def problem(outputs, inputs, dtype=torch.float32, seed=0):
    """x [I], weight [I, O], bias [O]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((inputs,), (inputs, outputs), (outputs,))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def thresholds(x_I, sparsity):
    """Per channel, so that about this share is left out."""
    order = x_I.float().abs().sort().values
    middle = order[min(int(sparsity * len(order)), len(order) - 1)]
    return middle * torch.linspace(0.5, 1.5, len(x_I))


def distance(y_O, expected_O):
    return float((y_O.double() - expected_O.double()).norm() / expected_O.double().norm().clamp_min(1e-9))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_every_backend_computes_the_reference(backend, shape, dtype, with_bias):
    if not backends(CPU, dtype)[backend].startswith("available"):
        pytest.skip(backends(CPU, dtype)[backend])
    x_I, weight_IO, bias_O = problem(*shape, dtype)
    bias_O = bias_O if with_bias else None
    for tau_I in (thresholds(x_I, 0.5), torch.full_like(x_I, -1).float(), torch.full_like(x_I, torch.inf).float()):
        y_O = gemv(x_I, weight_IO, tau_I, bias_O, backend=backend)
        expected_BO = reference(x_I[None].double(), weight_IO.T.double(), tau_I, None if bias_O is None else bias_O.double())
        assert y_O.dtype == dtype
        assert distance(y_O, expected_BO[0]) < TOLERANCE[dtype]


def test_the_reference_is_a_dense_product_of_the_inputs_that_stay():
    x_I, weight_IO, bias_O = problem(5, 7)
    tau_I = thresholds(x_I, 0.5)
    expected = [
        sum(float(weight_IO[i, o]) * float(x_I[i]) for i in range(7) if abs(x_I[i]) > tau_I[i]) + float(bias_O[o])
        for o in range(5)
    ]
    assert torch.allclose(reference(x_I[None], weight_IO.T, tau_I, bias_O)[0], torch.tensor(expected), atol=1e-6)


def test_one_input_that_stays_is_one_column(backend):
    x_I, weight_IO, _ = problem(40, 30)
    tau_I = torch.full((30,), torch.inf)
    tau_I[11] = -1
    assert torch.allclose(gemv(x_I, weight_IO, tau_I, backend=backend), x_I[11] * weight_IO[11])


def test_an_input_at_its_threshold_is_left_out(backend):
    x_I, weight_IO = torch.tensor([1.0, -2.0, 3.0]), torch.eye(3)
    assert gemv(x_I, weight_IO, torch.tensor([1.0, 2.0, 2.0]), backend=backend).tolist() == [0, 0, 3]


def test_weights_of_inputs_that_are_left_out_are_not_used(backend):
    x_I, weight_IO, bias_O = problem(60, 50)
    tau_I = thresholds(x_I, 0.5)
    clean_O = gemv(x_I, weight_IO, tau_I, bias_O, backend=backend)
    weight_IO[x_I.abs() <= tau_I] = torch.nan
    assert torch.equal(gemv(x_I, weight_IO, tau_I, bias_O, backend=backend), clean_O)
    assert torch.isfinite(reference(x_I[None], weight_IO.T, tau_I, bias_O)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_never_left_out(backend, dtype):
    x_I, weight_IO, _ = problem(8, 6, dtype)
    x_I[2] = torch.nan
    y_O = gemv(x_I, weight_IO, torch.full((6,), 1e6), backend=backend)
    assert y_O.isnan().all()
    assert reference(x_I[None], weight_IO.T, torch.full((6,), 1e6)).isnan().all()


def test_infinity_is_above_every_finite_threshold(backend):
    x_I, weight_IO = torch.tensor([torch.inf, 1.0]), torch.tensor([[1.0, -1.0], [5.0, 5.0]])
    assert gemv(x_I, weight_IO, torch.tensor([1e30, 2.0]), backend=backend).tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("shape", [(257, 1200), (2500, 300), (40000, 20)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_same_bits_whatever_the_number_of_threads(dtype, shape):
    if not backends(CPU, dtype)["cpp"].startswith("available"):
        pytest.skip(backends(CPU, dtype)["cpp"])
    x_I, weight_IO, bias_O = problem(*shape, dtype)
    tau_I = thresholds(x_I, 0.4)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(gemv(x_I, weight_IO, tau_I, bias_O, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("kept", range(18))
def test_any_number_of_inputs_may_stay(backend, kept):
    x_I, weight_IO, _ = problem(70, 40)
    tau_I = torch.full((40,), torch.inf)
    tau_I[torch.randperm(40, generator=torch.Generator().manual_seed(kept))[:kept]] = -1
    expected_O = (x_I.where(tau_I < 0, 0).double() @ weight_IO.double()).float()
    assert torch.allclose(gemv(x_I, weight_IO, tau_I, backend=backend), expected_O, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_cpp_kernel_rounds_as_torch_does_for_every_weight_of_16_bits(dtype):
    if not backends(CPU, dtype)["cpp"].startswith("available"):
        pytest.skip(backends(CPU, dtype)["cpp"])
    weight_IO = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    # With 1.5 many products lie half-way between two numbers, where embedding_bag does not take the even one.
    for x in (1.0, 0.7, 1.5):
        x_I = torch.tensor([x], dtype=dtype)
        y_O = gemv(x_I, weight_IO, torch.zeros(1), backend="cpp")
        expected_O = (weight_IO[0].float() * x_I.float()).to(dtype)
        assert torch.equal(y_O.isnan(), expected_O.isnan())
        assert torch.equal(y_O[~y_O.isnan()], expected_O[~expected_O.isnan()])


# Kernels get addresses and two sizes: what is wrong here would be read beyond its end, or as something else.
@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("x", lambda x: x[:5]),
        ("tau", lambda tau: tau[:5]),
        ("bias", lambda bias: bias[:3]),
        ("bias", lambda bias: bias[:1]),
        ("weight", lambda weight: weight[:, 0].contiguous()),
        ("x", lambda x: x.repeat_interleave(2)[::2]),
        ("weight", lambda weight: weight.T.contiguous().T),
        ("tau", lambda tau: tau.repeat_interleave(2)[::2]),
        ("bias", lambda bias: bias.repeat_interleave(2)[::2]),
        ("x", lambda x: x.bfloat16()),
        ("weight", lambda weight: weight.bfloat16()),
        ("tau", lambda tau: tau.double()),
        ("bias", lambda bias: bias.bfloat16()),
        ("weight", lambda weight: weight.to("meta")),
        ("bias", lambda bias: bias.to("meta")),
    ],
)
def test_what_no_kernel_takes_is_refused(backend, part, wrong):
    x_I, weight_IO, bias_O = problem(8, 6)
    given = {"x": x_I, "weight": weight_IO, "tau": torch.zeros(6), "bias": bias_O}
    gemv(*given.values(), backend=backend)
    with pytest.raises(ValueError, match=r"\b(is|are) to be\b"):
        gemv(*(given | {part: wrong(given[part])}).values(), backend=backend)


def test_a_backend_or_dtype_that_there_is_not_is_named():
    x_I, weight_IO, _ = problem(8, 6)
    with pytest.raises(ValueError, match="Unknown backend 'magic'"):
        gemv(x_I, weight_IO, torch.zeros(6), backend="magic")
    with pytest.raises(ValueError, match=r"No backend computes torch\.float64 on cpu"):
        gemv(x_I.double(), weight_IO.double(), torch.zeros(6))
    assert all("not float64" in state for state in backends(CPU, torch.float64).values())
    assert next(iter(backends(torch.device("cuda"), torch.float16))) == "triton"


def test_a_compiler_that_fails_leaves_a_reason_and_another_backend_and_loads_no_triton_kernel(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such luck" >&2\nexit 1\n')
    broken.chmod(0o755)
    code = (
        "import sys, torch; from llmprune.kernels.gemv import backends, gemv; found = backends('cpu', torch.float32);"
        "print(found['cpp']); print(gemv(torch.ones(2), torch.ones(2, 3), torch.zeros(2)).tolist());"
        "print('llmprune.kernels.gemv_triton' in sys.modules)"
    )
    environment = {**os.environ, "CXX": str(broken), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    reason, result, triton = done.stdout.splitlines()
    assert reason.startswith("unavailable: ")
    assert "no such luck" in reason
    assert (result, triton) == ("[2.0, 2.0, 2.0]", "False")


def test_a_build_leaves_the_library_and_nothing_else(tmp_path, monkeypatch):
    if reason := native.reason("gemv"):
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        assert isinstance(native.library("gemv"), ctypes.CDLL)
        (file,) = (tmp_path / "llmprune" / "kernels").iterdir()
        assert file.suffix == ".so"
    finally:
        native.library.cache_clear()


def test_without_a_home_there_is_a_reason(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    if reason := native.reason("gemv"):
        pytest.skip(reason)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    native.library.cache_clear()
    try:
        assert "home directory" in native.reason("gemv")
    finally:
        native.library.cache_clear()


def test_bytes_are_those_of_the_rows_that_are_kept():
    assert bytes_read((100, 30), torch.bfloat16, 0.5) == 50 * 30 * 2 + 100 * (2 + 4)


def run_triton(device, **environment):
    """The script in a process of its own: one cannot both interpret and compile."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_gemv.py")
    done = subprocess.run(
        [sys.executable, script, device], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "36 products agree"


def test_the_triton_kernel_computes_the_reference_in_the_interpreter():
    run_triton("cpu", TRITON_INTERPRET="1")


@pytest.mark.needs_cuda
def test_the_triton_kernel_computes_the_reference_on_cuda():
    run_triton("cuda", TRITON_INTERPRET="0")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_triton_kernel_compiles_without_spills_and_reads_weights_in_16_bytes(target, dtype, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from aot import SHARED, compile_for

    from llmprune.kernels import gemv_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "tau_ptr": "*fp32", "sums_ptr": "*fp32"}
    sizes = dict.fromkeys(("inputs", "outputs", "share"), "i32")
    blocks = {"BLOCK_I": gemv_triton.BLOCK_I, "BLOCK_O": gemv_triton.BLOCK_O}
    found = compile_for(gemv_triton.partial, target, pointers | sizes, blocks, num_warps=gemv_triton.WARPS)
    assert found.spills == 0
    assert found.shared <= SHARED[target]
    wide = {"dwordx4"} if target.startswith("gfx") else {"v4.b32"}
    # A thread's part of a tile: all of it in loads of 16 bytes. The others are of x and tau.
    lanes = 64 if target.startswith("gfx") else 32
    size = 4 if dtype == "fp32" else 2
    assert sum(found.loads[each] for each in wide) >= blocks["BLOCK_I"] * blocks["BLOCK_O"] * size // (
        16 * lanes * gemv_triton.WARPS
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_the_kernel_that_adds_the_splits_compiles_without_spills(target, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from aot import SHARED, compile_for

    from llmprune.kernels import gemv_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"sums_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "outputs": "i32", "splits": "i32"}
    found = compile_for(gemv_triton.combine, target, types, {"HAS_BIAS": True, "BLOCK_O": gemv_triton.BLOCK_O})
    assert found.spills == 0
    assert found.shared <= SHARED[target]
