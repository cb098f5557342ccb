"""Pushes of an OUT against a real HTTP server that speaks the Hub's API (`tests.support.hub_server`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from loudmerge import EnvironmentFailed
from loudmerge.hub import client, upload
from loudmerge.reading.sidefiles import is_card_of
from tests.support.hub_state import BASE, CONFIG, HubServer
from tests.unit.places import content

pytest.importorskip("huggingface_hub")

# huggingface_hub 1 and 2 upload by a way that their HTTP client is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def report(**changes: Any) -> dict[str, Any]:
    none = {"attempted": 0, "applied": 0}
    return {
        "schema": 1,
        "loudmerge": "0.1.0",
        "status": "merged",
        "verified": True,
        "base": {"path": "/home/someone/base", "model_type": "qwen3_moe"},
        "adapter": {"path": "/home/someone/adapter", "peft_version": "0.19.1", "rank": 4},
        "layout": {"orientation": "standard", "lora_b_layout": "rank_major", "evidence": []},
        "counts": {
            "expert": {"attempted": 24, "applied": 24},
            "dense": none,
            "replaced": none,
            "copied": 7,
        },
        "adapter_tensors": {"total": 4, "consumed": 4},
        "delta_kept": {"overall": 0.998, "least": {"tensor": "t", "kept": 0.97}},
        "files": sorted(BASE),
    } | changes


def merged(out: Path, **changes: Any) -> Path:
    """A directory as a merge leaves it."""
    out.mkdir()
    for name, data in BASE.items():
        (out / name).write_bytes(data)
    (out / "merge_report.json").write_text(json.dumps(report(**changes)))
    return out


def push(out: Path, repo: str = "me/model") -> str:
    return upload.push(out, repo, base="owner/base", adapter="owner/adapter")


def test_a_push_is_one_commit_with_the_bytes_of_out(server: HubServer, tmp_path: Path) -> None:
    out = merged(tmp_path / "out")
    before = content(out)
    url = push(out)
    first, commit = server.repos["me/model"]
    assert url == f"{server.url}/me/model/commit/{commit.oid}"
    assert set(commit.added) == {*before, "README.md"}
    assert commit.deleted == ()
    for name, data in before.items():
        if name != "merge_report.json":
            assert hashlib.sha256(commit.files[name]).hexdigest() == hashlib.sha256(data).hexdigest(), name
    assert commit.files[".gitattributes"] == first.files[".gitattributes"]
    assert "base_model: owner/base\n" in commit.files["README.md"].decode()
    assert commit.message.startswith("Merge owner/adapter into owner/base (loudmerge ")
    assert content(out) == before


def test_what_was_pushed_can_be_downloaded(server: HubServer, tmp_path: Path) -> None:
    assert server.repos == {}
    out = merged(tmp_path / "out")
    push(out)
    got = content(client.resolve("me/model"))
    assert {
        name: data for name, data in content(out).items() if name != "merge_report.json"
    }.items() <= got.items()


def test_a_push_into_an_existing_repository_deletes_nothing(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("me/model", {"notes.txt": b"mine", "model.gguf": b"gguf", "config.json": b"old"})
    push(merged(tmp_path / "out"))
    commit = server.head("me/model")
    assert commit.deleted == ()
    assert (commit.files["notes.txt"], commit.files["model.gguf"]) == (b"mine", b"gguf")
    assert commit.files["config.json"] == CONFIG
    assert not [request for request in server.requests if request.method == "DELETE"]


def test_a_second_push_of_the_same_out_is_no_error(server: HubServer, tmp_path: Path) -> None:
    out = merged(tmp_path / "out")
    assert push(out) == push(out)
    assert len(server.repos["me/model"]) == 2


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"]
)
def test_weights_that_a_loader_would_take_instead_refuse_the_push(
    name: str, server: HubServer, tmp_path: Path
) -> None:
    server.add_repo("me/model", {name: b"{}"})
    with pytest.raises(EnvironmentFailed, match=f"me/model already holds {name}.*Push to another repository"):
        push(merged(tmp_path / "out"))
    assert server.writes == []


def _unverified(out: Path) -> None:
    (out / "merge_report.json").write_text(json.dumps(report(verified=False)))


def _refused(out: Path) -> None:
    (out / "merge_report.json").write_text(json.dumps(report(status="refused")))


def _without_report(out: Path) -> None:
    (out / "merge_report.json").unlink()


def _broken_report(out: Path) -> None:
    (out / "merge_report.json").write_text("{")


def _with_another_file(out: Path) -> None:
    (out / "model-00002.safetensors").write_bytes(b"")


def _without_a_file(out: Path) -> None:
    (out / "generation_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_unverified, "was not verified. Merge it again without --no-verify"),
        (_refused, "says status 'refused', expected 'merged'"),
        (_without_report, "found no readable merge_report.json"),
        (_broken_report, "found no readable merge_report.json"),
        (_with_another_file, "Not of the merge: model-00002.safetensors"),
        (_without_a_file, "Missing: generation_config.json"),
    ],
)
def test_what_is_not_a_verified_merge_is_not_pushed(
    spoil: Any, says: str, server: HubServer, tmp_path: Path
) -> None:
    out = merged(tmp_path / "out")
    spoil(out)
    with pytest.raises(ValueError, match=says):
        push(out)
    assert server.requests == []


@pytest.mark.parametrize("repo", ["model", "me/model@main", "a/b/c", "https://hub.example/me/model"])
def test_what_is_no_repository_is_a_wrong_argument(repo: str, server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no repository to push to, expected owner/name"):
        push(merged(tmp_path / "out"), repo)
    assert server.requests == []


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [
        ("GET", "/api/models/me/model", 500),
        ("POST", "/api/repos/create", 401),
        ("POST", "/api/repos/create", 403),
        ("POST", "/api/repos/create", 409),
        ("POST", "/api/repos/create", 429),
        ("POST", "/preupload/", 500),
        ("POST", "objects/batch", 403),
        ("PUT", "/lfs/", 500),
        ("PUT", "/lfs/", 403),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", 412),
    ],
)
def test_a_push_that_fails_makes_no_commit(
    method: str, pattern: str, status: int, server: HubServer, tmp_path: Path
) -> None:
    server.fail(method, pattern, status)
    with pytest.raises(EnvironmentFailed, match=r"could not (look up or create|upload) .*me/model") as caught:
        push(merged(tmp_path / "out"))
    assert str(status) in str(caught.value)
    assert str(caught.value).endswith(". OUT is complete; push it again with loudmerge.hub.upload.push.")
    assert len(server.repos.get("me/model", [None])) == 1
    assert not [request for request in server.requests if request.method == "DELETE"]


def test_a_push_without_permission_says_which_token_is_needed(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("me/model")
    server.token = "secret"
    with pytest.raises(EnvironmentFailed, match=r"could not upload .*401.*HF_TOKEN"):
        push(merged(tmp_path / "out"))
    assert len(server.repos["me/model"]) == 1


def test_a_push_that_the_hub_did_not_keep_whole_is_told(server: HubServer, tmp_path: Path) -> None:
    server.add_repo("me/model", {".gitignore": b"*.safetensors\n"})
    with pytest.raises(
        EnvironmentFailed, match=r"does not hold what was sent: .*model\.safetensors.*\.gitignore"
    ):
        push(merged(tmp_path / "out"))


def test_a_commit_by_somebody_else_meanwhile_stops_the_push(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("me/model")

    def interfere(self: HubServer, method: str, path: str) -> None:
        if method == "POST" and path.startswith("/api/models/me/model/preupload"):
            self.commit("me/model", "theirs", {"notes.txt": b"theirs"})

    monkeypatch.setattr(HubServer, "take_fault", interfere)
    with pytest.raises(EnvironmentFailed, match=r"412.*changed meanwhile"):
        push(merged(tmp_path / "out"))
    assert server.head("me/model").message == "theirs"


def test_local_paths_stay_out_of_the_pushed_report(server: HubServer, tmp_path: Path) -> None:
    """OUT's own keeps them. Nothing else in it changes."""
    out = merged(tmp_path / "out")
    (out / "merge_report.json").write_text(json.dumps(report(out="/home/someone/out")))
    (tmp_path / "private" / "my-adapter").mkdir(parents=True)
    upload.push(out, "me/model", base="owner/base@v1", adapter=str(tmp_path / "private" / "my-adapter"))
    pushed = json.loads(server.head("me/model").files["merge_report.json"])
    assert (pushed["base"]["path"], pushed["adapter"]["path"]) == ("owner/base@v1", "my-adapter")
    assert pushed["out"] == "me/model"
    kept = json.loads((out / "merge_report.json").read_text("utf-8"))
    assert kept["base"]["path"] == "/home/someone/base"
    for document in (pushed, kept):
        del document["base"]["path"], document["adapter"]["path"], document["out"]
    assert pushed == kept
    assert not any(b"/home/someone" in data for data in server.head("me/model").files.values())


