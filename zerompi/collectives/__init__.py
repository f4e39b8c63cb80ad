"""Collectives on NumPy arrays and torch tensors, flat and hierarchical, with counted bytes."""

from __future__ import annotations

from zerompi.collectives.all_gather import all_gather
from zerompi.collectives.all_reduce import all_reduce
from zerompi.collectives.all_to_all import all_to_all
from zerompi.collectives.broadcast import broadcast
from zerompi.collectives.group import Group
from zerompi.collectives.reduce_scatter import reduce_scatter

__all__ = ["Group", "all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter"]
