"""What leaving inputs out costs SmolLM2: divergence from the dense model and perplexity, by score, basis and allocation.

    LLMPRUNE_DATA=... python evals/bench/bench_wina.py [VARIANT ...]

Calibration: 16 samples x 512 tokens of wikitext-2 validation. Evaluation: the first 4 disjoint windows of 512 tokens of
wikitext-2 test, every linear of every block gated, the first 1 % of a window's tokens dense. `kl` is KL(dense || gated) per
token in nats. `dropped` is the share of the gated weights that the evaluation's gated tokens did without; `read` is what a
token reads of the blocks in relation to the dense model, rotations included. One calibration serves all sparsities of a
variant.
"""

import csv
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, data_dir, save, smollm2, timed
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import llmprune
from llmprune.activation_plan import Plan
from llmprune.calibration import evaluation_set
from llmprune.models import load_tokenizer
from llmprune.runtime import simulate

SPARSITIES = (0.25, 0.4, 0.5, 0.65)
WINDOWS = 4
# Calibrations; one that is not greedy serves the uniform allocation as well.
VARIANTS: dict[str, dict[str, object]] = {
    "teal": {"score": "teal"},
    "wina": {},
    "wina-released": {"score": "wina-released", "basis": "kgate"},
    "wina-stacked": {"basis": "stacked"},
    "wina-shared": {"share": True},
    "teal-greedy": {"score": "teal", "allocation": "greedy"},
    "wina-greedy": {"allocation": "greedy"},
}


def main() -> None:
    names = sys.argv[1:] or list(VARIANTS)
    data, directory = data_dir(), smollm2()
    text = str(data / "wikitext-2-raw-v1" / "test.parquet")
    windows_NT = evaluation_set(text, load_tokenizer(directory), seqlen=512, windows=WINDOWS).ids_NT
    file = RESULTS / "wina.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: dict[tuple[str, str, str], dict[str, object]] = {
        (row["variant"], row["allocation"], row["sparsity"]): dict(row) for row in csv.DictReader(lines)
    }
    model = llmprune.load(directory, device="cpu", dtype="float32")
    for name in names:
        with tempfile.TemporaryDirectory() as folder, timed() as timer:
            llmprune.prune(
                str(directory),
                method="wina",
                calibration=str(data / "golden" / "calibration_ids.parquet"),
                samples=16,
                seqlen=512,
                sparsity=max(SPARSITIES),
                output=f"{folder}/out",
                **VARIANTS[name],
            )
            plan = Plan.load(Path(folder) / "out")
        assert plan
        allocations = [plan.allocation, *(["uniform"] if plan.allocation != "greedy" else [])]
        plans = {
            (allocation, str(sparsity)): replace(plan, allocation=allocation).at(sparsity)
            for allocation in allocations
            for sparsity in SPARSITIES
        }
        sums, dense_loss = measured(model, plans, windows_NT)
        rows["dense", "", "0"] = {
            "variant": "dense",
            "allocation": "",
            "sparsity": "0",
            "kl": 0,
            "perplexity": round(math.exp(dense_loss), 3),
        }
        weights = sum(gate.numel for gate in plan.gates.values())
        extra = sum(basis_II.numel() for basis_II in plan.bases.values())
        for (allocation, sparsity), (divergence, loss, active) in sums.items():
            rows[name, allocation, sparsity] = {
                "variant": name,
                "allocation": allocation,
                "sparsity": sparsity,
                "kl": round(divergence, 4),
                "perplexity": round(math.exp(loss), 3),
                "dropped": round(1 - active / weights, 4),
                "read": round((active + extra) / weights, 4),
                "calibration_cpu_s": round(timer.cpu, 1),
            }
        columns = dict.fromkeys(key for row in rows.values() for key in row)
        save("wina", [columns | row for row in rows.values()])


@torch.inference_mode()
def measured(
    model: torch.nn.Module, plans: dict[tuple[str, str], Plan], windows_NT: torch.Tensor
) -> tuple[dict[tuple[str, str], tuple[float, ...]], float]:
    """Of every plan the divergence from the dense model, the loss and the weights read, and the dense model's loss."""
    sums = dict.fromkeys(plans, (0.0, 0.0, 0.0))
    dense_loss = 0.0
    for window_T in windows_NT:
        labels_T = window_T[1:]
        dense_TV = log_softmax(model(window_T[None]).logits[0, :-1], dim=-1)
        dense_loss += float(cross_entropy(dense_TV, labels_T)) / len(windows_NT)
        for key, plan in plans.items():
            with simulate(model, plan) as gated:
                gated_TV = log_softmax(model(window_T[None]).logits[0, :-1], dim=-1)
            divergence = float(kl_div(gated_TV, dense_TV, reduction="sum", log_target=True)) / len(labels_T)
            active = sum(gated.active[each.name] * each.numel for each in plan.gates.values())
            parts = divergence, float(cross_entropy(gated_TV, labels_T)), active
            sums[key] = tuple(total + part / len(windows_NT) for total, part in zip(sums[key], parts, strict=True))
    return sums, dense_loss


if __name__ == "__main__":
    main()
