"""Hub ids against a real HTTP server that speaks the Hub's API (`tests.support.hub_server`)."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import loudmerge
from loudmerge import EnvironmentFailed, MergeRefused
from loudmerge.hub import client, upload
from tests.support.hub_state import BASE, CONFIG, WEIGHTS, HubServer
from tests.unit.builders import lora, values, write_adapter, write_base
from tests.unit.places import content

pytest.importorskip("huggingface_hub")

OTHER_FORMATS = {
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "model.gguf": b"gguf",
    "tf_model.h5": b"hdf5",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "consolidated.00.safetensors": b"again",
    "original/model.safetensors": b"again",
}


@pytest.mark.usefixtures("server")
def test_a_local_directory_is_returned_as_it_is_even_if_it_could_be_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert client.resolve("owner/base") == Path("owner/base")
    assert client.resolve(tmp_path) == tmp_path


def test_merge_and_plan_take_hub_ids(server: HubServer, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": values(8, 6)})
    adapter = write_adapter(tmp_path / "adapter", lora("model.layers.0.self_attn.q_proj", 8, 6))
    server.add_repo("owner/base", content(base))
    server.add_repo("owner/adapter", content(adapter))
    assert loudmerge.plan("owner/base", "owner/adapter").counts.dense == 1
    loudmerge.merge("owner/base", "owner/adapter", tmp_path / "from-hub")
    loudmerge.merge(base, adapter, tmp_path / "from-disk")
    weights = [content(tmp_path / name)["model.safetensors"] for name in ("from-hub", "from-disk")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "name", ["gpt2", "./owner/base", "a/b/c", "owner/base@", "owner/base@a@b", "/no/such/directory", "owner/"]
)
def test_what_is_neither_a_directory_nor_an_id_is_a_wrong_argument(name: str, server: HubServer) -> None:
    with pytest.raises(ValueError, match="neither an existing directory nor a Hub id"):
        client.resolve(name)
    assert server.requests == []


def test_a_file_is_a_wrong_argument(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file, expected the directory"):
        client.resolve(tmp_path / "model.safetensors")


def test_a_download_has_every_byte_and_no_weights_in_other_formats(server: HubServer) -> None:
    server.add_repo("owner/base", {**BASE, **OTHER_FORMATS})
    path = client.resolve("owner/base")
    assert {name: data for name, data in content(path).items() if name != ".gitattributes"} == BASE
    assert server.writes == []
    asked = [request.path for request in server.requests]
    assert not any(name in path for name in OTHER_FORMATS for path in asked)


def test_weights_that_are_none_of_the_models_are_downloaded(server: HubServer) -> None:
    wanted = {
        **BASE,
        "modules.json": b'[{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}]',
        "2_Dense/model.safetensors": b"dense",
        "spk_dict.pt": b"voices",
    }
    server.add_repo("owner/base", {**wanted, **OTHER_FORMATS})
    found = content(client.resolve("owner/base"))
    assert {name: data for name, data in found.items() if name != ".gitattributes"} == wanted


def test_a_revision_is_a_commit_of_that_repository(server: HubServer) -> None:
    first = server.add_repo("owner/base", BASE)
    server.commit("owner/base", "second", {"config.json": b"{}"})
    assert (client.resolve(f"owner/base@{first.oid}") / "config.json").read_bytes() == CONFIG
    assert (client.resolve("owner/base") / "config.json").read_bytes() == b"{}"


def test_a_revision_that_does_not_exist_is_named(server: HubServer) -> None:
    server.add_repo("owner/base", BASE)
    with pytest.raises(EnvironmentFailed, match=r"could not look up owner/base@v9 .*Revision Not Found"):
        client.resolve("owner/base@v9")


def test_a_second_download_transfers_nothing(server: HubServer) -> None:
    server.add_repo("owner/base", BASE)
    first = client.resolve("owner/base")
    before = len(server.requests)
    assert client.resolve("owner/base") == first
    assert not [request for request in server.requests[before:] if "/lfs/" in request.path]


def test_a_repository_with_pickled_weights_only_is_refused_before_any_download(server: HubServer) -> None:
    server.add_repo("owner/base", {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    with pytest.raises(
        MergeRefused, match="owner/base on the Hub: found weights in pickle files only"
    ) as caught:
        client.resolve("owner/base")
    assert caught.value.code == "unsafe-file"
    assert not [request for request in server.requests if "resolve" in request.path]


def test_adapters_in_folders_of_a_repository_are_refused_before_any_download(server: HubServer) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    inside = {f"{folder}/{name}": content for folder in ("b", "a") for name, content in adapter.items()}
    server.add_repo("owner/adapters", {**inside, "README.md": b""})
    with pytest.raises(MergeRefused) as caught:
        client.resolve("owner/adapters")
    assert "owner/adapters on the Hub: found adapters in its folders a, b" in str(caught.value)
    assert "hf download owner/adapters --include 'a/*' --local-dir DIR`), and give DIR/a." in str(
        caught.value
    )
    assert not [request for request in server.requests if "resolve" in request.path]
    server.add_repo("owner/adapter", {**adapter, **inside})
    assert sorted(path.name for path in client.resolve("owner/adapter").glob("*.safetensors"))


def test_weights_beside_an_adapter_are_refused_though_they_are_not_downloaded(server: HubServer) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "training_args.bin": b""}
    server.add_repo("owner/adapter", adapter)
    client.resolve("owner/adapter")
    server.add_repo("owner/llava", {**adapter, "non_lora_trainables.bin": b"pickle"})
    with pytest.raises(MergeRefused) as caught:
        client.resolve("owner/llava")
    assert "owner/llava on the Hub/non_lora_trainables.bin: found weights" in str(caught.value)
    assert caught.value.code == "unconsumed-adapter-tensor"


def test_the_token_of_the_environment_is_used(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_repo("owner/base", BASE)
    server.gated.add("owner/base")
    server.token = "secret"
    with pytest.raises(EnvironmentFailed, match=r"could not download owner/base at http.* 403 .*HF_TOKEN"):
        client.resolve("owner/base")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert (client.resolve("owner/base") / "model.safetensors").read_bytes() == WEIGHTS


def test_offline_the_cache_is_used_and_nobody_is_asked(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("owner/base", BASE)
    path = client.resolve("owner/base")
    before = len(server.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert client.resolve("owner/base") == path
    with pytest.raises(EnvironmentFailed, match=r"could not download owner/other .*HF_HUB_OFFLINE is set"):
        client.resolve("owner/other")
    with pytest.raises(EnvironmentFailed, match="cannot push to me/model: HF_HUB_OFFLINE is set"):
        upload.push_target("me/model")
    assert len(server.requests) == before


@pytest.fixture
def hosted(server: HubServer, tmp_path: Path) -> dict[str, bytes]:
    """A base on the Hub, with all that a chat model has; the adapter is in `tmp_path`."""
    weight = {"model.layers.0.self_attn.q_proj.weight": values(8, 6)}
    files = content(write_base(tmp_path / "base", weight))
    files |= {
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "README.md": b"",
        "x/params.json": b"",
    }
    write_adapter(tmp_path / "adapter", lora("model.layers.0.self_attn.q_proj", 8, 6))
    server.add_repo("owner/base", files)
    return files


def merged_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str | Path = "owner/base") -> Any:
    """The report of a merge, of a dry run's plan the notes alike."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    planned = loudmerge.plan(base, tmp_path / "adapter")
    report = loudmerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert tuple(report.notes) == planned.notes
    return report


