"""What used to be silently wrong, or to hang, is right or a clear error."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import zerompi
from models import CASES, assert_same_weights, build, one_each, own_slice, step

STAGES = [0, 1, 2, 3]


@pytest.fixture(params=STAGES)
def stage(request) -> int:
    return request.param


@pytest.mark.mpi(min_size=2)
def test_a_batch_more_on_one_rank_ends_with_an_error_on_all(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)

    def train():
        with zerompi.partition(model, optimizer, stage=stage, comm=comm):
            for number in range(2 if comm.rank == 0 else 1):
                step(comm, case, model, optimizer, number)

    with pytest.raises(zerompi.MismatchError, match="close of the partition"):
        train()


@pytest.mark.mpi(min_size=4)
def test_a_method_called_on_one_rank_ends_with_an_error_where_there_are_copies(comm):
    case = CASES["mlp"]
    model, optimizer = build(case)
    topology = zerompi.Topology(comm, ranks_per_node=2)
    zero = zerompi.partition(model, optimizer, comm=comm, shard_ranks=2, topology=topology)

    def train():
        if comm.rank == 0:
            zero.full_state_dict()
        step(comm, case, model, optimizer)

    with pytest.raises(zerompi.MismatchError, match="full_state_dict"):
        train()


@pytest.mark.mpi(min_size=2)
def test_a_step_skipped_on_one_rank_ends_with_an_error(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zerompi.partition(model, optimizer, stage=stage, comm=comm)

    def train():
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        case.loss(model(x), y).backward()
        if comm.rank == 0:
            optimizer.step()
        step(comm, case, model, optimizer)

    with pytest.raises(zerompi.MismatchError, match="optimizer step"):
        train()


def test_a_clipped_gradient_that_is_dropped_leaves_no_trace(comm, stage):
    case = CASES["mlp"]
    precision = zerompi.MixedPrecision(torch.bfloat16, torch.bfloat16, torch.float32)
    states = []
    for dropped in (False, True):
        model, optimizer = build(case)
        with zerompi.partition(
            model, optimizer, stage=stage, comm=comm, mixed_precision=precision
        ) as zero:
            if dropped:
                x, y = own_slice(case.batch(0), comm.rank, comm.size)
                (case.loss(model(x), y) * float("nan")).backward()
                assert zero.clip_grad_norm_(1.0).isnan()
                optimizer.zero_grad()
            step(comm, case, model, optimizer)
            states.append(zero.full_state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("reduce_dtype", [None, torch.bfloat16])
def test_zero_grad_to_zeros_starts_anew(comm, stage, reduce_dtype, by):
    case = CASES["mlp"]
    model, optimizer = build(case, "sgd")
    precision = zerompi.MixedPrecision(torch.bfloat16, reduce_dtype, torch.float32)
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    with zerompi.partition(
        model, optimizer, stage=stage, comm=comm, mixed_precision=precision
    ) as zero:
        norms = []
        for _ in range(3):
            case.loss(model(x), y).backward()
            norms.append(zero.clip_grad_norm_(float("inf")).item())
            {"optimizer": optimizer, "model": model}[by].zero_grad(set_to_none=False)
        assert norms[1:] == norms[:1] * 2
        before = zero.full_state_dict()
        optimizer.step()  # of zeros
        after = zero.full_state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_parameters_given_to_an_optimizer_after_partition_are_refused(comm, stage):
    case = CASES["mlp"]
    model, _ = build(case)
    weights = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer, second = torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(others, lr=0.1)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    case.loss(model(x), y).backward()
    with pytest.raises(zerompi.ZerompiError, match="param group 0 of SGD holds gain"):
        second.step()
    optimizer.add_param_group({"params": others})
    with pytest.raises(zerompi.ZerompiError, match="param group 1 of SGD holds gain"):
        optimizer.step()
    zero.close()
    second.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.half(),
        lambda model: setattr(model.layers[0].weight, "data", torch.ones(13, 7)),
    ],
    ids=["double", "half", "data"],
)
def test_replaced_data_is_refused(comm, stage, change):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    change(model)
    with pytest.raises(zerompi.ZerompiError, match="somebody has replaced the data of"):
        model(case.batch(0)[0])
    zero.close()


def test_a_module_added_after_partition_is_refused(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    model.layers[4] = nn.Linear(5, 3)
    with pytest.raises(zerompi.ZerompiError, match=r"layers\.4\.weight was not in the model"):
        model(case.batch(0)[0])
    zero.close()


def test_models_that_share_a_module_are_refused(comm, stage):
    encoder = nn.Linear(3, 3)
    first, second = nn.Sequential(encoder, nn.Linear(3, 1)), nn.Sequential(encoder)
    zero = zerompi.partition(first, stage=stage, comm=comm)
    with pytest.raises(ValueError, match=r"not partitioned yet, got 0\.weight"):
        zerompi.partition(second, stage=stage, comm=comm)
    zero.close()
    zerompi.partition(nn.Linear(3, 3), stage=stage, comm=comm).close()


def test_gradients_that_bypass_the_loss_scale_are_refused(comm, stage):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = zerompi.MixedPrecision(loss_scale=64.0)
    zero = zerompi.partition(
        model, optimizer, stage=stage, comm=comm, units=[], mixed_precision=precision
    )
    with zero.gathered(), pytest.raises(zerompi.ZerompiError, match="loss scale is applied"):
        model.weight.square().sum().backward()
    zero.close()


class Notes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Note() for _ in range(3))

    def forward(self, x):
        notes = []
        for layer in self.layers:
            x = layer(x, notes)
        return x, notes


class Note(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, notes):
        x = self.linear(x)
        notes.append(x.square().mean())
        return x


def test_a_list_passed_through_units_is_the_callers(comm, stage):
    model = Notes()
    with zerompi.partition(model, stage=stage, comm=comm):
        _, notes = model(torch.randn(2, 4))
        assert len(notes) == 3
        sum(notes).backward()


def test_a_buffer_assigned_anew_reaches_all_ranks(comm, stage):
    model = nn.BatchNorm1d(3)
    with zerompi.partition(model, stage=stage, comm=comm) as zero:
        for number in range(5):
            model.running_mean = torch.full((3,), float(number + comm.rank))
            assert bool((zero.full_state_dict()["running_mean"] == number).all())


def test_writing_one_module_leaves_the_others_without_values(comm):
    with torch.device("meta"):
        model = nn.Sequential(Unfilled(), Unfilled())
    zero = zerompi.partition(model, comm=comm)
    for index in range(2):
        with pytest.raises(zerompi.ZerompiError, match="no values yet"):
            model(torch.ones(2))
        with zero.gathered(model[index], writable=True):
            model[index].weight.data.fill_(1.0)
    assert torch.equal(model(torch.ones(2)), torch.ones(2))
    zero.close()


class Unfilled(nn.Module):
    """No reset_parameters: only the user knows what the values are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))

    def forward(self, x):
        return x * self.weight


