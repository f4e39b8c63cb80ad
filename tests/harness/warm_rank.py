"""What mpiexec starts as a rank where `warm.py` serves: `python -I -S warm_rank.py SOCKET ARGUMENTS...`.

It hands its arguments, environment, working directory and open files to the server, and stands for the
process that this forks: it passes signals on, and ends as that ends. It takes milliseconds to start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress

NUMBER_NBYTES = 8
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def receive(line: socket.socket, nbytes: int) -> bytes:
    """Exactly so many bytes.

    Raises:
        ConnectionError: the other end is gone.
    """
    received = b""
    while len(received) < nbytes:
        part = line.recv(nbytes - len(received))
        if not part:
            raise ConnectionError("the other end is gone")
        received += part
    return received


def receive_number(line: socket.socket) -> int:
    """What `send_number` sends."""
    return int.from_bytes(receive(line, NUMBER_NBYTES), "big", signed=True)


def send_number(line: socket.socket, number: int) -> None:
    """Send a number of 64 bits."""
    line.sendall(number.to_bytes(NUMBER_NBYTES, "big", signed=True))


def _open_files(line: socket.socket) -> list[int]:
    files = []
    for number in map(int, os.listdir("/proc/self/fd")):
        if number != line.fileno():
            with suppress(OSError):  # that of the listing itself
                os.fstat(number)
                files.append(number)
    return files


def _stand_for_fork(path: str, arguments: list[str]) -> int:
    """Have a process forked for `arguments`; return its status, less than 0 if a signal ended it."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        files = _open_files(line)
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "files": files,
        }
        text = json.dumps(request).encode()
        socket.send_fds(line, [len(text).to_bytes(NUMBER_NBYTES, "big")], files)
        line.sendall(text)
        pid = receive_number(line)
        for number in _PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return receive_number(line)


if __name__ == "__main__":
    status = _stand_for_fork(sys.argv[1], sys.argv[2:])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
