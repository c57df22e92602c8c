"""The emulator of PTX: compiled kernels whose results are known, and what a GPU would refuse or get wrong."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from aot import binary  # noqa: E402
from launches import Launches  # noqa: E402
from ptx import EmulationError  # noqa: E402
from ptxemu import run  # noqa: E402

complete = pytest.mark.complete


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@triton.jit
def product(a_ptr, b_ptr, c_ptr, M, N, K, stride, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """c = a b, all with rows `stride` apart."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(a_ptr + m[:, None] * stride + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * stride + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c_ptr + m[:, None] * stride + n[None, :], total.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def statistics(x_ptr, y_ptr, counts_ptr, columns, BLOCK: tl.constexpr):
    """Per row: softmax, its logarithm, and the number of entries above the mean, of the first `counts` columns."""
    row = tl.program_id(0)
    count = tl.load(counts_ptr + row)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(x_ptr + row * columns + column, mask=column < count, other=-float("inf")))
    top = tl.max(largest)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * columns + column, mask=column < count, other=-float("inf"))
        total += tl.exp(x - top)
    norm = tl.log(tl.sum(total))
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * columns + column, mask=column < count)
        tl.store(y_ptr + row * columns + column, x - top - norm, mask=column < count)


@triton.jit
def ordered(x_ptr, y_ptr, SIZE: tl.constexpr):
    """Running sums of integers, sorted the other way round, with quotient and remainder."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    sums = tl.cumsum(x, 0)
    tl.store(y_ptr + at, sums)
    tl.store(y_ptr + SIZE + at, tl.sort(x))
    tl.store(y_ptr + 2 * SIZE + at, x // 7)
    tl.store(y_ptr + 3 * SIZE + at, x % 7)
    tl.store(y_ptr + 4 * SIZE + at, (x << 3) ^ (x >> 2))


@triton.jit
def copied(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=at < size)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=complete), pytest.param(torch.float32, marks=complete)],
    ids=str,
)
def test_a_pipelined_product_on_tensor_cores_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    a_MK, b_KN = (torch.randn(shape, generator=generator).to(dtype) for shape in ((40, 96), (80, 96)))
    c_MN = torch.full((40, 96), torch.nan, dtype=dtype)
    kernel = Launches(product)
    kernel[(2, 3)](a_MK, b_KN, c_MN, 40, 72, 80, 96, BLOCK=32, DEPTH=32, num_warps=4, num_stages=3)
    (launch,) = kernel.launches
    assert ("mma" in launch.executed) == (dtype != torch.float32)
    assert launch.executed["cp"] > 0
    exact_MN = a_MK[:, :80].double() @ b_KN[:, :72].double()
    tolerance = 1e-5 if dtype == torch.float32 else 0
    assert torch.allclose(c_MN[:, :72].double(), exact_MN.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=tolerance)
    assert c_MN[:, 72:].isnan().all()


def test_rows_of_any_length_part_and_meet_again():
    counts = torch.tensor([1, 130, 300, 17, 256], dtype=torch.int32)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    y = torch.full_like(x, torch.nan)
    Launches(statistics)[(5,)](x, y, counts, 300, BLOCK=128, num_warps=2)
    for row, count in enumerate(counts.tolist()):
        assert torch.allclose(y[row, :count], x[row, :count].log_softmax(0), atol=1e-5)
        assert y[row, count:].isnan().all()


@complete
def test_integers_are_exact():
    x = torch.randint(-(2**20), 2**20, (256,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    y = torch.zeros(5, 256, dtype=torch.int32)
    Launches(ordered)[(1,)](x, y, SIZE=256, num_warps=4)
    expected = [x.cumsum(0), x.sort().values, x.div(7, rounding_mode="trunc"), x.fmod(7), (x << 3) ^ (x >> 2)]
    assert torch.equal(y, torch.stack([each.int() for each in expected]))


def test_bytes_are_those_of_the_sectors_of_every_load():
    x, y = torch.randn(1024), torch.zeros(1024)
    kernel = Launches(copied)
    kernel[(4,)](x, y, 1024, BLOCK=256, num_warps=1)
    # Not known to be a multiple of 16: four loads of 4 bytes instead of one of 16, each of which needs every sector.
    kernel[(4,)](x, y, 1000, BLOCK=256, num_warps=1)
    assert torch.equal(x, y)
    assert [launch.fetched for launch in kernel.launches] == [{"x_ptr": size, "y_ptr": 0, "size": 0} for size in (4096, 16000)]


def test_beyond_a_tensor_and_misaligned_are_refused():
    compiled = binary(copied, "sm_80", {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32"}, {"BLOCK": 256}, num_warps=1)
    x, y = torch.randn(1000), torch.zeros(1000)
    with pytest.raises(EmulationError, match=r"out of bounds: bytes \d+ to \d+ of tensor 0, which has 3996"):
        run(compiled.asm["ptx"], (4,), [x[:999], y, 1000], compiled.metadata.shared)
    with pytest.raises(EmulationError, match="of tensor 1, which has 2000"):
        run(compiled.asm["ptx"], (4,), [x, y[:500], 1000], compiled.metadata.shared)
    with pytest.raises(EmulationError, match="misaligned: 16 bytes of tensor 0 at byte"):
        run(compiled.asm["ptx"].replace("[%rd1+512]", "[%rd1+516]").replace("[ %rd1 + 0 ]", "[ %rd1 + 4 ]"), (1,), [x, y, 1000])


BARRIER = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .pred 	%p<2>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<4>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	setp.lt.u32 	%p1, %r1, 32;
	GUARD bar.sync 	0;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	st.global.b32 	[%rd3], %r1;
$end:
	bar.sync 	0;
	ret;
}
"""


def test_a_barrier_wants_every_thread():
    y = torch.full((64,), -1, dtype=torch.int32)
    run(BARRIER.replace("GUARD", ""), (1,), [y])
    assert torch.equal(y, torch.arange(64, dtype=torch.int32))
    for guard in ("@%p1", "@%p1 bra $end;", "@%p1 bra $end; bar.sync 0;"):
        with pytest.raises(EmulationError, match="a barrier that some threads of its program do not reach"):
            run(BARRIER.replace("GUARD", guard), (1,), [y])


def test_a_copy_that_nobody_waits_for_has_not_arrived():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", **dict.fromkeys(("M", "N", "K", "stride"), "i32")}
    compiled = binary(product, "sm_80", types, {"BLOCK": 32, "DEPTH": 32}, num_warps=4, num_stages=2)
    assert "cp.async.wait_group" in compiled.asm["ptx"]
    for wait, arrives in (("cp.async.wait_group", True), ("// cp.async.wait_group", False)):
        c = torch.zeros(32, 32)
        run(
            compiled.asm["ptx"].replace("cp.async.wait_group", wait),
            (1, 1),
            [a, b, c, 32, 32, 32, 32],
            compiled.metadata.shared,
        )
        assert torch.allclose(c, a.float() @ b.float(), atol=1e-4) == arrives
