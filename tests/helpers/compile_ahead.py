"""Script: compile every kernel for GPUs this machine does not have, at SDXL's shapes, and print statistics as JSON.

The launchers are called with meta tensors, their launches are intercepted, and each kernel is compiled for the types
and divisibilities of its arguments, as Triton would. Run it without TRITON_INTERPRET:

    python tests/helpers/compile_ahead.py 80 90
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smpo_fast.kernels import adamw8bit, ema, geglu, geglu_linear, group_norm_silu, layer_norm, pair_loss, renoise_step

POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
Launch = tuple[Any, dict[str, Any]]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=form)


def images(pairs: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return meta(pairs, 2, 4, 128, 128, dtype=dtype)


def numbers(count: int = 4) -> Tensor:
    return meta(count, dtype=torch.float32)


def pair_loss_launches(pairs: int, dtype: torch.dtype, *, turned: bool = False) -> None:
    policy, target, weight = images(pairs, dtype), images(pairs), numbers(pairs)
    if turned:
        policy = meta(pairs, 2, 128, 128, 4, dtype=dtype).permute(0, 1, 4, 2, 3)
    pair_loss._pair_loss_fwd(policy, policy, target, weight, 5000.0, 0)
    pair_loss._pair_loss_bwd(weight, weight, policy, target)


def pair_errors_launches(pairs: int, *, given: bool) -> None:
    """pair_loss's kernel without the reference's predictions: errors only, or with the reference's errors given."""
    policy, target, weight = images(pairs, BF16), images(pairs), numbers(pairs)
    if given:
        pair_loss._pair_loss_fwd(policy, meta(pairs, 2, dtype=FP32), target, weight, 5000.0, 0)
    else:
        pair_loss._pair_errors(policy, target)


def renoise_launches(turned: bool) -> None:
    x, x_0, total, c = images(dtype=torch.bfloat16), images(), images(), numbers()
    estimate = meta(4, 2, 128, 128, 4).permute(0, 1, 4, 2, 3) if turned else x
    renoise_step._predict(x, x_0, total, c, c, estimate, c, None)
    renoise_step._correct(x, x_0, total, c, c, estimate, c, estimate, c, c)


def group_norm_launches(count: int, channels: int, side: int, dtype: torch.dtype, last: bool) -> None:
    x, w = meta(count, channels, side, side, dtype=dtype, last=last), meta(channels, dtype=dtype)
    stats = meta(count, 32, dtype=torch.float32)
    group_norm_silu._group_norm_fwd(x, w, w, 32, 1e-5, True)
    group_norm_silu._group_norm_bwd(x, x, w, w, stats, stats, 32, True)


def layer_norm_launches(rows: int, features: int, dtype: torch.dtype, residual: bool) -> None:
    x, w, stats = meta(rows, features, dtype=dtype), meta(features, dtype=dtype), meta(rows, dtype=torch.float32)
    layer_norm._layer_norm_fwd(x, x if residual else None, w, w, 1e-5)
    layer_norm._layer_norm_bwd(x, x if residual else None, x, w, stats, stats, True)


def geglu_launches(features: int, dtype: torch.dtype) -> None:
    x = meta(2048, 2 * features, dtype=dtype)
    geglu._geglu_fwd(x)
    geglu._geglu_bwd(meta(2048, features, dtype=dtype), x)


def geglu_linear_launches(
    rows: int, depth: int, features: int, dtype: torch.dtype, shared: int, *, bias: bool = True
) -> None:
    geglu_linear._shared_memory = lambda x: shared
    weight, b = meta(2 * features, depth, dtype=dtype), meta(2 * features, dtype=dtype)
    geglu_linear._geglu_linear(meta(rows, depth, dtype=dtype), weight, b if bias else None)


def adamw8bit_launches(weight: torch.dtype, grad: torch.dtype, n: int = 2048 * 1280, *, cut: bool = False) -> None:
    """A whole parameter, or a slice that shares its first block with another slice."""
    state, joint = adamw8bit.adamw8bit_state(n, "meta", 1000 if cut else 0), meta(1, dtype=FP32)
    betas = {"beta1": 0.9, "beta2": 0.999, "grad_scale": meta(1, dtype=FP32), "offset": 1000 if cut else 0}
    adamw8bit._step(
        meta(n, dtype=weight), meta(n, dtype=grad), *state, **betas, lr=1e-5, eps=1e-8, weight_decay=0.01, step=3,
        seed=2**40, m_max=joint if cut else None, v_max=joint if cut else None,
    )  # fmt: skip
    adamw8bit._block_max(meta(n, dtype=grad), *state, **betas)


