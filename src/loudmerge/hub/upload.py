"""Uploads a verified OUT to the Hub, with a model card. Needs the extra `hub`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loudmerge import __version__
from loudmerge.errors import EnvironmentFailed, require, some
from loudmerge.hub.client import HubId, api, asking, endpoint, matches, names_of
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.sidefiles import CARD, REPORT
from loudmerge.system import jsonfile

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import ModelInfo

LOADED = ("*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG)
"""Names at the top of a repository that make a loader read them as weights, or put an adapter on top."""

PUSH_AGAIN = " OUT is complete; push it again with loudmerge.hub.upload.push."


def push_target(repo: str) -> HubId:
    """Checks what can be known about a push before the merge it is to follow; asks nobody.

    Raises ValueError unless `repo` is owner/name, EnvironmentFailed without the extra or when offline.
    """
    target = HubId.parse(repo)
    if target is None or target.revision:
        raise ValueError(f"{repo} is no repository to push to, expected owner/name")
    require("hub", "huggingface_hub")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFailed(f"cannot push to {repo}: HF_HUB_OFFLINE is set. Unset it to push.")
    endpoint()
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

    head = _head_of_target(target)
    _refuse_other_weights(target, names, names_of(head))
    additions = [CommitOperationAdd(name, str(out / name)) for name in names if name not in (CARD, REPORT)]
    additions.append(CommitOperationAdd(REPORT, _public(report, base, adapter, target)))
    additions.append(CommitOperationAdd(CARD, card.encode()))
    # For failed uploads and answers it cannot use huggingface_hub raises plain RuntimeError and ValueError.
    with asking(f"upload {out} to {repo}", RuntimeError, ValueError, then=PUSH_AGAIN):
        commit = api().create_commit(
            target.repo,
            additions,
            commit_message=f"Merge {_shown(adapter)} into {_shown(base)} (loudmerge {__version__})",
            parent_commit=head.sha,
        )
    _compare_with_sent(target, commit.oid, additions)
    return str(commit.commit_url)


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
            f"Missing: {some({*names} - {*found})}. "
            f"Not of the merge: {some({*found} - {*names})}."
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
    from loudmerge.hub.modelcard import model_card

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


def _head_of_target(target: HubId) -> ModelInfo:
    """The newest commit of the repository, which is created where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    with asking(f"look up or create {target}", then=PUSH_AGAIN):
        try:
            return api().model_info(target.repo, timeout=timeout)
        except RepositoryNotFoundError:
            api().create_repo(target.repo)
            return api().model_info(target.repo, timeout=timeout)


def _refuse_other_weights(target: HubId, names: Sequence[str], there: Sequence[str]) -> None:
    """A loader that finds an older model.safetensors, index or adapter beside OUT's files would use it."""
    others = sorted(name for name in {*there} - {*names} if "/" not in name and matches(name, LOADED))
    if others:
        raise EnvironmentFailed(
            f"{target} already holds {some(others)}, which this push would leave beside the merged weights "
            "and which loaders would read. Push to another repository, or remove them there first."
        )


def _compare_with_sent(target: HubId, commit: str, sent: Sequence[CommitOperationAdd]) -> None:
    """The Hub leaves out, for one, what a .gitignore in the repository matches."""
    from huggingface_hub.hf_api import RepoFile

    with asking(f"list what commit {commit} of {target} holds"):
        entries = list(api().list_repo_tree(target.repo, recursive=True, revision=commit))
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    wrong = sorted(item.path_in_repo for item in sent if not _same(item, there.get(item.path_in_repo)))
    if wrong:
        raise EnvironmentFailed(
            f"{target} does not hold what was sent: commit {commit} lacks or has otherwise {some(wrong)}. "
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
