"""What happens to each output tensor, as it is collected; refuses what would happen twice."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from loudmerge.errors import WHICH_BASE, Problem, some
from loudmerge.evidence.decision import Layout
from loudmerge.layout import Axes, Orientation, Span
from loudmerge.planning.closing import closing, is_head
from loudmerge.planning.misplaced import PART, missing_base, several_alphas
from loudmerge.planning.options import Options
from loudmerge.planning.plan import Counts, MergePlan, OutputTensor, Site, Term
from loudmerge.planning.siblings import is_extra_layer
from loudmerge.planning.sites import Placed, Placement, wrong_dtype
from loudmerge.reading.adapter import EMBEDDING_NAMES, Adapter, FullTensor, LoraPair, TokenRows
from loudmerge.reading.adapter_config import ends_with
from loudmerge.reading.checkpoint import Checkpoint, config_parts
from loudmerge.reading.experts import Slot
from loudmerge.reading.families import FUSED_LEAVES, Family
from loudmerge.reading.names import Names
from loudmerge.reading.patterns import alphas
from loudmerge.system.tensorfile import DTYPE_NAMES, FLOAT_CODES, MERGEABLE_CODES, TensorEntry

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
NEW_HEAD = (
    f"{WHICH_BASE} A head that the training made (a classifier's, a reward model's) is in no base: merge the "
    "live model with save_pretrained_merged, or save the model with its new head, untrained, as the base."
)
FUSED_WHOLE = (
    f"{WHICH_BASE} If it holds its experts apart: whole experts, trained fused, are not taken apart. Merge "
    "with PEFT's merge_and_unload, and have transformers save the model."
)
NO_BIAS = (
    "The base's module has no bias, which could hold it: use base and adapter with PEFT, without a merge."
)


class Draft:
    """Collects what happens to each output tensor, and refuses what would happen twice."""

    def __init__(
        self, base: Checkpoint, adapter: Adapter, names: Names, family: Family, options: Options
    ) -> None:
        self.base = base
        self.adapter = adapter
        self.names = names
        self.family = family
        self._options = options
        self._full_names = {family.canonical(full.name) for full in adapter.full}
        self.problems: list[Problem] = []
        self.sites: list[Site] = []
        self.terms: dict[str, list[Term]] = defaultdict(list)
        self._claims: dict[tuple[str, int], list[tuple[Span, str]]] = defaultdict(list)
        self.changes: dict[str, dict[str, Any]] = defaultdict(dict)
        self.added: dict[str, OutputTensor] = {}
        self.edits: dict[str, Any] = {}
        self.notes: list[str] = []
        self.full_head: TensorEntry | None = None
        self.head_rows: TokenRows | None = None
        self.expert = self.dense = self.replaced = 0

    def add_fused(self, placement: Placement, layout: Layout) -> None:
        for module in placement.modules:
            chosen = layout.hypotheses[module.name]
            for leaf, pair in zip(chosen.assignment, module.pairs, strict=True):
                parameter, target = module.parameter(leaf), placement.targets[module.name, leaf]
                reads_input = (chosen.orientation is Orientation.STANDARD) == (target.axes is Axes.OUT_IN)
                self.sites.append(
                    Site(
                        pair,
                        parameter.name,
                        module.num_experts,
                        parameter.rank,
                        self.adapter.config.scaling_for(parameter.name, parameter.rank),
                        reads_input,
                        chosen.orientation,
                        layout.packing[module.name, leaf],
                    )
                )
                self._check_alpha(pair, parameter.name, parameter.rank)
                for expert, rows, slot in target.parts:
                    self._add_term(expert, rows, slot)
                self.expert += len(target.parts)

    def add_dense(self, placed: Iterable[Placed]) -> None:
        for item in placed:
            pair, slot = item.pair, item.slot
            if self.family.shared and re.search(self.family.shared, item.parameter):
                self.problems.append(_shared(pair.a, slot.entry))
            self._check_alpha(pair, item.parameter if item.wrapped else pair.module, item.rank)
            self.sites.append(
                Site(
                    pair,
                    item.parameter,
                    0,
                    item.rank,
                    item.scaling,
                    not pair.embedding,
                    None,
                    None,
                    peft_rounds_delta=pair.embedding or item.wrapped or self._is_mica,
                )
            )
            self._add_term(-1, Span(0, slot.out.count), slot)
            if pair.magnitude is not None:
                self._change(slot.entry, pair.magnitude, "dora", pair.magnitude)
            if pair.bias is not None:
                self._add_bias(pair.bias, item)
            self._require_bias(item)
            if item.expert:
                self.expert += 1
            else:
                self.dense += 1

    @property
    def _is_mica(self) -> bool:
        """PEFT merges it by itself: peft/tuners/lora/variants.py, `MiCALinearVariant.merge_unsafe`."""
        return str(self.adapter.config.raw.get("init_lora_weights")).lower() == "mica"

    def _check_alpha(self, pair: LoraPair, name: str, rank: int) -> None:
        found = alphas(self.adapter.config.raw, name, rank)
        if len(found) > 1:
            self.problems.append(several_alphas(str(pair.a), name, found))

    def _add_term(self, expert: int, rows: Span, slot: Slot) -> None:
        key = slot.entry.name
        site, claims = self.sites[-1], self._claims[key, slot.index]
        for span, other in claims:
            if slot.out.meets(span):
                self.problems.append(_claimed_twice(site, slot, other))
                return
        claims.append((slot.out, site.parameter))
        self.terms[key].append(Term(len(self.sites) - 1, expert, rows, slot.index, slot.axes, slot.out))

    def _require_bias(self, item: Placed) -> None:
        """PEFT before 0.21 trains the biases of bias="lora_only", but does not save them."""
        if self.adapter.config.bias == "none" or item.pair.embedding:
            return
        name = item.parameter.removesuffix("weight") + "bias"
        if self.names.place(name) is not None and self.family.canonical(name) not in self._full_names:
            self.problems.append(
                Problem(
                    "missing-adapter-tensor",
                    f"{name}, beside {item.pair.a}",
                    f"no trained bias, though the config says bias={self.adapter.config.bias!r}",
                    "the bias that was trained with the LoRA",
                    "Merge the live model with save_pretrained_merged, or save it with PEFT >= 0.21.",
                )
            )

    def _add_bias(self, bias: TensorEntry, item: Placed) -> None:
        name = item.parameter.removesuffix("weight") + "bias"
        entry = self.names.find(name)
        if entry is None:
            hint = PART if self.names.part(name) else NO_BIAS
            self.problems.append(missing_base(str(bias), "a LoRA bias", name, hint))
        elif entry.shape != bias.shape:
            self.problems.append(wrong_shape(str(bias), bias.shape, entry))
        else:
            self._change(entry, bias, "bias", (bias, item.scaling))

    def add_full(self, full: Iterable[FullTensor]) -> None:
        for tensor in full:
            entry = self.names.find(tensor.name)
            canonical = self.family.canonical(tensor.name)
            resizable = canonical in (EMBEDDING, HEAD, HEAD_BIAS) or (entry and self._embeds(entry))
            if entry is None and canonical == HEAD:
                self.full_head = tensor.entry
            elif entry is None and (stored := self._stored_bias(tensor)) is not None:
                self.take_copy(stored, tensor.entry)
            elif entry is None:
                fused = tensor.name.rpartition(".")[2] in FUSED_LEAVES
                hint = (FUSED_WHOLE if fused else NEW_HEAD) if tensor.saved_module else WHICH_BASE
                hint = PART if self.names.part(tensor.name) else hint
                self.problems.append(missing_base(str(tensor.entry), "a full tensor", tensor.name, hint))
            elif tensor.entry.shape != entry.shape and not (
                resizable and tensor.entry.shape[1:] == entry.shape[1:]
            ):
                self.problems.append(wrong_shape(str(tensor.entry), tensor.entry.shape, entry))
            elif tensor.saved_module and entry.name in self.terms:
                self.problems.append(_lora_and_full(tensor, entry))
            else:
                self._change(entry, tensor.entry, "replacement", tensor.entry)
                self.replaced += 1

    def take_copy(self, first: TensorEntry, copy: TensorEntry) -> None:
        """A second copy of one of the adapter's tensors; before a byte is written they are compared."""
        self.adapter = replace(self.adapter, copies=(*self.adapter.copies, (first, copy)))

    def _embeds(self, entry: TensorEntry) -> bool:
        """Whether a tensor is an embedding, or a head, by its name and by its rows, one for each token."""
        named = any(ends_with(entry.name, f"{name}.weight") for name in EMBEDDING_NAMES)
        return named and entry.shape[0] in self.base.vocabulary_sizes

    def _stored_bias(self, full: FullTensor) -> TensorEntry | None:
        """The bias of a tied head under the name that the base has it by, where PEFT saved both names.

        The modules around and in a head have one bias: `cls.predictions.bias`, and that of its `decoder`.
        """

        def outer(name: str) -> str:
            return re.sub(r"\.decoder\.bias$", ".bias", name)

        for other in self.adapter.full:
            same = outer(other.name) == outer(full.name) and other.entry.is_like(full.entry)
            if other is not full and same and self.names.find(other.name) is not None:
                return other.entry
        return None

    def add_rows(self, rows: Iterable[TokenRows]) -> None:
        for item in rows:
            name = f"{item.module}.weight"
            entry = self.names.find(name)
            if entry is None and self.family.canonical(name) == HEAD:
                self.head_rows = item
            elif entry is None:
                self.problems.append(missing_base(str(item.entry), "trained token rows", name))
            elif self.fits(item, self.final(entry)):
                self._change(entry, item.entry, "token_rows", (item.indices, item.entry))
                self.replaced += 1

    def fits(self, rows: TokenRows, entry: TensorEntry) -> bool:
        """Whether rows fit the tensor that they are for; if not, that is a problem."""
        if len(entry.shape) != 2 or entry.shape[1] != rows.entry.shape[1]:
            self.problems.append(wrong_shape(str(rows.entry), rows.entry.shape, entry))
        elif wrong := [index for index in rows.indices if not 0 <= index < entry.shape[0]]:
            self.problems.append(
                Problem(
                    "shape-mismatch",
                    str(rows.entry),
                    f"token index {wrong[0]}",
                    f"indices under {entry.shape[0]}, the rows of {entry}",
                    WHICH_BASE,
                )
            )
        else:
            return True
        return False

    def _change(self, entry: TensorEntry, where: TensorEntry, kind: str, value: object) -> None:
        # A bias is added to in float32, which would lose what a float64 holds.
        problem = wrong_dtype(entry, MERGEABLE_CODES if kind == "bias" else FLOAT_CODES)
        if problem is not None:
            self.problems.append(problem)
        if kind in self.changes[entry.name]:
            self.problems.append(_changed_twice(where, entry))
        self.changes[entry.name][kind] = value

    def final(self, entry: TensorEntry) -> TensorEntry:
        """What a base tensor is made from: itself, or the adapter's full tensor."""
        replacement: TensorEntry = self.changes.get(entry.name, {}).get("replacement", entry)
        return replacement

    def finish(self, layout: Layout, placement: Placement) -> MergePlan:
        outputs = []
        canonical = self.names.canonical
        last = closing(self.base.entries, lambda name: is_extra_layer(self.base, canonical[name]))
        for entry in self.base.entries.values():
            head = is_head(canonical[entry.name])
            outputs.append(self._output(entry, closing=entry.name in last, head=head))
            if entry.name in self.added:
                outputs.append(self.added[entry.name])
        touched = sum(1 for output in outputs if output.touched)
        self._edit_dtype()
        return MergePlan(
            base=self.base,
            adapter=self.adapter,
            family=self.family,
            layout=layout,
            options=self._options,
            rounding=self._options.rounding,
            sites=tuple(self.sites),
            outputs=tuple(outputs),
            counts=Counts(self.expert, self.dense, self.replaced, len(outputs) - touched),
            num_experts=placement.num_experts,
            config_edits=self.edits,
            notes=(
                *layout.overruled,
                *layout.doubts,
                *self.notes,
                *_unread(self.base.left_out, self.adapter.unread),
            ),
        )

    def _output(self, entry: TensorEntry, *, closing: bool, head: bool) -> OutputTensor:
        change = self.changes.get(entry.name, {})
        replacement = change.get("replacement")
        source = replacement or entry
        return OutputTensor(
            key=entry.name,
            shard=entry.file.name,
            source=source,
            dtype=self.dtype(entry),
            shape=source.shape,
            replaced=replacement is not None,
            terms=tuple(self.terms.get(entry.name, ())),
            dora=change.get("dora"),
            bias=change.get("bias"),
            token_rows=change.get("token_rows"),
            closing=closing,
            head=head,
        )

    def dtype(self, entry: TensorEntry) -> str:
        if self._options.dtype == "keep" or entry.dtype not in FLOAT_CODES:
            return entry.dtype
        return _CODES[self._options.dtype]

    def _edit_dtype(self) -> None:
        if self._options.dtype == "keep":
            return
        present = [name for name in _DTYPES if name in self.base.config]
        for name in present or ["torch_dtype"]:
            self.edits[name] = self._options.dtype
        for prefix, part in config_parts(self.base.config):
            for name in _DTYPES:
                if isinstance(part.get(name), str):
                    self.edits[f"{prefix}{name}"] = self._options.dtype

    def edit(self, field: str, value: object, *, everywhere: bool = False) -> None:
        """Edits a field in the config's part for the text model, and in what holds that where it has it, too.

        everywhere: there in any case. Of `tie_word_embeddings` transformers 5 asks the whole config and 4 the
        text model's, and what a part does not say is its class's default.
        """
        *above, text = self.base.text_parts
        places = [place for place, part in above if everywhere or field in part] + [text[0]]
        self.edits.update({f"{place}{field}": value for place in places})


