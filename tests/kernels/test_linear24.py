"""Products with packed 2:4 weights: every backend computes the dense product, and whole models on them say the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import llmprune as cli
from safetensors.torch import load_file, save_file
from tiny import save_llama
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from llmprune import tuning
from llmprune.errors import LLMPruneError
from llmprune.kernels import linear24 as kernel
from llmprune.kernels.linear24 import BACKENDS, Linear24, backends, convert_model, linear24, restore_model
from llmprune.kernels.sparse24 import mask24, pack24
from llmprune.runtime.sparse24 import describe, disable_sparse24, enable_sparse24

CPU = torch.device("cpu")
# Fewer outputs than a register has rows, odd ones, half a step of inputs, several steps.
SHAPES = [(1, 16), (3, 48), (7, 272), (64, 96)]
# Of the sum of magnitudes.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True)
def _no_times(tmp_path, monkeypatch):
    """No file of times is read or written but the test's own; the compiled library is found where it was."""
    kernel._function(torch.float32)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (kernel._tuned, kernel._choose):
        function.cache_clear()
    yield
    for function in (kernel._tuned, kernel._choose):
        function.cache_clear()


@pytest.fixture(params=["cpp", "unpack"])
def backend(request):
    state = backends(CPU, torch.float32)[request.param]
    if not state.startswith("available"):
        pytest.skip(state)
    return request.param


def problem(outputs, inputs, tokens, dtype=torch.float32, seed=0):
    """x [N, I], weight [O, I], bias [O]."""
    generator = torch.Generator().manual_seed(seed)
    x_NI, weight_OI, bias_O = (
        torch.randn(size, generator=generator) for size in ((tokens, inputs), (outputs, inputs), (outputs,))
    )
    return x_NI.to(dtype), (weight_OI * mask24(weight_OI)).to(dtype), bias_O.to(dtype)


