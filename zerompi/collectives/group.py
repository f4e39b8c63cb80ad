"""Groups: the ranks that communicate, their buffers, counters and agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NoReturn, cast

import torch
from mpi4py import MPI
from torch import Tensor

from zerompi.activity import Wait
from zerompi.collectives import choice
from zerompi.collectives.buffer import allocate
from zerompi.collectives.disagreement import disagreement
from zerompi.collectives.headers import Agreement, FenceHeaders, Headers, MessageHeaders
from zerompi.collectives.node import Node
from zerompi.collectives.shared import SharedNode, open_node
from zerompi.collectives.transport import Transport, choose
from zerompi.collectives.waiting import has_spare_cores, nothing_left, wait_all
from zerompi.errors import MismatchError, ZerompiError
from zerompi.launch import first_with, raised_by_all
from zerompi.memory import HOST, DeviceArray, Flat
from zerompi.topology import Topology
from zerompi.traffic import INTER_GROUP, INTER_NODE, INTRA_NODE, Traffic
from zerompi.watchdog import Watch, waiting

Algorithm = Literal["flat", "hierarchical"]
Messages = Sequence[tuple[int, Flat]]

_MAX_MESSAGE_NBYTES = 1 << 30  # well below 2^31, where some MPI libraries' counts end
_PEERS_IN_FLIGHT = 32
_HEADER_NBYTES = 16
_WORD_NBYTES = 8


class Group:
    """Ranks that communicate with each other, on communicators of their own.

    Collective over `comm`: construction, `split` and `close`.

    Args:
        comm: an intra-communicator, duplicated; None is COMM_WORLD.
        topology: the node layout of its ranks; None discovers it.
        algorithm: "flat" or "hierarchical"; None is hierarchical where there are several nodes and
            at least one has several ranks, or several groups of nodes and at least one has several nodes; but
            flat for blocks so small that it was measured to be faster (`choice.py`).

    Attributes:
        comm: the private duplicate.
        headers: how they exchange headers; None for one rank.
        node: the memory that they share; None where ranks of a node reach each other by messages.
        node_comm: the ranks of this rank's node.
        inter_node_comm: the ranks with this rank's position on all nodes.
        traffic: bytes that this rank has sent; shared with the groups made by `split`.
        space: where `allocate` takes memory; handed on to the groups made by `split`.
        polls: whether a rank that waits may keep its core.

    Raises:
        TypeError, ValueError: `comm` is no intra-communicator, `topology` has another number of ranks,
            `algorithm` is unknown, or the environment names no table (`choice.py`).
        MismatchError: ranks disagree on the topology or the algorithm, or another rank's are wrong.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        topology: Topology | None = None,
        *,
        algorithm: Algorithm | None = None,
    ) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm: expected an MPI intra-communicator, got {type(comm).__name__}")
        with waiting("a new group"):
            own: MPI.Intracomm = comm.Dup()
            try:
                _agree_on_arguments(own, topology, algorithm)
            except BaseException:
                own.Free()
                raise
            self._watch = Watch(own) if own.size > 1 else None
        self._wait = Wait("a new group", tuple(range(own.size)), self._watch)
        try:
            self._set(own, topology, algorithm, Traffic(), polls=None)
        except ValueError:  # of a table of algorithms, on all ranks
            self.close()
            raise

    def _set(
        self,
        comm: MPI.Intracomm,
        topology: Topology | None,
        algorithm: Algorithm | None,
        traffic: Traffic,
        *,
        polls: bool | None,
    ) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.topology = Topology(comm) if topology is None else topology
        layout = self.topology
        node, position = layout.node_of[self.rank], layout.local_rank_of[self.rank]
        self.node_comm = cast("MPI.Intracomm", comm.Split(node, self.rank))
        self.inter_node_comm = comm.Split(position, self.rank)
        is_free = algorithm is None
        if algorithm is None:
            deep = 1 < layout.num_nodes < layout.size or 1 < layout.num_groups < layout.num_nodes
            algorithm = "hierarchical" if deep else "flat"
        self.algorithm: Algorithm = algorithm
        self.traffic = traffic
        self.space = HOST
        self._transport: Transport | None = None
        self._levels = [self._level(peer) for peer in range(self.size)]
        # All ranks of a node wait at once: a group made by split has the answer of the whole.
        self.polls = has_spare_cores(self.node_comm) if polls is None else polls
        self.node: SharedNode | None = None
        if layout.num_nodes < layout.size and (layout.is_single_node or algorithm != "flat"):
            self.node = open_node(comm, self.node_comm, self._progress, self._wait)
        self.headers: Headers | None = None
        if self.node is not None and layout.is_single_node:
            self.headers = FenceHeaders(self.node.fence)
        elif self.size > 1:
            self.headers = MessageHeaders(self)
        self._flat_limits: dict[str, int] = {}
        if is_free and algorithm == "hierarchical":
            shared = self.node is not None
            self._flat_limits = choice.flat_limits(comm, layout, shared_memory=shared)

    def is_flat(self, collective: str, block_nbytes: int, *, has_node: bool) -> bool:
        """Whether every rank sends to every other itself.

        Args:
            collective: a name of `choice.COLLECTIVES`.
            block_nbytes: of the largest block.
            has_node: whether the ranks of a node can read each other's blocks.
        """
        if self.algorithm == "flat":
            return not has_node
        return block_nbytes <= self._flat_limits.get(collective, 0)

    def _level(self, peer: int) -> str:
        layout = self.topology
        if layout.same_node(self.rank, peer):
            return INTRA_NODE
        same_group = layout.group_of(self.rank) == layout.group_of(peer)
        return INTER_NODE if same_group else INTER_GROUP

    def split(self, ranks_of_each: Sequence[Sequence[int]]) -> Group:
        """The group of this rank among disjoint groups that cover all ranks. Collective.

        Ranks of the new group are numbered in the order in which their list has them. The algorithm
        is chosen anew, as for `algorithm=None`.

        Raises:
            ValueError: the lists do not hold each rank once; on every rank.
            MismatchError: ranks have different lists.
        """
        self.agree(f"split into {[list(ranks) for ranks in ranks_of_each]}")
        if sorted(rank for ranks in ranks_of_each for rank in ranks) != list(range(self.size)):
            raise ValueError(
                f"ranks_of_each: expected each of {self.size} ranks once, got {ranks_of_each}"
            )
        color = next(i for i, ranks in enumerate(ranks_of_each) if self.rank in ranks)
        ranks = ranks_of_each[color]
        comm = cast("MPI.Intracomm", self.comm.Split(color, ranks.index(self.rank)))
        group = Group.__new__(Group)
        group._watch = None  # the whole's goes on
        members = self._wait.members or ()
        group._wait = Wait("a split", tuple(members[rank] for rank in ranks), self._watch)
        group._set(comm, self.topology.restrict(ranks), None, self.traffic, polls=self.polls)
        group.space = self.space
        return group

    # -- memory --------------------------------------------------------------------------------

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory that this group will communicate: `numel` elements, 1-D, contents undefined.

        Every rank of the group allocates in the same order.
        """
        return allocate(numel, dtype, self.space)

    @property
    def window_node(self) -> SharedNode | None:
        """The memory that the ranks of the node share, if this group's buffers lie in memory of that kind."""
        return None if self.space.is_device else self.node

    def node_of(self, buffer: Flat) -> Node | None:
        """What passes blocks of such a buffer on inside the node; None: messages do. Collective."""
        return self.transport().node if isinstance(buffer, DeviceArray) else self.node

    def transport(self) -> Transport:
        """How buffers on devices are sent. Collective when it is called first."""
        if self._transport is None:
            self._transport = choose(self)
        return self._transport

    # -- agreement -----------------------------------------------------------------------------

    def agree(self, signature: str | None, flags: int = 0) -> tuple[int, ...]:
        """Make sure that all ranks are about to do the same; exchange 64 bits beside it. Collective.

        Args:
            signature: what comes next on this rank, as a text for people; None goes along with whatever
                the others do.
            flags: 64 bits for the other ranks.

        Returns:
            The flags of all ranks.

        Raises:
            MismatchError: ranks have different signatures; raised on all, naming all.
            ZerompiError: the group is closed.
        """
        return self.start_agreement(signature, flags).finish()

    def start_agreement(self, signature: str | None, flags: int = 0) -> Agreement:
        """The same in two steps: what this returns may `begin`, has to `finish`, and others may lie between.

        All ranks begin the agreements of a group in one order, and finish them in that order.
        """
        self._check_open()
        return Agreement(self, signature, flags)

    def note_agreement(self, what: str) -> None:
        """An agreement is being finished: count its bytes, and tell the watchdog what comes next."""
        self._wait.what = what
        self._wait.number += 1
        self._count_to_all(_HEADER_NBYTES)

    def gather_words(self, word: int) -> list[int]:
        """64 bits of each rank, where all ranks have agreed to exchange them. Collective, unchecked."""
        if self.headers is None:
            return [word]
        self._count_to_all(_WORD_NBYTES)
        return self.headers.gather_words(word)

    def _count_to_all(self, nbytes: int) -> None:
        for peer, level in enumerate(self._levels):
            if peer != self.rank:
                self.traffic.add("header", level, nbytes)

    # -- data ----------------------------------------------------------------------------------

    def exchange(self, sends: Messages, recvs: Messages, label: str) -> None:
        """Send and receive, and wait for it. Collective by contract.

        Args: see `start_exchange`.
        """
        self.start_exchange(sends, recvs, label)()

    def start_exchange(self, sends: Messages, recvs: Messages, label: str) -> Callable[[], None]:
        """Send and receive; the one place where array data moves. Collective by contract.

        Several may be under way, if all ranks start them in the same order, and finish them in the
        same order.

        Args:
            sends: (rank, flat memory of one kind) in the order in which the receiver lists them.
            recvs: (rank, flat memory of the same kind), each overwritten; of the sender's size.
            label: under which the bytes are counted.

        Returns:
            What waits until all has been sent and received; the caller keeps the memory until then.
        """
        self._check_open()
        if not sends and not recvs:
            return nothing_left
        if isinstance((sends or recvs)[0][1], DeviceArray):
            return self.transport().mail.start_exchange(sends, recvs, label)
        return self.start_messages(sends, recvs, label)

    def start_messages(self, sends: Messages, recvs: Messages, label: str) -> Callable[[], None]:
        """The same for memory that the MPI library can read and write.

        Messages of the second wave, and of those that follow, start when the one before is over.
        """
        incoming = self._waves(recvs, is_send=False)
        outgoing = self._waves(sends, is_send=True)

        def post(wave: int) -> list[MPI.Request]:
            requests = [
                self.comm.Irecv([part, MPI.BYTE], peer)
                for peer, flat in incoming.get(wave, ())
                for part in _parts(flat)
            ]
            for peer, flat in outgoing.get(wave, ()):
                for part in _parts(flat):
                    requests.append(self.comm.Isend([part, MPI.BYTE], peer))
                    self.count_sent(label, peer, part.nbytes)
            return requests

        waves = sorted({*incoming, *outgoing})
        first = post(waves[0]) if waves else []

        def finish() -> None:
            self.wait_for(first)
            for wave in waves[1:]:
                self.wait_for(post(wave))

        return finish

    def wait_for(self, requests: Sequence[MPI.Request]) -> None:
        """Wait until messages have been sent and received."""
        with self._wait:
            wait_all(requests, polls=self.polls)

    def _waves(self, messages: Messages, *, is_send: bool) -> dict[int, list[tuple[int, Flat]]]:
        """Messages by wave: those at ring distance 1 to 32 first, nearest first, then the next 32."""
        waves: dict[int, list[tuple[int, Flat]]] = {}
        for peer, flat in self.ring_order(messages, is_send=is_send):
            if flat.numel():
                wave = (self._distance(peer, is_send) - 1) // _PEERS_IN_FLIGHT
                waves.setdefault(wave, []).append((peer, flat))
        return waves

    def ring_order(self, messages: Messages, *, is_send: bool) -> Messages:
        """Messages by ring distance of the peer, nearest first; the order in which both sides have them."""
        return sorted(messages, key=lambda message: self._distance(message[0], is_send))

    def _distance(self, peer: int, is_send: bool) -> int:
        return (peer - self.rank if is_send else self.rank - peer) % self.size

    def fence(self) -> None:
        """Wait for the other ranks of this node, if they share memory. Collective over the node."""
        if self.node is not None:
            self.node.fence.cross()

    def count_sent(self, label: str, peer: int, nbytes: int) -> None:
        """Count bytes that this rank sends to another one."""
        self.traffic.add(label, self._levels[peer], nbytes)

    def count_shared(self, label: str, nbytes: int) -> None:
        """Count bytes that this rank has read from the memory of others on its node."""
        self.traffic.add(label, INTRA_NODE, nbytes)

    def _progress(self) -> None:
        """Let MPI work on messages to other nodes while this rank sleeps."""
        if not self.topology.is_single_node:
            self.comm.Iprobe()

    # -- end -----------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether `close` has been called."""
        return bool(self.comm == MPI.COMM_NULL)

    def _check_open(self) -> None:
        if self.is_closed:
            raise ZerompiError("this group is closed")

    def close(self) -> None:
        """Free the communicators. Collective; a second call does nothing."""
        if not self.is_closed and not MPI.Is_finalized():
            if self._transport is not None and self._transport.node is not None:
                self._transport.node.close()
            if self.node is not None:
                self.node.close()
            if self.headers is not None:
                self.headers.close()
            if self._watch is not None:
                self._watch.close()
            for comm in (self.inter_node_comm, self.node_comm, self.comm):
                comm.Free()

    def __reduce__(self) -> NoReturn:
        raise ZerompiError(
            "a partitioned model and its groups cannot be copied or pickled: copy before "
            "zerompi.partition, or take zero.full_state_dict()"
        )

    def __repr__(self) -> str:
        return f"Group(rank {self.rank} of {self.topology}, {self.algorithm})"


