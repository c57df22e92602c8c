"""The compiled GPU kernels of the 2:4 product and of the gated one: what binaries say, and what the code for sm_80 computes."""

import pytest
import torch

pytest.importorskip("triton")
from aot import SHARED, TARGETS
from launches import Launches
from ptx import EmulationError

from llmprune.kernels import gemv_triton, sparse24_triton
from llmprune.kernels.sparse24 import Packed24, mask24, pack24, part_shapes

sparse24_gluon = pytest.importorskip("llmprune.kernels.sparse24_gluon", reason="this Triton has no Gluon", exc_type=ImportError)

KERNELS = {"gluon": (sparse24_gluon, "fragment", ("partial",)), "triton": (sparse24_triton, "simple", ("gemv", "expand"))}
TENSOR_CORES = {"sm_80": "HMMA.16816.", "sm_90": "HGMMA.", "sm_100": "UTCHMMA", "sm_120": "HMMA.16816.", "gfx942": "v_mfma_"}
complete = pytest.mark.complete
# One target of each kernel in the fast part.
FAST = {("gluon", 8, "sm_90"), ("triton", 1, "sm_80"), ("triton", 16, "gfx942")}
CASES = [
    pytest.param(name, tokens, target, marks=[] if (name, tokens, target) in FAST else complete)
    for name, batches in (("gluon", (1, 8, 16, 32)), ("triton", (1, 4, 16, 32, 128)))
    for tokens in batches
    for target in TARGETS
    if name == "triton" or target.startswith("sm")
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def stand_in(monkeypatch, module, *names, run=True):
    """Launches of these kernels and of the one that adds splits."""
    homes = dict.fromkeys(names, module) | {"combine": gemv_triton}
    stands = {name: Launches(getattr(home, name), run=run) for name, home in homes.items()}
    for name, stand in stands.items():
        monkeypatch.setattr(homes[name], name, stand)
    return stands


def launched(monkeypatch, name, tokens, dtype, shape=(4096, 4096)):
    """The launch for a weight of a model's size, not run."""
    module, layout, names = KERNELS[name]
    words, meta, meta_dtype = part_shapes(shape, dtype, layout)
    packed = Packed24(torch.empty(words, dtype=torch.int32), torch.empty(meta, dtype=meta_dtype), shape, dtype, layout)
    stands = stand_in(monkeypatch, module, *names, run=False)
    module.matmul(torch.empty(tokens, shape[1], dtype=dtype), packed)
    (launch,) = [launch for kernel in names for launch in stands[kernel].launches]
    return launch


def problem(shape, dtype, layout):
    """x [N, I], packed weight, bias [O], and the exact product."""
    outputs, inputs, tokens = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((outputs, inputs), (tokens, inputs), (outputs,))
    weight_OI, x_NI, bias_O = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    weight_OI = weight_OI.where(mask24(weight_OI), 0)
    return x_NI, pack24(weight_OI, layout), bias_O, x_NI.double() @ weight_OI.double().T + bias_O.double()


def wide_loads(compiled):
    """Instructions that load 16 bytes a thread, also those straight into shared memory."""
    copies = sum(count for name, count in compiled.opcodes.items() if name.startswith("LDGSTS") and name.endswith(".128"))
    return compiled.loads["v4.b32"] + compiled.loads["dwordx4"] + copies


@pytest.mark.parametrize(("name", "tokens", "target"), CASES)
def test_no_spills_tensor_cores_and_weights_in_16_bytes(name, tokens, target, monkeypatch):
    launch = launched(monkeypatch, name, tokens, torch.bfloat16)
    compiled = launch.compile(target)
    assert compiled.spills == 0
    assert compiled.shared <= SHARED[target]
    if name == "gluon":
        products = compiled.opcodes["HMMA.SP.16832.F32.BF16"]
        assert products == launch.constants["TILES"] * 2 * launch.constants["PAIRS"]
        assert compiled.shared == 0
        words_of_a_trip = launch.constants["WARPS"] * launch.constants["PAIRS"] * 256
    else:
        used = any(opcode.startswith(TENSOR_CORES[target]) for opcode in compiled.opcodes)
        assert used == (tokens > sparse24_triton.MOST_TOKENS_GEMV)
        words_of_a_trip = launch.constants["BLOCK_O"] * launch.constants["BLOCK_G"]
    lanes = TARGETS[target].warp_size * launch.options["num_warps"]
    assert wide_loads(compiled) >= max(1, words_of_a_trip * 4 // (16 * lanes))


@complete
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "tokens", "dtype"), [("gluon", 8, "float16"), ("triton", 4, "float32"), ("triton", 16, "float32")]
)
def test_other_types_spill_nothing_either(name, tokens, dtype, target, monkeypatch):
    if name == "gluon" and target.startswith("gfx"):
        pytest.skip("mma.sp is NVIDIA's")
    compiled = launched(monkeypatch, name, tokens, getattr(torch, dtype)).compile(target)
    assert compiled.spills == 0
    assert compiled.shared <= SHARED[target]
    assert name != "gluon" or compiled.opcodes["HMMA.SP.16832.F32"] + compiled.opcodes["HMMA.SP.16832.F32.F16"] > 0


