"""adapter_config.json: what fixes the adapter's function is read, what is not understood is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loudmerge.errors import MergeRefused
from loudmerge.reading.adapter_config import (
    FIELD_FORMS,
    INERT_FIELDS,
    READ_FIELDS,
    AdapterConfig,
    read_config,
)
from tests.unit.builders import config, raw_config
from tests.unit.synthetic import config_fields

DOWN = "model.layers.0.mlp.experts.down_proj"


def read(path: Path, **fields: Any) -> AdapterConfig:
    (path / "adapter_config.json").write_text(json.dumps(raw_config(**fields)))
    return read_config(path)


def refused(path: Path, **fields: Any) -> MergeRefused:
    with pytest.raises(MergeRefused) as caught:
        read(path, **fields)
    return caught.value


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.1", "0.20.0", "0.21.2"])
def test_the_fields_of_every_release_are_understood(version: str, tmp_path: Path) -> None:
    found = read(tmp_path, **{**config_fields(version), "r": 8, "lora_alpha": 16})
    assert (found.rank, found.alpha) == (8, 16)
    assert found.peft_version == (None if version == "0.17.1" else version)


def test_what_the_installed_peft_writes_is_understood(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj"], target_parameters=["experts.down_proj"],
        task_type="CAUSAL_LM", modules_to_save=["lm_head"], rank_pattern={"q_proj": 4}, use_rslora=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    found = read_config(tmp_path)
    assert found.target_parameters == {"experts.down_proj"}
    assert found.modules_to_save == {"lm_head"}
    assert found.scaling_for("model.layers.0.self_attn.q_proj", 4) == 16 / math.sqrt(4)


def test_a_directory_without_a_config_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(
        MergeRefused, match=r"^unsupported-adapter: .*: found no adapter_config\.json, expected a dir"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"), [("{", r"no JSON \("), ("", r"no JSON \("), ("[]", "a JSON list"), ("3", "a JSON int")]
)
def test_what_is_no_json_object_is_corrupt(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(MergeRefused, match=rf"^corrupt-file: .*adapter_config\.json: found {found}"):
        read_config(tmp_path)


def test_bytes_that_are_no_text_are_corrupt(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(MergeRefused, match=r"^corrupt-file: "):
        read_config(tmp_path)


@pytest.mark.parametrize("field", sorted(INERT_FIELDS - FIELD_FORMS.keys() - {"peft_version"}))
def test_an_inert_field_may_have_any_value(field: str, tmp_path: Path) -> None:
    assert read(tmp_path, **{field: "anything"}).raw[field] == "anything"


NO_NAMES = ([None], [1], True, -1, "experts.down_proj", {"a": 1}, [["a"]])
FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
OTHER_FORMS: dict[str, Sequence[object]] = {
    "target_parameters": NO_NAMES,
    **dict.fromkeys(("target_modules", "exclude_modules"), ([1], [None], True, 3, {"a": 1}, "(")),
    **dict.fromkeys(FLAGS, ("false", 1, [], 0)),
    "trainable_token_indices": ({"embed_tokens": 5}, {"embed_tokens": "ab"}, ["4"], [4.0], [True], 3, "4"),
    "layers_to_transform": ("1", [1.5], [None], {"a": 1}, True),
    "layers_pattern": (3, [3], "(", ["("], "(?i)layers"),
    "bias": ("some", True, ["all"]),
    "r": (10**400,),
    "lora_alpha": (10**400, -(10**400)),
    "modules_to_save": (*NO_NAMES, ["("], ["(?i)gate"], [")("]),
    "rank_pattern": ({"q_proj": 10**400}, {"(?i)q_proj": 2}, [], True),
    "alpha_pattern": ({"q_proj": 10**400}, {"(?i)q_proj": 2}, [], True),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in OTHER_FORMS.items() for value in values]
)
def test_a_field_that_holds_something_else_is_refused(field: str, value: object, tmp_path: Path) -> None:
    (found,) = refused(tmp_path, **{field: value}).problems
    assert (found.code, found.found) == ("unsupported-adapter", repr(value))
    assert found.where == f"{field} in {tmp_path / 'adapter_config.json'}"
    assert found.expected == FIELD_FORMS[field][1]


def test_every_field_with_a_form_is_a_known_one() -> None:
    assert FIELD_FORMS.keys() <= INERT_FIELDS | READ_FIELDS
    assert FIELD_FORMS.keys() == OTHER_FORMS.keys()


@pytest.mark.parametrize("field", sorted(FIELD_FORMS.keys() - {"r", "lora_alpha"}))
def test_a_field_with_a_form_may_be_null(field: str, tmp_path: Path) -> None:
    found = read(tmp_path, **{field: None})
    assert (found.rank, found.bias, found.target_parameters) == (2, "none", frozenset())


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_empty_is_passed_over(value: object, tmp_path: Path) -> None:
    assert read(tmp_path, use_qalora=value, alora_invocation_tokens=value).rank == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("monteclora_config", {"n": 1}),
        ("kasa_config", {"beta": 1}),
        ("megatron_config", {"a": 1}),
        ("frobnicate", 0.5),
    ],
)
def test_an_unknown_field_with_a_value_is_refused(field: str, value: object, tmp_path: Path) -> None:
    error = refused(tmp_path, **{field: value})
    assert error.code == "unsupported-adapter"
    assert f"{field} in {tmp_path / 'adapter_config.json'}: found {value!r}, expected null" in str(error)
    assert "may change the function" in str(error)


@pytest.mark.parametrize(
    ("field", "value"), [("alora_invocation_tokens", [1, 2]), ("arrow_config", {"top_k": 3})]
)
def test_an_update_that_depends_on_the_text_is_in_no_merge(field: str, value: object, tmp_path: Path) -> None:
    error = refused(tmp_path, **{field: value})
    assert error.code == "unsupported-adapter"
    assert "which no weight computes" in str(error)
    assert error.hint == "Use base and adapter with PEFT, without a merge."


@pytest.mark.parametrize(
    ("held", "stamp"), [(None, None), ("{}", None), ('{"paramwrapper_layout": "peft-0.18"}', "peft-0.18")]
)
def test_nemo_automodels_own_file_says_how_experts_are_laid(
    held: str | None, stamp: str | None, tmp_path: Path
) -> None:
    if held is not None:
        (tmp_path / "automodel_peft_config.json").write_text(held)
    assert read(tmp_path).written_as == stamp


def test_no_field_is_both_read_and_inert() -> None:
    assert not INERT_FIELDS & READ_FIELDS


@pytest.mark.parametrize(
    ("value", "text"), [("0.19.1", "0.19.1"), (0.18, "0.18"), (None, None), ([1], "[1]")]
)
def test_a_version_is_read_as_text(value: object, text: str | None, tmp_path: Path) -> None:
    assert read(tmp_path, peft_version=value).peft_version == text


@pytest.mark.parametrize("peft_type", ["LOHA", "ADALORA", "lora", None])
def test_another_peft_type_is_refused(peft_type: object, tmp_path: Path) -> None:
    error = refused(tmp_path, peft_type=peft_type)
    assert f"peft_type in {tmp_path / 'adapter_config.json'}: found {peft_type!r}, expected 'LORA'." in str(
        error
    )


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None, "8"])
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank: object, tmp_path: Path) -> None:
    assert f"found {rank!r}, expected a positive whole number." in str(refused(tmp_path, r=rank))


@pytest.mark.parametrize("alpha", [None, "16", True, float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(alpha: object, tmp_path: Path) -> None:
    error = refused(tmp_path, lora_alpha=alpha)
    assert f"lora_alpha in {tmp_path / 'adapter_config.json'}: found {alpha!r}, expected a number." in str(
        error
    )


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [["q_proj"], {"q_proj": "8"}, {"q_proj": None}, {"q_proj(": 2}])
def test_a_pattern_that_cannot_be_used_is_refused(field: str, pattern: object, tmp_path: Path) -> None:
    error = refused(tmp_path, **{field: pattern})
    assert error.code == "unsupported-adapter"
    assert f"{field} in" in error.where


@pytest.mark.parametrize("rank", [0, -2, 2.5])
def test_a_rank_pattern_needs_positive_whole_numbers(rank: float, tmp_path: Path) -> None:
    assert "rank_pattern" in refused(tmp_path, rank_pattern={"q_proj": rank}).where


@pytest.mark.parametrize("value", [{"model.layers": [0, 0]}, [[0, 1]]])
def test_replicated_layers_are_refused(value: object, tmp_path: Path) -> None:
    error = refused(tmp_path, layer_replication=value)
    assert "layer_replication in" in error.where
    assert "other layers than its base" in error.hint


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", "Gaussian", "MiCA"])
def test_an_initialisation_that_leaves_the_base_alone_is_fine(init: object, tmp_path: Path) -> None:
    assert read(tmp_path, init_lora_weights=init).rank == 2


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "lora-ga", "new", None, 1, 0]
)
def test_an_initialisation_that_changes_the_base_is_refused(init: object, tmp_path: Path) -> None:
    error = refused(tmp_path, init_lora_weights=init)
    assert f"found {init!r}, expected an initialisation that leaves the base's weights alone." in str(error)
    assert "path_initial_model_for_weight_conversion" in error.hint
    assert "pissa_converted of LLaMA-Factory, converted/default of ms-swift" in error.hint


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
def test_what_peft_begins_anew_alike_may_be_merged_by_it(init: str, tmp_path: Path) -> None:
    assert "merge_and_unload on this base is right" in refused(tmp_path, init_lora_weights=init).hint


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "lora_ga"])
def test_what_peft_does_not_begin_alike_is_not_for_its_merge(init: str, tmp_path: Path) -> None:
    hint = refused(tmp_path, init_lora_weights=init).hint
    assert "only the live model can be merged" in hint
    assert "merge_and_unload" not in hint


def test_an_adapter_of_loftq_is_not_to_be_converted(tmp_path: Path) -> None:
    """Its base is a quantised one: what it began with and the base are not together the weight."""
    hint = refused(tmp_path, init_lora_weights="loftq").hint
    assert "save_pretrained_merged" in hint
    assert "path_initial_model_for_weight_conversion" not in hint


@pytest.mark.parametrize(
    ("field", "value", "helps"),
    [
        ("nvfp4_merge_aware", {"scale_mode": "fresh"}, "axolotl's merge-lora, into the NVFP4 base"),
        ("swift_type", "LORA", "--to_peft_format true"),
        ("arrow_config", {"top_k": 2}, "without a merge"),
    ],
)
def test_a_field_that_a_trainer_added_is_refused_with_what_its_trainer_has(
    field: str, value: object, helps: str, tmp_path: Path
) -> None:
    """PEFT passes over them, so its merge_and_unload is no way out."""
    hint = refused(tmp_path, **{field: value}).hint
    assert helps in hint
    assert "merge_and_unload" not in hint


def test_all_problems_of_a_config_are_reported_together(tmp_path: Path) -> None:
    error = refused(tmp_path, r=0, lora_alpha="x", init_lora_weights="pissa", zeta=1, beta=2)
    assert [problem.where.split(" ")[0] for problem in error.problems] == [
        "r", "lora_alpha", "init_lora_weights", "beta", "zeta",
    ]  # fmt: skip


def test_the_fields_of_another_peft_type_are_no_further_problems(tmp_path: Path) -> None:
    """Prompt tuning's config has no r, IA3's feedforward_modules is unknown: one word says it all."""
    (problem,) = refused(
        tmp_path, r=None, lora_alpha=None, peft_type="IA3", feedforward_modules=["x"]
    ).problems
    assert problem.where.startswith("peft_type in ")
    assert problem.found == "'IA3'"


# --- patterns and scaling ------------------------------------------------------------------------


def test_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    assert config(r=4, lora_alpha=6).scaling_for(DOWN, 4) == 1.5
    assert config(r=4, lora_alpha=6, use_rslora=True).scaling_for(DOWN, 4) == 3.0


def test_scaling_is_after_both_patterns() -> None:
    found = config(r=4, lora_alpha=6, rank_pattern={"down_proj": 9}, alpha_pattern={"experts.down_proj": 27})
    assert found.rank_for(DOWN) == 9
    assert found.scaling_for(DOWN, 9) == 3.0
    assert found.scaling_for("model.layers.0.self_attn.q_proj", 4) == 1.5


def test_the_first_pattern_that_matches_counts() -> None:
    both = {"down_proj": 3, r".*\.experts\.down_proj": 5}
    assert config(rank_pattern=both).rank_for(DOWN) == 3
    assert config(rank_pattern=dict(reversed(both.items()))).rank_for(DOWN) == 5


def test_the_tensors_tell_the_rank_where_saving_sorted_the_keys() -> None:
    """In training the longer key was first: PEFT saves what it read as another rank."""
    both = {"down_proj": 3, "experts.down_proj": 5}
    saved = {"auto_mapping": None, "inference_mode": True, "layers_pattern": None, "rank_pattern": both}
    assert config(**saved).rank_for(DOWN, {5, 7}) == 5
    assert config(**saved).rank_for(DOWN, {7}) == 3
    in_order = {**saved, "rank_pattern": dict(reversed(both.items()))}
    assert config(**in_order).rank_for(DOWN, {3}) == 5
    assert config(rank_pattern=both).rank_for(DOWN, {5}) == 3
    found = config(**saved, use_rslora=False, alpha_pattern={"down_proj": 6, "experts.down_proj": 20})
    assert found.scaling_for(DOWN, 5) == 4.0


def test_the_modules_name_does_not_match_its_parameter() -> None:
    assert config(rank_pattern={"experts": 3}).rank_for(DOWN) == 2


def test_a_pattern_matches_whole_parts_of_the_name() -> None:
    assert config(rank_pattern={"proj": 3, "own_proj": 3, "down": 3, "mlp.experts": 3}).rank_for(DOWN) == 2


def test_patterns_mean_what_they_mean_in_peft() -> None:
    other = pytest.importorskip("peft.utils.other")
    keys = [
        "down_proj",
        r".*\.down_proj",
        "experts",
        r"layers\.0\..*",
        "q_proj",
        "(up|down)_proj",
        DOWN,
        r"model.*1.*",
    ]
    names = [DOWN, DOWN.replace("0", "1"), "model.layers.0.self_attn.q_proj", "down_proj", "experts", "x.y"]
    for pair, name in itertools.product(itertools.permutations(keys, 2), names):
        pattern = {key: number for number, key in enumerate(pair, 10)}
        expected = pattern.get(other.get_pattern_key(pattern.keys(), name), 2)
        assert config(rank_pattern=pattern).rank_for(name) == expected, (pattern, name)


# --- targets -------------------------------------------------------------------------------------


def test_target_parameters_are_matched_as_peft_matches_them() -> None:
    targets = ["experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight", "model.layers.1.router.weight"]
    found = config(target_parameters=targets)
    assert found.targeted_parameters("model.layers.0.mlp.experts") == ("down_proj", "gate_up_proj")
    assert found.targeted_parameters("model.layers.0.mlp.gate") == ("weight",)
    assert found.targeted_parameters("model.layers.1.router") == ("weight",)
    assert found.targeted_parameters("model.layers.0.mlp.shared_experts") == ()
    assert found.targeted_parameters("model.layers.0.self_attn.q_proj") == ()


@pytest.mark.parametrize(
    ("targets", "targeted"),
    [
        (["q_proj"], True),
        (["proj"], False),
        (["model.layers.0.self_attn.q_proj"], True),
        ("all-linear", True),
        (r".*\.(q|k)_proj", True),
        ("q_proj", False),
        (None, False),
        ([], False),
    ],
)
def test_target_modules_are_names_or_one_expression(targets: object, targeted: bool) -> None:
    found = config(target_modules=targets)
    assert found.targets_module("model.layers.0.self_attn.q_proj") is targeted


RESTRICTED: Sequence[dict[str, Any]] = (
    {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": []},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers", "blocks"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
    {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.self_attn.q_proj", "head"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": r".*_proj", "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "down_proj", "lm_head"], "modules_to_save": ["lm_head", "mlp"]},
    {"target_modules": r".*", "modules_to_save": ["layers"]},
)


def test_a_pattern_of_layers_may_have_a_group() -> None:
    """PEFT takes the first group for the number, and fails."""
    found = config(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="(layers|h)")
    names = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert [found.targets_module(name) for name in names] == [False, True]


@pytest.mark.parametrize("fields", RESTRICTED)
def test_targets_mean_what_they_mean_in_peft(fields: dict[str, Any]) -> None:
    """The expert's name is one whose layer and whose expert are both, or neither, in layers_to_transform."""
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    names = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1, 10)]
    names += ["model.layers.1.mlp.experts.1.down_proj", "model.layers.2.mlp.experts.0.down_proj", "lm_head"]
    if fields.get("layers_to_transform") == [0]:
        names.remove("model.layers.2.mlp.experts.0.down_proj")
    meant = SimpleNamespace(**{**peft.LoraConfig().to_dict(), **fields})
    for name in names:
        result = utils.check_target_module_exists(meant, name)
        wanted = bool(result) and not isinstance(result, utils._ExcludedModule)
        assert config(**fields).targets_module(name) is wanted, name


