"""How the package is installed and imported: its metadata, its weight, and every way to get at the kernels."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from statistics import median

import pytest

import fastdmf

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("numpy", "scipy", "numba", "llvmlite", "sklearn", "pandas", "matplotlib", "cupy", "threadpoolctl")
KERNEL_FILES = sorted(
    path.relative_to(ROOT).as_posix() for kind in ("*.py", "*.cu") for path in (ROOT / "kernels").rglob(kind)
)

SOLVE = """
import numpy as np, fastdmf
rng = np.random.default_rng(0)
truth = np.outer(rng.standard_normal(6), rng.standard_normal(5))
rows, cols = np.nonzero(np.ones(truth.shape))
solution = fastdmf.solve(fastdmf.EntryMask(rows, cols, truth.shape), truth[rows, cols], random_state=0)
assert np.linalg.norm(solution.matrix() - truth) < 0.01 * np.linalg.norm(truth)
"""


def python(code, cwd, *, path=ROOT, flags=()):
    """Run code in a new interpreter that sees the source tree through PYTHONPATH; return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version():
    """One version, a plain one; the installed metadata agrees where the package is installed."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastdmf.__version__)
    assert f"## {fastdmf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        installed = metadata.version("fastdmf")
    except metadata.PackageNotFoundError:
        pytest.skip("fastdmf runs from the source tree, uninstalled")
    assert installed == fastdmf.__version__


def test_import_loads_nothing_heavy(tmp_path):
    """``import fastdmf`` touches none of its dependencies, and dir() does not either."""
    loaded = json.loads(
        python("import fastdmf, sys, json; dir(fastdmf); print(json.dumps(list(sys.modules)))", tmp_path)
    )
    assert not set(HEAVY) & {name.split(".")[0] for name in loaded}
    assert "kernels" not in loaded


def test_import_is_quick(tmp_path):
    """``import fastdmf`` costs less than 50 ms of CPU; the median of seven fresh interpreters."""
    code = "import time; t = time.process_time(); import fastdmf; print(time.process_time() - t)"
    seconds = [float(python(code, tmp_path)) for _ in range(7)]
    assert median(seconds) < 0.05, seconds


def test_solve_needs_neither_sklearn_nor_the_bare_kernels(tmp_path):
    """A solve from another folder, through PYTHONPATH alone, loads one copy of the kernels and no scikit-learn."""
    loaded = json.loads(python(SOLVE + "import sys, json; print(json.dumps(list(sys.modules)))", tmp_path))
    assert "sklearn" not in loaded
    assert "kernels" not in loaded
    assert "fastdmf.kernels.cpu" in loaded


def test_one_copy_of_the_kernels_in_the_source_root():
    """In the root of the tree, where a bare ``import kernels`` would work, nothing does it."""
    loaded = json.loads(python(SOLVE + "import sys, json; print(json.dumps(list(sys.modules)))", ROOT))
    assert "kernels" not in loaded


def test_estimators_load_lazily(tmp_path):
    """The estimators bring scikit-learn, and only they."""
    code = """if True:
        import sys, fastdmf
        fastdmf.EntryMask
        print("sklearn" in sys.modules)
        fastdmf.DMFImputer
        print("sklearn" in sys.modules)
    """
    assert python(code, tmp_path).split() == ["False", "True"]


def test_pyproject_names_every_package():
    """The mapping of the kernels folder defeats discovery, so a folder that is forgotten would be missing in wheels."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {"fastdmf": "fastdmf", "fastdmf.kernels": "kernels"}
    for path in (ROOT / "kernels").rglob("__init__.py"):
        parts = path.parent.relative_to(ROOT / "kernels").parts
        folders[".".join(("fastdmf.kernels", *parts))] = "/".join(("kernels", *parts))
    assert settings["tool"]["setuptools"]["package-dir"] == folders
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(folders)
    hard = {re.match(r"[\w-]+", line)[0] for line in settings["project"]["dependencies"]}
    assert hard == {"numpy", "scipy", "numba", "scikit-learn"}
    assert {"cuda12", "cuda13", "plot", "io", "test", "bench"} <= set(settings["project"]["optional-dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel offline, from a copy of what a release holds."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="offline builds need setuptools >= 77")
    assert setuptools
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = ("fastdmf/*.py", "fastdmf/py.typed", "kernels/**/*.py", "kernels/**/*.cu", "pyproject.toml", "README.md")
    for pattern in (*files, "LICENSE"):
        for path in ROOT.glob(pattern):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contents(wheel):
    """The wheel holds every module, the kernels under their public name, the type marker and the licence."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        text = file.read(f"fastdmf-{fastdmf.__version__}.dist-info/METADATA").decode()
        scripts = file.read(f"fastdmf-{fastdmf.__version__}.dist-info/entry_points.txt").decode()
    modules = {f"fastdmf/{p.name}" for p in (ROOT / "fastdmf").glob("*.py")}
    assert modules | {f"fastdmf/{name}" for name in KERNEL_FILES} | {"fastdmf/py.typed"} <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: BSD-3-Clause" in text
    assert "fastdmf = fastdmf.cli:main" in scripts


def test_wheel_alone_solves(wheel, tmp_path):
    """Unpacked away from the source tree, the wheel's own kernels are the ones that run."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = SOLVE + "import fastdmf.kernels as k; print(k.__file__)"
    where = Path(python(code, tmp_path, path=tmp_path / "site").strip())
    assert where == tmp_path / "site" / "fastdmf" / "kernels" / "__init__.py"
