"""The swap of kernels into a stock UNet and into the training step: same numbers, same names, and a way back."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from helpers.paths import CONFIGS
from helpers.toy import distance
from helpers.toy import settings as toy_settings
from torch import Tensor, nn

from smpo_fast import train
from smpo_fast.common.errors import ConfigError, EnvironmentProblem
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.engine import create, ds_config
from smpo_fast.method import inversion, objective
from smpo_fast.method.inversion import EAGER_OPS
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import kernel_patch, step_ops
from smpo_fast.training.run_log import read_metrics

SDXL = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15 = {"cross_attention_dim": 768}
TINY = {
    "sample_size": 4, "block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 2,
    "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _kernels_run_here() -> Iterator[None]:
    """Interpreted, or on a GPU whose other operations are exact and repeatable."""
    launch = pytest.importorskip("smpo_fast.kernels._launch")
    pytest.importorskip("triton")
    assert launch.INTERPRET or torch.cuda.is_available(), "set TRITON_INTERPRET=1"
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return UNet2DConditionModel(**{**TINY, **changes}).to(device)


def inputs(network: nn.Module, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    weight = next(network.parameters())
    g = torch.Generator().manual_seed(1)
    x, cond = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((count, 4, 4, 4), (count, 3, 8)))
    return x.to(weight), torch.arange(count, device=weight.device) * 400 + 3, cond.to(weight)


def forward(network: nn.Module) -> Tensor:
    return network(*inputs(network)).sample


def gradients(network: nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    out = forward(network)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out))
    return {"output": out.detach(), **{n: p.grad for n, p in network.named_parameters() if p.grad is not None}}


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of everything together, relative."""
    assert found.keys() == truth.keys()
    apart = sum((found[n].double() - t.double()).square().sum().item() for n, t in truth.items())
    return (apart / sum(t.double().square().sum().item() for t in truth.values())) ** 0.5


