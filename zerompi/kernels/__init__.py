"""Kernels for devices: their sources, and what to call them by."""
