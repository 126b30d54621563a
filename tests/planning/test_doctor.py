"""The doctor: every probe alone, nothing crashes it, and the exit status is what it says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from smpo_fast import cli
from smpo_fast.planning import doctor, probes
from smpo_fast.planning.doctor import Finding
from smpo_fast.planning.probes import BROKEN, MISSING, OK

CONFIGS = Path(__file__).parents[2] / "configs"
CPU_TORCH = {
    "state": OK, "version": "2.13.0", "cuda": None, "devices": [], "why": "no CUDA", "nccl": False, "gloo": True,
    "attention": {"flash": OK, "math": OK, "cudnn": "No viable backend"},
}  # fmt: skip
H200 = {"name": "NVIDIA H200", "bytes": 150e9, "capability": "9.0"}
GPU_TORCH = CPU_TORCH | {"cuda": "12.8", "devices": [H200], "bf16": True, "nccl": True, "nccl_version": "2.27"}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the probes answer, to be changed by a test; no process is started."""
    given: dict[str, dict[str, Any]] = {name: {"state": OK, "version": "1.0"} for name in probes.PROBES}
    given["torch"] = dict(CPU_TORCH)
    given["triton"] |= {"compiled": False}
    given["deepspeed"] |= {"compatible": ["cpu_adam"], "installed": []}
    given["bitsandbytes"] |= {"device": "cpu", "moves": True}
    monkeypatch.setattr(doctor, "run_probe", lambda name: given[name])
    monkeypatch.setattr(doctor, "driver", lambda: "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return given


def found(ds_file: Path | None = None) -> dict[str, Finding]:
    return {f.name: f for f in doctor.findings(ds_file)}


@pytest.mark.slow
def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """With real processes: training can run where these tests run."""
    status = cli.main(["doctor", "--ds_config", str(CONFIGS / "ds_zero2.json"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert status == 0 and told["can_train"] is True
    states = {f["name"]: f["state"] for f in told["findings"]}
    assert all(states[name] == OK for name in ("Python", "packages", "torch", "attention", "deepspeed", "ranks"))


def test_a_healthy_machine(answers: dict[str, dict[str, Any]]) -> None:
    answers["torch"] = dict(GPU_TORCH)
    answers["triton"]["compiled"] = True
    all_found = found()
    assert doctor.can_train(list(all_found.values()))
    assert "150.0 GB" in all_found["devices"].text and "is bf16" in all_found["devices"].text
    assert "nccl 2.27" in all_found["ranks"].text and "compiled one of this package" in all_found["triton"].text
    assert "flash, math; not: cudnn (No viable backend)" in all_found["attention"].text
    assert "training can run" in doctor.render(list(all_found.values()))


@pytest.mark.parametrize(
    ("library", "state", "name", "fix", "stops"),
    [
        ("torch", BROKEN, "torch", "--force-reinstall torch", True),
        ("deepspeed", MISSING, "deepspeed", "pip install deepspeed", False),
        ("bitsandbytes", BROKEN, "bitsandbytes", "--force-reinstall bitsandbytes", False),
        ("triton", MISSING, "triton", 'pip install "smpo-fast[kernels]"', False),
        ("peft", MISSING, "peft", "pip install peft", False),
    ],
)
def test_what_is_broken_is_told_with_its_command(
    answers: dict[str, dict[str, Any]], library: str, state: str, name: str, fix: str, stops: bool
) -> None:
    answers[library] = {"state": state, "why": "ImportError: libsomething.so.12: cannot open"}
    all_found = found()
    finding = all_found[name]
    assert finding.state == state and fix in finding.fix and "libsomething.so.12" in finding.text
    assert doctor.can_train(list(all_found.values())) is not stops


def test_deepspeed_is_needed_where_its_file_is_given(answers: dict[str, dict[str, Any]]) -> None:
    answers["deepspeed"] = {"state": MISSING, "why": "not installed"}
    assert found(CONFIGS / "ds_zero2.json")["deepspeed"].needed
    assert not found()["deepspeed"].needed


def test_a_gpu_that_torch_cannot_use(answers: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: "570.1")
    devices = found()["devices"]
    assert devices.state == BROKEN and "download.pytorch.org" in devices.fix and "no CUDA" in devices.text


def test_a_file_that_is_none(answers: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert found(tmp_path / "none.json")["DeepSpeed file"].needed
    (tmp_path / "list.json").write_text("[1]")
    assert not doctor.can_train(doctor.findings(tmp_path / "list.json"))


def test_answers_that_make_no_sense_are_findings(answers: dict[str, dict[str, Any]]) -> None:
    """A probe of another version may leave out what is asked for: that is told, and the others go on."""
    answers["deepspeed"], answers["xformers"] = {"state": OK}, {"state": OK}
    all_found = found()
    assert all_found["deepspeed"].state == BROKEN and "KeyError" in all_found["deepspeed"].text
    assert all_found["xformers"].state == BROKEN and all_found["torch"].state == OK


BREAKAGES = {
    "raises": ("raise RuntimeError('built for another torch')", "RuntimeError: built for another torch"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "dies": ("import os; os.abort()", "importing it ended the process (signal 6)"),
    "hangs": ("import time; time.sleep(60)", "did not finish within 2 s"),
}


@pytest.mark.parametrize("how", BREAKAGES)
def test_libraries_that_break_at_import(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: a library that takes its process down does not take the doctor with it."""
    code, message = BREAKAGES[how]
    (tmp_path / "torchao.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    told = probes.run_probe("torchao", 2.0 if how == "hangs" else 30.0)
    assert told["state"] == BROKEN and message in told["why"]


class _Server:
    """A web server on the loopback that answers every request with a status, or never (None)."""

    def __init__(self, status: int | None) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._status, self._open = status, []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)  # kept open: a server that never answers
                if self._status is not None:
                    connection.recv(4096)
                    connection.sendall(f"HTTP/1.1 {self._status} x\r\nContent-Length: 0\r\n\r\n".encode())
                    connection.close()

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.mark.parametrize(("status", "state"), [(200, OK), (401, OK), (None, MISSING)])
def test_the_hub_is_tried_for_a_limited_time(
    status: int | None,
    state: str,
    answers: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.3)
    with _Server(status) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        began = time.monotonic()
        hub = found()["hub"]
        assert time.monotonic() - began < 30, "the server that never answers would be waited for"
    assert hub.state == state and server.address in hub.text
    if status is None:
        assert "does not answer" in hub.text and "must be in the cache already" in hub.text
        assert found()["hub"].state == MISSING, "a closed port"
        assert doctor.can_train(list(found().values())), "training needs no hub"


def test_an_offline_machine_does_not_try_the_hub(
    answers: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "unreachable", lambda *_: pytest.fail("tried"))
    assert found()["hub"].state == OK
