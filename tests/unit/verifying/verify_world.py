"""Worlds for the tests of verify: plans made by hand over real safetensors files, each with a right OUT.

What OUT must hold is computed in numpy, expert by expert, from the formula.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from loudmerge.evidence.decision import Layout
from loudmerge.layout import Axes, LoraBLayout, Span
from loudmerge.planning.options import Options
from loudmerge.planning.plan import Counts, MergePlan, OutputTensor, Site, Term
from loudmerge.reading.adapter import Adapter, LoraPair
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.checkpoint import open_checkpoint
from loudmerge.reading.families import Family
from loudmerge.system.tensorfile import TensorEntry, read_header
from loudmerge.verifying.verify import TensorMismatch, Verification, verify_plan
from tests.unit.reference import rounded, tensor

Array = npt.NDArray[np.float64]

E, R, HIDDEN, INNER, WORDS, SCALING = 4, 3, 16, 24, 11, 0.75
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EXPERTS = "model.layers.0.mlp.experts"
FUSED = "model.layers.1.mlp.experts"
ATTENTION = "model.layers.1.self_attn"


@dataclass(frozen=True)
class World:
    """A plan, and a right OUT for it."""

    plan: MergePlan
    out: Path
    dtype: str

    def copied(self, root: Path) -> World:
        """With an OUT of its own, for a test that changes it."""
        return replace(self, out=Path(shutil.copytree(self.out, root / "out")))

    def verify(self, **changes: object) -> Verification:
        return verify_plan(replace(self.plan, **changes), self.out, threads=2)  # type: ignore[arg-type]

    def only(self) -> TensorMismatch:
        """The one mismatch that must be found."""
        found = self.verify()
        assert not found.ok
        assert len(found.mismatches) == 1, found.summary()
        return found.mismatches[0]

    def edit(self, key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Replaces a tensor of OUT by `change` of it; None takes it out."""
        file = self.out / next(output.shard for output in self.plan.outputs if output.key == key)
        tensors = load_file(file)
        changed = change(tensors.pop(key).clone())
        if changed is not None:
            tensors[key] = changed.contiguous()
        save_file(tensors, file, metadata={"format": "pt"})


