"""Environments by the real venv and pip, of tiny packages in a folder: no package index is asked."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from loudmerge.compat.environments import commands, environment, links
from loudmerge.compat.environments.children import Children
from loudmerge.compat.environments.commands import NotInstalled, Unreachable
from loudmerge.compat.environments.environment import STAMP, Environment, Installer, Stamp
from tests.unit.compat import checkout
from tests.unit.compat.local_index import LocalIndex, ask
from tests.unit.compat.made import VERSIONS, cell


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return checkout.make(tmp_path, monkeypatch)


def make(root: Path, pins: Mapping[str, str], name: str = "one") -> tuple[Environment, bool]:
    made = Environment(root / ".compat" / "env" / name)
    wanted = environment.requirements(pins)
    log = root / ".compat" / "logs" / "one.txt"
    return made, made.make(root, wanted, Installer.of(root, {}), Children(), log)


def test_an_environment_is_made_reused_rebuilt_and_reported(root: Path) -> None:
    """Reused while the pins are the same; rebuilt when they move; a failure leaves none that counts."""
    one, made = make(root, VERSIONS)
    assert made
    assert one.versions().items() >= {**VERSIONS, "torch": "2.13.0"}.items()
    (one.directory / "mine").touch()
    assert not make(root, VERSIONS)[1]
    assert (one.directory / "mine").exists()

    older = {**VERSIONS, "peft": "0.18.1"}
    assert make(root, older)[1]
    assert one.versions()["peft"] == "0.18.1"
    assert not (one.directory / "mine").exists()

    with pytest.raises(NotInstalled, match=r"No matching distribution found for peft==0\.1"):
        make(root, {**VERSIONS, "peft": "0.1"})
    stamp = Stamp.of(root, environment.requirements(older), Installer.of(root, {}))
    assert not one.is_of(stamp)
    log = (root / ".compat" / "logs" / "one.txt").read_text("utf-8")
    assert "peft==0.1" in log.splitlines()[1]
    assert "ERROR: No matching distribution found for peft==0.1" in log


@dataclass(frozen=True)
class Careless(Installer):
    """Installs another peft than it is asked for."""

    def install(self, python: Path, wanted: Sequence[str]) -> list[str]:
        return super().install(python, [one.replace("peft==0.19.1", "peft==0.18.1") for one in wanted])


def test_what_an_installer_left_is_compared_with_the_pins(root: Path) -> None:
    made, wanted = Environment(root / "env"), environment.requirements(VERSIONS)
    installer = Careless(Installer.of(root, {}).torch)
    with pytest.raises(NotInstalled, match=r"installer left peft 0\.18\.1, expected 0\.19\.1: see"):
        made.make(root, wanted, installer, Children(), root / "log.txt")
    assert not made.is_of(Stamp.of(root, wanted, installer))


@pytest.mark.parametrize(
    ("found", "wanted", "says"),
    [
        ({"torch": "2.13.0+cpu", "peft": "1.0"}, {"torch": "2.13.0", "peft": "1.0.0"}, ""),
        ({"torch": "2.13.0"}, {"torch": "2.13.0+cpu"}, ""),
        ({"peft": "0.19.1"}, {"peft": "0.19.10"}, "peft 0.19.1, expected 0.19.10"),
        ({"peft": "10"}, {"peft": "1"}, "peft 10, expected 1"),
        ({}, {"peft": "1", "trl": "2"}, "peft none, expected 1, trl none, expected 2"),
    ],
)
def test_versions_differ_by_more_than_a_build_and_zeros(
    found: dict[str, str], wanted: dict[str, str], says: str
) -> None:
    assert environment.differing(found, wanted) == says


@pytest.mark.parametrize("text", ["", '{"stamp": {', "[]", '{"stamp": {}, "versions": null}'])
def test_a_stamp_that_was_not_written_to_its_end_is_none(root: Path, text: str) -> None:
    """Neither is one that lacks what is read of it: the environment is made anew."""
    checkout.in_place(root, cell())
    made = checkout.options(root, ()).environment("one")
    stamp = Stamp.of(root, environment.requirements(VERSIONS), Installer.of(root, {}))
    assert made.is_of(stamp)
    document = json.loads((made.directory / STAMP).read_text("utf-8"))
    for broken in (text, json.dumps({"stamp": document["stamp"]})):
        (made.directory / STAMP).write_text(broken, "utf-8")
        assert not made.is_of(stamp)
        assert environment._complete(made.directory.parent) == {}
        assert made.versions() == {}


def test_an_environment_is_not_asked_what_the_caller_s_python_path_has(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = root / "outside" / "peft-9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9\n", "utf-8")

    def logged(command: Sequence[str], children: Children, log: Path) -> None:
        commands.logged(command, children, log)
        if "install" in command:
            monkeypatch.setenv("PYTHONPATH", str(root / "outside"))

    monkeypatch.setattr(environment, "logged", logged)
    assert make(root, VERSIONS)[0].versions()["peft"] == "0.19.1"


def test_no_variable_chooses_what_runs_inside() -> None:
    chosen = {
        "PYTEST_ADDOPTS": "-k ok",
        "PYTEST_PLUGINS": "mine",
        "HYPOTHESIS_PROFILE": "quick",
        "PYTHONOPTIMIZE": "1",
        "PYTHONPATH": "/elsewhere",
        "CI": "1",
    }
    kept = environment.sealed({**chosen, "PATH": "/bin", "HF_HUB_CACHE": "/cache"})
    assert not kept.keys() & chosen.keys()
    assert (kept["PATH"], kept["HF_HUB_CACHE"]) == ("/bin", "/cache")


def test_environments_share_their_large_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both hold is on the disk once; where that cannot be, the log says why, and each has its own."""
    monkeypatch.setattr(links, "LEAST_BYTES", 1)
    large = "peft-0.19.1.dist-info/WHEEL"
    one, _ = make(root, VERSIONS)
    two, _ = make(root, VERSIONS, "two")
    assert _found(one, large).samefile(_found(two, large))
    log = root / ".compat" / "logs" / "one.txt"
    assert "MiB shared with the other environments, 1" in log.read_text("utf-8")

    def no_link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    three, made = make(root, VERSIONS, "three")
    assert made
    assert not _found(one, large).samefile(_found(three, large))
    assert "Operation not permitted" in log.read_text("utf-8")


