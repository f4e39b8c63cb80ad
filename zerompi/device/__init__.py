"""Memory of a device, and its streams: the one package that knows CuPy.

Nothing here imports CuPy before somebody asks for devices, or starts CUDA before there is a device
buffer: a CuPy array, a tensor of torch.cuda, or `use`. Device memory that the host can address
(Grace Hopper, MI300A, an emulated device) may also have an ordinary CPU tensor over it; from `use`
on such tensors are recognised.

Each thread that communicates has a *lane*: a stream of its own on which it copies and adds. A
collective runs *ordered*: its lane waits for the streams of those who have filled the buffers, and
these wait for the lane. Where the host reads the buffers, it waits itself.

`zerompi.kernels` has what is computed on a device, and uses `zerompi.device.compiler`.
"""

from __future__ import annotations

from zerompi.device.arrays import (
    Lent,
    allocate,
    as_cupy,
    from_array,
    from_tensor,
    holds,
    is_array,
    space_of,
)
from zerompi.device.copies import copy, empty, from_host, to_host
from zerompi.device.driver import count, identity, is_active, is_installed, name, use
from zerompi.device.ipc import Exported, Mapped
from zerompi.device.lanes import Handover, beside, hand_over, lane, ordered, ready, synchronise
from zerompi.device.pinned import Slot, begin_fetching

__all__ = [
    "Exported",
    "Handover",
    "Lent",
    "Mapped",
    "Slot",
    "allocate",
    "as_cupy",
    "begin_fetching",
    "beside",
    "copy",
    "count",
    "empty",
    "from_array",
    "from_host",
    "from_tensor",
    "hand_over",
    "holds",
    "identity",
    "is_active",
    "is_array",
    "is_installed",
    "lane",
    "name",
    "ordered",
    "ready",
    "space_of",
    "synchronise",
    "to_host",
    "use",
]
