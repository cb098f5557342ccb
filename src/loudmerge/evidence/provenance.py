"""Which PEFT wrote an adapter, as far as its config proves it, and the orientation that follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from loudmerge.evidence.hypotheses import Evidence
from loudmerge.layout import Axes, Orientation
from loudmerge.reading.adapter_config import AUTOMODEL, AdapterConfig
from loudmerge.reading.families import Era, Family

FIELDS_SINCE: Mapping[str, tuple[int, int]] = {
    "alora_invocation_tokens": (0, 18),
    "arrow_config": (0, 18),
    "ensure_weight_tying": (0, 18),
    "lora_ga_config": (0, 19),
    "use_bdlora": (0, 19),
    "monteclora_config": (0, 20),
    "velora_config": (0, 20),
    "kasa_config": (0, 21),
}
"""The PEFT release that first wrote each config field (0.17.1 to 0.21.2). PEFT writes every field it has."""

_FIELDS_OF_017 = frozenset({"corda_config", "eva_config", "qalora_group_size", "trainable_token_indices"})
"""Fields that PEFT 0.17 always writes, and hand-written configs do not have."""

_STAMPS: Mapping[str, tuple[int, int, int]] = {"peft-0.18": (0, 18, 0), "peft-0.19.1": (0, 19, 1)}
"""`paramwrapper_layout` of NeMo AutoModel, and the release of PEFT whose adapters are laid so.

Source: nemo_automodel/components/moe/state_dict_mixin.py, `_convert_lora_to_paramwrapper` (0.7.0).
"""


def config_evidence(config: AdapterConfig, family: Family, parameters: Iterable[str]) -> Evidence:
    """What adapter_config.json says about orientation; says "" when it says nothing.

    Source of the regimes: peft/tuners/lora/layer.py, `ParamWrapper.update_layer`, 0.17.0 to 0.21.2
    (huggingface/peft#3165 swapped all fused modules in 0.19.1).
    """
    version, why = _written_by(config)
    if version is None:
        return Evidence("peft_version", "", "", 0.0, why)
    if not family.known:
        detail = f"{why}; is_transposed of the experts class decides, and this model_type's is not known"
        return Evidence("peft_version", "", "", 0.0, detail)
    says = orientation_written_by(version, family, parameters)
    if says is None:
        detail = f"{why}; which transformers it was trained under decides, and no adapter records that"
        return Evidence("peft_version", "", "", 0.0, detail)
    return Evidence("peft_version", "", says.value, 0.9, why)


def evidence_by_class(config: AdapterConfig) -> Iterator[Evidence]:
    """As `config_evidence`, where no base tells the experts class: what it says for each kind of class.

    The orientation is that of the axes that the parameter had in memory when it was trained.
    """
    version, why = _written_by(config)
    if version is None:
        yield Evidence("peft_version", "", "", 0.0, why)
        return
    plain, transposed = (_regime(version, Era("all", Axes.OUT_IN, flag)) for flag in (False, True))
    if plain is transposed:
        yield Evidence("peft_version", "", plain.value, 0.9, f"{why}, whatever the experts class is")
        return
    yield Evidence("peft_version", "", plain.value, 0.9, f"{why}, unless the experts class is_transposed")
    yield Evidence("peft_version", "", transposed.value, 0.9, f"{why}, if the experts class is_transposed")


def orientation_written_by(
    version: tuple[int, int, int], family: Family, parameters: Iterable[str]
) -> Orientation | None:
    """What this release of PEFT writes, in the family's axes; None where transformers' version decides."""
    says = {_in_axes(_regime(version, era), era.axes, family.axes) for era in _eras(family, parameters)}
    return says.pop() if len(says) == 1 else None


def knows_embed_scale(config: AdapterConfig) -> bool:
    """Whether the config proves a PEFT that multiplies LoRA, and token rows, by an embedding's `embed_scale`.

    Source: huggingface/peft#2825, released in 0.18.0, the release that also first wrote `peft_version`.
    """
    if config.peft_version is None:
        return _newest_field(config) >= (0, 18)
    match = re.match(r"^(\d{1,9})\.(\d{1,9})(?!\d)(.*)$", config.peft_version)
    if match is None:
        return False
    release = (int(match[1]), int(match[2]))
    return release > (0, 18) or (release == (0, 18) and re.match(r"\.\d+$|$", match[3]) is not None)


def _newest_field(config: AdapterConfig) -> tuple[int, int]:
    return max((FIELDS_SINCE[name] for name in FIELDS_SINCE if name in config.raw), default=(0, 0))


def _written_by(config: AdapterConfig) -> tuple[tuple[int, int, int] | None, str]:
    """The PEFT release that trained the adapter, as far as its config proves it, and why."""
    newest = _newest_field(config)
    named = config.peft_version
    if named is None:
        return _unnamed(config, newest)
    match = re.match(r"^(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(?!\d)(.*)$", named)
    if match is None:
        return None, f"peft_version {named!r} is no version"
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if match[4] and version in ((0, 18, 2), (0, 19, 0), (0, 19, 1)):
        return None, f"peft_version {named} is a development version between two regimes"
    if version[:2] < newest:
        since = ".".join(map(str, newest))
        return (
            None,
            f"peft_version {named} is stale: the config has fields of PEFT {since}, which saved it again",
        )
    return version, f"peft_version {named}"


def _unnamed(config: AdapterConfig, newest: tuple[int, int]) -> tuple[tuple[int, int, int] | None, str]:
    """The same, where the config names no version."""
    if newest == (0, 0) and config.raw.keys() >= _FIELDS_OF_017:
        return (0, 17, 0), "no peft_version and no field newer than PEFT 0.17"
    if newest == (0, 0) and config.written_as is not None:
        return _STAMPS.get(config.written_as), f"paramwrapper_layout {config.written_as} in {AUTOMODEL}"
    return None, "no peft_version, and its fields are not those of a PEFT that writes none (<= 0.17)"


def _regime(version: tuple[int, int, int], era: Era) -> Orientation:
    if version < (0, 19, 0):
        return Orientation.SWAPPED
    if version == (0, 19, 0):
        return Orientation.STANDARD if era.is_transposed else Orientation.SWAPPED
    return Orientation.SWAPPED if era.is_transposed else Orientation.STANDARD


def _eras(family: Family, parameters: Iterable[str]) -> tuple[Era, ...]:
    """The generations of the experts class that have parameters of these names."""
    names = list(parameters)
    return tuple(era for era in family.eras if any(map(era.has, names)) or not era.parameter)


def _in_axes(orientation: Orientation, axes: Axes, reference: Axes) -> Orientation:
    return orientation if axes is reference else orientation.flipped()
