"""Runs upstream's functions in a process of their own, a fork (forks.py). Imports nothing of loudmerge.

Settings: {libraries, paths} as JSON. A job reads one JSON order from stdin: {scratch, code, stubs, extract,
prelude, setup, cases, libraries, limits}, limits being {cpu_s, memory_bytes, file_bytes}, and writes one JSON
answer to what was its stdout at the start: {answers: [{value | raised}]} or {ended: reason}.
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
from collections.abc import Callable
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


CODE = "upstream.py"
"""What upstream's code says its file is."""
PLAIN = (bool, int, float, str, type(None))
WAYS = 64
"""In how many ways at most what is not here may decide."""


class Anything:
    """Stands for a name of a library that is not here: any attribute, call or item of it gives one again.

    Called with one function it gives that function back, so that a foreign decorator changes nothing.
    switches: how each question that only the library could answer is answered; true where it is new.
    """

    switches: dict[str, bool] = {}  # noqa: RUF012 (this process is for one job)

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def __bool__(self) -> bool:
        return self.switches.setdefault(self.name, True)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Anything):
            same = self.name == other.name and "()" not in self.name
            return same or self.switches.setdefault(f"{self.name} == {other.name}", True)
        if not isinstance(other, PLAIN):
            return NotImplemented
        return self.switches.setdefault(f"{self.name} == {other!r}", True)

    def __hash__(self) -> int:
        return hash(self.name)

    def __contains__(self, item: object) -> bool:
        said = repr(item) if isinstance(item, PLAIN) else type(item).__name__
        return self.switches.setdefault(f"{said} in {self.name}", True)

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


class Undecided(Exception):
    """What the cases give says nothing of what upstream does."""


IMPORTED = "it is imported, so say in the rule's `prelude` what it is"


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


def importing(absent: list[str]) -> Callable[..., Any]:
    """`__import__`, which notes what upstream's functions ask for and is not here."""
    known = builtins.__import__

    def ask(name: str, *rest: Any, **words: Any) -> Any:
        try:
            return known(name, *rest, **words)
        except ImportError:
            asker = sys._getframe(1).f_code.co_filename  # noqa: SLF001 (it shares its globals with `setup`)
            if asker == CODE and name not in sys.stdlib_module_names:
                absent.append(name or "a file beside it")
            raise

    return ask


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
    """What the cases give. Raises Undecided where it depends on what the stand-ins stand for."""
    first: list[dict[str, Any]] | None = None
    ways: list[dict[str, bool]] = [{}]
    for tried, way in enumerate(ways):
        if tried == WAYS:
            raise Undecided(f"more than {WAYS} ways, by {', '.join(way)}: {IMPORTED}")
        Anything.switches = dict(way)
        found = once(order)
        first = found if first is None else first
        for case, one, other in zip(order["cases"], first, found, strict=True):
            if one != other:
                off = ", ".join(name for name, on in way.items() if not on)
                raise Undecided(f"{case} gives something else where {off} is false: {IMPORTED}")
        asked = list(Anything.switches.items())
        ways += [{**dict(asked[:new]), asked[new][0]: False} for new in range(len(way), len(asked))]
    return first or []


def once(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Defines upstream's code and runs the cases on it. What upstream raises is an answer too."""
    module = types.ModuleType("upstream")
    sys.modules["upstream"] = module  # dataclasses look their class's module up
    namespace = module.__dict__
    absent: list[str] = []
    namespace["__builtins__"] = {**vars(builtins), "__import__": importing(absent)}
    namespace["Anything"] = Anything
    namespace.update({name: Anything(name) for name in order["stubs"]})
    namespace.update({name.partition(".")[0]: importlib.import_module(name) for name in order["libraries"]})
    exec(compile(order["prelude"], "prelude.py", "exec"), namespace)  # noqa: S102
    exec(compile(order["code"], CODE, "exec"), namespace)  # noqa: S102 (the purpose of this process)
    subjects = bodies(namespace, order["extract"])
    found: list[dict[str, Any]] = []
    for case in order["cases"]:
        ran: set[types.CodeType] = set()
        absent.clear()
        sys.setprofile(noting(ran))
        exec(compile(order["setup"], "setup.py", "exec"), namespace)  # noqa: S102
        try:
            value = eval(compile(case, "case.py", "eval"), namespace)  # noqa: S307
        except Exception as error:  # noqa: BLE001 (whatever upstream raises is the answer)
            found.append({"raised": type(error).__name__})
        else:
            found.append({"value": plain(value)})
        finally:
            sys.setprofile(None)
        if absent and not found[-1].get("raised", "").endswith(("ImportError", "ModuleNotFoundError")):
            raise Undecided(f"{case} goes on without {', '.join(absent)}: {IMPORTED}")
        if subjects and not subjects & ran:
            raise Undecided(f"{case} never runs {', '.join(order['extract'])}")
    return found


def noting(ran: set[types.CodeType]) -> Callable[[types.FrameType, str, Any], None]:
    """What notes each function that is called."""

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call":
            ran.add(frame.f_code)

    return note


def bodies(namespace: dict[str, Any], names: list[str]) -> set[types.CodeType]:
    """The code of the functions and methods among what was asked for."""
    found = set()
    for name in names:
        owner, _, method = name.partition(".")
        made = vars(namespace[owner]).get(method) if method else namespace[owner]
        for part in ("fget", "__func__", "__wrapped__"):
            made = getattr(made, part, None) or made
        code = getattr(made, "__code__", None)
        found |= {code} if isinstance(code, types.CodeType) else set()
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
    except Undecided as error:
        result = {"ended": str(error)}
    except MemoryError:
        result = {"ended": f"it asked for more than {limits['memory_bytes']} bytes"}
    except BaseException as error:  # noqa: BLE001 (the parent reports it)
        result = {"ended": f"{type(error).__name__}: {error}"}
    os.write(answer, json.dumps(result).encode())
    os._exit(0)  # nothing else of ours runs where upstream's code may have changed it
