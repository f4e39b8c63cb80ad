"""The command line: `zerompi train`, `zerompi bench`, `zerompi info`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what console script `zerompi` calls. Ends with SystemExit.

    Every rank of a job runs this with the same arguments. Only rank 0 writes to standard output,
    and only rank 0 reports wrong usage: one line, and exit status 2 on all ranks.
    """
    from mpi4py import MPI

    from zerompi.cli.app import run

    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sampled text may not fit the locale
    if MPI.COMM_WORLD.rank == 0:
        status = run(given)
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            status = run(given)
    # Not sys.exit, which ends the other ranks by force: all ranks have agreed on this.
    raise SystemExit(status)
