"""The no-gradient call: whatever makes it fast, it predicts what the plain call predicts; approximations stay near."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.recorded_graphs import use_recorded_graphs
from torch.utils.flop_counter import FlopCounterMode

from smpo_fast.common.errors import ConfigError
from smpo_fast.config import loading
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import attention, load, locate
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference import checks, compilation, cuda_graphs, float8
from smpo_fast.models.inference.caller import InferenceCaller, batch_sizes, drop_copies
from smpo_fast.models.locate import ModelSource

CPU = torch.device("cpu")
PAIRS = 5


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    settings = loading.load()
    source = locate.find(settings.model)
    unet = load.load_unet(source, settings.model, torch.float32, CPU).eval()
    return Denoiser(unet, source, locate.schedule_of(source, settings.inversion), "fp32", CPU)


def inputs(count: int = PAIRS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, 8, 8, generator=g)
    time = torch.randint(0, 1000, (count,), generator=g)
    cond = Conditioning(
        torch.randn(count, 16, 80, generator=g), torch.randn(count, 48, generator=g), torch.full((count, 6), 32.0)
    )
    return x, time, cond


def caller(denoiser: Denoiser, chunk: int = PAIRS, **words: Any) -> InferenceCaller:
    values: dict[str, dict[str, Any]] = {"model": {}, "inversion": {}}
    for key, value in words.items():
        values["inversion" if key in ("fp8", "reuse_deep") else "model"][key] = value
    settings = loading.from_dict(values)
    made = InferenceCaller(denoiser, settings.model, settings.inversion, chunk=chunk)
    made.weights_changed()
    return made


def predictor(made: InferenceCaller, cond: Conditioning) -> Callable[..., torch.Tensor]:
    """The network for a chunk, called with a timestep for each pair."""
    inner = made.predictor(cond)
    return lambda x, time, **words: inner(x, time[:, None].expand(-1, 2).contiguous(), **words)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def test_predicts_what_the_plain_call_predicts_for_any_prefix(denoiser: Denoiser) -> None:
    x, time, cond = inputs()
    eps = predictor(caller(denoiser), cond)
    for n in (PAIRS, 3, 1):
        wanted = denoiser.eps(x[:n], time[:n], cond.take(slice(0, n)))
        assert relative(eps(x[:n], time[:n]), wanted) < 1e-5


@torch.no_grad()
def test_keys_and_values_are_computed_once_for_a_chunk_and_pair(denoiser: Denoiser) -> None:
    x, time, cond = inputs()
    counted: list[int] = []
    hooks = [
        getattr(m, name).register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
        for n, m in denoiser.unet.named_modules() if n.endswith("attn2") for name in ("to_k", "to_v")
    ]  # fmt: skip
    try:
        eps = predictor(caller(denoiser), cond)
        for _ in range(3):
            eps(x, time)
    finally:
        for hook in hooks:
            hook.remove()
    assert counted == [PAIRS] * len(hooks), "once, and a row a pair: its pictures share the prompt"


@torch.no_grad()
def test_leaves_the_network_as_it_was(denoiser: Denoiser) -> None:
    x, time, cond = inputs()
    before = denoiser.eps(x, time, cond)
    eps = predictor(caller(denoiser, fp8=True, reuse_deep=True), cond)
    eps(x, time), eps(x, time, refinement=True)
    assert torch.equal(denoiser.eps(x, time, cond), before)
    assert not any("forward" in vars(m) or getattr(m, "cached_key_value", None) for m in denoiser.unet.modules())


@torch.no_grad()
def test_chunks_of_other_prompts_do_not_see_each_other(denoiser: Denoiser) -> None:
    made = caller(denoiser)
    (x, time, cond), (_, _, other) = inputs(), inputs(seed=1)
    first, second = predictor(made, cond), predictor(made, other)
    assert relative(first(x, time), denoiser.eps(x, time, cond)) < 1e-5
    assert relative(second(x, time), denoiser.eps(x, time, other)) < 1e-5


@torch.no_grad()
def test_weights_updated_in_place_are_seen(denoiser: Denoiser) -> None:
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    x, time, cond = inputs()
    made = caller(mine, fp8=True)
    exact = caller(mine)
    before = predictor(made, cond)(x, time), predictor(exact, cond)(x, time)
    for p in mine.unet.parameters():
        p.mul_(1.05)
    made.weights_changed()
    wanted = mine.eps(x, time, cond)
    assert relative(predictor(exact, cond)(x, time), wanted) < 1e-5 < relative(before[1], wanted)
    assert relative(predictor(made, cond)(x, time), wanted) < 0.5 * relative(before[0], wanted)


@torch.no_grad()
def test_float8_weights_are_rounded_again_when_the_weights_have_changed(denoiser: Denoiser) -> None:
    """Bit for bit those of a new caller; until it is told, a caller keeps the ones it has."""
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    x, time, cond = inputs()
    made = caller(mine, fp8=True)
    before = predictor(made, cond)(x, time)
    blocks = [m for m in mine.unet.modules() if type(m).__name__ == "FeedForward"]
    for p in (p for block in blocks for p in block.parameters() if p.ndim == 2):
        p.mul_(1.2)
    assert torch.equal(predictor(made, cond)(x, time), before), "only float8 layers have changed, and they are stale"
    made.weights_changed()
    after = predictor(made, cond)(x, time)
    assert not torch.equal(after, before)
    fresh = copy.copy(mine)
    fresh.unet = copy.deepcopy(mine.unet)
    for module in fresh.unet.modules():
        vars(module).pop("float8_weight", None)
    assert torch.equal(after, predictor(caller(fresh, fp8=True), cond)(x, time))


@pytest.mark.parametrize("kind", ["sd15", "velocity"])
@torch.no_grad()
def test_other_networks(kind: str) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    attention.set_attention([unet], "sdpa", CPU)
    folder: Any = None
    prediction = "v_prediction" if kind == "velocity" else "epsilon"
    source = ModelSource(folder, folder, folder, "sd15", prediction, {}, None)
    made = Denoiser(unet, source, NoiseSchedule.from_config({"num_train_timesteps": 1000}), "fp32", CPU)
    x, time, cond = inputs()
    cond = Conditioning(cond.prompt[..., :24])
    assert relative(predictor(caller(made), cond)(x, time), made.eps(x, time, cond)) < 1e-5
    assert caller(made).input_dtype is torch.float32
    made.dtype = torch.bfloat16
    wanted = torch.float32 if kind == "velocity" else torch.bfloat16  # the noise that v implies is computed from x
    assert caller(made).input_dtype is wanted
    made.dtype = torch.float32
    eps = predictor(caller(made, reuse_deep=True), cond)
    full = eps(x, time)
    assert relative(eps(x, time, refinement=True), full) < 1e-5, "at the same x the deep features are the true ones"


@torch.no_grad()
def test_float8_is_near_and_not_equal(denoiser: Denoiser) -> None:
    x, time, cond = inputs()
    error = relative(predictor(caller(denoiser, fp8=True), cond)(x, time), denoiser.eps(x, time, cond))
    assert 1e-4 < error < 0.1


@torch.no_grad()
def test_shallow_calls_do_little_work_and_stay_near(denoiser: Denoiser) -> None:
    x, time, cond = inputs()
    eps = predictor(caller(denoiser, reuse_deep=True), cond)
    with FlopCounterMode(display=False) as whole:
        eps(x, time)
    near = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with FlopCounterMode(display=False) as shallow:
        found = eps(near[:3], time[:3], refinement=True)
    assert shallow.get_total_flops() < 0.6 * whole.get_total_flops() * 3 / PAIRS
    wanted = denoiser.eps(near[:3], time[:3], cond.take(slice(0, 3)))
    stale = denoiser.eps(x[:3], time[:3], cond.take(slice(0, 3)))
    assert 0 < relative(found, wanted) < relative(stale, wanted)


@torch.no_grad()
def test_shallow_calls_take_the_features_of_the_last_full_one(denoiser: Denoiser) -> None:
    (first, _, _), (x, time, cond) = inputs(seed=1), inputs()
    eps, fresh = (predictor(caller(denoiser, reuse_deep=True), cond) for _ in range(2))
    eps(first, time)
    for predict in (eps, fresh):
        predict(x, time)
    assert torch.equal(eps(x + 0.05, time, refinement=True), fresh(x + 0.05, time, refinement=True))


@torch.no_grad()
def test_under_deepspeed_the_inversion_has_channels_last_copies_of_the_convolutions(denoiser: Denoiser) -> None:
    """The network's own weights, which DeepSpeed flattened, stay as they are; the copies follow them when told."""
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    x, time, cond = inputs()
    convolutions = [m for m in mine.unet.modules() if isinstance(m, torch.nn.Conv2d)]
    own, turned = [m.weight for m in convolutions], []

    def note(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        turned.append(out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous())

    hooks = [m.register_forward_hook(note) for m in convolutions]
    made = caller(mine, channels_last=True)
    eps, wanted = predictor(made, cond), predictor(caller(mine), cond)
    found = eps(x, time)
    assert len(turned) == len(convolutions) and all(turned)
    for hook in hooks:
        hook.remove()
    assert relative(found, wanted(x, time)) < 1e-5
    assert all(m.weight is w and w.is_contiguous() for m, w in zip(convolutions, own, strict=True))
    places = [m.inversion_weight.data_ptr() for m in convolutions]
    before = eps(x, time)
    for weight in own:
        weight.mul_(1.05)
    assert torch.equal(eps(x, time), before)
    made.weights_changed()
    assert relative(eps(x, time), wanted(x, time)) < 1e-5 < relative(before, wanted(x, time))
    assert places == [m.inversion_weight.data_ptr() for m in convolutions], "captured graphs read this memory"


@torch.no_grad()
def test_merged_projections_agree_and_follow_the_weights(denoiser: Denoiser) -> None:
    """To the rounding of fp32; the network itself, as policy and reference call it, keeps its three projections."""
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    x, time, cond = inputs()
    attentions = [m for name, m in mine.unet.named_modules() if name.endswith("attn1")]
    called: list[Any] = []
    for attn in attentions:
        attn.to_q.register_forward_hook(lambda m, args, out: called.append(m))
    before = mine.eps(x, time, cond)
    assert len(called) == len(attentions)
    made = caller(mine, merge_qkv=True)
    eps, wanted = predictor(made, cond), predictor(caller(mine), cond)
    called.clear()
    assert relative(eps(x, time), wanted(x, time)) < 1e-6
    assert len(called) == len(attentions), "of the call without merged projections"
    assert torch.equal(mine.eps(x, time, cond), before)
    places, stale = [attn.inversion_qkv.data_ptr() for attn in attentions], eps(x, time)
    for attn in attentions:
        attn.to_q.weight.mul_(1.5), attn.to_v.weight.mul_(0.9)
    assert torch.equal(eps(x, time), stale)
    made.weights_changed()
    assert relative(eps(x, time), wanted(x, time)) < 1e-6 < relative(stale, wanted(x, time))
    assert places == [attn.inversion_qkv.data_ptr() for attn in attentions], "captured graphs read this memory"
    drop_copies(mine.unet)
    assert not any(hasattr(attn, "inversion_qkv") for attn in attentions)


@torch.no_grad()
def test_merged_projections_round_no_further_than_half_precision(denoiser: Denoiser) -> None:
    half = copy.copy(denoiser)
    half.unet, half.dtype = copy.deepcopy(denoiser.unet).bfloat16(), torch.bfloat16
    x, time, cond = inputs()
    exact = denoiser.eps(x, time, cond)
    eager, merged = (predictor(caller(half, merge_qkv=merge), cond)(x, time) for merge in (False, True))
    assert 0 < relative(merged, exact) < 2 * relative(eager, exact)


@torch.no_grad()
def test_adapted_projections_are_not_merged(denoiser: Denoiser) -> None:
    peft = pytest.importorskip("peft")
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    first = next(name for name, _ in mine.unet.named_modules() if name.endswith("attn1"))
    mine.unet.add_adapter(peft.LoraConfig(r=2, target_modules=[f"{first}.to_v"], init_lora_weights=False))
    x, time, cond = inputs()
    assert relative(predictor(caller(mine, merge_qkv=True), cond)(x, time), mine.eps(x, time, cond)) < 1e-5
    adapted = {name for name, m in mine.unet.named_modules() if name.endswith("attn1") and "inversion_qkv" in vars(m)}
    assert adapted and first not in adapted
    mine.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]), adapter_name="all")
    with pytest.raises(ConfigError, match="matches no self-attention"):
        caller(mine, merge_qkv=True)


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_adapters_are_rounded_for_the_inversion_only(denoiser: Denoiser, dora: bool) -> None:
    """In float32 an adapter turns its layer's input into float32; the rounding is that of half precision elsewhere."""
    peft = pytest.importorskip("peft")
    mine = copy.copy(denoiser)
    mine.unet, mine.dtype = copy.deepcopy(denoiser.unet).bfloat16(), torch.bfloat16
    words = {"target_modules": ["to_q", "to_v", "ff.net.2", "conv1"], "init_lora_weights": False, "use_dora": dora}
    torch.manual_seed(0)
    mine.unet.add_adapter(peft.LoraConfig(r=4, **words))
    adapters = [m for name, m in mine.unet.named_modules() if name.endswith((".lora_A.default", ".lora_B.default"))]
    for m in mine.unet.modules():
        for p in getattr(m, "lora_magnitude_vector", {}).values() if dora else ():
            p.weight.data = p.weight.data.float()
    seen: list[torch.dtype] = []
    for m in adapters:
        m.weight.data = 0.1 * m.weight.data.float()
        m.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    own = [m.weight for m in adapters]
    x, time, cond = inputs()
    exact = mine.eps(x, time, cond)
    assert set(seen) == {torch.float32}
    eps = predictor(caller(mine), cond)
    seen.clear()
    error = relative(eps(x, time), exact)
    assert (set(seen) == {torch.bfloat16}) == (not dora), "DoRA measures its weights, and keeps them"
    assert all(m.weight is weight and weight.dtype is torch.float32 for m, weight in zip(adapters, own, strict=True))
    assert torch.equal(mine.eps(x, time, cond), exact)
    mine.unet.disable_adapters()
    rounding = relative(mine.eps(x, time, cond), denoiser.eps(x, time, cond))
    assert error < 2 * rounding, "no more than half precision costs in the rest of the network"