@pytest.mark.usefixtures("hosted")
def test_offline_a_merge_says_what_the_cache_has_not_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was loaded, and no tokenizer: the cache does not say that it is incomplete."""
    from huggingface_hub import hf_hub_download

    snapshot = Path(hf_hub_download("owner/base", "config.json")).parent
    hf_hub_download("owner/base", "model.safetensors")
    report = merged_offline(tmp_path, monkeypatch)
    assert report.notes[-1] == (
        "OUT has no generation_config.json and no tokenizer: the Hub's cache has none of owner/base, and "
        f"does not say whether the repository has. `hf download owner/base --revision {snapshot.name}` gets "
        "what there is"
    )
    assert report.notes[-1] in report.summary()
    assert "tokenizer.json" not in content(tmp_path / "out")
    # Given as a directory it is the same snapshot.
    assert loudmerge.plan(snapshot, tmp_path / "adapter").notes[-1] == report.notes[-1]


@pytest.mark.usefixtures("hosted")
def test_a_base_that_was_downloaded_whole_is_merged_offline_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.resolve("owner/base")
    assert merged_offline(tmp_path, monkeypatch).notes == []
    assert {"generation_config.json", "tokenizer.json", "README.md"} <= content(tmp_path / "out").keys()


def test_what_the_repository_has_not_is_not_missed_offline(
    hosted: dict[str, bytes], server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub keeps a list of its files from 2 on; before, it has to be asked for each."""
    server.add_repo("owner/base", {name: hosted[name] for name in ("config.json", "model.safetensors")})
    client.resolve("owner/base")
    assert merged_offline(tmp_path, monkeypatch).notes == []


