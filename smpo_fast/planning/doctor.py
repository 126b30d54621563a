"""``smpo doctor``: what this machine has, what training will use and why, and commands that repair what is missing.

Nothing here may crash: a library that fails to import, or ends the process when it is imported, is a finding. Every
probe that imports something therefore runs in its own process (smpo_fast.planning.probes), all at the same time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smpo_fast.common import console, programs
from smpo_fast.common.console import coloured
from smpo_fast.common.json_report import json_report
from smpo_fast.planning.gpus import driver
from smpo_fast.planning.probes import (
    BROKEN,
    MISSING,
    NEEDED,
    OK,
    OLDEST_PYTHON,
    PROBES,
    installed_version,
    run_probe,
    unreachable,
)

_COLOURS = {OK: console.GOOD, MISSING: console.DOUBTFUL, BROKEN: console.BAD}
_REINSTALL = "pip install --force-reinstall {}"
HUB_SECONDS = 2.0
_CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``fix`` is a command; empty if nothing needs to be done."""

    name: str
    state: str  # OK | MISSING | BROKEN
    text: str
    fix: str = ""
    needed: bool = False  # training cannot run without it


def findings(ds_file: Path | None = None) -> list[Finding]:
    """The results of all checks."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        reports = dict(zip(PROBES, pool.map(run_probe, PROBES), strict=True))
    made = [
        _guard("Python", _python),
        _guard("packages", _packages),
        _guard("torch", lambda: _torch(reports["torch"])),
        _guard("devices", lambda: _devices(reports["torch"])),
        _guard("attention", lambda: _attention_of(reports["torch"])),
        _guard("triton", lambda: _triton(reports["triton"], bool(reports["torch"].get("devices")))),
        _guard("deepspeed", lambda: _deepspeed(reports["deepspeed"], ds_file)),
        _guard("ranks", lambda: _ranks(reports["torch"])),
        _guard("bitsandbytes", lambda: _bitsandbytes(reports["bitsandbytes"])),
    ]
    for name, use in _OPTIONAL.items():
        made.append(_guard(name, lambda name=name, use=use: _optional(name, use, reports[name])))  # type: ignore[misc]
    made += [_guard("compilers", _compilers), _guard("memory and disk", _space), _guard("hub", _hub)]
    if ds_file is not None:
        made.append(_guard("DeepSpeed file", lambda: _ds_file(ds_file)))
    return made


_OPTIONAL = {
    "xformers": ("model.attention = 'xformers'; without it, SDPA is used", "pip install xformers"),
    "flash_attn_interface": (
        "FlashAttention 3 on Hopper; without it, SDPA is used",
        "pip install flash-attn-interface",
    ),
    "peft": ("LoRA", "pip install peft"),
    "torchao": ("comparisons with its optimizers; training does not use it", "pip install torchao"),
}


def _guard(name: str, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as error:
        return Finding(name, BROKEN, f"the check itself failed: {type(error).__name__}: {error}")


def _python() -> Finding:
    text, old = (
        f"{platform.python_version()} ({sys.executable}), {platform.platform()}",
        sys.version_info < OLDEST_PYTHON,
    )
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding("Python", BROKEN if old else OK, text, f"install Python {wanted} or later" if old else "", old)


def _packages() -> Finding:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("packages", MISSING, f"not installed: {', '.join(missing)}", "pip install -e .", True)
    return Finding("packages", OK, ", ".join(f"{name} {installed_version(name)}" for name in NEEDED if name != "torch"))


def _torch(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("torch", found["state"], found["why"], _REINSTALL.format("torch"), True)
    built = f"for CUDA {found['cuda']}" if found["cuda"] else "for CPU only"
    return Finding("torch", OK, f"{found['version']}, {built}; driver {driver() or 'none found'}")


def _devices(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("devices", BROKEN, "torch could not be checked")
    listed = [f"{d['name']}, {d['bytes'] / 1e9:.1f} GB, compute capability {d['capability']}" for d in found["devices"]]
    if listed:
        bf16 = "model.precision = 'auto' is bf16" if found["bf16"] else "no bf16: model.precision = 'auto' is fp32"
        return Finding("devices", OK, f"{'; '.join(listed)}; run.device = 'auto' is cuda; {bf16}")
    if driver():
        fix = _CUDA_TORCH if not found["cuda"] else "nvidia-smi  (and compare the driver with torch's CUDA version)"
        return Finding("devices", BROKEN, f"a GPU is present, but torch cannot use it: {found['why']}", fix)
    return Finding(
        "devices", MISSING, "no GPU: run.device = 'auto' is cpu; enough for the embedded default, not for SDXL"
    )


def _attention_of(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("attention", BROKEN, "torch could not be checked")
    works = [name for name, reported in found["attention"].items() if reported == OK]
    fails = [f"{name} ({reported[:60]})" for name, reported in found["attention"].items() if reported != OK]
    text = f"model.attention = 'sdpa' picks among {', '.join(works)}" + (f"; not: {', '.join(fails)}" if fails else "")
    return Finding("attention", OK if works else BROKEN, text, "" if works else _REINSTALL.format("torch"), not works)


def _triton(found: Mapping[str, Any], gpu: bool) -> Finding:
    if found["state"] != OK:
        fix = 'pip install "smpo-fast[kernels]"' if found["state"] == MISSING else _compiler_fix(found["why"])
        return Finding(
            "triton", found["state"], f"{found['why']}; the fused kernels cannot run: eager code is used", fix
        )
    if gpu:
        return Finding("triton", OK, f"{found['version']}; it compiled one of this package's kernels")
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
        text = f"{found['why']}; one process can train without it; several processes and --ds_config need it"
        return Finding("deepspeed", found["state"], text, fix, needed)
    ops = f"operators that would compile here: {', '.join(found['compatible']) or 'none'}"
    built = f"; built already: {', '.join(found['installed'])}" if found["installed"] else ""
    return Finding("deepspeed", OK, f"{found['version']}; for --ds_config, ZeRO 0 to 3; {ops}{built}")


def _ranks(found: Mapping[str, Any]) -> Finding:
    if found["state"] != OK:
        return Finding("ranks", BROKEN, "torch could not be checked")
    backends = [name for name in ("nccl", "gloo") if found[name]]
    on_gpu = bool(found["devices"])
    wanted = "nccl" if on_gpu else "gloo"
    version = f" {found.get('nccl_version')}" if on_gpu and found["nccl"] else ""
    text = f"torch.distributed has {', '.join(backends) or 'nothing'}; ranks communicate by {wanted}{version}"
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
    missing = [name for name, path in paths.items() if path is None]
    text = ", ".join(f"{name} {path}" for name, path in paths.items() if path) or "none"
    what = "DeepSpeed compiles its offload operators with them, Triton its launcher with gcc; other training needs none"
    if not missing:
        return Finding("compilers", OK, f"{text}; {what}")
    packages = {"g++": "apt install g++", "ninja": "pip install ninja", "nvcc": "apt install nvidia-cuda-toolkit"}
    return Finding(
        "compilers", MISSING, f"{text}; not: {', '.join(missing)}; {what}", "; ".join(packages[n] for n in missing)
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
    facts = f"{'a token is set' if token else 'no token: public models only'}; cache {home}"
    if offline:
        return Finding("hub", OK, f"offline (HF_HUB_OFFLINE): hub ids must be in the cache already; {facts}")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if problem := unreachable(address, HUB_SECONDS):
        text = f"{address} does not answer ({problem}): hub ids must be in the cache already; {facts}"
        return Finding("hub", MISSING, text)
    return Finding("hub", OK, f"{address} answers; {facts}")


def _ds_file(file: Path) -> Finding:
    try:
        values = json.loads(file.read_text())
        zero = values.get("zero_optimization", {})
    except (OSError, ValueError, AttributeError) as error:
        return Finding("DeepSpeed file", BROKEN, f"{file}: {error}", "give --ds_config one of configs/ds_*.json", True)
    parts = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    nvme = [key for key, device in parts.items() if device == "nvme"]
    reported = ", ".join(f"{key} to {device}" for key, device in parts.items() if device != "none") or "no offload"
    text = f"{file}: ZeRO {zero.get('stage', 0)}, {reported}"
    if nvme and shutil.which("g++") is None:
        return Finding("DeepSpeed file", BROKEN, f"{text}: nvme needs the operator async_io, which g++ compiles",
                       "apt install g++ libaio-dev", True)  # fmt: skip
    return Finding("DeepSpeed file", OK, text)


def can_train(found: list[Finding]) -> bool:
    """Whether everything that training needs is there."""
    return not any(f.needed and f.state != OK for f in found)


def render(found: list[Finding]) -> str:
    """The findings as text, and after them what to do."""
    lines = [f"{f.name:<22}{coloured(f'{f.state:<9}', _COLOURS[f.state])}{f.text}" for f in found]
    to_do = [f"  {f.name}{' (needed)' if f.needed else ''}: {f.fix}" for f in found if f.fix]
    lines += ["", "to repair what is missing:", *to_do] if to_do else []
    if can_train(found):
        verdict = coloured("training can run", console.GOOD)
    else:
        verdict = f"{coloured('TRAINING CANNOT RUN', console.BAD)}: see (needed) above"
    return "\n".join([*lines, "", verdict])


def run(ds_file: Path | None, as_json: bool) -> int:
    """Program ``smpo doctor``; returns the exit status: 0 when training can run, 1 when something needed is missing."""
    with json_report(as_json) as facts:
        found = findings(ds_file)
        facts |= {"can_train": can_train(found), "findings": found}
        print(render(found))
    return programs.DONE if can_train(found) else programs.UNMET
