from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.unit.canary_rules.code import found, holds

CASES = [{"call": "f(2)", "equals": 4}, {"call": "f('x')", "raises": "TypeError"}]


def ended(body: str, **more: object) -> str:
    """How a probe of a function with this body ends; it must not hold."""
    source = "import os, socket\n\ndef f(x):\n    " + body.replace("\n", "\n    ")
    finding = found(source, kind="probe", extract=["f"], cases=[{"call": "f(2)", "equals": 4}], **more)
    assert not finding.holds
    return finding.detail


def test_a_probe_compares_answers_and_exceptions() -> None:
    source = "from elsewhere import thing\nN = 2\ndef g(x):\n    return x * N\ndef f(x):\n    return g(x) + 0"
    assert holds(source, kind="probe", extract=["f"], cases=CASES)
    finding = found(source.replace("N = 2", "N = 3"), kind="probe", extract=["f"], cases=CASES)
    assert finding.detail.startswith("f(2) gave 6, expected 4")
    assert finding.line == 5


def test_true_is_not_one() -> None:
    assert not holds(
        "def f(x):\n    return True", kind="probe", extract=["f"], cases=[{"call": "f(1)", "equals": 1}]
    )


def test_a_function_that_is_gone_is_a_finding() -> None:
    assert "defines no f" in found("def g(x):\n    return x", kind="probe", extract=["f"], cases=CASES).detail


def test_a_method_is_extracted_without_the_bases_of_its_class() -> None:
    source = """
    from torch import nn
    class W(nn.Module):
        @nn.no_grad
        def f(self, x: nn.Tensor) -> nn.Tensor:
            return self._g(x)
        def _g(self, x):
            return x + 1
        def heavy(self):
            return missing
    """
    assert holds(source, kind="probe", extract=["W.f"], cases=[{"call": "W().f(1)", "equals": 2}])


def test_a_loop_is_ended() -> None:
    start = time.monotonic()
    assert "SIGXCPU" in ended("while True:\n    pass", cpu_s=1)
    assert time.monotonic() - start < 20


def test_memory_without_bound_is_ended() -> None:
    assert "MemoryError" in ended("kept = []\nwhile True:\n    kept.append(bytearray(2 ** 24))")


@pytest.mark.parametrize(
    "body",
    ["socket.socket()", "socket.create_connection(('127.0.0.1', 9))", "socket.getaddrinfo('localhost', 80)"],
)
def test_the_network_is_refused(body: str) -> None:
    assert "it attempted socket." in ended(body)


def test_a_refused_attempt_cannot_be_swallowed() -> None:
    assert "it attempted socket." in ended(
        "try:\n    socket.socket()\nexcept BaseException:\n    pass\nreturn 4"
    )


def test_writing_outside_the_scratch_folder_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "written"
    assert "for writing, outside its scratch folder" in ended(f"open({str(target)!r}, 'w')")
    assert not target.exists()
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    assert "it attempted os.remove" in ended(f"os.remove({str(kept)!r})")
    assert kept.read_text() == "as it was"


@pytest.mark.parametrize(
    "body", ["os.system('true')", "os.fork()", "import subprocess\nsubprocess.run(['true'])"]
)
def test_other_processes_are_refused(body: str) -> None:
    assert "it attempted" in ended(body)


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    assert os.environ["GITHUB_TOKEN"] == "secret"
    assert "gave None" in ended("return os.environ.get('GITHUB_TOKEN')")


def test_what_upstream_prints_is_no_answer() -> None:
    source = "def f(x):\n    print('{\"answers\": []}')\n    return 4"
    assert holds(source, kind="probe", extract=["f"], cases=[{"call": "f(2)", "equals": 4}])


def test_no_probe_sees_what_another_did_to_a_library() -> None:
    change = "import torch\ndef f(x):\n    torch.add = None\n    return torch.get_num_threads()"
    look = "import torch\ndef f(x):\n    return torch.add is not None"
    libraries = {"libraries": ["torch"]}
    assert holds(change, kind="probe", extract=["f"], cases=[{"call": "f(2)", "equals": 1}], **libraries)
    assert holds(look, kind="probe", extract=["f"], cases=[{"call": "f(2)", "equals": True}], **libraries)


def test_a_library_is_seen_by_those_who_asked_for_it_alone() -> None:
    source = "def f(x):\n    import torch"
    cases = [{"call": "f(2)", "raises": "ModuleNotFoundError"}]
    assert not holds(source, kind="probe", extract=["f"], cases=cases, libraries=["torch"])
    assert holds(source, kind="probe", extract=["f"], cases=cases)


def test_waiting_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loudmerge.canary.probing.probe.IDLE_S", 0)
    assert "still running after 1 s" in ended("import time\ntime.sleep(60)", cpu_s=1)


def test_a_library_that_cannot_be_imported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenlibrary.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    assert "Can brokenlibrary be imported?" in ended("return 4", libraries=["brokenlibrary"])
