"""Known GPUs, their memory and speed."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NamedTuple

import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.planning.planned_run import PlannedRun


class Gpu(NamedTuple):
    """A device to plan for. Speeds are from datasheets; 0: unknown."""

    name: str
    bytes: float  # as torch reports the total
    tflops: float = 0.0  # dense bfloat16, accumulated in fp32
    link_gb: float = 0.0  # GB/s that a GPU sends to others of its node
    host_gb: float = 25.0  # GB/s between host and device: pinned copies on PCIe 4 x16


# From NVIDIA's datasheets: dense figures (half of those "with sparsity"), for GeForce those with fp32 accumulation.
# Links: half of the NVLink total, which counts both directions; PCIe where there is no NVLink.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("B200", 191.5e9, 2250, 900, 50),
        Gpu("H200", 150.1e9, 989, 450, 50),
        Gpu("H100", 85.0e9, 989, 450, 50),
        Gpu("H100-PCIe", 85.0e9, 756, 50, 50),
        Gpu("A100-80GB", 85.1e9, 312, 300),
        Gpu("A800-80GB", 85.1e9, 312, 200),
        Gpu("A100-40GB", 42.3e9, 312, 300),
        Gpu("L40S", 47.7e9, 362, 20),
        Gpu("RTX-6000-Ada", 50.9e9, 364, 20),
        Gpu("A6000", 50.9e9, 155, 20),
        Gpu("RTX-5090", 33.7e9, 209, 50, 50),
        Gpu("RTX-4090", 25.3e9, 165, 20),
        Gpu("RTX-3090", 25.3e9, 71, 20),
        Gpu("RTX-4080", 16.9e9, 97, 20),
        Gpu("L4", 23.6e9, 121, 20),
    )
}
CPU = "this CPU"
NODE_GB = 25.0  # GB/s a GPU sends to other nodes (200 Gbit/s); assumed


def link_gb(run: PlannedRun, gpu: Gpu) -> float:
    """GB/s that a GPU of a run sends to the others; over the network if they are on several nodes."""
    return min(gpu.link_gb, NODE_GB) if run.ranks > run.per_node else gpu.link_gb


def find_gpu(name: str, gigabytes: float) -> Gpu:
    """The GPU of this name and memory, or the device of this machine. Raises ConfigError for an unknown name."""
    if name:
        found = next((gpu for key, gpu in GPUS.items() if key.lower() == name.lower().replace(" ", "-")), None)
        if found is None:
            raise ConfigError(f"--gpu {name}: known GPUs are {', '.join(GPUS)}; for another one give --gpu-memory GB")
    elif gigabytes:
        found = Gpu("GPU", 0)
    elif torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        speed = gpu_named(here.name) or Gpu("", 0)
        found = speed._replace(name=here.name, bytes=here.total_memory)
    else:
        found = Gpu(CPU, _host_bytes())
    return found._replace(bytes=gigabytes * 1e9) if gigabytes else found


def gpu_named(device: str) -> Gpu | None:
    """The known GPU that a device name of torch means: the longest key whose words all occur in it."""
    words = set(device.replace("-", " ").split())
    fitting = [gpu for key, gpu in GPUS.items() if set(key.split("-")) <= words]
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def driver() -> str:
    """The NVIDIA driver's version; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _host_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
