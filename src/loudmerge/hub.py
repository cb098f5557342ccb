"""Models and adapters on the Hub: download by id, and upload of a verified OUT. Needs the extra `hub`.

huggingface_hub is imported when it is needed. HF_ENDPOINT is read at each call, and everything else
(HF_TOKEN, HF_HUB_OFFLINE, HF_HOME, timeouts, proxies) is left to huggingface_hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from loudmerge import __version__, jsonfile
from loudmerge.errors import EnvironmentFailed, MergeRefused, Problem
from loudmerge.sidefiles import CARD, MODULES, REPORT, is_other_weights, module_folders

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo


NOT_DOWNLOADED = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.ot", "*.npz"),
    *("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite"),
    # Second copies of the weights, which no loader of a checkpoint directory reads.
    *("consolidated*.safetensors", "*/*.safetensors"),
)
"""Patterns, of the whole path, of other formats and other copies of weights, which a merge never reads."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LOADED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Names at the top of a repository that make a loader read them as weights, or put an adapter on top."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[^\s@]+")

TRY_AGAIN = "Check the network and try again."
USE_CACHE = "Check the network and try again, or set HF_HUB_OFFLINE=1 to take what is in the cache."
PUSH_AGAIN = "OUT is complete; push it again with loudmerge.hub.push."
UNSET_OFFLINE = "HF_HUB_OFFLINE is set; unset it to download."

HINTS: Mapping[int, str] = MappingProxyType(
    {
        401: "Log in with `hf auth login`, or set HF_TOKEN to a token that has this permission.",
        403: "Ask for access on the model's page, or use a token (HF_TOKEN) that has this permission.",
        404: "Check owner, name and revision; a private one also needs a token (HF_TOKEN).",
        409: "The repository changed meanwhile; look at it and try again.",
        412: "The repository changed meanwhile; look at it and try again.",
        429: "The Hub limits how often it is asked; wait some minutes and try again.",
    }
)


@dataclass(frozen=True)
class HubId:
    """`owner/name` and a branch, tag or commit, None for the default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @classmethod
    def parse(cls, name: str) -> HubId | None:
        """The id that `name` spells, or None."""
        repo, at, revision = name.partition("@")
        if not _REPO.fullmatch(repo) or (at and not _REVISION.fullmatch(revision)):
            return None
        return cls(repo, revision or None)


def resolve(name: str | Path) -> Path:
    """The directory of a model or adapter: `name` itself where it is one, else a snapshot from the Hub.

    Of `owner/name[@revision]` everything is downloaded but other copies of the model's weights.
    A revision that is in the cache is not downloaded again, but the Hub is asked for it; with
    HF_HUB_OFFLINE=1 it is not, and the cache is taken as it is.

    Raises ValueError when `name` is neither, MergeRefused `unsafe-file` when the repository has pickled
    weights only, EnvironmentFailed when the Hub cannot be reached or says no.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file, expected the directory of a model or adapter")
    hub_id = HubId.parse(str(name))
    if hub_id is None:
        raise ValueError(
            f"{name} is neither an existing directory nor a Hub id (owner/name or owner/name@revision)"
        )
    return _download(hub_id)


def push_target(repo: str) -> HubId:
    """Checks what can be known about a push before the merge it is to follow; asks nobody.

    Raises ValueError unless `repo` is owner/name, EnvironmentFailed without the extra or when offline.
    """
    target = HubId.parse(repo)
    if target is None or target.revision:
        raise ValueError(f"{repo} is no repository to push to, expected owner/name")
    _require_hub()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFailed(f"cannot push to {repo}: HF_HUB_OFFLINE is set. Unset it to push.")
    _endpoint()
    return target


def push(out: Path, repo: str, *, base: str, adapter: str) -> str:
    """Uploads a merged and verified OUT with a model card, as one commit, and returns the commit's URL.

    base, adapter: the inputs as the user named them. The repository is created where there is none;
    nothing in it is deleted, and OUT on disk stays as it is. The report that is pushed names the inputs as
    the card does: a Hub id, or the last name of a local path. Afterwards the commit is compared with what was
    sent.

    Raises ValueError when OUT must not be pushed: no report, not merged, not verified, or files other than
    the report lists. Raises EnvironmentFailed when the Hub cannot be reached or says no, when the repository
    holds other weights that a loader would read instead of OUT's, or when it did not keep what was sent.
    """
    target = push_target(repo)
    report, names = _published(out)
    card = _card(out, report, base, adapter)
    from huggingface_hub import CommitOperationAdd

    api = _api()
    head = _head_of_target(api, target)
    _refuse_other_weights(target, names, _names(head))
    additions = [CommitOperationAdd(name, str(out / name)) for name in names if name not in (CARD, REPORT)]
    additions.append(CommitOperationAdd(REPORT, _public(report, base, adapter, target)))
    additions.append(CommitOperationAdd(CARD, card.encode()))
    # For failed uploads and answers it cannot use huggingface_hub raises plain RuntimeError and ValueError.
    with _asking(f"upload {out} to {repo}", RuntimeError, ValueError, hint=PUSH_AGAIN):
        commit = api.create_commit(
            target.repo,
            additions,
            commit_message=f"Merge {_shown(adapter)} into {_shown(base)} (loudmerge {__version__})",
            parent_commit=head.sha,
        )
    _compare_with_sent(api, target, commit.oid, additions)
    return str(commit.commit_url)


