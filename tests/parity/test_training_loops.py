"""Training loops of all shapes: accumulation, several passes, schedules, evaluation between steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zerompi
from models import CASES, GLOBAL_BATCH, assert_same_weights, build, own_slice, unsharded_losses

STAGES = [0, 1, 2, 3]


@pytest.fixture(params=STAGES)
def stage(request) -> int:
    return request.param


def mean(comm, loss: torch.Tensor) -> float:
    return comm.allreduce(loss.item()) / comm.size


def halves(batch):
    """Two micro-batches that together are the batch."""
    x, y = batch
    n = len(x) // 2
    return [(x[:n], y[:n]), (x[n:], y[n:])]


def even(batch):
    """A batch whose parts can be halved at every number of ranks."""
    x, y = batch
    return torch.cat([x, x]), torch.cat([y, y])


def own(batch, comm):
    x, y = batch
    n = len(x) // comm.size
    return x[comm.rank * n :][:n], y[comm.rank * n :][:n]


def test_no_sync_accumulates_like_unsharded_torch(comm, stage):
    case = CASES["gpt"]
    reference, reference_optimizer = build(case)
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(5):
            parts = [case.batch(3 * step + i) for i in range(3)]
            for i, part in enumerate(parts):
                (case.loss(reference(part[0]), part[1]) / 3).backward()
                x, y = own_slice(part, comm.rank, comm.size)
                if i < 2:
                    with zero.no_sync():
                        (case.loss(model(x), y) / 3).backward()
                else:
                    (case.loss(model(x), y) / 3).backward()
            for o in (reference_optimizer, optimizer):
                o.step()
                o.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_no_sync_sends_no_gradients(comm, stage):
    case = CASES["gpt"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        x, y = own_slice(case.batch(0), comm.rank, comm.size)
        with zero.no_sync():
            case.loss(model(x), y).backward()
        traffic = zero._context.world.traffic
        assert traffic.total("reduce_scatter") + traffic.total("all_reduce") == 0
        case.loss(model(x), y).backward()
        sent = traffic.total("reduce_scatter") + traffic.total("all_reduce")
        assert (sent > 0) == (comm.size > 1)


def test_backward_twice_without_zero_grad_adds_up(comm, stage):
    """Two synchronised backward passes before one step: gradients add, as in torch."""
    case = CASES["mlp"]
    reference, reference_optimizer = build(case)
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(4):
            for batch in (case.batch(2 * step), case.batch(2 * step + 1)):
                case.loss(reference(batch[0]), batch[1]).backward()
                x, y = own_slice(batch, comm.rank, comm.size)
                case.loss(model(x), y).backward()
            for o in (reference_optimizer, optimizer):
                o.step()
                o.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_accumulate_takes_the_mean_over_passes(comm, stage):
    case = CASES["gpt"]
    reference, reference_optimizer = build(case)
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(4):
            parts = [case.batch(3 * step + i) for i in range(3)]
            with zero.accumulate(3):
                for part in parts:
                    (case.loss(reference(part[0]), part[1]) / 3).backward()
                    x, y = own_slice(part, comm.rank, comm.size)
                    case.loss(model(x), y).backward()
            for o in (reference_optimizer, optimizer):
                o.step()
                o.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_accumulate_refuses_another_number_of_passes(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    with (
        pytest.raises(zerompi.ZerompiError, match="expected 2 backward passes, got 1"),
        zero.accumulate(2),
    ):
        case.loss(model(x), y).backward()
    with (
        pytest.raises(ValueError, match="count: expected a positive integer, got 0"),
        zero.accumulate(0),
    ):
        pass
    zero.close()


def test_several_forwards_before_one_backward(comm, stage):
    case = CASES["gpt"]
    reference, reference_optimizer = build(case)
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(4):
            batches = case.batch(2 * step), case.batch(2 * step + 1)
            sum(case.loss(reference(x), y) for x, y in batches).backward()
            own = [own_slice(batch, comm.rank, comm.size) for batch in batches]
            sum(case.loss(model(x), y) for x, y in own).backward()
            for o in (reference_optimizer, optimizer):
                o.step()
                o.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_evaluation_between_steps_changes_nothing(comm, stage):
    case = CASES["gpt"]
    expected, reference = unsharded_losses(case, steps=5)
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        losses = []
        for step in range(5):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            loss = case.loss(model(x), y)
            with torch.no_grad():
                model(x)  # between forward and backward, too
            loss.backward()
            model.eval()
            with torch.no_grad():
                model(x)
            with torch.inference_mode():
                model(x)
            model.train()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean(comm, loss))
        assert_same_weights(zero.full_state_dict(), reference)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_evaluation_sees_the_updated_parameters(comm, stage):
    case = CASES["mlp"]
    _, reference = unsharded_losses(case, steps=3)
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm):
        for step in range(3):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            case.loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        x, _ = case.batch(99)
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


class ChangedView(nn.Module):
    """Returns a view of something that is changed in place after the view was made."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.tanh(self.linear(x)) * 2
        view = y.view_as(y)
        y.mul_(3)
        return view


