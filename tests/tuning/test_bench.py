"""The bench on the miniature network: what is compared with eager fp32 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.models import attention
from smpo_fast.models.locate import find
from smpo_fast.models.network_spec import network_spec
from smpo_fast.tuning import bench as benching
from smpo_fast.tuning.bench import Bench, Rejected
from smpo_fast.tuning.timing import ceilings

CPU = torch.device("cpu")


def settings(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"resolution": 32},
        "batch": {"pairs_per_step": 4, "inversion_pairs": 2, "micro_pairs": 2},
        "inversion": {"steps": 2},
        "kernels": {"enabled": []},
    }
    return loading.from_dict({k: {**values.get(k, {}), **sections.get(k, {})} for k in values | sections})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One timed call each: these tests are about what is checked."""
    monkeypatch.setattr(benching, "seconds_of", benching.seconds_once)


def make(precision: str = "fp32", **sections: dict[str, Any]) -> tuple[Bench, Config]:
    c = settings(**sections)
    source = find(c.model)
    return Bench(c, source, network_spec(source, 32, lora=c.lora), precision, CPU), c


@pytest.fixture(scope="module")
def whole() -> tuple[Bench, Config]:
    return make()


def test_every_way_to_run_on_a_cpu_agrees_with_eager_fp32(whole: tuple[Bench, Config]) -> None:
    bench, c = whole
    for values in (
        {}, {"model.channels_last": True}, {"model.gradient_checkpointing": True}, {"batch.micro_pairs": 1},
        {"batch.micro_pairs": 3, "batch.inversion_pairs": 5}, {"batch.inversion_pairs": 1, "model.merge_qkv": True},
        {"model.attention": "eager"}, {"kernels.enabled": ["pair_loss", "layer_norm", "geglu"]},
    ):  # fmt: skip
        candidate = loading.replaced(c, values)
        call, policy = bench.call(candidate), bench.policy(candidate)
        assert 0 <= call.error < 1e-5
        assert 0 <= policy.error < 1e-5
        assert min(call.seconds, policy.policy, policy.reference, policy.optimizer) > 0
    assert not any("inversion_qkv" in vars(m) for m in bench._unet.modules()), "the memory of a candidate is given back"


def test_half_precision_is_compared_with_fp32_by_its_own_eager_distance() -> None:
    bench, c = make("bf16")
    eager_call, eager_policy = bench.call(c).error, bench.policy(c).error
    assert 1e-4 < eager_call < 0.05
    assert 1e-4 < eager_policy < 0.2
    candidate = loading.replaced(c, {"model.channels_last": True, "model.gradient_checkpointing": True})
    assert bench.call(candidate).error <= 2 * eager_call
    assert bench.policy(candidate).error <= 2 * eager_policy


@pytest.mark.parametrize("sections", [{"lora": {"rank": 2}}, {"objective": {"name": "sft"}}], ids=["lora", "sft"])
def test_adapters_and_objectives_without_a_reference(sections: dict[str, Any]) -> None:
    bench, c = make(**sections)
    policy = bench.policy(c)
    assert (policy.reference == 0) == ("objective" in sections)
    assert policy.error < 1e-5


PREDICTOR = benching.InferenceCaller.predictor


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let the network's predictions in no-gradient calls be changed."""

    def wrong(self: Any, cond: Any) -> Any:
        predict = PREDICTOR(self, cond)
        return lambda *args, **kwargs: change(predict(*args, **kwargs))

    monkeypatch.setattr(benching.InferenceCaller, "predictor", wrong)


