"""Compiled kernels, installed as ``fastdmf.kernels``: ``cpu`` holds the numba ones."""
