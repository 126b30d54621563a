"""Triton, or the advice to install it: for the modules that cannot be imported without it."""

try:
    import triton
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'the fused kernels need Triton, which is not installed: pip install "smpo-fast[kernels]" (Linux); '
        "everything else runs without them",
        name=error.name,
    ) from error
import triton.language as tl
from triton.language.extra import libdevice

__all__ = ["libdevice", "tl", "triton"]