_DTYPES = ("dtype", "torch_dtype")
_CODES = {name: code for code, name in DTYPE_NAMES.items()}


def _unread(of_base: Sequence[str], of_adapter: Sequence[str]) -> Iterable[str]:
    if of_base:
        yield f"other weights, and adapters, are not copied from the base: {some(of_base, 10)}"
    if of_adapter:
        yield f"other weights beside the adapter are not read: {some(of_adapter, 10)}"


def wrong_shape(where: str, found: tuple[int, ...], entry: TensorEntry) -> Problem:
    """A tensor of the adapter does not have the shape of the base's tensor it is for."""
    return Problem(
        "shape-mismatch",
        where,
        f"{list(found)}",
        f"a shape that fits {entry}",
        WHICH_BASE,
    )


def _shared(lora: TensorEntry, entry: TensorEntry) -> Problem:
    return Problem(
        "unsupported-base",
        f"{lora} for {entry}",
        "a LoRA of one layer for a weight that several layers share",
        "a weight of that layer alone",
        "Train LoRA on the other modules: merged, this one would change all of these layers.",
    )


def _claimed_twice(site: Site, slot: Slot, other: str) -> Problem:
    return Problem(
        "unsupported-adapter",
        f"{site.pair.a} for {slot.entry}",
        f"a second LoRA for weights that the LoRA of {other} already updates",
        "one LoRA for each weight",
        "Which of them, or their sum, was trained cannot be known.",
    )


def _changed_twice(where: TensorEntry, entry: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(where),
        f"a second tensor that replaces, or is added to, {entry}",
        "one",
        "Which of them was trained cannot be known.",
    )


def _lora_and_full(tensor: FullTensor, entry: TensorEntry) -> Problem:
    return Problem(
        "unsupported-adapter",
        str(tensor.entry),
        f"a full tensor of modules_to_save, and a LoRA, for {entry}",
        "one of the two",
        "PEFT wraps a module once; which was trained cannot be known.",
    )
