"""Compiled loops of the codecs: numba on CPUs, Triton on CUDA."""
