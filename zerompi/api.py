"""`zerompi.partition`: checks, agreement among ranks, and assembly."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from mpi4py import MPI
from torch import nn
from torch.optim import Optimizer

from zerompi import meta
from zerompi.collectives.buffer import give_back_heap
from zerompi.collectives.group import Group
from zerompi.comm_thread import CommThread
from zerompi.context import Context
from zerompi.device import holds, is_installed, space_of
from zerompi.errors import MismatchError
from zerompi.launch import check_world, first_with, raised_by_all
from zerompi.memory import HOST, Space
from zerompi.optimizer import check_optimizer
from zerompi.place import place
from zerompi.placement import STAGES, Placement
from zerompi.precision import MixedPrecision, NonFinite
from zerompi.quantize import Quantize
from zerompi.refresh import RefreshTime
from zerompi.registry import is_partitioned
from zerompi.topology import Topology
from zerompi.unit import Unit
from zerompi.units import UnitPlan, Units, plan_units
from zerompi.zero import Zero


@dataclass(frozen=True)
class _Arguments:
    """The arguments of `partition` that need checks, as given."""

    model: nn.Module
    optimizer: Optimizer | None
    stage: int
    units: Units
    mixed_precision: MixedPrecision | None
    shard_ranks: str | int
    node_cache: bool
    reshard_last: bool
    quantize: Quantize | None
    nonfinite: NonFinite
    refresh: RefreshTime
    device: torch.device | None


def partition(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    stage: int = 3,
    comm: MPI.Intracomm | None = None,
    units: Sequence[nn.Module] | Callable[[nn.Module], bool] | None = None,
    mixed_precision: MixedPrecision | None = None,
    shard_ranks: str | int = "world",
    node_cache: bool = False,
    reshard_last: bool = True,
    quantize: Quantize | None = None,
    nonfinite: NonFinite = "raise",
    refresh: RefreshTime = "eager",
    topology: Topology | None = None,
    device: torch.device | None = None,
) -> Zero:
    """Partition a model and its optimizer over the ranks of `comm`.

    Collective: every rank of `comm` calls this with a model of the same structure. Training starts
    from rank 0's parameters and buffers. Gradients are the mean over all ranks. The model and the
    optimizer are changed in place: keep using them.

    Args:
        model: any module on the host, one device of torch.cuda, or the meta device. Set `requires_grad` before.
        optimizer: a torch optimizer over the model's parameters; at stages 1 to 3 one that treats each
            element by itself (Adam, SGD, Adagrad ...).
        stage: 0 replicates, 1 partitions optimizer states, 2 also gradients, 3 also parameters.
        comm: any intra-communicator, duplicated; None is COMM_WORLD.
        units: modules whose parameters are gathered together, or a predicate on modules; None finds
            the repeated blocks, and merges small ones that follow each other. What is left belongs to
            the model itself.
        mixed_precision: dtypes of parameters, reduction and output, and the loss scale.
        shard_ranks: how many ranks share one copy: "world", "node", or a number that divides the
            number of ranks; between the copies gradients are all-reduced.
        node_cache: at stage 3 every node keeps what it has gathered until the parameters change, so
            that each unit enters a node once per step, for forward and backward, instead of twice. It costs the memory
            of all parameters once per node.
        reshard_last: at stage 3, whether what a forward uses last is freed before its backward, which uses it
            first: the root, and the last block or the last batch of small ones. True gathers it twice, as
            all else: 3 Psi in every step. False lets it stay, hidden, where its slot need not be given up,
            which takes no memory; `Report.spared` tells how many bytes that has saved in a step. (FSDP2's
            `reshard_after_forward`, by default False for the root only, keeps all of the modules it is False
            for, and costs their memory.) The forwards of all ranks must then fail alike, too: where
            one rank alone catches an exception inside its model, a unit may stay on the others only, and
            ranks that disagree about its gather raise MismatchError.
            No effect where nothing is gathered: below stage 3, or on one node that shares memory.
        quantize: send the parameters that stage 3 gathers, or gradients, or both, with 8 or 4 bits a number.
        nonfinite: what `optimizer.step()` does if a gradient of any rank is NaN or infinite: "raise"
            NonFiniteError on all ranks, which names the parameters; "skip" the step on all ranks, and log the
            names; "ignore" it, and step. What a dynamic loss scale above 1 explains is skipped.
        refresh: at stages 1 and 2, when the parameters that other ranks have stepped come, where they have to
            be sent (between nodes, or without shared memory). "eager": before `optimizer.step()` returns.
            "ahead": beside the next forward, in which each unit waits for its own; until then they read as
            NaN outside of the model's forward, as parameters do at stage 3, except inside `gathered`; and
            a tensor over a parameter's memory that the program has kept may still have the old values.
        topology: override of the discovered node layout.
        device: where parameters on the meta device get their values, if all are on it: the host, or one of
            torch.cuda; None is the host. Else they go where the others are.

    Raises:
        TypeError, ValueError: a wrong argument; on every rank, before anything is changed.
        MismatchError: the ranks' models or arguments differ.

    Rajbhandari et al., arXiv:1910.02054; for `shard_ranks`, Zhang et al., arXiv:2205.00119 (MiCS); for
    `node_cache` and `quantize`, Wang et al., arXiv:2306.10209, section 3 (ZeRO++).
    """
    if comm is not None and not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm: expected an MPI intra-communicator, got {type(comm).__name__}")
    check_world(MPI.COMM_WORLD.size)
    world = Group(comm, topology)
    arguments = _Arguments(
        model,
        optimizer,
        stage,
        units,
        mixed_precision,
        shard_ranks,
        node_cache,
        reshard_last,
        quantize,
        nonfinite,
        refresh,
        device,
    )
    try:
        plans = _agree(arguments, world)
    except BaseException:
        world.close()
        raise
    world.space = _space(model, device)
    precision = mixed_precision or MixedPrecision()
    shard_group, replica_group = _split(world, shard_ranks, stage)
    thread = CommThread(is_wanted=world.size > 1)
    on_one_node = int(shard_group.topology.is_single_node)
    is_single_node = all(world.agree("nodes of the shard groups", on_one_node))
    # The ranks of a node that keep a copy together; nobody where parameters are never gathered.
    node_group = None
    if node_cache and not is_single_node:
        node_group = shard_group.split(shard_group.topology.ranks_of_node)
    context = Context(
        STAGES[stage],
        world,
        shard_group,
        replica_group,
        node_group,
        is_single_node,
        precision,
        quantize,
        thread,
        nonfinite=nonfinite,
        refreshes_ahead=refresh == "ahead",
        reshards_last=reshard_last,
    )
    landed = meta.land(model, world.space.device)
    made = [Unit(plan, context) for plan in plans]
    place(made, context)
    for unit in made:
        for segment in unit.segments:
            segment.adopt()
    without_values = set() if landed is None else meta.initialise(model, made, landed)
    give_back_heap()  # the parameters as they were
    return Zero(model, optimizer, made, context, without_values)


def _agree(arguments: _Arguments, world: Group) -> list[UnitPlan]:
    """Check all arguments on every rank, then that all ranks have the same."""
    error: Exception | None = None
    plans: list[UnitPlan] = []
    try:
        _check(arguments, world)
        is_replicated = STAGES[arguments.stage].parameter is Placement.REPLICATE
        plans = plan_units(arguments.model, arguments.units, is_replicated=is_replicated)
    except Exception as caught:  # also what a predicate of the user's raises
        error = caught
    refusals = world.comm.allgather(None if error is None else f"{type(error).__name__}: {error}")
    first = first_with(refusals)
    if first is not None:
        told = f"rank {first} refused the arguments of partition: {refusals[first]}"
        raise raised_by_all(error or MismatchError(told), world.rank, teller=first)
    _check_equal(_description(arguments, plans), world)
    return plans


def _check(arguments: _Arguments, world: Group) -> None:
    if not isinstance(arguments.model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(arguments.model).__name__}")
    if isinstance(arguments.stage, bool) or arguments.stage not in STAGES:
        raise ValueError(f"stage: expected 0, 1, 2 or 3, got {arguments.stage!r}")
    precision = arguments.mixed_precision
    if precision is not None and not isinstance(precision, MixedPrecision):
        raise TypeError(
            f"mixed_precision: expected zerompi.MixedPrecision, got {type(precision).__name__}"
        )
    for name, parameter in arguments.model.named_parameters():
        if is_partitioned(parameter):
            raise ValueError(
                f"model: expected parameters that are not partitioned yet, got {name}, which is"
            )
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(f"model: expected {name} on cpu, cuda or meta, got {parameter.device}")
        if parameter.is_cuda and not is_installed():
            raise ValueError(
                f"model: expected CuPy for {name} on {parameter.device}, got none; install "
                "'zerompi[cuda12]' or 'zerompi[cuda13]', or CuPy for ROCm"
            )
        is_somewhere = bool(parameter.numel()) and not parameter.is_meta
        if is_somewhere and space_of(parameter) != _space(arguments.model):
            raise ValueError(
                f"model: expected all parameters in one kind of memory, got {name} on "
                f"{_place(parameter)}, others elsewhere"
            )
        if parameter.layout is not torch.strided:
            raise ValueError(f"model: expected a dense {name}, got {parameter.layout}")
        if parameter.is_meta and weakref.getweakrefs(parameter):
            raise ValueError(
                f"model: expected {name} on cpu, got meta, but something (an LSTM or GRU) refers to "
                "it weakly; make that module on the host"
            )
    for name, module in arguments.model.named_modules():
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"model: expected embeddings without max_norm, got {name}, which changes its weight "
                "in every forward on the rows that a rank has used"
            )
    place = arguments.device
    if place is not None and not (
        isinstance(place, torch.device) and place.type in ("cpu", "cuda")
    ):
        raise ValueError(f"device: expected a torch.device, cpu or cuda, or None, got {place!r}")
    _shard_size(world.topology, arguments.shard_ranks)
    for name in ("node_cache", "reshard_last"):
        value = getattr(arguments, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    if arguments.nonfinite not in get_args(NonFinite):
        raise ValueError(
            f"nonfinite: expected 'raise', 'skip' or 'ignore', got {arguments.nonfinite!r}"
        )
    if arguments.refresh not in get_args(RefreshTime):
        raise ValueError(f"refresh: expected 'eager' or 'ahead', got {arguments.refresh!r}")
    if arguments.node_cache and STAGES[arguments.stage].parameter is Placement.REPLICATE:
        raise ValueError(
            f"node_cache: expected False at stage {arguments.stage}, where parameters are not gathered, "
            "got True"
        )
    _check_quantize(arguments)
    if arguments.optimizer is not None:
        sharded = STAGES[arguments.stage].optimizer_state is Placement.SHARD
        check_optimizer(arguments.optimizer, arguments.model, sharded=sharded)


def _check_quantize(arguments: _Arguments) -> None:
    quantize, stage = arguments.quantize, arguments.stage
    if quantize is None:
        return
    if not isinstance(quantize, Quantize):
        raise TypeError(f"quantize: expected zerompi.Quantize, got {type(quantize).__name__}")
    if STAGES[stage].optimizer_state is Placement.REPLICATE:
        raise ValueError(
            f"quantize: expected None at stage {stage}, where gradients are all-reduced as they are, "
            f"got {quantize}"
        )
    if quantize.weights is not None and STAGES[stage].parameter is Placement.REPLICATE:
        raise ValueError(
            f"quantize: expected weights=None at stage {stage}, where parameters are not gathered, got "
            f"{quantize.weights!r}"
        )


def _space(model: nn.Module, device: torch.device | None = None) -> Space:
    """Where the first parameter lies: there the buffers will be. `device`: where there is none."""
    first = next((p for p in model.parameters() if not p.is_meta and p.numel()), None)
    if first is not None:
        return space_of(first)
    return HOST if device is None else Space(device, is_device=device.type != "cpu")


def _place(parameter: nn.Parameter) -> str:
    if not parameter.is_cuda and holds(parameter):
        return "cpu, over memory of a device"
    return parameter.device.type


def _shard_size(topology: Topology, shard_ranks: Any) -> int:
    size = topology.size
    if shard_ranks == "world":
        return size
    if shard_ranks == "node":
        sizes = {topology.node_of.count(node) for node in range(topology.num_nodes)}
        if len(sizes) > 1:
            raise ValueError(f"shard_ranks: expected nodes of one size for 'node', got {topology}")
        return sizes.pop()
    if isinstance(shard_ranks, bool) or not isinstance(shard_ranks, int):
        raise ValueError(f"shard_ranks: expected 'world', 'node' or a number, got {shard_ranks!r}")
    if shard_ranks < 1 or size % shard_ranks:
        raise ValueError(f"shard_ranks: expected a divisor of {size} ranks, got {shard_ranks}")
    return shard_ranks


def _split(world: Group, shard_ranks: str | int, stage: int) -> tuple[Group, Group | None]:
    """The group that holds one copy together, and the one that joins equal shards of the copies."""
    size = _shard_size(world.topology, shard_ranks)
    if size == world.size or STAGES[stage].optimizer_state is Placement.REPLICATE:
        return world, None
    topology = world.topology
    by_node = sorted(range(world.size), key=lambda rank: (topology.node_of[rank], rank))
    copies = [by_node[start : start + size] for start in range(0, world.size, size)]
    replicas = [list(ranks) for ranks in zip(*copies, strict=True)]
    return world.split(copies), world.split(replicas)


def _description(arguments: _Arguments, plans: Sequence[UnitPlan]) -> list[str]:
    lines = [
        f"stage {arguments.stage}, shard_ranks {arguments.shard_ranks}, "
        f"node_cache {arguments.node_cache}, reshard_last {arguments.reshard_last}, "
        f"nonfinite {arguments.nonfinite}, "
        f"refresh {arguments.refresh}, {arguments.mixed_precision}"
        f", quantize {arguments.quantize}"
    ]
    for plan in plans:
        lines.append(f"unit {plan.name or '(root)'}")
        lines += [
            f"parameter {name}: {p.dtype}, shape {tuple(p.shape)}, requires_grad {p.requires_grad}, "
            f"on {_place(p)}"
            for name, p in plan.parameters
        ]
    lines += [
        f"buffer {name}: {b.dtype}, shape {tuple(b.shape)}"
        for name, b in arguments.model.named_buffers()
    ]
    if arguments.optimizer is not None:
        names = {id(p): name for plan in plans for name, p in plan.parameters}
        for group in arguments.optimizer.param_groups:
            members = ", ".join(names[id(p)] for p in group["params"])
            lines.append(f"{type(arguments.optimizer).__name__} group of {members}")
    return lines


def _check_equal(lines: list[str], world: Group) -> None:
    """Raise MismatchError on all ranks, naming the first difference from rank 0, if any rank differs."""
    reference: list[str] = world.comm.bcast(lines, root=0)
    length = max(len(lines), len(reference))
    padded = [[*part, *["nothing"] * (length - len(part))] for part in (reference, lines)]
    difference = next(((a, b) for a, b in zip(*padded, strict=True) if a != b), None)
    differences = world.comm.allgather(difference)
    for rank, found in enumerate(differences):
        if found is not None:
            error = MismatchError(
                f"ranks disagree on what to partition: rank 0 has {found[0]}; "
                f"rank {rank} has {found[1]}"
            )
            raise raised_by_all(error, world.rank)
