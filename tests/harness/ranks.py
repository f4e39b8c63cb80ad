"""One pytest run on several ranks: they agree on every outcome, and none waits for ever."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

_LATE = 5.0  # seconds after which a rank that waits for the others shows why its own test failed
_SHORTEST_SLEEP, _LONGEST_SLEEP = 5e-5, 5e-4  # seconds between looks for the others
_GRACE = 2.0  # seconds in which the other ranks may show their stacks, too
_MACHINERY = frozenset({"_pytest", "pytest", "pluggy", "<frozen runpy>"})


class _Outcome(NamedTuple):
    """What one rank brings to an agreement."""

    stage: str  # which phase of which test; ranks that bring different ones have lost each other
    outcome: str
    text: str


class RankAgreement:
    """Plugin of a run with several ranks.

    A phase of a test (setup, call, teardown) that fails on one rank fails on all; a skip on some
    ranks only is a failure, since the others would wait in vain. Rank 0 alone writes to the
    terminal, and shows every rank's failure. A test that hangs ends the job with the stacks of all
    threads of all ranks.
    """

    def __init__(self, config: pytest.Config) -> None:
        # Apart from COMM_WORLD, so that a test's own messages never mix with ours.
        self._comm = MPI.COMM_WORLD.Dup()
        self._mark = f"[rank {self._comm.rank} of {self._comm.size} on {socket.gethostname()}]"
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._failures: list[str] = []
        if self._comm.rank:
            config.pluginmanager.unregister(name="terminalreporter")

    # -- agreement -----------------------------------------------------------------------------

    def _agree(self, mine: _Outcome) -> list[_Outcome]:
        """Exchange outcomes with all ranks; end the job if some are elsewhere."""
        if self._are_alike(mine) and mine.outcome != "failed":
            return [mine] * self._comm.size
        everywhere = self._comm.allgather(mine)
        if len({each.stage for each in everywhere}) > 1:
            stages = "; ".join(f"rank {r}: {each.stage}" for r, each in enumerate(everywhere))
            self._abort(f"ranks run different tests: {stages}")
        return everywhere

    def _are_alike(self, mine: _Outcome) -> bool:
        """Wait for all ranks, and whether they bring the same stage and outcome.

        Nothing here takes the core from ranks that still compute. A rank that failed in the middle of
        a test usually leaves the others in a collective until the timeout: its reason must be seen
        all the same.
        """
        own = np.frombuffer(blake2b(repr(mine[:2]).encode(), digest_size=16).digest(), np.uint8)
        all_ranks = np.empty((self._comm.size, own.size), np.uint8)
        request = self._comm.Iallgather(own, all_ranks)
        start, told = time.monotonic(), False
        while not request.Test():
            waited = time.monotonic() - start
            time.sleep(min(max(waited / 8, _SHORTEST_SLEEP), _LONGEST_SLEEP))
            if not told and mine.outcome == "failed" and waited > _LATE:
                self._write(f"{mine.stage} failed here, other ranks go on\n{mine.text}")
                told = True
        return bool((all_ranks == own).all())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Give every rank the same outcome."""
        report: pytest.TestReport = yield
        text = "" if report.passed else _text(report)
        stage = f"{report.when} of {item.nodeid}"
        everywhere = self._agree(_Outcome(stage, report.outcome, text))
        outcomes = {each.outcome for each in everywhere}
        if "failed" in outcomes or len(outcomes) > 1:
            report.outcome = "failed"
            report.longrepr = _failures(everywhere)
            self._failures.append(f"{stage} failed\n{report.longrepr}")
            report.sections = []
            vars(report).pop("wasxfail", None)
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Show an error of collection that rank 0 may not have."""
        if report.failed and self._comm.rank:
            self._write(f"collection of {report.nodeid} failed\n{report.longreprtext}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All ranks run the same tests, or none."""
        nodeids = [item.nodeid for item in session.items]
        everywhere = self._comm.allgather((nodeids, session.testsfailed))
        if any(failed for _, failed in everywhere):
            ranks = [str(r) for r, (_, failed) in enumerate(everywhere) if failed]
            if not session.testsfailed:
                raise session.Interrupted(f"errors during collection on rank {', '.join(ranks)}")
        elif any(other != nodeids for other, _ in everywhere):
            differing = sorted(
                {nodeid for other, _ in everywhere for nodeid in set(other) ^ set(nodeids)}
            )
            raise session.Interrupted(f"ranks collected different tests: {differing[:10]}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Leave together; a rank that leaves alone is noticed by the others' next agreement."""
        self._agree(_Outcome("end of the session", "passed", ""))
        if self._comm.rank:  # rank 0 alone writes the cache
            for name in ("lfplugin", "nfplugin", "stepwiseplugin"):
                session.config.pluginmanager.unregister(name=name)

    # -- ends of the job -----------------------------------------------------------------------

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """`pytest.exit` and Ctrl-C end one rank's session only: end the job."""
        if not isinstance(excinfo.value, pytest.Session.Interrupted):  # which all ranks raise
            self._abort(f"{excinfo.typename}: {excinfo.value}")

    def pytest_internalerror(self, excrepr: object) -> None:
        """An error in a hook of one rank."""
        self._abort(str(excrepr))

    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool:
        """In place of pytest-timeout's own timer, which would end one rank and show its stacks only."""
        timer = threading.Timer(settings.timeout, self._end_hung, (item.nodeid, settings.timeout))
        timer.daemon = True
        item.cancel_timeout = timer.cancel
        timer.start()
        return True

    def _end_hung(self, nodeid: str, seconds: float) -> None:
        if self._comm.rank == 0:  # pytest would show them at the end
            for failure in self._failures:
                self._write(failure)
        self._write(f"{nodeid} ran longer than {seconds:g} s\n{_stacks()}")
        time.sleep(_GRACE)
        self._end()

    def _abort(self, text: str) -> None:
        self._write(text)
        time.sleep(_GRACE)
        self._end()

    def _end(self) -> None:
        MPI.COMM_WORLD.Abort(1)
        os._exit(1)

    def _write(self, text: str) -> None:
        """Write to the real stderr, each line marked with the rank."""
        if self._capture is not None:
            self._capture.suspend(in_=False)
        lines = "".join(f"{self._mark} {line}\n" for line in text.splitlines())
        os.write(sys.__stderr__.fileno(), lines.encode(errors="replace"))
        if self._capture is not None:
            self._capture.resume()


def _stacks() -> str:
    """The stacks of all threads but this one, without the frames of pytest itself."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines.append(f"thread {names.get(ident, ident)}\n")
            lines += traceback.format_list(
                entry
                for entry in traceback.extract_stack(frame)
                if not _MACHINERY.intersection(Path(entry.filename).parts)
            )
    return "".join(lines)


def _text(report: pytest.TestReport) -> str:
    """The report's traceback (or the reason of its skip) and what the test wrote."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    sections = [f"--- {name}\n{content}" for name, content in report.sections if content]
    return "\n".join([report.longreprtext, *sections])


def _failures(everywhere: list[_Outcome]) -> str:
    lines = []
    if all(each.outcome != "failed" for each in everywhere):
        lines.append("the outcome differs between ranks; skip on all of them or on none")
        lines += [f"rank {r}: {each.outcome} {each.text}" for r, each in enumerate(everywhere)]
    for rank, each in enumerate(everywhere):
        if each.outcome == "failed":
            lines += [f"=== rank {rank} of {len(everywhere)}", each.text]
    return "\n".join(lines)
