"""Permuted block-sparse attention: what leaving blocks out costs, how many fewer blocks sorting keys needs, and perplexity.

    LLMPRUNE_DATA=... python evals/bench/bench_pbs.py [--model DIR --tokens 512 --block 16 --segment 32 --name trial]

Text: the first `tokens` tokens of wikitext-2 test, one window. Synthetic: attention of a head of 64 channels in which every
query likes the same 3 % of the keys, scattered at random among noise; four seeds.

pbs-curves: for every threshold, with the keys sorted and not, `density` is the share of full causal attention's blocks that are
read, over all queries and heads (without sorting, blocks that hold no visible key are not counted), and `error` the relative
error of a head's output against full attention, averaged over heads (every third layer, every fourth block of queries). `fewer`
is how many fewer blocks the sorted selection reads than the unsorted one does at the same error, interpolated between its
thresholds.
pbs-perplexity: of the dense model and of the model with PBS in all layers, on the same window. `covered` is the share of full
attention that lies in the blocks that are read, `speedup` what operations of attention allow. On a CPU nothing is faster.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from common import data_dir, save, smollm2, timed
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmprune.calibration import evaluation_set
from llmprune.kernels.pbs_attention import Rule, block_scores, causal_blocks, keep_blocks, key_order
from llmprune.models import load_tokenizer
from llmprune.runtime import enable_pbs
from llmprune.runtime.pbs_report import write_pbs_report

THRESHOLDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
LAYERS, ROWS = 3, 4
SYNTHETIC, SEEDS, GAIN = 2048, 4, 6.0


class Curves:
    """Errors and blocks of many heads, by whether keys are sorted."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.errors: dict[bool, list[Tensor]] = defaultdict(list)
        self.densities: dict[bool, list[Tensor]] = defaultdict(list)

    def add(self, query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, scale: float) -> None:
        """Of one layer: float32."""
        heads, tokens = query_HND.shape[:2]
        for sort in (True, False):
            for head in range(heads):
                kv = head * len(key_KND) // heads
                # The order that all heads of the group share.
                group = slice(kv * heads // len(key_KND), (kv + 1) * heads // len(key_KND))
                key_1ND = key_KND[kv : kv + 1]
                order_N = torch.arange(tokens)
                if sort:
                    order_N = key_order(query_HND[None, group], key_1ND[None], self.rule, scale=scale)[0, 0]
                place = query_HND[None, head : head + 1], key_1ND[None], order_N[None, None]
                scores_TT = block_scores(*place, self.rule, scale=scale)
                kept_XTT = torch.cat(
                    [
                        keep_blocks(scores_TT, place[2], Rule(threshold, self.rule.block, self.rule.segment))[0]
                        for threshold in THRESHOLDS
                    ]
                )
                read_XTT = kept_XTT if sort else kept_XTT.tril()
                self.densities[sort].append(read_XTT.sum(dim=(1, 2)) / causal_blocks(tokens, self.rule))
                self.errors[sort].append(
                    self._errors(query_HND[head], key_1ND[0][order_N], value_KND[kv][order_N], order_N, kept_XTT, scale)
                )

    def _errors(
        self, query_ND: Tensor, key_ND: Tensor, value_ND: Tensor, order_N: Tensor, kept_XTT: Tensor, scale: float
    ) -> Tensor:
        """The relative error for each threshold, from one pass: outputs are sums over blocks, whichever are kept."""
        block, tokens = self.rule.block, len(query_ND)
        squares_X, norm = torch.zeros(len(kept_XTT), dtype=torch.float64), 0.0
        for number in range(ROWS - 1, kept_XTT.shape[1], ROWS):
            rows = torch.arange(number * block, min((number + 1) * block, tokens))
            # Whole blocks, up to the end of the own segment; what is missing at the end of the prompt weighs nothing.
            end = min((number * block // self.rule.segment + 1) * self.rule.segment, tokens)
            logits_QN = query_ND[rows] @ key_ND[:end].T * scale
            logits_QN = logits_QN.masked_fill(order_N[:end] > rows[:, None], -torch.inf)
            weights_QN = (logits_QN - logits_QN.amax(dim=1, keepdim=True)).exp()
            room = -end % block
            weights_QTC = torch.nn.functional.pad(weights_QN, (0, room)).unflatten(1, (-1, block))
            value_TCD = torch.nn.functional.pad(value_ND[:end], (0, 0, 0, room)).unflatten(0, (-1, block))
            sums_TQD = weights_QTC.transpose(0, 1) @ value_TCD
            kept_XT = kept_XTT[:, number, : len(sums_TQD)].float()
            out_XQD = (kept_XT @ sums_TQD.flatten(1)).unflatten(1, sums_TQD.shape[1:])
            out_XQD /= (weights_QTC.sum(dim=2) @ kept_XT.T).T[..., None]
            exact_QD = sums_TQD.sum(dim=0) / weights_QN.sum(dim=1, keepdim=True)
            squares_X += (out_XQD - exact_QD).double().square().sum(dim=(1, 2))
            norm += float(exact_QD.double().square().sum())
        return (squares_X / norm).sqrt()

    def rows(self, name: str) -> Iterator[dict[str, object]]:
        mean = {sort: torch.stack(self.errors[sort]).mean(dim=0).tolist() for sort in (True, False)}
        density = {sort: torch.stack(self.densities[sort]).double().mean(dim=0).tolist() for sort in (True, False)}
        for number, threshold in enumerate(THRESHOLDS):
            error, read = mean[True][number], density[True][number]
            same = interpolated(error, mean[False], density[False])
            yield {
                "input": name,
                "threshold": threshold,
                "density": round(read, 4),
                "error": round(error, 5),
                "unsorted_density": round(density[False][number], 4),
                "unsorted_error": round(mean[False][number], 5),
                "fewer": round(1 - read / same, 4) if same else "",
                "heads": len(self.errors[True]),
            }


def interpolated(error: float, errors: list[float], densities: list[float]) -> float | None:
    """The density at which errors, which fall as densities grow, reach an error; None beyond what was measured."""
    for (high, low), (few, many) in zip(pairwise(errors), pairwise(densities), strict=True):
        if high >= error >= low and high > low:
            return few + (many - few) * (high - error) / (high - low)
    return None


def synthetic(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [1, N, 64]."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn((1, tokens, 64), generator=generator) for _ in range(3))
    query[..., 0] += GAIN
    key[:, torch.randperm(tokens, generator=generator)[: tokens * 3 // 100], 0] += GAIN
    return query, key, value


def perplexity(model: PreTrainedModel, ids_1N: Tensor) -> float:
    """Of one window, with the logits of a few tokens in memory at a time."""
    hidden_ND = model.model(ids_1N, use_cache=False).last_hidden_state[0]
    loss = 0.0
    for start in range(0, len(hidden_ND) - 1, 512):
        part = slice(start, min(start + 512, len(hidden_ND) - 1))
        labels = ids_1N[0, part.start + 1 : part.stop + 1]
        loss += float(cross_entropy(model.lm_head(hidden_ND[part]).float(), labels, reduction="sum"))
    return math.exp(loss / (len(hidden_ND) - 1))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--name", default="pbs")
    parser.add_argument("--report", type=Path, help="write the page with a head's block map there")
    options = parser.parse_args()
    rule = Rule(0.9, options.block, options.segment)
    data, directory = data_dir(), options.model or smollm2()

    noise = Curves(Rule(0.9, 32, 128))
    for seed in range(SEEDS):
        noise.add(*synthetic(SYNTHETIC, seed), scale=64**-0.5)

    text = str(data / "wikitext-2-raw-v1" / "test.parquet")
    ids_1N = evaluation_set(text, load_tokenizer(directory), seqlen=options.tokens, windows=1).ids_NT
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    curves = Curves(rule)

    def measured(module, query, key, value, mask, *args, **named):
        if module.layer_idx % LAYERS == LAYERS - 1:
            curves.add(query[0], key[0], value[0], module.scaling)
        return sdpa_attention_forward(module, query, key, value, mask, *args, **named)

    AttentionInterface.register("pbs_curves", measured)
    AttentionMaskInterface.register("pbs_curves", sdpa_mask)
    model.set_attn_implementation("pbs_curves")
    with timed() as dense_timer:
        dense = perplexity(model, ids_1N)
    name = f"{directory.name}, {options.tokens} tokens, blocks of {options.block} in segments of {options.segment}"
    save(
        f"{options.name}-curves",
        [*noise.rows(f"heavy keys, {SYNTHETIC} tokens, blocks of 32 in segments of 128"), *curves.rows(name)],
    )

    model.set_attn_implementation("sdpa")
    pbs = enable_pbs(model, threshold=rule.threshold, block=rule.block, segment=rule.segment, min_length=0)
    with timed() as pbs_timer, pbs.collecting() as seen:
        sparse = perplexity(model, ids_1N)
    whole = seen.whole()
    assert whole
    row = {
        "input": name,
        "threshold": rule.threshold,
        "dense_perplexity": round(dense, 4),
        "perplexity": round(sparse, 4),
        "relative": round(sparse / dense - 1, 5),
        "density": round(whole.density, 4),
        "unsorted_density": round(whole.unsorted_density, 4),
        "covered": round(whole.covered, 5),
        "unsorted_covered": round(whole.unsorted_covered, 5),
        "speedup": round(whole.speedup, 3),
        "dense_cpu_s": round(dense_timer.cpu, 1),
        "pbs_cpu_s": round(pbs_timer.cpu, 1),
    }
    save(f"{options.name}-perplexity", [row])
    if options.report:
        print(write_pbs_report(seen, options.report))


if __name__ == "__main__":
    main()
