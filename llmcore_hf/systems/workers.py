"""Worker processes of a systems lesson: started here, on this machine, and gone when the lesson is.

The lesson itself stays one process. It starts workers, each with `torch.distributed` set up, and gets back what they return.
They meet at a key-value store that the lesson keeps on a port the system chose, so that no port can be taken.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from llmcore_hf.errors import UserError
from llmcore_hf.systems import devices

HOST = "127.0.0.1"
# Imported once, by the server that forks the workers: they start in a tenth of a second, not in five.
PRELOAD = ["llmcore_hf.systems.data_parallel", "transformers.models.qwen3.modeling_qwen3"]


class WorkerFailed(UserError):
    """A worker ended before its work was done; the others have been stopped."""


def launch(
    work: Callable[..., Any], world_size: int, *args: Any, device: str = "cpu", timeout: float = 300
) -> list[Any]:
    """Run `work(*args)` in `world_size` new processes that form one process group on this machine.

    Args:
        work: a function at the top level of a module. What it returns is tensors and plain data.
        device: "cpu" for gloo on the loopback interface, "cuda" for NCCL and a GPU for each process.
        timeout: seconds after which the workers are stopped, and after which a collective gives up.

    Returns:
        what each worker returned, by rank, its tensors on the CPU.

    Raises:
        WorkerFailed: a worker died, or they took longer than `timeout`.
        UserError: a worker did not get into the group; it would not the next time, either.
        torch.multiprocessing.ProcessRaisedException: `work` raised; the message holds the worker's traceback.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="llmcore-workers-") as folder:
        context = torch.multiprocessing.start_processes(
            _worker,
            args=(work, world_size, store.port, folder, device, timeout, args),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        _join(context, time.monotonic() + timeout, timeout, Path(folder))
        files = [Path(folder) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def _join(context: torch.multiprocessing.ProcessContext, deadline: float, timeout: float, folder: Path) -> None:
    """Wait for the workers; whatever happens, none is left behind."""
    n = len(context.processes)
    try:
        while not context.join(timeout=1, grace_period=1):
            if time.monotonic() > deadline:
                raise WorkerFailed(f"the {n} workers were stopped: no result after {timeout:g} s")
    except torch.multiprocessing.ProcessExitedException as error:
        raise WorkerFailed(
            _how_it_ended(error.error_index, n, error.signal_name or f"exit code {error.exit_code}")
        ) from None
    except torch.multiprocessing.ProcessRaisedException as error:
        if (reason := folder / f"{error.error_index}.txt").exists():
            raise UserError(f"worker {error.error_index} of {n} {reason.read_text(encoding='utf-8')}") from None
        # When one is killed, another may tell of the lost connection first.
        killed = [i for i, process in enumerate(context.processes) if process.exitcode == -signal.SIGKILL]
        if not killed:
            raise
        raise WorkerFailed(_how_it_ended(killed[0], n, "SIGKILL")) from None
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _how_it_ended(rank: int, n: int, how: str) -> str:
    return (
        f"worker {rank} of {n} ended before its work was done ({how}); the others were stopped. "
        "SIGKILL often means that the machine ran out of memory"
    )


def _worker(
    rank: int,
    work: Callable[..., Any],
    world_size: int,
    port: int,
    folder: str,
    device: str,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    # At once, by the system: Python's own handlers would wait for a collective that never ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    rank_of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in rank_of.items()}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    limit = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore(HOST, port, is_master=False, timeout=limit)
        devices.join(device, rank, world_size, store=store, timeout=limit)
    except (RuntimeError, ValueError) as error:
        (Path(folder) / f"{rank}.txt").write_text(_no_group(device, error), encoding="utf-8")
        raise
    result = work(*args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()  # nobody leaves while another still waits for a message
    dist.destroy_process_group()


def _no_group(device: str, error: Exception) -> str:
    """Why a worker did not get into the group.

    NCCL's complaint is told whole, for its reason stands at the end; of gloo's the first line, without the place in its
    source code.
    """
    if device == "cuda":
        return (
            f"did not get into the process group: {' '.join(str(error).split())}. Workers talk over NCCL; with NCCL_DEBUG=INFO "
            "in the environment it tells more"
        )
    complaint = re.sub(r"^\[enforce fail at .*?\] .*?\. ", "", str(error).splitlines()[0])
    name = os.environ["GLOO_SOCKET_IFNAME"]
    return (
        f"did not get into the process group: {complaint}. Workers talk over the network interface {name} "
        "(GLOO_SOCKET_IFNAME; without it, the loopback interface)"
    )


def _leave_with_parent() -> None:
    """End this process when the lesson's has ended, however that came about.

    The kernel's signal for this (`PR_SET_PDEATHSIG`) does not help: the parent is the server that forked this process, and
    it lives as long as its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def loopback_interface() -> str:
    """Name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    import socket

    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
