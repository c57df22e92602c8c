"""Run by test_gemv.py on a device: the Triton kernel against the reference, odd shapes, poisoned weights.

TRITON_INTERPRET=1 python tests/kernels/triton_gemv.py cpu
"""

import sys

import torch

from llmprune.kernels.gemv import backends, gemv, reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
agree = 0
device = torch.device(sys.argv[1])
assert backends(device, torch.float32)["triton"].startswith("available")
for dtype, tolerance in TOLERANCE.items():
    for outputs, inputs in ((33, 65), (96, 70), (1, 1), (257, 40)):
        generator = torch.Generator().manual_seed(inputs)
        x_I, weight_IO, bias_O = (
            torch.randn(size, generator=generator).to(device, dtype) for size in ((inputs,), (inputs, outputs), (outputs,))
        )
        for tau_I in (torch.rand(inputs, generator=generator), torch.full((inputs,), -1.0), torch.full((inputs,), torch.inf)):
            tau_I = tau_I.to(device)
            expected_O = reference(x_I[None], weight_IO.T, tau_I, bias_O)[0].double()
            poisoned_IO = weight_IO.clone()
            poisoned_IO[x_I.float().abs() <= tau_I] = torch.nan
            found = [gemv(x_I, poisoned_IO, tau_I, bias_O, backend="triton") for _ in range(2)]
            assert torch.equal(*found), "not the same bits again"
            error = float((found[0].double() - expected_O).norm() / expected_O.norm().clamp_min(1e-9))
            assert error < tolerance, (dtype, outputs, inputs, error)
            agree += 1
x_I, weight_IO = torch.tensor([torch.nan, 1.0], device=device), torch.ones((2, 3), device=device)
assert gemv(x_I, weight_IO, torch.full((2,), 5.0, device=device), backend="triton").isnan().all()
print(f"{agree} products agree")
