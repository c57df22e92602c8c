"""How much faster a model is that lost half of its FFN channels, beside what its shapes predict.

    python evals/bench/bench_structured_speed.py [PERCENT ...]

SmolLM2 in float32 on the CPU, dense and with PERCENT of the FFN channels of every block removed, in turn in one process.
Prefill: one sequence of 512 tokens, logits of the last; predicted by floating point operations. Decode: single tokens after 64,
with a key-value cache; predicted by the bytes of weights that a token reads. Medians over rounds, and quartiles of the ratio.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import save, smollm2

import llmprune

ROUNDS, PREFILL, PROMPT, STEPS = 15, 512, 64, 16


def main() -> None:
    percents = [int(arg) for arg in sys.argv[1:]] or [50, 25]
    source = smollm2()
    dense = llmprune.load(source, device="cpu", dtype="float32")
    rows = []
    for percent in percents:
        with tempfile.TemporaryDirectory() as folder:
            result = llmprune.prune(
                str(source),
                method="cfsp",
                allocation="uniform",
                metric="magnitude",  # which channels go changes no speed
                sparsity=percent / 100,
                calibration="random",
                samples=1,
                seqlen=64,
                output=f"{folder}/out",
            )
            pruned = llmprune.load(Path(result.directory), device="cpu", dtype="float32")
        ids_1T = torch.randint(0, dense.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
        for kind, run, predicted in (
            ("prefill", lambda model, ids=ids_1T: prefill(model, ids), flops(dense) / flops(pruned)),
            ("decode", lambda model, ids=ids_1T: decode(model, ids), read_bytes(dense) / read_bytes(pruned)),
        ):
            ratio, quartiles, seconds = compare(run, dense, pruned)
            rows.append(
                {
                    "ffn removed, %": percent,
                    "what": kind,
                    "dense, s": round(seconds[0], 4),
                    "pruned, s": round(seconds[1], 4),
                    "speed-up": round(ratio, 3),
                    "quartiles": f"{quartiles[0]:.3f} to {quartiles[1]:.3f}",
                    "predicted": round(predicted, 3),
                    "of predicted": round(ratio / predicted, 3),
                }
            )
    save("structured_speed", rows)


def prefill(model: torch.nn.Module, ids_1T: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids_1T, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


def decode(model: torch.nn.Module, ids_1T: torch.Tensor) -> float:
    """Seconds per token."""
    cache = model(input_ids=ids_1T[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
    start = time.perf_counter()
    for step in range(PROMPT, PROMPT + STEPS):
        model(input_ids=ids_1T[:, step : step + 1], past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / STEPS


def compare(
    run: Callable[[torch.nn.Module], float], dense: torch.nn.Module, pruned: torch.nn.Module
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """The median speed-up, its quartiles, and the median seconds of both."""
    with torch.no_grad():
        run(dense), run(pruned)
        pairs = [(run(dense), run(pruned)) for _ in range(ROUNDS)]
    ratios = [first / second for first, second in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (low, high), tuple(statistics.median(each) for each in zip(*pairs, strict=True))  # type: ignore[return-value]


def block_weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "layers" in name and parameter.ndim > 1)


def flops(model: torch.nn.Module) -> float:
    """Of a prefill: products with the blocks' weights, causal attention's two products, and one token's logits."""
    config = model.config
    attention = 2 * 2 * PREFILL**2 / 2 * config.hidden_size * config.num_hidden_layers
    return 2 * PREFILL * block_weights(model) + attention + 2 * config.hidden_size * config.vocab_size


def read_bytes(model: torch.nn.Module) -> float:
    """Of a decoded token: every weight of the blocks and of the head once, the cache of keys and values besides."""
    config = model.config
    heads = config.num_key_value_heads * config.head_dim
    cache = 2 * (PROMPT + STEPS / 2) * heads * config.num_hidden_layers
    return 4 * (block_weights(model) + config.hidden_size * config.vocab_size + cache)


if __name__ == "__main__":
    main()
