"""Quantized messages: the same bits on all ranks, errors within the bound, bytes as in theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collectives.samples import as_bytes, between_nodes, documented_sum
from harness.memory import HAS_DEVICE, WITHOUT_DEVICE, DeviceMemory, HostMemory
from zerompi.arrays import on_device
from zerompi.collectives import Group, quantized
from zerompi.collectives.quantized import (
    Code,
    Packer,
    gather_blocks_quantized,
    gather_node_copies_quantized,
    reduce_blocks_quantized,
)
from zerompi.collectives.shared import Window
from zerompi.traffic import INTER_GROUP, INTER_NODE, INTRA_NODE

INT8, INT4 = Code(8, 16), Code(4, 16)
LARGEST_CODE = {8: 127, 4: 7}
LENGTHS = [37, 0, 64, 5]
LEVELS = (INTRA_NODE, INTER_NODE, INTER_GROUP)


def ranges_of(group):
    stops = np.cumsum(LENGTHS[: group.size]).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def values(numel, rank, dtype=torch.float32):
    """Of several magnitudes, so that blocks have different scales."""
    generator = torch.Generator().manual_seed(rank)
    sizes = torch.rand(numel, generator=generator).mul_(8).exp_()
    return torch.randn(numel, generator=generator).mul_(sizes).to(dtype)


def arrived(block, code):
    """What a rank makes of a packed block."""
    packed = torch.empty(code.nbytes(block.numel()), dtype=torch.uint8)
    out = torch.empty_like(block)
    code.pack(block, packed)
    code.unpack(packed, out)
    return out


def bounds(block, code):
    """The largest error of each element."""
    parts = block.float().abs().split(code.block)
    of_blocks = [part.max().expand(part.numel()) for part in parts if part.numel()]
    return torch.cat([*of_blocks, torch.empty(0)]) / (2 * LARGEST_CODE[code.bits]) * (1 + 1e-5)


def node_of(group, memory):
    """Through what the ranks of a node read each other's blocks in this kind of memory, if they do."""
    return (
        group.node
        if isinstance(memory, HostMemory)
        else group.node_of(on_device(memory.put_tensor(torch.ones(1))))
    )


def reduced(group, memory, full, ranges, packer, **options):
    """This rank's block of the sum, on the host."""
    send = memory.put_tensor(full)
    start, stop = ranges[group.rank]
    out = memory.put_tensor(torch.zeros(stop - start, dtype=full.dtype))
    reduce_blocks_quantized(send, out, ranges, group, packer, **options)
    assert as_bytes(memory.get(send)) == as_bytes(full)
    return memory.get(out)


# -- error bound -------------------------------------------------------------------------------


def adversarial_blocks():
    """Blocks of 16: all equal, one outlier, zeros, subnormal, largest; and random ones of all sizes."""
    info = torch.finfo(torch.float32)
    outlier = torch.full((16,), 1e-3)
    outlier[5] = -1e4
    halves = (torch.arange(16) - 7.5) / 7  # half way between two codes
    random = torch.randn(600, 16, generator=torch.Generator().manual_seed(1))
    random *= torch.logspace(-44, 37, 600)[:, None]
    blocks = [
        torch.full((16,), -0.3),
        outlier,
        torch.zeros(16),
        halves,
        torch.full((16,), info.max),
    ]
    blocks += [torch.arange(16) * 2.0**-149, torch.full((16,), 3e-39), *random]
    return torch.stack(blocks)


@pytest.mark.parametrize("code", [INT8, INT4])
def test_the_error_is_within_the_documented_bound(code):
    blocks = adversarial_blocks()
    out = arrived(blocks.flatten(), code).view_as(blocks).double()
    largest = blocks.double().abs().amax(1, keepdim=True)
    bound = largest / (2 * LARGEST_CODE[code.bits]) + 1e-6 * largest + 2.0**-149
    assert ((out - blocks.double()).abs() <= bound).all()
    assert (out[2] == 0).all()


@pytest.mark.parametrize("code", [INT8, INT4])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_arrives_as_nan(code, value):
    block = torch.ones(40)
    block[20] = value
    out = arrived(block, code)
    assert out[16:32].isnan().all()
    assert torch.allclose(out[:16], torch.ones(16))
    assert out[32:].isfinite().all()


