"""The repository's folder `kernels` ships as `llmprune.kernels` and never stands in for the PyPI package `kernels`.

transformers asks whether that package is there (`is_kernels_available`) and, told yes, imports half a dozen names from it. With
the repository's root on `sys.path` (`python -m llmprune`, `python -m pytest`) our folder answers to the same name. It has no
`__init__.py`, so to Python it is a namespace portion: any installed package wins over it wherever it stands on the path,
and transformers counts a bare namespace as not installed. `llmprune/kernels` is a link to the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import llmprune
from llmprune._version import __version__

ROOT = Path(__file__).resolve().parents[1]

# What a command that has `sys.path[0]` at the repository's root runs before transformers asks.
PROBE = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
LAUNCHES = {
    "python -c": PROBE,
    "python -m llmprune": f"""
import contextlib, io, runpy, sys
sys.argv = ["llmprune", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module("llmprune", run_name="__main__", alter_sys=True)
{PROBE}
""",
    "after llmprune.kernels": f"import llmprune.kernels.availability\n{PROBE}",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a distribution is built from, so that builds leave nothing in the repository."""
    copy = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__")
    for folder in ("llmprune", "kernels", "evals/suites", "evals/tasks"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=skipped)
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture
def installed_kernels(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a stand-in for the PyPI package `kernels`, of a version transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    metadata = tmp_path / "site" / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (metadata / "top_level.txt").write_text("kernels\n")
    return package.parent


def python_path(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def shipped_modules() -> set[str]:
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "llmprune").rglob("*.py")}
    # Before Python 3.13 rglob does not look into linked folders.
    return modules | {f"llmprune/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").rglob("*.py")}


def test_kernels_folder_has_no_init_file() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_every_module_and_no_top_level_kernels(source: Path, tmp_path: Path) -> None:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip_wheel, "--wheel-dir", str(tmp_path), str(source)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = tmp_path.glob("llmprune-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == shipped_modules()
    assert {name.split("/")[0] for name in names} == {"llmprune", f"llmprune-{__version__}.dist-info"}


def test_wheel_built_from_the_sdist_holds_kernels_suites_and_tasks(source: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

    def run(hook: str, folder: Path) -> Path:
        command = [sys.executable, "-c", build, hook, str(tmp_path)]
        output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return tmp_path / output.stdout.splitlines()[-1]

    with tarfile.open(run("build_sdist", source)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(run("build_wheel", unpacked)) as archive:
        names = set(archive.namelist())
    assert "llmprune/kernels/availability.py" in names
    for folder in ("suites", "tasks"):
        assert {f"llmprune/{folder}/{file.name}" for file in (ROOT / "evals" / folder).glob("*.yaml")} <= names


@pytest.mark.parametrize("launch", LAUNCHES)
def test_transformers_sees_no_kernels_package_where_none_is_installed(launch: str, run_python: Callable[..., str]) -> None:
    installed = run_python("import importlib.util; print(importlib.util.find_spec('kernels') is not None)", cwd=Path("/"))
    if installed == "True":
        pytest.skip("the PyPI package kernels is installed in this environment")
    assert run_python(LAUNCHES[launch]).splitlines()[-1] == "False"


@pytest.mark.parametrize("launch", LAUNCHES)
def test_transformers_sees_the_installed_kernels_package(
    launch: str, installed_kernels: Path, run_python: Callable[..., str]
) -> None:
    code = f"{LAUNCHES[launch]}\nimport kernels; print(kernels.__file__)"
    *_, available, file = run_python(code, env={"PYTHONPATH": python_path(installed_kernels)}).splitlines()
    assert available == "True"
    assert Path(file) == installed_kernels / "kernels" / "__init__.py"


@pytest.mark.parametrize("install", [False, True], ids=["not installed", "installed"])
def test_transformers_is_right_under_pytest_from_the_root(
    install: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    site = request.getfixturevalue("installed_kernels") if install else tmp_path
    test = tmp_path / "test_probe.py"
    test.write_text(f"import transformers.utils as u\ndef test(): assert u.is_kernels_available() is {install}\n")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path(site)},
        check=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("folder", [ROOT, Path("/")], ids=["root", "elsewhere"])
def test_kernels_import_as_llmprune_kernels(folder: Path, run_python: Callable[..., str]) -> None:
    code = "from llmprune.kernels import availability; print(availability.__name__, list(availability.backends()))"
    assert run_python(code, cwd=folder) == "llmprune.kernels.availability ['cpu', 'cuda', 'triton']"


def test_importing_kernels_imports_neither_torch_nor_triton(run_python: Callable[..., str]) -> None:
    code = "import sys, llmprune.kernels.availability; print({'torch', 'triton'} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line and "+" not in line for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    names = {one.split(">=")[0].split(";")[0].strip().lower().replace("_", "-") for one in wanted}
    assert names - pinned == set()


def test_version_is_the_one_the_package_states() -> None:
    assert llmprune.__version__ == __version__
