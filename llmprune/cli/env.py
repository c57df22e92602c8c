"""`llmprune env`: what this machine offers."""

from __future__ import annotations


def command() -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from rich.console import Console
    from rich.table import Table

    from .._version import __version__
    from ..kernels import native
    from ..kernels.availability import backends
    from ..settings import cores

    table = Table("what", "found", show_header=False)
    table.add_row("llmprune", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "lm_eval", "triton"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("CPU cores", str(cores()))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("CUDA devices", ", ".join(gpus) or "none")
    for name, state in backends().items():
        table.add_row(f"kernels: {name}", state)
    for name in native.names():
        reason = native.reason(name)
        table.add_row(f"kernels: {name}.cpp", f"unavailable: {reason}" if reason else "available: compiled for this processor")
    Console().print(table)
