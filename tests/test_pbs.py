"""Block-sparse attention in models: exact at a threshold of one, and plain sdpa wherever the method is not for it."""

import copy
import warnings

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

import llmprune.kernels.pbs_attention as kernel
from llmprune.errors import LLMPruneError
from llmprune.runtime import disable_pbs, enable_pbs
from llmprune.runtime.pbs import pbs_of
from llmprune.runtime.pbs_report import write_pbs_report

SMALL = {"block": 4, "segment": 8, "min_length": 0}
TOKENS = 45


def build(variant="llama", **options):
    """A random model whose attention is far from even."""
    model_type, config = tiny.VARIANTS[variant]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@pytest.fixture
def model():
    return build()


def ids(batch=2, tokens=TOKENS):
    return torch.randint(3, 259, (batch, tokens), generator=torch.Generator().manual_seed(1))


def run(model, *args, **options):
    with torch.no_grad():
        return model(*args, **options).logits


def close(logits, expected):
    return torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "opt", "gpt_neox"])
def test_at_a_threshold_of_one_logits_are_those_of_sdpa(variant, share_heads):
    model = build(variant)
    expected = run(model, ids())
    pbs = enable_pbs(model, threshold=1, share_heads=share_heads, **SMALL)
    with pbs.collecting() as seen:
        assert close(run(model, ids()), expected)
    assert len(seen.heads()) == 9
    assert not seen.fallbacks


@pytest.mark.parametrize("scores", ["mean", "antidiagonal"])
def test_below_one_every_layer_computes_the_reference(model, scores, monkeypatch):
    full = run(model, ids())
    enable_pbs(model, threshold=0.3, block=8, segment=8, min_length=0, scores=scores)
    logits = run(model, ids())
    monkeypatch.setattr(kernel, "attend", lambda *args, backend, **options: kernel.reference(*args, **options))
    assert close(logits, run(model, ids()))
    assert not close(logits, full)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_at_a_threshold_of_one_generation_is_the_same_token_by_token(model, cache):
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    expected = model.generate(ids(), **options)
    pbs = enable_pbs(model, threshold=1, **SMALL)
    with pbs.collecting() as seen:
        assert torch.equal(model.generate(ids(), **options), expected)
    assert seen.whole().tokens == TOKENS
    if cache == "dynamic":
        assert seen.fallbacks == {"decoding": 3 * 11}


def test_a_padded_batch_runs_on_sdpa(model):
    mask = torch.ones_like(ids())
    mask[0, :5] = 0
    expected = run(model, ids(), attention_mask=mask)
    pbs = enable_pbs(model, threshold=0.3, **SMALL)
    with pbs.collecting() as seen:
        assert torch.equal(run(model, ids(), attention_mask=mask), expected)
    assert seen.fallbacks == {"padding or another mask": 3}
    with pbs.collecting() as seen:
        assert not torch.equal(run(model, ids(), attention_mask=torch.ones_like(ids())), expected)
    assert not seen.fallbacks


def test_later_parts_of_a_prompt_run_on_sdpa(model):
    def parts():
        cache = DynamicCache(config=model.config)
        return [run(model, ids()[:, part], past_key_values=cache) for part in (slice(0, 8), slice(8, 25), slice(25, 45))]

    expected = parts()
    pbs = enable_pbs(model, threshold=0.3, **SMALL)
    with pbs.collecting() as seen:
        assert all(torch.equal(*pair) for pair in zip(parts(), expected, strict=True))
    assert seen.fallbacks == {"short prompt": 3, "part of a prompt": 6}


@pytest.mark.parametrize(
    ("variant", "fallbacks"), [("mistral", 3), ("qwen3", 2), ("gemma3_text", 2)], ids=["mistral", "qwen3", "gemma3"]
)
def test_layers_with_a_sliding_window_run_on_sdpa(variant, fallbacks):
    model = build(variant)
    expected = run(model, ids())
    pbs = enable_pbs(model, threshold=0.3, **SMALL, skip_layers=[1])
    with pbs.collecting() as seen:
        assert torch.equal(run(model, ids()), expected)
    assert seen.fallbacks["skipped layer"] == 3 - fallbacks
    disable_pbs(model)
    pbs = enable_pbs(model, threshold=1, **SMALL)
    with pbs.collecting() as seen:
        assert close(run(model, ids()), expected)
    assert {each.layer for each in seen.heads()} == ({1} if fallbacks == 2 else set())


def test_soft_capped_scores_run_on_the_models_own_attention():
    eager, named = build("gemma2"), build("gemma2", attn_implementation="llmprune_pbs")
    assert eager.config._attn_implementation == "eager"
    mask = torch.ones_like(ids())
    mask[0, :5] = 0
    for given in (mask, None):
        logits = run(named, ids(), attention_mask=given)
        assert torch.equal(logits[:, 5:], run(eager, ids(), attention_mask=given)[:, 5:])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(named.generate(ids(), **options), eager.generate(ids(), **options))