def test_what_was_asked_for_and_is_not_there_is_not_missed_offline(
    hosted: dict[str, bytes], server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by from_pretrained of a model, and of a tokenizer."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    there = ("config.json", "model.safetensors")
    server.add_repo("owner/base", {name: hosted[name] for name in there})
    for name in (*there, "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        with nullcontext() if name in there else pytest.raises(EntryNotFoundError):
            hf_hub_download("owner/base", name)
    assert merged_offline(tmp_path, monkeypatch).notes == []


def test_a_snapshot_that_lacks_what_the_repository_has_is_refused(
    hosted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = client.resolve("owner/base")
    listed = [*hosted, "LICENSE", "chat_template.jinja"]
    tree = {"format_version": 1, "files": {name: {} for name in listed}}
    (snapshot.parent.parent / "trees").mkdir(exist_ok=True)
    (snapshot.parent.parent / "trees" / f"{snapshot.name}.json").write_text(json.dumps(tree))
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "x" / "params.json").unlink()
    with pytest.raises(MergeRefused) as refused:
        merged_offline(tmp_path, monkeypatch, snapshot)
    assert str(refused.value) == (
        f"corrupt-file: {snapshot}: found no chat_template.jinja, tokenizer.json, expected what loaders read "
        "of owner/base, by the list of its files in the Hub's cache. Get the rest: `hf download owner/base "
        f"--revision {snapshot.name}`. To merge without, give a copy of the folder (cp -rL)."
    )
    assert not (tmp_path / "out").exists()
    shutil.copytree(snapshot, tmp_path / "copy")
    assert merged_offline(tmp_path, monkeypatch, tmp_path / "copy").notes == []


def test_the_endpoint_is_read_at_each_call(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads it once, when it is imported."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.url, "https://hub.invalid")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    server.add_repo("owner/base", BASE)
    assert (client.resolve("owner/base") / "model.safetensors").read_bytes() == WEIGHTS


def test_an_unreachable_hub_is_not_hidden_by_the_cache(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("owner/base", BASE)
    client.resolve("owner/base")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        EnvironmentFailed, match=r"could not look up owner/base .*127\.0\.0\.1:1.*refused"
    ) as caught:
        client.resolve("owner/base")
    assert "HF_HUB_OFFLINE=1" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "hf auth login"),
        (403, "Ask for access"),
        (404, "there is no local directory of that name"),
        (429, "limits how often"),
        (500, "Check the network"),
    ],
)
def test_an_error_of_the_hub_says_what_was_asked_and_what_came_back(
    status: int, says: str, server: HubServer
) -> None:
    server.add_repo("owner/base", BASE)
    server.fail("GET", "/api/models/owner/base", status)
    with pytest.raises(EnvironmentFailed, match="could not look up owner/base") as caught:
        client.resolve("owner/base")
    assert str(status) in str(caught.value)
    assert says in str(caught.value)
    assert server.url in str(caught.value)


