"""Probes of this machine: of libraries, each in its own process, and of the network."""

from __future__ import annotations

import http.client
import importlib.util
import json
import subprocess
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

PROBE_SECONDS = 120.0  # a compiler may have to start; a healthy machine takes a few
OK, MISSING, BROKEN = "ok", "missing", "broken"
OLDEST_PYTHON = (3, 11)
NEEDED = ("torch", "diffusers", "transformers", "pyarrow", "pydantic", "safetensors", "PIL", "matplotlib")
_DISTRIBUTIONS = {"PIL": "pillow", "flash_attn_interface": "flash_attn_3"}  # where the name differs


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
    """Back-ends of scaled_dot_product_attention at a UNet's shapes: 'ok', or the reason."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
    query = torch.randn(1, 5, 64, 64, device=device, dtype=torch.bfloat16)
    reported = {}
    for name, backend in backends.items():
        try:
            with sdpa_kernel([backend]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.nn.functional.scaled_dot_product_attention(query, query, query)
            reported[name] = OK
        except RuntimeError as error:
            reported[name] = str(error).strip().splitlines()[0]
    return reported


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
    reported = {"compatible": library.ops.__compatible_ops__, "installed": library.git_version_info.installed_ops}
    ops = {what: sorted(name for name, there in table.items() if there) for what, table in reported.items()}
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


def _import_probe(name: str) -> Callable[[], dict[str, Any]]:
    def probe() -> dict[str, Any]:
        importlib.import_module(name)
        return {"version": installed_version(name)}

    return probe


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _probe_torch,
    "triton": _probe_triton,
    "deepspeed": _probe_deepspeed,
    "bitsandbytes": _probe_bitsandbytes,
    "xformers": _probe_xformers,
    "flash_attn_interface": _import_probe("flash_attn_interface"),
    "peft": _import_probe("peft"),
    "torchao": _import_probe("torchao"),
}


def installed_version(name: str) -> str:
    """The version of a package, by the name that it is imported under."""
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def run_probe(name: str, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """What a probe found: ``state`` OK and its values, or ``state`` MISSING or BROKEN and ``why``."""
    if importlib.util.find_spec(name) is None:
        return {"state": MISSING, "why": "not installed"}
    words = [sys.executable, "-m", "smpo_fast.planning.probes", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"state": BROKEN, "why": f"did not finish within {seconds:g} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (ValueError, IndexError, TypeError):
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"state": BROKEN, "why": f"importing it ended the process ({ended}): {said}"}


def unreachable(address: str, seconds: float) -> str:
    """Why a web server gives no answer within some seconds; empty if it answers, whatever it says."""
    outcome: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds)
            outcome.append("")
        except urllib.error.HTTPError:  # an answer
            outcome.append("")
        except (OSError, ValueError, http.client.HTTPException) as error:
            outcome.append(str(getattr(error, "reason", error)))

    asking = threading.Thread(target=ask, daemon=True)  # resolving a name has no time limit of its own
    asking.start()
    asking.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


def _print_answer(name: str) -> None:
    """In the probe's process: print one line of JSON, whatever happens."""
    try:
        found = {"state": OK, **PROBES[name]()}
    except BaseException as error:
        traceback.print_exc()
        found = {"state": BROKEN, "why": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    _print_answer(sys.argv[1])
