"""`llmprune bench`: what is counted and how numbers hang together. Nothing here looks at how long anything takes."""

import csv
import functools
import json
import shutil
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from cutting import cut
from hand_made import make_plan
from hypothesis import given
from hypothesis import strategies as st
from in_process import llmprune as cli
from tiny import HIDDEN, LIMIT, VOCABULARY, WIDTH, build, save_llama

import llmprune
from llmprune import LLMPruneError, traffic
from llmprune import bench as bench_module
from llmprune.activation_plan import Plan
from llmprune.bench import BenchResult, bench, request
from llmprune.bench_result import spread
from llmprune.runtime.gating import apply
from llmprune.surgery import Kept
from llmprune.traffic import Probe, cache_bytes, device_name, last_level_cache, weights_read

QUICK = {"device": "cpu", "prompt": 6, "tokens": 3, "repeats": 2}
FLAGS = ("--device", "cpu", "--prompt", "6", "--tokens", "3", "--repeats", "2")
BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
# Of one block of `save_llama`'s model: q and o, k and v, gate and up and down.
LINEARS = 2 * 32 * 32 + 2 * KV_HEADS * HEAD_DIM * 32 + 3 * 48 * 32
NORMS = (2 * BLOCKS + 1) * 32


@pytest.fixture(autouse=True)
def _little_to_read(monkeypatch):
    """The probe reads kilobytes, so that tests are quick."""
    monkeypatch.setattr(traffic, "PROBE_BYTES", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr(traffic, "CACHE_FOLDS", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama of two blocks with two query heads to a KV head, without a tokenizer."""
    return save_llama(tmp_path_factory.mktemp("models") / "small", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "half"
    llmprune.prune(str(tiny), method="magnitude", output=out)
    return out


def run(model, *, say=lambda line: None, **options):
    return bench(request(model=str(model), **QUICK | options), say=say, quiet=True)


def heard(model, **options):
    """The results, and what was said."""
    lines = []
    return run(model, say=lines.append, **options), lines


# The bytes model, counted by hand.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_read_once_and_of_the_embedding_one_row(tmp_path, tied, dtype):
    save_llama(tmp_path, num_hidden_layers=BLOCKS, tie_word_embeddings=tied, dtype=dtype)
    found = weights_read(llmprune.load(tmp_path, device="cpu"))
    size = dtype.itemsize
    assert (found.linears, found.head, found.other) == (BLOCKS * LINEARS * size, 61 * 32 * size, (NORMS + 32) * size)
    assert found.total == found.linears + found.head + found.other


def test_biases_and_learned_positions_are_counted(tmp_path):
    model = llmprune.load(build("gpt2", tmp_path), device="cpu")
    found = weights_read(model)
    biases = 3 * (3 * WIDTH + WIDTH + HIDDEN + WIDTH)
    norms = (2 * 3 + 1) * 2 * WIDTH
    assert found.linears == 4 * 3 * (3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    assert found.head == 4 * VOCABULARY * WIDTH
    assert found.other == 4 * (biases + norms + 2 * WIDTH)


def test_a_gated_linear_counts_by_the_share_that_is_read(small):
    model = llmprune.load(small, device="cpu")
    active = {"model.layers.0.mlp.down_proj": 0.25, "model.layers.1.self_attn.k_proj": 0.0}
    missing = 4 * (0.75 * 48 * 32 + KV_HEADS * HEAD_DIM * 32)
    assert weights_read(model, active).total == weights_read(model).total - missing


def test_the_cache_counts_keys_and_values_of_kv_heads_at_the_mean_context(small):
    (result,) = run(small, prompt=9, tokens=4)
    # Written tokens see 10, 11, 12 and 13.
    assert result.context == 11.5
    assert result.bytes_cache == 2 * BLOCKS * KV_HEADS * HEAD_DIM * 4 * 11.5


def test_a_sliding_window_bounds_the_cache(tmp_path):
    build("mistral", tmp_path)
    short, long = (run(tmp_path, prompt=prompt)[0].bytes_cache for prompt in (10, 40))
    assert short == long


def test_a_shrunk_model_reads_the_widths_that_it_has(tiny, tmp_path):
    kept = [Kept(tuple(range(20)), (0, 1, 2)), Kept((), (0, 1, 2)), Kept(tuple(range(52)), ())]
    cut(tiny, kept, tmp_path)
    (result,) = run(tmp_path, baseline="none")
    attention = WIDTH * (36 + 2 * 12 + 36)
    assert result.bytes_linears == 4 * (2 * attention + 3 * WIDTH * (20 + 52))
    # The block without attention has no keys to read, only a placeholder in the cache.
    assert result.bytes_cache == 2 * 2 * 12 * 4 * result.context


def test_zeros_in_place_are_read_like_any_weight(tiny, pruned):
    dense, masked = run(pruned)
    assert masked.bytes_per_token == dense.bytes_per_token
    assert masked.predicted_speedup == 1


def test_cache_bytes_counts_what_a_cache_holds(small):
    model = llmprune.load(small, device="cpu")
    cache = model(torch.zeros(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    assert cache_bytes(cache, model) == 2 * BLOCKS * KV_HEADS * HEAD_DIM * 4 * 7


# How results hang together.


def test_rates_floors_and_speedups_follow_from_seconds_and_bytes(tiny, small):
    results = run(small, baseline=str(tiny), against=[str(small)], repeats=3)
    assert [result.role for result in results] == ["baseline", "model", "against"]
    base = results[0]
    for each in results:
        parts = (each.bytes_linears, each.bytes_head, each.bytes_other, each.bytes_gates, each.bytes_cache)
        assert each.bytes_per_token == sum(parts)
        assert len(each.decode_seconds) == len(each.prefill_seconds) == 3
        assert each.decode_tokens_per_second == pytest.approx(1 / np.median(each.decode_seconds))
        assert each.decode_tokens_per_second_low <= each.decode_tokens_per_second <= each.decode_tokens_per_second_high
        assert each.prefill_tokens_per_second == pytest.approx(6 / np.median(each.prefill_seconds))
        assert each.gb_per_second == pytest.approx(each.bytes_per_token * each.decode_tokens_per_second / 1e9)
        assert each.floor_tokens_per_second == pytest.approx(each.bandwidth_gb_per_second * 1e9 / each.bytes_per_token)
        assert each.share_of_floor == pytest.approx(each.gb_per_second / each.bandwidth_gb_per_second)
        ratios = np.array(base.decode_seconds) / np.array(each.decode_seconds)
        quartiles = np.percentile(ratios, [25, 50, 75])
        assert (each.speedup_low, each.speedup, each.speedup_high) == pytest.approx(tuple(quartiles))
        assert each.predicted_speedup == pytest.approx(base.bytes_per_token / each.bytes_per_token)
        assert each.active is None
    assert base.speedup == base.predicted_speedup == base.prefill_speedup == 1
    assert len({(each.time, each.bandwidth_gb_per_second, each.device_name, each.threads) for each in results}) == 1


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_spread_is_the_quartiles(values):
    assert tuple(spread(values)) == pytest.approx(tuple(np.percentile(values, [25, 50, 75])))


def test_what_is_timed_writes_what_generate_writes(tiny):
    model = llmprune.load(tiny, device="cpu")
    ids_1T = torch.arange(5, 15).unsqueeze(0)
    cache, next_11 = bench_module._prefill(model, ids_1T)
    written = [int(next_11)]
    for _ in range(7):
        next_11 = bench_module._step(model, next_11, cache)
        written.append(int(next_11))
    expected = model.generate(ids_1T, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    assert written == expected[0, 10:].tolist()


def test_models_take_turns_and_another_begins_every_round(tiny, small, monkeypatch):
    order = []
    measure = bench_module._Contender.measure
    monkeypatch.setattr(
        bench_module._Contender, "measure", lambda self, tokens: order.append(self.entry.role) or measure(self, tokens)
    )
    run(small, baseline=str(tiny), against=[str(tiny)], repeats=4)
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert rounds == [
        ["baseline", "model", "against"],
        ["model", "against", "baseline"],
        ["against", "baseline", "model"],
        ["baseline", "model", "against"],
    ]


def test_without_prefill_the_prompt_is_read_once_and_decoding_starts_from_it_every_round(small, monkeypatch):
    lengths = []
    step = bench_module._step
    monkeypatch.setattr(
        bench_module,
        "_step",
        lambda model, ids_11, cache: lengths.append((int(ids_11), cache.get_seq_length())) or step(model, ids_11, cache),
    )
    monkeypatch.setattr(bench_module, "_prefill", lambda model, ids_1T, once=[bench_module._prefill]: once.pop()(model, ids_1T))
    (result,) = run(small, prefill=False)
    assert result.prefill_tokens_per_second is result.prefill_speedup is None
    assert result.prefill_seconds == []
    warm_up, *rounds = lengths[0:3], lengths[3:6], lengths[6:9]
    assert [length for _, length in warm_up] == [6, 7, 8]
    assert rounds == [warm_up, warm_up]


def test_the_prompt_is_text_where_there_is_a_tokenizer(stories260k, small):
    (result,), lines = heard(stories260k)
    assert not any("random" in note for note in result.notes)
    (result,), lines = heard(small)
    assert sum("random tokens" in line for line in lines) == sum("random tokens" in note for note in result.notes) == 1


def test_a_model_that_fits_in_the_last_cache_is_said_to(small, monkeypatch):
    whole = weights_read(llmprune.load(small, device="cpu")).total
    for size, inside in ((whole, True), (whole - 1, False)):
        monkeypatch.setattr(bench_module, "last_level_cache", lambda device, size=size: size)
        (result,) = run(small)
        assert result.in_cache is inside
        assert any("last-level cache" in note for note in result.notes) is inside
    monkeypatch.setattr(bench_module, "last_level_cache", lambda device: None)
    assert run(small)[0].in_cache is None


def test_a_processor_that_others_had_too_is_told_of(small, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1
        return now[0]

    monkeypatch.setattr(bench_module.time, "perf_counter", tick)
    for used, told in ((0.5, True), (1.0, False), (2.0, False)):
        monkeypatch.setattr(bench_module.time, "process_time", lambda used=used: used * now[0])
        (result,) = run(small, repeats=6)
        assert any("other processes" in note for note in result.notes) is told


def test_the_machine_is_described():
    cpu = torch.device("cpu")
    assert device_name(cpu)
    assert (last_level_cache(cpu) or 1) > 0
    probe = Probe(cpu)
    probe.measure()
    assert len(probe.rates) == 1
    assert probe.rates[0] > 0
    assert "1 MiB" in probe.description


@pytest.mark.parametrize("variant", ["llama_tied", "qwen3", "gemma3_text", "phi3", "opt", "gpt_neox"])
def test_every_family_is_measured(variant, tmp_path):
    (result,) = run(build(variant, tmp_path))
    assert result.decode_tokens_per_second > 0
    assert result.method is result.pattern is result.sparsity is None


@pytest.mark.needs_cuda
def test_on_a_gpu_the_same_bytes_are_counted(small):
    (cpu,), (gpu,) = run(small), run(small, device="cuda")
    assert gpu.bytes_per_token == cpu.bytes_per_token
    assert gpu.device_name == torch.cuda.get_device_name()


# Gates.


@pytest.fixture(scope="module")
def gated(tiny, tmp_path_factory):
    return with_plan(tiny, tmp_path_factory.mktemp("gated") / "half")


def with_plan(source, folder, **options):
    """A copy of a model with a plan of gates beside its weights."""
    shutil.copytree(source, folder)
    make_plan(llmprune.load(source, device="cpu"), **options).save(folder)
    return folder


@pytest.mark.parametrize("rotate", [False, True])
def test_a_gated_model_reads_less_than_the_same_weights_without_gates(tiny, tmp_path, rotate):
    results = run(with_plan(tiny, tmp_path / "half", rotate=rotate), backend="bag")
    dense, half = results
    assert [(each.role, each.backend) for each in results] == [("baseline", None), ("model", "bag")]
    assert dense.name == "half without gates"
    assert dense.active is None
    assert 0.2 < half.active < 0.8
    # Every linear of the blocks is gated, by threshold in float32 or a rotation of what three of them read.
    assert half.bytes_linears == pytest.approx(half.active * dense.bytes_linears)
    inputs = 6 * WIDTH + HIDDEN
    assert half.bytes_gates == 3 * 4 * (inputs + WIDTH * WIDTH * rotate)
    assert (half.bytes_head, half.bytes_other, half.bytes_cache) == (dense.bytes_head, dense.bytes_other, dense.bytes_cache)
    assert half.predicted_speedup == dense.bytes_per_token / half.bytes_per_token


def test_what_is_counted_active_is_what_hooks_see(gated):
    """The kept inputs of every linear, counted again by hand while the same tokens are written."""
    (result,) = run(gated, baseline="none", backend="bag")
    plan = Plan.load(gated)
    model = llmprune.load(gated, device="cpu", gated=False)
    apply(model, plan, backend="bag")
    ids_1T = bench_module._prompt(gated, model, 6)
    cache, next_11 = bench_module._prefill(model, ids_1T)
    read, whole = 0, 0

    def count(gate, module, args):
        nonlocal read, whole
        read += int((args[0].abs() > gate.tau_I).sum()) * gate.shape[0]
        whole += gate.numel

    for gate in plan.gates.values():
        model.get_submodule(gate.name).register_forward_pre_hook(functools.partial(count, gate))
    for _ in range(3):
        next_11 = bench_module._step(model, next_11, cache)
    assert result.active == pytest.approx(read / whole)


@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_backends_that_read_everything_are_counted_so(gated, backend):
    dense, half = run(gated, backend=backend)
    assert half.backend == backend
    assert half.bytes_per_token == dense.bytes_per_token
    assert half.predicted_speedup == 1


def test_plans_are_measured_against_each_other(tiny, gated, tmp_path):
    most = with_plan(tiny, tmp_path / "most", sparsity=0.8)
    results = run(gated, against=[str(most)], backend="bag")
    assert [each.name for each in results] == ["half without gates", "half", "most"]
    dense, half, less = (each.bytes_per_token for each in results)
    assert less < half < dense
    assert results[0].speedup == 1


def test_the_share_that_is_read_is_shown(gated):
    outcome = cli("bench", gated, *FLAGS, "--backend", "bag")
    assert outcome.code == 0
    assert "% of the gated weights read, by bag" in outcome.out


def test_a_backend_without_gates_is_said_to_do_nothing(small):
    _, lines = heard(small, backend="bag")
    assert sum("--backend had no effect" in line for line in lines) == 1


def test_a_backend_that_does_not_run_is_one_sentence(gated):
    assert_refused(cli("bench", gated, *FLAGS, "--backend", "abacus"), "abacus")
    if not torch.cuda.is_available():
        assert_refused(cli("bench", gated, *FLAGS, "--backend", "triton"), "triton")


# Baselines.


def test_the_baseline_is_the_dense_model_of_the_record(tiny, pruned):
    results, lines = heard(pruned)
    assert [(each.role, each.name) for each in results] == [("baseline", "tiny"), ("model", "half")]
    assert (results[1].method, results[1].pattern, results[1].sparsity) == ("magnitude", "unstructured", 0.5)
    assert any("is the baseline" in line for line in lines)
    assert [each.role for each in run(pruned, baseline="none")] == ["model"]


def test_without_the_dense_model_one_line_says_so(tmp_path):
    dense = build("llama", tmp_path / "dense")
    llmprune.prune(str(dense), method="magnitude", output=tmp_path / "half")
    build("llama_tied", dense)
    (result,), lines = heard(tmp_path / "half")
    assert result.speedup is result.predicted_speedup is None
    assert sum("is not the model that half was made from" in line for line in lines) == 1
    shutil.rmtree(dense)
    (result,), lines = heard(tmp_path / "half")
    assert result.speedup is None
    assert sum("not on this machine" in line for line in lines) == 1


def test_all_models_run_in_the_dtype_of_the_first(tiny, tmp_path):
    build("llama", tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in run(tmp_path, baseline=str(tiny))} == {"bfloat16"}
    assert {each.dtype for each in run(tmp_path, baseline=str(tiny), dtype="float32")} == {"float32"}


# The command and its files.


def test_json_is_all_that_is_printed_and_has_the_fields_of_a_result(small):
    outcome = cli("bench", small, *FLAGS, "--json")
    assert outcome.code == 0
    (row,) = json.loads(outcome.out)
    assert list(row) == [each.name for each in fields(BenchResult)]
    assert (row["prompt_tokens"], row["new_tokens"], row["repeats"], row["batch"]) == (6, 3, 2, 1)


def test_the_table_shows_every_model_and_the_machine(pruned):
    outcome = cli("bench", pruned, *FLAGS)
    assert outcome.code == 0
    for word in ("tiny", "half", "speed-up", "floor", "GB/s", "float32", device_name(torch.device("cpu")), "2 rounds"):
        assert word in outcome.out
    assert cli("bench", pruned, *FLAGS, "-q").out == ""


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_results_of_several_runs_are_pooled_in_one_file(small, tmp_path, kind):
    file = tmp_path / f"speeds.{kind}"
    for model in ("first", "second"):
        shutil.copytree(small, tmp_path / model)
        assert cli("bench", tmp_path / model, *FLAGS, "--output", file, "-q").code == 0
    text = file.read_text()
    rows = list(csv.DictReader(text.splitlines())) if kind == "csv" else json.loads(text)
    assert [row["name"] for row in rows] == ["first", "second"]
    assert all(list(row) == [each.name for each in fields(BenchResult)] for row in rows)
    assert all(row["device_name"] for row in rows)
    seconds = rows[0]["decode_seconds"]
    assert len(seconds.split() if kind == "csv" else seconds) == 2


def test_results_survive_the_way_through_json(small, tmp_path):
    file = tmp_path / "speeds.json"
    (result,) = run(small, output=file)
    assert json.loads(file.read_text()) == [asdict(result)]


def test_a_pruned_directory_is_left_as_it_was(pruned):
    before = {path: path.read_bytes() for path in sorted(pruned.rglob("*")) if path.is_file()}
    run(pruned)
    assert {path: path.read_bytes() for path in sorted(pruned.rglob("*")) if path.is_file()} == before


def test_the_prompt_is_as_long_as_the_model_takes(tiny):
    (result,) = run(tiny, prompt=None, tokens=4)
    assert (result.prompt_tokens, result.new_tokens) == (LIMIT - 4, 4)


def assert_refused(outcome, *words):
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "0"], ["tokens", "'0'"]),
        (["--tokens", "many"], ["tokens", "'many'"]),
        (["--prompt", "0"], ["prompt", "'0'"]),
        (["--repeats", "-1"], ["repeats"]),
        (["--prompt", "62", "--tokens", "3"], ["62", "64", "tiny"]),
        (["--tokens", "64"], ["64", "tiny"]),
        (["--dtype", "int8"], ["dtype", "int8"]),
        (["--device", "tpu"], ["tpu"]),
        (["--against", "nowhere"], ["nowhere"]),
        (["--baseline", "nowhere"], ["nowhere"]),
        (["--output", "speeds.txt"], [".csv or .json"]),
        (["--output", "nowhere/speeds.csv"], ["nowhere"]),
    ],
)
def test_bad_options_are_one_sentence(tiny, flags, words):
    assert_refused(cli("bench", tiny, "--device", "cpu", *flags), *words)


def test_a_directory_that_is_no_model_is_one_sentence(tmp_path):
    assert_refused(cli("bench", tmp_path), "config.json")
    assert_refused(cli("bench", tmp_path / "nothing"), "nothing")


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "name,speed\nx,1\n"), ("a.json", "{}"), ("b.json", "[1]"), ("c.json", "]")]
)
def test_a_file_of_something_else_is_refused_and_kept(small, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert_refused(cli("bench", small, *FLAGS, "--output", tmp_path / name), name)
    assert (tmp_path / name).read_text() == text


def test_models_that_do_not_fit_together_are_refused(small, monkeypatch):
    monkeypatch.setattr(bench_module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(LLMPruneError, match="2 models"):
        run(small, against=[str(small)])


def test_an_interrupted_run_leaves_nothing(small, tmp_path, monkeypatch):
    def interrupt(self, tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module._Contender, "measure", interrupt)
    outcome = cli("bench", small, *FLAGS, "--output", tmp_path / "speeds.csv")
    assert outcome.code == 130
    assert "Interrupted" in outcome.err
    assert not list(tmp_path.iterdir())