# Outputs of part of a program, inputs of part of a trip, several splits, part of a tile of tokens.
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("gluon", (80, 1088, 3), torch.bfloat16),
        ("triton", (33, 1040, 1), torch.bfloat16),
        pytest.param("gluon", (16, 64, 1), torch.bfloat16, marks=complete),
        pytest.param("gluon", (208, 2624, 8), torch.float16, marks=complete),
        pytest.param("gluon", (64, 1600, 13), torch.bfloat16, marks=complete),
        pytest.param("gluon", (144, 192, 32), torch.bfloat16, marks=complete),
        pytest.param("triton", (20, 336, 3), torch.float16, marks=complete),
        pytest.param("triton", (20, 336, 4), torch.float32, marks=complete),
        pytest.param("triton", (70, 1040, 5), torch.bfloat16, marks=complete),
        pytest.param("triton", (70, 1296, 33), torch.float16, marks=complete),
        pytest.param("triton", (64, 1024, 70), torch.bfloat16, marks=complete),
    ],
    ids=str,
)
def test_the_compiled_code_computes_the_product(name, shape, dtype, monkeypatch):
    module, layout, names = KERNELS[name]
    stand_in(monkeypatch, module, *names)
    x_NI, packed, bias_O, exact_NO = problem(shape, dtype, layout)
    # Sums are float32: beside the rounding of the output there is almost nothing.
    for bias, exact in ((bias_O, exact_NO), (None, exact_NO - bias_O.double())):
        y_NO = module.matmul(x_NI, packed, bias)
        assert torch.allclose(y_NO.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gluon", 8),
        ("triton", 1),
        pytest.param("gluon", 1, marks=complete),
        pytest.param("gluon", 32, marks=complete),
        pytest.param("triton", 4, marks=complete),
        pytest.param("triton", 16, marks=complete),
    ],
)
def test_bytes_fetched_are_0_5625_of_the_dense_weight(name, tokens, monkeypatch):
    module, layout, names = KERNELS[name]
    stands = stand_in(monkeypatch, module, *names)
    x_NI, packed, _, _ = problem((64, 2048, tokens), torch.bfloat16, layout)
    module.matmul(x_NI, packed)
    (launch,) = [launch for kernel in names for launch in stands[kernel].launches]
    assert launch.grid[1] > 1
    assert launch.fetched["words_ptr"] + launch.fetched["meta_ptr"] == packed.nbytes == 0.5625 * 64 * 2048 * 2


