"""Which PEFT wrote an adapter, as far as its config proves it, and the orientation that follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loudmerge.evidence.hypotheses import Evidence
from loudmerge.evidence.provenance import config_evidence, orientation_written_by
from loudmerge.layout import Orientation
from loudmerge.reading.adapter_config import AdapterConfig
from loudmerge.reading.families import family_of
from tests.unit.builders import EXPERTS, config
from tests.unit.synthetic import config_fields


def says(
    fields: AdapterConfig, model_type: str = "qwen3_moe", parameter: str = f"{EXPERTS}.down_proj"
) -> Evidence:
    found = config_evidence(fields, family_of(model_type), [parameter])
    assert (found.source, found.site) == ("peft_version", "")
    assert found.confidence == (0.9 if found.says else 0.0)
    return found


@pytest.mark.parametrize(
    ("version", "plain", "transposed"),
    [
        ("0.17.0", "swapped", "swapped"),
        ("0.18.0", "swapped", "swapped"),
        ("0.18.1", "swapped", "swapped"),
        ("0.19.0", "swapped", "standard"),
        ("0.19.1", "standard", "swapped"),
        ("0.20", "standard", "swapped"),
        ("0.21.2", "standard", "swapped"),
        ("0.18.1+local", "swapped", "swapped"),
        ("0.19.2.dev0", "standard", "swapped"),
        ("0.20.0.dev0", "standard", "swapped"),
        ("1.0", "standard", "swapped"),
    ],
)
def test_each_release_of_peft_reads_one_axis(version: str, plain: str, transposed: str) -> None:
    """openai_privacy_filter is_transposed in every version of transformers, qwen3_moe and llama4 in none."""
    assert says(config(peft_version=version)).says == plain
    assert says(config(peft_version=version), "llama4").says == plain
    assert says(config(peft_version=version), "openai_privacy_filter").says == transposed
    assert says(config(peft_version=version)).detail == f"peft_version {version}"


def test_a_number_of_many_digits_is_no_version() -> None:
    """int() of 5000 digits raises ValueError."""
    assert says(config(peft_version=f"0.{'9' * 5000}")).says == ""


@pytest.mark.parametrize("version", ["0.18.2.dev0", "0.19.0.dev0", "0.19.0rc1", "0.19.1.dev0"])
def test_a_development_version_between_two_regimes_says_nothing(version: str) -> None:
    found = says(config(peft_version=version))
    assert found.says == ""
    assert found.detail == f"peft_version {version} is a development version between two regimes"


@pytest.mark.parametrize(
    ("version", "field", "since"),
    [
        ("0.17.1", "alora_invocation_tokens", "0.18"),
        ("0.18.1", "lora_ga_config", "0.19"),
        ("0.18.1", "use_bdlora", "0.19"),
        ("0.19.1", "velora_config", "0.20"),
        ("0.20.0", "kasa_config", "0.21"),
    ],
)
def test_a_version_older_than_the_fields_is_stale(version: str, field: str, since: str) -> None:
    found = says(config(peft_version=version, **{field: None}))
    assert found.says == ""
    assert found.detail == (
        f"peft_version {version} is stale: the config has fields of PEFT {since}, which saved it again"
    )


def test_a_version_as_new_as_its_fields_is_believed() -> None:
    assert says(config(peft_version="0.21.0", kasa_config=None, lora_ga_config=None)).says == "standard"


def test_what_is_no_version_says_nothing() -> None:
    assert says(config(peft_version="newest")).detail == "peft_version 'newest' is no version"


def test_the_fields_of_peft_0_17_without_a_version_date_the_adapter() -> None:
    found = says(config(**config_fields("0.17.1")))
    assert (found.says, found.detail) == ("swapped", "no peft_version and no field newer than PEFT 0.17")


@pytest.mark.parametrize(
    "fields", [{}, config_fields("none"), {"corda_config": None}], ids=["by hand", "newer fields", "a part"]
)
def test_other_fields_without_a_version_date_nothing(fields: dict[str, Any]) -> None:
    found = says(config(**fields))
    assert found.says == ""
    assert (
        found.detail == "no peft_version, and its fields are not those of a PEFT that writes none (<= 0.17)"
    )


@pytest.mark.parametrize(
    ("stamp", "orientation"), [("peft-0.18", "swapped"), ("peft-0.19.1", "standard"), ("peft-0.30", "")]
)
def test_what_nemo_automodel_stamped_is_the_layout_of_that_release(stamp: str, orientation: str) -> None:
    found = says(replace(config(), written_as=stamp))
    assert found.says == orientation
    assert found.detail == f"paramwrapper_layout {stamp} in automodel_peft_config.json"


def test_a_stamp_beside_what_peft_saved_again_says_nothing() -> None:
    assert says(replace(config(peft_version="0.18.1"), written_as="peft-0.19.1")).says == "swapped"
    assert says(replace(config(**config_fields("0.17.1")), written_as="peft-0.19.1")).says == "swapped"
    assert says(replace(config(**config_fields("none")), written_as="peft-0.19.1")).says == ""


def test_what_the_installed_peft_writes_is_believed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=2, lora_alpha=4, target_parameters=["experts.down_proj"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    found = says(config(**{**raw, "target_parameters": ()}))
    new = tuple(int(part) for part in peft.__version__.split(".")[:3]) >= (0, 19, 1)
    assert found.says == ("standard" if new else "swapped")


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_vl_moe"])
def test_a_version_says_nothing_where_transformers_decides(model_type: str) -> None:
    """gpt_oss gained is_transposed, qwen3_vl_moe other axes, in transformers 5.0."""
    for version in ("0.19.0", "0.19.1", "0.21.2"):
        found = says(config(peft_version=version), model_type)
        assert found.says == ""
        assert "which transformers it was trained under decides" in found.detail
    assert says(config(peft_version="0.18.1"), "gpt_oss").says == "swapped"
    assert says(config(peft_version="0.18.1"), "qwen3_vl_moe").says == ""


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [("fc1.weight", "standard"), ("fc2.weight", "standard"), ("down_proj", "swapped")],
)
def test_the_names_of_arias_parameters_date_its_experts_class(parameter: str, expected: str) -> None:
    """`fc1` was a module of its own without is_transposed; `gate_up_proj` belongs to a class that has it."""
    name = f"model.language_model.layers.0.mlp.experts.{parameter}"
    assert says(config(peft_version="0.21.2"), "aria", name).says == expected
    assert says(config(peft_version="0.18.1"), "aria", name).says == "swapped"


def test_arias_experts_class_is_transposed_from_transformers_5_18_on() -> None:
    """Where its names changed, too: transformers/models/aria/modeling_aria.py of 5.17.0 and 5.18.0."""
    for transformers, parameter, expected in (
        ("5.17", "fc1.weight", Orientation.STANDARD),
        ("5.18", "gate_up_proj", Orientation.SWAPPED),
    ):
        family = family_of("aria").under(transformers)
        name = f"model.language_model.layers.0.mlp.experts.{parameter}"
        assert orientation_written_by((0, 19, 1), family, [name]) is expected


def test_names_that_no_generation_has_say_nothing() -> None:
    found = says(config(peft_version="0.21.2"), "aria", "model.layers.0.mlp.experts.up_proj")
    assert found.says == ""


def test_a_version_says_nothing_about_a_family_that_is_not_known() -> None:
    """Whether its experts class is_transposed is in nobody's table."""
    for version in ("0.18.1", "0.19.0", "0.19.1"):
        found = says(config(peft_version=version), "nobody_knows")
        assert found.says == ""
        assert "is_transposed of the experts class decides" in found.detail
