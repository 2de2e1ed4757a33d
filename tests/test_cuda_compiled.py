"""The CUDA kernels compiled by NVRTC for GPUs that are not there: instructions, registers, spills."""

import re

import cuda_emulator
import cuda_registers
import numpy as np
import nvrtc
import pytest

from fastdmf.kernels import cuda
from fastdmf.kernels.cuda import entry, measurements, row_solve, seeded, slices, update


def layout(d, runs, dtype, **options):
    return measurements.plan_measurements(10_000, d, runs, dtype, **options)


# Loads and stores of 16 bytes, and of four numbers of half the width, as several releases of the compiler spell them.
FOUR, FOUR_OUT, TWO = r"ld\.global\S*\.v4\.\w32", r"st\.global\S*\.v4\.\w32", r"ld\.global\S*\.v2\.\w64"
ATOMIC = r"atom\. red\."
HALVES = r"ld\.global\S*(\.v4\.\w16|\.v2\.\w32)"

# family, options, threads of a block, patterns that must be among the instructions, and that must not
COMPILED = [
    ("slices", slices.slices_options(np.float32), 256, f"{FOUR} {FOUR_OUT}", ""),
    ("slices", slices.slices_options(np.float64), 256, TWO, ""),
    ("entry", entry.entry_options(1, np.float32), 256, "", ATOMIC),
    ("entry", entry.entry_options(32, np.float32), 256, f"{FOUR} {FOUR_OUT}", ATOMIC),
    ("entry", entry.entry_options(255, np.float32), 256, "", ATOMIC),
    ("entry", entry.entry_options(256, np.float32), 256, FOUR, ATOMIC),
    ("entry", entry.entry_options(256, np.float64, index=np.int64), 256, TWO, ATOMIC),
    ("entry", entry.entry_options(64, np.float32, stored="bfloat16"), 256, HALVES, ATOMIC),
    *(
        ("gaussian", plan.options(dtype, stored), plan.threads, loads, ATOMIC)
        for dtype, stored, plan, loads in (
            (np.float32, None, layout(10_000, 1, np.float32), FOUR),
            (np.float32, None, layout(10_001, 1, np.float32), ""),
            (np.float32, None, layout(2048, 4, np.float32), FOUR),
            (np.float32, None, layout(6_000, 4, np.float32), FOUR),
            (np.float32, None, layout(10**6, 1, np.float32), FOUR),
            (np.float64, None, layout(5_000, 1, np.float64), TWO),
            (np.float64, None, layout(1_000, 4, np.float64), TWO),
            (np.float32, "float16", layout(10_000, 1, np.float32), rf"{HALVES} cvt\.f32\.f16"),
        )
    ),
    # The exact transform: nothing approximate, nothing fused that is not written so.
    *(
        (
            "seeded",
            seeded.seeded_options(plan, dtype, ensemble),
            plan.threads,
            found,
            rf"{ATOMIC} sqrt\.approx div\.approx lg2 sin\.",
        )
        for dtype, ensemble, plan, found in (
            (np.float32, "gaussian", layout(10_000, 1, np.float32, pack=4), r"sqrt\.rn\.ftz\.f32 fma\.rn\.ftz\.f32"),
            (np.float64, "gaussian", layout(4_096, 1, np.float64, pack=4), r"sqrt\.rn\.ftz\.f32 cvt\.ftz\.f64\.f32"),
            (np.float32, "rademacher", layout(10_000, 1, np.float32, pack=4), r"shfl\.sync\.idx"),
        )
    ),
    # Every rule rounds its products by themselves, and divides and takes roots exactly.
    (
        "update",
        update.update_options(np.float32),
        256,
        rf"{FOUR} {FOUR_OUT} mul\.rn\.ftz\.f32 sqrt\.rn\.ftz\.f32",
        "red\\.",
    ),
    ("update", update.update_options(np.float64), 256, rf"{TWO} mul\.rn\.f64 sqrt\.rn\.f64 div\.rn\.f64", "red\\."),
    ("row_solve", row_solve.row_solve_options(16, np.float32), 256, FOUR, ATOMIC),
    ("row_solve", row_solve.row_solve_options(256, np.float32), 256, FOUR, ATOMIC),
    ("row_solve", row_solve.row_solve_options(256, np.float64), 256, TWO, ATOMIC),
]


