"""A raise counts only where the given facts alone decide it: no other test, exit, wrapper or write does."""

from __future__ import annotations

from textwrap import indent

import pytest

from tests.unit.canary_rules.code import found, holds

CHECK = 'if STATE["fallback"] > 0:\n    raise RuntimeError("partial")'
RAISES = {
    "kind": "raises",
    "function": "merge",
    "exception": "RuntimeError",
    "mentions": ["STATE", "fallback"],
    "given": {"STATE": {"fallback": 1}},
    "otherwise": {"STATE": {"fallback": 0}},
}


def merge(body: str, before: str = "", behind: str = "") -> str:
    """A file whose function `merge` has this body."""
    head = f'{before}\nSTATE = {{"fallback": 0}}\ndef merge(model, strict=False):'
    return f"{head}\n{indent(body, '    ')}\n{behind}\n"


def inside(head: str, tail: str = "") -> str:
    """The check as the body of a compound statement."""
    return f"{head}\n{indent(CHECK, '    ')}\n{tail}"


def test_a_check_that_nothing_else_decides_holds() -> None:
    assert holds(merge(f"work(model)\n{CHECK}\nreturn model"), **RAISES)


@pytest.mark.parametrize(
    "body",
    [
        inside('if os.environ.get("STRICT"):'),
        inside("if strict:"),
        inside("for _ in range(0):"),
        inside("for _ in model.parameters():"),
        inside("for _ in list():"),
        inside("if 0 * 5:"),
        inside("if 1 > 2 > 0:"),
        "match model:\n    case 2:\n" + indent(CHECK, "        "),
        "for _ in [1]:\n    break\nelse:\n" + indent(CHECK, "    "),
        f"if model is not None:\n    return model\n{CHECK}",
        f"for one in model:\n    if one:\n        return model\n{CHECK}",
        f"if strict:\n    log(model)\n    if model:\n        return model\n{CHECK}",
        f"try:\n    return model\nexcept ValueError:\n    pass\n{CHECK}",
        f"with torch.no_grad():\n    if model:\n        return model\n{CHECK}",
        f"for _ in model:\n    return model\n{CHECK}",
        f"os.abort()\n{CHECK}",
        f"if strict:\n    raise SystemExit(0)\n{CHECK}",
    ],
)
def test_what_the_given_facts_do_not_settle_keeps_a_raise_from_being_proven(body: str) -> None:
    assert not holds(merge(body), **RAISES)


def test_the_condition_that_is_not_settled_is_named() -> None:
    finding = found(merge(f"if model is not None:\n    return model\n{CHECK}"), **RAISES)
    assert "`not (model is not None)` is not settled where {'STATE': {'fallback': 1}}" in finding.detail


def test_a_guard_says_which_other_facts_it_takes_for_granted() -> None:
    early = f'if save_method == "4bit" or not isinstance(model, Peft):\n    return model\n{CHECK}'
    facts = {"save_method": "16bit", "isinstance(model, Peft)": True}
    assert not holds(merge(early), **RAISES)
    assert holds(merge(early), **{**RAISES, "given": {**RAISES["given"], **facts}})  # type: ignore[dict-item]


def test_an_error_before_a_raise_is_no_success_either() -> None:
    assert holds(merge(f"assert model\nif strict:\n    raise ValueError(model)\n{CHECK}"), **RAISES)
    caught = indent(f"if strict:\n    raise ValueError(model)\n{CHECK}", "    ")
    assert not holds(merge(f"try:\n{caught}\nexcept ValueError:\n    pass"), **RAISES)