def error(y, x, weight_OI, bias_O=None):
    """Over the sum of magnitudes, which is what rounding is relative to."""
    bias_O = torch.zeros(len(weight_OI)) if bias_O is None else bias_O
    expected = linear(x.double(), weight_OI.double(), bias_O.double())
    scale = linear(x.double().abs(), weight_OI.double().abs(), bias_O.double().abs())
    return float(((y.double() - expected).abs() / scale.clamp_min(1e-9)).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_backend_computes_the_dense_product(backend, shape, dtype):
    if not backends(CPU, dtype)[backend].startswith("available"):
        pytest.skip(backends(CPU, dtype)[backend])
    for tokens in (1, 2, 3, 4, 5, 9):
        x_NI, weight_OI, bias_O = problem(*shape, tokens, dtype)
        for layout, bias in (("simple", bias_O), ("vector", None)):
            y_NO = linear24(x_NI, pack24(weight_OI, layout), bias, backend=backend)
            assert y_NO.dtype == dtype
            assert y_NO.shape == (tokens, shape[0])
            assert error(y_NO, x_NI, weight_OI, bias) < TOLERANCE[dtype]


def test_one_input_is_one_column_whatever_its_place(backend):
    weight_OI = problem(9, 64, 1)[1]
    packed = pack24(weight_OI)
    for i in range(64):
        x_I = torch.zeros(64)
        x_I[i] = 2
        assert torch.equal(linear24(x_I, packed, backend=backend), 2 * weight_OI[:, i])


def test_more_tokens_than_the_cache_holds_are_the_same_products(backend):
    x_NI, weight_OI, _ = problem(5, 4096, 37)
    assert error(linear24(x_NI, pack24(weight_OI), backend=backend), x_NI, weight_OI) < 3e-7


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions_stay(backend, shape):
    _, weight_OI, bias_O = problem(8, 64, 1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    y = linear24(x, pack24(weight_OI), bias_O, backend=backend)
    assert y.shape == (*shape[:-1], 8)
    assert torch.allclose(y, linear(x, weight_OI, bias_O), atol=1e-5)


def test_inputs_may_lie_anywhere(backend):
    x_NI, weight_OI, _ = problem(8, 64, 6)
    y_NO = linear24(x_NI, pack24(weight_OI), backend=backend)
    assert torch.allclose(linear24(x_NI.T.contiguous().T, pack24(weight_OI), backend=backend), y_NO, atol=1e-6)
    assert torch.allclose(linear24(x_NI[::2], pack24(weight_OI), backend=backend), y_NO[::2], atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_not_finite_goes_through_to_its_own_output(value, dtype):
    if not backends(CPU, dtype)["cpp"].startswith("available"):
        pytest.skip(backends(CPU, dtype)["cpp"])
    x_NI, weight_OI, _ = problem(8, 32, 1, dtype)
    x_NI = x_NI.abs() + 1
    weight_OI[3, 4:8] = torch.tensor([0, value, 0, 0])
    y_O = linear24(x_NI, pack24(weight_OI), backend="cpp")[0]
    assert torch.equal(y_O.isfinite(), torch.arange(8) != 3)
    assert y_O[3].isnan() == (value != value)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_cpp_kernel_widens_every_value_of_16_bits_exactly_and_rounds_as_torch_does(dtype):
    if dtype == torch.float32 or not backends(CPU, dtype)["cpp"].startswith("available"):
        pytest.skip("no such values or no such kernel")
    values_O = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight_OI = torch.zeros(2**16, 16, dtype=dtype)
    weight_OI[:, 5] = values_O
    for x in (1.0, 1.5):
        x_I = torch.zeros(16, dtype=dtype)
        x_I[5] = x
        y_O = linear24(x_I, pack24(weight_OI, "vector"), backend="cpp")
        expected_O = (values_O.float() * x).to(dtype)
        assert torch.equal(y_O.isnan(), expected_O.isnan())
        assert torch.equal(y_O[~y_O.isnan()], expected_O[~expected_O.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_number_of_threads(dtype):
    if not backends(CPU, dtype)["cpp"].startswith("available"):
        pytest.skip(backends(CPU, dtype)["cpp"])
    x_NI, weight_OI, bias_O = problem(515, 544, 3, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(linear24(x_NI, pack24(weight_OI), bias_O, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_gradients_reach_inputs_and_bias(backend):
    x_NI, weight_OI, bias_O = problem(8, 64, 3)
    x, bias = x_NI.clone().requires_grad_(), bias_O.clone().requires_grad_()
    target_NO = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    (linear24(x, pack24(weight_OI), bias, backend=backend) * target_NO).sum().backward()
    assert torch.allclose(x.grad, target_NO @ weight_OI, atol=1e-5)
    assert torch.allclose(bias.grad, target_NO.sum(dim=0), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, p, b: (x[:, :48], p, b), r"x is \[2, 48\], float32 and on cpu, and is to be \[\.\.\., 64\]"),
        (lambda x, p, b: (x.bfloat16(), p, b), "x is .* bfloat16 .* is to be .* float32"),
        (lambda x, p, b: (x.to("meta"), p, b), "on meta, and is to be .* on cpu"),
        (lambda x, p, b: (x, p, b[:3]), r"The bias is \[3\]"),
        (lambda x, p, b: (x, p, b.double()), "The bias is .* float64"),
        (lambda x, p, b: (x, p, b.to("meta")), "The bias is .* on meta"),
    ],
)
def test_what_does_not_fit_is_refused(backend, change, said):
    x_NI, weight_OI, bias_O = problem(8, 64, 2)
    with pytest.raises(ValueError, match=said):
        linear24(*change(x_NI, pack24(weight_OI), bias_O), backend=backend)


def test_a_backend_that_there_is_not_or_that_cannot_run_is_named():
    x_NI, weight_OI, _ = problem(8, 64, 2)
    with pytest.raises(ValueError, match="Unknown backend 'magic': use auto, cpp, mma_sp"):
        linear24(x_NI, pack24(weight_OI), backend="magic")
    with pytest.raises(ValueError, match=r"Backend 'mma_sp' cannot run here \(unavailable: the tensors are on cpu\)"):
        linear24(x_NI, pack24(weight_OI), backend="mma_sp")
    assert tuple(backends(CPU, torch.float32)) == BACKENDS
    assert all("not float64" in state for state in backends(CPU, torch.float64).values())


def test_without_a_compiler_there_is_a_reason_and_a_model_stays_dense(tmp_path):
    code = (
        "import torch; from llmprune.kernels.linear24 import backends, convert_model, linear24\n"
        "from llmprune.kernels.sparse24 import pack24\n"
        "print(backends('cpu', torch.float32)['cpp'])\n"
        "print(linear24(torch.ones(16), pack24(torch.eye(16))).sum().item())\n"
        "model = torch.nn.Sequential(torch.nn.Linear(16, 16)); torch.nn.init.eye_(model[0].weight)\n"
        "print(convert_model(model, min_inputs=0)[0].reason, type(model[0]).__name__)"
    )
    environment = {**os.environ, "PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    state, total, reason = done.stdout.splitlines()
    assert "no C++ compiler was found" in state
    assert total == "16.0"
    assert reason.startswith("no kernel computes it here (cpp unavailable: no C++ compiler")
    assert reason.endswith(" Linear")


# Dispatch.


def test_what_was_timed_decides_and_dense_only_where_the_dense_weight_is_there():
    packed = pack24(problem(8, 64, 1)[1], "vector")
    assert kernel.choose(packed, 1) == "cpp"
    times = {(torch.float32, "vector", (8, 64), 1): {"dense": 1.0, "unpack": 2.0, "cpp": 3.0, "no such thing": 0.0}}
    file = kernel.record(CPU, times)
    assert kernel.choose(packed, 1) == "unpack"
    assert kernel.choose(packed, 1, has_dense=True) == "dense"
    assert kernel.choose(packed, 2) == "cpp"
    # What is kept is added to, and survives a new process; nonsense is as good as no file.
    kernel.record(CPU, {(torch.float32, "vector", (8, 64), 2): {"unpack": 1.0, "cpp": 2.0}})
    assert len(json.loads(file.read_text())) == 2
    assert (kernel.choose(packed, 1), kernel.choose(packed, 2)) == ("unpack", "unpack")
    for nonsense in ("{", "[1]", '{"a": 3}', '{"a": {"b": "c"}}'):
        file.write_text(nonsense)
        kernel._tuned.cache_clear()
        kernel._choose.cache_clear()
        assert kernel.choose(packed, 1) == "cpp"


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (256, 256), (5000, 256)])
def test_numbers_of_tokens_are_rounded_up_to_powers_of_two(tokens, bucket):
    packed = pack24(problem(8, 64, 1)[1], "vector")
    kernel.record(CPU, {(torch.float32, "vector", (8, 64), bucket): {"unpack": 1.0}})
    assert kernel.choose(packed, tokens) == "unpack"


def test_tuning_times_every_candidate_and_dispatch_takes_the_fastest(monkeypatch):
    monkeypatch.setattr(tuning, "MOST_WEIGHTS", 3)
    said = []
    found, file = tuning.tune([(48, 64), (48, 64), (32, 48)], torch.float32, CPU, tokens=(1, 4), advance=said.append)
    assert [(timed.shape, timed.tokens) for timed in found] == [((48, 64), 1), ((48, 64), 4), ((32, 48), 1), ((32, 48), 4)]
    assert len(said) == 4
    assert file.is_file()
    for timed in found:
        runs = "cpp" if backends(CPU, torch.float32)["cpp"].startswith("available") else "unpack"
        assert set(timed.seconds) == {"dense", runs}
        assert all(0 < seconds < 1 for seconds in timed.seconds.values())
        packed = pack24(torch.zeros(timed.shape), "vector" if runs == "cpp" else "simple")
        assert kernel.choose(packed, timed.tokens, has_dense=True) == timed.fastest
    with pytest.raises(LLMPruneError, match=r"not torch\.float64: give --dtype"):
        tuning.tune([(48, 64)], torch.float64, CPU)


# Modules and models.


def test_a_module_survives_safetensors_and_comes_back_dense(tmp_path):
    _, weight_OI, bias_O = problem(8, 64, 1, torch.bfloat16)
    dense = nn.Linear(64, 8, dtype=torch.bfloat16)
    dense.weight.data, dense.bias.data = weight_OI, bias_O
    for layout in ("simple", "vector"):
        module = Linear24.from_linear(dense, layout=layout)
        save_file(module.state_dict(), tmp_path / "module.safetensors")
        again = Linear24(64, 8, dtype=torch.bfloat16, layout=layout)
        again.load_state_dict(load_file(tmp_path / "module.safetensors"))
        x = torch.randn(3, 64).bfloat16()
        assert torch.equal(again(x), module(x))
        assert torch.equal(again.to_linear().weight, weight_OI)
        assert torch.equal(again.to_linear().bias, bias_O)
        assert "in_features=64, out_features=8, bias=True, bfloat16" in repr(again)
    assert Linear24.from_linear(nn.Linear(16, 16, bias=False).apply(lambda m: nn.init.eye_(m.weight))).bias is None


def test_a_module_with_its_dense_weight_uses_whichever_is_faster():
    x_NI, weight_OI, _ = problem(8, 64, 2)
    dense = nn.Linear(64, 8, bias=False)
    dense.weight.data = weight_OI
    module = Linear24.from_linear(dense, layout="vector", keep_dense=True)
    assert "dense" not in module.state_dict()
    assert module.nbytes == module.packed.nbytes + weight_OI.nbytes
    kernel.record(CPU, {(torch.float32, "vector", (8, 64), 2): {"dense": 1.0, "cpp": 2.0}})
    # Another dense weight shows which of them was read.
    module.dense = 2 * weight_OI
    assert torch.allclose(module(x_NI), 2 * linear(x_NI, weight_OI), atol=1e-5)
    if kernel.choose(module.packed, 1, has_dense=True) == "cpp":
        assert torch.allclose(module(x_NI[:1]), linear(x_NI[:1], weight_OI), atol=1e-5)


def llama(dtype=torch.float32, **config):
    """A tiny one that is 2:4 but for its head."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes | {"num_key_value_heads": 2, "max_position_embeddings": 64, **config}))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data *= 8 * mask24(module.weight.data)
    return model.to(dtype).eval()


needs_kernel = pytest.mark.skipif(
    not backends(CPU, torch.float32)["cpp"].startswith("available"), reason="there is no C++ compiler, or no AVX2"
)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_says_what_the_dense_one_says(dtype):
    model, ids = llama(dtype), torch.arange(3, 20)[None]
    with torch.no_grad():
        dense = model(ids).logits
        written = model.generate(ids, max_new_tokens=12, do_sample=False)
        report = enable_sparse24(model, min_inputs=16)
        assert sum(row.converted for row in report) == 14
        logits = model(ids).logits
        # Two layers of bfloat16 round differently; what is said is the same.
        assert torch.allclose(logits, dense, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05 * float(dense.abs().max()))
        if dtype == torch.float32:
            assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), written)
        disable_sparse24(model)
        assert torch.equal(model(ids).logits, dense)
    assert not any(isinstance(module, Linear24) for module in model.modules())


@needs_kernel
def test_the_report_says_of_every_linear_what_became_of_it():
    model = llama(intermediate_size=88, num_hidden_layers=1)
    model.model.layers[0].self_attn.q_proj.weight.data[1, 4:8] = 1
    model.model.layers[0].self_attn.k_proj.forward = model.model.layers[0].self_attn.k_proj.forward
    report = {row.name.rpartition(".")[2]: row for row in convert_model(model, min_inputs=64, strict=False)}
    assert {name for name, row in report.items() if row.converted} == {"v_proj", "o_proj", "gate_proj", "up_proj"}
    assert report["v_proj"].reason == "cpp, vector layout"
    # Half of the values, of 4 bytes, and a bit for each weight.
    assert report["v_proj"].bytes_after * 32 == report["v_proj"].bytes_before * 17
    assert "row 1, group 1" in report["q_proj"].reason
    assert "forward of its own" in report["k_proj"].reason
    assert report["down_proj"].reason == "it has 88 inputs, which is no multiple of 16"
    assert report["lm_head"].reason == "it was to be left"
    sentence = describe(list(report.values()))
    assert sentence.startswith("Of 8 linears 4 are packed 2:4 (4 by cpp, vector layout), in ")


@needs_kernel
def test_strict_conversion_names_the_linear_and_the_group_and_changes_nothing():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[5, 8:12] = 1
    said = r"model\.layers\.1\.mlp\.down_proj: The weight is not 2:4 sparse: row 5, group 2"
    with pytest.raises(ValueError, match=said):
        convert_model(model, min_inputs=16)
    with pytest.raises(LLMPruneError, match=said):
        enable_sparse24(model, min_inputs=16)
    assert not any(isinstance(module, Linear24) for module in model.modules())
    with pytest.raises(LLMPruneError, match="No linear of this model could be packed 2:4, most often because it has 64 inputs"):
        enable_sparse24(model)


@needs_kernel
def test_a_packed_model_is_neither_packed_again_nor_saved(tmp_path):
    model = llama()
    enable_sparse24(model, min_inputs=16)
    with pytest.raises(LLMPruneError, match=r"LlamaForCausalLM is packed already: disable_sparse24\(model\) first"):
        enable_sparse24(model, min_inputs=16)
    with pytest.raises(LLMPruneError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    disable_sparse24(model)
    model.save_pretrained(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


@needs_kernel
def test_a_linear_whose_dense_product_was_faster_stays_dense():
    model = llama(num_hidden_layers=1)
    kernel.record(CPU, {(torch.float32, "vector", (96, 64), 1): {"dense": 1.0, "cpp": 2.0}})
    left = [row.name.rpartition(".")[2] for row in convert_model(model, min_inputs=16) if not row.converted]
    assert left == ["gate_proj", "up_proj", "lm_head"]


@needs_kernel
def test_conv1d_is_packed_along_its_inputs():
    conv = Conv1D(24, 64)
    conv.weight.data *= mask24(conv.weight.data.T.contiguous()).T
    model, x = nn.Sequential(conv), torch.randn(3, 64)
    expected = conv(x)
    assert convert_model(model, min_inputs=16)[0].converted
    assert torch.allclose(model(x), expected, atol=1e-5)
    restore_model(model)
    assert isinstance(model[0], nn.Linear)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_bench_tunes_for_a_models_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "MOST_WEIGHTS", 1)
    save_llama(tmp_path / "model", hidden_size=32, intermediate_size=48)
    done = cli("bench", tmp_path / "model", "--tune", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert {tuple(timed["shape"]) for timed in result["times"]} == {(32, 32), (16, 32), (48, 32), (32, 48)}
    assert {timed["tokens"] for timed in result["times"]} == set(kernel.BUCKETS)
    assert len(json.loads(Path(result["file"]).read_text())) == len(result["times"])
    shown = cli("bench", tmp_path / "model", "--tune", "--device", "cpu")
    assert "32 x 48" in shown.out
    assert f"Kept in {result['file']}." in shown.out
    refused = cli("bench", tmp_path / "model", "--tune", "--tokens", "4")
    assert refused.code == 2
    assert "--tune times kernels and lets no model write: leave out --tokens." in " ".join(refused.err.split())


def test_bench_does_not_tune_what_cannot_be_packed(tmp_path):
    save_llama(tmp_path / "model", hidden_size=24, intermediate_size=40)
    refused = cli("bench", tmp_path / "model", "--tune", "--device", "cpu")
    assert refused.code == 2
    assert "has no linear with a multiple of 16 inputs" in " ".join(refused.err.split())
