"""Run by test_sparse24_gpu.py on a device: the 2:4 products in Triton, and in Gluon on CUDA, against the dense one.

TRITON_INTERPRET=1 python tests/kernels/triton_sparse24.py cpu
"""

import sys

import torch

from llmprune.kernels import sparse24_triton
from llmprune.kernels.gemv import reference
from llmprune.kernels.gemv_triton import gemv, gemv_compacted
from llmprune.kernels.sparse24 import mask24, pack24

device = torch.device(sys.argv[1])
# The interpreter multiplies bfloat16 as if it were integers.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
if device.type == "cuda":
    TOLERANCE[torch.bfloat16] = 8e-3


def close(y, exact, magnitude, dtype):
    """`magnitude`: what the terms of the sums come to without their signs."""
    return y.dtype == dtype and bool(((y.double() - exact).abs() <= TOLERANCE[dtype] * magnitude).all())


def product_agrees(module, layout, shape, dtype):
    """With and without a bias, and with the same bits again."""
    outputs, inputs, tokens = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((outputs, inputs), (tokens, inputs), (outputs,))
    weight_OI, x_NI, bias_O = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    weight_OI = weight_OI.where(mask24(weight_OI), 0)
    packed = pack24(weight_OI, layout)
    exact_NO = x_NI.double() @ weight_OI.double().T
    magnitude_NO = x_NI.double().abs() @ weight_OI.double().abs().T
    y_NO = module.matmul(x_NI, packed)
    assert close(y_NO, exact_NO, magnitude_NO, dtype), (shape, dtype)
    y_with_bias_NO = module.matmul(x_NI, packed, bias_O)
    assert close(y_with_bias_NO, exact_NO + bias_O.double(), magnitude_NO + bias_O.double().abs(), dtype), (shape, dtype)
    assert torch.equal(y_NO, module.matmul(x_NI, packed)), "not the same bits again"


agree = 0
for dtype in TOLERANCE:
    for shape in ((1, 16, 1), (33, 1040, 1), (20, 336, 3), (17, 64, 4), (70, 1040, 5), (40, 96, 37)):
        product_agrees(sparse24_triton, "simple", shape, dtype)
        agree += 1
    for inputs, outputs in ((65, 33), (1500, 270), (1, 1)):
        generator = torch.Generator().manual_seed(inputs)
        x_I, weight_IO, bias_O = (
            torch.randn(size, generator=generator).to(device, dtype) for size in ((inputs,), (inputs, outputs), (outputs,))
        )
        for tau in (0.7, -1.0, torch.inf):
            tau_I = torch.full((inputs,), tau, device=device)
            exact_O = reference(x_I[None].double(), weight_IO.T.double(), tau_I, bias_O.double())[0]
            weight_of_kept_IO = weight_IO.clone()
            weight_of_kept_IO[x_I.float().abs() <= tau_I] = torch.nan
            y_O = gemv_compacted(x_I, weight_of_kept_IO, tau_I, bias_O)
            magnitude_O = reference(*(each.double().abs() for each in (x_I[None], weight_IO.T)), tau_I, bias_O.double().abs())[
                0
            ]
            assert close(y_O, exact_O, magnitude_O, dtype), (inputs, outputs, tau, dtype)
            assert tau != -1.0 or torch.equal(y_O, gemv(x_I, weight_IO, tau_I, bias_O)), "other bits where all is kept"
            agree += 1
if device.type == "cuda":
    from llmprune.kernels import sparse24_gluon

    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((16, 64, 1), (208, 1600, 3), (64, 4096, 8), (80, 192, 13), (4096, 1024, 32)):
            product_agrees(sparse24_gluon, "fragment", shape, dtype)
            agree += 1
print(f"{agree} products agree")
