"""`loudmerge merge BASE ADAPTER OUT --push-to REPO` against a real server that speaks the Hub's API.

Base and adapter are written by the installed transformers and PEFT.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loudmerge
from loudmerge import cli
from loudmerge.hub import client, upload
from loudmerge.verifying.verify import verify
from tests.support.command import run_apart
from tests.support.hub_server import connected_hub
from tests.support.hub_state import Files, HubServer

pytest.importorskip("huggingface_hub")
pytest.importorskip("peft")

README = b"---\nlicense: apache-2.0\n---\n# The base\n"
WEIGHTS = "adapter_model.safetensors"

# huggingface_hub 1 and 2 upload by a way that their HTTP client is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapter/, a Qwen3-MoE and a LoRA on its experts and attention."""
    from tests.support import tiny

    directory = tmp_path_factory.mktemp("models")
    model = tiny.build("qwen3_moe", dtype=torch.bfloat16)
    model.save_pretrained(directory / "base")
    (directory / "base" / "README.md").write_bytes(README)
    fused = tiny.expert_parameters(model)
    linears = [] if fused else ["gate_proj", "up_proj", "down_proj"]
    lora = tiny.attach_random_lora(
        model, target_parameters=fused, target_modules=["q_proj", "v_proj", *linears]
    )
    lora.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path) -> Iterator[HubServer]:
    with connected_hub(monkeypatch, tmp_path / "cache") as running:
        running.add_repo("owner/base", read(models / "base"))
        running.add_repo("owner/adapter", read(models / "adapter"))
        running.add_repo("me/model", {"notes.txt": b"mine"})
        yield running


def read(directory: Path) -> Files:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


def arguments(base: str | Path, adapter: str | Path, out: Path) -> list[str]:
    return ["merge", str(base), str(adapter), str(out), "--push-to", "me/model", "--json", "--threads", "1"]


def merge_in_a_process(base: str | Path, adapter: str | Path, out: Path) -> Ended:
    command = [sys.executable, "-m", "loudmerge", *arguments(base, adapter, out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def merge_here(capsys: pytest.CaptureFixture[str], base: str | Path, adapter: str | Path, out: Path) -> Ended:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(base, adapter, out))
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return Ended(caught.value.code, captured.out, captured.err)


def spoil(models: Path, directory: Path) -> Path:
    """A copy of the adapter with one NaN in it."""
    directory.mkdir()
    for name, data in read(models / "adapter").items():
        (directory / name).write_bytes(data)
    tensors = load_file(directory / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def test_a_merge_of_hub_ids_is_pushed_as_one_commit(server: HubServer, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = merge_in_a_process("owner/base", "owner/adapter", out)
    assert ended.code == 0, ended.stderr
    assert ended.document["verified"] is True

    initial, commit = server.repos["me/model"]
    assert (initial.message, commit.deleted) == ("initial commit", ())
    assert f"{server.url}/me/model/commit/{commit.oid}" in ended.stderr
    uploaded = {name: data for name, data in commit.files.items() if name not in initial.files}
    pushed = json.loads(uploaded["merge_report.json"])
    ours = {"README.md": README, "merge_report.json": (out / "merge_report.json").read_bytes()}
    assert {**uploaded, **ours} == read(out)
    assert (pushed["base"]["path"], pushed["adapter"]["path"]) == ("owner/base", "owner/adapter")
    assert not any(str(tmp_path).encode() in data for data in uploaded.values())
    card = commit.files["README.md"].decode()
    assert "base_model: owner/base\n" in card
    assert "license: apache-2.0\n" in card
    assert card.endswith("# The base\n")
    assert "| Adapter | `owner/adapter`, rank 4 |" in card

    loudmerge.merge(models / "base", models / "adapter", tmp_path / "local")
    assert read(tmp_path / "local")["model.safetensors"] == commit.files["model.safetensors"]
    assert commit.files["model.safetensors"] != server.head("owner/base").files["model.safetensors"]
    got_back = client.resolve("me/model")
    assert (got_back / "model.safetensors").read_bytes() == commit.files["model.safetensors"]
    assert verify(got_back, models / "base", models / "adapter").ok


@pytest.mark.usefixtures("server")
def test_quiet_shows_no_bar_of_a_download() -> None:
    ended = run_apart("inspect", "owner/adapter", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")


def test_a_refused_merge_uploads_nothing_and_deletes_nothing(
    server: HubServer, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = spoil(models, tmp_path / "nan")
    server.add_repo("owner/nan", read(adapter))
    before = {name: list(history) for name, history in server.repos.items()}
    ended = merge_here(capsys, "owner/base", "owner/nan", tmp_path / "out")
    assert ended.code == 3, ended.stderr
    assert ended.document["refusal"]["code"] == "non-finite"
    assert not (tmp_path / "out").exists()
    assert {request.method for request in server.requests} == {"GET", "HEAD"}
    assert server.writes == []
    assert server.repos == before


def test_a_refusal_leaves_an_existing_out_and_the_repository_alone(
    server: HubServer, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    loudmerge.merge(models / "base", models / "adapter", out)
    before = read(out)
    adapter = spoil(models, tmp_path / "nan")
    with pytest.raises(loudmerge.MergeRefused, match="non-finite"):
        loudmerge.merge(models / "base", adapter, out, overwrite=True)
    assert read(out) == before
    assert server.requests == []


def test_an_out_that_was_not_verified_is_not_pushed(server: HubServer, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loudmerge.merge(models / "base", models / "adapter", out, verify=False)
    with pytest.raises(ValueError, match=r"was not verified\. Merge it again without --no-verify"):
        upload.push(out, "me/model", base="owner/base", adapter="owner/adapter")
    assert server.requests == []


def test_a_push_that_fails_keeps_out_and_is_an_environment_failure(
    server: HubServer, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("POST", "/commit/", 403)
    out = tmp_path / "out"
    ended = merge_here(capsys, models / "base", models / "adapter", out)
    assert ended.code == 5, ended.stderr
    assert "403" in json.dumps(ended.document)
    assert len(server.repos["me/model"]) == 1
    assert not [request for request in server.requests if request.method == "DELETE"]
    server.faults.clear()
    url = upload.push(out, "me/model", base="owner/base", adapter="owner/adapter")
    assert url.endswith(server.head("me/model").oid)