def test_a_new_environment_takes_what_another_has_of_its_pins(root: Path) -> None:
    one, _ = make(root, VERSIONS)
    newer = {**VERSIONS, "peft": "0.18.1"}
    two, _ = make(root, newer, "two")
    stamp = json.loads((two.directory / "stamp.json").read_text("utf-8"))
    wanted = {name for name, version in newer.items() if VERSIONS[name] == version} | {"torch"}
    assert stamp["seeded"] == dict.fromkeys(wanted, str(one.directory))
    assert two.versions()["peft"] == "0.18.1"
    source = _found(one, "tiny_trl.py")
    py_compile.compile(str(source))
    two.share_bytecode()
    assert _found(two, f"__pycache__/tiny_trl.{sys.implementation.cache_tag}.pyc").is_file()
    installer = replace(Installer.of(root, {}), index="https://elsewhere.invalid/simple")
    stamp = Stamp.of(root, environment.requirements(VERSIONS), installer)
    assert Environment(one.directory.with_name("three"))._seed(stamp) == {}


def _found(one: Environment, place: str) -> Path:
    (file,) = one.directory.glob(f"lib/*/site-packages/{place}")
    return file


@pytest.mark.parametrize("change", ["requirements", "torch", "index", "project"])
def test_a_stamp_is_of_all_that_an_environment_is_made_of(root: Path, change: str) -> None:
    wanted, installer = environment.requirements(VERSIONS), Installer.of(root, {})
    before = Stamp.of(root, wanted, installer)
    assert Stamp.of(root, wanted, installer) == before
    if change == "requirements":
        wanted = environment.requirements({**VERSIONS, "trl": "1.4.0"})
    elif change == "torch":
        installer = Installer.of(root, {"LOUDMERGE_TORCH": "torch==2.12.0"})
    elif change == "index":
        installer = Installer.of(root, {"LOUDMERGE_TORCH_INDEX": "https://example.invalid/cpu"})
    else:
        text = checkout.PROJECT.replace('version = "1.0"', 'version = "1.0"\ndependencies = ["click"]')
        (root / "pyproject.toml").write_text(text, "utf-8")
    assert Stamp.of(root, wanted, installer) != before


def test_torch_is_pinned_in_one_place_and_an_environment_variable_replaces_it(root: Path) -> None:
    assert Installer.of(root, {}) == Installer("torch==2.13.0")
    environ = {"LOUDMERGE_TORCH": "torch==2.12.0", "LOUDMERGE_TORCH_INDEX": "https://example.invalid/cpu"}
    found = Installer.of(root, environ)
    assert (found.torch, found.index) == ("torch==2.12.0", "https://example.invalid/cpu")
    line = found.install(Path("python"), ["torch==2.12.0", "peft==1"])
    assert line[-4:] == ["--extra-index-url", "https://example.invalid/cpu", "torch==2.12.0", "peft==1"]


