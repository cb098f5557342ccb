"""Models and adapters on the Hub: ids, download, and how it is asked. Needs the extra `hub`.

huggingface_hub is imported when it is needed. HF_ENDPOINT is read at each call, and everything else
(HF_TOKEN, HF_HUB_OFFLINE, HF_HOME, timeouts, proxies) is left to huggingface_hub.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from loudmerge import __version__
from loudmerge.errors import TRY_AGAIN, EnvironmentFailed, MergeRefused, Problem, require, some
from loudmerge.reading.adapter_config import CONFIG as ADAPTER_CONFIG
from loudmerge.reading.adapter_config import WEIGHTS as ADAPTER_WEIGHTS
from loudmerge.reading.beside import weights_beside
from loudmerge.reading.cached import doubtful_names
from loudmerge.reading.sidefiles import CONFIG, MODULES, WEIGHT_SUFFIXES, is_other_weights, module_folders

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

T = TypeVar("T")

NOT_DOWNLOADED = (
    *(f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES - {".safetensors"})),
    "*.onnx.data",
    # Second copies of the weights, which no loader of a checkpoint directory reads.
    *("consolidated*.safetensors", "*/*.safetensors"),
)
"""Patterns, of the whole path, of other formats and other copies of weights, which a merge never reads."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[^\s@]+")

USE_CACHE = "Check the network and try again, or set HF_HUB_OFFLINE=1 to take what is in the cache."
FULL = "Make room for the Hub's cache, or set HF_HUB_CACHE to a folder on another disk."
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


def directory(name: str | os.PathLike[str]) -> Path:
    """A local directory; of a text that names none and spells a Hub id, its snapshot."""
    path = Path(name)
    if not isinstance(name, str) or path.exists() or HubId.parse(name) is None:
        return path
    return resolve(name)


def _download(hub_id: HubId) -> Path:
    require("hub", "huggingface_hub")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    offline = bool(constants.HF_HUB_OFFLINE)
    hint = UNSET_OFFLINE if offline else USE_CACHE
    # Asked for first, because snapshot_download falls back to the cache on most errors, in silence.
    wanted = [] if offline else _files_to_get(hub_id)
    # hf_xet's downloads fail with plain RuntimeError.
    with asking(f"download {hub_id}", RuntimeError, hint=hint):
        snapshot = _interruptible(
            partial(
                snapshot_download,
                hub_id.repo,
                revision=hub_id.revision,
                ignore_patterns=list(NOT_DOWNLOADED),
                endpoint=endpoint(),
                local_files_only=offline,
                library_name="loudmerge",
                library_version=__version__,
            )
        )
        for name in wanted:
            if matches(name, NOT_DOWNLOADED):
                api().hf_hub_download(hub_id.repo, name, revision=hub_id.revision)
        for name in doubtful_names(Path(snapshot)) if CONFIG in wanted else ():
            # They are not there, by the list. To ask has the cache say so to a later merge that is offline.
            with suppress(EntryNotFoundError):
                api().hf_hub_download(hub_id.repo, name, revision=hub_id.revision)
    missing = sorted(name for name in wanted if not Path(snapshot, name).is_file())
    if missing:
        raise EnvironmentFailed(
            f"the download of {hub_id} is incomplete: {snapshot} lacks {some(missing)}. Try again."
        )
    return Path(snapshot)


def _interruptible(call: Callable[[], T]) -> T:
    """What a call returns or raises, made in another thread: Ctrl-C ends the wait for it at once.

    snapshot_download waits for its own threads before it lets an interruption out, and those for a host that
    may have stalled. What they download goes on, until the process ends.
    """
    threads = ThreadPoolExecutor(1, "loudmerge-download")
    try:
        return threads.submit(call).result()
    finally:
        threads.shutdown(wait=False)


