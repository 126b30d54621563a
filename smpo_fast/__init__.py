"""SmPO-Diffusion: align SDXL and SD1.5 with preference pairs.

What is public is listed in ``__all__`` and described in docs/api.md; a name is imported when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smpo_fast import kernels
    from smpo_fast.api import Inverted, align, invert, load_recipe, score_images, score_pairs
    from smpo_fast.common.errors import UserError
    from smpo_fast.config.schema import Config
    from smpo_fast.method.objective import OBJECTIVES, Losses, Objective, pair_errors

__version__ = "0.1.0"
__all__ = [
    "OBJECTIVES", "Config", "Inverted", "Losses", "Objective", "UserError", "__version__", "align", "invert", "kernels",
    "load_recipe", "pair_errors", "score_images", "score_pairs",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("Inverted", "align", "invert", "load_recipe", "score_images", "score_pairs"), "smpo_fast.api"),
    **dict.fromkeys(("OBJECTIVES", "Losses", "Objective", "pair_errors"), "smpo_fast.method.objective"),
    "Config": "smpo_fast.config.schema",
    "UserError": "smpo_fast.common.errors",
}

# Both warn at import of what training never uses: picture processors of torchvision, 4-bit matrix products on a CPU.
for _name in ("transformers.utils.import_utils", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("smpo_fast.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'smpo_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