@torch.no_grad()
def test_lora_and_unknown_processors_work(denoiser: Denoiser) -> None:
    peft = pytest.importorskip("peft")
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    mine.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    x, time, cond = inputs()
    assert relative(predictor(caller(mine), cond)(x, time), mine.eps(x, time, cond)) < 1e-5
    attention.set_attention([mine.unet], "eager", CPU)
    assert relative(predictor(caller(mine), cond)(x, time), mine.eps(x, time, cond)) < 1e-5


def test_sizes_are_few_and_reach_the_chunk() -> None:
    assert batch_sizes(32) == [8, 16, 24, 32]
    assert batch_sizes(1) == [1]
    assert batch_sizes(5) == [2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_compiled_calls_agree_at_all_sizes_and_see_new_weights(
    denoiser: Denoiser, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the compiler's tracing at least; its code generation takes minutes on a CPU."""
    graphs = traced(monkeypatch, backend)
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    x, time, cond = inputs()
    eager = predictor(caller(mine), cond)
    made = caller(mine, compile="inversion")
    eps = predictor(made, cond)
    compiled = 0
    for n in (3, 5, 2, 4):
        assert relative(eps(x[:n], time[:n]), eager(x[:n], time[:n])) < 1e-4
        compiled = compiled or len(graphs)
    for p in mine.unet.parameters():
        p.mul_(1.02)
    changed = predictor(made, cond)(x, time)
    assert relative(changed, predictor(caller(mine), cond)(x, time)) < 1e-4
    assert len(graphs) == compiled, "neither other sizes nor new weights in place need new code"
    assert (compiled > 0) == (backend == "eager") and all(m._compiled_call_impl is None for m in mine.unet.modules())


def traced(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> list[Any]:
    """No graph may break; returns the list of the graphs made, where the compiler only traces ("eager")."""
    graphs: list[Any] = []

    def compiler(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    chosen: Any = compiler if backend == "eager" else backend
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=chosen, fullgraph=True))
    return graphs


@pytest.mark.parametrize(
    "words",
    [{"fp8": True, "reuse_deep": True}, pytest.param({"merge_qkv": True, "reuse_deep": True}, marks=pytest.mark.slow)],
    ids=str,
)
@torch.no_grad()
def test_copies_of_weights_are_compiled_once(
    denoiser: Denoiser, words: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float8 pays only when its rounding is fused: neither the next call nor the next window may make new code."""
    graphs = traced(monkeypatch)
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    x, time, cond = inputs()
    made = caller(mine, compile="inversion", **words)
    eps = predictor(made, cond)
    first = eps(x, time), eps(x, time, refinement=True)
    compiled = len(graphs)
    made.weights_changed()
    eps = predictor(made, cond)
    assert torch.equal(eps(x, time), first[0]) and torch.equal(eps(x, time, refinement=True), first[1])
    assert len(graphs) == compiled > 0
    words = {**words, "reuse_deep": False}
    assert relative(first[0], predictor(caller(mine, **words), cond)(x, time)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_training_equal_weights_predict_equally(denoiser: Denoiser, dtype: torch.dtype) -> None:
    x, time, cond = inputs()
    policy, reference = (copy.copy(denoiser) for _ in range(2))
    for d in (policy, reference):
        d.unet, d.dtype = copy.deepcopy(denoiser.unet).to(dtype), dtype
    compilation.compile_training(policy.unet, reference.unet)
    policy.unet.train()
    predicted = policy(x, time, cond)
    with torch.no_grad(), compilation.through_policy_code(loading.from_dict({"model": {"compile": "all"}}).model):
        frozen = reference(x, time, cond).detach()
    assert torch.equal(predicted, frozen)
    predicted.square().mean().backward()
    assert all(p.grad is not None for p in policy.unet.parameters())


@pytest.mark.parametrize(
    ("words", "stage", "said"),
    [
        ({"model": {"cuda_graphs": True}}, 0, "CUDA device"),
        ({"model": {"compile": "inversion"}}, 3, "stage 3"),
        ({"model": {"channels_last": True}}, 3, "use ZeRO stage 2"),
        ({"model": {"channels_last": True}, "inversion": {"source": "noise"}}, 2, "channels_last has no effect"),
        ({"model": {"merge_qkv": True}}, 3, "stage 3"),
        ({"model": {"merge_qkv": True}, "inversion": {"source": "noise"}}, 0, "merge_qkv has no effect"),
        ({"model": {"merge_qkv": True, "attention": "eager"}}, 0, "no effect on model.attention = 'eager'"),
        ({"model": {"merge_qkv": True}, "inversion": {"fp8": True}}, 0, "choose one"),
        ({"inversion": {"fp8": True}}, 3, "stage 3"),
        ({"inversion": {"reuse_deep": True, "solver": "ddim"}}, 0, "nothing to reuse"),
        ({"inversion": {"fp8": True, "source": "noise"}}, 0, "has no effect"),
        ({"inversion": {"fp8": True, "source": "noise"}, "model": {"compile": "all"}}, 0, "fp8 has no effect"),
        ({"inversion": {"source": "noise"}, "model": {"compile": "inversion"}}, 0, "model.compile has no effect"),
        ({"model": {"compile": "all"}, "lora": {"rank": 4}}, 0, "LoRA"),
    ],
)
def test_what_cannot_run_is_refused_by_name(words: dict[str, Any], stage: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checks.check(loading.from_dict(words), CPU, stage)


@pytest.mark.parametrize("words", [{}, {"reuse_deep": True}, {"merge_qkv": True}], ids=str)
@torch.no_grad()
def test_replayed_graphs_equal_plain_calls_at_any_size_and_shape_of_images(
    denoiser: Denoiser, words: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small chunks before large ones, two shapes in turn, and weights that change in place."""
    streams = use_recorded_graphs(monkeypatch)
    cuda_graphs._side_stream.cache_clear()
    mine = copy.copy(denoiser)
    mine.unet = copy.deepcopy(denoiser.unet)
    made, plain = caller(mine, cuda_graphs=True, **words), caller(mine, **words)
    for count, height, scale in ((2, 8, 1.0), (5, 8, 1.0), (5, 12, 1.02), (3, 8, 1.0), (2, 12, 1.02), (5, 8, 1.0)):
        for p in mine.unet.parameters():
            p.mul_(scale)
        made.weights_changed()
        x, time, cond = inputs(count, seed=count + height)
        x = torch.cat([x, x], dim=3)[:, :, :, :height]
        eps, wanted = predictor(made, cond), predictor(plain, cond)
        for refinement in (False, True):
            found = eps(x, time, refinement=refinement)
            assert torch.equal(found, wanted(x, time, refinement=refinement)), (count, height, refinement)
    assert len(streams) == 1, "every stream has library workspaces of its own"


def test_float8_is_refused_on_a_gpu_where_it_would_be_slower_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    eager = loading.from_dict({"inversion": {"fp8": True}})
    with pytest.raises(ConfigError, match=r"slower than half precision.*set model.compile"):
        checks.check(eager, device, -1)
    checks.check(eager, CPU, -1)  # where its error is studied
    fused = loading.from_dict({"inversion": {"fp8": True}, "model": {"compile": "inversion"}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"8\.9"):
        checks.check(fused, device, -1)

    def asserts(*args: Any) -> Any:
        raise RuntimeError("INTERNAL ASSERT FAILED\nat Blas.cpp")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: torch.zeros(sizes))
    monkeypatch.setattr(float8, "_product", asserts)
    with pytest.raises(ConfigError, match=r"with a scale for each row on this GPU \(INTERNAL ASSERT FAILED\)"):
        checks.check(fused, torch.device("cuda"), -1)


@torch.no_grad()
def test_float8_on_a_cpu_needs_no_float8_product(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", None)  # PyTorch 2.11 has none there with a scale for each row
    x, time, cond = inputs()
    assert predictor(caller(denoiser, fp8=True), cond)(x, time).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", [{}, {"reuse_deep": True}, {"merge_qkv": True}], ids=str)
@torch.no_grad()
def test_replayed_graphs_agree_and_see_new_weights(denoiser: Denoiser, words: dict[str, bool]) -> None:
    device = torch.device("cuda")
    settings = loading.load()
    unet = copy.deepcopy(denoiser.unet).to(device)
    source = locate.find(settings.model)
    mine = Denoiser(unet, source, locate.schedule_of(source, settings.inversion), "fp32", device)
    x, time, cond = inputs()
    x, time, cond = x.to(device), time.to(device), cond.map(lambda t: t.to(device))
    made, plain = caller(mine, cuda_graphs=True, **words), caller(mine, **words)
    for scale in (1.0, 1.02):
        for p in unet.parameters():
            p.mul_(scale)
        made.weights_changed()
        eps, wanted = predictor(made, cond), predictor(plain, cond)
        for n in (5, 4, 2):
            for refinement in (False, True):
                assert (
                    relative(
                        eps(x[:n], time[:n], refinement=refinement), wanted(x[:n], time[:n], refinement=refinement)
                    )
                    < 1e-4
                )
