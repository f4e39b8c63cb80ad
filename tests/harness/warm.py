"""Ranks that need not import torch: forks of one process that has, for tests that start many jobs."""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.warm_rank import NUMBER_NBYTES, receive, send_number

_RANK = Path(__file__).with_name("warm_rank.py")
_MOST_FILES = 250  # that one message can carry
_AT_START = ("PYTHON", "OMP_")  # what counts when Python or torch starts


def program(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The program of a rank that does what `python ARGUMENTS...` does in `environment`."""
    own_environment, path = _server()
    wanted, own = (
        {k: v for k, v in each.items() if k.startswith(_AT_START) and k != "PYTHONPATH"}
        for each in (environment, own_environment)
    )
    is_option = arguments[0].startswith("-") and arguments[0] not in ("-c", "-m")
    if is_option or wanted != own:
        return [sys.executable, *arguments]
    return [sys.executable, "-I", "-S", str(_RANK), path, *arguments]


@cache
def _server() -> tuple[dict[str, str], str]:
    """Start the server; return its environment and the path of its socket."""
    from harness.mpirun import clean_environment

    directory = tempfile.TemporaryDirectory(prefix="warm")
    path, environment = f"{directory.name}/socket", clean_environment()
    tests = str(_RANK.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], tests])
    process = subprocess.Popen(
        [sys.executable, "-c", f"from harness.warm import serve; serve({path!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError("the server of warm ranks did not start; its reason is on stderr")
    atexit.register(directory.cleanup)
    atexit.register(process.stdin.close)  # that ends it
    return environment, path


# -- the server ---------------------------------------------------------------------------------


def serve(path: str) -> None:
    """Fork for each rank that asks at `path`, until the standard input ends; run in the fork what it asks."""
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own_path = [place for place in sys.path[1:] if place not in places]
    # Of what tests import, what takes long. MPI must not be initialised before the fork.
    import rich.console  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401
    import typer  # noqa: F401

    gc.collect()
    gc.freeze()  # a fork would touch, and so copy, all that it has from here as it ends
    _run(_Server(path).serve(), own_path)


class _Server:
    """Forks, and tells how the forks end."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ, self._accept)
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._leave)
        self._lines: dict[int, socket.socket] = {}  # to who stands for the fork, by pid
        self._request: dict[str, Any] | None = None

    def serve(self) -> dict[str, Any]:
        """Return in forks only, with what they are asked to run."""
        print("ready", flush=True)
        while True:
            for key, _ in self._selector.select():
                key.data()
                if self._request is not None:
                    return self._request

    def _accept(self) -> None:
        line, _ = self._socket.accept()
        try:
            number, files, _, _ = socket.recv_fds(line, NUMBER_NBYTES, _MOST_FILES)
            request = json.loads(receive(line, int.from_bytes(number, "big")))
        except (ConnectionError, ValueError):  # killed meanwhile
            line.close()
            return
        pid = os.fork()
        if pid == 0:
            line.close()
            self._become(request, files)
            return
        for file in files:
            os.close(file)
        end = os.pidfd_open(pid)
        self._lines[pid] = line
        self._selector.register(end, selectors.EVENT_READ, lambda: self._ended(pid, end))
        self._selector.register(line, selectors.EVENT_READ, lambda: self._abandoned(pid))
        with suppress(OSError):
            send_number(line, pid)

    def _ended(self, pid: int, end: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._selector.unregister(end)
        os.close(end)
        with self._lines.pop(pid) as line, suppress(OSError):
            if line in self._selector.get_map():
                self._selector.unregister(line)
            send_number(line, status)

    def _abandoned(self, pid: int) -> None:
        """Kill the fork of a rank that was killed."""
        if pid in self._lines:  # it may have ended at the same time
            self._selector.unregister(self._lines[pid])
            os.kill(pid, signal.SIGKILL)

    def _leave(self) -> None:
        for pid in self._lines:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def _become(self, request: dict[str, Any], received: Sequence[int]) -> None:
        """Make this fork what the rank would be: its files, its environment, its directory."""
        os.setsid()  # signals to the group of this rank's processes are for no other one
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as a launcher's child has it
        self._request, wanted = request, request["files"]
        self._selector.close()
        for line in (self._socket, *self._lines.values()):
            line.close()
        above = max(*wanted, *received) + 1
        files = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in received]
        for file in map(int, os.listdir("/proc/self/fd")):
            if file not in files:
                with suppress(OSError):  # that of the listing itself
                    os.close(file)
        for file, number in zip(files, wanted, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        random.seed()
        np.random.seed()


def _run(request: dict[str, Any], own_path: Sequence[str]) -> None:
    """What `python ARGUMENTS...` does once it has started."""
    kind, *rest = request["arguments"]
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [place for place in places if place] + list(own_path)
    main = vars(sys.modules["__main__"])
    if kind == "-m":
        sys.argv, sys.path[:] = rest, [request["directory"], *path]
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.argv, sys.path[:] = ["-c", *rest[1:]], ["", *path]
        exec(compile(rest[0], "<string>", "exec"), main)
    else:
        script = Path(kind).absolute()
        sys.argv, sys.path[:] = [kind, *rest], [str(script.parent), *path]
        main["__file__"] = kind
        exec(compile(script.read_text(), kind, "exec"), main)
