"""ZeRO training of PyTorch models over MPI."""

from __future__ import annotations

from zerompi import launch as _launch

_launch.prepare_environment()

from zerompi import autograd, collectives  # noqa: E402
from zerompi.adamw import AdamW  # noqa: E402
from zerompi.api import partition  # noqa: E402
from zerompi.errors import (  # noqa: E402
    CheckpointError,
    MismatchError,
    NonFiniteError,
    ZerompiError,
)
from zerompi.local_device import use_device  # noqa: E402
from zerompi.precision import MixedPrecision  # noqa: E402
from zerompi.quantize import Quantize  # noqa: E402
from zerompi.stop import StopRequest  # noqa: E402
from zerompi.topology import Topology  # noqa: E402
from zerompi.version import __version__  # noqa: E402
from zerompi.zero import Zero  # noqa: E402

_launch.abort_on_exception()

__all__ = [
    "AdamW",
    "CheckpointError",
    "MismatchError",
    "MixedPrecision",
    "NonFiniteError",
    "Quantize",
    "StopRequest",
    "Topology",
    "Zero",
    "ZerompiError",
    "__version__",
    "autograd",
    "collectives",
    "partition",
    "use_device",
]