def _agree_on_arguments(
    comm: MPI.Intracomm, topology: Topology | None, algorithm: str | None
) -> None:
    """Raise on all ranks if one has wrong arguments, or others than rank 0."""
    error = None
    if topology is not None and topology.size != comm.size:
        error = f"topology: expected one of {comm.size} ranks, got one of {topology.size}"
    elif algorithm not in (None, "flat", "hierarchical"):
        error = f"algorithm: expected 'flat', 'hierarchical' or None, got {algorithm!r}"
    layout = "discovered"
    if topology is not None:
        layout = f"of ranks on nodes {topology.node_of}"
        if topology.num_groups > 1:
            layout += f" in groups {topology.group_of_node}"
    answers = comm.allgather((error, f"topology {layout}, algorithm {algorithm}"))
    first = first_with([refusal for refusal, _ in answers])
    if first is not None:
        told = f"rank {first} refused the arguments of Group: {answers[first][0]}"
        refused = MismatchError(told) if error is None else ValueError(error)
        raise raised_by_all(refused, comm.rank, teller=first)
    if len({text for _, text in answers}) > 1:
        raise disagreement(comm, answers[comm.rank][1])


def _parts(flat: Flat) -> list[MPI.buffer]:
    data = MPI.buffer.fromaddress(flat.data_ptr(), flat.nbytes)
    if data.nbytes <= _MAX_MESSAGE_NBYTES:
        return [data]
    starts = range(0, data.nbytes, _MAX_MESSAGE_NBYTES)
    return [data[start : start + _MAX_MESSAGE_NBYTES] for start in starts]
