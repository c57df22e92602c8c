"""Laws of llmprune.sampling, on a trained model of 260,032 parameters."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmprune import sampling
from llmprune.errors import LLMPruneError
from llmprune.sampling import sample_from_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where own text is cached. One thread: for a tiny model more of them cost time on a busy machine."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "cache" / "self"
    torch.set_num_threads(threads)


def write_own(model_dir: Path, *, samples: int = 3, seqlen: int = 12, seed: int = 0) -> torch.Tensor:
    return sample_from_model(
        model_dir, samples, seqlen, seed, model_key=str(model_dir), device="cpu", dtype=torch.float32, quiet=True
    )


def test_the_model_writes_the_same_text_for_a_seed_and_leaves_the_generator_alone(stories260k: Path, cache: Path) -> None:
    state = torch.random.get_rng_state()
    first, other = write_own(stories260k), write_own(stories260k, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for file in cache.iterdir():
        file.unlink()
    torch.manual_seed(99)
    assert torch.equal(write_own(stories260k), first)
    assert not torch.equal(first, other)
    assert first.shape == (3, 12)
    assert (first[:, 0] == 1).all()


def test_the_models_generation_settings_neither_cut_nor_bend_its_text(stories260k: Path, cache: Path, tmp_path: Path) -> None:
    bent = tmp_path / "bent"
    bent.mkdir()
    for file in stories260k.iterdir():
        (bent / file.name).write_bytes(file.read_bytes())
    leaks = {"temperature": 0.1, "top_p": 0.5, "top_k": 2, "repetition_penalty": 9.0, "max_length": 5, "do_sample": True}
    everything_ends = {"bos_token_id": 1, "eos_token_id": list(range(512)), "suppress_tokens": list(range(300))}
    (bent / "generation_config.json").write_text(json.dumps(leaks | everything_ends))
    assert torch.equal(write_own(bent), write_own(stories260k))


def test_own_text_is_cached_and_a_corrupt_cache_is_made_again(
    stories260k: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_own(stories260k)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    for corrupt in (b"", good[:-7]):
        file.write_bytes(corrupt)
        assert torch.equal(write_own(stories260k), first)
        assert file.read_bytes() == good
    save_file({"input_ids": first[:2]}, file)
    assert torch.equal(write_own(stories260k), first)

    monkeypatch.setattr(sampling, "_generate", lambda *_, **__: pytest.fail("sampled again"))
    assert torch.equal(write_own(stories260k), first)
    assert list(cache.iterdir()) == [file]


def test_more_samples_than_a_batch_are_all_written(stories260k: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SAMPLING_BATCH", 4)
    ids_NT = write_own(stories260k, samples=10, seqlen=24)
    assert ids_NT.shape == (10, 24)
    assert len({tuple(row) for row in ids_NT.tolist()}) == 10


def test_a_model_without_bos_and_eos_starts_from_seeded_ids() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def starts(seed: int, **special: int | list[int] | None) -> list[int]:
        config = LlamaConfig(
            vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, **special
        )
        return sampling._start_ids(LlamaForCausalLM(config), 4, seed).flatten().tolist()

    assert starts(0, bos_token_id=5, eos_token_id=6) == [5] * 4
    assert starts(0, bos_token_id=None, eos_token_id=[6, 7]) == [6] * 4
    neither = starts(0, bos_token_id=None, eos_token_id=None)
    assert len(set(neither)) > 1
    assert neither == starts(0, bos_token_id=None, eos_token_id=None) != starts(1, bos_token_id=None, eos_token_id=None)


def test_an_unwritable_cache_is_refused_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LLMPruneError, match="set LLMPRUNE_CACHE"):
        write_own(tmp_path / "no model")