def test_uv_takes_the_place_of_venv_and_pip() -> None:
    by_uv = Installer("torch==2.13.0", "https://example.invalid/cpu", uv=True)
    assert by_uv.create(Path("env"))[:2] == ["uv", "venv"]
    line = by_uv.install(Path("env/bin/python"), ["peft==1"])
    assert line[:5] == ["uv", "pip", "install", "--python", "env/bin/python"]
    assert {"--extra-index-url", "unsafe-best-match"} <= set(line)
    assert Installer.of(Path.cwd(), {"LOUDMERGE_UV": "1"}).uv


def test_an_installer_that_is_not_there_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    made = Environment(root / "env")
    with pytest.raises(NotInstalled, match="uv is not installed"):
        made.make(root, (), Installer("torch==2.13.0", uv=True), Children(), root / "log.txt")


def test_the_newest_is_what_the_index_serves(root: Path) -> None:
    found = environment.pins(cell(lane="latest", versions={}), Installer.of(root, {}), {}, Children())
    assert found == VERSIONS


def test_the_newest_is_read_though_an_index_has_to_send_its_wheels(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip draws a bar for what takes time to send: it is none of its report."""
    index = LocalIndex(tmp_path)
    for name, version in {**VERSIONS, "torch": "2.13.0"}.items():
        index.offer(name, version, padding=1 << 20)
    with index.served() as url:
        ask(monkeypatch, url)
        assert environment.newest(Installer.of(root, {}), Children()) == VERSIONS


def test_an_environment_that_was_being_removed_when_the_run_ended_is_none(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the new pins nor of those that it had."""
    one, _ = make(root, VERSIONS)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        make(root, {**VERSIONS, "peft": "0.18.1"})
    assert not one.is_of(Stamp.of(root, environment.requirements(VERSIONS), Installer.of(root, {})))


def test_an_index_without_an_answer_is_unreachable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(Unreachable, match="transformers"):
        environment.newest(Installer.of(root, {}), Children())
    with pytest.raises(Unreachable, match="torch"):
        make(root, VERSIONS)


def test_heads_are_pinned_to_their_commits(tmp_path: Path) -> None:
    repositories = {name: f"owner/{name}" for name in ("transformers", "peft")}
    commits = {name: _repository(tmp_path / "owner" / name) for name in repositories}
    base = tmp_path.as_uri()
    found = environment.pins(
        cell(lane="dev", versions=repositories), Installer("torch"), {"LOUDMERGE_GITHUB": base}, Children()
    )
    assert found == {name: f"git+{base}/owner/{name}@{commits[name]}" for name in repositories}
    assert environment.requirements(found)[1] == f"peft @ git+{base}/owner/peft@{commits['peft']}"


def _repository(directory: Path) -> str:
    git = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e"]
    directory.mkdir(parents=True)
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_heads_that_cannot_be_reached_say_so_without_the_address() -> None:
    with pytest.raises(Unreachable, match="fatal: ") as raised:
        environment.heads({"peft": "huggingface/peft"}, "http://user:secret@127.0.0.1:9", Children())
    assert "://" not in str(raised.value)


def test_a_repository_that_is_not_there_is_no_fault_of_the_host(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="fatal: ") as raised:
        environment.heads({"peft": "huggingface/pfet"}, (tmp_path / "user:secret").as_uri(), Children())
    assert "://" not in str(raised.value)


def test_a_git_that_is_not_there_is_no_fault_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotInstalled, match="git is not installed"):
        environment.heads({"peft": "huggingface/peft"}, "http://127.0.0.1:9", Children())


def test_a_repository_without_a_commit_is_no_fault_of_the_host(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path / "h" / "peft")], check=True)
    with pytest.raises(NotInstalled, match="h/peft has no HEAD"):
        environment.heads({"peft": "h/peft"}, tmp_path.as_uri(), Children())


def test_a_cell_runs_in_this_python(root: Path) -> None:
    installer = Installer.of(root, {})
    assert installer.create(Path("env")) == [sys.executable, "-m", "venv", "--without-pip", "env"]
    line = installer.install(Path("env/bin/python"), ["peft==1"])
    assert line[:6] == [sys.executable, "-m", "pip", "--python", "env/bin/python", "install"]
