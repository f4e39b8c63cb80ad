from __future__ import annotations

import pytest
from mpi4py import MPI

from zerompi.errors import ZerompiError
from zerompi.train.agreement import agree, agree_on_root
from zerompi.train.config import InputError


def test_an_error_of_one_rank_is_raised_on_all(comm: MPI.Intracomm) -> None:
    last = comm.size - 1

    def work() -> int:
        if comm.rank == last:
            raise FileNotFoundError(2, "No such file", "/a/b")
        return comm.rank

    with pytest.raises(InputError) as caught:
        agree(comm, work)
    where = f"rank {last}: " if comm.size > 1 else ""
    assert str(caught.value) == f"{where}/a/b: No such file"


def test_an_error_of_all_ranks_names_none(comm: MPI.Intracomm) -> None:
    def work() -> None:
        raise ZerompiError("two\n lines")

    with pytest.raises(InputError, match=r"^two lines$"):
        agree(comm, work)


def test_each_rank_keeps_its_own_result(comm: MPI.Intracomm) -> None:
    assert agree(comm, lambda: comm.rank) == comm.rank


def test_all_ranks_get_the_result_of_the_root(comm: MPI.Intracomm) -> None:
    assert agree_on_root(comm, lambda: comm.rank + 10) == 10


def test_an_error_of_the_root_is_raised_on_all(comm: MPI.Intracomm) -> None:
    def work() -> None:
        raise InputError(f"from {comm.rank}")

    with pytest.raises(InputError, match=r"^from 0$"):
        agree_on_root(comm, work)


def test_running_out_of_memory_is_no_wrong_input() -> None:
    def work() -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(OSError, match="Cannot allocate"):
        agree(MPI.COMM_SELF, work)