# -- all-gather --------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.parametrize("dtype", quantized.QUANTIZED_DTYPES)
@pytest.mark.parametrize("code", [INT8, INT4])
def test_all_ranks_gather_the_same_bits(group, code, dtype, memory):
    ranges = ranges_of(group)
    blocks = [values(stop - start, rank, dtype) for rank, (start, stop) in enumerate(ranges)]
    full = torch.full((ranges[-1][1],), torch.nan, dtype=dtype)
    full[slice(*ranges[group.rank])] = blocks[group.rank]
    full = memory.put_tensor(full)
    gather_blocks_quantized(full, ranges, group, code)
    expected = torch.cat([arrived(block, code) for block in blocks] if group.size > 1 else blocks)
    assert as_bytes(memory.get(full)) == as_bytes(expected)


def test_a_nodes_copies_hold_what_the_other_nodes_hold(group):
    if group.node is None or group.topology.is_single_node:
        pytest.skip("needs several nodes, one with shared memory")
    ranges = ranges_of(group)
    blocks = [values(stop - start, rank) for rank, (start, stop) in enumerate(ranges)]
    nbytes = ranges[-1][1] * 4
    window = Window(group.node.comm, [nbytes, *[0] * (group.node.comm.size - 1)])
    full = window.parts(0, ranges[-1][1], torch.float32)[0]
    full[slice(*ranges[group.rank])] = blocks[group.rank]
    gather_node_copies_quantized([(full, ranges)], group, INT8)
    same = as_bytes(full) == as_bytes(torch.cat([arrived(block, INT8) for block in blocks]))
    sent = group.comm.allreduce(between_nodes(group, "all_gather"))
    group.fence()
    del full
    window.close()
    assert same
    packed = sum(INT8.nbytes(block.numel()) for block in blocks)
    assert sent == (group.topology.num_nodes - 1) * packed
    assert group.traffic.total("all_gather", INTRA_NODE) == 0


# -- reduce-scatter ----------------------------------------------------------------------------


def node_sums(summands, group, scale, node):
    """The sums that are quantized first and, after that, those of each further exchange."""
    topology = group.topology
    scaled = [summand * scale for summand in summands]
    if group.algorithm == "flat":
        return [scaled]
    of_nodes = [sum(scaled[r] for r in ranks) for ranks in topology.ranks_of_node]
    of_groups = [sum(of_nodes[n] for n in nodes) for nodes in topology.nodes_of_group]
    levels = [of_nodes, of_groups] if topology.num_groups > 1 else [of_nodes]
    return levels if node is not None else [scaled, *levels]


@pytest.mark.cover
@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("dtype", quantized.QUANTIZED_DTYPES)
def test_the_sum_is_within_the_bound_of_its_summands(group, dtype, error_feedback, memory):
    ranges = ranges_of(group)
    own = slice(*ranges[group.rank])
    summands = [values(ranges[-1][1], rank, dtype) for rank in range(group.size)]
    packer = Packer(INT4, error_feedback=error_feedback)
    out = reduced(group, memory, summands[group.rank], ranges, packer, scale=0.5)
    exact = [summand.double() for summand in summands]
    levels = node_sums(exact, group, 0.5, node_of(group, memory))
    parts = [part[own] for level in levels for part in level]
    # A sum of what was quantized before is a little larger than that of the exact values.
    bound = 1.2 * sum(bounds(part, INT4) for part in parts) + torch.finfo(dtype).eps * 1e3
    exact_sum = 0.5 * sum(exact)[own]
    bound = bound.double() + exact_sum.abs() * 2 * torch.finfo(dtype).eps
    assert ((out.double() - exact_sum).abs() <= bound).all()


@pytest.mark.cover
@pytest.mark.skipif(not HAS_DEVICE, reason=WITHOUT_DEVICE)
@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("dtype", quantized.QUANTIZED_DTYPES)
def test_sums_on_a_device_have_the_bits_and_bytes_of_those_on_the_host(
    group, dtype, error_feedback, monkeypatch
):
    """Also with what error feedback has kept of the last one, and in several chunks."""
    monkeypatch.setattr(quantized, "_CHUNK_NUMEL", 1)
    ranges = ranges_of(group)
    steps = [values(ranges[-1][1], 10 * step + group.rank, dtype) for step in range(3)]
    # Where a device's ranks send messages inside a node, so does the host's group.
    if node_of(group, DeviceMemory()) is None:
        monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "0")
    on_host = Group(group.comm, group.topology, algorithm=group.algorithm)
    results, sent = [], []
    for among, memory in ((on_host, HostMemory()), (group, DeviceMemory())):
        packer = Packer(INT4, error_feedback=error_feedback)
        outs = [reduced(among, memory, full, ranges, packer, scale=1 / 3) for full in steps]
        results.append([as_bytes(out) for out in outs])
        sent.append([among.traffic.total("reduce_scatter", level) for level in LEVELS])
    on_host.close()
    assert results[0] == results[1]
    assert sent[0] == sent[1]


