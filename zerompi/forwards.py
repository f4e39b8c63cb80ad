"""How far the modules of a unit are in forward and backward: when it has done its part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Forwards:
    """The forwards of one unit's modules, and their backwards.

    A unit of one module is done when that has run. One of several is done in forward when all of them
    have run since it was unsharded, and in backward when the backwards of all are over that have run
    before it: in whatever order, also those whose forward was not recorded (a reentrant checkpoint
    records them in backward).

    Args:
        modules: of the unit.

    Attributes:
        running: for each running forward, whether it saves tensors through our hooks.
        num_open: recorded forwards whose backward is not over.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.running: list[bool] = []
        self._open = dict.fromkeys(modules, 0)
        self._run: set[nn.Module] = set()  # since the last backward pass
        self._over: set[nn.Module] = set()  # of these, whose backward is over
        self._done: set[nn.Module] = set()  # in forward, or in backward, since it was unsharded
        self.num_open = 0

    def is_open(self, module: nn.Module) -> bool:
        """Whether a recorded forward of `module` waits for its backward."""
        return self._open[module] > 0

    @property
    def may_be_complete(self) -> bool:
        """Whether no other module's backward is known to be still to come, while one is under way."""
        return len(self._open) == 1 or self.num_open <= 1

    @property
    def is_over(self) -> bool:
        """Whether the backwards of all modules that have run are over."""
        return self.num_open <= 0 and self._over >= self._run

    def unsharded(self) -> None:
        """The full parameters are made visible."""
        self._done.clear()

    def begin_pass(self) -> None:
        """Forget forwards that were not recorded, unless a backward of others is still to come."""
        if self.num_open <= 0:
            self._run.clear()
            self._over.clear()

    def begin(self, module: nn.Module) -> None:
        """A forward of `module` that is not a recomputation begins."""
        self._run.add(module)

    def opened(self, module: nn.Module) -> None:
        """Its backward will be noticed."""
        self._open[module] += 1
        self.num_open += 1

    def end(self, module: nn.Module) -> bool:
        """A forward of `module` has ended; return whether all modules have run."""
        self._done.add(module)
        return len(self._done) == len(self._open)

    def returns(self, module: nn.Module) -> bool:
        """A backward of `module` has reached an input; return whether this was the last module."""
        self._done.add(module)
        return self._done >= self._run

    def closed(self, module: nn.Module) -> None:
        """A backward of `module` is over."""
        self._open[module] -= 1
        self.num_open -= 1
        self._over.add(module)

    def reset(self) -> None:
        """No backward is to come any more."""
        for module in self._open:
            self._open[module] = 0
        self.num_open = 0
        for modules in (self._run, self._over, self._done):
            modules.clear()
