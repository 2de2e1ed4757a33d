"""Fits of small data of every kind with settings of every kind.

What comes out is finite and the same twice with one seed, and the imputer leaves alone what it was given; or it is
refused by a ``TypeError`` or ``ValueError`` of one line that names the setting or the data. Nothing of NumPy's warnings
is heard, and no fit takes long.
"""

import traceback
import warnings

import numpy as np
import pandas
import polars
from hypothesis import strategies as st
from scipy import sparse

import fastdmf
from bench.fuzz.harness import Case, Finding, refusal
from fastdmf.rules import Adam, GradientDescent, Momentum

__all__ = ["CASES", "prepare"]

# What a setting may be given, by name so that an example can be printed: the odd ones, and some that are right.
_ODD = {
    "None": None,
    "True": True,
    "False": False,
    "-1": -1,
    "0": 0,
    "1": 1,
    "2": 2,
    "3": 3,
    "0.5": 0.5,
    "2.5": 2.5,
    "1e-300": 1e-300,
    "1e300": 1e300,
    "nan": np.nan,
    "inf": np.inf,
    "-inf": -np.inf,
    "int64": np.int64(2),
    "float32": np.float32(0.25),
    "bool_": np.bool_(True),
    "x": "x",
    "auto": "auto",
    "": "",
    "bytes": b"x",
    "1j": 1j,
    "()": (),
    "(2,)": (2,),
    "(2, 3)": (2, 3),
    "(3, 0)": (3, 0),
    "('a', 2)": ("a", 2),
    "[2]": [2],
    "{}": {},
    "array": np.array([1.0, 2.0]),
    "0-d": np.array(2),
    "object": object(),
    "type": int,
    "NA": pandas.NA,
}
_HUGE = {"10**6": 10**6, "10**30": 10**30}
# Settings that one may wish for; a fit with a huge one of the first takes long, as it says.
_WISHES = {
    "solver": ["variational", "gaussian", "descent", "recovery"],
    "rule": ["gd", "adam", "momentum", "flow", "Adam()", "GradientDescent", "Momentum(0.1)"],
    "duplicates": ["sum", "mean", "last"],
    "device": ["cpu", "cuda"],
    "columns": ["a", "abc"],
    "standardize": [],
    "missing_values": ["-1"],
}
_NAMED = {
    "gd": "gd",
    "variational": "variational",
    "gaussian": "gaussian",
    "descent": "descent",
    "recovery": "recovery",
    "adam": "adam",
    "momentum": "momentum",
    "flow": "flow",
    "sum": "sum",
    "mean": "mean",
    "last": "last",
    "cpu": "cpu",
    "cuda": "cuda",
    "a": "a",
    "abc": ["a", "b", "c"],
    "Adam()": Adam(),
    "GradientDescent": GradientDescent,
    "Momentum(0.1)": Momentum(lr=0.1),
}
_VALUES = _ODD | _HUGE | _NAMED
_LONG = {"depth", "n_init"}
# Words for what is wrong beside the settings themselves.
_DATA = [
    "X",
    "y ",
    "y:",
    " y",
    "A ",
    "entry_weight",
    "values",
    "weights",
    "pairs",
    "row ids",
    "column ids",
    "entries",
    "measurements",
]
_ALIASES = {"random_state": ["seed", "Seed"], "width": ["rank"], "validation_fraction": ["validation"]}


@st.composite
def _settings(draw, cls):
    """Return name -> name of a value of at most three settings that are off their default."""
    known = sorted(cls().get_params())
    chosen = draw(st.sets(st.sampled_from(known), max_size=3)) if draw(st.booleans()) else set()
    if draw(st.booleans()):
        chosen |= {"solver"} & set(known)
    out = {}
    for name in sorted(chosen):
        odd = sorted(_ODD if name in _LONG else _ODD | _HUGE)
        wishes = _WISHES.get(name)
        out[name] = draw(
            st.sampled_from(odd) if not wishes or draw(st.integers(0, 3)) == 0 else st.sampled_from(wishes)
        )
    return out


def _made(cls, settings, **defaults):
    return cls(**defaults | {name: _VALUES[value] for name, value in settings.items()})


