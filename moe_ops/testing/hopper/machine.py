"""What a program of a warp-specialised kernel runs on: roles that take turns, barriers, copies and wgmma in flight.

A role is a thread of Python, and one of them runs at a time. Which one, and when a copy that is on its way arrives, is
drawn from a seed, so that a run can be had again and other orders tried. What a program can know of only by a wait ends
with that wait and not before: wgmma, stores, copies of cp.async. What TMA loads is there when its barrier's phase is
over. Found are

    race        memory is written while a copy or wgmma reads it or another copy writes it, or read while one writes it
    proxy       wgmma or TMA read what was written in another way, without a fence
    wait        a result of wgmma is used before the wait for it
    barrier     more arrivals in a phase than the barrier counts
    deadlock    all roles wait, and nothing is on its way
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class HopperError(AssertionError):
    """A fault in a kernel.

    Attributes:
        fault: "race", "proxy", "wait", "barrier", "deadlock" or "out of bounds".
    """

    def __init__(self, fault: str, what: str) -> None:
        super().__init__(f"{fault}: {what}")
        self.fault = fault


class _Ended(BaseException):
    """Ends a role when another one has failed."""


class Memory:
    """An allocation of shared memory, with what is going on in each of its elements."""

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        # NaN, or -1: a result that depends on what nobody wrote shows it.
        count = torch.Size(shape).numel()
        self.data = torch.full((count * dtype.itemsize,), 255, dtype=torch.uint8).view(dtype)
        self.reading, self.writing = torch.zeros(count, dtype=torch.int16), torch.zeros(count, dtype=torch.int16)
        # Written other than by TMA since the last fence.
        self.dirty = torch.zeros(count, dtype=torch.bool)


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0
        # What is so when the phase is over.
        self.releases: list[Callable[[], object]] = []

    def init(self, count: int) -> None:
        """So many arrivals in a phase."""
        if self.count:
            raise HopperError("barrier", "a barrier is made once more, and was not invalidated")
        self.count = self.left = count

    def invalidate(self) -> None:
        """Its memory may be another barrier's."""
        if self.left != self.count or self.bytes:
            raise HopperError("barrier", "a barrier is invalidated in the middle of a phase")
        self.count = self.left = self.phase = 0

    def arrive(self, count: int = 1) -> None:
        """Arrivals."""
        if self.count == 0 or count > self.left:
            raise HopperError("barrier", f"{count} arrivals where {self.left} of {self.count} are to come in the phase")
        self.left -= count
        self._complete()

    def transact(self, count: int) -> None:
        """Bytes announced, or (negative) arrived."""
        self.bytes += count
        self._complete()

    def passed(self, parity: int) -> bool:
        """Whether a wait for this parity returns: the phase that runs has the other one."""
        return self.phase & 1 != parity & 1

    def _complete(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase + 1
            for release in self.releases:
                release()
            self.releases = []


@dataclass(eq=False)
class Flight:
    """Something that goes on behind a role's back: a copy, a store, wgmma.

    Attributes:
        kind: "load", "copy", "store" or "wgmma".
        finish: what its end does.
        done: it has ended.
    """

    kind: str
    finish: Callable[[], None]
    done: bool = False


def _held() -> threading.Lock:
    """A lock that the first to release gives to whoever waits for it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class Role:
    """A partition of a program's warps."""

    name: str
    num_warps: int
    baton: threading.Lock = field(default_factory=_held)
    ready: Callable[[], bool] | None = None
    waits_for: str = ""
    finished: bool = False
    # What it has begun and is not known to have ended, in order; copies of no group yet, and groups of them.
    flights: list[Flight] = field(default_factory=list)
    ungrouped: list[Flight] = field(default_factory=list)
    groups: list[list[Flight]] = field(default_factory=list)


class Machine:
    """One program.

    Args:
        program: its number.
        programs: how many there are.
        seed: of the order in which things happen.
        num_warps: with which it starts.
    """

    def __init__(self, program: int, programs: int, seed: int, num_warps: int) -> None:
        self.program, self.programs = program, programs
        self._random = random.Random(f"{seed} {program}")
        self.memories: list[Memory] = []
        # What may end at any time.
        self._loose: list[Flight] = []
        self._failure: BaseException | None = None
        self._over = _held()
        self._named: dict[int, Barrier] = {}
        # It begins with one role, which goes on when others that ran side by side are over.
        self._start = self.role = Role("start", num_warps)
        self._roles = [self.role]

    def run(self, tasks: list[tuple[str, int, Callable[[], object]]]) -> None:
        """Runs roles side by side to their ends: (name, warps, what to do)."""
        self._roles, self._over = [Role(name, num_warps) for name, num_warps, _ in tasks], _held()
        bodies = [task for _, _, task in tasks]
        threads = [
            threading.Thread(target=self._live, args=pair, daemon=True)
            for pair in zip(self._roles, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._next().baton.release()
        with self._over:
            pass
        for role in self._roles:
            role.baton.release()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        self._start.flights += (flight for role in self._roles for flight in role.flights if not flight.done)
        self.role, self._roles = self._start, [self._start]

    def _live(self, role: Role, body: Callable[[], object]) -> None:
        role.baton.acquire()
        try:
            if self._failure is None:
                body()
        except _Ended:
            pass
        except BaseException as error:  # handed on to whoever launched the kernel
            self._failure = self._failure or error
        role.finished = True
        if self._failure is None and not all(other.finished for other in self._roles):
            try:
                self._next().baton.release()
                return
            except HopperError as error:
                self._failure = error
        if self._over.locked():
            self._over.release()

    def _next(self) -> Role:
        """Lets time pass, and says whose turn it is."""
        while True:
            for flight in list(self._loose):
                if not flight.done and self._random.random() < 0.4:
                    self._end(flight)
            able = [role for role in self._roles if not role.finished and (role.ready is None or role.ready())]
            if able:
                self.role = self._random.choice(able)
                return self.role
            if not self._loose:
                waiting = "; ".join(f"{role.name} for {role.waits_for}" for role in self._roles if not role.finished)
                raise HopperError("deadlock", f"program {self.program}: {waiting}")
            self._end(self._random.choice(self._loose))

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """The role that runs waits until `ready`."""
        role = self.role
        role.ready, role.waits_for = ready, what
        self._switch(role)
        role.ready = None

    def pause(self) -> None:
        """A moment at which others may run, or something arrive."""
        if self._random.random() < 0.3:
            self._switch(self.role)

    def _switch(self, role: Role) -> None:
        following = self._next()
        if following is not role:
            following.baton.release()
            role.baton.acquire()
            if self._failure is not None:
                raise _Ended

    def finish(self) -> None:
        """Ends what is still on its way when the program ends."""
        for role in self._roles:
            for flight in role.flights:
                self._end(flight)

    def launch(self, kind: str, finish: Callable[[], None], *, loose: bool = False) -> Flight:
        """Something begins; loose: it ends at some time by itself, and not only when its role waits for it."""
        flight, role = Flight(kind, finish), self.role
        role.flights = [other for other in role.flights if not other.done] + [flight]
        if kind == "copy":
            role.ungrouped.append(flight)
        if loose:
            self._loose.append(flight)
        return flight

    def _end(self, flight: Flight) -> None:
        """It ends; of cp.async, and of wgmma, what the same role began before it has ended then."""
        if flight.done:
            return
        before: list[Flight] = []
        if flight.kind in ("copy", "wgmma"):
            for role in (self.role, *self._roles):
                if flight in role.flights:
                    before = role.flights[: role.flights.index(flight)]
        for each in (*(other for other in before if other.kind == flight.kind and not other.done), flight):
            each.done = True
            if each in self._loose:
                self._loose.remove(each)
            each.finish()

    def commit(self) -> None:
        """A group: the role's copies since the last one."""
        self.role.groups.append(self.role.ungrouped)
        self.role.ungrouped = []

    def wait_groups(self, left: int) -> None:
        """Ends all groups of the role but the last `left`."""
        role = self.role
        while len(role.groups) > left:
            for flight in role.groups.pop(0):
                self._end(flight)

    def wait_flights(self, kind: str, left: int = 0) -> None:
        """Ends all of the role's flights of a kind but the last `left`."""
        flights = [flight for flight in self.role.flights if flight.kind == kind]
        for flight in flights[: max(0, len(flights) - left)]:
            self._end(flight)

    def fence(self) -> None:
        """What has been written is there for wgmma and TMA."""
        for memory in self.memories:
            memory.dirty.zero_()

    def named_barrier(self, number: int, threads: int, wait: bool) -> None:
        """bar.sync, or bar.arrive."""
        barrier = self._named.setdefault(number, Barrier())
        if barrier.count == 0:
            barrier.init(threads)
        phase = barrier.phase
        barrier.arrive(32 * self.role.num_warps)
        if wait:
            self.wait(lambda: barrier.phase > phase, f"named barrier {number}")


def begin_read(views: dict[str, Tensor], what: str, proxy: bool) -> None:
    """Something begins to read memory; proxy: as wgmma and TMA do."""
    if views["writing"].any():
        raise HopperError("race", f"{what} reads what a copy on its way is writing")
    if proxy and views["dirty"].any():
        raise HopperError("proxy", f"{what} reads what was written without a fence since")
    views["reading"] += 1


def begin_write(views: dict[str, Tensor], what: str) -> None:
    """Something begins to write memory."""
    if views["reading"].any():
        raise HopperError("race", f"{what} overwrites what is being read")
    if views["writing"].any():
        raise HopperError("race", f"{what} writes what a copy on its way is writing")
    views["writing"] += 1
