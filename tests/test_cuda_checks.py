"""Launchers of CUDA kernels: they refuse what does not fit before anything runs, and are called as the CPU's are."""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest
from cuda_launches import Refusing, nan, summing

from fastdmf.chain import Layout
from fastdmf.kernels import cpu, cuda
from fastdmf.kernels.cuda import dense, entry, gaussian, lbfgs, row_solve, seeded, slices, update
from fastdmf.kernels.cuda.checks import check_arguments, table
from fastdmf.kernels.cuda.measurements import plan_measurements
from fastdmf.kernels.cuda.small_chain import SmallChainPlan, small_chain

# The table -----------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("row", "array", "message"),
    [
        ("float64 3", zeros(3), "a must be an array of float64, got float32"),
        ("REAL 3", zeros(3, dtype=np.int32), "a must be an array of float32 or float64, got int32"),
        ("INDEX 3", zeros(3, dtype=np.uint32), "a must be an array of int32 or int64, got uint32"),
        ("float32 3", [0.0, 1.0, 2.0], "a must be an array of float32, got list"),
        ("float32 3", None, "a must be an array, got None"),
        ("float32 n 2", zeros(3), r"a must have shape \(n, 2\), got \(3,\)"),
        ("float32 n 2", zeros(3, 4), r"a must have shape \(n, 2\) with n = 3, got \(3, 4\)"),
        ("float32 n n", zeros(3, 4), r"a must have shape \(n, n\) with n = 3, n = 3, got \(3, 4\)"),
        ("float32 n n+1", zeros(3, 3), r"a must have shape \(n, n\+1\) with n = 3, n = 3, got \(3, 3\)"),
        ("float32 m+", zeros(6), r"a must have shape \(m\+\) with m = 7, got \(6,\)"),
        ("float32 1|m", zeros(6), r"a must have shape \(1\|m\) with m = 7, got \(6,\)"),
        ("float32 2 3", zeros(3, 2).T, "a must be C-contiguous"),
    ],
)
def test_a_row_of_the_table(row, array, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_arguments(table(a=row), {"m": 7}, a=array)


def test_names_and_letters_stand_for_one_thing():
    rows = table(x="REAL B n", y="STORED n", z="REAL? 1|B n+1", u="INDEX k+", v="INDEX k+1")
    fine = {"x": zeros(2, 3), "y": zeros(3), "z": zeros(1, 4), "u": zeros(9, dtype=np.int64)}
    fine["v"] = zeros(6, dtype=np.int64)
    known = {"REAL": "float32", "INDEX": "int64", "B": 2, "n": 3, "k": 5}
    assert check_arguments(rows, {"k": 5}, **fine) == known
    check_arguments(rows, {"k": 5}, **(fine | {"y": zeros(3, dtype=np.uint16), "z": None}))
    for name, array, message in (
        ("z", zeros(1, 4, dtype=np.float64), "z must be an array of float32, got float64"),
        ("v", zeros(6, dtype=np.int32), "v must be an array of int64, got int32"),
        ("y", zeros(3, dtype=np.float64), "y must be an array of float32 or uint16, got float64"),
        ("z", zeros(3, 4), "z must have shape"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            check_arguments(rows, {"k": 5}, **(fine | {name: array}))
    with pytest.raises(ValueError, match="y must be an array of float64, got uint16"):
        check_arguments(table(x="REAL n", y="STORED n"), x=nan(3), y=zeros(3, dtype=np.uint16))


# Every launcher, every argument --------------------------------------------------------------------------------

RUNS, REFUSING = 3, Refusing()


def sides(n1=5, n2=4):
    """Return a mask by rows and by columns, with rows that are cut."""
    indptr, indices = np.array([0, 4, 4, 7, 9, 10]), np.array([0, 1, 2, 3, 0, 2, 3, 1, 2, 0], np.int32)
    colptr, of_column = np.array([0, 3, 5, 8, 10]), np.array([0, 2, 4, 0, 3, 0, 2, 3, 0, 2], np.int32)
    return (
        entry.EntrySide.of(indptr, indices, longest=2),
        entry.EntrySide.of(colptr, of_column, longest=2),
    )


def entry_calls():
    (rows, columns), h = sides(), 8
    p, qt, y = zeros(RUNS, 5, h), zeros(RUNS, 4, h), zeros(RUNS, 10)
    items, parts = len(rows.row), zeros(RUNS, max(rows.pieces, columns.pieces), h)
    terms = (nan(RUNS, items), *summing(RUNS, items))
    data = {"rows": rows, "y": y, "w": y[:1], "columns": columns, "yc": y, "wc": y[:1], "code": 0, "delta": 1.0}
    sizes = {"gp": p, "gqt": qt, "losses": nan(RUNS), "p": p, "qt": qt}
    yield entry.entry_loss_pull, 2, {**sizes, **data, "parts": parts, "item_losses": terms}
    yield entry.entry_forward, 1, {"out": y, "p": p, "qt": qt, "rows": rows}
    yield entry.entry_pull, 1, {"g": p, "r": y, "q": qt, "side": rows, "parts": parts}


def measured_calls():
    m, d = 7, 40
    x, y, losses = zeros(RUNS, d), zeros(RUNS, m), nan(RUNS)
    terms, stream = (nan(RUNS, m), *summing(RUNS, m)), cpu.seeded_stream(1, 2)
    narrow = plan_measurements(m, d, RUNS, np.float32, pack=4)
    wide = dataclasses.replace(narrow, pack=1, threads=32, per=1, windows=2, rows=5)
    partial, a, rows = zeros(narrow.ranges, RUNS, d), zeros(m, d), zeros(m, dtype=np.uint32)
    data = {"y": y, "w": y[:1], "code": 0, "delta": 1.0}
    for plan, batch in ((narrow, None), (wide, (zeros(2, RUNS, 5), zeros(RUNS, 5)))):
        outputs = {"plan": plan, "g": x, "losses": losses}
        scratch = {"partial": partial, "terms": terms, "batch": batch}
        yield gaussian.gaussian_loss_pull, 2, {**outputs, "a": a, "x": x, **data, **scratch}
        parts = None if batch is None else zeros(2, RUNS, m)
        yield gaussian.gaussian_forward, 1, {"plan": plan, "out": y, "a": a, "x": x, "parts": parts}
        drawn = {"rows": rows, "stream": stream}
        yield seeded.seeded_forward, 1, {"plan": plan, "out": y, "x": x, **drawn, "parts": parts}
    outputs = {"plan": narrow, "g": x, "losses": losses}
    yield seeded.seeded_loss_pull, 2, {**outputs, "x": x, **data, **drawn, "partial": partial, "terms": terms}
    yield gaussian.gaussian_pull, 1, {"plan": narrow, "g": x, "a": a, "r": y, "partial": partial}
    yield seeded.seeded_adjoint, 1, {"plan": narrow, "g": x, "r": y, **drawn, "partial": partial}
    yield seeded.seeded_entries, 1, {"out": a, **drawn}


def row_solve_call():
    n1, n2, h, indptr = 5, 4, 8, np.array([0, 4, 4, 7, 9, 10])
    y, vector = zeros(10), zeros(h)
    vectors = {"scale": zeros(n1), "scaled_ridge": vector, "ridge": vector, "moment": vector, "free": vector}
    return {
        **{"total": nan(1), "a": zeros(n1, h), "b": zeros(n2, h), "mean": zeros(n1, h), "indptr": indptr},
        **{"lists": row_solve.row_solve_lists(indptr, np.int32, 2), "indices": zeros(10, dtype=np.int32)},
        **{"y": y, "w": y, **vectors, "steps": 2, "tol": 0.1, "squares": (nan(1, n1), *summing(1, n1))},
    }


def update_calls():
    x, step_size, count = zeros(RUNS, 6), nan(RUNS), nan(RUNS)
    active, tickets = zeros(RUNS, dtype=np.uint8), zeros(RUNS, dtype=np.uint32)
    flags = {"count": count, "active": active}
    yield update.update_gd, 1, {"x": x, "grad": x, "step_size": step_size, **flags}
    moving = {"x": x, "velocity": x, "grad": x, "step_size": step_size, "beta": 0.9}
    yield update.update_momentum, 1, {**moving, **flags}
    moments = {"x": x, "mean": x, "square": x, "grad": x, "step_size": step_size}
    betas = {"beta1": 0.9, "beta2": 0.9, "eps": 1e-8}
    yield update.update_adam, 1, {**moments, **betas, "count": count, "tickets": tickets, "active": active}
    steps = {"step_size": step_size, "mean_square": count, "squares": count, "lr": count}
    yield update.update_group_rmsprop, 1, {**steps, "beta": 0.9, "eps": 0.1, "count": count, "active": active}


def small_chain_calls():
    dims = (4, 3, 5)
    for rule, velocity, mean in (("momentum", True, None), ("group_rmsprop", None, True)):
        plan = SmallChainPlan.of(dims, Layout(dims).offsets, np.float32, rule)
        x, number = zeros(RUNS, plan.size), nan(RUNS)
        yield (
            small_chain,
            1,
            {
                **{"plan": plan, "x": x, "grad": x, "velocity": x if velocity else None},
                **{"mean_square": number if mean else None, "count": zeros(RUNS, dtype=np.int64)},
                **{"status": zeros(RUNS, dtype=np.int32), "losses": number, "lr": number, "factors": zeros(RUNS)},
                **{"divisors": number, "ceilings": number, "indptr": zeros(RUNS, 6, dtype=np.int64)},
                **{"indices": zeros(9, dtype=np.int32), "y": zeros(9), "w": zeros(9), "code": 0, "delta": 1.0},
                **{"beta": 0.9, "eps": 0.1, "tol": 1e-3, "max_iter": 9, "check_every": 2, "turns": 4},
            },
        )


def slices_calls():
    x, runs = zeros(RUNS, 5000), nan(RUNS)
    yield slices.slices_move, 1, {"out": x, "x": x, "steps": runs, "direction": x}
    scratch = {"scratch": summing(RUNS, 5000)[0]}
    yield slices.slices_dot, 1, {"out": runs, "a": x, "b": x, **scratch}
    yield slices.slices_sum, 1, {"out": runs, "x": nan(RUNS, 5000), **scratch}


def dense_call():
    g, terms = zeros(RUNS, 5000), (nan(RUNS, 2), *summing(RUNS, 2))
    return {"g": g, "losses": nan(RUNS), "y": g, "w": g[:1], "code": 0, "delta": 1.0, "terms": terms}


CALLS = [
    *slices_calls(),
    *entry_calls(),
    *measured_calls(),
    (row_solve.row_solve, 2, row_solve_call()),
    *update_calls(),
    *small_chain_calls(),
    (dense.dense_residual, 2, dense_call()),
]


def call(function, modules, arguments, module=REFUSING):
    keywords = {
        name: value
        for name, value in arguments.items()
        if name in (parameters := inspect.signature(function).parameters)
        and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    }
    rest = [value for name, value in arguments.items() if name not in keywords]
    return function(*[module] * modules, *rest, **keywords)


def places(arguments):
    """Yield (argument, how it is told of, array, function that returns the arguments with another array there)."""
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            yield name, name, value, lambda new, name=name: {**arguments, name: new}
        elif isinstance(value, entry.EntrySide):
            for field in ("begin", "row", "slot", "cut", "first", "indices"):

                def other(new, name=name, value=value, field=field):
                    return {**arguments, name: dataclasses.replace(value, **{field: new})}

                yield name, f"{name}.{field}", getattr(value, field), other
        elif isinstance(value, tuple) and isinstance(value[0], np.ndarray):
            for k, array in enumerate(value):

                def other(new, name=name, value=value, k=k):
                    return {**arguments, name: (*value[:k], new, *value[k + 1 :])}

                yield name, f"{name}[{k}]", array, other


def wrong(array):
    """Yield arrays that are not what ``array`` is: its type, its number of dimensions, each size, its order."""
    yield np.zeros(array.shape, np.int16)
    yield array[None]
    for axis in range(array.ndim):
        yield np.delete(array, -1, axis)
    yield np.repeat(array, 2, axis=array.ndim - 1)[..., ::2]


# Sizes that may be smaller: (launcher, argument, axis).
FREE = {
    ("slices_sum", "x", 1),  # as many ranges
    ("entry_pull", "parts", 1),  # the other side has more pieces
    ("row_solve", "b", 0),
    ("seeded_forward", "x", 1),  # windows of single columns
}


@pytest.mark.parametrize(
    ("function", "modules", "arguments"), CALLS, ids=[f"{call[0].__name__}{k}" for k, call in enumerate(CALLS)]
)
def test_every_array_of_a_launch_is_checked(function, modules, arguments):
    """Whatever is wrong, nothing is launched, and the message names an argument; this one where it is no other."""
    with pytest.raises(AssertionError, match="was launched"):  # as it stands all is fine
        call(function, modules, arguments)
    names, tried = {re.escape(name) for _, name, _, _ in places(arguments)} | {"rows", "columns", "side", "lists"}, 0
    for name, told, array, change in places(arguments):
        for k, other in enumerate(wrong(array)):
            if other.shape == array.shape and other.dtype == array.dtype and other.flags.c_contiguous:
                continue  # one number has one order
            if other.ndim == array.ndim and array.shape[0] == 1 and other.shape[0] == 0 and name in ("w", "wc"):
                other = np.repeat(array, 2, axis=0)
            if (function.__name__, told, k - 2) in FREE:
                continue
            with pytest.raises(ValueError) as caught:
                call(function, modules, change(other))
            exact = re.escape(told) if k < 2 else f"({'|'.join(names)})"
            assert re.match(rf"{exact}( |\[)", str(caught.value)), (told, other.shape, str(caught.value))
            tried += 1
    assert tried >= 3 * len(list(places(arguments)))
    # No argument of a launcher that is an array is left out of the calls above.
    left = {"module", "moves", "sums", *arguments}
    assert set(inspect.signature(function).parameters) <= left | {"nesterov"}


def test_what_goes_together_is_checked():
    calls = {function.__name__: (function, modules, arguments) for function, modules, arguments in reversed(CALLS)}

    def refused(name, message, **changed):
        function, modules, arguments = calls[name]
        with pytest.raises(ValueError, match=message):
            call(function, modules, {**arguments, **changed})

    rows, columns = sides()
    refused("entry_loss_pull", "^rows must have 5 rows, got 4", rows=columns)
    refused("entry_loss_pull", "^columns must have as many entries as rows, 10, got 9", columns=fewer(columns))
    refused("entry_loss_pull", "^w and wc must both be None", w=None)
    refused("entry_loss_pull", "^parts must be an array for .* pieces", parts=None)
    refused("entry_pull", "^parts must be an array for .* pieces", parts=None)
    refused("entry_pull", "^side must have 5 rows", side=columns)
    refused("entry_pull", "^side must have indices below 3, got 3", q=zeros(RUNS, 3, 8))
    plan = dataclasses.replace(plan_measurements(7, 40, RUNS, np.float32), pack=1, per=1, threads=32)
    for name in ("gaussian_forward", "seeded_forward"):
        refused(name, "^(a|x) has 40 columns, which this plan is not for", plan=plan)
    wide = CALLS[9][2]["plan"]
    assert wide.windows == 2
    refused("gaussian_loss_pull", "^batch must be two arrays for 2 windows, got None", plan=wide, batch=None)
    refused("seeded_loss_pull", "^plan has 2 windows", plan=wide)
    refused("seeded_entries", "^stream must be three numbers of uint32", stream=(1, 2, 3))
    refused("seeded_entries", "^out must have a multiple of 4 columns, got 6", out=zeros(7, 6))
    refused("row_solve", "^lists must be two with 5 rows in all", lists=(zeros(4, dtype=np.int32),) * 2)
    refused("small_chain", "^velocity must be an array for rule 'momentum', got None", velocity=None)
    refused("small_chain", "^check_every must be at least 1, got 0", check_every=0)
    refused("small_chain", "^max_iter must be at least 0, got -1", max_iter=-1)
    with pytest.raises(ValueError, match="^scratch must be 1 arrays for sums over .3, 5000., got 0"):
        slices.slices_sum(REFUSING, nan(RUNS), nan(RUNS, 5000))


@pytest.mark.parametrize("function", [lbfgs.lbfgs_try, lbfgs.lbfgs_judge])
@pytest.mark.parametrize("k", range(5))
def test_vectors_of_a_search_are_checked(function, k):
    """The memory's and each of the four points."""
    runs, rows, size = 2, 6, 32
    vectors = [zeros(runs, rows, size), *(zeros(runs, size) for _ in range(4))]
    flags, numbers = np.ones(runs, bool), [np.zeros(runs) for _ in range(6)]
    memory = np.zeros((runs, 3, 3)), np.zeros((runs, 3, 3)), np.zeros((runs, rows)), np.zeros((runs, rows)), numbers[0]
    search = *(np.ones(runs) for _ in range(4)), *(np.zeros(runs, int) for _ in range(2)), flags, ~flags

    def search_with(vectors):
        whole = (vectors[0], *memory, np.zeros(runs, int), np.zeros(runs, int))
        rest = whole, search, tuple(vectors[1:])
        if function is lbfgs.lbfgs_try:
            return function(REFUSING, REFUSING, None, *rest, flags)
        return function(
            REFUSING, REFUSING, None, flags.copy(), *rest, numbers[:2], numbers[0], flags, (0, 0, 0, 1, 1, 1)
        )

    for wrong_one in wrong(vectors[k]):
        with pytest.raises(ValueError, match="must (be an array|have shape|be C-contiguous)"):
            search_with([*vectors[:k], wrong_one, *vectors[k + 1 :]])


def fewer(side):
    return dataclasses.replace(side, entries=side.entries - 1)


# The same names on both sides ----------------------------------------------------------------------------------

# What both have: arguments of the device alone (modules, plans, scratch, and what stands for indices), and of the CPU
# alone. The others must have the same names in the same order.
SHARED = {
    "slices_move": ("module", ""),
    "slices_dot": ("module scratch", ""),
    "entry_forward": ("module rows", "indptr indices"),
    # One of the two products at a time.
    "entry_pull": ("module g q side parts", "gp gqt p qt indptr indices cuts copies"),
    "dense_residual": ("module sums terms", ""),
    "gaussian_loss_pull": ("module sums plan terms batch", ""),
    "gaussian_forward": ("module plan parts", ""),
    "gaussian_pull": ("module plan", ""),
    "seeded_loss_pull": ("module sums plan terms", "scratch"),
    "seeded_forward": ("module plan parts", "scratch"),
    "seeded_adjoint": ("module plan", "scratch"),
    "seeded_entries": ("module", "scratch"),
    "row_solve": ("module sums total lists squares", ""),
    "lbfgs_try": ("module moves scratch", ""),
    "lbfgs_judge": ("module moves scratch", ""),
    "update_gd": ("module active", ""),
    "update_momentum": ("module count active", ""),
    "update_adam": ("module tickets active", ""),
    "update_group_rmsprop": ("module active", ""),
}
# Small matrices go through one call there, through cuBLAS and dense_residual here; pairs and products of given numbers
# are the estimators', which compute on the CPU. seeded_squared_norms is a sum over seeded_entries, and the regressions'
# choice of a variant has its place in the table of a device.
CPU_ALONE = {
    *("chain_halves", "chain_power", "chain_runs", "chain_runs_parallel", "entry_one_pass", "entry_product"),
    *("entry_two_pass", "lbfgs_coefficients", "pair_moments", "pair_predict", "row_solver", "seeded_squared_norms"),
}
# Sizes, routes and indices, which the host computes for both, and parts that other kernels are made of.
HOST = {
    *("aligned_empty", "chain_loss", "chain_padded", "chain_plan", "chain_route", "dense_cells", "entry_blocks"),
    *("entry_column_cuts", "entry_columns", "entry_cuts", "entry_route", "entry_sort", "index_type", "row_multiple"),
    *("sampled_gather", "sampled_reorder", "sampled_residuals", "seeded_scratch", "seeded_stream", "seeded_width"),
}
# Two passes at a time, which the CPU has as entry_two_pass; sums in rounds, and of windows; descents in one launch.
CUDA_ALONE = {"entry_loss_pull", "join", "slices_sum", "small_chain"}


def kernels_of_the_cpu():
    """Return name -> parameters of all functions; variants on the calling thread are the same kernels."""
    found = {}
    for module in pkgutil.iter_modules(cpu.__path__):
        home = importlib.import_module(f"{cpu.__name__}.{module.name}")
        for name in getattr(home, "__all__", ()):
            value = getattr(cpu, name, None)
            function = getattr(value, "py_func", value)
            if inspect.isfunction(function) and value is getattr(home, name) and not name.endswith("_serial"):
                found[name] = list(inspect.signature(function).parameters)
    return found


def launchers():
    found = {}
    for module in pkgutil.iter_modules(cuda.__path__):
        home = importlib.import_module(f"{cuda.__name__}.{module.name}")
        for name in home.__all__:
            value = getattr(home, name)
            if inspect.isfunction(value) and next(iter(inspect.signature(value).parameters), "") == "module":
                found[name] = list(inspect.signature(value).parameters)
    return found


def test_kernels_have_the_names_of_their_twins():
    on_cpu, on_device = kernels_of_the_cpu(), launchers()
    assert set(on_cpu) & set(on_device) == set(SHARED)
    assert set(on_cpu) - set(on_device) == CPU_ALONE | HOST
    assert set(on_device) - set(on_cpu) == CUDA_ALONE
    for name, (device_alone, cpu_alone) in SHARED.items():
        there = [p for p in on_device[name] if p not in device_alone.split()]
        here = [p for p in on_cpu[name] if p not in cpu_alone.split()]
        assert there == here, name
        assert set(device_alone.split()) <= set(on_device[name]) and set(cpu_alone.split()) <= set(on_cpu[name]), name
