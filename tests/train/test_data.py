from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from zerompi.train.config import InputError
from zerompi.train.data import (
    ByteCodec,
    check_same_corpus,
    held_out_starts,
    load_corpus,
    training_offset,
    training_windows,
    unigram_entropy,
)


def test_the_default_text_is_the_same_every_time_and_its_last_tenth_is_held_out() -> None:
    first, second = (load_corpus(None, ByteCodec(), 128) for _ in range(2))
    assert first.digest() == second.digest()
    assert first.num_bytes == len(first.train) + len(first.held_out) > 100_000
    assert first.held_out_bytes == len(first.held_out)
    assert abs(first.held_out_bytes / first.num_bytes - 0.1) < 1e-5
    assert 4 < first.unigram_entropy < 5


def test_unigram_entropy_in_bits() -> None:
    assert unigram_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)
    assert unigram_entropy(np.zeros(9, dtype=np.uint8)) == 0
    assert unigram_entropy(np.frombuffer(b"aabc", dtype=np.uint8)) == pytest.approx(1.5)


def test_a_directory_is_read_in_the_order_of_its_paths_without_hidden_files(tmp_path: Path) -> None:
    for name, text in {"b.txt": "22", "a/z.txt": "11", ".git/x": "99", "c.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text * 20)
    corpus = load_corpus(str(tmp_path), ByteCodec(), 3)
    whole = np.concatenate([corpus.train, corpus.held_out]).tobytes()
    assert whole == b"1" * 40 + b"2" * 40


@pytest.mark.parametrize("text", [b"", b"too short"])
def test_a_text_that_is_too_short_is_refused(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(text)
    with pytest.raises(InputError, match=r"text\.txt: expected"):
        load_corpus(str(file), ByteCodec(), 32)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a directory with text, got 0 files"):
        load_corpus(str(tmp_path), ByteCodec(), 32)


def test_offsets_never_change() -> None:
    drawn = [training_offset(7, step, sample, 10_000) for step in (1, 2) for sample in (0, 1)]
    assert drawn == [1028, 6007, 9063, 4033]


def test_offsets_cover_the_text_evenly() -> None:
    drawn = [training_offset(0, step, sample, 10) for step in range(100) for sample in range(50)]
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert np.all(np.abs(counts - 500) < 100)


def test_windows_are_the_same_however_samples_are_divided() -> None:
    tokens = np.frombuffer(bytes(range(256)) * 8, dtype=np.uint8)
    whole, _ = training_windows(tokens, 12, seed=3, step=9, samples=range(6))
    for part in (range(2), range(2, 3), range(3, 6)):
        inputs, targets = training_windows(tokens, 12, seed=3, step=9, samples=part)
        assert inputs.equal(whole[part.start : part.stop])
        assert targets[:, :-1].equal(inputs[:, 1:])
        assert targets[:, -1].tolist() == [(t + 1) % 256 for t in inputs[:, -1].tolist()]


@pytest.mark.parametrize(("num_tokens", "at_most"), [(101, 4), (101, 100), (17, 3), (1000, 7)])
def test_held_out_windows_do_not_overlap(num_tokens: int, at_most: int) -> None:
    starts = held_out_starts(num_tokens, 16, at_most)
    assert len(starts) == min(at_most, (num_tokens - 1) // 16)
    assert all(b - a >= 16 for a, b in pairwise(starts))
    assert starts[0] == 0
    assert starts[-1] + 17 <= num_tokens


def test_ranks_that_read_different_texts_are_refused(comm: MPI.Intracomm, tmp_path: Path) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    file = tmp_path / "text.txt"
    file.write_bytes(b"x" * 999 + bytes([comm.rank == 1]))
    corpus = load_corpus(str(file), ByteCodec(), 8)
    with pytest.raises(InputError, match="rank 1 reads another text than rank 0"):
        check_same_corpus(corpus, comm)