def test_what_a_module_returns_may_be_a_view_whose_base_was_changed(comm, stage):
    torch.manual_seed(5)
    reference = nn.Sequential(ChangedView(), nn.Linear(4, 4), ChangedView()).double()
    model = nn.Sequential(ChangedView(), nn.Linear(4, 4), ChangedView()).double()
    model.load_state_dict(reference.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (reference, model)]
    x = torch.randn(GLOBAL_BATCH, 4, dtype=torch.float64)
    own_x, _ = own_slice((x, x), comm.rank, comm.size)
    options = {"stage": stage, "comm": comm, "units": list(model)}
    with zerompi.partition(model, optimizers[1], **options) as zero:
        for _ in range(3):
            reference(x).square().mean().backward()
            model(own_x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_schedulers_work_on_the_param_groups(comm, stage):
    case = CASES["gpt"]
    runs = []
    for partitioned in (False, True):
        model, optimizer = build(case, "two_groups")
        zero = zerompi.partition(model, optimizer, stage=stage, comm=comm) if partitioned else None
        scheduler = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
            ],
            milestones=[3],
        )
        rates = []
        for step in range(8):
            batch = case.batch(step)
            x, y = own_slice(batch, comm.rank, comm.size) if partitioned else batch
            case.loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates.append(scheduler.get_last_lr())
        runs.append((rates, model, zero))
    assert runs[0][0] == runs[1][0]
    assert_same_weights(runs[1][2].full_state_dict(), runs[0][1])
    runs[1][2].close()


