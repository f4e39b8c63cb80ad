"""Flat buffers whose memory can be given back and taken again."""

from __future__ import annotations

import torch


class Buffer:
    """A 1-D tensor made by the group that will communicate it.

    The tensor is one object for the buffer's life. `free` gives its memory back and `restore` takes new memory for
    the same storage, so that views of the tensor, also those saved by autograd, are valid again.
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(numel, dtype=dtype)
        self.nbytes = self.tensor.nbytes

    @property
    def is_free(self) -> bool:
        """Whether there is no memory behind the tensor now."""
        return self.nbytes > 0 and self.tensor.untyped_storage().nbytes() == 0

    def free(self) -> None:
        """Give the memory back; views stay, and must not be used before `restore`."""
        self.tensor.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take memory again if there is none; its contents are undefined."""
        if self.is_free:
            self.tensor.untyped_storage().resize_(self.nbytes)
