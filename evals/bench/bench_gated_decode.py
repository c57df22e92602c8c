"""Decoding of a 1B-shaped random Llama with half of every linear's inputs left out: `llmprune bench` beside its own bounds.

    python evals/bench/bench_gated_decode.py [--dtype bfloat16] [ROW ...]

16 blocks, hidden 2048, FFN 8192, 32 heads in 8 KV groups, a vocabulary of 32k: what Llama 3.2 1B is but for the vocabulary, so
that the head is a twelfth of the weights. Random weights: how many inputs are left out is real, what is written is not. Rows:
WINA and TEAL at 50 %, each beside the same weights without gates, and WINA at 0 %, whose linears stay dense, so that its time
is what dispatch costs.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from common import RESULTS
from random_llama import write

import llmprune
from llmprune.bench import bench, request

ROWS = {"wina-50": ("wina", 0.5), "teal-50": ("teal", 0.5), "wina-0": ("wina", 0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--tokens", default="16")
    parser.add_argument("--repeats", default="5")
    options = parser.parse_args()
    results = RESULTS / f"gated-decode-{options.dtype}-{torch.get_num_threads()}.csv"
    results.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        dtype = getattr(torch, options.dtype)
        write(dense, blocks=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, dtype=dtype)
        for name in options.rows:
            score, sparsity = ROWS[name]
            out = Path(folder) / name
            llmprune.prune(
                str(dense),
                method="wina",
                score=score,
                sparsity=sparsity,
                allocation="uniform",
                calibration="random",
                samples=4,
                seqlen=64,
                dtype="float32",
                output=out,
            )
            # One at a time: two models of this size fill a small machine.
            asked = request(
                model=str(out), prompt="32", tokens=options.tokens, repeats=options.repeats, dtype=options.dtype, output=results
            )
            for each in bench(asked, say=print, quiet=True):
                print(each, flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
