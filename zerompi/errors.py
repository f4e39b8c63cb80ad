"""Errors that zerompi raises beside ValueError and TypeError."""

from __future__ import annotations


class ZerompiError(RuntimeError):
    """Something cannot be done; the message says what and why."""


class CheckpointError(ZerompiError):
    """A checkpoint cannot be written, or what is on disk is none; the message names the file."""


class MismatchError(ZerompiError):
    """Ranks disagree on a model, a shape, a dtype or the order of operations."""


class NonFiniteError(ZerompiError):
    """A gradient is NaN or infinite; the message names the parameters."""