@pytest.mark.parametrize("pattern", ["layers", ["h", "layers"], None])
def test_layers_may_stand_first_in_a_name_where_a_pattern_names_them(pattern: object) -> None:
    """For PEFT from 0.21 on: an AutoModel's names have nothing before `layers`."""
    found = config(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=pattern)
    names = [f"layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert [found.never_targets_module(name) for name in names] == [True, pattern is None]
    assert not any(map(found.targets_module, names))


def test_a_layer_is_chosen_where_all_releases_choose_it() -> None:
    """PEFT's older releases took an expert's index for the layer's."""
    found = config(target_modules=["down_proj"], layers_to_transform=[1])
    assert found.targets_module("model.layers.1.mlp.experts.1.down_proj")
    assert not found.targets_module("model.layers.1.mlp.experts.0.down_proj")
    assert not found.targets_module("model.layers.0.mlp.experts.1.down_proj")


def test_all_linear_leaves_out_what_is_excluded() -> None:
    found = config(target_modules="all-linear", exclude_modules=["q_proj"])
    assert found.all_linear
    assert not found.targets_module("model.layers.0.self_attn.q_proj")
    assert found.targets_module("model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize(
    ("module", "saved"),
    [("model.norm", True), ("model.layers.0.q_norm", True), ("score.dense", True), ("model.score_", False)],
)
def test_modules_to_save_are_names_ends(module: str, saved: bool) -> None:
    assert config(modules_to_save=["norm", "score"]).saves_module(module) is saved
    assert not config().saves_module(module)


def test_target_modules_that_are_no_expression_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, target_modules="q_proj(")
    assert "target_modules in" in error.where