def test_a_wrong_prediction_is_rejected(whole: tuple[Bench, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, c = whole
    changed(monkeypatch, lambda out: out * 1.001)
    with pytest.raises(Rejected, match=r"the prediction is 0\.001 from that of fp32, and 0\.0001 is allowed"):
        bench.call(c)
    changed(monkeypatch, lambda out: out * float("nan"))
    with pytest.raises(Rejected, match="the prediction is not finite"):
        bench.call(c)


def test_a_policy_that_differs_from_an_equal_reference_is_rejected(
    whole: tuple[Bench, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, c = whole
    compare = benching.Trainer.reference_errors

    def shifted(self: Any, step: int, examples: Any) -> Any:
        return [errors + torch.tensor([1e-6, 0.0]) for errors in compare(self, step, examples)]

    monkeypatch.setattr(benching.Trainer, "reference_errors", shifted)
    with pytest.raises(Rejected, match="equal weights give a logit of 0.00"):
        bench.policy(c)


def test_a_wrong_gradient_is_rejected(whole: tuple[Bench, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, c = whole
    backward = type(bench._trainer.engine).backward
    monkeypatch.setattr(
        type(bench._trainer.engine), "backward", lambda self, loss, *, last: backward(self, loss * 1.01, last=last)
    )
    with pytest.raises(Rejected, match="the gradient is 0.01 from that of fp32"):
        bench.policy(c)


def test_a_backward_pass_prefers_the_attention_of_its_forward_pass(
    whole: tuple[Bench, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without the rest of a step around it: checkpointing repeats attention there, and must save the same."""
    bench, c = whole
    seen: list[Any] = []
    engine = type(bench._trainer.engine)
    backward = engine.backward

    def watched(self: Any, loss: Tensor, *, last: bool) -> None:
        seen.append(torch.backends.cuda.math_sdp_enabled())
        backward(self, loss, last=last)

    monkeypatch.setattr(engine, "backward", watched)
    monkeypatch.setattr(attention, "_SDPA_FALLBACKS", (SDPBackend.FLASH_ATTENTION,))  # leaves out the math kernel
    bench.policy(loading.replaced(c, {"model.attention": "flash", "model.gradient_checkpointing": True}))
    assert seen and not any(seen)


def test_what_the_device_cannot_run_is_rejected_with_its_error(
    whole: tuple[Bench, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, c = whole
    with pytest.raises(Rejected, match="does not support it"):
        bench.call(loading.replaced(c, {"model.attention": "cudnn"}))

    def full(out: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    changed(monkeypatch, full)
    with pytest.raises(Rejected, match="^out of memory$"):
        bench.call(c)

    def broken(out: Tensor) -> Tensor:
        raise RuntimeError("PTXAS error: Internal\nand more")

    changed(monkeypatch, broken)
    with pytest.raises(Rejected, match=r"^RuntimeError: PTXAS error: Internal$"):
        bench.call(c)


def test_under_deepspeed_channels_last_is_for_the_inversion_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    c = settings()
    bench = Bench(c, find(c.model), network_spec(find(c.model), 32), "fp32", CPU, deepspeed=True)
    seen: list[tuple[bool, bool]] = []
    configure = Bench._configure

    def watched(self: Bench, c: Config) -> None:
        configure(self, c)
        weight = self._unet.conv_in.weight
        seen.append((c.model.channels_last, weight.is_contiguous(memory_format=torch.channels_last)))

    monkeypatch.setattr(Bench, "_configure", watched)
    candidate = loading.replaced(c, {"model.channels_last": True})
    bench.call(candidate)
    bench.policy(candidate)
    assert seen == [(True, True), (False, False)]


def test_after_a_rejection_the_network_is_as_it_was(whole: tuple[Bench, Config]) -> None:
    bench, c = whole
    before = bench.policy(c).error
    with pytest.raises(Rejected):
        bench.call(loading.replaced(c, {"kernels.enabled": ["geglu"], "model.attention": "xformers"}))
    assert bench.policy(c).error == before


def test_measuring_changes_no_weight(whole: tuple[Bench, Config]) -> None:
    bench, c = whole
    before = {name: p.detach().clone() for name, p in bench._unet.named_parameters()}
    bench.policy(c)
    bench.step(c, 2)
    assert all(torch.equal(p, before[name]) for name, p in bench._unet.named_parameters())


def test_an_inversion_gives_tau_of_every_pair(whole: tuple[Bench, Config]) -> None:
    bench, c = whole
    seconds, tau = bench.inversion(c)
    assert seconds > 0
    assert tau.shape == (2, 2, 4, 8, 8)
    _, other = bench.inversion(loading.replaced(c, {"inversion.fp8": True}))
    assert 0 < float((other - tau).norm() / tau.norm()) < 0.05


def test_ceilings_are_positive() -> None:
    assert all(rate > 0 for rate in ceilings(CPU, torch.float32).values())
