"""The GPU kernels of the 2:4 product, run by a script of its own in Triton's interpreter or on CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_script(device, **environment):
    """In a process of its own: one cannot both interpret and compile. Returns how many products agree."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_sparse24.py")
    done = subprocess.run(
        [sys.executable, script, device], env={**os.environ, **environment}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_triton_kernels_compute_the_dense_product_in_the_interpreter():
    assert run_script("cpu", TRITON_INTERPRET="1") == "30 products agree"


@pytest.mark.needs_cuda
def test_the_triton_and_gluon_kernels_compute_the_dense_product_on_cuda():
    assert run_script("cuda", TRITON_INTERPRET="0") == "55 products agree"
