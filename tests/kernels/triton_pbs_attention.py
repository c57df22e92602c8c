"""Run by test_pbs_attention.py on a device: the Triton kernel against the reference, odd shapes, poisoned blocks.

TRITON_INTERPRET=1 python tests/kernels/triton_pbs_attention.py cpu [long]
"""

import sys

import torch

from llmprune.kernels import pbs_attention_triton
from llmprune.kernels.pbs_attention import Rule, Selection, attend, earlier_blocks, reference, select

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
device = torch.device(sys.argv[1])
# Triton's interpreter computes nothing in bfloat16.
dtypes = list(TOLERANCE) if device.type == "cuda" else [torch.float32, torch.float16]
# Tokens, channels, query heads and key heads; the last block and the last segment are rarely complete.
SHAPES = ((150, 16, 2, 1), (65, 24, 1, 1))


def distance(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def problem(tokens, width, heads, kv, dtype):
    """Query, key and value in the memory layout of a model's projections: [B, N, H, D]."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((1, tokens, heads, width), (1, tokens, kv, width), (1, tokens, kv, width))
    return [torch.randn(size, generator=generator).to(device, dtype).transpose(1, 2) for size in sizes]


if sys.argv[2:] == ["long"]:
    # Slots beyond the range of 16 bits, in which block numbers are stored. In large tiles, so that there are few.
    pbs_attention_triton.tiling = lambda *arguments: pbs_attention_triton.Tiling(512, 512, 4, 1)
    tokens = 32768 + 3 * 512
    query, key, value = problem(tokens, 16, 1, 1, torch.float32)
    rule = Rule(0.001, block=512, segment=512)
    selection = select(query, key, rule)
    selection.kept_BHTT[..., -1, -3:] = True
    expected = attend(query, key, value, selection, rule, backend="torch")
    assert distance(attend(query, key, value, selection, rule, backend="triton"), expected) < TOLERANCE[torch.float32]
    print("1 outputs agree")
    sys.exit()

agree = 0
for shape in SHAPES:
    for dtype in dtypes:
        for share_heads in (True, False)[: shape[2]]:
            query, key, value = problem(*shape, dtype)
            rule = Rule(0.5, block=32, segment=64, share_heads=share_heads)
            selection = select(query, key, rule)
            expected = reference(query.double(), key.double(), value.double(), selection, rule)
            out = attend(query, key, value, selection, rule, backend="triton")
            assert distance(out, expected) < TOLERANCE[dtype], (shape, dtype, share_heads, distance(out, expected))
            agree += 1

# Nothing is read of a block that no query keeps: NaN there reaches its own segment only.
query, key, value = problem(170, 16, 1, 1, torch.float32)
rule = Rule(0.5, block=32, segment=64)
selection = select(query, key, rule)
kept_BHTT = selection.kept_BHTT.clone()
kept_BHTT[..., 1] &= ~earlier_blocks(170, rule, device=device)[:, 1]
selection = Selection(selection.order_BPN, kept_BHTT)
clean = attend(query, key, value, selection, rule, backend="triton")
poisoned = selection.order_BPN[0, 0, 32:64]
key[:, :, poisoned] = value[:, :, poisoned] = torch.nan
out = attend(query, key, value, selection, rule, backend="triton")
assert torch.equal(out[:, :, 64:], clean[:, :, 64:])
assert out[:, :, :64].isnan().any()
print(f"{agree} outputs agree")
