"""Time of pruning a mixture of experts as a multiple of one plain dense forward of the same tokens through the same blocks.

    python evals/bench/bench_experts.py [ROW ...]

A random Mixtral of 4 blocks with 8 experts, two of which run for a token. The floor is the resident model's own forward without
its head, as transformers loads it, one sample at a time, measured in the same process right before and right after each run.
Pruning includes reading every block, scoring, and writing the result. `forwards` is how often the run's samples went through
the blocks, and `cpu_per_forward` its processor time over that many dense forwards: what pruning costs beside the forwards.
Processor time, because on a busy machine wall time is that of others.
"""

import sys
import tempfile
from pathlib import Path

import torch
from bench_forwards import dense_forward
from common import save, timed
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import llmprune
from llmprune.calibration import calibration_set

BLOCKS, SAMPLES, SEQLEN = 4, 16, 512
RUNS: dict[str, dict[str, object]] = {
    "wanda": {},
    "wanda-sublayer": {"sequential": "sublayer"},
}


def random_mixtral(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": SEQLEN}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model_dir = random_mixtral(Path(folder) / "model")
        tokens = calibration_set("random", None, samples=SAMPLES, seqlen=SEQLEN, seed=0, vocab_size=1024)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).model.eval().requires_grad_(False)
        after = dense_forward(model, tokens.ids_NT)
        for name in sys.argv[1:] or RUNS:
            before = after
            options = {"calibration": "random", "samples": SAMPLES, "seqlen": SEQLEN, "device": "cpu", **RUNS[name]}
            with timed() as pruning:
                result = llmprune.prune(str(model_dir), output=Path(folder) / name, **options)
            after = dense_forward(model, tokens.ids_NT)
            wall, cpu = (before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2
            forwards = result.record["clock_seconds"]["forwards"] / BLOCKS  # type: ignore[index]
            rows.append(
                {
                    "row": name,
                    "wall_ratio": round(pruning.wall / wall, 3),
                    "cpu_ratio": round(pruning.cpu / cpu, 3),
                    "forwards": round(forwards, 2),
                    "cpu_per_forward": round(pruning.cpu / cpu / forwards, 3),
                    "dense_cpu_s": round(cpu, 2),
                    "prune_cpu_s": round(pruning.cpu, 2),
                    "coverage": round(float(str(result.record["coverage"])), 4),
                }
            )
    save("experts", rows)


if __name__ == "__main__":
    main()
