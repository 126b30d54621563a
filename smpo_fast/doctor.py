"""What was found on this machine, what training will use of it and why, and the command that mends what is missing.

Nothing here may crash: a library that fails to import, or takes the process down with it, is a finding. So every probe
that imports something runs in a process of its own (``python -m smpo_fast.doctor PROBE``), all of them at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROBE_SECONDS = 120.0  # a compiler may have to start; a healthy machine takes a few
OK, MISSING, BROKEN = "ok", "missing", "broken"
OLDEST_PYTHON = (3, 11)
NEEDED = ("torch", "diffusers", "transformers", "pyarrow", "pydantic", "safetensors", "PIL", "matplotlib")
_DISTRIBUTIONS = {"PIL": "pillow", "flash_attn_interface": "flash_attn_3"}  # where the name differs
_REINSTALL = "pip install --force-reinstall {}"
_CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. ``fix`` is a command, empty where nothing is to do."""

    name: str
    state: str  # OK | MISSING | BROKEN
    text: str
    fix: str = ""
    needed: bool = False  # training cannot run without it


# --- probes in a process of their own -------------------------------------------------------------------------


def _probe_torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": [], "why": ""}
    found["nccl"] = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    found["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            here = torch.cuda.get_device_properties(i)
            device = {"name": here.name, "bytes": here.total_memory, "capability": f"{here.major}.{here.minor}"}
            found["devices"].append(device)
        found["bf16"] = torch.cuda.is_bf16_supported()
        found["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version())) if found["nccl"] else ""
    else:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            found["why"] = str(error).strip().splitlines()[0]
    found["attention"] = _attention(torch.device("cuda" if found["devices"] else "cpu"))
    return found


def _attention(device: Any) -> dict[str, str]:
    """Back-ends of scaled_dot_product_attention at a UNet's shapes: 'ok', or why not."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    query = torch.randn(1, 5, 64, 64, device=device, dtype=torch.bfloat16)
    told = {}
    for name, backend in backends.items():
        try:
            with sdpa_kernel([backend]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
            told[name] = OK
        except RuntimeError as error:
            told[name] = str(error).strip().splitlines()[0]
    return told


def _probe_triton() -> dict[str, Any]:
    found: dict[str, Any] = {"version": importlib.import_module("triton").__version__, "compiled": False}
    import torch

    if torch.cuda.is_available():
        x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
        importlib.import_module("smpo_fast.kernels.geglu").geglu(x)
        torch.cuda.synchronize()
        found["compiled"] = True
    return found


def _probe_deepspeed() -> dict[str, Any]:
    library = importlib.import_module("deepspeed")
    told = {"compatible": library.ops.__compatible_ops__, "installed": library.git_version_info.installed_ops}
    ops = {what: sorted(name for name, there in table.items() if there) for what, table in told.items()}
    return {"version": library.__version__, **ops}


def _probe_bitsandbytes() -> dict[str, Any]:
    import torch

    sys.modules["kernels"] = None  # type: ignore[assignment]  # as in training: it would fetch code from the hub
    library = importlib.import_module("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.ones(8192, device=device))
    optimizer = library.optim.AdamW8bit([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return {"version": library.__version__, "device": device, "moves": bool((weight != 1).all())}


def _probe_xformers() -> dict[str, Any]:
    import torch

    library, attention = (importlib.import_module(name) for name in ("xformers", "xformers.ops"))
    if torch.cuda.is_available():
        query = torch.randn(1, 64, 5, 64, device="cuda", dtype=torch.bfloat16)
        attention.memory_efficient_attention(query, query, query)
    return {"version": library.__version__}


def _plainly(name: str) -> Callable[[], dict[str, Any]]:
    def probe() -> dict[str, Any]:
        importlib.import_module(name)
        return {"version": _version(name)}

    return probe


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _probe_torch,
    "triton": _probe_triton,
    "deepspeed": _probe_deepspeed,
    "bitsandbytes": _probe_bitsandbytes,
    "xformers": _probe_xformers,
    "flash_attn_interface": _plainly("flash_attn_interface"),
    "peft": _plainly("peft"),
    "torchao": _plainly("torchao"),
}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def ask(name: str, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """What a probe found: its values with ``state`` OK, or ``state`` MISSING or BROKEN with ``why``."""
    if importlib.util.find_spec(name) is None:
        return {"state": MISSING, "why": "not installed"}
    words = [sys.executable, "-m", "smpo_fast.doctor", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"state": BROKEN, "why": f"did not answer in {seconds:g} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (ValueError, IndexError, TypeError):
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"state": BROKEN, "why": f"importing it ended the process ({ended}): {said}"}


def _answer(name: str) -> None:
    """In the probe's process: one line of JSON, whatever happens."""
    try:
        found = {"state": OK, **PROBES[name]()}
    except BaseException as error:
        traceback.print_exc()
        found = {"state": BROKEN, "why": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    print("\n" + json.dumps(found), flush=True)


# --- findings -------------------------------------------------------------------------------------------------


def findings(ds_file: Path | None = None) -> list[Finding]:
    """Everything that was looked for."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        asked = dict(zip(PROBES, pool.map(ask, PROBES), strict=True))
    made = [
        _guard("Python", _python),
        _guard("packages", _packages),
        _guard("torch", lambda: _torch(asked["torch"])),
        _guard("devices", lambda: _devices(asked["torch"])),
        _guard("attention", lambda: _attention_of(asked["torch"])),
        _guard("triton", lambda: _triton(asked["triton"], bool(asked["torch"].get("devices")))),
        _guard("deepspeed", lambda: _deepspeed(asked["deepspeed"], ds_file)),
        _guard("ranks", lambda: _ranks(asked["torch"])),
        _guard("bitsandbytes", lambda: _bitsandbytes(asked["bitsandbytes"])),
    ]
    for name, use in _OPTIONAL.items():
        made.append(_guard(name, lambda name=name, use=use: _optional(name, use, asked[name])))  # type: ignore[misc]
    made += [_guard("compilers", _compilers), _guard("memory and disk", _space), _guard("hub", _hub)]
    if ds_file is not None:
        made.append(_guard("DeepSpeed file", lambda: _ds_file(ds_file)))
    return made


_OPTIONAL = {
    "xformers": ("model.attention = 'xformers'; without it SDPA serves", "pip install xformers"),
    "flash_attn_interface": ("FlashAttention 3 on Hopper; without it SDPA serves", "pip install flash-attn-interface"),
    "peft": ("LoRA", "pip install peft"),
    "torchao": ("comparisons with its optimizers; training does not use it", "pip install torchao"),
}


def _guard(name: str, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as error:
        return Finding(name, BROKEN, f"could not be looked at: {type(error).__name__}: {error}")


def _python() -> Finding:
    text, old = (
        f"{platform.python_version()} ({sys.executable}), {platform.platform()}",
        sys.version_info < OLDEST_PYTHON,
    )
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding("Python", BROKEN if old else OK, text, f"install Python {wanted} or later" if old else "", old)


def _packages() -> Finding:
    gone = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if gone:
        return Finding("packages", MISSING, f"not installed: {', '.join(gone)}", "pip install -e .", True)
    return Finding("packages", OK, ", ".join(f"{name} {_version(name)}" for name in NEEDED if name != "torch"))


def _torch(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("torch", found["state"], found["why"], _REINSTALL.format("torch"), True)
    built = f"for CUDA {found['cuda']}" if found["cuda"] else "for CPU only"
    return Finding("torch", OK, f"{found['version']}, {built}; driver {_driver() or 'none found'}")


def _driver() -> str:
    """The NVIDIA driver's version; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _devices(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("devices", BROKEN, "torch did not answer")
    listed = [f"{d['name']}, {d['bytes'] / 1e9:.1f} GB, compute capability {d['capability']}" for d in found["devices"]]
    if listed:
        bf16 = "model.precision = 'auto' is bf16" if found["bf16"] else "no bf16: model.precision = 'auto' is fp32"
        return Finding("devices", OK, f"{'; '.join(listed)}; run.device = 'auto' is cuda; {bf16}")
    if _driver():
        fix = _CUDA_TORCH if not found["cuda"] else "nvidia-smi  (and compare the driver with torch's CUDA version)"
        return Finding("devices", BROKEN, f"there is a GPU, but torch cannot use it: {found['why']}", fix)
    return Finding(
        "devices", MISSING, "no GPU: run.device = 'auto' is cpu; enough for the embedded default, not for SDXL"
    )


def _attention_of(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("attention", BROKEN, "torch did not answer")
    works = [name for name, told in found["attention"].items() if told == OK]
    fails = [f"{name} ({told[:60]})" for name, told in found["attention"].items() if told != OK]
    text = f"model.attention = 'sdpa' picks among {', '.join(works)}" + (f"; not: {', '.join(fails)}" if fails else "")
    return Finding("attention", OK if works else BROKEN, text, "" if works else _REINSTALL.format("torch"), not works)


def _triton(found: Mapping[str, Any], gpu: bool) -> Finding:
    if found["state"] != OK:
        fix = "pip install triton" if found["state"] == MISSING else _compiler_fix(found["why"])
        return Finding("triton", found["state"], f"{found['why']}; kernels.enabled must stay empty", fix)
    if gpu:
        return Finding("triton", OK, f"{found['version']}; compiled one of our kernels: kernels.enabled may name them")
    return Finding(
        "triton", OK, f"{found['version']}; without a GPU only its interpreter runs (TRITON_INTERPRET=1, for tests)"
    )


def _compiler_fix(why: str) -> str:
    wants_compiler = any(word in why for word in ("gcc", "compiler", "Python.h"))
    return "apt install gcc python3-dev" if wants_compiler else _REINSTALL.format("triton")


def _deepspeed(found: Mapping[str, Any], ds_file: Path | None) -> Finding:
    needed = ds_file is not None
    if found["state"] != OK:
        fix = "pip install deepspeed" if found["state"] == MISSING else _REINSTALL.format("deepspeed")
        text = f"{found['why']}; one process trains without it, several and --ds_config need it"
        return Finding("deepspeed", found["state"], text, fix, needed)
    ops = f"operators that would compile here: {', '.join(found['compatible']) or 'none'}"
    built = f"; built already: {', '.join(found['installed'])}" if found["installed"] else ""
    return Finding("deepspeed", OK, f"{found['version']}; serves --ds_config, ZeRO 0 to 3; {ops}{built}")


def _ranks(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("ranks", BROKEN, "torch did not answer")
    backends = [name for name in ("nccl", "gloo") if found[name]]
    on_gpu = bool(found["devices"])
    wanted = "nccl" if on_gpu else "gloo"
    version = f" {found.get('nccl_version')}" if on_gpu and found["nccl"] else ""
    text = f"torch.distributed has {', '.join(backends) or 'nothing'}; ranks talk by {wanted}{version}"
    several = len(found["devices"]) > 1
    lost = wanted not in backends
    return Finding("ranks", MISSING if lost else OK, text, _CUDA_TORCH if lost else "", lost and several)


def _bitsandbytes(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK or not found["moves"]:
        fix = "pip install bitsandbytes" if found["state"] == MISSING else _REINSTALL.format("bitsandbytes")
        text = f"{found.get('why', 'its step changed nothing')}; the 8-bit optimizers that need it are refused"
        return Finding("bitsandbytes", BROKEN if found["state"] == OK else found["state"], text, fix)
    return Finding("bitsandbytes", OK, f"{found['version']}; an AdamW8bit step ran on {found['device']}")


def _optional(name: str, use: tuple[str, str], found: Mapping[str, Any]) -> Finding:
    what, fix = use
    if found["state"] == OK:
        return Finding(name, OK, f"{found['version']}; for {what}")
    fix = fix if found["state"] == MISSING else _REINSTALL.format(name)
    return Finding(name, found["state"], f"{found['why']}; for {what}", fix)


def _compilers() -> Finding:
    paths = {name: shutil.which(name) for name in ("g++", "nvcc", "ninja")}
    gone = [name for name, path in paths.items() if path is None]
    text = ", ".join(f"{name} {path}" for name, path in paths.items() if path) or "none"
    what = "DeepSpeed compiles operators for offload with them, Triton its launcher with gcc; plain training needs none"
    if not gone:
        return Finding("compilers", OK, f"{text}; {what}")
    packages = {"g++": "apt install g++", "ninja": "pip install ninja", "nvcc": "apt install nvidia-cuda-toolkit"}
    return Finding(
        "compilers", MISSING, f"{text}; not: {', '.join(gone)}; {what}", "; ".join(packages[n] for n in gone)
    )


def _space() -> Finding:
    total, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    disk = shutil.disk_usage(".").free
    text = (
        f"host memory {total / 1e9:.1f} GB ({free / 1e9:.1f} GB free), {disk / 1e9:.1f} GB of disk free in {Path.cwd()}"
    )
    tight = disk < 2e9
    fix = "give run.dir and data.cache a folder on a larger disk (smpo plan says how large)"
    return Finding("memory and disk", BROKEN if tight else OK, text, fix if tight else "")


def _hub() -> Finding:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    files = (Path(os.environ.get("HF_TOKEN_PATH", home / "token")),)
    token = bool(os.environ.get("HF_TOKEN")) or any(file.is_file() for file in files)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    mode = "offline (HF_HUB_OFFLINE): hub ids must be in the cache already" if offline else "online"
    return Finding("hub", OK, f"{mode}; {'a token is set' if token else 'no token: public models only'}; cache {home}")


def _ds_file(file: Path) -> Finding:
    try:
        values = json.loads(file.read_text())
        zero = values.get("zero_optimization", {})
    except (OSError, ValueError, AttributeError) as error:
        return Finding("DeepSpeed file", BROKEN, f"{file}: {error}", "give --ds_config one of configs/ds_*.json", True)
    parts = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    nvme = [key for key, device in parts.items() if device == "nvme"]
    told = ", ".join(f"{key} to {device}" for key, device in parts.items() if device != "none") or "no offload"
    text = f"{file}: ZeRO {zero.get('stage', 0)}, {told}"
    if nvme and shutil.which("g++") is None:
        return Finding("DeepSpeed file", BROKEN, f"{text}: nvme needs the operator async_io, which g++ compiles",
                       "apt install g++ libaio-dev", True)  # fmt: skip
    return Finding("DeepSpeed file", OK, text)


# --- the report -----------------------------------------------------------------------------------------------


def can_train(found: list[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return not any(f.needed and f.state != OK for f in found)


def render(found: list[Finding]) -> str:
    """The findings as text; what is to be done comes last."""
    lines = [f"{f.name:<22}{f.state:<9}{f.text}" for f in found]
    to_do = [f"  {f.name}{' (needed)' if f.needed else ''}: {f.fix}" for f in found if f.fix]
    lines += ["", "to mend what is missing:", *to_do] if to_do else []
    return "\n".join(
        [*lines, "", "training can run" if can_train(found) else "TRAINING CANNOT RUN: see (needed) above"]
    )


def run(ds_file: Path | None, as_json: bool) -> int:
    """Program ``smpo doctor``; returns the exit status: 0 when training can run, 1 when something needed is missing."""
    found = findings(ds_file)
    values = {"can_train": can_train(found), "findings": [asdict(f) for f in found]}
    print(json.dumps(values, indent=1) if as_json else render(found))
    return 0 if can_train(found) else 1


if __name__ == "__main__":
    _answer(sys.argv[1])