def test_gradient_penalty_by_double_backward(comm, stage):
    case = CASES["mlp"]
    reference, reference_optimizer = build(case, "sgd")
    model, optimizer = build(case, "sgd")

    def penalised(net, x, y):
        x = x.clone().requires_grad_()
        loss = case.loss(net(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 0.1 * (slope * len(x)).square().sum() / len(x)

    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(4):
            penalised(reference, *case.batch(step)).backward()
            penalised(model, *own_slice(case.batch(step), comm.rank, comm.size)).backward()
            for o in (reference_optimizer, optimizer):
                o.step()
                o.zero_grad()
        assert_same_weights(zero.full_state_dict(), reference)


def test_create_graph_of_parameter_gradients_is_refused(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zerompi.partition(model, optimizer, stage=stage, comm=comm)
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    with pytest.raises(zerompi.ZerompiError, match="create_graph=True"):
        case.loss(model(x), y).backward(create_graph=True)


def test_closure_of_the_optimizer_runs(comm, stage):
    case = CASES["mlp"]
    expected, reference = unsharded_losses(case, steps=3)
    model, optimizer = build(case)
    losses = []
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        for step in range(3):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = case.loss(model(x), y)
                loss.backward()
                return loss

            losses.append(mean(comm, optimizer.step(closure)))
        assert_same_weights(zero.full_state_dict(), reference)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_an_exception_in_forward_leaves_the_partition_usable(comm, stage):
    case = CASES["gpt"]
    expected, _ = unsharded_losses(case, steps=2)
    model, optimizer = build(case)
    fails = []

    def fail(module, args):
        if fails:
            raise KeyError("on purpose")

    model.blocks[1].register_forward_pre_hook(fail)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm):
        losses = []
        for step in range(2):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            fails.append(True)
            with pytest.raises(KeyError, match="on purpose"):
                model(x)
            fails.clear()
            loss = case.loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(mean(comm, loss))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_an_exception_in_backward_leaves_the_partition_usable(comm, stage):
    case = CASES["gpt"]
    expected, _ = unsharded_losses(case, steps=1)
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    x, y = own_slice(case.batch(0), comm.rank, comm.size)
    failing = []

    def fail(gradient):
        if failing:
            raise KeyError("on purpose")

    handle = model.blocks[1].register_forward_hook(
        lambda module, args, output: output.register_hook(fail) and None
    )
    failing.append(True)
    with pytest.raises(KeyError, match="on purpose"):
        case.loss(model(x), y).backward()
    failing.clear()
    handle.remove()
    optimizer.zero_grad()
    loss = case.loss(model(x), y)
    loss.backward()
    optimizer.step()
    assert mean(comm, loss) == pytest.approx(expected[0], rel=1e-5)
    zero.close()


def test_buffers_follow_rank_0(comm, stage):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[1].running_mean.fill_(comm.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm) as zero:
        assert not model[1].running_mean.any()  # rank 0's
        for step in range(3):
            torch.manual_seed(100 * step + comm.rank)
            model(torch.randn(GLOBAL_BATCH, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = zero.full_state_dict()
        everywhere = comm.allgather(state["1.running_mean"])
        assert all(torch.equal(mean, everywhere[0]) for mean in everywhere)
        assert torch.equal(model[1].running_mean, everywhere[0])
        assert int(state["1.num_batches_tracked"]) == 3


def test_a_model_without_an_optimizer_evaluates(comm, stage):
    case = CASES["gpt"]
    model, _ = build(case)
    x, _ = case.batch(0)
    with torch.no_grad():
        expected = model(x)
    with zerompi.partition(model, stage=stage, comm=comm), torch.no_grad():
        assert torch.equal(model(x), expected)


def test_two_models_with_an_optimizer_each(comm, stage):
    """A generator and a critic, each partitioned by itself, one loss through both."""

    def nets():
        torch.manual_seed(2)
        return nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def step(generator, critic, optimizers, x):
        critic(generator(x)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    reference, ours = nets(), nets()
    reference_optimizers, optimizers = (
        [torch.optim.SGD(net.parameters(), lr=0.1) for net in pair] for pair in (reference, ours)
    )
    zeros = [
        zerompi.partition(net, optimizer, stage=stage, comm=comm)
        for net, optimizer in zip(ours, optimizers, strict=True)
    ]
    x = torch.randn(GLOBAL_BATCH, 3, generator=torch.Generator().manual_seed(1))
    n = GLOBAL_BATCH // comm.size
    for _ in range(4):
        step(*reference, reference_optimizers, x)
        step(*ours, optimizers, x[comm.rank * n :][:n])
    for zero, net in zip(zeros, reference, strict=True):
        assert_same_weights(zero.full_state_dict(), net)
        zero.close()


def test_close_removes_every_hook_and_the_partition_refuses_use(comm, stage):
    case = CASES["mlp"]
    model, optimizer = build(case)
    zero = zerompi.partition(model, optimizer, stage=stage, comm=comm)
    zero.close()
    zero.close()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    with pytest.raises(zerompi.ZerompiError, match="closed"):
        zero.full_state_dict()
    with pytest.raises(zerompi.ZerompiError, match="closed"):
        zero.clip_grad_norm_(1.0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_somebody_keeps_stay_as_they_are(comm, stage):
    """The memory of reduced gradients is used again, but not while anybody looks at it."""
    case = CASES["mlp"]
    model, optimizer = build(case)
    with zerompi.partition(model, optimizer, stage=stage, comm=comm):
        kept, copies = [], []
        for step in range(4):
            x, y = own_slice(case.batch(step), comm.rank, comm.size)
            case.loss(model(x), y).backward()
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            looks = [lambda g: g.detach(), lambda g: g.view(-1), lambda g: g]
            kept.append([looks[step % 3](g) for g in grads if g is not None])
            copies.append([tensor.clone() for tensor in kept[-1]])
            del grads
            optimizer.step()
            optimizer.zero_grad()
        for tensors, expected in zip(kept, copies, strict=True):
            for tensor, copy in zip(tensors, expected, strict=True):
                assert torch.equal(tensor, copy)
