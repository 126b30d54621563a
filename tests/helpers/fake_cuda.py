"""CUDA without CUDA: a device that has shapes but neither memory nor values, for programs that ask for "cuda".

Inside ``FakeCuda`` the device "cuda" is the meta device: every branch that a program takes for CUDA is taken (pinned
copies, a second stream, events, kernels that are on by default), at the true size of the networks, and every operation
is checked against what CUDA would do with it. torch's FakeTensorMode has tensors that say "cuda" themselves, but
autograd in a CPU build of torch aborts when it meets one.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, Self

import architectures
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from smpo_fast.engine import staging
from smpo_fast.kernels import adamw8bit, ema
from smpo_fast.models import step_ops
from smpo_fast.models.kernel_checks import KernelCheck
from smpo_fast.models.tracing import META, LiveBytes, fused_attention, replaced
from smpo_fast.training import prefetch

CUDA = torch.device("cuda", 0)
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_backward"}  # fmt: skip
LATENT_CHANNELS = 4  # of the UNet's last convolution, which computes in float32
SMALL = 100_000  # elements of a tensor that has values on the host: the numbers of a step, not a network's weights


class Fault(AssertionError):
    """A program did what CUDA refuses, what makes the host wait for it, or what it does slowly."""


class FakeCuda:
    """Plays a GPU in every thread of a training step, and raises Fault for what a real one would punish.

    Faults are: an operation on tensors of both devices; a copy from memory that is not pinned; a number or a tensor
    that the host reads (these two not inside ``waiting``); a product or convolution in another dtype than that of the
    weights; float64 in tensors of more than two dimensions; a tensor of another stream that the allocator does
    not know of.

    ``peak`` is the most memory that was allocated, in bytes; ``counts`` has uploads and reads, and how often the host
    waited. Numbers read are 1, tensors read are zeros.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.counts: Counter[str] = Counter()
        self._dtype = dtype
        self._may_wait = 0
        self._hosted, self._pinned = _Storages(), _Storages()  # in the host's memory, and there in pinned memory
        self._foreign = _Storages()  # of another stream, not yet recorded on this one
        self._live = LiveBytes()
        self._known: dict[Any, tuple[Any, bool]] = {}
        self._thread = threading.local()
        self._stack = ExitStack()

    @property
    def peak(self) -> int:
        return self._live.peak

    @property
    def now(self) -> int:
        return self._live.now

    def forget_peak(self) -> None:
        """Let ``peak`` begin anew."""
        self._live.peak = self._live.now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the host may wait for the device: it may read, and copy from memory that is not pinned."""
        self._may_wait += 1
        try:
            yield
        finally:
            self._may_wait -= 1

    def __enter__(self) -> Self:
        changes: list[tuple[Any, str, Callable[..., Any]]] = [
            (Tensor, "to", _method(self._to)), (Tensor, "pin_memory", _method(self._pin)),
            (Tensor, "record_stream", _method(self._record)),
            (torch.cuda, "Stream", _Stream), (torch.cuda, "Event", _Event), (torch.cuda, "stream", self._on_stream),
            (torch.cuda, "current_stream", self._current_stream), (torch.cuda, "synchronize", self._synchronize),
            (staging, "_pinned", lambda size: self.on_host((size,), torch.uint8, pinned=True)),
            (adamw8bit, "launch", self._launch), (ema, "launch", self._launch),
            (architectures, "_randomise", lambda *given: None),
            (prefetch, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=self._enter_thread)),
            (step_ops, "check_kernel", lambda name, *given: KernelCheck(name, True, 0.0, 0.0, "")),
        ]  # fmt: skip
        self._tensor_to = Tensor.to
        for owner, name, function in changes:
            self._stack.enter_context(replaced(owner, name, function))
        self._stack.enter_context(fused_attention())
        for mode in (_Redirect(self), _Watch(self)):
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _enter_thread(self) -> None:
        for mode in (_Redirect(self), _Watch(self)):
            mode.__enter__()  # until the thread ends

    def fault(self, what: str) -> None:
        """Raise Fault, naming the line of the project that is to blame."""
        ours = [f for f in traceback.extract_stack() if "/smpo_fast/" in f.filename] or traceback.extract_stack()[:1]
        raise Fault(f"{what}: {ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}")

    # --- what replaces torch's functions, also in threads and while autograd runs ---------------------------------

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tuple(map(_on_meta, args)), {name: _on_meta(value) for name, value in kwargs.items()}
        if tensor in self._hosted and META in (*args, kwargs.get("device")):  # torch would think it is there already
            dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), None)
            options = {"dtype": dtype, "device": META, "non_blocking": kwargs.get("non_blocking", False)}
            return self.run(torch.ops.aten._to_copy.default, (tensor,), options)
        return self._tensor_to(tensor, *args, **kwargs)

    def _pin(self, tensor: Tensor, *args: Any) -> Tensor:
        if self.holds(tensor):
            self.fault("only memory of the host can be pinned")
        if tensor.is_meta or tensor.numel() > SMALL:
            return self.on_host(tensor.shape, tensor.dtype, pinned=True)
        copied = tensor.clone()
        self._pinned.add(copied)
        return copied

    def _record(self, tensor: Tensor, stream: _Stream) -> None:
        self._foreign.discard(tensor)

    @contextmanager
    def _on_stream(self, stream: _Stream) -> Iterator[None]:
        before = self._current_stream()
        self._thread.stream = stream
        yield
        self._thread.stream = before

    def _current_stream(self, device: Any = None) -> _Stream:
        return getattr(self._thread, "stream", _DEFAULT_STREAM)

    def _synchronize(self, device: Any = None) -> None:
        self._wait("the host waits for the device")

    def _launch(self, *given: Any, **arguments: Any) -> None:
        """A kernel that writes in place has nothing to compute here."""

    # --- what is watched ------------------------------------------------------------------------------------------

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.is_meta and tensor not in self._hosted

    def on_host(self, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        """A new tensor in the host's memory, without values."""
        with _disable_current_modes():
            tensor = torch.empty(shape, dtype=dtype, device=META)
        self._hosted.add(tensor)
        if pinned:
            self._pinned.add(tensor)
        return tensor

    def uploaded(self) -> None:
        """A copy from memory that is not pinned."""
        self._wait("a copy from the host that it waits for")
        self.counts["uploads"] += 1

    def _wait(self, what: str) -> None:
        if not self._may_wait:
            self.fault(what)
        self.counts["waits"] += 1

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Check an operation, and run it."""
        name, given = func._schema.name, list(_tensors((*args, *kwargs.values())))
        here, host = [x for x in given if self.holds(x)], [x for x in given if not self.holds(x)]
        if here and self._current_stream() is _DEFAULT_STREAM and any(x in self._foreign for x in here):
            self.fault(f"{name} uses a tensor of another stream, whose memory may be given away: record_stream")
        if name == "aten::_local_scalar_dense" and given[0].is_meta:
            if here:
                self._wait("the host reads a number from the device, and waits for it")
                self.counts["reads"] += 1
            return 1.0 if given[0].is_floating_point() else 1
        if here and name not in _COPIES and any(x.ndim for x in host):
            self.fault(f"{name} of tensors on both devices")
        out = self._copy(func, args, kwargs) if name in _COPIES else self._shapes(func, args, kwargs, here, host)
        made = [x for x in _tensors((out,)) if self.holds(x)]
        self._check_dtypes(name, here, made)
        for tensor in made:
            self._live.add(tensor)
        return out

    def _shapes(self, func: Any, args: Any, kwargs: Any, here: list[Tensor], host: list[Tensor]) -> Any:
        """The results of an operation: shapes are computed once, since a network repeats its blocks."""
        if any(x.is_meta for x in host) and not here:
            return self._on_host(func, args, kwargs)
        if host or not here or not _makes_new_tensors(func):
            return func(*args, **kwargs)
        key = (func, *map(_described, args), *((name, _described(value)) for name, value in kwargs.items()))
        if key not in self._known:
            out = func(*args, **kwargs)
            self._known[key] = _described(out), isinstance(out, (list, tuple))
            return out
        made, several = self._known[key]
        return tuple(map(_made, made)) if several else _made(made)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on the host, some of whose tensors have no values."""
        out = func(*map(_without_values, args), **{name: _without_values(value) for name, value in kwargs.items()})
        for tensor in _tensors((out,)):
            self._hosted.add(tensor)
        return out

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy; between host and device, pinned memory has to send or receive it."""
        into = args[0] if func._schema.name == "aten::copy_" else None
        source = args[0] if into is None else args[1]
        from_device, device = self.holds(source), kwargs.get("device")
        to_device = self.holds(into) if into is not None else from_device if device is None else device == META
        if to_device is not from_device:
            return self._transfer(source, into, args, kwargs, to_device)
        if into is None and source in self._hosted:
            return self.on_host(source.shape, kwargs.get("dtype") or source.dtype)
        if into is not None and into.is_meta is not source.is_meta:  # on the host, one of them without values
            return into
        return func(*args, **kwargs)

    def _transfer(self, source: Tensor, into: Tensor | None, args: Any, kwargs: Any, to_device: bool) -> Tensor:
        on_host = source if to_device else into
        waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        if source.ndim and (waits or on_host is None or on_host not in self._pinned):
            self._wait(f"a copy {'from' if to_device else 'to'} the host that it waits for")
        self.counts["uploads" if to_device else "reads"] += 1
        if into is not None:
            return into
        dtype = kwargs.get("dtype") or source.dtype
        if not to_device and source.numel() <= SMALL:
            return torch.zeros(source.shape, dtype=dtype)
        if not to_device:
            return self.on_host(source.shape, dtype)
        out = torch.empty(source.shape, dtype=dtype, device=META)
        if self._current_stream() is not _DEFAULT_STREAM:
            self._foreign.add(out)
        return out

    def _check_dtypes(self, name: str, here: list[Tensor], made: list[Tensor]) -> None:
        floats = [x for x in made if x.is_floating_point()]
        matrices = [x for x in here if x.is_floating_point() and x.ndim > 1]
        if name in PRODUCTS and not any(x.shape[0] == LATENT_CHANNELS for x in matrices):
            if "flash_attention" in name:
                matrices = matrices[:3]  # queries, keys and values; their log-sum-exp is float32
            if any(x.dtype is not self._dtype for x in matrices):
                self.fault(f"{name} in {', '.join(str(x.dtype) for x in matrices)}")
        if any(x.dtype is torch.float64 and x.ndim > 2 for x in floats):
            self.fault(f"{name} in float64 on {[tuple(x.shape) for x in floats]}")


def _without_values(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_values(inner) for inner in value]
    return value.to(META) if isinstance(value, Tensor) and not value.is_meta else value


@cache
def _makes_new_tensors(func: Any) -> bool:
    """Whether an operation neither writes to its arguments nor returns views of them."""
    schema = func._schema
    return bool(schema.returns) and all(a.alias_info is None for a in (*schema.arguments, *schema.returns))


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _described(value: Any) -> Any:
    """What a result's shapes depend on, hashable."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return (type(value), value)  # 1, 1.0 and True are equal