class Maker:
    """Draws a base and an adapter, and works out the merge in numpy."""

    def __init__(self, root: Path, dtype: str, rounding: str, size: float) -> None:
        self.root, self.dtype, self.rounding, self.size = root, dtype, rounding, size
        self.rng = np.random.default_rng(7)
        self.base: dict[str, Array] = {}
        self.adapter: dict[str, Array] = {}
        self.merged: dict[str, torch.Tensor] = {}

    def weight(self, key: str, *shape: int) -> Array:
        self.base[key] = rounded(self.rng.standard_normal(shape), self.dtype)
        return self.base[key]

    def factor(self, key: str, *shape: int) -> Array:
        self.adapter[key] = rounded(self.size * self.rng.standard_normal(shape), "float32")
        return self.adapter[key]

    def put(self, key: str, value: Array) -> None:
        self.merged[key] = tensor(rounded(value, self.dtype), self.dtype).contiguous()

    def add(self, key: str, delta: Array) -> None:
        """The sum of weight and delta as the rounding has it."""
        if self.rounding == "peft":
            delta = rounded(delta, self.dtype)
            self.put(key, rounded(self.base[key] + delta, "float32"))
        else:
            self.put(key, self.base[key] + delta)

    def write(self) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry], Path]:
        base, out, adapter = self.root / "base", self.root / "out", self.root / "adapter"
        for path in (base, out, adapter):
            path.mkdir(parents=True)
        tensors = {key: tensor(value, self.dtype) for key, value in self.base.items()}
        tensors["model.steps"] = self.merged["model.steps"] = torch.tensor(7)
        weight_map = {key: SHARDS[int(number % 3 == 2)] for number, key in enumerate(tensors)}
        size = sum(item.numel() * item.element_size() for item in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        for path, held in ((base, tensors), (out, self.merged)):
            for shard in SHARDS:
                part = {key: held[key] for key in tensors if weight_map[key] == shard}
                save_file(part, path / shard, metadata={"format": "pt"})
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
            config = {"model_type": "toy", "text_config": {"hidden_size": HIDDEN}}
            (path / "config.json").write_text(json.dumps(config))
            (path / "generation_config.json").write_text('{"do_sample": true}')
        save_file(
            {key: tensor(value, "float32") for key, value in self.adapter.items()}, adapter / "a.safetensors"
        )
        return dict(open_checkpoint(base).entries), read_header(adapter / "a.safetensors")[0], out


def experts_of(maker: Maker) -> dict[str, tuple[Array, list[Array]]]:
    """For each pair of factors its dW by expert as (out, in), written out expert by expert."""
    gate_up_a, gate_up_b = (
        maker.factor("gate_up.a", R * E, HIDDEN),
        maker.factor("gate_up.b", 2 * INNER, R * E),
    )
    down_a, down_b = maker.factor("down.a", R * E, HIDDEN), maker.factor("down.b", INNER, R * E)
    gate_up, down = [], []
    for e in range(E):
        columns = [k * E + e for k in range(R)]  # rank_major
        gate_up.append(SCALING * gate_up_b[:, columns] @ gate_up_a[e * R : (e + 1) * R])
        columns = [e * R + k for k in range(R)]  # grouped_by_expert, and the pair transposed
        down.append(SCALING * (down_b[:, columns] @ down_a[e * R : (e + 1) * R]).T)
    return {"gate_up": (gate_up_a, gate_up), "down": (down_a, down)}


def make(root: Path, dtype: str, rounding: str = "nearest", size: float = 0.1) -> World:
    m = Maker(root, dtype, rounding, size)
    deltas = experts_of(m)
    gate_up, down = deltas["gate_up"][1], deltas["down"][1]
    for e in range(E):
        for name, part in (("gate", slice(0, INNER)), ("up", slice(INNER, None))):
            m.weight(f"{EXPERTS}.{e}.{name}_proj.weight", INNER, HIDDEN)
            m.add(f"{EXPERTS}.{e}.{name}_proj.weight", gate_up[e][part])
        m.weight(f"{EXPERTS}.{e}.down_proj.weight", HIDDEN, INNER)
        m.add(f"{EXPERTS}.{e}.down_proj.weight", down[e])
    # Fused and (in, out) on disk, gate and up interleaved along the last axis.
    m.weight(f"{FUSED}.gate_up_proj", E, HIDDEN, 2 * INNER)
    interleaved = np.zeros((E, HIDDEN, 2 * INNER))
    for e in range(E):
        interleaved[e, :, 0::2], interleaved[e, :, 1::2] = gate_up[e][:INNER].T, gate_up[e][INNER:].T
    m.add(f"{FUSED}.gate_up_proj", interleaved)
    m.weight(f"{FUSED}.down_proj", E, HIDDEN, INNER)
    m.add(f"{FUSED}.down_proj", np.stack(down))
    # An expert projection that is trained in its lower half only.
    m.weight(f"{FUSED}.half_proj", E, 2 * INNER, HIDDEN)
    half = np.zeros((E, 2 * INNER, HIDDEN))
    for e in range(E):
        half[e, INNER:] = gate_up[e][INNER:]
    m.add(f"{FUSED}.half_proj", half)
    a, b = m.factor("q.a", R, HIDDEN), m.factor("q.b", HIDDEN, R)
    m.weight(f"{ATTENTION}.q_proj.weight", HIDDEN, HIDDEN)
    m.add(f"{ATTENTION}.q_proj.weight", 2.0 * b @ a)
    bias = m.weight(f"{ATTENTION}.q_proj.bias", HIDDEN)
    m.put(f"{ATTENTION}.q_proj.bias", bias + 2.0 * m.factor("q.bias", HIDDEN))
    dora_a, dora_b = m.factor("dora.a", R, HIDDEN), m.factor("dora.b", INNER, R)
    magnitude = m.factor("dora.m", INNER)
    for key, transposed in ((f"{ATTENTION}.v_proj.weight", False), (f"{ATTENTION}.c_attn.weight", True)):
        stored = m.weight(key, *((HIDDEN, INNER) if transposed else (INNER, HIDDEN)))
        value = (stored.T if transposed else stored) + 0.5 * dora_b @ dora_a
        value = magnitude[:, None] * value / np.sqrt((value**2).sum(axis=1))[:, None]
        m.put(key, value.T if transposed else value)
    words_a, words_b = m.factor("words.a", R, WORDS), m.factor("words.b", HIDDEN, R)
    m.weight("model.words.weight", WORDS, HIDDEN)
    m.add("model.words.weight", SCALING * (words_b @ words_a).T)
    rows = m.factor("rows", 2, HIDDEN)
    embedding = m.weight("model.embed_tokens.weight", WORDS, HIDDEN).copy()
    embedding[[9, 2]] = rows
    m.put("model.embed_tokens.weight", embedding)
    m.weight("lm_head.weight", WORDS, HIDDEN)
    m.put("lm_head.weight", m.factor("head", WORDS, HIDDEN))
    m.put("model.norm.weight", m.weight("model.norm.weight", HIDDEN))
    return planned(m)


def planned(m: Maker) -> World:
    base, adapter, out = m.write()

    def pair(name: str, *, embedding: bool = False) -> LoraPair:
        return LoraPair(name, 0, adapter[f"{name}.a"], adapter[f"{name}.b"], embedding=embedding)

    layouts = LoraBLayout.RANK_MAJOR, LoraBLayout.GROUPED_BY_EXPERT
    sites = (
        Site(pair("gate_up"), f"{EXPERTS}.gate_up_proj", E, R, SCALING, True, None, layouts[0]),
        Site(pair("down"), f"{EXPERTS}.down_proj", E, R, SCALING, False, None, layouts[1]),
        Site(pair("q"), f"{ATTENTION}.q_proj.weight", 0, R, 2.0, True, None, None),
        Site(pair("dora"), f"{ATTENTION}.v_proj.weight", 0, R, 0.5, True, None, None),
        Site(pair("words", embedding=True), "model.words.weight", 0, R, SCALING, False, None, None),
    )
    whole = Span(0, HIDDEN)
    low, high = Span(0, INNER), Span(INNER, INNER)
    terms: dict[str, tuple[Term, ...]] = {
        f"{FUSED}.gate_up_proj": tuple(
            Term(0, e, rows, e, Axes.IN_OUT, Span(start, INNER, 2))
            for start, rows in ((0, low), (1, high))
            for e in range(E)
        ),
        f"{FUSED}.down_proj": tuple(Term(1, e, whole, e, Axes.OUT_IN, whole) for e in range(E)),
        f"{FUSED}.half_proj": tuple(Term(0, e, high, e, Axes.OUT_IN, high) for e in range(E)),
        f"{ATTENTION}.q_proj.weight": (Term(2, -1, whole, -1, Axes.OUT_IN, whole),),
        f"{ATTENTION}.v_proj.weight": (Term(3, -1, low, -1, Axes.OUT_IN, low),),
        f"{ATTENTION}.c_attn.weight": (Term(3, -1, low, -1, Axes.IN_OUT, low),),
        "model.words.weight": (Term(4, -1, Span(0, WORDS), -1, Axes.OUT_IN, Span(0, WORDS)),),
    }
    for e in range(E):
        prefix = f"{EXPERTS}.{e}"
        terms[f"{prefix}.gate_proj.weight"] = (Term(0, e, low, -1, Axes.OUT_IN, low),)
        terms[f"{prefix}.up_proj.weight"] = (Term(0, e, high, -1, Axes.OUT_IN, low),)
        terms[f"{prefix}.down_proj.weight"] = (Term(1, e, whole, -1, Axes.OUT_IN, whole),)
    outputs = []
    for key, entry in base.items():
        replaced = key == "lm_head.weight"
        outputs.append(
            OutputTensor(
                key,
                entry.file.name,
                adapter["head"] if replaced else entry,
                entry.dtype,
                entry.shape,
                replaced,
                terms.get(key, ()),
                adapter["dora.m"] if key.endswith(("v_proj.weight", "c_attn.weight")) else None,
                (adapter["q.bias"], 2.0) if key.endswith(".bias") else None,
                ((9, 2), adapter["rows"]) if key.startswith("model.embed") else None,
            )
        )
    return World(a_plan(m.root, sites, tuple(outputs), adapter, m.rounding), out, m.dtype)


def a_plan(
    root: Path,
    sites: tuple[Site, ...],
    outputs: tuple[OutputTensor, ...],
    adapter: dict[str, TensorEntry],
    rounding: str,
) -> MergePlan:
    config = AdapterConfig({}, None, R, 1.0, {}, {}, False, False, False, False, frozenset(), frozenset())
    return MergePlan(
        base=open_checkpoint(root / "base"),
        adapter=Adapter(root / "adapter", config, (), (), (), adapter),
        family=Family(),
        layout=Layout({}, {}, ()),
        options=Options(),
        rounding=rounding,
        sites=sites,
        outputs=outputs,
        counts=Counts(0, 0, 0, 0),
        num_experts=E,
        config_edits={},
        notes=(),
    )


def moved(t: torch.Tensor, place: tuple[int, ...], steps: int) -> torch.Tensor:
    """One element moved away from zero by `steps` units in the last place."""
    bits = t.view(torch.int32 if t.dtype is torch.float32 else torch.int16)
    bits[place] += steps
    return t


@dataclass(frozen=True)
class Wide:
    """One dense matrix, large enough to tell how it was rounded."""

    world: World
    exact: Array
    weight: Array

    def write(self, value: Array) -> None:
        self.world.edit("w", lambda t: tensor(value, self.world.dtype).to(t.dtype))


def wide(root: Path, dtype: str) -> Wide:
    m = Maker(root, dtype, "stochastic", 0.02)
    weight, a, b = m.weight("w", 200, 300), m.factor("w.a", R, 300), m.factor("w.b", 200, R)
    exact = weight + b @ a
    m.put("w", exact)
    for key in ("x", "y"):
        m.put(key, m.weight(key, 2, 2))
    base, adapter, out = m.write()
    site = Site(LoraPair("w", 0, adapter["w.a"], adapter["w.b"]), "w", 0, R, 1.0, True, None, None)
    rows = Span(0, 200)
    term = Term(0, -1, rows, -1, Axes.OUT_IN, rows)
    outputs = tuple(
        OutputTensor(
            key, entry.file.name, entry, entry.dtype, entry.shape, terms=(term,) if key == "w" else ()
        )
        for key, entry in base.items()
    )
    plan = a_plan(root, (site,), outputs, adapter, "stochastic")
    return Wide(World(plan, out, dtype), exact, weight)