def test_what_is_not_sent_is_not_quantized(group, memory):
    if not _is_exact(group, memory):
        pytest.skip("needs one node with shared memory")
    ranges = ranges_of(group)
    summands = [values(ranges[-1][1], rank) for rank in range(group.size)]
    own = slice(*ranges[group.rank])
    packer = Packer(INT4, error_feedback=True)
    out = reduced(group, memory, summands[group.rank], ranges, packer)
    assert torch.equal(out, documented_sum(summands, group)[own])


@pytest.mark.cover
@pytest.mark.parametrize("error_feedback", [False, True])
def test_chunks_give_the_same_bits_and_bytes(group, monkeypatch, memory, error_feedback):
    """Also where something is kept of the sum before, of each chunk and each exchange."""
    ranges = ranges_of(group)
    sends = [values(ranges[-1][1], 10 * step + group.rank) for step in range(3)]
    results, sent = [], []
    for chunk in (1 << 18, 1):  # one block at least
        monkeypatch.setattr(quantized, "_CHUNK_NUMEL", chunk)
        before = group.traffic.total("reduce_scatter")
        packer = Packer(INT4, error_feedback=error_feedback)
        outs = [reduced(group, memory, send, ranges, packer) for send in sends]
        results.append([as_bytes(out) for out in outs])
        sent.append(group.traffic.total("reduce_scatter") - before)
    assert results[0] == results[1]
    assert sent[0] == sent[1]


def test_all_ranks_together_send_the_packed_blocks_once_for_each_other_node(group, memory):
    ranges = ranges_of(group)
    full = torch.ones(ranges[-1][1])
    reduced(group, memory, full, ranges, Packer(INT4, error_feedback=False))
    topology, node = group.topology, node_of(group, memory)
    packed = sum(INT4.nbytes(stop - start) for start, stop in ranges)
    sent = group.comm.allreduce(between_nodes(group, "reduce_scatter"))
    inside = group.comm.allreduce(group.traffic.total("reduce_scatter", INTRA_NODE))
    if group.algorithm == "flat":
        total = (group.size - 1) * packed if node is None else inside
        assert (sent, inside) == (0, total)
    else:
        assert sent == (topology.num_nodes - 1) * packed
        of_each = packed if node is None else full.nbytes
        assert inside == (group.size - topology.num_nodes) * of_each


@pytest.mark.cover(1)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_block_with_an_overflow_on_one_rank_is_not_finite(group, value, memory):
    n = 40
    full = torch.ones(n * group.size)
    if group.rank == group.size - 1:
        full[3] = value  # in the first block of what rank 0 owns
    ranges = [(r * n, (r + 1) * n) for r in range(group.size)]
    packer = Packer(INT4, error_feedback=True)
    out = reduced(group, memory, full, ranges, packer)
    lost = 0 if group.rank else 1 if _is_exact(group, memory) else 16
    assert out.isfinite().sum() == n - lost
    out = reduced(group, memory, torch.ones(n * group.size), ranges, packer)
    assert torch.allclose(out, torch.full((n,), float(group.size)), rtol=1e-5)  # nothing has stayed


def _is_exact(group, memory):
    is_one_node = group.topology.is_single_node and node_of(group, memory) is not None
    return group.size == 1 or is_one_node


def test_error_feedback_makes_up_for_what_was_lost(group, memory):
    """The sum over many steps is off by what the last step has lost, not by that of all."""
    ranges = ranges_of(group)
    own = slice(*ranges[group.rank])
    send = [values(ranges[-1][1], rank) for rank in range(group.size)]
    levels = node_sums(send, group, 1.0, node_of(group, memory))
    parts = [part[own] for level in levels for part in level]
    errors = {}
    for error_feedback in (False, True):
        packer = Packer(INT4, error_feedback=error_feedback)
        total = torch.zeros(own.stop - own.start)
        for _ in range(10):
            total += reduced(group, memory, send[group.rank], ranges, packer)
        errors[error_feedback] = (total - 10 * sum(send)[own]).abs()
        kept = group.comm.allreduce(packer.nbytes)
        assert (kept > 0) == (error_feedback and not _is_exact(group, memory))
        assert packer.forget() >= packer.nbytes == 0
    bound = sum(bounds(part, INT4) for part in parts)
    assert (errors[True] <= 1.5 * bound + 1e-2).all()
    worst = [group.comm.allreduce(float(errors[kind].sum())) for kind in (False, True)]
    assert worst[0] > 3 * worst[1] or _is_exact(group, memory)
