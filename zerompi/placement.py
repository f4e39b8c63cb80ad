"""ZeRO stages as data: where parameters, gradients and optimizer states live.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models" (arXiv:1910.02054), section 5, figure 1: P_os is stage 1, P_os+g stage 2,
P_os+g+p stage 3. Stage 0 is plain data parallelism.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Placement(Enum):
    """Where the elements of a tensor live."""

    REPLICATE = "every rank holds all elements"
    SHARD = "rank r holds shard r only"


class Stage(NamedTuple):
    """One row of the table of stages."""

    parameter: Placement
    gradient: Placement
    optimizer_state: Placement


_R, _S = Placement.REPLICATE, Placement.SHARD

STAGES: dict[int, Stage] = {
    0: Stage(parameter=_R, gradient=_R, optimizer_state=_R),
    1: Stage(parameter=_R, gradient=_R, optimizer_state=_S),
    2: Stage(parameter=_R, gradient=_S, optimizer_state=_S),
    3: Stage(parameter=_S, gradient=_S, optimizer_state=_S),
}