@pytest.mark.parametrize(
    ("before", "head", "tail"),
    [
        ("ERRORS = (RuntimeError, OSError)", "try:", "except ERRORS:\n    log()"),
        ("ERRORS = (RuntimeError, OSError)", "try:", "except (*ERRORS,):\n    log()"),
        ("A = (OSError,)\nB = A + (RuntimeError,)", "try:", "except B:\n    log()"),
        ("E = Exception", "try:", "except E:\n    log()"),
        ("from builtins import Exception as E", "try:", "except E:\n    log()"),
        ("from zoo import ERRORS", "try:", "except ERRORS:\n    log()"),
        ("from contextlib import suppress as hush", "with hush(RuntimeError):", ""),
        ("S = contextlib.suppress", "with S(Exception):", ""),
        (
            "@contextmanager\ndef quiet():\n    try:\n        yield\n    except RuntimeError:\n        log()",
            "with quiet():",
            "",
        ),
        ("class Quiet:\n    def __exit__(self, *_):\n        return True", "with Quiet():", ""),
        ("", "with contextlib.ExitStack() as stack:", ""),
        ("from zoo import quiet", "with quiet():", ""),
        ("S = contextlib.suppress(Exception)", "with S:", ""),
        ("class Quiet:\n    def __exit__(self, *_):\n        return True\nQ = Quiet()", "with Q:", ""),
        ("import zoo as torch", "with torch.quiet():", ""),
        ("L = Lock()\ndef other():\n    global L\n    L = suppress(Exception)", "with L:", ""),
    ],
)
def test_a_raise_is_swallowed_under_whatever_name(before: str, head: str, tail: str) -> None:
    assert not holds(merge(inside(head, tail), before), **RAISES)


@pytest.mark.parametrize(
    ("before", "head", "tail"),
    [
        ("ERRORS = (KeyError, OSError)", "try:", "except ERRORS:\n    log()"),
        ("from zoo import HubError", "try:", "except HubError:\n    log()"),
        ("", "try:", "except torch.OutOfMemoryError:\n    log()"),
        ("", "with torch.no_grad():", ""),
        ("from contextlib import suppress as hush", "with hush(KeyError):", ""),
        (
            "@contextmanager\ndef timed():\n    try:\n        yield\n    finally:\n        log()",
            "with timed():",
            "",
        ),
        ("class Timed:\n    def __exit__(self, *_):\n        log()", "with Timed():", ""),
        ("class Timed:\n    def __exit__(self, *_):\n        log()\nT = Timed()", "with T:", ""),
        ("L = threading.Lock()", "with L:", ""),
        ("S = contextlib.suppress(KeyError)", "with S:", ""),
        ("", "with tqdm(total=3) as bar:", ""),
        ("", "with torch.device('meta'):", ""),
        ("import torch as th", "with th.device('meta'), th.autocast('cuda'):", ""),
        ("from torch.profiler import record_function", "with record_function('x'):", ""),
        ("", "with accelerator.main_process_first():", ""),
    ],
)
def test_a_raise_passes_what_does_not_catch_it(before: str, head: str, tail: str) -> None:
    assert holds(merge(inside(head, tail), before), **RAISES)


@pytest.mark.parametrize(
    ("before", "head", "named"),
    [
        ("from zoo import timer", "with timer():", "timer"),
        ("from zoo import timer as t", "with t():", "timer"),
        ("", "with model.lock:", "lock"),
        ("", "with LOCKS[0]:", "LOCKS[0]"),
        ("", "with contextlib.ExitStack() as stack:", "ExitStack"),
        ("def timed():\n    return zoo.timer()", "with timed():", "timed"),
        ("def no_grad():\n    return zoo.timer()", "with no_grad():", "no_grad"),
        ("class Timed(zoo.Timer):\n    pass", "with Timed():", "Timed"),
        ("class torch:\n    pass", "with torch.device('meta'):", "device"),
        ("", "no_grad = zoo.timer if model else zoo.clock\nwith no_grad():", "no_grad"),
    ],
)
def test_a_manager_can_be_allowed_by_the_name_in_the_message(before: str, head: str, named: str) -> None:
    source = merge(inside(head), before)
    advice = f"may swallow it: name {named!r} in the rule's `managers` if it does not"
    assert advice in found(source, **RAISES).detail
    assert holds(source, **RAISES, managers=[named])
    assert not holds(source, **RAISES, managers=["merge"])


