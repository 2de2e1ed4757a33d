"""The one-way dependencies of the package, read from the source; and docstrings of the public names."""

import ast
from pathlib import Path

import pytest

import fastdmf

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top; a module may import modules of lower rows only.
LAYERS = [
    {"kernels"},
    {"arrays", "losses", "files"},
    {"cuda"},
    {"backend"},
    {"contract", "chain"},
    {"device_bounds"},
    {"masks", "seeded"},
    {"operators"},
    {"problem", "second_order", "symmetry", "device_chain"},
    {"rule"},
    {"auto", "flow", "rescaled", "scaled", "mirror", "subgradient", "normalised"},
    {"rules"},
    {"engine"},
    {"checkpoint", "checks", "mask_features", "row_models", "row_neighbours", "factor_model", "ids", "column_text"},
    {"entries", "shards", "mean_model", "penalties", "diagnostics", "theory", "spectral", "tables"},
    {"alternating", "covariance", "tangent", "forecast"},
    {"continuation", "held_entries", "row_subset"},
    {"descent", "variational"},
    {"noisy_fit", "sweep_table"},
    {"sweeps"},
    {"recovery"},
    {"progress"},
    {"fit_parts"},
    {"fitting"},
    {"entry_kfold"},
    {"row_fits"},
    {"table_descent"},
    {"table_choice"},
    {"imputer", "sensing", "completer", "quadratic"},
    {"display_axes"},
    {"display_records"},
    {"display_curves", "display_images", "display_phase", "display_values"},
    {"demo", "saving", "warmup", "command_files"},
    {"command_config", "command_fit", "command_host"},
    {"command_entries", "command_shards", "command_table"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The loop drives any solver, so it knows none, although it stands above their parts.
FORBIDDEN = {"engine": {"problem", "rule", "auto", "rules", "chain", "contract", "masks", "operators", "losses"}}
MAY_IMPORT = {
    "sklearn": {"progress", "fitting", "entry_kfold", "imputer", "sensing", "completer", "quadratic", "saving", "demo"},
    "cupy": {"arrays", "cuda"},
    "matplotlib": {"demo", "display_axes", "display_phase", "display_values"},
    "pyarrow": {"column_text"},
}


def imported(path):
    """Return the absolute names of all modules that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                assert ROOT / "kernels" in path.parents, f"{path}: relative import"
                origin = f"fastdmf.kernels.{origin}"
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def sources():
    """Return (module, path) of the package; everything below ``kernels`` counts as one module."""
    package = [(p.stem, p) for p in sorted((ROOT / "fastdmf").glob("*.py")) if p.name != "__init__.py"]
    return package + [("kernels", p) for p in sorted((ROOT / "kernels").rglob("*.py"))]


def targets(path):
    """Return the modules of fastdmf that a file imports, also through the package's lazy public names."""
    names = imported(path)
    assert "fastdmf" not in names, f"{path}: import a module, not the package"
    parts = {name.split(".")[1] for name in names if name.startswith("fastdmf.")}
    return {fastdmf._HOME.get(part, part) for part in parts} & set(RANK)


def test_every_module_has_a_layer():
    """A new module is placed in the order before it can be used."""
    assert {name for name, _ in sources()} == set(RANK)


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda value: getattr(value, "name", value))
def test_imports_go_down(module, path):
    """No arrow points up or sideways; the kernels see only each other."""
    for target in targets(path):
        assert RANK[target] < RANK[module] or module == target == "kernels", f"{path.name} imports {target}"
        assert target not in FORBIDDEN.get(module, ()), f"{path.name} may not know {target}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_who_imports_what(package):
    """Slow or optional packages have few doors."""
    importers = {module for module, path in sources() if package in {name.split(".")[0] for name in imported(path)}}
    assert importers <= MAY_IMPORT[package]


def test_the_checks_can_fail(tmp_path):
    """The reader sees imports inside functions and aliased ones."""
    path = tmp_path / "sample.py"
    code = ["import sklearn.base as b", "from fastdmf import rules, solve", "from kernels.cpu import x"]
    path.write_text("\n    ".join(["def f():", *code]), encoding="utf-8")
    assert imported(path) == {"sklearn.base", "fastdmf.rules", "fastdmf.solve", "kernels.cpu.x"}
    assert targets(path) == {"rules", "descent"}


def test_nothing_imports_the_bare_kernels_folder():
    """It would be a second copy of every kernel, found by accident of the working folder."""
    folders = ("fastdmf", "kernels", "tests", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 10
    for path in files:
        assert "kernels" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("name", fastdmf.__all__)
def test_public_names_are_documented(name):
    """Every public name loads, says where it lives and has a docstring of its own."""
    value = getattr(fastdmf, name)
    home = fastdmf._HOME.get(name)
    if home is None:
        assert value.__name__ == f"fastdmf.{name}"
    else:
        assert value.__module__ == f"fastdmf.{home}"
    # A class would inherit its base's docstring through the attribute.
    assert len(vars(value).get("__doc__") or "") > 40 if isinstance(value, type) else len(value.__doc__) > 40
    assert name in dir(fastdmf)


def test_unknown_name():
    """The lazy lookup fails like any attribute."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastdmf.nothing  # noqa: B018
