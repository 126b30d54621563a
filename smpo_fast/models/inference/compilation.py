"""Compiled transformer and residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from smpo_fast.config.schema import Model

# Compiled variants of a block: widths (13 among SDXL's residual blocks) x the few sizes that get code of their own, or
# with gradients all sizes. A block that reaches the limit would run uncompiled for the rest of the run.
_SPECIALISATIONS = 1024


def compiled_blocks(unet: nn.Module) -> list[nn.Module]:
    """The modules to compile: transformer and residual blocks; equal ones share their code."""
    return [m for m in unet.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")]


def _compiled_impl(block: nn.Module, *, dynamic: bool) -> Callable[..., Any]:
    """dynamic: one code for all batch sizes and image sizes, but for those that the compiler tells apart."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _SPECIALISATIONS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _SPECIALISATIONS)
    return torch.compile(block._call_impl, dynamic=dynamic)


@contextmanager
def compiled(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, the blocks run compiled; the code is kept for the next time."""
    before: list[Any] = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            if not hasattr(block, "inversion_impl"):
                object.__setattr__(block, "inversion_impl", _compiled_impl(block, dynamic=True))
            block._compiled_call_impl = cast(Any, block.inversion_impl)
        yield
    finally:
        for block, previous in zip(blocks, before, strict=True):
            block._compiled_call_impl = previous


def compile_training(*unets: nn.Module) -> None:
    """Compile the blocks of policy and reference for the whole run, for ``model.compile = "all"``.

    A graph compiled for gradients rounds differently from one without. So the reference is called with gradients
    enabled and with parameters that require them (see ``through_policy_code``): both networks then run the same code,
    and equal weights give bitwise equal predictions.
    """
    for unet in unets:
        unet.requires_grad_(True)
        for block in compiled_blocks(getattr(unet, "module", unet)):
            block._compiled_call_impl = _compiled_impl(block, dynamic=False)  # one size: the micro-batch


def through_policy_code(model: Model) -> AbstractContextManager[Any]:
    """Inside, a reference called under ``no_grad`` runs the policy's compiled code, where that was compiled."""
    return torch.enable_grad() if model.compile == "all" else nullcontext()
