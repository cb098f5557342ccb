"""adapter_config.json, read without PEFT: what fixes an adapter's function, and what is not understood."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loudmerge.errors import MergeRefused, Problem, some
from loudmerge.reading.foreign import what_of
from loudmerge.reading.initialisations import is_harmless, what_helps
from loudmerge.reading.patterns import alphas, ranks
from loudmerge.system.jsonfile import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter directory."""

AUTOMODEL = "automodel_peft_config.json"
"""What NeMo AutoModel writes beside them: nemo_automodel/components/checkpoint/addons.py, `PeftAddon`."""

OWN_RANK = "Experts of another rank (NeMo AutoModel's moe_rank_scaling) need rank_pattern to say so."
"""What helps where only the rank does not fit."""

INERT_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_B_layout",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "unsloth_fused_expert_lora",
        "velora_config",
    }
)
"""Fields that say how an adapter was trained or found, or that are read elsewhere in loudmerge."""

READ_FIELDS = frozenset(
    {
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "layer_replication",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_parameters",
        "use_dora",
        "use_rslora",
    }
)

_WHOLE = (
    "It was merged already, or trained whole: then there is nothing to merge. If it is the base, name it"
    " first: BASE, then ADAPTER."
)

_How = Callable[[Iterable[bool]], bool]

