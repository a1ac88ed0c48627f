"""The loops of the `product` codec: in torch on any device, by numba on CPUs, by Triton on CUDA."""
