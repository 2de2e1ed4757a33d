"""The solvers on a double of cupy: the same engine, the CUDA kernels emulated, beside the CPU's runs."""

import gc
import importlib
import json
import sys
from pathlib import Path

import cuda_device
import cuda_emulator
import cupy_double
import numpy as np
import pytest
from conftest import random_mask

import fastdmf
from fastdmf import backend, cuda

pytestmark = pytest.mark.skipif(
    not (cuda_emulator.AVAILABLE or cuda_device.ON_DEVICE), reason="g++ on Linux is needed to emulate CUDA kernels"
)


def _forget():
    cuda.find_cuda.cache_clear()
    backend._cuda.cache_clear()


@pytest.fixture
def cupy(monkeypatch):
    """The double in cupy's place, found as a GPU is; cupy itself where the tests are to run on a GPU."""
    if cuda_device.ON_DEVICE:
        yield importlib.import_module("cupy")
        return
    monkeypatch.setitem(sys.modules, "cupy", cupy_double.Double())
    _forget()
    yield sys.modules["cupy"]
    _forget()


@pytest.fixture
def double(cupy):
    """The double alone: tests of what only it can tell."""
    if cuda_device.ON_DEVICE:
        pytest.skip("asks the double of cupy, not a GPU")
    return cupy


# --- what is found -----------------------------------------------------------------------------------------------


def test_device_is_found_by_running_a_kernel(double):
    assert fastdmf.backend.cuda_report().startswith("available, double, compute capability 9.0")
    assert fastdmf.backend.get_backend("cuda").name == "cuda"
    assert fastdmf.backend.get_backend("auto").name == "cpu"
    assert fastdmf.backend.get_backend("auto", double.zeros(3)).name == "cuda"


def test_the_double_has_what_cupy_has():
    """Names and arguments that the library uses, where cupy is installed; no GPU is needed to look."""
    real = pytest.importorskip("cupy")
    names = {*cupy_double._CREATING, *cupy_double._UFUNCS, *cupy_double._PLAIN, "asnumpy", "asarray", "from_dlpack"}
    assert [name for name in sorted(names) if not hasattr(real, name)] == []
    assert [name for name in cupy_double._LINALG if not hasattr(real.linalg, name)] == []
    for name in ("begin_capture", "end_capture", "synchronize"):
        assert hasattr(real.cuda.Stream, name)
    assert hasattr(real.cuda.Graph, "launch") and hasattr(real.cuda.MemoryPool, "malloc")
    assert issubclass(real.cuda.memory.OutOfMemoryError, Exception) and callable(real.cuda.using_allocator)
    assert issubclass(real.cuda.compiler.CompileException, Exception) and callable(real.cuda.runtime.memGetInfo)
    assert {name for name in vars(cupy_double.ndarray) if name[0] != "_"} <= {*dir(real.ndarray)}
    real.RawModule(code="", options=("-std=c++17", "-DH=4"))


# --- descent -----------------------------------------------------------------------------------------------------


def problem(kind, rng, n1=13, n2=9):
    truth = rng.standard_normal((n1, 2)) @ rng.standard_normal((2, n2))
    match kind:
        case "sparse":
            operator = random_mask(n1, n2, 60, rng)
        case "dense":
            operator = random_mask(n1, n2, 70, rng)
        case "gaussian":
            operator = fastdmf.GaussianDense(rng.standard_normal((71, n1, n2)))
        case "seeded":
            operator = fastdmf.GaussianSeeded(5, 71, (n1, n2))
        case "rank_one":
            operator = fastdmf.operators.RankOne(rng.standard_normal((80, n1)), rng.standard_normal((80, n2)))
    return operator, operator.apply(truth)