def test_buffers_that_nobody_has_filled_are_refused_after_load(comm):
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("frequencies", torch.empty(3, device="meta"), persistent=False)
    state = model.state_dict()
    zero = zerompi.partition(model, comm=comm)
    zero.load_full_state_dict(state)
    with pytest.raises(zerompi.ZerompiError, match="no values yet: frequencies"):
        model(torch.ones(1, 2))
    model.frequencies.fill_(1.0)
    model(torch.ones(1, 2))
    zero.close()


def test_state_dict_of_a_cut_optimizer_is_refused(comm):
    model, optimizer = build(CASES["mlp"])
    state = optimizer.state_dict()
    zero = zerompi.partition(model, optimizer, stage=1, comm=comm)
    with pytest.raises(zerompi.ZerompiError, match=r"use zero\.save"):
        optimizer.state_dict()
    with pytest.raises(zerompi.ZerompiError, match=r"use zero\.load"):
        optimizer.load_state_dict(state)
    zero.close()


def test_copies_of_a_partitioned_model_are_refused(comm):
    model, optimizer = build(CASES["mlp"])
    with (
        zerompi.partition(model, optimizer, comm=comm),
        pytest.raises(zerompi.ZerompiError, match="cannot be copied or pickled"),
    ):
        copy.deepcopy(model)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), 1000.0])