def test_a_forward_whose_gradients_are_recorded_says_once_that_it_is_dense(model):
    expected = run(model, ids())
    enable_pbs(model, threshold=0.3, **SMALL)
    with pytest.warns(UserWarning, match=r"call the model under torch\.no_grad\(\)"):
        logits = model(ids()).logits
    assert close(logits, expected)
    with warnings.catch_warnings(action="error"):
        model(ids())


def test_short_prompts_and_skipped_layers_keep_full_attention(model):
    expected = run(model, ids())
    pbs = enable_pbs(model, threshold=0.3)
    with pbs.collecting() as seen:
        assert torch.equal(run(model, ids()), expected)
    assert seen.fallbacks == {"short prompt": 3}
    assert seen.whole() is None
    disable_pbs(model)
    pbs = enable_pbs(model, threshold=0.3, **SMALL, skip_layers=[0, 2])
    with pbs.collecting() as seen:
        run(model, ids())
    assert {each.layer for each in seen.heads()} == {1}


def test_whoever_wants_gradients_gets_those_of_sdpa(model):
    def gradient():
        model.zero_grad()
        model(ids(), labels=ids()).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    enable_pbs(model, threshold=0.3, **SMALL)
    assert torch.equal(gradient(), expected)


def test_a_model_can_be_loaded_with_the_attentions_name():
    named = build(attn_implementation="llmprune_pbs")
    assert torch.equal(run(named, ids()), run(build(), ids()))
    assert pbs_of(named) is None


def test_disabled_a_model_is_what_it_was(model, tmp_path):
    expected = run(model, ids())
    enable_pbs(model, threshold=0.3, **SMALL)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    assert "llmprune_pbs" not in (tmp_path / "config.json").read_text()
    disable_pbs(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(run(model, ids()), expected)
    assert not torch.equal(run(twin, ids()), expected)
    disable_pbs(model)
    enable_pbs(model, threshold=1, **SMALL)
    with pytest.raises(LLMPruneError, match="has PBS already"):
        enable_pbs(model)


def test_statistics_tell_what_was_read(model):
    pbs = enable_pbs(model, threshold=0.3, **SMALL)
    with pbs.collecting(head=(1, 2)) as seen:
        run(model, ids(1))
    whole, heads = seen.whole(), seen.heads()
    assert [(each.layer, each.head) for each in heads] == [(layer, head) for layer in range(3) for head in range(3)]
    assert whole.causal_blocks == 78
    (one,) = (each for each in heads if (each.layer, each.head) == (1, 2))
    assert (seen.map.layer, seen.map.head) == (1, 2)
    assert int(seen.map.sorted_TT.sum()) == one.blocks == one.density * 78
    assert int(seen.map.unsorted_TT.sum()) == one.unsorted_blocks
    assert whole.blocks == sum(each.blocks for each in heads) / 9
    assert 0.3 < whole.covered < 1
    with pbs.collecting() as seen:
        run(model, ids(1))
    assert seen.map.saved == max(each.unsorted_blocks - each.blocks for each in heads)


def test_the_report_shows_the_numbers_and_a_heads_map(model, tmp_path):
    pbs = enable_pbs(model, threshold=0.3, **SMALL)
    with pbs.collecting() as seen:
        with pytest.raises(LLMPruneError, match="there was none"):
            write_pbs_report(seen, tmp_path / "page.html")
        run(model, ids(1, 7))
        with pytest.raises(LLMPruneError, match="short prompt"):
            write_pbs_report(seen, tmp_path / "page.html")
        run(model, ids(1))
    page = write_pbs_report(seen, tmp_path / "page.html").read_text()
    whole = seen.whole()
    for text in (f"{whole.density:.1%}", f"{whole.covered:.2%}", f"{whole.speedup:.2f}×", "short prompt: 3"):
        assert text in page
    assert f"{int(seen.map.sorted_TT.sum())} of 78" in page
    assert {file.name for file in (tmp_path / "page").iterdir()} == {"map.png", "density.png"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.0}, r"threshold is 0\.0"),
        ({"block": 100}, "whole blocks of 100"),
        ({"backend": "magic"}, "Unknown backend 'magic'"),
        ({"skip_layers": [1, 3]}, "no layer 3 to skip: LlamaForCausalLM has the layers 0 to 2"),
    ],
)
def test_options_that_cannot_be_are_refused_and_change_nothing(model, options, words):
    with pytest.raises(LLMPruneError, match=words):
        enable_pbs(model, **options)
    assert model.config._attn_implementation == "sdpa"
    assert pbs_of(model) is None


def test_models_that_cannot_run_on_sdpa_are_refused_unchanged(model):
    class Other(LlamaForCausalLM):
        _supports_sdpa = False

    other = Other._from_config(model.config, attn_implementation="eager")
    for refused in (other, torch.nn.Linear(3, 3)):
        with pytest.raises(LLMPruneError, match="can run on sdpa attention"):
            enable_pbs(refused)
    assert other.config._attn_implementation == "eager"
