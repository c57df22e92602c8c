"""What leaving inputs out costs SmolLM2: divergence from the dense model and perplexity, by score, basis and allocation.

    LLMPRUNE_DATA=... python evals/bench/bench_wina.py [VARIANT ...]

Calibration: 16 samples x 512 tokens of wikitext-2 validation. Evaluation: the first 6 disjoint windows of 512 tokens of
wikitext-2 test, every linear of every block gated, the first 1 % of a window's tokens dense. `kl` is KL(dense || gated) per
token in nats. `dropped` is the share of the gated weights that the evaluation's gated tokens did without; `read` is what a
token reads of the blocks in relation to the dense model, rotations included. One calibration serves all sparsities of a
variant.
"""

import csv
import math
import sys
import tempfile
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
WINDOWS = 6
VARIANTS: dict[str, dict[str, object]] = {
    **{f"teal-{name}": {"score": "teal", "allocation": name} for name in ("uniform", "closed-form", "greedy")},
    **{f"wina-{name}": {"allocation": name} for name in ("uniform", "closed-form", "greedy")},
    "wina-shared": {"allocation": "closed-form", "share": True},
    "wina-released": {"score": "wina-released", "basis": "kgate", "allocation": "uniform"},
    "wina-stacked": {"basis": "stacked", "allocation": "closed-form"},
}


def main() -> None:
    names = sys.argv[1:] or list(VARIANTS)
    data, directory = data_dir(), smollm2()
    text = str(data / "wikitext-2-raw-v1" / "test.parquet")
    windows_NT = evaluation_set(text, load_tokenizer(directory), seqlen=512, windows=WINDOWS).ids_NT
    file = RESULTS / "wina.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    rows: dict[tuple[str, str], dict[str, object]] = {(r["variant"], r["sparsity"]): dict(r) for r in csv.DictReader(lines)}
    model = llmprune.load(directory, device="cpu", dtype="float32")
    plans: dict[tuple[str, str], tuple[Plan, float]] = {}
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
        print(f"{name}: calibrated in {timer.wall:.1f} s", flush=True)
        for sparsity in SPARSITIES:
            plans[name, str(sparsity)] = plan.at(sparsity), round(timer.wall, 1)
    sums = {key: [0.0, 0.0, 0.0] for key in plans}
    dense_loss = 0.0
    with torch.inference_mode():
        for window_T in windows_NT:
            labels_T = window_T[1:]
            dense_TV = log_softmax(model(window_T[None]).logits[0, :-1], dim=-1)
            dense_loss += float(-dense_TV.gather(1, labels_T[:, None]).double().mean())
            for key, (plan, _) in plans.items():
                with simulate(model, plan) as gated:
                    logits_TV = model(window_T[None]).logits[0, :-1]
                gated_TV = log_softmax(logits_TV, dim=-1)
                divergence = kl_div(gated_TV, dense_TV, reduction="sum", log_target=True) / len(labels_T)
                active = sum(gated.active[each.name] * each.numel for each in plan.gates.values())
                parts = float(divergence), float(cross_entropy(logits_TV, labels_T)), active
                sums[key] = [total + part for total, part in zip(sums[key], parts, strict=True)]
            print(f"window {window_T[0]}", flush=True)
    gated_weights = sum(gate.numel for gate in plan.gates.values())
    rows["dense", "0"] = {"variant": "dense", "sparsity": "0", "kl": 0, "perplexity": round(math.exp(dense_loss / WINDOWS), 3)}
    for (name, sparsity), (divergence, loss, active) in sums.items():
        plan, seconds = plans[name, sparsity]
        extra = sum(basis_II.numel() for basis_II in plan.bases.values())
        rows[name, sparsity] = {
            "variant": name,
            "sparsity": sparsity,
            "kl": round(divergence / WINDOWS, 4),
            "perplexity": round(math.exp(loss / WINDOWS), 3),
            "dropped": round(1 - active / WINDOWS / gated_weights, 4),
            "read": round((active / WINDOWS + extra) / gated_weights, 4),
            "calibration_s": seconds,
        }
    columns = dict.fromkeys(key for row in rows.values() for key in row)
    save("wina", [columns | row for row in rows.values()])


if __name__ == "__main__":
    main()