def test_clipping_of_wide_and_complex_gradients(comm, stage, dtype, norm_type):
    weight = torch.randn(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(3, 3, bias=False)
    model.weight = nn.Parameter(weight.clone())
    reference = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        with zero.gathered():
            pass
        model(torch.eye(3, dtype=dtype)).abs().square().sum().backward()
        reference.abs().square().sum().backward()
        norm = zero.clip_grad_norm_(0.5, norm_type)
    if norm_type < 100:
        expected = torch.nn.utils.clip_grad_norm_([reference], 0.5, norm_type)
        torch.testing.assert_close(norm, expected, check_dtype=False)


@pytest.mark.mpi(min_size=2)
def test_an_empty_module_gathers_nothing(comm):
    model = nn.Sequential(nn.ModuleList(), nn.Linear(2, 2))
    topology = one_each(comm)
    with zerompi.partition(model, comm=comm, topology=topology) as zero, zero.gathered(model[0]):
        assert bool(model[1].weight.isnan().all())


def test_the_trial_step_leaves_the_optimizer_as_it_is(comm):
    class Counting(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.seen = []

        def step(self, closure=None):
            self.seen.append(1)
            return super().step(closure)

    model = nn.Linear(2, 2)
    optimizer = Counting(model.parameters(), lr=0.1)
    with zerompi.partition(model, optimizer, comm=comm):
        assert optimizer.seen == []


def test_two_partitions_interleave_their_steps(comm, stage):
    case = CASES["mlp"]
    expected = []
    model, optimizer = build(case)
    for number in range(3):
        x, y = case.batch(number)
        loss = case.loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    pairs = [build(case) for _ in range(2)]
    zeros = [zerompi.partition(*pair, stage=stage, comm=comm) for pair in pairs]
    for number in range(3):
        for pair in pairs:
            mean = comm.allreduce(step(comm, case, *pair, number)) / comm.size
            assert mean == pytest.approx(expected[number], rel=1e-5)
    for zero in zeros:
        zero.close()


# -- gradients that do not come through a unit's output ------------------------------------------


class Feature(nn.Module):
    """Keeps things beside its output: a penalty, and what its first half computed."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size)
        self.outer = nn.Linear(size, size)

    def forward(self, x):
        self.feature = torch.tanh(self.inner(x))
        self.penalty = torch.tanh(self.outer(self.feature)).square().sum(-1).mean()
        return self.outer(self.feature)


class InPlace(nn.Module):
    """Units whose outputs are changed in place, through views."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True)
        )

    def forward(self, x):
        return self.layers(x.unflatten(0, (1, -1))).squeeze(0)


def features() -> nn.Module:
    return nn.Sequential(Feature(), nn.Tanh(), Feature(), nn.Tanh(), Feature())


KINDS = {
    "penalties": (
        features,
        lambda m, x: m(x).square().mean() + sum(m[i].penalty for i in (0, 2, 4)),
    ),
    "penalties alone": (features, lambda m, x: m(x).sum() * 0 + sum(m[i].penalty for i in (0, 2))),
    "a feature": (features, lambda m, x: (m(x), m[2].feature.square().mean())[1]),
    "in place": (InPlace, lambda m, x: m(x).square().mean()),
    "a distribution": (
        features,
        lambda m, x: -torch.distributions.Normal(m(x), 1.0).log_prob(x).mean(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_bypass_the_output_are_right(comm, stage, kind):
    make, loss = KINDS[kind]
    nets = []
    for _ in range(2):
        torch.manual_seed(4)
        net = make()
        nets.append((net, torch.optim.SGD(net.parameters(), lr=0.1)))
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(5))
    n = 12 // comm.size
    (reference, theirs), (model, ours) = nets
    with zerompi.partition(model, ours, stage=stage, comm=comm) as zero:
        for _ in range(3):
            loss(reference, x).backward()
            loss(model, x[comm.rank * n :][:n]).backward()
            for optimizer in (theirs, ours):
                optimizer.step()
                optimizer.zero_grad()
        state = zero.full_state_dict()
    assert_same_weights(state, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outer", ["save_on_cpu", "checkpoint"])
def test_other_hooks_on_saved_tensors_still_work(comm, outer):
    case = CASES["gpt"]
    expected = {}
    hooks = torch.autograd.graph.save_on_cpu if outer == "save_on_cpu" else nullcontext
    for partitioned in (False, True):
        model, optimizer = build(case)
        if outer == "checkpoint":
            for block in model.blocks:
                original = block.forward
                block.forward = lambda x, f=original: torch.utils.checkpoint.checkpoint(
                    f, x, use_reentrant=False
                )
        zero = zerompi.partition(model, optimizer, comm=comm) if partitioned else None
        x, y = own_slice(case.batch(0), comm.rank, comm.size) if partitioned else case.batch(0)
        with hooks():
            loss = case.loss(model(x), y)
        loss.backward()
        optimizer.step()
        if zero is None:
            expected = model.state_dict()
        else:
            state = zero.full_state_dict()
            for key, value in expected.items():
                torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4)
            zero.close()


@pytest.mark.mpi(min_size=2)
def test_a_module_called_outside_its_unit_is_refused(comm):
    model, optimizer = build(CASES["gpt"])
    zero = zerompi.partition(model, optimizer, comm=comm, topology=one_each(comm))
    with pytest.raises(
        zerompi.ZerompiError, match=r"token was called outside the forward of \(root\)"
    ):
        model.token(torch.tensor([1]))
    with zero.gathered():
        assert model.token(torch.tensor([1])).isfinite().all()
    zero.close()


def test_gradients_set_by_hand_are_refused(comm, stage):
    model, optimizer = build(CASES["mlp"])
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    model.gain.grad = torch.ones(())
    with pytest.raises(zerompi.ZerompiError, match=r"gain\.grad was set by hand"):
        optimizer.step()
    zero.close()


def test_embeddings_that_renormalise_themselves_are_refused(comm):
    with pytest.raises(ValueError, match="without max_norm"):
        zerompi.partition(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), comm=comm)


def test_lbfgs_trains_at_stage_0(comm):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for partitioned in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5)
        zero = zerompi.partition(model, optimizer, stage=0, comm=comm) if partitioned else None

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(zero.full_state_dict() if zero else model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
    zero.close()


def test_attention_on_the_meta_device_is_initialised(comm):
    with torch.device("meta"):
        model = nn.MultiheadAttention(4, 2)
    with zerompi.partition(model, comm=comm) as zero:
        assert all(value.isfinite().all() for value in zero.full_state_dict().values())


def test_an_lstm_on_the_meta_device_is_refused_with_advice(comm):
    with torch.device("meta"):
        model = nn.LSTM(2, 3)
    with pytest.raises(ValueError, match="make that module on the host"):
        zerompi.partition(model, comm=comm)


def test_expanded_buffers_are_synchronised(comm):
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.full((1,), float(comm.rank)).expand(4))
    with zerompi.partition(model, comm=comm) as zero:
        assert torch.equal(zero.full_state_dict()["scale"], torch.zeros(4))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_change_in_place_of_what_ranks_share_is_refused(comm, stage):
    """Each rank would do it once more to the one copy of the node."""
    model, optimizer = build(CASES["mlp"])
    weight = next(model.parameters())
    x, y = own_slice(CASES["mlp"].batch(0), comm.rank, comm.size)
    topology = zerompi.Topology(comm, comm.size)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm, topology=topology)
    CASES["mlp"].loss(model(x), y).backward()
    optimizer.step()
    if zero.num_copies < comm.size:
        with torch.no_grad():
            weight.mul_(1.0)
        with pytest.raises(zerompi.ZerompiError, match=r"was changed in place.*gathered\(writable"):
            model(x)
    with zero.gathered(writable=True), torch.no_grad():
        weight.mul_(0.5)
    expected = 0.5 * zero.full_state_dict()[next(iter(dict(model.named_parameters())))]
    with zero.gathered(writable=True), torch.no_grad():
        weight.mul_(0.5)
    name = next(iter(dict(model.named_parameters())))
    assert torch.equal(zero.full_state_dict()[name], expected)
    model(x)
    zero.close()
