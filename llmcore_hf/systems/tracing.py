"""What a process sends and what it keeps: collectives by kind and bytes, and activations waiting for the backward pass."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of torch.distributed -> the name of the collective. Functional ones come from DTensor, the others from DDP,
# from ZeRO, and from direct calls.
KINDS = {
    "all_reduce": "all_reduce",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "reduce_": "reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
    "all_to_all_single": "all_to_all",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
}
NAMESPACES = ("c10d", "_c10d_functional")


class Collectives(TorchDispatchMode):
    """Counts collectives while it is entered.

    Attributes:
        calls: (phase, kind) -> calls; `phase` is whatever the attribute was at that moment.
        n_bytes: (phase, kind) -> bytes of the largest buffer of each call: what is reduced, or the whole that is gathered
            or scattered. A ring moves 2 (n-1)/n of it for an all-reduce, (n-1)/n for the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.calls: Counter[tuple[str, str]] = Counter()
        self.n_bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes here again as operators on the parts, collectives among them
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in NAMESPACES and (kind := KINDS.get(name)):
            buffers = [_n_bytes(value) for value in (*args, result) if not isinstance(value, str | int)]
            self.calls[self.phase, kind] += 1
            self.n_bytes[self.phase, kind] += max(buffers, default=0)
        return result

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """phase -> kind -> {"calls", "bytes"}."""
        found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
        for (phase, kind), calls in sorted(self.calls.items()):
            found[phase][kind] = {"calls": calls, "bytes": self.n_bytes[phase, kind]}
        return dict(found)


def _n_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_n_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


class Activations:
    """Bytes that autograd keeps for the backward pass. Parameters are not counted, and shared storage counts once.

    Attributes:
        now: bytes kept at this moment.
        peak: the most so far.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.now = self.peak = 0
        self._users: Counter[int] = Counter()  # storage -> saved tensors in it
        self._parameters = {_storage(p).data_ptr() for p in parameters}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> Any:
        storage = _storage(tensor)
        if storage.data_ptr() in self._parameters:
            return tensor
        return _Saved(tensor, storage, self)

    def add(self, storage: torch.UntypedStorage) -> None:
        self._users[storage.data_ptr()] += 1
        if self._users[storage.data_ptr()] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        self._users[storage.data_ptr()] -= 1
        if self._users[storage.data_ptr()] == 0:
            self.now -= storage.nbytes()


class _Saved:
    """One saved tensor; autograd drops it when the backward pass has used it."""

    def __init__(self, tensor: Tensor, storage: torch.UntypedStorage, activations: Activations) -> None:
        self.tensor, self._storage, self._activations = tensor, storage, activations
        activations.add(storage)

    def __del__(self) -> None:
        self._activations.remove(self._storage)


def _unpack(saved: Any) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    tensor = local(tensor)
    # The result of a collective that is still under way wraps the tensor it will fill.
    return (tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor).untyped_storage()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over several; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def n_bytes(tensors: Any) -> int:
    """Bytes of this process's part of the tensors."""
    return sum(local(t).nbytes for t in tensors if t is not None)