KINDS = ["sparse", "dense", "gaussian", "seeded", "rank_one"]
# Steps short enough that rounding is not amplified.
RULES = {
    "gd": fastdmf.rules.GradientDescent(lr=2e-3),
    "momentum": fastdmf.rules.Momentum(lr=1e-3, beta=0.8),
    "nesterov": fastdmf.rules.Nesterov(lr=1e-3, beta=0.8),
    "group_rmsprop": fastdmf.rules.GroupRMSprop(lr=0.02, beta=0.95, eps=1e-3),
    "adam": fastdmf.rules.Adam(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6),
    "auto": fastdmf.rules.Auto(),
}


@pytest.fixture(autouse=True)
def routes(monkeypatch, request):
    """The sparse route for the masks that are called so, and leaps of small chains where they are the test's matter."""
    from fastdmf import device_bounds, device_chain

    if "sparse" in request.node.name:
        monkeypatch.setattr(device_bounds, "_DENSE", 2.0)
    if "persistent" not in request.node.name:
        monkeypatch.setattr(device_chain, "_NARROW", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_first_evaluations_agree(cupy, kind, rule):
    rng = np.random.default_rng(1)
    operator, y = problem(kind, rng)
    settings = {"rule": RULES[rule], "random_state": 0, "max_iter": 50, "check_every": 5, "tol": 1e-14}
    settings |= {"init_scale": 0.1, "on_failure": "ignore", "depth": 3, "width": 5, "l2": 1e-3}
    host = fastdmf.solve(operator, y, **settings)
    device = fastdmf.solve(operator, y, device="cuda", **settings)
    assert device.device == "cuda" and host.device == "cpu"
    for name in ("loss", "objective", "grad_norm", "step_size"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=1e-9)
    assert isinstance(device.factors[0], np.ndarray)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [("huber", 0.7), ("truncated", 1.1), "absolute"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_weights_and_precisions(cupy, kind, loss, dtype):
    rng = np.random.default_rng(2)
    operator, y = problem(kind, rng)
    settings = {"rule": RULES["gd"], "random_state": 3, "max_iter": 12, "check_every": 3, "init_scale": 0.3, "depth": 2}
    settings |= {"elementwise_loss": loss, "weights": rng.random(len(y)) + 0.2, "loss": "mse/2", "dtype": dtype}
    host, device = (fastdmf.solve(operator, y, device=d, on_failure="ignore", **settings) for d in ("cpu", "cuda"))
    rtol = 1e-10 if dtype == np.float64 else 2e-4
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=rtol)
    assert device.factors[0].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["momentum", "group_rmsprop", "auto"])
def test_batches_whose_slices_end_apart(cupy, kind, rule):
    """Slices leave the batch, which is captured anew; each ends as it does alone."""
    rng = np.random.default_rng(3)
    operator, y = problem(kind, rng)
    scales = np.array([1.0, 0.2, 1.0])
    settings = {"rule": RULES[rule], "depth": 2, "width": 4, "max_iter": 40, "check_every": 4, "on_failure": "ignore"}
    start = [rng.standard_normal((3, 4, 9)) * 0.3, rng.standard_normal((3, 13, 4)) * 0.3]
    settings |= {"factors": start, "tol": 0.5 if rule != "auto" else 1e-3}
    host, device = (fastdmf.solve(operator, scales[:, None] * y, device=d, **settings) for d in ("cpu", "cuda"))
    assert device.status == host.status and (device.n_iter == host.n_iter).all()
    for a, b in zip(device.factors, host.factors):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_the_host_waits_at_records_only(double):
    """Ten more steps between two records of a captured rule take no further wait."""
    fastdmf.backend.get_backend("cuda")  # which waits for its trial
    operator, y = problem("sparse", np.random.default_rng(4))
    for rule in ("gd", "momentum", "nesterov", "group_rmsprop", "adam"):
        waits = []
        for steps in (10, 20):
            double.state.syncs = 0
            settings = {"rule": RULES[rule], "max_iter": steps, "check_every": steps, "on_failure": "ignore"}
            fastdmf.solve(operator, y, random_state=0, depth=3, width=4, device="cuda", **settings)
            waits.append(double.state.syncs)
        assert waits[0] == waits[1], rule


