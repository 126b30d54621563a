"""CUDA graphs without CUDA: operations on CPU tensors are recorded and repeated, under the allocator's rules."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

_live_graphs: Counter[int] = Counter()  # by pool


class _Foreign(NamedTuple):
    """A tensor in memory that a graph does not own: an address, which does not keep the memory alive."""

    storage: weakref.ref[Any]
    dtype: torch.dtype
    place: tuple[Any, ...]

    @classmethod
    def of(cls, t: Tensor) -> _Foreign:
        return cls(weakref.ref(t.untyped_storage()), t.dtype, (t.storage_offset(), t.size(), t.stride()))

    def tensor(self) -> Tensor:
        assert (storage := self.storage()) is not None, "a graph uses memory that has been freed"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class RecordedGraph(TorchDispatchMode):
    """In place of ``torch.cuda.CUDAGraph``; as a context it records, and ``replay`` repeats that on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Callable[[], None]] = []
        self._own: set[int] = set()  # storages
        self._pool = 0

    def pool(self) -> int:
        return self._pool

    def replay(self) -> None:
        for operation in self._operations:
            operation()

    def begin(self, pool: int | None) -> None:
        """Raises AssertionError, as the allocator does, for a pool whose graphs are all gone."""
        assert pool is None or _live_graphs[pool] > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self._pool = len(_live_graphs) + 1 if pool is None else pool
        _live_graphs[self._pool] += 1
        weakref.finalize(self, _live_graphs.subtract, [self._pool])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in given]
        self._own |= {t.untyped_storage()._cdata for t in made}
        addresses = tree_map_only(Tensor, self._address, (args, kwargs or {}))

        def repeat() -> None:
            here_args, here_kwargs = tree_map_only(_Foreign, _Foreign.tensor, addresses, is_leaf=_is_foreign)
            again = func(*here_args, **here_kwargs)
            for place, value in zip(made, _tensors(again) if made else (), strict=True):
                place.copy_(value)

        self._operations.append(repeat)
        return out

    def _address(self, t: Tensor) -> Any:
        return t if t.untyped_storage()._cdata in self._own else _Foreign.of(t)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_iter(value) if isinstance(t, Tensor)]


def _is_foreign(value: Any) -> bool:
    return isinstance(value, _Foreign)


@contextmanager
def _recording(graph: RecordedGraph, pool: int | None = None, **options: Any) -> Iterator[None]:
    graph.begin(pool)
    with graph:
        yield


def use_recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the functions of ``torch.cuda`` that graphs need; returns the list of streams made from now on."""
    streams: list[Any] = []

    def stream(*args: Any) -> Any:
        streams.append(mock.MagicMock())
        return streams[-1]

    for name, stand_in in {
        "Stream": stream, "current_stream": mock.MagicMock(), "current_device": lambda: 0,
        "stream": lambda side: nullcontext(), "CUDAGraph": RecordedGraph, "graph": _recording,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return streams
