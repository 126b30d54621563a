"""How times are measured: check the result, warm up, time many calls, report the median.

On a GPU, CUDA events around each call measure the time, with the L2 cache flushed before it; on a CPU,
``perf_counter``. A call of a few microseconds takes the host longer to launch than the device to run, and events would
measure the host: such calls are timed as copies in a CUDA graph, each after a flush of the cache, and the time of a
graph of the flushes alone is subtracted. To put times into relation, the ceilings of the same machine are measured in
the same run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "bitsandbytes", "xformers", "torchao")
# largest relative error (2-norm) that a result may have to be timed, by the dtype it was computed in
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
FLUSH_BYTES = 256 << 20  # several times any L2
GRAPH_CALLS = 20  # copies of a call in a CUDA graph, so that the noise of the flushes is divided by it


class WrongResult(AssertionError):
    """An implementation's result differs from the reference's: it must not be timed."""


def agree(what: str, found: Any, wanted: Any, tolerance: float) -> float:
    """The largest relative error of tensors or nested sequences of them; raises WrongResult above the tolerance."""
    pairs = list(zip(_tensors(found), _tensors(wanted), strict=True))
    if not pairs:
        raise WrongResult(f"{what}: nothing to compare")
    worst = 0.0
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            raise WrongResult(f"{what}: result {number} has shape {tuple(a.shape)}, the reference {tuple(b.shape)}")
        scale = b.double().norm().clamp(min=1e-30)
        error = float((a.double() - b.double()).norm() / scale)
        if not error <= tolerance:  # NaN is wrong too
            raise WrongResult(f"{what}: result {number} has error {error:.2e}, above {tolerance:.0e}: not timed")
        worst = max(worst, error)
    return worst


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed call, and the peak of device memory beyond what was allocated before."""

    seconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median: a smaller difference is noise."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def measure(
    call: Callable[[], Any],
    device: torch.device,
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    warmup: int = 3,
    reset: Callable[[], Any] | None = None,
    graph: bool = False,
) -> Timing:
    """Time a call repeatedly, for about ``seconds``; ``reset`` runs untimed before each call.

    graph: on a GPU, time copies of the call in a CUDA graph, without the host's launches; not for a backward pass
    alone, which runs on the stream of its forward pass. Raises RuntimeError if the call cannot be captured.
    """
    began = time.perf_counter()
    for _ in range(warmup):
        if reset is not None:
            reset()
        call()
    synchronize(device)
    once = max((time.perf_counter() - began) / warmup, 1e-7) if warmup else 1e-3
    rounds = max(least, min(most, int(seconds / once)))
    if device.type == "cuda" and graph:
        return _measure_graph(call, device, least)
    if device.type == "cuda":
        return _measure_cuda(call, device, rounds, reset)
    taken = []
    for _ in range(rounds):
        if reset is not None:
            reset()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return Timing(tuple(taken))


def _measure_cuda(
    call: Callable[[], Any], device: torch.device, rounds: int, reset: Callable[[], Any] | None
) -> Timing:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    marks = []
    for _ in range(rounds):
        if reset is not None:
            reset()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Timing(tuple(s.elapsed_time(e) / 1e3 for s, e in marks), peak)