def test_a_manager_that_is_seen_to_swallow_cannot_be_allowed() -> None:
    quiet = "@contextmanager\ndef quiet():\n    try:\n        yield\n    except RuntimeError:\n        log()"
    for head in ("with suppress(RuntimeError):", "with quiet():"):
        assert not holds(merge(inside(head), quiet), **RAISES, managers=["suppress", "quiet"])


def test_a_manager_means_what_it_does_where_it_is_entered() -> None:
    helper = f"def check():\n    bar = suppress(RuntimeError)\n{indent(CHECK, '    ')}"
    assert holds(merge("bar = tqdm(total=3)\nwith bar:\n    check()", helper), **RAISES)
    helper = helper.replace("suppress(RuntimeError)", "tqdm(total=3)")
    assert not holds(merge("bar = suppress(RuntimeError)\nwith bar:\n    check()", helper), **RAISES)


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("", f'STATE["fallback"] = 0\n{CHECK}'),
        ("", f"STATE.update(fallback=0)\n{CHECK}"),
        ("", f"STATE = {{'fallback': 0}}\n{CHECK}"),
        ("", f'STATE["fallback"] -= 1\n{CHECK}'),
        ("", f'del STATE["fallback"]\n{CHECK}'),
        ('def reset():\n    STATE["fallback"] = 0', f"reset()\n{CHECK}"),
    ],
)
def test_a_state_that_is_written_anew_before_the_check_is_not_the_one_given(before: str, body: str) -> None:
    assert not holds(merge(body, before), **RAISES)


def test_a_state_may_be_reset_before_what_fills_it() -> None:
    rule = {**RAISES, "after": "work"}
    reset = 'def reset():\n    STATE["fallback"] = 0'
    loop = "for one in model:\n    work(one)"
    assert holds(merge(f"reset()\n{loop}\n{CHECK}", reset), **rule)
    assert holds(
        merge(f"{CHECK}", "").replace("if STATE", 'work(model)\n    STATE["fallback"] += 1\n    if STATE'),
        **rule,
    )
    assert not holds(merge(f"{loop}\nreset()\n{CHECK}", reset), **rule)
    assert not holds(merge(f"for one in model:\n    reset()\n    work(one)\n{CHECK}", reset), **rule)
    finding = found(merge(f"{CHECK}\n{loop}"), **rule)
    assert "no call of work comes before it" in finding.detail


@pytest.mark.parametrize("written", ["reset()", "global STATE\n    STATE = dict(fallback=0)"])
def test_a_state_that_each_round_of_a_loop_resets_is_that_of_the_last_one(written: str) -> None:
    """What the call that makes the facts writes itself counts in a loop, and only there."""
    rule = {**RAISES, "after": "work"}
    reset = 'def reset():\n    STATE["fallback"] = 0\n'
    counting = '    STATE["fallback"] += 1\n'
    work = f"{reset}def work(one):\n    {written}\n{counting}"
    loop = f"for one in model:\n    work(one)\n{CHECK}"
    assert not holds(merge(loop, work), **rule)
    assert holds(merge(f"work(model)\n{CHECK}", work), **rule)
    assert holds(merge(loop, f"def work(one):\n{counting}"), **rule)


DECORATED = "def quiet(f):\n    return f\n"


@pytest.mark.parametrize(
    ("head", "seen"),
    [
        ("def merge", True),
        ("@torch.inference_mode\ndef merge", True),
        ("@torch.no_grad()\ndef merge", True),
        ("@quiet\ndef merge", False),
        ("@zoo.retried(3)\ndef merge", False),
        ("async def merge", False),
    ],
)
def test_what_stands_around_a_function_may_keep_it_from_running(head: str, seen: bool) -> None:
    source = merge(CHECK, DECORATED).replace("def merge", head)
    assert holds(source, **RAISES) is seen


