"""Checkpoints on disk: safetensors files that all ranks write together and any number of ranks reads."""

from __future__ import annotations

from zerompi.checkpoint.background import BackgroundSaves
from zerompi.checkpoint.directory import find_latest, remove_leftovers
from zerompi.checkpoint.reader import CheckpointReader
from zerompi.checkpoint.table import Slice, TensorSpec, TensorTable
from zerompi.checkpoint.writer import WriteOptions, open_draft, write_checkpoint
from zerompi.errors import CheckpointError

__all__ = [
    "BackgroundSaves",
    "CheckpointError",
    "CheckpointReader",
    "Slice",
    "TensorSpec",
    "TensorTable",
    "WriteOptions",
    "find_latest",
    "open_draft",
    "remove_leftovers",
    "write_checkpoint",
]