def _download(hub_id: HubId) -> Path:
    _require_hub()
    from huggingface_hub import constants, snapshot_download

    offline = bool(constants.HF_HUB_OFFLINE)
    hint = UNSET_OFFLINE if offline else USE_CACHE
    # Asked for first, because snapshot_download falls back to the cache on most errors, in silence.
    wanted = [] if offline else _files_to_get(hub_id)
    # hf_xet's downloads fail with plain RuntimeError.
    with _asking(f"download {hub_id}", RuntimeError, hint=hint):
        snapshot = snapshot_download(
            hub_id.repo,
            revision=hub_id.revision,
            ignore_patterns=list(NOT_DOWNLOADED),
            endpoint=_endpoint(),
            local_files_only=offline,
            library_name="loudmerge",
            library_version=__version__,
        )
        for name in wanted:
            if _matches(name, NOT_DOWNLOADED):
                _api().hf_hub_download(hub_id.repo, name, revision=hub_id.revision)
    missing = [name for name in wanted if not Path(snapshot, name).is_file()]
    if missing:
        raise EnvironmentFailed(
            f"the download of {hub_id} is incomplete: {snapshot} lacks {_some(missing)}. Try again."
        )
    return Path(snapshot)


def _files_to_get(hub_id: HubId) -> list[str]:
    """The names at that revision that a merge may read."""
    from huggingface_hub import constants

    what = f"look up {hub_id} (there is no local directory of that name)"
    with _asking(what, hint=USE_CACHE):
        info = _api().model_info(hub_id.repo, revision=hub_id.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    names = _names(info)
    _refuse_pickles(hub_id, names)
    folders = _module_folders(hub_id) if MODULES in names else frozenset()
    return [name for name in names if not _matches(name, NOT_DOWNLOADED) or is_other_weights(name, folders)]


def _module_folders(hub_id: HubId) -> frozenset[PurePosixPath]:
    with _asking(f"download {MODULES} of {hub_id}", hint=USE_CACHE):
        file = _api().hf_hub_download(hub_id.repo, MODULES, revision=hub_id.revision)
    return module_folders(Path(file))


def _refuse_pickles(hub_id: HubId, names: Sequence[str]) -> None:
    pickles = [name for name in names if _matches(name, PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise MergeRefused(
            Problem(
                "unsafe-file",
                f"{hub_id} on the Hub",
                f"weights in pickle files only ({_some(pickles)})",
                "weights in safetensors files",
                "Unpickling can run any code; convert them where you trust them, with save_pretrained.",
            )
        )


def _published(out: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The report of a verified OUT and the names of its files, or ValueError."""
    try:
        report = jsonfile.parse((out / REPORT).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ValueError(
            f"{out} cannot be pushed: found no readable {REPORT} in it ({error}), expected a merge's OUT"
        ) from error
    status = report.get("status") if isinstance(report, dict) else None
    if status != "merged":
        raise ValueError(f"{out} cannot be pushed: its {REPORT} says status {status!r}, expected 'merged'")
    if report.get("verified") is not True:
        raise ValueError(
            f"{out} cannot be pushed: it was not verified. Merge it again without --no-verify (verify=True)."
        )
    names = sorted({*report["files"], REPORT})
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    if found != names:
        raise ValueError(
            f"{out} cannot be pushed: it is not as the merge left it. "
            f"Missing: {_some(set(names) - set(found))}. Not of the merge: {_some(set(found) - set(names))}."
        )
    return report, names


def _public(report: Mapping[str, Any], base: str, adapter: str, target: HubId) -> bytes:
    """The report without the paths of this machine."""
    named = {
        name: {**report[name], "path": _shown(given)}
        for name, given in (("base", base), ("adapter", adapter))
    }
    return jsonfile.dump({**report, **named, "out": str(target)})


def _card(out: Path, report: Mapping[str, Any], base: str, adapter: str) -> str:
    from loudmerge.modelcard import model_card

    readme = out / CARD
    hub_id = None if Path(base).exists() else HubId.parse(base)
    return model_card(
        report,
        base=_shown(base),
        adapter=_shown(adapter),
        base_model=hub_id.repo if hub_id else None,
        readme=readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None,
    )


def _shown(name: str) -> str:
    """A Hub id as it is; of a local path, whose folders are nobody's business, the last name."""
    return Path(name).resolve().name if Path(name).exists() or HubId.parse(name) is None else name


def _head_of_target(api: HfApi, target: HubId) -> ModelInfo:
    """The newest commit of the repository, which is created where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    with _asking(f"look up or create {target}"):
        try:
            return api.model_info(target.repo, timeout=timeout)
        except RepositoryNotFoundError:
            api.create_repo(target.repo, exist_ok=True)
            return api.model_info(target.repo, timeout=timeout)


def _refuse_other_weights(target: HubId, names: Sequence[str], there: Sequence[str]) -> None:
    """A loader that finds an older model.safetensors, index or adapter beside OUT's files would use it."""
    others = [name for name in there if "/" not in name and name not in names and _matches(name, LOADED)]
    if others:
        raise EnvironmentFailed(
            f"{target} already holds {_some(others)}, which this push would leave beside the merged weights "
            "and which loaders would read. Push to another repository, or remove them there first."
        )


def _compare_with_sent(api: HfApi, target: HubId, commit: str, sent: Sequence[CommitOperationAdd]) -> None:
    """The Hub leaves out, for one, what a .gitignore in the repository matches."""
    from huggingface_hub.hf_api import RepoFile

    with _asking(f"list what commit {commit} of {target} holds"):
        entries = list(api.list_repo_tree(target.repo, recursive=True, revision=commit))
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    wrong = [item.path_in_repo for item in sent if not _same(item, there.get(item.path_in_repo))]
    if wrong:
        raise EnvironmentFailed(
            f"{target} does not hold what was sent: commit {commit} lacks or has otherwise {_some(wrong)}. "
            "Is there a .gitignore in that repository? Do not use that commit; push again without the cause."
        )


def _same(item: CommitOperationAdd, there: Any) -> bool:
    if there is None:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == item.upload_info.sha256.hex())
    with item.as_file() as stream:
        data = stream.read()
    # How git names a blob, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects.
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return bool(there.blob_id == blob.hexdigest())


def _require_hub() -> None:
    try:
        import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise EnvironmentFailed(
            f'the Hub needs huggingface_hub ({error}). Install it with: pip install "loudmerge[hub]"'
        ) from error


def _endpoint() -> str | None:
    """HF_ENDPOINT as it is now (huggingface_hub reads it once, at its import), None for the Hub itself."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if endpoint and not (urlsplit(endpoint).scheme in ("http", "https") and urlsplit(endpoint).netloc):
        raise ValueError(f"HF_ENDPOINT is {endpoint!r}, expected an http(s) address")
    return endpoint or None


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), library_name="loudmerge", library_version=__version__)


@contextmanager
def _asking(what: str, *also: type[Exception], hint: str = TRY_AGAIN) -> Iterator[None]:
    """Turns what huggingface_hub raises inside into EnvironmentFailed: what was asked, what came back.

    Its own errors, and those of requests (before 1.0), are OSErrors. Those of httpx and httpx2 (from 1.0
    and 2.0 on) are not, and are found as a base of its error class. JSONDecodeError: an answer that is not
    the Hub's. hint: what helps where the status says nothing.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (transport, OSError, json.JSONDecodeError, *also) as error:
        where = _endpoint() or constants.ENDPOINT
        chain = _chain(error)
        raise EnvironmentFailed(
            f"could not {what} at {where}: {_told(chain)}. {_hint(chain) or hint}"
        ) from error


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    return chain


def _told(chain: Sequence[BaseException]) -> str:
    """What an error and its causes say, each thing once, on one line."""
    said = dict.fromkeys(" ".join(f"{type(link).__name__}: {link}".split()) for link in chain)
    return ", because of ".join(said).rstrip(".")


def _hint(chain: Sequence[BaseException]) -> str | None:
    responses = (getattr(link, "response", None) for link in chain)
    return next((HINTS[r.status_code] for r in responses if r is not None and r.status_code in HINTS), None)


def _names(info: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or ()]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _some(names: Sequence[str] | set[str], shown: int = 5) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return (", ".join(listed[:shown]) or "none") + more