@pytest.mark.parametrize("status", [403, 404, 429, 500])
def test_an_error_for_one_file_fails_the_download(status: int, server: HubServer) -> None:
    server.add_repo("owner/base", BASE)
    server.fail("HEAD", "model.safetensors", status)
    with pytest.raises(EnvironmentFailed, match="could not download owner/base") as caught:
        client.resolve("owner/base")
    assert str(status) in str(caught.value)


def test_a_hub_that_does_not_answer_is_given_up(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    server.add_repo("owner/base", BASE)
    server.fail("GET", "/api/models", "hang")
    started = time.monotonic()
    with pytest.raises(EnvironmentFailed, match=r"could not look up owner/base .*[Tt]ime"):
        client.resolve("owner/base")
    assert time.monotonic() - started < 10


def test_a_download_that_stops_short_is_no_download(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("owner/base", BASE)
    server.fail("GET", "/lfs/", "truncate")
    with pytest.raises(EnvironmentFailed, match="could not download owner/base"):
        client.resolve("owner/base")
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))


def test_after_a_failed_download_the_next_one_is_whole(server: HubServer) -> None:
    server.add_repo("owner/base", BASE)
    server.fail("GET", "/lfs/", "truncate")
    with pytest.raises(EnvironmentFailed):
        client.resolve("owner/base")
    server.faults.clear()
    assert (client.resolve("owner/base") / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_a_stalled_download_at_once(
    number: signal.Signals, code: int, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub waits for its threads, and they for the host, which they ask five times."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "100")
    server.add_repo("owner/base", BASE)
    server.fail("GET", "/lfs/", "hang")
    before = server.faults[0].times
    command = [sys.executable, "-m", "loudmerge", "inspect", "owner/base"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        started = time.monotonic()
        while server.faults[0].times == before and time.monotonic() - started < 60:
            time.sleep(0.05)
        running.send_signal(number)
        try:
            _, said = running.communicate(timeout=30)
        finally:
            running.kill()
    # huggingface_hub's bar, which another thread draws, may have the last word.
    assert running.returncode == code
    assert any(line.endswith("interrupted") for line in said.splitlines())
    server.faults.clear()
    assert (client.resolve("owner/base") / "model.safetensors").read_bytes() == WEIGHTS


def test_an_answer_that_is_not_the_hubs_is_no_defect_of_loudmerge(server: HubServer) -> None:
    server.fail("GET", "/api/models", "html")
    with pytest.raises(EnvironmentFailed, match=r"could not look up owner/base .*JSON"):
        client.resolve("owner/base")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Data processing error: No space left on device (os error 28)"),
    ],
    ids=["huggingface_hub", "hf_xet"],
)
def test_a_full_cache_is_no_matter_of_the_network(
    error: Exception, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("owner/base", BASE)

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(EnvironmentFailed, match=r"No space left on device.*\. Make room for .*HF_HUB_CACHE"):
        client.resolve("owner/base")


def test_an_endpoint_that_is_no_address_is_a_wrong_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.com")
    with pytest.raises(ValueError, match=r"HF_ENDPOINT is 'hub\.example\.com', expected an http"):
        client.resolve("owner/base")


def test_without_the_extra_its_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFailed, match=r"pip install 'loudmerge\[hub\]'"):
        client.resolve("owner/base")
    with pytest.raises(EnvironmentFailed, match=r"pip install 'loudmerge\[hub\]'"):
        upload.push_target("me/model")