def test_a_fragment_in_any_other_order_gives_another_product(monkeypatch):
    stand_in(monkeypatch, sparse24_gluon, "partial")
    x_NI, packed, _, _ = problem((64, 256, 8), torch.bfloat16, "fragment")
    exact_NO = x_NI.double() @ packed.to_dense().double().T
    words, meta = packed.words, packed.meta
    # [..., row, selector, half of the columns]
    lanes_of_meta = meta.reshape(*meta.shape[:2], 8, 2, 2)
    wrong = {
        "registers": (words[..., [1, 0, 2, 3]], meta),
        "halves of the kept columns": (words[..., [2, 3, 0, 1]], meta),
        "lanes of the words": (words[:, :, torch.arange(32) ^ 1], meta),
        "selectors": (words, lanes_of_meta.flip(3).reshape(meta.shape)),
        "lanes of the metadata": (words, lanes_of_meta.flip(4).reshape(meta.shape)),
        "rows of the metadata": (words, meta.view(torch.int16).reshape(-1, 2).flip(1).contiguous().view(torch.int32)),
        "nothing": (words, meta),
    }
    for what, (other_words, other_meta) in wrong.items():
        other = Packed24(
            other_words.contiguous(), other_meta.reshape(meta.shape).contiguous(), (64, 256), torch.bfloat16, "fragment"
        )
        y_NO = sparse24_gluon.matmul(x_NI, other)
        error = float((y_NO.double() - exact_NO).norm() / exact_NO.norm())
        assert (error > 0.3) == (what != "nothing"), what


def test_a_weight_that_ends_too_soon_and_metadata_out_of_order_are_noticed(monkeypatch):
    stands = stand_in(monkeypatch, sparse24_gluon, "partial", run=False)
    x_NI, packed, _, _ = problem((64, 256, 8), torch.bfloat16, "fragment")
    sparse24_gluon.matmul(x_NI, packed)
    (launch,) = stands["partial"].launches
    launch.arguments["words_ptr"] = packed.words[:-1]
    with pytest.raises(EmulationError, match="out of bounds"):
        launch.run()
    launch.arguments |= {"words_ptr": packed.words, "meta_ptr": torch.zeros_like(packed.meta)}
    with pytest.raises(EmulationError, match="not in order"):
        launch.run()


def gated(sparsity, inputs=640, outputs=512):
    """x [I], weight [I, O] whose rows that are left out are NaN, thresholds, the exact product, and the share that is kept."""
    generator = torch.Generator().manual_seed(0)
    x_I, weight_IO = (torch.randn(size, generator=generator).bfloat16() for size in ((inputs,), (inputs, outputs)))
    kept_I = torch.rand(inputs, generator=generator) >= sparsity
    tau_I = torch.where(kept_I, -1.0, torch.inf)
    exact_O = x_I[kept_I].double() @ weight_IO[kept_I].double()
    weight_IO[~kept_I] = torch.nan
    return x_I, weight_IO, tau_I, exact_O, float(kept_I.float().mean())


@pytest.mark.parametrize("sparsity", [0.5, pytest.param(0.0, marks=complete), pytest.param(0.9, marks=complete)])
@pytest.mark.parametrize(("way", "kernel"), [("gemv", "partial"), ("gemv_compacted", "partial_of_rows")])
def test_a_gated_product_fetches_the_rows_that_are_kept(way, kernel, sparsity, monkeypatch):
    stands = stand_in(monkeypatch, gemv_triton, "partial", "compact", "partial_of_rows")
    x_I, weight_IO, tau_I, exact_O, kept = gated(sparsity)
    y_O = getattr(gemv_triton, way)(x_I, weight_IO, tau_I)
    assert torch.allclose(y_O.double(), exact_O, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)
    (launch,) = stands[kernel].launches
    assert launch.fetched["weight_ptr"] == round(kept * weight_IO.nbytes)


@pytest.mark.parametrize("target", [each if each == "sm_80" else pytest.param(each, marks=complete) for each in TARGETS])
def test_the_compacted_product_spills_nothing_and_reads_weights_in_16_bytes(target, monkeypatch):
    stands = stand_in(monkeypatch, gemv_triton, "compact", "partial_of_rows", run=False)
    weight_IO = torch.empty(4096, 4096, dtype=torch.bfloat16)
    gemv_triton.gemv_compacted(torch.empty(4096, dtype=torch.bfloat16), weight_IO, torch.empty(4096))
    for name in ("compact", "partial_of_rows", "combine"):
        (launch,) = stands[name].launches
        compiled = launch.compile(target)
        assert compiled.spills == 0
        assert compiled.shared <= SHARED[target]
        if name == "partial_of_rows":
            lanes = TARGETS[target].warp_size * gemv_triton.WARPS
            assert wide_loads(compiled) >= gemv_triton.BLOCK_I * gemv_triton.BLOCK_O * 2 // (16 * lanes)
