"""Triton kernels, one file a computation: arithmetic on tiles, no launch decisions, no torch."""