def _files_to_get(hub_id: HubId) -> list[str]:
    """The names at that revision that a merge may read."""
    from huggingface_hub import constants

    what = f"look up {hub_id} (there is no local directory of that name)"
    with asking(what, hint=USE_CACHE):
        info = api().model_info(hub_id.repo, revision=hub_id.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    names = names_of(info)
    _refuse_within(hub_id, names)
    _refuse_pickles(hub_id, names)
    _refuse_beside(hub_id, names)
    folders = _module_folders(hub_id) if MODULES in names else frozenset()
    return [name for name in names if not matches(name, NOT_DOWNLOADED) or is_other_weights(name, folders)]


def _module_folders(hub_id: HubId) -> frozenset[PurePosixPath]:
    with asking(f"download {MODULES} of {hub_id}", hint=USE_CACHE):
        file = api().hf_hub_download(hub_id.repo, MODULES, revision=hub_id.revision)
    return module_folders(Path(file))


def _refuse_within(hub_id: HubId, names: Sequence[str]) -> None:
    """Adapters in folders of the repository: their weights would not be downloaded."""
    within = sorted(str(PurePosixPath(name).parent) for name in names if name.endswith(f"/{ADAPTER_CONFIG}"))
    if within and not {ADAPTER_CONFIG, CONFIG}.intersection(names):
        get = f"hf download {hub_id.repo} --include '{within[0]}/*' --local-dir DIR"
        raise MergeRefused(
            Problem(
                "unsupported-adapter",
                f"{hub_id} on the Hub",
                f"adapters in its folders {some(within)}",
                "one adapter, or a model, at its top",
                f"Get the one that is meant (`{get}`), and give DIR/{within[0]}.",
            )
        )


def _refuse_pickles(hub_id: HubId, names: Sequence[str]) -> None:
    pickles = sorted(name for name in names if matches(name, PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise MergeRefused(
            Problem(
                "unsafe-file",
                f"{hub_id} on the Hub",
                f"weights in pickle files only ({some(pickles)})",
                "weights in safetensors files",
                "Unpickling can run any code; convert them where you trust them, with save_pretrained.",
            )
        )


def _refuse_beside(hub_id: HubId, names: Sequence[str]) -> None:
    """Not downloaded, so looked for here: weights that were trained with an adapter."""
    if ADAPTER_WEIGHTS in names:
        _, refused = weights_beside((name for name in names if "/" not in name), f"{hub_id} on the Hub")
        if refused:
            raise MergeRefused(refused)


def endpoint() -> str | None:
    """HF_ENDPOINT as it is now (huggingface_hub reads it once, at its import), None for the Hub itself."""
    found = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if found and not (urlsplit(found).scheme in ("http", "https") and urlsplit(found).netloc):
        raise ValueError(f"HF_ENDPOINT is {found!r}, expected an http(s) address")
    return found or None


def api() -> HfApi:
    """The Hub's client, for HF_ENDPOINT as it is now."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), library_name="loudmerge", library_version=__version__)


@contextmanager
def asking(what: str, *also: type[Exception], hint: str = TRY_AGAIN, then: str = "") -> Iterator[None]:
    """Turns what huggingface_hub raises inside into EnvironmentFailed: what was asked, what came back.

    Its own errors, and those of requests (before 1.0), are OSErrors. Those of httpx and httpx2 (from 1.0
    and 2.0 on) are not, and are found as a base of its error class. JSONDecodeError: an answer that is not
    the Hub's. hint: what helps where the status says nothing. then: what is said in any case.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (transport, OSError, json.JSONDecodeError, *also) as error:
        where = endpoint() or constants.ENDPOINT
        chain = _chain(error)
        raise EnvironmentFailed(
            f"could not {what} at {where}: {_told(chain)}. {_hint(chain) or hint}{then}"
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
    # By its words, as hf_xet has no error of its own for it.
    if any(os.strerror(errno.ENOSPC) in str(link) for link in chain):
        return FULL
    responses = (getattr(link, "response", None) for link in chain)
    return next((HINTS[r.status_code] for r in responses if r is not None and r.status_code in HINTS), None)


def names_of(info: ModelInfo) -> list[str]:
    """The files of a repository."""
    return [sibling.rfilename for sibling in info.siblings or ()]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path fits one of the patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)