# --- numbers -----------------------------------------------------------------------------------------------------

_KINDS = ["normal", "low rank", "integers", "bits", "constant", "zeros", "spike", "spread"]
_SCALES = [0, 0, 0, 0, 1, -3, 6, -6, -20, 20, 35, -38, -42, 100, -100, 150, -150, -160, 160, 200, 290, -290, 305, -310]
_TYPES = ["f8", "f8", "f8", "f4", "f4", "f2", "i8", "i4", "u1", "b1", "O", "U", "c16", "M8[s]", "list"]
_shapes = st.tuples(st.integers(1, 12), st.integers(1, 9))
_numbers = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(_KINDS),
        "scale": st.sampled_from(_SCALES),
        "type": st.sampled_from(_TYPES),
        "offset": st.sampled_from([0, 0, 0, 1, -5, 1000]),
        "odd": st.sampled_from(["", "", "", "", "nan", "inf", "-inf", "big", "tiny"]),
        "seed": st.integers(0, 99),
    }
)


def _array(made, shape):
    """Return the numbers of ``_numbers`` in a shape, float64 until :func:`_typed`."""
    rng = np.random.default_rng(made["seed"])
    size = int(np.prod(shape))
    kind = made["kind"]
    if kind == "low rank" and len(shape) == 2:
        out = rng.standard_normal((shape[0], 1)) @ rng.standard_normal((1, shape[1]))
    elif kind == "spread":
        out = rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 8, shape)
    else:
        out = {
            "integers": lambda: rng.integers(-5, 6, shape).astype(float),
            "bits": lambda: rng.integers(0, 2, shape).astype(float),
            "constant": lambda: np.full(shape, 0.7),
            "zeros": lambda: np.zeros(shape),
            "spike": lambda: np.eye(1, size, size // 2).reshape(shape),
        }.get(kind, lambda: rng.standard_normal(shape))()
    with np.errstate(all="ignore"):
        out = (out + made["offset"]) * 10.0 ** made["scale"]
    if made["odd"] and size:
        odd = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "big": 1.7e308, "tiny": 5e-324}[made["odd"]]
        out.flat[rng.integers(size)] = odd
    return out


def _typed(array, kind):
    """Return an array in another type, as a user may hold it."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "list":
            return array.tolist()
        if kind == "U":
            return np.where(np.isfinite(array), array.astype("U"), "")
        if kind == "O":
            return np.where(np.isnan(array), None, array.astype(object))
        if kind[0] in "iubM" and not np.isfinite(array).all():
            return array
        return array.astype(kind)


def _fit(call, settings, *names):
    """Return what a fit returns, or None once its refusal is checked."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = call()
        for warning in caught:  # those of a refusal of scikit-learn's are its own
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return out
    except (TypeError, ValueError) as error:
        if "sklearn" in traceback.extract_tb(error.__traceback__)[-1].filename:
            return None  # scikit-learn's own sentences, some of several lines
        refusal(error, *names, *_DATA, *settings, *(alias for name in settings for alias in _ALIASES.get(name, ())))
        return None
    except RuntimeError as error:  # of a device that is not there
        refusal(error, "cuda", "CUDA", "cupy")
        return None
    except ImportError as error:
        refusal(error, "cuda", "CUDA", "cupy")
        return None


def _check_finite(**arrays):
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Finding(f"{name} {array.ravel()[~np.isfinite(array.ravel())][:3]} of shape {array.shape}")


# --- the completer -----------------------------------------------------------------------------------------------

_FORMS = "names mixed floats list frame polars columns csr csc coo lil dok dia array wide three flat".split()
_completions = st.fixed_dictionaries(
    {
        "shape": _shapes,
        "share": st.sampled_from([0.0, 0.2, 0.6, 0.6, 1.0]),
        "numbers": _numbers,
        "form": st.sampled_from(["pairs", "pairs", "pairs", *_FORMS]),
        "weights": st.sampled_from(["", "", "", "ones", "zeros", "some", "negative", "short", "nan", "text", "1e300"]),
        "twice": st.booleans(),
        "again": st.booleans(),
        "settings": _settings(fastdmf.DMFCompleter),
    }
)


