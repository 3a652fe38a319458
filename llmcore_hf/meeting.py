"""All processes of a job meet before the first collective, within a bound, and find out that they belong to one job.

Left to themselves, torch and accelerate wait half an hour for a process that nobody started, without a word, and a job of
two launchers that were asked for different numbers of processes trains with a global batch that nobody asked for.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

from llmcore_hf.distributed import asked_for, is_main_process, program, whole_number, world_size
from llmcore_hf.errors import ConfigError, UserError

JOIN_TIMEOUT = "LLMCORE_HF_JOIN_TIMEOUT"
DEFAULT_TIMEOUT = 300  # seconds; machines of a cluster start minutes apart
LINGER = 10  # seconds that process 0 stays for the others to read why the job ends
GUIDE = "docs/multinode.md"

_met: list[Any] = []  # the store, kept: process 0 may be the one that serves it


def join_timeout() -> int:
    """Seconds to wait for the other processes."""
    return whole_number(JOIN_TIMEOUT, DEFAULT_TIMEOUT)


def meet() -> None:
    """Wait for all processes that the launcher promised, and compare what they were asked for. Only the first call does.

    Raises:
        ConfigError: the launcher's variables are incomplete, or the processes were started for different jobs.
        UserError: not all of them came in time.
    """
    if world_size() == 1 or _met:
        return
    host, port, rank = _place()
    deadline = time.monotonic() + join_timeout()
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it has started all processes of this machine
    if is_main_process() or not under_torchrun:
        others = world_size() - 1
        say(f"waiting for {others} other process{'es' * (others > 1)} at {host}:{port}, {join_timeout()} s at most")
    from torch.distributed import DistError

    try:
        store = _open_store(host, port, serve=rank == 0 and not under_torchrun, deadline=deadline)
        notes = _roll_call(store, rank, deadline)
        problem = disagreement(notes)
        if problem:
            _linger(store, rank)
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"lost process 0 at {host}:{port}; its output says why it ended ({reason})") from None
    if problem:
        raise ConfigError([problem])
    _met.append(store)


def _place() -> tuple[str, int, int]:
    """Where the processes meet, and which of them this is."""
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise ConfigError(
            [
                f"WORLD_SIZE is {world_size()} without {', '.join(missing)}: start the processes with "
                f"`{program()} launch`, `accelerate launch` or torchrun, or unset WORLD_SIZE to run in one process"
            ]
        )
    rank, port = whole_number("RANK", 0), whole_number("MASTER_PORT", 0)
    if rank >= world_size():
        raise ConfigError([f"RANK is {rank}, but of {world_size()} processes the last is {world_size() - 1}"])
    if not 0 < port < 2**16:
        raise ConfigError([f"MASTER_PORT is {port}; a port is a number from 1 to 65535"])
    return os.environ["MASTER_ADDR"], port, rank


def _open_store(host: str, port: int, *, serve: bool, deadline: float) -> Any:
    """The store that all processes of the job share; torch and accelerate use the same one afterwards."""
    from torch.distributed import DistNetworkError, PrefixStore, TCPStore

    if not serve:
        wait_for_server(host, port, deadline)
    left = timedelta(seconds=max(deadline - time.monotonic(), 1))
    try:
        store = TCPStore(host, port, None, serve, left, wait_for_workers=False, multi_tenant=True)
    except DistNetworkError as error:
        if not serve:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"process 0 cannot listen at {host}:{port}: {reason}. Choose another MASTER_PORT") from None
    return PrefixStore(f"llmcore/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def wait_for_server(host: str, port: int, deadline: float) -> None:
    """Wait until somebody listens there. torch would do so as well, with a stack trace for every try.

    Raises:
        UserError: nobody does at the deadline.
    """
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"nobody listens at {host}:{port} ({error.strerror or error}): process 0 was not started, or this "
                    f"machine cannot reach it. Check the address, the port and the firewall, see {GUIDE}; "
                    f"{JOIN_TIMEOUT} or `launch --join_timeout` sets how long to wait"
                ) from None
        time.sleep(0.2)


def _roll_call(store: Any, rank: int, deadline: float) -> dict[int, dict[str, int | None]]:
    """What every process knows about the job, by rank."""
    processes, machines = asked_for()
    note = {"processes": processes, "machines": machines, "world_size": world_size()}
    store.set(str(rank), json.dumps(note))
    notes: dict[int, dict[str, int | None]] = {}
    while missing := [other for other in range(world_size()) if other not in notes]:
        notes |= {other: json.loads(store.get(str(other))) for other in missing if store.check([str(other)])}
        if any(found["world_size"] != world_size() for found in notes.values()):
            break  # the others may be no more than these
        if len(notes) < world_size():
            if time.monotonic() > deadline:
                raise UserError(_absent(sorted(set(range(world_size())) - notes.keys())))
            time.sleep(0.1)
    return notes


def _absent(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return (
        f"process{'es' * (len(ranks) > 1)} {named} of {world_size()} did not come within {join_timeout()} s. Start the "
        "launcher on every machine, each with its own --machine_rank (by hand: RANK), and look into the output of those "
        f"that ended early; {JOIN_TIMEOUT} or `launch --join_timeout` sets how long to wait, see {GUIDE}"
    )


def disagreement(notes: dict[int, dict[str, int | None]]) -> str | None:
    """Why the processes with these notes are no job that anybody asked for; None when they are one."""
    asked: dict[str, list[int]] = {}
    for rank, note in sorted(notes.items()):
        on = f" on {note['machines']} machines" if note["machines"] else ""
        asked.setdefault(f"{note['processes'] or note['world_size']} processes{on}", []).append(rank)
    sizes = {size for note in notes.values() for size in (note["processes"], note["world_size"]) if size}
    if len(asked) == 1 and len(sizes) == 1:
        return None
    groups = "; ".join(f"process{'es' * (len(r) > 1)} {', '.join(map(str, r))}: {what}" for what, r in asked.items())
    there = max(note["world_size"] or 0 for note in notes.values())
    return (
        f"{there} processes came, and that is no job that was asked for ({groups}). "
        "Give every launcher the same --num_processes (the total over all machines) and --num_machines"
    )


def _linger(store: Any, rank: int) -> None:
    """Let the others read the notes before the store ends with process 0 or with its launcher."""
    store.add("read", 1)
    until = time.monotonic() + LINGER
    while rank == 0 and store.add("read", 0) < world_size() and time.monotonic() < until:
        time.sleep(0.1)


def say(text: str) -> None:
    print(f"{program()}: {text}", file=sys.stderr, flush=True)
