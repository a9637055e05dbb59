"""Triton kernels, installed and imported as ``smoothk.kernels``."""