def test_a_decorator_can_be_allowed_by_its_name() -> None:
    source = merge(CHECK, DECORATED).replace("def merge", "@quiet\ndef merge")
    assert found(source, **RAISES).detail == (
        "merge is not seen to run: it stands under the decorator `quiet` at line 5: "
        "name 'quiet' in the rule's `decorators` if the body still runs"
    )
    assert holds(source, **RAISES, decorators=["quiet"])
    unnamed = source.replace("@quiet", "@QUIET[0]")
    assert "name 'QUIET[0]' in the rule's `decorators`" in found(unnamed, **RAISES).detail
    assert holds(unnamed, **RAISES, decorators=["QUIET[0]"])
    own = source.replace("def quiet(f)", "def no_grad(f)").replace("@quiet", "@no_grad")
    assert not holds(own, **RAISES)


def test_a_decorator_of_a_helper_is_named_and_can_be_allowed() -> None:
    helper = f"{DECORATED}@quiet\ndef check():\n{indent(CHECK, '    ')}\ndef outer():\n    check()"
    for body, line in (("check()", 11), ("outer()", 8)):
        source = merge(body, helper)
        assert found(source, **RAISES).detail == (
            "merge never raises RuntimeError on a path that is reached; but its helper check, called at line "
            f"{line}, is not seen to run: it stands under the decorator `quiet` at line 3: "
            "name 'quiet' in the rule's `decorators` if the body still runs"
        )
        assert holds(source, **RAISES, decorators=["quiet"])
        assert not holds(source, **RAISES, decorators=["loud"])


def test_a_generator_runs_nothing_when_it_is_called() -> None:
    assert not holds(merge(f"{CHECK}\nyield model"), **RAISES)
    assert holds(merge(f"{CHECK}\ndef inner():\n    yield model"), **RAISES)
    helper = "def check():\n" + indent(CHECK, "    ")
    assert holds(merge("check()", helper), **RAISES)
    unread = found(merge("check()", f"{helper}\n    yield"), **RAISES).detail
    assert (
        "but its helper check, called at line 7, is not seen to run: check is a generator at line 1" in unread
    )
    assert not holds(merge("check()", f"{helper}\n    yield"), **RAISES)
    assert not holds(merge("check()", f"async {helper}"), **RAISES)
    assert not holds(merge("check()", f"{DECORATED}@quiet\n{helper}"), **RAISES)


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("RuntimeError = print", ""),
        ("class RuntimeError(Warning):\n    pass", ""),
        ("from zoo import RuntimeError", ""),
        ("", "from zoo import *"),
        ("", "globals().update(merge=work)"),
        ("", "globals()['merge'] = work"),
        ("", "exec('merge = print')"),
        ("", "sys.modules[__name__].merge = print"),
        ("", "setattr(sys.modules[__name__], 'merge', print)"),
        ("", "(merge := print)"),
        ("", "with open('x') as merge:\n    pass"),
        ("", "def other():\n    global merge\n    merge = print\nother()"),
        ("", "def other():\n    globals()['merge'] = quiet(merge)"),
        ("", "def other():\n    globals().update(merge=print)"),
        ("", "def other():\n    sys.modules[__name__].merge = print"),
        ("", "def other():\n    setattr(sys.modules[__name__], 'merge', print)"),
        ("", "merge.__code__ = work.__code__"),
        ("assert False", ""),
        ("sys.exit()", ""),
        ("os.abort()", ""),
    ],
)
def test_a_name_that_is_bound_anew_is_another(before: str, behind: str) -> None:
    assert not holds(merge(CHECK, before, behind), **RAISES)


def test_a_star_import_before_a_definition_changes_nothing() -> None:
    assert holds(merge(CHECK, "from zoo import *\nglobals().get('merge')"), **RAISES)


