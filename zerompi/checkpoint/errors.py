"""The error of everything that reads or writes checkpoints."""

from __future__ import annotations

from zerompi.errors import ZerompiError


class CheckpointError(ZerompiError):
    """A checkpoint cannot be written, or what is on disk is none; the message names the file."""
