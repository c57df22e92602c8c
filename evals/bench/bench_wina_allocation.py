"""Allocations of activation sparsity within a block of SmolLM2: what its output loses, and what deciding takes.

    LLMPRUNE_DATA=... python evals/bench/bench_wina_allocation.py [BLOCK ...]

Calibration: 16 samples x 512 tokens of wikitext-2 validation (recorded ids) for the histograms, the first 4 of them for trials;
`fresh_error` is on 4 more samples. Errors are ||gated block - block|| / ||block - its input|| over the
last quarter of positions. `every-step` is greedy that looks at every unit before every step, as TEAL's and WINA's code does.
Blocks: by default every seventh and the last; one takes some minutes.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from common import data_dir, save, smollm2

from llmprune.activation_allocation import GRID, Unit, closed_form, from_table, greedy, greedy_path, on_path
from llmprune.calibration import calibration_set
from llmprune.gating_scores import Curve, ScoreHistogram
from llmprune.gating_trial import Trial, trial_stream
from llmprune.methods import wina
from llmprune.models import Skeleton, load_tokenizer
from llmprune.stream import Block, Stream

SAMPLES, FRESH, SEQLEN = 16, 4, 512
SPARSITIES = (0.25, 0.5, 0.65)

Shares = Callable[[float], Sequence[float]]


def main() -> None:
    data, model = data_dir(), smollm2()
    skeleton, tokenizer = Skeleton(model), load_tokenizer(model)
    source = str(data / "golden" / "calibration_ids.parquet")
    tokens = calibration_set(
        source, tokenizer, vocab_size=skeleton.vocab_size, samples=SAMPLES + FRESH, seqlen=SEQLEN, seed=0, sampler=None
    )
    last = len(skeleton.blocks) - 1
    wanted = sorted({int(arg) for arg in sys.argv[1:]} or {*range(0, last, 7), last})
    stream = Stream(skeleton, tokens.ids_NT[:SAMPLES], propagate="dense")
    stream.calibration_NT = stream.ids_NT
    samples, fresh = trial_stream(stream), Stream(skeleton, tokens.ids_NT[SAMPLES:], micro_batch=FRESH, propagate="dense")
    for each in (samples, fresh):
        each.capture()
    rows: list[dict[str, object]] = []
    for block in stream.blocks():
        if block.index in wanted:
            rows += measured(block, samples, fresh)
            save("wina_allocation", rows)
        if block.index >= wanted[-1]:
            break
        for each in (samples, fresh):
            each.finish_forward(block.index, 0, each.forward(block.index, 0))


def measured(block: Block, samples: Stream, fresh: Stream) -> list[dict[str, object]]:
    """A row for every allocation and sparsity of a block."""
    groups = wina.groups_of(block, {}, score="wina", share=False)
    norms = {group.name: group.norm_I for group in groups}
    seen = {
        linear.name: statistic.counts
        for linear, statistic in block.observe_each(
            lambda linear: ScoreHistogram(linear.shape[1], linear.parameter.device, norms[linear.name])
        )
    }
    units = [Unit(group.linears[0].shape[0], len(group.norm_I), Curve(seen[group.name])) for group in groups]
    sizes = [unit.size for unit in units]
    trial, other = Trial(samples, block.linears, {}), Trial(fresh, block.linears, {})
    error, fresh_error = wina.block_error(trial, groups, units), wina.block_error(other, groups, units)

    def uniform() -> Shares:
        return lambda sparsity: [sparsity] * len(units)

    def equation() -> Shares:
        found = wina.sensitivities(trial, groups, units)
        known = [replace(unit, sensitivity=each) for unit, each in zip(units, found, strict=True)]
        return lambda sparsity: closed_form(known, sparsity)

    def table() -> Shares:
        table_SG = greedy(sizes, error)
        return lambda sparsity: from_table(table_SG, sizes, sparsity)

    def every_step() -> Shares:
        path = greedy_path(sizes, error, renewed=1)
        return lambda sparsity: on_path(path, sizes, sparsity)

    rows: list[dict[str, object]] = []
    for name, decide in (("uniform", uniform), ("closed-form", equation), ("greedy", table), ("every-step", every_step)):
        forwards, start = trial.forwards, time.perf_counter()
        shares_at = decide()
        forwards, seconds = trial.forwards - forwards, time.perf_counter() - start
        for sparsity in SPARSITIES:
            assert sparsity in GRID
            shares = shares_at(sparsity)
            rows.append(
                {
                    "block": block.index,
                    "sparsity": sparsity,
                    "allocation": name,
                    "error": round(error(shares) ** 0.5, 5),
                    "fresh_error": round(fresh_error(shares) ** 0.5, 5),
                    "forwards": forwards,
                    "seconds": round(seconds, 2),
                    **{group.linears[0].role: round(share, 3) for group, share in zip(groups, shares, strict=True)},
                }
            )
    return rows


if __name__ == "__main__":
    main()