def test_arrays_of_the_device_stay_there(cupy):
    rng = np.random.default_rng(5)
    operator, y = problem("gaussian", rng)
    expected = fastdmf.solve(operator, y, random_state=0)
    on_device = fastdmf.GaussianDense(cupy.asarray(operator.a), operator.shape)
    assert isinstance(on_device.a, cupy.ndarray)
    solution = fastdmf.solve(on_device, cupy.asarray(y), random_state=0)
    assert solution.device == "cuda" and all(isinstance(w, cupy.ndarray) for w in solution.factors)
    product = solution.factors[2] @ solution.factors[1] @ solution.factors[0]
    np.testing.assert_allclose(product.get(), expected.matrix(), atol=1e-2)
    back = fastdmf.solve(operator, cupy.asarray(y), random_state=0, device="cpu")
    assert back.device == "cpu" and isinstance(back.factors[0], cupy.ndarray)
    assert (back.factors[0].get() == expected.factors[0]).all()


def test_tensors_of_others_come_by_dlpack(double):
    """Anything on a device that speaks DLPack, as torch's tensors do, without a copy."""

    class Tensor:
        def __init__(self, a):
            self.a, self.__cuda_array_interface__ = a, double.asarray(a).__cuda_array_interface__

        def __dlpack__(self, **keywords):
            return self.a.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return self.a.__dlpack_device__()

    operator, y = problem("gaussian", np.random.default_rng(5))
    from fastdmf.arrays import as_cupy

    assert np.shares_memory(as_cupy(Tensor(y))._a, y)
    settings = {"random_state": 0, "max_iter": 20, "on_failure": "ignore"}
    solution = fastdmf.solve(fastdmf.GaussianDense(Tensor(operator.a), operator.shape), Tensor(y), **settings)
    expected = fastdmf.solve(operator, y, device="cuda", **settings)
    assert solution.device == "cuda" and isinstance(solution.factors[0], double.ndarray)
    np.testing.assert_array_equal(solution.factors[0].get(), expected.factors[0])


def test_held_out_data_truth_and_tracks(cupy):
    rng = np.random.default_rng(6)
    operator, y = problem("sparse", rng)
    truth = rng.standard_normal((13, 9))
    tracks = "singular_values", "effective_rank", "imbalance", "alignment_diagonal", ("entries", [0, 3], [1, 2])
    settings = {"track": tracks, "truth": truth, "validation": 0.2, "patience": 12, "random_state": 1, "depth": 3}
    host, device = (fastdmf.solve(operator, y, device=d, rule="auto", **settings) for d in ("cpu", "cuda"))
    assert host.status == device.status
    for name in host.history:
        a, b = host.history[name], device.history[name]
        np.testing.assert_allclose(a[:20], b[:20], rtol=1e-6, atol=1e-9, err_msg=name)