@pytest.mark.parametrize(
    "other",
    ["globals()['push'] = print", "globals()[name] = 1", "globals().get('merge')", "setattr(a, 'merge', 1)"],
)
def test_what_binds_another_name_anew_changes_nothing(other: str) -> None:
    assert holds(merge(CHECK, "", f"def other(a, name):\n    {other}"), **RAISES)


@pytest.mark.parametrize(
    "manager", ["suppress(ValueError)", "pytest.raises(ValueError)", "self.assertRaises(E)"]
)
def test_what_stands_behind_an_error_that_a_manager_ends_is_reached(manager: str) -> None:
    assert holds(merge(f"with {manager}:\n    raise ValueError\n{CHECK}"), **RAISES)
    assert not holds(merge(f"with torch.no_grad():\n    raise ValueError\n{CHECK}"), **RAISES)


def test_a_parameter_hides_the_exception() -> None:
    assert not holds(merge(CHECK).replace("strict=False", "RuntimeError=print"), **RAISES)


def test_a_method_that_is_replaced_behind_its_class_is_gone() -> None:
    source = "class C:\n    def f(self):\n        raise ValueError\n"
    rule = {"kind": "raises", "function": "C.f", "exception": "ValueError", "given": {}}
    assert holds(source, **rule)
    assert not holds(f"{source}C.f = print", **rule)


def test_a_symbol_may_be_bound_anew_or_deleted() -> None:
    rule = {"kind": "symbol", "name": "f", "type": "function"}
    source = "def f(x):\n    return x + 1\ndef g():\n    return f(1)\n"
    assert holds(source, **rule)
    assert not holds(f"{source}del (f, g)", **rule)
    finding = found(f"{source}from zoo import *", **rule)
    assert finding.detail == "f may be bound anew at line 5: from zoo import *"


def test_a_loop_over_nothing_is_never_entered_whatever_the_rule() -> None:
    rule = {"kind": "calls", "function": "f", "callee": "check"}
    assert holds("def f(x):\n    for one in x:\n        check(one)", **rule)
    assert not holds("def f(x):\n    for one in range(0):\n        check(one)", **rule)


@pytest.mark.parametrize(
    "body",
    [
        "check = lambda _: None\ncheck(save)",
        "(check(one) for one in save)",
        "[check(one) for one in []]",
        "[check(one) for one in range(0)]",
        "try:\n    write(save)\nexcept OSError:\n    check(save)",
    ],
)
def test_a_call_that_is_another_or_is_not_made_is_none(body: str) -> None:
    rule = {"kind": "calls", "function": "merge", "callee": "check"}
    check = "def check(x):\n    return x"
    assert holds(merge("return [check(one) for one in save]", check), **rule)
    assert not holds(merge(body, check), **rule)


def test_a_parameter_hides_the_function_that_is_called() -> None:
    rule = {"kind": "calls", "function": "f", "callee": "check"}
    source = "def f(x, check=print):\n    check(x)"
    assert not holds(source, **rule)
    assert holds(source.replace(", check=print", ""), **rule)


def test_a_call_after_an_error_counts_where_the_rule_says_so() -> None:
    source = merge("try:\n    write(model)\nexcept OSError:\n    check(model)")
    rule = {"kind": "calls", "function": "merge", "callee": "check"}
    assert holds(source, **rule, mentions=["OSError"])
    assert "only after an error, in the try at line 4" in found(source, **rule).detail


@pytest.mark.parametrize("body", ["raise AttributeError('gone')", "log(x)\nraise NotImplementedError"])
def test_a_function_that_can_only_raise_is_hollow(body: str) -> None:
    rule = {"kind": "symbol", "name": "f", "type": "function"}
    assert not holds(f"def f(x):\n{indent(body, '    ')}", **rule)
    assert holds(f"def f(x):\n    if x:\n        return x + 1\n{indent(body, '    ')}", **rule)
