"""Commands of zerompi, run by the ranks of the tests themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from zerompi.cli import main


class CommandRun(NamedTuple):
    """How a command ended, and what this rank wrote."""

    status: object
    stdout: str
    stderr: str

    @classmethod
    def run(cls, words: Sequence[str | Path], capture: pytest.CaptureFixture[str]) -> CommandRun:
        """Run `zerompi WORDS`. Collective over COMM_WORLD."""
        capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return cls(ended.value.code, *capture.readouterr())

    def is_refusal(self, message: str, rank: int) -> bool:
        """Whether it ended with status 2 and one line of rank 0 that has `message`."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        said = [message in line for line in lines] == ([True] if rank == 0 else [])
        return self.status == 2 and said and "Traceback" not in self.stderr
