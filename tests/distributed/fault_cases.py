"""What each rank runs when another has died, or does not come."""

import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist

from moe_ops.distributed import ExpertParallel
from tests.distributed.calls import Cases, check, draw, of_experts, of_rank

CASES = Cases()
# Seconds that a group waits for a rank that is gone or sleeps, and that this one sleeps.
FAULT_TIMEOUT, LATE = 5, 8
# Exit statuses of a rank that got an error, the right result, or another.
RAISED, RETURNED, WRONG = 3, 4, 5


@contextlib.contextmanager
def _fails(reason, seconds):
    """What is in the block raises an error of ours that names this reason, within so many seconds."""
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        assert "failed on rank" in str(error) and reason in str(error), error
    else:
        raise AssertionError("no error")
    assert time.monotonic() - start < seconds


@CASES
def wrong_on_one_rank(me):
    """Without the check the others find out by the group's timeout, and no later; the message says what it can be."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    args = draw(me, [3] * me.size)
    for way in ("gather", "alltoall"):
        ep = ExpertParallel(group, 5, way=way)
        positional, named = of_experts(of_rank(args, [3] * me.size, me.rank), ep.local_experts)
        if me.rank == 0:
            continue
        with _fails("slower than the group's timeout", 10):
            ep.fused_moe(*positional, **named)
        break
    # The group is broken, which is what the case is about; the default one is not.
    me.agreed("wrong_on_one_rank done", True)


@CASES
def dead_rank(me):
    """A rank that is gone ends the others with an error; the last case of its run."""
    args = draw(me, [3] * me.size)
    if me.rank == 0:
        open(f"{me.folder}/dead_rank.0", "w").close()
        os._exit(0)
    with _fails("has died", 25):
        check(me, args, [3] * me.size)
    open(f"{me.folder}/dead_rank.{me.rank}", "w").close()
    os._exit(0)


@CASES
def slow_rank(me):
    """A rank that comes after the group's timeout finds no group any more: all ranks raise, and none waits for ever."""
    timeout = 3
    ep = ExpertParallel(dist.new_group(timeout=datetime.timedelta(seconds=timeout)), 5, way="alltoall")
    positional, named = of_experts(of_rank(draw(me, [3] * me.size), [3] * me.size, me.rank), ep.local_experts)
    ep.fused_moe(*positional, **named)
    if me.rank == 0:
        time.sleep(timeout + 1)
    with _fails("slower than the group's timeout", 10):
        ep.fused_moe(*positional, **named)
    me.agreed("slow_rank done", True)


def _outlive(me, late):
    """One more call, to which rank 0 comes too late or (None) never; what becomes of each is seen from outside."""
    counts = [3] * me.size
    args = draw(me, counts)
    check(me, args, counts, way="alltoall")  # compiles
    ep = ExpertParallel(dist.new_group(timeout=datetime.timedelta(seconds=FAULT_TIMEOUT)), 5, way="alltoall")
    positional, named = of_experts(of_rank(args, counts, me.rank), ep.local_experts)
    expected = ep.fused_moe(*positional, **named)
    torch.cuda.synchronize()
    me.agreed("the last call begins", True)
    print("the last call begins", time.time(), flush=True)
    if me.rank == 0:
        if late is None:
            os._exit(0)
        time.sleep(late)
        print("rank 0 comes", flush=True)
    try:
        right = torch.equal(ep.fused_moe(*positional, **named), expected)
    except RuntimeError as error:
        print(f"RuntimeError: {error}", flush=True)
        os._exit(RAISED)
    os._exit(RETURNED if right else WRONG)


@CASES
def dead_rank_nccl(me):
    """Rank 0 goes; the other alone has a group of a short timeout."""
    _outlive(me, None)


@CASES
def slow_rank_nccl(me):
    """Rank 0 comes when the timeout of the other is over."""
    _outlive(me, LATE)
