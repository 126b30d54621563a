"""What is tried: the settings of speed, in the order of what they are worth on most GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from smpo_fast.config.schema import Config
from smpo_fast.models.kernel_patch import MODULES
from smpo_fast.planning import profiles
from smpo_fast.tuning.search import Coordinate, Values

CALL_SIZES, MICRO_SIZES = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16)
# What trying compiled code takes: a guess, so that a short measurement does not begin what it cannot end.
COMPILE_SECONDS, GRAPH_SECONDS = 60.0, 5.0
ATTENTIONS = ("flash", "cudnn", "efficient", "xformers")
# Approximations of the inversion. Float8 is slower than bf16 unless it is compiled, and has copies of its own.
APPROXIMATIONS: dict[str, dict[str, Any]] = {
    "fp8": {"inversion.fp8": True, "model.compile": "inversion", "model.merge_qkv": False},
    "reuse_deep": {"inversion.reuse_deep": True},
    "pec": {"inversion.solver": "pec"},
}


def coordinates(device_type: str, calls: int, examples: int) -> list[Coordinate]:
    """The coordinates of the search. calls, examples: pairs that a rank inverts and trains in a step, at most."""

    def sizes(key: str, of: Iterable[int], most: int, **others: Any) -> Callable[[Config], Iterable[Values]]:
        return lambda best: ({key: n, **others} for n in of if n <= most)

    call_sizes = sizes("batch.inversion_pairs", CALL_SIZES, calls)
    found = [
        Coordinate("pairs in a no-gradient call", call_sizes, rising=True),
        *(
            Coordinate(
                f"pairs in a micro-batch, {'with' if checkpointing else 'no'} checkpointing",
                sizes("batch.micro_pairs", MICRO_SIZES, examples, **{"model.gradient_checkpointing": checkpointing}),
                rising=True,
            )
            for checkpointing in (True, False)
        ),
    ]
    if device_type == "cuda":
        found.append(Coordinate("CUDA graphs", lambda best: [{"model.cuda_graphs": True}], setup=GRAPH_SECONDS))
        found.append(Coordinate("attention", lambda best: [{"model.attention": name} for name in ATTENTIONS]))
        found.append(Coordinate("merged query, key and value", lambda best: [{"model.merge_qkv": True}]))
    found.append(Coordinate("memory format", lambda best: [{"model.channels_last": True}]))
    if device_type == "cuda":
        found += [Coordinate(f"kernel {name}", _with_kernel(name)) for name in MODULES]
        found.append(Coordinate("compilation", lambda best: [{"model.compile": "inversion"}], setup=COMPILE_SECONDS))
        found.append(Coordinate("compilation of all", lambda best: [{"model.compile": "all"}], setup=COMPILE_SECONDS))
    return [*found, Coordinate("pairs in a no-gradient call, again", _neighbours(calls))]


def _with_kernel(name: str) -> Callable[[Config], Iterable[Values]]:
    def options(best: Config) -> Iterable[Values]:
        if name in best.kernels.listed:
            return
        enabled = {"kernels.enabled": [*best.kernels.listed, name]}
        yield enabled
        if name == "group_norm_silu":
            yield {**enabled, "model.channels_last": not best.model.channels_last}

    return options


def _neighbours(most: int) -> Callable[[Config], Iterable[Values]]:
    def options(best: Config) -> Iterable[Values]:
        now = best.batch.inversion_pairs
        return ({"batch.inversion_pairs": n} for n in (now // 2, now * 2) if 1 <= n <= most)

    return options


def without_given(found: Iterable[Coordinate], fixed: set[str]) -> list[Coordinate]:
    """The coordinates without options that would change settings in ``fixed``, by ``section.key``."""

    def keep(options: Callable[[Config], Iterable[Values]]) -> Callable[[Config], Iterable[Values]]:
        def free(best: Config) -> Iterable[Values]:
            return (
                values for values in options(best)
                if not any(name in fixed and profiles.get(best, name) != value for name, value in values.items())
            )  # fmt: skip

        return free

    return [Coordinate(c.name, keep(c.options), c.rising, c.setup) for c in found]