@pytest.fixture(scope="module")
def compiler():
    path = nvrtc.find()
    if path is None:
        pytest.skip("NVRTC is needed to compile CUDA kernels: pip install nvidia-cuda-nvrtc-cu12")
    return nvrtc.Compiler(path)


@pytest.mark.parametrize("architecture", [75, 80, 90, 100, 120])
def test_compiles_for(compiler, architecture):
    """Without a warning; everything stays in registers, and a block's registers exist."""
    if architecture not in compiler.architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    for family, options, threads, found, absent in COMPILED:
        used, ptx = compiler.compile(cuda.source(family), architecture, options, name=family)
        assert sorted(used) == sorted(cuda_emulator.kernel_names(cuda.source(family)))
        for kernel, (registers, stack) in used.items():
            assert stack == 0 and registers * threads <= 65_536, (family, options, kernel, registers, stack)
        assert all(re.search(pattern, ptx) for pattern in found.split()), (family, options, found)
        assert not any(re.search(rf"^\s*(@!?%p\d+\s+)?{pattern}", ptx, re.M) for pattern in absent.split()), (
            family,
            options,
            absent,
        )


def test_compiler_tells_what_is_wrong(compiler):
    with pytest.raises(RuntimeError, match=r"broken, sm_80.*broken.cu\(1\): error: identifier .nothing. is undefined"):
        compiler.compile('extern "C" __global__ void f(int* x) { *x = nothing; }', 80, name="broken")
    local = 'extern "C" __global__ void f(int* x) { int a[99]; for (int k = 0; k < 99; k++) a[x[k]] = k; *x = a[*x]; }'
    used, _ = compiler.compile(local, 80)
    assert used["f"][1] >= 99 * 4


# Registers and spills ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=cuda_registers.ARCHITECTURES, ids=lambda number: f"sm_{number}")
def measured(request, compiler):
    if request.param not in compiler.architectures():
        pytest.skip(f"this NVRTC does not know sm_{request.param}")
    return request.param, cuda_registers.measure(compiler, request.param)


def test_compiled_kernels_stay_in_their_registers(compiler, measured):
    """No spills but those in the file; with the file's NVRTC no more registers than it says. ``-s`` prints all."""
    architecture, found = measured
    version, budget = cuda_registers.budget()
    print(f"\nNVRTC {compiler.version()}, sm_{architecture}\n{'':56}registers  allowed  spills")
    over = []
    for (name, kernel), (registers, spills) in found.items():
        allowed, spills_allowed = budget[name, kernel][architecture]
        print(f"{f'{name}: {kernel}':56}{registers:9}{allowed:9}{spills:8}")
        if spills > spills_allowed or (registers > allowed and compiler.version() == version):
            over.append((name, kernel, registers, allowed, spills))
    assert not over and set(found) == set(budget)


def test_the_register_file_is_for_what_is_compiled():
    """Kernels of the texts, all families, every option set; needs no compiler."""
    _, budget = cuda_registers.budget()
    expected = {
        (name, kernel)
        for name, (family, _) in cuda_registers.CASES.items()
        for kernel in cuda_emulator.kernel_names(cuda.source(family))
    }
    assert set(budget) == expected and {family for family, _ in cuda_registers.CASES.values()} == set(cuda.FAMILIES)
    assert all(0 < registers <= 255 for numbers in budget.values() for registers, _ in numbers.values())


def test_spills_are_seen(compiler):
    text = 'extern "C" __global__ void __launch_bounds__(1024, 2) f(double* x) { double a[64];\n#pragma unroll\n'
    text += "for (int k = 0; k < 64; k++) a[k] = x[k * 1024 + threadIdx.x];\n__syncthreads();\n#pragma unroll\n"
    text += "for (int k = 0; k < 64; k++) x[k * 1024 + threadIdx.x] = a[63 - k] * a[(7 * k) % 64]; }"
    used, _ = compiler.compile(text, 90)
    assert used["f"][0] <= 32 and used["f"][1] > 0