_HEADS = ("classifier", "score")
"""What PEFT adds to modules_to_save of a classifier; up to 0.10 it saved that, but did not say so."""


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. `raw` is the whole file.

    written_as: the layout of fused experts by AUTOMODEL, "peft-0.18" or "peft-0.19.1"; None without one.
    """

    raw: Mapping[str, Any]
    peft_version: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    target_parameters: frozenset[str]
    modules_to_save: frozenset[str]
    written_as: str | None = None

    @property
    def bias(self) -> str:
        """Which of the base's biases were trained: "none", "all" or "lora_only"."""
        return str(self.raw.get("bias") or "none")

    def rank_for(self, name: str, found: Container[int | None] = ()) -> int:
        """The rank of a module or parameter, by its full name in memory, after `rank_pattern`.

        found: the ranks that the tensors may have. They tell where PEFT's saving lost which key was first.
        """
        may = ranks(self.raw, name)
        return next((rank for rank in may if rank in found), may[0])

    def alpha_for(self, name: str, rank: int) -> float:
        """The alpha of a module or parameter, by its full name in memory, after `alpha_pattern`."""
        return alphas(self.raw, name, rank)[0]

    def scaling_for(self, name: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora, after the patterns."""
        return self.alpha_for(name, rank) / (math.sqrt(rank) if self.use_rslora else rank)

    def targeted_parameters(self, module: str) -> tuple[str, ...]:
        """The parameters of `module` that `target_parameters` names, sorted.

        PEFT's rule: the full name equals the target or ends with "." and the target.
        """
        found = set()
        for target in self.target_parameters:
            name = f"{module}.{target.rpartition('.')[2]}"
            if ends_with(name, target):
                found.add(target.rpartition(".")[2])
        return tuple(sorted(found))

    @property
    def all_linear(self) -> bool:
        """Whether `target_modules` is the word for all Linears; PEFT saves the names that it stands for."""
        return str(self.raw.get("target_modules")).lower() == "all-linear"

    def targets_module(self, module: str) -> bool:
        """Whether PEFT puts a LoRA on the Linear that has this name in memory.

        Source: peft/tuners/tuners_utils.py, `check_target_module_exists`.
        """
        if _is_named(self.raw.get("exclude_modules") or (), module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        return self._names(module, all)

    def never_targets_module(self, module: str) -> bool:
        """Whether no release of PEFT puts a LoRA on what has this name in memory, by what the config says.

        Nothing is sure without target_modules, for which PEFT has a list of its own for each model_type, and
        with ensure_weight_tying, where what is tied to a target has a LoRA, too.
        """
        if self.raw.get("ensure_weight_tying"):
            return False
        if _is_named(self.raw.get("exclude_modules") or (), module):
            return True
        return self.raw.get("target_modules") is not None and not self._names(module, any)

    def _names(self, module: str, how: _How) -> bool:
        """Whether `target_modules` names a module, in a layer that is meant."""
        targets = self.raw.get("target_modules") or ()
        if isinstance(targets, str):
            return self.all_linear or _is_named(targets, module)
        return module in targets or (_is_named(targets, module) and self._is_in_layer(module, how))

    def _is_in_layer(self, module: str, how: _How) -> bool:
        """Whether `layers_to_transform` has the module's layer.

        PEFT goes by the first index of the name; before 0.20 it went by the last, which may be an expert's.
        From 0.21 on what layers_pattern names may stand first, as in a model without a head.
        how: whether by all of these rules or by any.
        """
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        pattern = self.raw.get("layers_pattern") or r"[^.]*"
        patterns = [pattern] if isinstance(pattern, str) else pattern
        chosen = [layers] if isinstance(layers, int) else layers
        names = "|".join(f"(?:{name})" for name in patterns)
        # By name: a pattern may have groups of its own.
        starts = [r".*?\.", r".*\.", *([r"(?:^|.*?\.)"] if self.raw.get("layers_pattern") else [])]
        found = [re.match(rf"{start}(?:{names})\.(?P<layer>\d+)\.", module) for start in starts]
        return how(match is not None and int(match["layer"]) in chosen for match in found)

    def saves_module(self, module: str) -> bool:
        """Whether `modules_to_save` names this module, or one around it.

        PEFT's rule (peft/utils/other.py, `_set_trainable`): a plain `endswith`, without a dot.
        """
        return bool(self.saved_around(module))

    def saved_around(self, module: str) -> list[str]:
        """The modules that `modules_to_save` names of this one and those around it, outermost first."""
        parts = module.split(".")
        around = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        heads = _HEADS if self.raw.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
        return [name for name in around if name.endswith(tuple(self.modules_to_save) or heads)]


def ends_with(name: str, target: str) -> bool:
    """Whether a target in one of the config's lists means this name: by PEFT's rule all of it, or its end."""
    return name == target or name.endswith(f".{target}")


def read_config(path: Path) -> AdapterConfig:
    """Reads adapter_config.json of an adapter directory, and AUTOMODEL where it is.

    Raises MergeRefused with every problem found.
    """
    file = path / CONFIG
    wanted = "a directory that PEFT's save_pretrained wrote"
    # PEFT has a folder for each adapter but "default", transformers' Trainer one for each checkpoint.
    inside = [] if file.is_file() else sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
    if inside:
        hint = f"Give the folder in it of the adapter that is meant: {some(inside, 10)}."
        raise MergeRefused(Problem("unsupported-adapter", str(path), f"no {CONFIG}", wanted, hint))
    if not file.is_file() and (path / "config.json").is_file():
        found = f"no {CONFIG}, but the config.json of a whole model"
        raise MergeRefused(Problem("unsupported-adapter", str(path), found, wanted, _WHOLE))
    raw = read_json(file, "unsupported-adapter", wanted)
    problems = list(_config_problems(file, raw))
    if problems:
        raise MergeRefused(problems)
    return parse_config(raw, _written_as(path))


def _written_as(path: Path) -> str | None:
    if not (path / AUTOMODEL).is_file():
        return None
    stamp = read_json(path / AUTOMODEL, "unsupported-adapter", "the file as NeMo AutoModel wrote it")
    return None if stamp.get("paramwrapper_layout") is None else str(stamp["paramwrapper_layout"])


def parse_config(raw: Mapping[str, Any], written_as: str | None = None) -> AdapterConfig:
    """What a config says that has no problems."""
    return AdapterConfig(
        raw=raw,
        peft_version=None if raw.get("peft_version") is None else str(raw["peft_version"]),
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        target_parameters=frozenset(raw.get("target_parameters") or ()),
        modules_to_save=frozenset(raw.get("modules_to_save") or ()),
        written_as=written_as,
    )


OTHER_KINDS = "Merge other kinds with PEFT's merge_and_unload, where they have one."

_Refuse = Callable[..., Problem]
_Form = Callable[[object], bool]


def _config_problems(file: Path, raw: Mapping[str, Any]) -> Iterable[Problem]:
    def refuse(field: str, expected: str, hint: str) -> Problem:
        return Problem("unsupported-adapter", f"{field} in {file}", repr(raw.get(field)), expected, hint)

    if raw.get("peft_type") != "LORA":
        # Its other fields are of that kind, and no problems of their own.
        yield refuse("peft_type", "'LORA'", OTHER_KINDS)
        return
    for field, (fits, expected) in FIELD_FORMS.items():
        if not fits(raw.get(field)) and (raw.get(field) is not None or field in _REQUIRED):
            yield refuse(field, expected, "Correct it, or save the adapter again with PEFT.")
    yield from _function_problems(raw, refuse)


def _function_problems(raw: Mapping[str, Any], refuse: _Refuse) -> Iterable[Problem]:
    """Fields that make the adapter another function than plain LoRA."""
    if raw.get("layer_replication"):
        yield refuse(
            "layer_replication",
            "null",
            "A model with replicated layers has other layers than its base: save it as a base of its own,"
            " set this field to null, and merge into that.",
        )
    init = raw.get("init_lora_weights", True)
    if not is_harmless(init):
        yield refuse(
            "init_lora_weights",
            "an initialisation that leaves the base's weights alone",
            what_helps(init),
        )
    for field in sorted(raw.keys() - INERT_FIELDS - READ_FIELDS):
        if raw[field] in (None, False, [], {}, ""):
            continue
        yield refuse(field, *what_of(field))


def _is_named(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(ends_with(module, name) for name in names)


def _is_expression(value: object) -> bool:
    try:
        with warnings.catch_warnings():
            # Python 3.10 only warns of flags that do not go first.
            warnings.simplefilter("error", DeprecationWarning)
            return isinstance(value, str) and bool(re.compile(value))
    except (re.error, DeprecationWarning):
        return False


def _is_part(value: object) -> bool:
    """An expression that PEFT can put inside another one: without flags, which go first."""
    return _is_expression(value) and _is_expression(f"()({value})")


def _is_number(value: object) -> bool:
    """A number that a float can hold: JSON may have whole numbers of hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and _is_number(value) and value > 0


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _list_of(good: _Form) -> _Form:
    return lambda value: isinstance(value, list) and all(map(good, value))


def _map_of(good_key: _Form, good: _Form) -> _Form:
    return lambda value: isinstance(value, dict) and all(good_key(key) and good(value[key]) for key in value)


def _either(one: _Form, other: _Form) -> _Form:
    return lambda value: one(value) or other(value)


_TARGETS = (_either(_list_of(_is_name), _is_expression), "a list of names, or a regular expression")
_FLAG = (_is_flag, "true or false")
_PATTERN = "regular expressions with positive numbers"
_INDICES = _list_of(_is_whole)

FIELD_FORMS: Mapping[str, tuple[_Form, str]] = {
    "r": (_is_rank, "a positive whole number"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_map_of(_is_part, _is_rank), _PATTERN),
    "alpha_pattern": (_map_of(_is_part, _is_number), _PATTERN),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": (_list_of(_is_name), "a list of names"),
    # As names' ends, but as expressions where they take modules out of target_modules.
    "modules_to_save": (_list_of(_is_part), "a list of names"),
    "trainable_token_indices": (
        _either(_INDICES, _map_of(_is_name, _INDICES)),
        "a list of token indices, or one for each embedding's name",
    ),
    "layers_to_transform": (_either(_is_whole, _INDICES), "a layer's index, or a list of them"),
    "layers_pattern": (
        _either(_is_part, _list_of(_is_part)),
        "a regular expression, or a list of them",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "fan_in_fan_out": _FLAG,
    "ensure_weight_tying": _FLAG,
}
"""What the fields that are read hold, where they are not null."""

_REQUIRED = frozenset({"r", "lora_alpha"})