def ema_launches(average: torch.dtype, weight: torch.dtype, n: int = 2048 * 1280, offset: int = 0) -> None:
    """Two slices of a parameter."""
    averages, weights = ([meta(n, dtype=dtype)] * 2 for dtype in (average, weight))
    ema._update(averages, weights, decay=0.999, step=3, seeds=[2**40] * 2, offsets=[offset] * 2)


BF16, FP32 = torch.bfloat16, torch.float32
SMALL_SHARED, LARGE_SHARED = 99 * 1024, 227 * 1024  # bytes a program may use on sm_89, and from sm_90 on
CASES: dict[str, Callable[[], None]] = {
    "pair_loss": lambda: pair_loss_launches(4, BF16),
    "pair_loss channels-last": lambda: pair_loss_launches(4, BF16, turned=True),
    "pair_loss errors given": lambda: pair_errors_launches(4, given=True),
    "pair_errors": lambda: pair_errors_launches(4, given=False),
    "renoise_step": lambda: renoise_launches(turned=False),
    "renoise_step channels-last": lambda: renoise_launches(turned=True),
    "group_norm_silu 320": lambda: group_norm_launches(2, 320, 128, BF16, last=True),
    "group_norm_silu 1280": lambda: group_norm_launches(2, 1280, 32, BF16, last=True),
    "group_norm_silu contiguous": lambda: group_norm_launches(2, 320, 128, BF16, last=False),
    "layer_norm 640": lambda: layer_norm_launches(8192, 640, BF16, residual=False),
    "layer_norm add 1280": lambda: layer_norm_launches(2048, 1280, BF16, residual=True),
    "geglu": lambda: geglu_launches(5120, BF16),
    "geglu_linear": lambda: geglu_linear_launches(2048, 1280, 5120, BF16, SMALL_SHARED),
    "geglu_linear wide": lambda: geglu_linear_launches(2048, 1280, 5120, BF16, LARGE_SHARED),
    "adamw8bit fp32": lambda: adamw8bit_launches(FP32, FP32),
    "adamw8bit bf16": lambda: adamw8bit_launches(BF16, FP32),
    "adamw8bit all bf16": lambda: adamw8bit_launches(BF16, BF16),
    "ema fp32": lambda: ema_launches(FP32, FP32),
    "ema bf16": lambda: ema_launches(BF16, FP32),
}
# compiled in the slow tests: one pair, one image (Triton makes a size of 1 a constant), fp32, odd sizes
EDGE_CASES: dict[str, Callable[[], None]] = {
    "pair_loss one": lambda: pair_loss_launches(1, FP32),
    "group_norm_silu one": lambda: group_norm_launches(1, 32, 1, FP32, last=True),
    "group_norm_silu fp32": lambda: group_norm_launches(2, 320, 128, FP32, last=True),
    "layer_norm one": lambda: layer_norm_launches(1, 1, FP32, residual=True),
    "layer_norm fp32": lambda: layer_norm_launches(2048, 1280, FP32, residual=True),
    "layer_norm widest": lambda: layer_norm_launches(64, 4096, FP32, residual=True),
    "geglu fp32": lambda: geglu_launches(5120, FP32),
    "geglu odd": lambda: geglu_launches(37, BF16),
    "geglu_linear fp16": lambda: geglu_linear_launches(8192, 640, 2560, torch.float16, LARGE_SHARED, bias=False),
    "geglu_linear fp32": lambda: geglu_linear_launches(2048, 1280, 5120, FP32, SMALL_SHARED),
    "geglu_linear few": lambda: geglu_linear_launches(64, 1280, 5120, BF16, SMALL_SHARED),
    "geglu_linear fewest": lambda: geglu_linear_launches(16, 1280, 5120, BF16, SMALL_SHARED),
    "geglu_linear odd": lambda: geglu_linear_launches(1, 37, 11, FP32, SMALL_SHARED),
    "geglu_linear one feature": lambda: geglu_linear_launches(40, 64, 1, BF16, SMALL_SHARED),
    "geglu_linear odd half": lambda: geglu_linear_launches(131, 37, 11, BF16, SMALL_SHARED),
    "adamw8bit cut": lambda: adamw8bit_launches(BF16, FP32, 4099, cut=True),
    "ema cut": lambda: ema_launches(BF16, BF16, 4099, 3),
}


# these choose tiles that need more shared memory than sm_80 and sm_89 have
FROM_90 = ("geglu_linear wide", "geglu_linear fp16")