def _measure_graph(call: Callable[[], Any], device: torch.device, rounds: int) -> Timing:
    """Device seconds of one call with a cold cache: of graphs of flushes and calls, less those of flushes alone."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept: list[Any] = []  # results, whose memory later nodes of the graph must not share

    def flushed_call() -> None:
        flush.zero_()
        kept.append(call())

    alone = statistics.median(replayed(flush.zero_, device, rounds))
    both = replayed(flushed_call, device, rounds)
    peak = torch.cuda.max_memory_allocated(device) - before
    if min(both) <= alone:
        raise RuntimeError("the captured calls take no time: they ran on another stream, or are shorter than the noise")
    return Timing(tuple((seconds - alone) / GRAPH_CALLS for seconds in both), peak)


def replayed(body: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each replay of a CUDA graph that contains ``body`` GRAPH_CALLS times. Raises RuntimeError."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # autograd and libraries allocate in a first call
        body()
    torch.cuda.current_stream(device).wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=side):
        for _ in range(GRAPH_CALLS):
            body()
    recorded.replay()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        start.record()
        recorded.replay()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class PhaseClock:
    """Times named phases of a program without synchronizing the device; ``seconds`` ends a round and does."""

    device: torch.device
    marks: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.marks.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        synchronize(self.device)
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self.marks:
            total[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        self.marks.clear()
        return dict(total)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


# --- ceilings of the machine ----------------------------------------------------------------------------------


@functools.cache
def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth in GB/s (read plus written) and matrix products in TFLOP/s, measured on random data."""
    large = device.type == "cuda"
    count = (1 << 31) if large else (1 << 25)
    source = torch.empty(count // 4, device=device).normal_()
    target = torch.empty_like(source)
    took = measure(lambda: target.copy_(source), device, seconds=0.3, least=5)
    found = {"copy_GBps": 2 * count / took.median / 1e9}
    side = 8192 if large else 512
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if large else (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_TFLOPs"] = _matmul_ceiling(device, dtype, side)
    if large and (eight := _fp8_ceiling(device, side)) is not None:
        found["float8_TFLOPs"] = eight
    return found


def _matmul_ceiling(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    took = measure(lambda: torch.mm(a, b, out=out), device, seconds=0.3, least=5)
    return 2 * side**3 / took.median / 1e12


def _fp8_ceiling(device: torch.device, side: int) -> float | None:
    """None if the card or the library has no fp8 matrix product."""
    try:
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)

        def product() -> Tensor:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

        return 2 * side**3 / measure(product, device, seconds=0.3, least=5).median / 1e12
    except (RuntimeError, AttributeError, TypeError):
        return None


def shares(
    seconds: float, flops: float, moved: float, dtype: torch.dtype, limits: Mapping[str, float]
) -> dict[str, float]:
    """Achieved rates, and their share of the measured ceilings."""
    found: dict[str, float] = {}
    if flops:
        found["TFLOPs"] = flops / seconds / 1e12
        peak = limits.get(f"{str(dtype).removeprefix('torch.')}_TFLOPs")
        if peak:
            found["share_of_matmul"] = found["TFLOPs"] / peak
    if moved:
        found["GBps"] = moved / seconds / 1e9
        found["share_of_copy"] = found["GBps"] / limits["copy_GBps"]
    return found


# --- provenance -----------------------------------------------------------------------------------------------


@functools.cache
def _environment(device: torch.device) -> tuple[tuple[str, Any], ...]:
    commit, dirty = revision()
    facts = {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: v for name in LIBRARIES if (v := _version(name)) is not None},
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d"),
    }
    return tuple(facts.items())


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit, stored with every result."""
    return dict(_environment(device))


def device_name(device: torch.device) -> str:
    """The manufacturer's name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} thread(s)"
    return platform.processor() or "cpu"


def folder_name(device: torch.device) -> str:
    """The device's name in a form that suits a folder."""
    name = device_name(device).partition(",")[0]
    kept = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part)


def revision() -> tuple[str | None, bool | None]:
    """The current commit, and whether tracked files differ from it; None without git or a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD").strip(), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


# --- output ---------------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """A time in readable form: three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def say(*words: object) -> None:
    """Print and flush, so that a run that is killed has shown its results so far."""
    print(*words, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first one aligned left, the others right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [[str(c).ljust(w) if i == 0 else str(c).rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
             for row in [head, ["-" * w for w in widths], *rows]]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def pick_device(name: str) -> torch.device:
    """The device for "cpu", "cuda" or "auto"; exits the program if CUDA is requested but not available."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device found: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
