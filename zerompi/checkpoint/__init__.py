"""Checkpoints on disk: safetensors files that all ranks write together and any number of ranks reads."""

from __future__ import annotations

from zerompi.checkpoint.agreement import agree_error, agreement
from zerompi.checkpoint.directory import find_latest, remove_leftovers
from zerompi.checkpoint.errors import CheckpointError
from zerompi.checkpoint.reader import CheckpointReader
from zerompi.checkpoint.table import Slice, TensorSpec, TensorTable
from zerompi.checkpoint.writer import write_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "Slice",
    "TensorSpec",
    "TensorTable",
    "agree_error",
    "agreement",
    "find_latest",
    "remove_leftovers",
    "write_checkpoint",
]