@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        (SDXL, {"group_norm_silu": 46, "layer_norm": 210, "geglu": 70, "geglu_linear": 70}),
        (SD15, {"group_norm_silu": 61, "layer_norm": 48, "geglu": 16, "geglu_linear": 16}),
    ],
    ids=["sdxl", "sd15"],
)
def test_every_norm_and_gate_of_the_real_networks_is_found(
    architecture: dict[str, Any], counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in (nn.Linear, nn.Conv2d):  # drawing random numbers takes its time also where there is no memory
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        network = UNet2DConditionModel(**architecture)
    before = {name: value.shape for name, value in network.state_dict().items()}
    classes = [type(m).__name__ for m in network.modules()]
    assert kernel_patch.patch(network, kernel_patch.MODULES) == counts
    assert {name: value.shape for name, value in network.state_dict().items()} == before
    assert [type(m).__name__ for m in network.modules()] == classes
    assert not [m for m in network.modules() if type(m) in (nn.GroupNorm, nn.LayerNorm)]


@pytest.mark.parametrize(
    "enabled", [["group_norm_silu"], ["layer_norm"], ["geglu"], list(kernel_patch.MODULES)], ids="+".join
)
def test_same_numbers_as_stock(enabled: list[str]) -> None:
    """Output and all gradients, within twice eager's own distance from float64."""
    network = unet()
    truth, eager = gradients(copy.deepcopy(network).double()), gradients(network)
    kernel_patch.patch(network, enabled)
    assert error(gradients(network), truth) <= 2 * error(eager, truth)


@pytest.mark.parametrize("enabled", [["geglu_linear"], list(kernel_patch.MODULES)], ids="+".join)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_same_numbers_as_stock_without_gradients(
    enabled: list[str], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the epilogue of the up-projection runs: once for each GEGLU; in training calls, never."""
    from smpo_fast.kernels import geglu_linear

    seen: list[Any] = []
    monkeypatch.setattr(geglu_linear, "launch", lambda *a, **k: (seen.append(a[0]), stock_launch(*a, **k)))
    stock_launch = importlib.import_module("smpo_fast.kernels._launch").launch
    network = unet()
    device = next(network.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        eager = {"output": forward(network)}
        kernel_patch.patch(network, enabled)
        with geglu_linear.forward_only():
            fused = {"output": forward(network)}
    assert len(seen) == sum(type(m).__name__ == "GEGLU" for m in network.modules()) > 0
    with torch.no_grad():
        truth = {"output": forward(copy.deepcopy(network).double())}
    assert error(fused, truth) <= 2 * error(eager, truth)
    seen.clear()
    gradients(network)
    with torch.no_grad():
        forward(network)
    assert seen == [], "a call that is compared with training rounds as training does"


def test_under_autocast() -> None:
    """fp32 weights, bf16 matrix products: stock norms then work in fp32, and their consumers round what they get."""
    network = unet()
    truth = gradients(copy.deepcopy(network).double())
    with torch.autocast(next(network.parameters()).device.type, torch.bfloat16):
        eager = gradients(network)
        kernel_patch.patch(network, kernel_patch.MODULES)
        fused = gradients(network)
    assert error(fused, truth) <= 2 * error(eager, truth)


def test_a_residual_of_another_dtype_is_added_in_the_wider_one() -> None:
    network = unet()
    kernel_patch.patch(network, ["layer_norm"])
    norm = first(network, nn.LayerNorm)
    x = torch.randn(3, 8, device=norm.weight.device)
    total, normed = norm(x, x.bfloat16())
    assert total.dtype == torch.float32 and torch.equal(normed, norm(total))


@pytest.mark.slow
def test_zero_3_shards_a_patched_network() -> None:
    """DeepSpeed gathers a module's weights where it is called, and fused modules are called as stock ones are."""

    def two_steps(stage: int | None, enabled: tuple[str, ...]) -> dict[str, Tensor]:
        run, world, network = toy_settings(pairs=2, micro=2), World(0, 1), unet().train()
        raw = None if stage is None else ds_config.read_ds_file(CONFIGS / f"ds_zero{stage}.json")
        ds = None if raw is None else ds_config.resolve_ds_settings(raw, "file", run, 1, "fp32")[0]
        if enabled:
            kernel_patch.patch(network, enabled)
        x, time, cond = inputs(unet())
        trained_ = create.make_engine(network, run, world, "fp32", ds)
        for _ in range(2):
            out = trained_.unet(x, time, encoder_hidden_states=cond, return_dict=False)[0]
            trained_.backward(out.square().mean(), last=True)
            trained_.step(1e-3)
        return trained_.full_state()

    assert distance(two_steps(3, kernel_patch.MODULES), two_steps(None, ())) < 1e-4


def test_unpatch_gives_the_stock_network_back() -> None:
    network = unet()
    before, classes = forward(network), [type(m) for m in network.modules()]
    kernel_patch.patch(network, kernel_patch.MODULES)
    patched = [type(m) for m in network.modules()]
    assert kernel_patch.unpatch(network) == sum(a is not b for a, b in zip(classes, patched, strict=True)) > 0
    assert [type(m) for m in network.modules()] == classes and torch.equal(forward(network), before)
    assert kernel_patch.unpatch(network) == 0


def test_gradient_checkpointing_changes_no_bit() -> None:
    network = unet().train()
    kernel_patch.patch(network, kernel_patch.MODULES)
    plain = gradients(network)
    network.enable_gradient_checkpointing()
    again = gradients(network)
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_a_copy_of_a_patched_network_is_patched() -> None:
    network = unet()
    kernel_patch.patch(network, ["geglu"])
    assert [type(m) for m in copy.deepcopy(network).modules()] == [type(m) for m in network.modules()]


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora(lora_first: bool) -> None:
    """Adapters on attention and feed-forward, put in before or after the kernels: eager's gradients."""
    from peft import LoraConfig

    network = unet()
    adapter = LoraConfig(r=2, target_modules=["to_q", "to_v", "ff.net.0.proj", "ff.net.2"], init_lora_weights=False)

    def adapt() -> None:
        torch.manual_seed(3)
        network.add_adapter(adapter)

    # the only GEGLU has an adapter: before it, the epilogue is put in and sees it; after it, there is nothing to take
    enabled = kernel_patch.MODULES[:-1] if lora_first else kernel_patch.MODULES
    steps: list[Callable[[], Any]] = [adapt, lambda: kernel_patch.patch(network, enabled)]
    for step in steps if lora_first else reversed(steps):
        step()
    found = gradients(network)
    assert all("lora" in n for n in found if n != "output") and len(found) > 8
    kernel_patch.unpatch(network)
    assert error(found, gradients(network)) < 1e-5


def test_the_epilogue_leaves_adapters_and_hooks_alone() -> None:
    """A projection with LoRA is not taken over, and one that gets it later is seen."""
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["ff.net.0.proj"], init_lora_weights=False)
    early, late = unet(), unet()
    kernel_patch.patch(late, ["geglu", "geglu_linear"])
    for network in (early, late):
        torch.manual_seed(3)
        network.add_adapter(adapter)
    with pytest.raises(ConfigError, match="geglu_linear matches no module"):
        kernel_patch.patch(early, ["geglu_linear"])
    with torch.no_grad(), kernel_patch.forward_only(late)[0]():
        assert torch.allclose(forward(late), forward(early), atol=1e-5)
    hooked = unet(layers_per_block=2)
    count = sum(type(m) is GEGLU for m in hooked.modules())
    first(hooked, GEGLU).proj.register_forward_hook(lambda *_: None)
    assert kernel_patch.patch(hooked, ["geglu", "geglu_linear"]) == {"geglu": count, "geglu_linear": count - 1}


def first(network: nn.Module, kind: type) -> Any:
    return next(m for m in network.modules() if isinstance(m, kind))


def test_blocks_compile_into_one_graph() -> None:
    network = unet()
    kernel_patch.patch(network, kernel_patch.MODULES)
    x, _, cond = inputs(network)
    hidden, temb = x.repeat(1, 2, 1, 1), torch.randn(2, 32, device=x.device)
    tokens = hidden.flatten(2).transpose(1, 2).contiguous()
    calls = [
        (first(network, ResnetBlock2D), (hidden, temb), {}),
        (first(network, BasicTransformerBlock), (tokens,), {"encoder_hidden_states": cond}),
    ]
    for block, args, kwargs in calls:
        torch._dynamo.reset()
        plain = block(*args, **kwargs)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(*args, **kwargs)
        assert torch.equal(plain, compiled)
        compiled.sum().backward()
        with torch.no_grad(), kernel_patch.forward_only(network)[0]():
            silent = block(*args, **kwargs)
            assert torch.equal(silent, torch.compile(block, fullgraph=True, backend="aot_eager")(*args, **kwargs))


def test_what_the_fused_block_does_not_know_it_leaves_to_the_stock_block() -> None:
    network = unet()
    block = first(network, BasicTransformerBlock)
    x, _, cond = inputs(network)
    tokens = x.repeat(1, 2, 1, 1).flatten(2).transpose(1, 2).contiguous()
    block.set_chunk_feed_forward(4, 1)
    wanted = block(tokens, encoder_hidden_states=cond)
    kernel_patch.patch(network, kernel_patch.MODULES)
    assert torch.allclose(block(tokens, encoder_hidden_states=cond), wanted, atol=1e-5)


def test_a_kernel_that_matches_nothing_is_named_and_nothing_is_changed() -> None:
    network = unet(down_block_types=("DownBlock2D",))
    classes = [type(m) for m in network.modules()]
    for name in ("geglu", "geglu_linear"):
        with pytest.raises(ConfigError, match=f"{name} matches no module of this UNet2DConditionModel"):
            kernel_patch.patch(network, ["group_norm_silu", name])
    assert [type(m) for m in network.modules()] == classes
    assert kernel_patch.patch(network, ["pair_loss"]) == {}


def settings(**sections: dict[str, Any]) -> Config:
    return loading.from_dict(sections)


def test_kernels_without_a_place_are_refused() -> None:
    step_ops.check(settings(kernels={"enabled": ["pair_loss", "renoise_step", "geglu"]}))
    with pytest.raises(ConfigError, match="pair_loss has no effect: objective.name = 'sft'"):
        step_ops.check(settings(kernels={"enabled": ["pair_loss"]}, objective={"name": "sft"}))
    with pytest.raises(ConfigError, match="renoise_step has no effect: inversion.source = 'noise'"):
        step_ops.check(settings(kernels={"enabled": ["renoise_step"]}, objective={"name": "dpo"}))
    with pytest.raises(ConfigError, match=r"kernels\.enabled.*'softmax'"):
        settings(kernels={"enabled": ["softmax"]})


def test_without_triton_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel_patch.check(settings(), torch.device("cpu"))
    with pytest.raises(EnvironmentProblem, match=r'pip install "smpo-fast\[kernels\]"'):
        kernel_patch.check(settings(kernels={"enabled": ["geglu"]}), torch.device("cpu"))


def test_on_a_cpu_one_notice_says_that_eager_code_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel_patch.check(settings(kernels={"enabled": ["geglu"]}), torch.device("cpu"))
    assert "on cpu eager code runs" in capsys.readouterr().err


def test_no_kernel_means_eager_code() -> None:
    ops = step_ops.select_ops(settings(), [])
    assert ops.pair_errors is objective.pair_errors and ops.solver is inversion.EAGER_OPS


def test_kernels_are_arguments_of_a_run(tmp_path: Path) -> None:
    """Two steps of the embedded run with and without: the same numbers to fp32 rounding, the first margin exactly 0."""
    words = [
        "data.max_pairs=4", "run.steps=2", "batch.pairs_per_step=2", "batch.micro_pairs=1", "batch.inversion_pairs=2",
        "optim.warmup_steps=0", "optim.lr=1e-4", "eval.prompts=", "log.tensorboard=false", "inversion.steps=4",
        f"data.cache={tmp_path / 'cache'}", "run.device=cpu",
    ]  # fmt: skip
    rows = []
    for name, enabled in (("eager", "auto"), ("kernels", '["pair_loss", "renoise_step"]')):
        assert train.main([*words, f"run.dir={tmp_path / name}", f"kernels.enabled={enabled}"]) == 0
        rows.append(read_metrics(tmp_path / name))
    for eager, fused in zip(*rows, strict=True):
        for key in ("train_loss", "grad_norm", "model_mse", "logit_max"):
            assert fused[key] == pytest.approx(eager[key], rel=2e-4, abs=1e-6), key
    assert rows[1][0]["logit_max"] == 0.0 and rows[1][1]["logit_max"] > 0


ALL_KERNELS = ("pair_loss", "renoise_step", *kernel_patch.MODULES)
WITH_EPILOGUE = [(name, "geglu_linear") for name in ALL_KERNELS if name != "geglu_linear"]
SUBSETS = [*[(name,) for name in ALL_KERNELS], *WITH_EPILOGUE, ALL_KERNELS]
ESSENTIAL = [("geglu_linear",), ("geglu", "geglu_linear")]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "enabled", [s if s in ESSENTIAL else pytest.param(s, marks=pytest.mark.slow) for s in SUBSETS], ids="+".join
)
def test_margins_are_0_at_the_first_step(
    enabled: tuple[str, ...], precision: str, tiny_run: list[str], tmp_path: Path
) -> None:
    """Policy and reference have the same weights; the kernels must not make them round differently."""
    words = [*tiny_run, f"model.precision={precision}", f"run.dir={tmp_path}"]
    assert train.main([*words, f"kernels.enabled={json.dumps(enabled)}"]) == 0
    row = read_metrics(tmp_path)[0]
    assert row["logit_max"] == 0.0 and row["train_loss"] == pytest.approx(math.log(2))