def test_local_paths_stay_out_of_the_card(server: HubServer, tmp_path: Path) -> None:
    out = merged(tmp_path / "out")
    base = tmp_path / "private" / "my-base"
    base.mkdir(parents=True)
    upload.push(out, "me/model", base=str(base), adapter=str(tmp_path / "gone" / "my-adapter"))
    card = server.head("me/model").files["README.md"].decode()
    assert "`my-base`" in card
    assert "`my-adapter`" in card
    assert "base_model:" not in card
    assert str(tmp_path) not in card + server.head("me/model").message


def test_a_local_base_that_could_be_a_hub_id_is_not_named_as_one(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    push(merged(tmp_path / "out"))
    card = server.head("me/model").files["README.md"].decode()
    assert "base_model:" not in card
    assert "| Base | `base` |" in card


def test_the_readme_of_the_base_stays_in_the_card_and_in_out(server: HubServer, tmp_path: Path) -> None:
    out = merged(tmp_path / "out", files=sorted([*BASE, "README.md"]))
    readme = b"---\nlicense: apache-2.0\n---\n# The base\n\nIts text.\n"
    (out / "README.md").write_bytes(readme)
    push(out)
    card = server.head("me/model").files["README.md"].decode()
    assert "license: apache-2.0\n" in card
    assert card.endswith("# The base\n\nIts text.\n")
    assert (out / "README.md").read_bytes() == readme


def test_a_readme_of_the_base_that_is_not_utf_8_is_pushed_and_known_as_its_card(
    server: HubServer, tmp_path: Path
) -> None:
    out = merged(tmp_path / "out", files=sorted([*BASE, "README.md"]))
    readme = "# Caf\xe9\n\nIts text.\n".encode("latin-1")
    (out / "README.md").write_bytes(readme)
    push(out)
    card = server.head("me/model").files["README.md"]
    assert card.endswith("# Caf\ufffd\n\nIts text.\n".encode())
    assert is_card_of(card, readme)
    assert (out / "README.md").read_bytes() == readme
