"""rank_pattern and alpha_pattern, by the rules of PEFT's releases, whose own code is quoted here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pytest

from loudmerge.reading.patterns import alphas
from loudmerge.reading.patterns import ranks as ranks_of

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj")
KEYS = ("q_proj", "q_proj|down_proj", "^.*q_proj", ".*", "layers.0.self_attn.q_proj", NAMES[0], "(q|k)_proj")
SAVED = dict.fromkeys(("auto_mapping", "inference_mode", "layers_pattern"))
FIELDS_OF: Mapping[str, tuple[str, ...]] = {
    "0.13": (),
    "0.14": ("eva_config", "exclude_modules", "lora_bias"),
    "0.15": ("eva_config", "exclude_modules", "lora_bias", "corda_config", "trainable_token_indices"),
}


def read_by_0_13(ranks: Mapping[str, int], scales: Mapping[str, float], name: str) -> tuple[int, float]:
    """peft 0.13.2, tuners/lora/model.py, `_create_and_replace`."""
    pattern_keys = list(itertools.chain(ranks.keys(), scales.keys()))
    target_name_key = next(filter(lambda key: re.match(rf".*\.{key}$", name), pattern_keys), name)
    return ranks.get(target_name_key, 4), scales.get(target_name_key, 8)


def key_of_0_14(pattern_keys: Any, key_to_match: str) -> str:
    """peft 0.14.0, utils/other.py, `get_pattern_key`."""
    return next(filter(lambda key: re.match(rf".*\.{key}$", key_to_match), pattern_keys), key_to_match)


def key_of_0_15(pattern_keys: Any, key_to_match: str) -> str:
    """peft 0.15.0, utils/other.py, `get_pattern_key`."""
    for key in pattern_keys:
        if re.match(rf"(.*\.)?({key})$", key_to_match):
            return str(key)
    return key_to_match


def read(release: str, ranks: Mapping[str, int], scales: Mapping[str, float], name: str) -> tuple[int, float]:
    if release == "0.13":
        return read_by_0_13(ranks, scales, name)
    key_of = key_of_0_14 if release == "0.14" else key_of_0_15
    return ranks.get(key_of(ranks, name), 4), scales.get(key_of(scales, name), 8)


def config(release: str, ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    known = {**SAVED, **dict.fromkeys(FIELDS_OF[release])}
    sorted_keys = {"rank_pattern": dict(sorted(ranks.items())), "alpha_pattern": dict(sorted(scales.items()))}
    return {**known, "r": 4, "lora_alpha": 8, **sorted_keys}


@pytest.mark.parametrize("release", FIELDS_OF)
def test_what_a_release_trained_with_is_among_the_alphas(release: str) -> None:
    """In any order of the keys in training, though the file has them sorted."""
    for count in (1, 2):
        for keys, others in itertools.product(itertools.permutations(KEYS, count), ((), ("q_proj",), None)):
            scales = {key: number for number, key in enumerate(keys, 16)}
            ranks = {key: number for number, key in enumerate(keys if others is None else others, 6)}
            for name in NAMES:
                rank, alpha = read(release, ranks, scales, name)
                saved = config(release, ranks, scales)
                assert alpha in alphas(saved, name, rank), (keys, others, name)
                assert rank in ranks_of(saved, name) or release != "0.15", (keys, others, name)


@pytest.mark.parametrize("key", ["q_proj", "(q|k)_proj", "layers.0.self_attn.q_proj", NAMES[0], "v_proj"])
def test_a_key_that_all_releases_read_alike_leaves_one_alpha(key: str) -> None:
    for name in NAMES:
        found = alphas(config("0.13", {}, {key: 16}), name, 4)
        assert found == (read("0.15", {}, {key: 16}, name)[1],)


@pytest.mark.parametrize(
    ("ranks", "scales"),
    [
        ({}, {"q_proj|down_proj": 16}),
        ({}, {"^.*q_proj": 16}),
        ({"q_proj": 4}, {"layers.0.self_attn.q_proj": 16}),
    ],
)
def test_what_old_releases_read_otherwise_is_told_by_the_fields_of_the_config(
    ranks: Mapping[str, int], scales: Mapping[str, float]
) -> None:
    name = NAMES[2] if "q_proj|down_proj" in scales else NAMES[0]
    assert set(alphas(config("0.13", ranks, scales), name, 4)) == {8, 16}
    assert alphas(config("0.15", ranks, scales), name, 4) == (16,)


def test_the_rank_tells_which_of_two_keys_was_first() -> None:
    both = {"q_proj": 16, NAMES[0]: 32}
    assert set(alphas(config("0.15", {}, both), NAMES[0], 4)) == {16, 32}
    assert alphas(config("0.15", {"q_proj": 2, NAMES[0]: 4}, both), NAMES[0], 4) == (32,)


def test_a_config_that_no_peft_wrote_means_what_it_says() -> None:
    written = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 16, ".*": 32}}
    assert alphas(written, NAMES[0], 4) == (16,)
    assert alphas(written, NAMES[2], 4) == (32,)


def test_keys_in_an_order_that_no_peft_saves_count_in_that_order() -> None:
    """A tool or a person wrote them. PEFT 0.17.1 to 0.21.2 read the first, too, and save them sorted."""
    both = {"q_proj": 16, ".*": 32}
    assert alphas({**config("0.15", {}, {}), "alpha_pattern": both}, NAMES[0], 4) == (16,)
    assert set(alphas(config("0.15", {}, both), NAMES[0], 4)) == {16, 32}