def trained(dtype: torch.dtype, enabled: list[str], steps: int) -> list[dict[str, Tensor]]:
    """Losses and weights of a small UNet at each step of a descent on fixed data."""
    network = unet().to(dtype)
    if enabled:
        kernel_patch.patch(network, enabled)
    x, time, cond = inputs(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    seen = []
    for step in range(steps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(x)
        loss = (network(x + noise, time, cond).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append({"loss": loss.detach(), **{n: p.detach().clone() for n, p in network.named_parameters()}})
    return seen


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_training_stays_as_close_to_float64_as_eager_code_does(steps: int) -> None:
    truth, eager = trained(torch.float64, [], steps), trained(torch.float32, [], steps)
    fused = trained(torch.float32, list(kernel_patch.MODULES), steps)
    assert truth[-1]["loss"] < 0.9 * truth[0]["loss"], "the network learns nothing: the comparison is empty"
    for step, (t, e, f) in enumerate(zip(truth, eager, fused, strict=True)):
        assert error(f, t) <= 2 * error(e, t), f"step {step + 1}: {error(f, t):.2e}, eager {error(e, t):.2e}"


def test_fused_solver_adds_up_estimates_in_channels_last_memory() -> None:
    """A UNet's output may be channels-last while the state is not: the sum of estimates is addressed like them."""
    chosen = loading.from_dict({"inversion": {"renoise_steps": 3, "average": "mean", "steps": 4}}).inversion
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear"})
    paths = [schedule.path(t, chosen) for t in (999, 600)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_0 = torch.randn(2, 2, 4, 6, 10, generator=torch.Generator().manual_seed(0)).to(device)

    def eps(x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
        out = torch.tanh(x + torch.roll(x, 1, dims=-1)).flatten(0, 1)
        return out.contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])

    fused = step_ops.select_ops(settings(), ["renoise_step"]).solver
    eager, found = (
        inversion.invert(lambda rows: eps, x_0, paths, chosen, chunk=2, solver=s) for s in (EAGER_OPS, fused)
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(eager, found, strict=True))
