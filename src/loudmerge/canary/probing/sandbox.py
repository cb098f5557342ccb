"""Runs upstream's functions in a process of their own, a fork (forks.py). Imports nothing of loudmerge.

Settings: {libraries, paths} as JSON. A job reads one JSON order from stdin: {scratch, code, stubs, prelude,
setup, cases, libraries, limits}, limits being {cpu_s, memory_bytes, file_bytes}, and writes one JSON answer
to what was its stdout at the start: {answers: [{value | raised}]} or {ended: reason}.
"""

from __future__ import annotations

import _posixsubprocess
import builtins
import importlib
import json
import os
import resource
import sys
import tempfile
import types
from typing import Any

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.spawn",
    "os.posix_spawn",
    "os.kill",
    "os.startfile",
    "pty.",
    "ctypes.",
    "gc.",
    "resource.",
    "sys.addaudithook",
    "sys._current_frames",
    "shutil.",
    "ftplib.",
    "urllib.",
    "http.",
    "smtplib.",
    "imaplib.",
    "signal.",
    "winreg.",
    "syslog.",
    "fcntl.",
    "webbrowser.",
    "os.unshare",
)
PATHS = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "os.chflags",
    "os.lockf",
    "tempfile.",
)


class Anything:
    """Stands for a name of a library that is not here: any attribute, call or item of it gives one again.

    Called with one function it gives that function back, so that a foreign decorator changes nothing.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            len(args) == 1
            and not kwargs
            and (isinstance(args[0], type) or type(args[0]).__name__ == "function")
        ):
            return args[0]
        return Anything(f"{self.name}()")

    def __mro_entries__(self, _: tuple[Any, ...]) -> tuple[Any, ...]:
        return ()

    def __getitem__(self, _: Any) -> Any:
        return self

    def __instancecheck__(self, _: Any) -> bool:
        return False

    def __or__(self, _: Any) -> Any:
        return self

    __ror__ = __add__ = __radd__ = __mul__ = __sub__ = __or__

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Any:
        return iter(())

    def __repr__(self) -> str:
        return f"<{self.name}>"


def fence(scratch: str, answer: int) -> Any:
    """An audit hook that ends the process at the first attempt to reach out of it."""
    write, end, dumps, flags, prefix = os.write, os._exit, json.dumps, WRITE_FLAGS, scratch + os.sep

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return path > 2
        full = os.path.realpath(os.fsdecode(path))
        return full == os.devnull or (full + os.sep).startswith(prefix)

    def refuse(what: str) -> None:
        write(answer, dumps({"ended": what}).encode())
        end(77)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, opened = args
            writes = bool(mode and set(mode) & set("wax+")) or bool(
                isinstance(opened, int) and opened & flags
            )
            if writes and not inside(path):
                refuse(f"it opened {path!r} for writing, outside its scratch folder")
        elif event.startswith(REFUSED):
            refuse(f"it attempted {event}{tuple(str(one)[:80] for one in args)}")
        elif event.startswith(PATHS):
            outside = [one for one in args if isinstance(one, (str, bytes)) and not inside(one)]
            if outside:
                refuse(f"it attempted {event} on {outside[0]!r}, outside its scratch folder")

    return hook


class Only:
    """Refuses modules that are neither Python's own nor loaded before upstream's code ran."""

    def __init__(self) -> None:
        self.roots = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] not in self.roots:
            raise ModuleNotFoundError(f"No module named {name!r} in a probe")


def plain(value: Any) -> Any:
    """A value as JSON can say it: tuples as lists, tensors by tolist(), the rest by repr()."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(one) for one in value), key=repr)
    to_list = getattr(value, "tolist", None)
    return plain(to_list()) if callable(to_list) and not isinstance(value, Anything) else repr(value)


def answers(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Defines upstream's code and runs the cases on it. What upstream raises is an answer too."""
    module = types.ModuleType("upstream")
    sys.modules["upstream"] = module  # dataclasses look their class's module up
    namespace = module.__dict__
    namespace["Anything"] = Anything
    namespace.update({name: Anything(name) for name in order["stubs"]})
    namespace.update({name.partition(".")[0]: importlib.import_module(name) for name in order["libraries"]})
    exec(compile(order["prelude"], "prelude.py", "exec"), namespace)  # noqa: S102
    exec(compile(order["code"], "upstream.py", "exec"), namespace)  # noqa: S102 (the purpose of this process)
    found: list[dict[str, Any]] = []
    for case in order["cases"]:
        exec(compile(order["setup"], "setup.py", "exec"), namespace)  # noqa: S102
        try:
            value = eval(compile(case, "case.py", "eval"), namespace)  # noqa: S307
        except Exception as error:  # noqa: BLE001 (whatever upstream raises is the answer)
            found.append({"raised": type(error).__name__, "text": str(error)[:500]})
        else:
            found.append({"value": plain(value)})
    return found


def prepare(settings: str) -> None:
    """Imports the libraries."""
    wanted = json.loads(settings)
    sys.path[:0] = wanted["paths"]
    for name in wanted["libraries"]:
        importlib.import_module(name)


def job() -> int:
    """One order in, one answer out."""
    answer = os.dup(1)
    with open(0, "rb", closefd=False) as given:
        order = json.load(given)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    scratch = os.path.realpath(order["scratch"])
    os.chdir(scratch)
    os.environ |= {"HOME": scratch, "TMPDIR": scratch}
    tempfile.tempdir = scratch
    sys.meta_path.insert(0, Only())
    limits = order["limits"]
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.modules["_ctypes"] = None  # type: ignore[assignment]
    hook = fence(scratch, answer)
    _posixsubprocess.fork_exec = lambda *_: hook("subprocess.fork_exec", ())  # it alone raises no audit event
    del builtins.input
    sys.addaudithook(hook)
    try:
        result: dict[str, Any] = {"answers": answers(order)}
    except MemoryError:
        result = {"ended": f"it asked for more than {limits['memory_bytes']} bytes"}
    except BaseException as error:  # noqa: BLE001 (the parent reports it)
        result = {"ended": f"{type(error).__name__}: {error}"}
    os.write(answer, json.dumps(result).encode())
    os._exit(0)  # nothing else of ours runs where upstream's code may have changed it