def launches(make: Callable[[], None]) -> Iterator[Launch]:
    """The launches that ``make`` would do, each kernel once."""
    caught: dict[str, Launch] = {}

    def catch(kernel: Any, programs: int, *, device: torch.device, **arguments: Any) -> None:
        caught.setdefault(kernel.fn.__name__, (kernel, arguments))

    for kernel_module in (adamw8bit, ema, geglu, geglu_linear, group_norm_silu, layer_norm, pair_loss, renoise_step):
        kernel_module.launch = catch  # type: ignore[assignment]
    make()
    return iter(caught.values())


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """Triton's view of a launch: aligned pointers, constants for sizes of 1, and which sizes are multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)


def cuobjdump() -> str:
    return next(str(p) for p in Path(triton.__file__).parent.rglob("cuobjdump"))


def measure(launch: Launch, capability: int) -> dict[str, Any]:
    """One kernel's registers, bytes of spills and of shared memory, widths in bytes of its accesses, instructions."""
    kernel, arguments = launch
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    options.setdefault("enable_fp_fusion", True)  # as launch does
    assert options.keys() <= {"num_warps", "num_stages", "enable_fp_fusion"}, f"{kernel.fn.__name__} has no {options}"
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source(kernel, arguments), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump(), what, file.name], check=True, capture_output=True, text=True).stdout
            for what in ("-res-usage", "-sass")
        )
    spilled = {name: int(usage.partition(f" {name}:")[2].split()[0]) for name in ("STACK", "LOCAL")}
    registers = int(usage.partition("REG:")[2].split()[0])
    return {
        "registers": registers, "spills": sum(spilled.values()), "shared": built.metadata.shared,
        "warps": options["num_warps"],
        "loads": widths(built.asm["ptx"], "ld"), "stores": widths(built.asm["ptx"], "st"),
        "order": memory_order(built.asm["ptx"]), "instructions": instructions(code, arguments),
    }  # fmt: skip


def widths(ptx: str, access: str) -> dict[str, int]:
    """How many global loads or stores there are of each width in bytes."""
    found: dict[str, int] = {}
    for vector, bits in re.findall(rf"\b{access}\.global[\w.]*?(?:\.v(\d))?\.[busf](\d+)", ptx):
        width = str(int(vector or 1) * int(bits) // 8)
        found[width] = found.get(width, 0) + 1
    if access == "ld":  # asynchronous copies to shared memory
        for width in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\][^;]*?\], *(0x[0-9a-f]+|\d+)", ptx):
            found[str(int(width, 0))] = found.get(str(int(width, 0)), 0) + 1
    return found


def instructions(sass: str, arguments: dict[str, Any]) -> float | None:
    """Machine instructions that a thread executes per element of its tile, those of the loop if there is one.

    None for kernels that are not described by one tile.
    """
    sides = [[arguments.get(name) for name in names] for names in (("ROWS", "BLOCK"), ("Q", "CB", "P"))]
    tile = next((math.prod(found) for found in sides if None not in found), 0)
    if not tile:
        return None
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", sass)]
    jumps = [(int(to, 16), at) for at, text in code for to in re.findall(r"\bBRA\b[^;]*?(0x[0-9a-f]+)", text)]
    loops = [(to, at) for to, at in jumps if to < at]
    begin, end = loops[0] if loops else (0, code[-1][0])
    executed = sum(begin <= at <= end and not text.startswith(("NOP", "BRA")) for at, text in code)
    return executed * 32 * arguments["num_warps"] / tile


def memory_order(ptx: str) -> list[str]:
    """Barriers, atomics, global loads and stores in program order, without immediate repetitions."""
    found: list[str] = []
    for access in re.findall(r"\b(bar(?:rier)?\.(?:cta\.)?sync|(?:atom|red|ld|st)\.[\w.]+)", ptx):
        kind = access
        if access.startswith("bar"):
            kind = "barrier"
        elif "global" not in access:
            continue
        elif access.startswith(("ld", "st")):
            kind = ".".join([access[:2], *re.findall(r"volatile|acquire|release|\bc[ag]\b", access)])
        if found[-1:] != [kind]:
            found.append(kind)
    return found


def main(capabilities: list[int], which: dict[str, Callable[[], None]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for case, make in which.items():
        for launch in launches(make):
            name = f"{case}: {launch[0].fn.__name__.strip('_').removesuffix('_kernel')}"
            table[name] = {str(c): measure(launch, c) for c in capabilities if c >= 90 or case not in FROM_90}
    return table


if __name__ == "__main__":
    edges = "edges" in sys.argv
    chosen = [int(c) for c in sys.argv[1:] if c.isdigit()] or [80, 89, 90, 100]
    print(json.dumps(main(chosen, EDGE_CASES if edges else CASES)))
