"""Ranks with different numbers of batches: in training, in evaluation, and from the very start."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from mpi4py import MPI
from torch import nn

import zerompi
from harness.memory import ON_DEVICE
from models import CASES, GPT, assert_same_weights, build, one_each

STAGES = [0, 1, 2, 3]
# How many batches the ranks have; rank 0 may be the first to end, and a rank may have none.
COUNTS = [(1, 4, 0, 2), (3, 1, 2, 2)]


@pytest.fixture(params=STAGES)
def stage(request) -> int:
    return request.param


@pytest.fixture(params=["one node", "two nodes"][: MPI.COMM_WORLD.size])
def topology(request, comm):
    if request.param == "one node":
        return zerompi.Topology(comm, ranks_per_node=comm.size)
    sizes = [comm.size - comm.size // 2, comm.size // 2]
    return zerompi.Topology(comm, ranks_per_node=sizes)


def samples_of(case, rank, turn, uneven):
    """A batch of one rank; of another size for each rank and turn if `uneven`."""
    x, y = case.batch(10 * rank + turn)
    n = 1 + (2 * rank + 3 * turn) % 5 if uneven else 3
    return x[:n], y[:n]


def batches_of(case, counts, rank, uneven=True):
    return [samples_of(case, rank, turn, uneven) for turn in range(counts[rank])]


def everything(case, counts, turn, size, uneven=True):
    """What all ranks together see in one step."""
    parts = [
        samples_of(case, rank, turn, uneven) for rank in range(size) if turn < counts[rank]
    ]  # fmt: skip
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)


def train_weighted(case, counts, rank, model, optimizer, scheduler, zero):
    """A rank's own batches, inside `join`."""
    for x, y in batches_of(case, counts, rank):
        loss = case.loss(model(x), y)
        with zero.weighted(len(x)):
            loss.backward()
        zero.clip_grad_norm_(0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@cache
def train_unsharded(case, counts, size, clip=None, uneven=True, optimizer="adamw"):
    model, opt = build(case, optimizer)
    scheduler = warm_up(opt)
    for turn in range(max(counts[:size])):
        x, y = everything(case, counts, turn, size, uneven)
        case.loss(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        scheduler.step()
        opt.zero_grad()
    return model, scheduler


def assert_same_schedule(optimizer, scheduler, expected):
    assert scheduler.last_epoch == expected.last_epoch
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in expected.optimizer.param_groups]


@pytest.mark.cover
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_training_is_the_mean_over_all_samples(comm, stage, topology, name, counts):
    case = CASES[name]
    reference, expected = train_unsharded(case, counts, comm.size, clip=0.5)
    model, optimizer = build(case)
    scheduler = warm_up(optimizer)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero:
        with zero.join(scheduler):
            train_weighted(case, counts, comm.rank, model, optimizer, scheduler, zero)
        state = zero.full_state_dict()
        assert_same_schedule(optimizer, scheduler, expected)
        # Afterwards ranks go on together, ahead of their use too.
        for _ in range(2):
            case.loss(model(x := case.batch(0)[0][:3]), case.batch(0)[1][: len(x)]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(state, reference, rtol=1e-3, atol=1e-4)


def test_without_weights_it_is_the_mean_over_batches(comm, stage):
    case, counts = CASES["gpt"], COUNTS[0]
    reference, _ = train_unsharded(case, counts, comm.size, uneven=False, optimizer="sgd")
    model, optimizer = build(case, "sgd")
    scheduler = warm_up(optimizer)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        with zero.join(scheduler):
            for x, y in batches_of(case, counts, comm.rank, uneven=False):
                case.loss(model(x), y).backward()
                optimizer.step()
                scheduler.step()
                model.zero_grad(set_to_none=False)
        assert_same_weights(zero.full_state_dict(), reference)


def test_equal_batches_change_no_bit(comm, stage):
    case = CASES["gpt"]
    states = []
    for joined in (False, True):
        model, optimizer = build(case)
        with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:

            def train(model=model, optimizer=optimizer):
                for turn in range(3):
                    x, y = samples_of(case, comm.rank, turn, uneven=False)
                    case.loss(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()

            if joined:
                with zero.join():
                    train()
            else:
                train()
            states.append(zero.full_state_dict())
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def test_accumulated_passes_are_weighted_together(comm, stage):
    """Two passes a step, of sizes that differ; the last rank has a step less."""
    case = CASES["mlp"]
    counts = [4] * comm.size
    counts[-1] = 2
    reference, theirs = build(case, "sgd")
    for turn in (0, 2):
        parts = [
            everything(case, counts, t, comm.size) for t in (turn, turn + 1) if t < max(counts)
        ]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        case.loss(reference(x), y).backward()
        theirs.step()
        theirs.zero_grad()
        if comm.size == 1:
            break
    model, optimizer = build(case, "sgd")
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        with zero.join():
            batches = batches_of(case, counts, comm.rank)
            for first in range(0, len(batches), 2):
                with zero.accumulate(2):
                    for x, y in batches[first : first + 2]:
                        with zero.weighted(len(x)):
                            case.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_weights_work_outside_of_join_too(comm, stage):
    case = CASES["gpt"]
    reference, theirs = build(case, "sgd")
    model, optimizer = build(case, "sgd")
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for turn in range(3):
            x, y = everything(case, [3] * 4, turn, comm.size)
            case.loss(reference(x), y).backward()
            x, y = samples_of(case, comm.rank, turn, uneven=True)
            with zero.weighted(len(x)):
                case.loss(model(x), y).backward()
            for o in (theirs, optimizer):
                o.step()
                o.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_a_pass_of_weight_0_counts_for_nothing(comm, stage):
    """A batch without a valid token has a loss of 0 / 0."""
    case = CASES["gpt"]
    reference, theirs = build(case, "sgd")
    x, y = case.batch(0)
    case.loss(reference(x), y).backward()
    theirs.step()
    model, optimizer = build(case, "sgd")
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        is_empty = comm.rank > 0
        loss = case.loss(model(x), torch.full_like(y, -100) if is_empty else y)
        assert bool(loss.isnan()) == is_empty
        with zero.weighted(0 if is_empty else len(x)):
            loss.backward()
        optimizer.step()
        assert_same_weights(zero.full_state_dict(), reference)
        optimizer.zero_grad()
        with pytest.raises(zerompi.ZerompiError, match="weight of 0 on all"), zero.weighted(0):
            case.loss(model(x), y).backward()
        with pytest.raises(ValueError, match="samples: expected 0 or a positive number, got -1"):
            zero.weighted(-1).__enter__()


@pytest.mark.cover
@pytest.mark.parametrize("counts", COUNTS)
def test_evaluation_of_different_lengths_ends(comm, stage, topology, counts):
    case = CASES["gpt"]
    reference, _ = build(case)
    model, optimizer = build(case)
    with (
        zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology) as zero,
        torch.no_grad(),
    ):
        for _ in range(2):  # also when the order of gathers is known
            with zero.join():
                for x, _y in batches_of(case, counts, comm.rank):
                    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
        totals = comm.allreduce(counts[comm.rank])  # sums of metrics come after the context
        assert totals == sum(counts[: comm.size])


@pytest.mark.parametrize("node_cache", [False, True])
@pytest.mark.parametrize("memory", ["1", "0"])
def test_generation_of_different_lengths_ends(comm, topology, monkeypatch, memory, node_cache):
    monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", memory)
    reference, _ = build(CASES["gpt"])
    model, _ = build(CASES["gpt"])
    options = {"comm": comm, "topology": topology, "node_cache": node_cache}

    def generate(net):
        tokens = torch.tensor([[comm.rank]])
        for _ in range(1 + 2 * comm.rank):
            tokens = torch.cat([tokens, net(tokens)[:, -1:].argmax(-1)], 1)
        return tokens

    with zerompi.partition(model, **options) as zero, torch.no_grad(), zero.join():
        assert torch.equal(generate(model), generate(reference))


class Routed(nn.Module):
    """Runs its blocks in an order that the caller chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GPT().blocks)

    def forward(self, x, order):
        for index in order:
            x = self.blocks[index](x)
        return x


ORDERS = [[0, 1, 2], [2, 0], [], [1, 1, 2, 0]]


@pytest.mark.parametrize("way", ["gathered", "a copy on each node"])
def test_ranks_evaluate_in_orders_of_their_own(comm, topology, way, monkeypatch):
    """Inside gathered(), or where each node has all shards, a forward gathers nothing."""
    if way == "a copy on each node":
        monkeypatch.setenv("ZEROMPI_SHARED_MEMORY", "1")
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(Routed())
    reference, model = models
    order, x = ORDERS[comm.rank], torch.ones(1, 4, 20)
    sizes = {len(ranks) for ranks in topology.ranks_of_node}
    if way == "a copy on each node" and sizes not in ({2}, {comm.size}):
        pytest.skip("needs nodes of one size, of several ranks")
    if way == "a copy on each node" and ON_DEVICE and comm.size > 1:
        pytest.skip("ranks of a node share memory on the host only")
    shard_ranks = "world" if way == "gathered" else "node"
    with (
        zerompi.partition(model, comm=comm, topology=topology, shard_ranks=shard_ranks) as zero,
        torch.no_grad(),
    ):
        for _ in range(2):
            if way == "gathered":
                with zero.gathered():
                    values = [model(x, order) for _ in range(1 + comm.rank)]
            else:
                values = [model(x, order) for _ in range(1 + comm.rank)]
            assert all(torch.equal(value, reference(x, order)) for value in values)


def test_buffers_end_as_those_of_the_rank_that_trained_longest(comm, stage):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    turns = comm.rank + 1
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        with zero.join():
            for turn in range(turns):
                generator = torch.Generator().manual_seed(10 * turn + comm.rank)
                model(torch.randn(8, 4, generator=generator)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        means = comm.allgather(model[1].running_mean)
        assert all(torch.equal(mean, means[0]) for mean in means)
        assert int(model[1].num_batches_tracked) == comm.size
        model(torch.ones(8, 4)).sum().backward()  # and all go on alike


def test_checkpoints_and_values_inside_join(comm, stage, tmp_path):
    case = CASES["mlp"]
    path = comm.bcast(str(tmp_path / "saved"))
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        with zero.join():
            for turn in range(2 if comm.rank == comm.size - 1 else 1):
                x, y = samples_of(case, comm.rank, turn, uneven=False)
                case.loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                state = zero.full_state_dict()
                with zero.gathered():
                    names = dict(model.named_parameters())
                    assert all(torch.equal(names[key], state[key]) for key in names)
                zero.save(path, extra={"turn": turn})
        end = zero.full_state_dict()
        assert zero.load(path) == {"turn": 1}
        assert all(torch.equal(value, end[key]) for key, value in zero.full_state_dict().items())


def test_float16_skips_overflows_on_ranks_that_have_ended(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    precision = zerompi.MixedPrecision(torch.float16)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        with zero.join():
            for turn in range(3 if comm.rank == 0 else 1):
                x, y = samples_of(case, comm.rank, turn, uneven=False)
                loss = case.loss(model(x), y.half())
                (loss * (1e5 if turn == 1 else 1e-3)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert set(comm.allgather((zero.skipped_steps, zero.loss_scale))) == {(1, 2.0**15)}


# -- what is refused -------------------------------------------------------------------------


def test_what_cannot_be_followed_is_refused(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    other = zerompi.partition(nn.Linear(2, 2), stage=stage, comm=comm)
    x, y = case.batch(0)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        refused = {
            "gathered.writable=True.": lambda: zero.gathered(writable=True).__enter__(),
            "load.*: expected to be outside of join": lambda: zero.load("nowhere"),
            "close of the partition: expected": zero.close,
            "join: expected to be outside": lambda: zero.join().__enter__(),
            "no enclosing join|inside the join.. of another": lambda: other.join().__enter__(),
        }
        with zero.join():
            for message, call in refused.items():
                with pytest.raises(zerompi.ZerompiError, match=message):
                    call()
            with pytest.raises(ValueError, match=r"closure: expected None .* inside join"):
                optimizer.step(lambda: None)
            case.loss(model(x), y).backward()
            optimizer.step()
    other.close()


def test_unreduced_gradients_at_the_end_are_refused(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)

    def leave():
        with zero.join(), zero.no_sync():
            case.loss(model(case.batch(0)[0]), case.batch(0)[1]).backward()

    with pytest.raises(zerompi.ZerompiError, match="wait for another backward pass"):
        leave()


@pytest.mark.mpi(min_size=2)
def test_active_ranks_that_differ_end_with_an_error_on_all(comm, stage):
    """Rank 0 has ended; of the others one clips and one does not, or one goes on alone."""
    case = CASES["mlp"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=one_each(comm))
    x, y = case.batch(0)

    def run():
        with zero.join():
            if comm.rank > 0:
                case.loss(model(x), y).backward()
                if comm.rank == 1:
                    zero.clip_grad_norm_(1.0)
                optimizer.step()
            elif comm.size == 2:
                optimizer.step()

    with pytest.raises(zerompi.MismatchError, match="inside join"):
        run()


@pytest.mark.mpi(min_size=2)
def test_settings_that_differ_between_ranks_are_refused(comm, stage):
    """A scheduler that was stepped inside join() and not named would leave the ranks apart."""
    case = CASES["mlp"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm):
        x, y = case.batch(0)
        case.loss(model(x), y).backward()
        optimizer.param_groups[0]["lr"] = 1.0 + comm.rank
        with pytest.raises(
            zerompi.MismatchError, match=r"rank 0 has lr 1\.0 in param group 0, rank 1"
        ):
            optimizer.step()
