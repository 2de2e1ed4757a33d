"""Kernels for the CPU in numba, one family a file."""

from fastdmf.kernels.cpu.chain import *  # noqa: F403
from fastdmf.kernels.cpu.chain_power import *  # noqa: F403
from fastdmf.kernels.cpu.dense import *  # noqa: F403
from fastdmf.kernels.cpu.entry import *  # noqa: F403
from fastdmf.kernels.cpu.entry_index import *  # noqa: F403
from fastdmf.kernels.cpu.gaussian import *  # noqa: F403
from fastdmf.kernels.cpu.lbfgs import *  # noqa: F403
from fastdmf.kernels.cpu.pairs import *  # noqa: F403
from fastdmf.kernels.cpu.row_solve import *  # noqa: F403
from fastdmf.kernels.cpu.sampled import *  # noqa: F403
from fastdmf.kernels.cpu.seeded import *  # noqa: F403
from fastdmf.kernels.cpu.slices import *  # noqa: F403
from fastdmf.kernels.cpu.update import *  # noqa: F403
