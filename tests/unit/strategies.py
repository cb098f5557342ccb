"""Hypothesis strategies of synthetic cases, and what the contract says must become of each."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.unit.synthetic import (
    FAMILIES,
    Case,
    Family,
    effective,
    fused_key,
    memory_size,
    parameter_name,
    version_of,
)

NAMED = {family.name: family for family in FAMILIES}
SWAPPED_VERSIONS = ("0.17.1", "0.18.0", "0.18.1")
STANDARD_VERSIONS = ("0.19.1", "0.20.0", "0.21.2")
DTYPES = ("float32", "bfloat16", "float16")


def examples(in_ci: int) -> settings:
    """Settings with `in_ci` examples in CI's profile, and a twentieth of them in others."""
    count = in_ci if settings.get_current_profile_name() == "ci" else max(10, in_ci // 20)
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


def orientation_by_version(family: Family, peft: str) -> str | None:
    """What the table of DOMAIN.md section 1 says, None where it depends on the version of transformers.

    qwen3_vl_moe changed even the axes in memory, so a version says nothing about its experts.
    """
    if family.transposed == "memory" or peft == "none":
        return None
    if version_of(peft) < (0, 19):
        return "swapped"
    if family.transposed == "varies":
        return None
    return "swapped" if version_of(peft) == (0, 19, 0) else "standard"


def hypotheses(case: Case) -> set[str]:
    """The orientations that the shapes of all fused pairs admit together, in either nesting."""
    admitted = {"standard", "swapped"}
    nested = len(case.fused) == 2 and len(set(case.family.memory_modules)) == 1
    for layer in case.fused_layers:
        real = fused_shapes(case, layer)
        readings = itertools.product(("standard", "swapped"), (False, True) if nested else (case.flipped,))
        guesses = [replace(case, orientation=o, flipped=flipped) for o, flipped in readings]
        admitted &= {guess.orientation for guess in guesses if fused_shapes(guess, layer) == real}
    return admitted


def fused_shapes(case: Case, layer: int) -> dict[str, tuple[int, int, int]]:
    """(rank, a, b) of the pair at each key of one layer's experts."""
    shapes = {}
    for parameter in case.fused:
        d1, d2 = memory_size(case, parameter)
        rank = effective(case, parameter_name(case, layer, parameter))[0]
        sides = (d2, d1) if case.orientation == "standard" else (d1, d2)
        shapes[fused_key(case, layer, parameter)] = (rank, *sides)
    return shapes


def must_merge(case: Case) -> bool:
    """Whether the inputs decide the orientation: by shape, else by a version that can be believed."""
    if not case.fused or case.num_experts == 1:
        return True
    admitted = hypotheses(case)
    return len(admitted) == 1 or orientation_by_version(case.family, case.peft) is not None


@st.composite
def sizes(draw: st.DrawFn, family: Family) -> tuple[int, int]:
    """(H, I): any, or with a square gate_up (2I = H), or with a square down (I = H)."""
    kind = draw(st.sampled_from(("any", "any", "first", "down")))
    intermediate = draw(st.integers(1, 6))
    if kind == "first":
        return (2 if family.gated else 1) * intermediate, intermediate
    if kind == "down":
        return intermediate, intermediate
    return draw(st.integers(1, 9)), intermediate


@st.composite
def patterns(draw: st.DrawFn, case: Case) -> Case:
    """A few rank and alpha patterns: short names, expressions, full names, and some that match nothing."""
    first, down = case.family.memory_names
    keys = [
        first, down, "q_proj", "lm_head", rf".*\.{down}", rf"layers\.0\..*\.{first}", "experts", "nothing",
        f"{case.family.memory_layers}.0.{case.family.memory_modules[1]}.{down}", r"experts\.0\.(gate|w1).*",
    ]  # fmt: skip
    some = st.lists(st.sampled_from(keys), max_size=3, unique=True)
    ranks = {key: draw(st.integers(1, 5)) for key in draw(some)}
    # One: where several match, the file does not say which was first in training, and a merge is refused.
    alphas = {key: draw(st.sampled_from((1.0, 2.0, 5.0, 0.5))) for key in draw(some)[:1]}
    # PEFT saves its config with sorted keys, and the first pattern that matches wins: file order counts.
    return replace(case, rank_pattern=dict(sorted(ranks.items())), alpha_pattern=dict(sorted(alphas.items())))


def _versions(family: Family, orientation: str) -> tuple[str, ...]:
    """The versions of PEFT that could have written this orientation for this family."""
    if family.transposed != "never":
        return (*STANDARD_VERSIONS, "0.19.0", *(SWAPPED_VERSIONS if orientation == "swapped" else ()))
    return STANDARD_VERSIONS if orientation == "standard" else (*SWAPPED_VERSIONS, "0.19.0")


@st.composite
def fused_part(draw: st.DrawFn, case: Case) -> Case:
    """Adds LoRA on fused expert parameters: which, where, how packed, nested and marked, by which PEFT."""
    if case.family.transposed == "memory":
        # With one expert PEFT never swaps, in axes that no file tells.
        case = replace(case, num_experts=max(2, case.num_experts))
    family = case.family
    both = (family.first, "down")
    fused = draw(st.sampled_from((both, both, both[:1], both[1:])))
    orientation = draw(st.sampled_from(("standard", "swapped"))) if case.num_experts > 1 else "standard"
    marker = draw(st.sampled_from(("", "", "top", "nested", "auto_mapping")))
    packing = draw(st.sampled_from(("rank_major", "grouped_by_expert"))) if marker else "rank_major"
    # An ungated pair of square matrices cannot show that its nesting is flipped.
    may_flip = len(fused) == 2 and family.gated and len(set(family.memory_modules)) == 1
    layers = tuple(range(case.layers)) if draw(st.booleans()) else (draw(st.integers(0, case.layers - 1)),)
    return replace(
        case,
        fused=fused,
        fused_layers=layers,
        orientation=orientation,
        packing=packing,
        marker=marker,
        flipped=may_flip and draw(st.integers(0, 3)) == 0,
        peft=draw(st.sampled_from(_versions(family, orientation))),
    )


@st.composite
def cases(draw: st.DrawFn, *, kinds: tuple[str, ...] = ("fused", "fused", "per_expert", "dense")) -> Case:
    """Any synthetic case that PEFT could have written, decidable or not."""
    kind = draw(st.sampled_from(kinds))
    old = tuple(family for family in FAMILIES if family.old_moe)
    family = draw(st.sampled_from(old if kind == "per_expert" else FAMILIES))
    hidden, intermediate = draw(sizes(family))
    base_dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        family,
        seed=draw(st.integers(0, 2**31)),
        num_experts=draw(st.sampled_from((4, 2, 3, 8, 4, 5, 1, 6, 7, 9))),
        layers=draw(st.sampled_from((1, 2))),
        hidden=hidden,
        intermediate=intermediate,
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from((4.0, 1.0, 3.0, 8.0, 0.5))),
        rslora=draw(st.booleans()),
        dense=tuple(d for d in ("q_proj", "o_proj", "router", "lm_head") if draw(st.integers(0, 3)) == 0),
        base_dtype=base_dtype,
        adapter_dtype=draw(st.sampled_from(("float32", "float32", "bfloat16", "float16"))),
        shards=draw(st.sampled_from((1, 2, 3, 4))),
        delta_scale=draw(st.sampled_from((1.0, 0.1, 3.0))),
        peft=draw(st.sampled_from((*SWAPPED_VERSIONS, *STANDARD_VERSIONS))),
    )
    case = draw(patterns(case))
    if "lm_head" not in case.dense and draw(st.integers(0, 4)) == 0:
        case = replace(case, replaced=True)
    if kind == "fused":
        return draw(fused_part(case))
    if kind == "per_expert":
        chosen = draw(st.sampled_from((("gate", "up", "down"), ("down",), ("gate", "up"), ("gate",))))
        return replace(case, per_expert=chosen)
    return case if case.dense else replace(case, dense=("q_proj",))


def undecidable() -> st.SearchStrategy[Case]:
    """Cases whose only fused parameter is square, with nothing in the config that dates them."""

    def make(family: Family, first: bool, size: int, orientation: str, seed: int) -> Case:
        parameter = family.first if first else "down"
        double = 2 if first and family.gated else 1
        return Case(
            family,
            seed=seed,
            hidden=double * size,
            intermediate=size,
            fused=(parameter,),
            orientation=orientation,
            peft="none",
        )

    return st.builds(
        make,
        st.sampled_from(FAMILIES),
        st.booleans(),
        st.integers(1, 6),
        st.sampled_from(("standard", "swapped")),
        st.integers(0, 2**31),
    )


def option_orientation(case: Case) -> str:
    """The orientation in the axes that loudmerge states it in: those of the newest transformers."""
    if case.family.transposed == "memory" and case.family.memory_axes == "io":
        return "swapped" if case.orientation == "standard" else "standard"
    return case.orientation
