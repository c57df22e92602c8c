"""From how many tokens on a mask by statistics is better than one by magnitude: what `min_expert_tokens` stands on.

    LLMPRUNE_DATA=... python evals/bench/bench_expert_tokens.py

An expert sees a share of the calibration tokens only. Here the gate and down projections of SmolLM2's fifth block see that few,
drawn at random from 2048, and lose half of each row's weights (SparseGPT: of 128 columns). `error` is the squared error of the
output relative to the squared output, on 2048 other tokens, the mean of five draws; in the row of 0 tokens it is magnitude's.
"""

from functools import partial

import torch
from common import data_dir, save, smollm2

from llmprune.calibration import calibration_set
from llmprune.methods import sparsegpt
from llmprune.models import Skeleton
from llmprune.patterns import Unstructured
from llmprune.stream import Stream

BLOCK, SPARSITY, DRAWS = 4, 0.5, 5
TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 2048)


def inputs_of(ids_NT: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [tokens, I] and weight [O, I] of the linears that are looked at, by role."""
    stream = Stream(Skeleton(smollm2()), ids_NT)
    stream.capture()
    stream.skip(BLOCK)
    skeleton = stream.skeleton
    skeleton.fill_block(BLOCK, stream._read_block(BLOCK, finished=0))
    seen: dict[str, list[torch.Tensor]] = {"gate": [], "down": []}
    linears = {linear.role: linear for linear in skeleton.linears[BLOCK] if linear.role in seen}
    for role, linear in linears.items():
        linear.module.register_forward_pre_hook(lambda module, args, role=role: seen[role].append(args[0].flatten(0, -2)))
    for batch in range(len(stream.batches)):
        stream.forward(BLOCK, batch)
    return {role: (torch.cat(parts), linears[role].weight_OI.clone()) for role, parts in seen.items()}


def relative(fresh_TI: torch.Tensor, weight_OI: torch.Tensor, pruned_OI: torch.Tensor) -> float:
    """Squared error of the output over the squared output."""
    return float((fresh_TI @ (pruned_OI - weight_OI).T).square().sum() / (fresh_TI @ weight_OI.T).square().sum())


def main() -> None:
    ids = str(data_dir() / "golden" / "calibration_ids.parquet")
    samples = calibration_set(ids, None, samples=8, seqlen=512, seed=0, vocab_size=49152)
    pattern = Unstructured(SPARSITY, "row")
    rows: list[dict[str, object]] = []
    for role, (inputs_TI, weight_OI) in inputs_of(samples.ids_NT).items():
        pool_TI, fresh_TI = inputs_TI[:2048], inputs_TI[2048:]
        error = partial(relative, fresh_TI, weight_OI)
        plain = error(weight_OI * pattern.keep(weight_OI.abs()))
        rows.append({"role": role, "inputs": weight_OI.shape[1], "tokens": 0, "wanda": plain, "sparsegpt": plain})
        for tokens in TOKENS:
            errors = []
            for draw in range(DRAWS):
                generator = torch.Generator().manual_seed(draw)
                few_TI = pool_TI[torch.randperm(len(pool_TI), generator=generator)[:tokens]]
                wanda_OI = weight_OI * pattern.keep(weight_OI.abs() * few_TI.square().mean(dim=0).sqrt())
                factor_II = sparsegpt.inverse_factor(few_TI.T @ few_TI / tokens)
                fitted_OI = sparsegpt.solve(weight_OI, factor_II, Unstructured(SPARSITY, "layer"))
                errors.append((error(wanda_OI), error(fitted_OI)))
            wanda, fitted = (sum(each) / DRAWS for each in zip(*errors, strict=True))
            rows.append({**rows[-1], "tokens": tokens, "wanda": wanda, "sparsegpt": fitted})
    save("expert_tokens", [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows])


if __name__ == "__main__":
    main()