def test_symmetric_chain(cupy):
    rng = np.random.default_rng(7)
    operator, y = problem("gaussian", rng, 8, 8)
    settings = {"symmetric": True, "rule": RULES["gd"], "max_iter": 15, "on_failure": "ignore", "random_state": 2}
    host, device = (fastdmf.solve(operator, y, device=d, **settings) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(device.factors[0], host.factors[0], rtol=1e-10)


@pytest.mark.parametrize("rule", ["auto", "adam", "group_rmsprop"])
def test_checkpoints_go_on_to_the_same_bits(cupy, rule, tmp_path):
    operator, y = problem("sparse", np.random.default_rng(8))
    settings = {"rule": RULES[rule], "random_state": 0, "max_iter": 60, "check_every": 1, "on_failure": "ignore"}
    whole = fastdmf.solve(operator, y, device="cuda", **settings)
    file = fastdmf.Checkpoint(tmp_path / "run.npz", every=0)
    stopped = fastdmf.solve(
        operator, y, device="cuda", checkpoint=file, callback=lambda progress: progress.iteration == 33, **settings
    )
    assert stopped.n_iter == 33
    resumed = fastdmf.solve(operator, y, device="cuda", checkpoint=file, **settings)
    assert resumed.n_iter == whole.n_iter
    for a, b in zip(resumed.factors, whole.factors):
        np.testing.assert_array_equal(a, b)


def test_wide_masks(cupy, monkeypatch):
    """Too wide for the sparse kernels: full matrices, or columns in parts where those would be too large."""
    from fastdmf import device_bounds

    monkeypatch.setattr(device_bounds, "_DENSE", 2.0)
    monkeypatch.setattr(device_bounds, "_WIDEST", 4)
    operator, y = problem("sparse", np.random.default_rng(9))
    settings = {"rule": RULES["gd"], "max_iter": 8, "on_failure": "ignore", "random_state": 2, "validation": 0.3}
    host, device = (fastdmf.solve(operator, y, device=d, **settings) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(device.history["validation"], host.history["validation"], rtol=1e-10)
    monkeypatch.setattr(device_bounds, "_CELLS", 10)
    in_parts = fastdmf.solve(operator, y, device="cuda", **settings)
    np.testing.assert_allclose(in_parts.history["loss"], host.history["loss"], rtol=1e-10)


@pytest.mark.parametrize("ensemble", ["gaussian", "rademacher"])
def test_seeded_rows_that_fit_in_no_block(cupy, ensemble, monkeypatch):
    """Wide rows are drawn batch by batch."""
    import dataclasses

    from fastdmf.kernels.cuda import table

    def narrow(*arguments, **keywords):
        plan = plan_measurements(*arguments, **keywords)
        return dataclasses.replace(plan, threads=32, per=1, windows=-(-arguments[1] // (32 * plan.pack)), rows=7)

    plan_measurements = table.plan_measurements
    monkeypatch.setattr(table, "plan_measurements", narrow)
    rng = np.random.default_rng(10)
    operator = fastdmf.GaussianSeeded(11, 31, (17, 15), ensemble=ensemble)
    y = operator.apply(rng.standard_normal((17, 2)) @ rng.standard_normal((2, 15)))
    settings = {"rule": RULES["gd"], "max_iter": 4, "on_failure": "ignore", "random_state": 2, "validation": 0.3}
    operator._norms = None
    device = fastdmf.solve(operator, y, device="cuda", **settings)
    operator._norms = None
    host = fastdmf.solve(operator, y, **settings)
    for name in ("loss", "validation"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=1e-9)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_what_has_no_device_says_so(cupy):
    operator, y = problem("sparse", np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"rule MirrorDescent computes on the CPU alone: pass device='cpu', or one of"):
        fastdmf.solve(operator, y, rule="mirror", device="cuda")
    with pytest.raises(ValueError, match="penalty= computes on the CPU alone"):
        fastdmf.solve(operator, y, penalty=fastdmf.penalties.NuclearRatio(0.1), device="cuda")
    from scipy.sparse.linalg import aslinearoperator

    linear = fastdmf.operators.as_operator(aslinearoperator(np.ones((3, 12))), (3, 4))
    with pytest.raises(ValueError, match="Linear operators compute on the CPU alone"):
        fastdmf.solve(linear, np.ones(3), device="cuda")


def test_out_of_memory_tells_the_bytes(double, monkeypatch):
    operator, y = problem("gaussian", np.random.default_rng(0))
    monkeypatch.setattr(double.memory, "limit", 10_000)
    with pytest.raises(
        MemoryError, match=r"no room: Out of memory allocating 66,456 bytes.*10,000 bytes of the device"
    ):
        fastdmf.solve(operator, y, device="cuda")


def test_a_missing_device_is_an_error(double, monkeypatch):
    operator, y = problem("sparse", np.random.default_rng(0))

    def refused(text):
        _forget()
        with pytest.raises(RuntimeError, match=text):
            fastdmf.solve(operator, y, device="cuda")
        assert fastdmf.solve(operator, y, device="auto", max_iter=1, on_failure="ignore").device == "cpu"

    monkeypatch.setitem(sys.modules, "cupy", None)
    refused("device='cuda' is not available: cupy is (not installed|broken).*device='cpu' or 'auto'")
    monkeypatch.setitem(sys.modules, "cupy", cupy_double.Double(available=False))
    refused("found, no device: cudaErrorInsufficientDriver")
    broken = cupy_double.Double()
    broken.RawModule = lambda **_: (_ for _ in ()).throw(RuntimeError("no NVRTC\nanywhere"))
    monkeypatch.setitem(sys.modules, "cupy", broken)
    refused("a kernel could not be compiled and run: no NVRTC anywhere")
    monkeypatch.setitem(sys.modules, "cupy", cupy_double.Double())
    monkeypatch.setenv("FASTDMF_DEVICE", "cpu")
    refused("hidden by FASTDMF_DEVICE=cpu")
    _forget()


def test_a_step_that_leaves_its_arrays_is_seen(double):
    """The double does in a graph what a GPU would: a rule that puts new arrays in its state goes wrong."""
    operator, y = problem("sparse", np.random.default_rng(4))

    class Forgetful(fastdmf.rules.GroupRMSprop):
        def _adapt(self, problem, state):
            state.step_size = self.lr / (1 + state.step_size)

    histories = []
    for rule in (Forgetful(lr=1e-3), type("Plain", (Forgetful,), {"capturable": False})(lr=1e-3)):
        settings = {"rule": rule, "max_iter": 6, "check_every": 1, "on_failure": "ignore", "device": "cuda"}
        histories.append(fastdmf.solve(operator, y, random_state=0, **settings).history["step_size"])
    assert not np.array_equal(*histories)


@pytest.mark.parametrize("rule", ["auto", "adam", "gd"])
def test_fits_leave_nothing_behind(double, rule):
    """After fits of every kind as many arrays of the device are alive as after the first."""
    operator, y = problem("sparse", np.random.default_rng(13))
    alive = []
    for k in range(5):
        settings = {"rule": RULES[rule], "max_iter": 12, "device": "cuda", "on_failure": "ignore", "width": 4}
        fastdmf.solve(operator, y, random_state=k, **settings)
        fastdmf.solve(operator, np.stack([y, 0.5 * y]), random_state=k, **settings)
        gc.collect()
        alive.append(sum(isinstance(thing, double.ndarray) for thing in gc.get_objects()))
    # What the table of kernels keeps for all fits: Adam's tickets.
    assert alive[0] <= 2 and set(alive) == {alive[0]}


# --- sweeps ------------------------------------------------------------------------------------------------------


def test_sweep_in_one_batch(cupy):
    """Runs on masks of their own share the batch, in this process; rows are those of the CPU."""

    def instance(seed, count):
        rng = np.random.default_rng([seed, 1])
        truth = rng.standard_normal((8, 1)) @ rng.standard_normal((1, 7))
        operator = random_mask(8, 7, count, rng)
        return operator, operator.apply(truth), truth

    axes = {"seed": range(4), "count": [30, 45], "depth": [2, 3]}
    settings = {"rule": fastdmf.rules.GroupRMSprop(lr=0.01), "max_iter": 60, "tol": 1e-4, "init_scale": 0.1}
    tables = [fastdmf.sweep(instance, device=device, **axes, **settings) for device in ("cpu", "cuda")]
    for name in ("n_iter", "rank"):
        np.testing.assert_array_equal(tables[1][name], tables[0][name])
    np.testing.assert_allclose(tables[1]["error"], tables[0]["error"], rtol=1e-6)
    assert list(tables[1]["status"]) == list(tables[0]["status"])


# --- the script that measures on a GPU -------------------------------------------------------------------------------


def test_every_section_of_the_bench_runs(double, tmp_path, monkeypatch):
    """At sizes that mean nothing, and with losses that agree with the CPU's."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
    gpu = importlib.import_module("gpu")
    assert gpu.main(["--tiny", "--keep", str(tmp_path / "gpu.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == {*gpu.SECTIONS, "ceiling"} - {"ceilings"}
    for row in rows:
        assert row.get("loss_off", 0) < 1e-4 and row.get("off", 0) < 1e-8, row
        assert row.get("bits_equal", True) and row.get("constant", True), row


# --- many steps in a launch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gd", "momentum", "nesterov", "group_rmsprop"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_persistent_chains_take_the_same_steps(double, rule, depth, monkeypatch):
    """Records, ends and factors of a batch are those of single steps, whatever the length of a leap."""
    from fastdmf import descent

    rng = np.random.default_rng(11)
    operator, y = problem("sparse", rng)
    weights = rng.integers(0, 2, (3, len(y))) * rng.choice([1.0, 2.0], (3, 1))
    y = y * np.array([[1.0], [0.2], [1.0]])
    settings = {"rule": RULES[rule], "depth": depth, "width": 4, "max_iter": 23, "check_every": 5, "tol": 0.3}
    settings |= {"weights": weights, "random_state": [0, 1, 2], "init_scale": 0.3, "on_failure": "ignore"}
    if depth == 1:
        del settings["width"]
    host = fastdmf.solve(operator, y, **settings)
    monkeypatch.setattr(descent, "_LEAP", 3)
    double.state.kernels.clear()
    device = fastdmf.solve(operator, y, device="cuda", **settings)
    assert "small_chain" in double.state.kernels and "update_gd" not in double.state.kernels
    assert device.status == host.status and (device.n_iter == host.n_iter).all() and device.n_eval == host.n_eval
    for name in ("loss", "grad_norm", "step_size"):
        np.testing.assert_allclose(device.history[name], host.history[name], rtol=1e-9)
    for a, b in zip(device.factors, host.factors):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_persistent_chains_that_diverge(cupy):
    operator, y = problem("sparse", np.random.default_rng(12))
    settings = {"rule": fastdmf.rules.GradientDescent(lr=30.0), "max_iter": 200, "check_every": 50, "init_scale": 1.0}
    settings |= {"random_state": 0, "depth": 3, "on_failure": "ignore"}
    host, device = (fastdmf.solve(operator, y, device=d, **settings) for d in ("cpu", "cuda"))
    assert host.status is device.status is fastdmf.engine.Status.DIVERGED
    assert all(np.isfinite(w).all() for w in device.factors)


# --- the kernels' tests on a GPU ---------------------------------------------------------------------------------


def test_kernels_tests_can_run_on_a_device(double):
    """The other ``Module``: the same results, and what leaves its array or changes a constant one is seen."""
    from fastdmf.kernels import cuda
    from fastdmf.kernels.cuda import slices

    x, d = np.arange(40.0).reshape(2, 20), np.ones((2, 20))
    module = cuda_device.DeviceModule(cuda.source("slices"), slices.slices_options(np.float64), name="slices")
    out = np.full_like(x, np.nan)
    slices.slices_move(module, out, x, np.array([2.0, -1.0]), d)
    np.testing.assert_array_equal(out, x + np.array([[2.0], [-1.0]]))
    text = """
extern "C" __global__ void leave(float* a, const float* b, int k) {
    if (k == 0) const_cast<float*>(b)[0] = 1;
    if (k == 1) a[4] = 1;
}
"""
    module = cuda_device.DeviceModule(text, name="faults")
    for k in range(2):
        # The double's own guards see it first; a GPU has the bands of the module alone.
        with pytest.raises(cuda_emulator.EmulationError, match=("const", "outside")[k]):
            module.launch("leave", (1,), (1,), (np.zeros(4, np.float32), np.zeros(4, np.float32), np.int32(k)))
    module.launch("leave", (1,), (1,), (np.zeros(4, np.float32), None, np.int32(2)))