def _entries(value):
    """Return (X, y, weights, plain pairs) as the form wants them."""
    rng = np.random.default_rng(value["numbers"]["seed"])
    n, p = value["shape"]
    pairs = np.argwhere(rng.random((n, p)) < value["share"])
    if value["twice"]:
        pairs = np.concatenate([pairs, pairs[:2]])
    y = _array(value["numbers"], (len(pairs),))
    typed = _typed(y, value["numbers"]["type"])
    weights = {
        "ones": np.ones(len(y)),
        "zeros": np.zeros(len(y)),
        "some": np.arange(len(y)) % 3,
        "negative": -np.ones(len(y)),
        "short": np.ones(max(0, len(y) - 1)),
        "nan": np.full(len(y), np.nan),
        "text": ["a"] * len(y),
        "1e300": np.full(len(y), 1e300),
    }.get(value["weights"])
    form = value["form"]
    names = [(f"user {i}", int(j)) for i, j in pairs]
    if form in ("csr", "csc", "coo", "lil", "dok", "dia", "array"):
        if value["numbers"]["type"] in ("O", "U", "list", "M8[s]", "f2"):
            typed = y
        whole = sparse.coo_array((np.asarray(typed), pairs.T.reshape(2, -1)), (n, p))
        with np.errstate(all="ignore"):  # scipy may add up what comes twice
            return (whole if form == "array" else whole.asformat(form)), None, weights
    if form in ("frame", "polars"):
        typed = y if value["numbers"]["type"] in ("c16", "M8[s]") else typed
        columns = {"a": [name for name, _ in names], "b": pairs[:, 1], "c": list(typed)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = pandas.DataFrame if form == "frame" else lambda data: polars.DataFrame(data, strict=False)
            return make(columns), None, weights
    X = {
        "names": lambda: np.array(names, object).reshape(-1, 2),
        "mixed": lambda: np.array([(i if k % 2 else str(i), j) for k, (i, j) in enumerate(pairs)], object).reshape(
            -1, 2
        ),
        "floats": lambda: pairs + 0.5 * (value["numbers"]["seed"] % 2),
        "list": lambda: names,
        "columns": lambda: pandas.DataFrame(pairs, columns=["a", "b"]),
        "wide": lambda: np.column_stack([pairs, pairs]),
        "three": lambda: pairs[None],
        "flat": lambda: pairs.ravel(),
    }.get(form, lambda: pairs)()
    return X, typed, weights


def _check_completer(value):
    X, y, weights = _entries(value)
    settings = value["settings"]
    fit = lambda: _made(fastdmf.DMFCompleter, settings, random_state=0).fit(X, y, entry_weight=weights)  # noqa: E731
    model = _fit(fit, settings, "DataFrame")
    if model is None:
        return False
    matrix = model.reconstruct()
    _check_finite(reconstruct=matrix, factors=model.factors_[0], noise=model.noise_variance_, mean=model.mean_)
    pattern = X if value["form"] in ("csr", "csc", "coo", "lil", "dok", "array") else _pairs_of(X)
    predicted = model.predict(pattern)
    _check_finite(predict=predicted.data if sparse.issparse(predicted) else predicted)
    if model.solver_ == "variational":
        spread = model.predict(pattern, return_std=True)[1]
        _check_finite(spread=spread.data if sparse.issparse(spread) else spread)
    columns, _ = model.top_k(k=min(2, matrix.shape[1]), exclude_seen=False)
    if len(columns) != len(matrix):
        raise Finding(f"top_k of {len(columns)} rows")
    if value["again"] and "random_state" not in settings:
        if not np.array_equal(fit().reconstruct(), matrix):
            raise Finding("another fit with the same seed is another")
        model.duplicates = "last"
        _fit(lambda: model.partial_fit(X, y), settings, "DataFrame")
        _check_finite(partial_fit=model.reconstruct())
        _check_finite(fold_in=model.fold_in(X, y).reconstruct())
    return True


def _pairs_of(X):
    if isinstance(X, pandas.DataFrame):
        return X[["a", "b"]]
    return X[:, ["a", "b"]] if isinstance(X, polars.DataFrame) else X


# --- the imputer -------------------------------------------------------------------------------------------------

_tables = st.fixed_dictionaries(
    {
        "shape": _shapes | st.sampled_from([(1, 1), (1, 9), (12, 1), (40, 3), (0, 3), (3, 0)]),
        "holes": st.sampled_from([0.0, 0.2, 0.2, 0.5, 0.9, 1.0]),
        "blank": st.sampled_from(["", "", "row", "column", "rows and columns"]),
        "columns": st.sampled_from(["", "", "", "constant", "equal", "scaled", "linear"]),
        "numbers": _numbers,
        "form": st.sampled_from(
            ["array", "array", "array", "frame", "polars", "csr", "masked", "fortran", "flat", "three", "read only"]
        ),
        "again": st.booleans(),
        "settings": _settings(fastdmf.DMFImputer),
    }
)


def _table(value):
    """Return (X as the form wants it, the numbers with NaN in the holes)."""
    rng = np.random.default_rng(value["numbers"]["seed"])
    n, p = value["shape"]
    X = _array(value["numbers"], (n, p))
    if X.size:
        with np.errstate(all="ignore"):
            if value["columns"] == "constant":
                X[:, 0] = X[0, 0]
            elif value["columns"] == "equal":
                X[:] = X[:, :1]
            elif value["columns"] == "scaled":
                X *= 10.0 ** np.arange(p)
            elif value["columns"] == "linear":
                X[:, -1] = X[:, 0] * 2
        X[rng.random((n, p)) < value["holes"]] = np.nan
        if "row" in value["blank"]:
            X[0] = np.nan
        if "column" in value["blank"]:
            X[:, -1] = np.nan
    if value["settings"].get("missing_values") == "-1":
        X = np.where(np.isnan(X), -1, X)
    typed = _typed(X, value["numbers"]["type"])
    form = value["form"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "frame":
            return pandas.DataFrame(typed, columns=[f"c{j}" for j in range(p)])
        if form == "polars":
            return polars.DataFrame(
                {f"c{j}": [row[j] for row in np.asarray(typed).tolist()] for j in range(p)}, strict=False
            )
        array = np.asarray(typed)
        if form == "csr":
            return sparse.csr_array(X)
        if form == "masked":
            return np.ma.masked_invalid(array) if array.dtype.kind == "f" else np.ma.masked_array(array)
    array = {"fortran": np.asfortranarray(array), "flat": array.ravel(), "three": array[None]}.get(form, typed)
    if form == "read only" and isinstance(array, np.ndarray):
        array.flags.writeable = False
    return array


def _check_imputer(value):
    X, settings = _table(value), value["settings"]
    before = X.copy() if isinstance(X, np.ndarray) else None
    fit = lambda: _made(fastdmf.DMFImputer, settings, random_state=0).fit(X)  # noqa: E731
    names = ["Found array with", "Expected 2D array", "sparse", "Sparse"]
    model = _fit(fit, settings, *names)
    if before is not None and not np.array_equal(before, X, equal_nan=before.dtype.kind in "fcM"):
        raise Finding("the fit writes to X")
    if model is None:
        return False
    out = model.transform(X)
    given = _numbers_of(X, model)
    kept = model._kept()
    told = ~model._empty[kept] | bool(model.keep_empty_features)
    _check_finite(transform=out, reconstruct=model.reconstruct())
    seen = ~np.isnan(given[:, kept])
    observed, filled = given[:, kept][seen], np.asarray(out)[:, : kept.sum()][seen]
    if not np.array_equal(observed.astype(filled.dtype), filled):
        raise Finding("observed entries change")
    if not told.all():
        raise Finding("an empty column is kept")
    uncertainty = model.uncertainty(X)
    _check_finite(uncertainty=uncertainty[:, ~model._empty[kept]], noise=model.noise_variance_)
    if np.isfinite(given).any() and (~np.isnan(given) & kept).any():
        _check_finite(score=max(model.score(X), -1e308))  # -inf where errors have no squares, never NaN
    if value["again"] and "random_state" not in settings and not np.array_equal(fit().transform(X), out):
        raise Finding("another fit with the same seed is another")
    return True


def _numbers_of(X, model):
    """Return X as float64 with NaN in its holes."""
    if isinstance(X, np.ma.MaskedArray):
        X = X.astype(float).filled(np.nan)
    if isinstance(X, (pandas.DataFrame, polars.DataFrame)):
        X = X.to_numpy()
    X = np.asarray(X)
    X = (np.where(X == "", "nan", X) if X.dtype.kind == "U" else X).astype(np.float64)
    marker = model._marker()
    return X if np.isnan(marker) else np.where(X == marker, np.nan, X)


# --- sensing -----------------------------------------------------------------------------------------------------

_measurements = st.fixed_dictionaries(
    {
        "count": st.sampled_from([0, 1, 2, 5, 20, 40]),
        "shape": st.tuples(st.integers(1, 5), st.integers(1, 4)),
        "a": _numbers,
        "y": _numbers,
        "exact": st.booleans(),
        "form": st.sampled_from(["flat", "flat", "cube", "operator", "csr", "frame", "one", "four"]),
        "again": st.booleans(),
        "settings": _settings(fastdmf.DMFSensing),
    }
)


def _check_sensing(value):
    m, (n1, n2), settings = value["count"], value["shape"], value["settings"]
    A = _array(value["a"], (m, n1 * n2))
    y = _array(value["y"], (m,))
    if value["exact"]:
        with np.errstate(all="ignore"):
            y = A @ np.outer(np.arange(n1) + 1.0, np.arange(n2) - 0.5).ravel()
    y, typed = _typed(y, value["y"]["type"]), _typed(A, value["a"]["type"])
    form = value["form"]
    try:
        given = {
            "cube": lambda: np.asarray(typed).reshape(m, n1, n2),
            "operator": lambda: fastdmf.GaussianDense(A, (n1, n2)),
            "csr": lambda: sparse.csr_array(A),
            "frame": lambda: pandas.DataFrame(typed),
            "one": lambda: np.asarray(typed).ravel(),
            "four": lambda: np.asarray(typed)[None, None],
        }.get(form, lambda: typed)()
    except (TypeError, ValueError) as error:  # of the operator's own
        refusal(error, "matrices", "a ", "operator")
        return False
    fit = lambda: _made(fastdmf.DMFSensing, settings, random_state=0).fit(given, y)  # noqa: E731
    names = [
        "Found array with",
        "Expected 2D array",
        "sparse",
        "Sparse",
        "Found input variables",
        "operator",
        "1d array",
    ]
    model = _fit(fit, settings, *names)
    if model is None:
        return False
    _check_finite(matrix=model.matrix_, predict=model.predict(given))
    if value["again"] and "random_state" not in settings and not np.array_equal(fit().matrix_, model.matrix_):
        raise Finding("another fit with the same seed is another")
    return True


CASES = {
    "completer": Case(_completions, _check_completer, 20.0),
    "imputer": Case(_tables, _check_imputer, 20.0),
    "sensing": Case(_measurements, _check_sensing, 20.0),
}


def prepare():
    """Compile what every fit needs, before the memory is limited and the time counts."""
    rng = np.random.default_rng(0)
    for kind in ("f8", "f4"):
        X = (rng.standard_normal((20, 2)) @ rng.standard_normal((2, 9)) + 0.1).astype(kind)
        X[rng.random(X.shape) < 0.3] = np.nan
        pairs, A = np.argwhere(~np.isnan(X)), rng.standard_normal((30, 4, 3)).astype(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for solver in ("auto", "gaussian", "variational", "descent", "recovery"):
                fastdmf.DMFImputer(solver=solver, random_state=0).fit_transform(X)
                if solver != "gaussian":
                    fastdmf.DMFCompleter(solver=solver, random_state=0).fit(pairs, X[tuple(pairs.T)]).reconstruct()
                if solver not in ("gaussian", "variational"):
                    fastdmf.DMFSensing(solver=solver, random_state=0).fit(A, A[:, 0, 0])