def _made(described: Any) -> Any:
    return (
        torch.empty_strided(*described[:2], dtype=described[2], device=META)
        if isinstance(described, _Shape)
        else described[1]
    )


class _Storages:
    """A set of storages, by the tensors in them."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._keys.add(storage._cdata)
        weakref.finalize(storage, self._keys.discard, storage._cdata)

    def discard(self, tensor: Tensor) -> None:
        self._keys.discard(tensor.untyped_storage()._cdata)

    def __contains__(self, tensor: Tensor) -> bool:
        return bool(self._keys) and tensor.untyped_storage()._cdata in self._keys


class _Event:
    """Time in whole milliseconds of a clock that stands still."""

    def __init__(self, **options: Any) -> None:
        pass

    def record(self, *stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Waits for one copy only, while the device goes on with what is queued."""

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()


_DEFAULT_STREAM = _Stream()
_COPIES = ("aten::_to_copy", "aten::copy_")
_DEVICE, _IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _method(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that becomes a method of a class, as a bound method does not."""
    return lambda tensor, *args, **kwargs: call(tensor, *args, **kwargs)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.partition(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


def _on_meta(value: Any) -> Any:
    return META if _is_cuda(value) else value


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, which operations nest in lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Redirect(TorchFunctionMode):
    """Calls for the device "cuda" go to the meta device, whose tensors say that they are on "cuda"."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE and args[0].is_meta:
            return CUDA if self._fake.holds(args[0]) else torch.device("cpu")
        if func == _IS_CUDA:
            return self._fake.holds(args[0])
        if func in (torch.device, torch.get_device_module):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_cuda(kwargs.get("device")):
            self._fake.uploaded()
        if kwargs.pop("pin_memory", False):
            with _disable_current_modes():
                like = func(*args, **{**kwargs, "device": META})
            return self._fake.on_host(like.shape, like.dtype, pinned=True)
        return func(*map(_on_meta, args), **{k: _on_meta(v) for k, v in kwargs.items()})


class _Watch(TorchDispatchMode):
    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._fake.run(func, args, kwargs or {})
