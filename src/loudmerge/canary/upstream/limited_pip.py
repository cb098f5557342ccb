"""Runs pip in a fork (forks.py), with a limit on the size of each file it writes.

A job reads one JSON order from stdin: {arguments, environment, folder, limit, python}, the limit in bytes,
and python what pip is to take for Python when it wants a build backend asked.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from importlib import import_module
from typing import Any

NOTHING = ("download", "--isolated", "--no-index", "--no-deps", "--quiet", "loudmerge-asks-for-nothing")
"""What pip imports most of itself for, and refuses without asking anybody."""


def prepare(_: str) -> None:
    """Imports pip, and has it refuse an answer that ends early.

    Its urllib3, 1.26, takes that for the whole (`enforce_content_length` is off): an index page that was cut
    off would name an older release as the latest.
    """
    _pip(NOTHING)
    response, pool = (import_module(f"pip._vendor.urllib3.{name}") for name in ("response", "connectionpool"))

    class Whole(response.HTTPResponse):  # type: ignore[name-defined, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "enforce_content_length": True})

    pool.HTTPConnectionPool.ResponseCls = Whole


def job() -> int:
    """One run of pip; its exit code."""
    with open(0, encoding="utf-8", closefd=False) as given:
        order = json.load(given)
    os.environ.clear()
    os.environ |= order["environment"]
    os.chdir(order["folder"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"],) * 2)
    sys.executable = order["python"]
    return _pip(order["arguments"])


def _pip(arguments: list[str] | tuple[str, ...]) -> int:
    sys.argv = ["pip", *arguments]
    try:
        runpy.run_module("pip", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
