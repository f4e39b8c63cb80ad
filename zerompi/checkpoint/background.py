"""A checkpoint that is written while training goes on.

Each rank's thread writes that rank's part and calls no MPI. Then the rank sends what it has written to
rank 0, by messages that the program's own thread starts and looks after whenever zerompi is called
(`poll`): no collective, so ranks need not come by at the same time, and MPI need not serve several
threads. When rank 0 has all messages its thread publishes. Until then the path is as it was before:
a job that ends in between leaves a leftover beside it, nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from zerompi.agreement import agree_error
from zerompi.checkpoint.copies import Copies
from zerompi.checkpoint.writer import Draft
from zerompi.report import MemoryLedger

_TAG = 1
_LOOK_EVERY = 0.002  # seconds between looks at what others have sent

_log = logging.getLogger("zerompi")


class _Saving:
    """One checkpoint on its way, as this rank sees it.

    Attributes:
        written: set when this rank has written its part, or has failed to.
        error: why the part was not written, or the checkpoint not published.
    """

    def __init__(
        self,
        draft: Draft,
        state: Mapping[str, Any],
        counts: Sequence[int],
        comm: MPI.Intracomm,
    ) -> None:
        self.draft = draft
        self.written = threading.Event()
        self.error: Exception | None = None
        self._state = state
        self._comm = comm
        self._complete = threading.Event()
        # Whether the part is written, then the rows that `Draft.write` returns.
        self._messages = [np.zeros(1 + 4 * count, dtype=np.int64) for count in counts]
        self._requests: list[MPI.Request] = []
        if comm.rank == 0:
            self._requests = [
                comm.Irecv(message, source=rank, tag=_TAG)
                for rank, message in enumerate(self._messages)
                if rank != 0
            ]
        self._sent = comm.rank == 0
        self._thread = threading.Thread(target=self._run, name="zerompi-save", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Send or receive what there is; no MPI in the thread, none of this in another one."""
        if not self._sent and self.written.is_set():
            message = self._messages[self._comm.rank]
            self._requests = [self._comm.Isend(message, dest=0, tag=_TAG)]
            self._sent = True
        if not self._complete.is_set() and self._sent and MPI.Request.Testall(self._requests):
            self._complete.set()

    @property
    def is_going_on(self) -> bool:
        """Whether this rank has something to do yet."""
        return self._thread.is_alive() or not self._complete.is_set()

    def _run(self) -> None:
        self._attempt(self._write)
        self.written.set()
        if self._comm.rank == 0:
            self._complete.wait()
            if all(message[0] for message in self._messages):
                self._attempt(self._publish)
            if self.error is not None or not all(message[0] for message in self._messages):
                self.draft.discard()

    def _attempt(self, work: Any) -> None:
        try:
            work()
        except Exception as error:
            self.error = error
            _log.error("%s was not saved in the background: %s", self.draft.path, error)

    def _write(self) -> None:
        rows = self.draft.write()
        message = self._messages[self._comm.rank]
        message[1:] = rows.reshape(-1)
        message[0] = 1

    def _publish(self) -> None:
        rows = [message[1:].reshape(-1, 4) for message in self._messages]
        self.draft.publish(self._state, rows)


class BackgroundSaves:
    """At most one checkpoint on its way.

    `begin`, `finish` and `close` are collective over `comm`; `poll` is not.

    Args:
        comm: the ranks that save; duplicated at the first `begin`.
        memory: where copies are counted that wait to be written.

    Attributes:
        copies: memory for what waits to be written; free after `finish`.
    """

    def __init__(self, comm: MPI.Intracomm, memory: MemoryLedger) -> None:
        self._world = comm
        self.copies = Copies(memory)
        self._comm: MPI.Intracomm | None = None
        self._saving: _Saving | None = None
        self._pid = os.getpid()

    def begin(self, draft: Draft, state: Mapping[str, Any]) -> None:
        """Let `draft` be written; its slices must be in `copies`. Only after `finish`."""
        assert self._saving is None
        counts = self._world.allgather(draft.num_pieces)
        if self._comm is None:
            self._comm = self._world.Dup()
        self._saving = _Saving(draft, state, counts, self._comm)

    def poll(self) -> None:
        """Move messages on. Local and quick; the thread that calls `begin` calls it now and then."""
        if self._saving is not None:
            self._saving.poll()

    @property
    def is_pending(self) -> bool:
        """Whether there is a checkpoint of which this rank does not know yet that it is published."""
        self.poll()
        return self._saving is not None and self._saving.is_going_on

    def finish(self) -> None:
        """Wait until the checkpoint on its way, if any, is published.

        Raises:
            CheckpointError: on all ranks, once: it was not; what was at its path is there still.
        """
        saving = self._saving
        if saving is None:
            return
        while saving.is_going_on:
            saving.poll()
            time.sleep(_LOOK_EVERY)
        self._saving = None
        agree_error(self._world, saving.error)

    def finish_at_exit(self) -> None:
        """The same at the end of the program, where MPI or the thread may be gone."""
        if self._saving is None or os.getpid() != self._pid:
            return
        if MPI.Is_finalized():
            path, self._saving = self._saving.draft.path, None
            _log.error("%s was not saved: MPI was finalised before it was complete", path)
        else:
            self.finish()

    def close(self) -> None:
        """Free the communicator and the memory, after `finish`."""
        self.copies.release()
        if self._comm is not None:
            self._comm.Free()
            self._comm = None
