"""Benchmarks: what a machine's MPI, memory and zerompi do, measured in one run."""

from __future__ import annotations
