"""Results as a run leaves them: every status, and everything that the table has a place for."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

from loudmerge.compat.judging.result import (
    FAILED,
    NOT_INSTALLED,
    NOT_RUN,
    OK,
    UNREACHABLE,
    CellResult,
    Shortfall,
    Tests,
)
from tests.unit.compat.made import FIGURES

GENERATED = datetime(2026, 11, 25, 1, 30, tzinfo=timezone.utc)

FAMILIES = (
    *(
        "afmoe",
        "aria_text",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "flex_olmo",
        "gemma4_text",
    ),
    *("glm4_moe", "glm4v_moe_text", "gpt_oss", "granitemoehybrid", "hunyuan_v1_moe", "jamba", "lfm2_moe"),
    *(
        "llama4_text",
        "minimax_m2",
        "mixtral",
        "nemotron_h",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe_text",
    ),
    *("qwen3_moe", "qwen3_next", "qwen3_vl_moe_text"),
)

TESTS = Tests(1203, 0, 17, {"no CUDA device": 12, "asks PEFT <= 0.18 | its merge": 5}, suite=52)
STAGES = {"tests": 61.4, "families": 48.2, "journey": 22.9, "crossed": 4.1}


def _versions(transformers: str, peft: str, trl: str) -> dict[str, str]:
    return {"transformers": transformers, "peft": peft, "trl": trl, "torch": "2.13.0", "python": "3.12.7"}


SWAPPED = CellResult(
    cell="tf5.5.0-peft0.18.1-trl0.25.1",
    lane="released",
    status=OK,
    versions=_versions("5.5.0", "0.18.1", "0.25.1"),
    path="fused",
    orientation="swapped",
    merged=(192, 192),
    figures=FIGURES,
    tests=TESTS,
    families={**dict.fromkeys(FAMILIES, OK), "longcat_flash": "refused by design: experts-incomplete"},
    crossed={"tf5.5.0-peft0.19.1-trl0.25.1": OK, "tf4.57.6-peft0.18.1-trl0.25.1": OK},
    seconds=136.6,
    stages=STAGES,
)
STANDARD = replace(
    SWAPPED,
    cell="tf5.5.0-peft0.19.1-trl0.25.1",
    versions=_versions("5.5.0", "0.19.1", "0.25.1"),
    orientation="standard",
    figures=replace(FIGURES, kl_trained_merged=2.9e-5, kl_base_trained=0.7204, kl_base_merged=0.7199),
)
PER_EXPERT = replace(
    SWAPPED,
    cell="tf4.57.6-peft0.18.1-trl0.25.1",
    versions=_versions("4.57.6", "0.18.1", "0.25.1"),
    path="per-expert",
    orientation=None,
    families={name: OK for name in FAMILIES if name not in ("afmoe", "gemma4_text", "qwen3_5_moe_text")},
    tests=Tests(1180, 0, 41, {"no CUDA device": 12, "transformers 4 has no fused experts": 29}, suite=52),
)
BROKEN = replace(
    STANDARD,
    cell="tf5.24.0-peft0.21.2-trl1.16.0",
    versions=_versions("5.24.0", "0.21.2", "1.16.0"),
    status=FAILED,
    merged=(191, 192),
    figures=replace(
        FIGURES, kl_trained_merged=0.0312, kl_float32_merge=0.0309, samples=(1, 3), top1_agreement=0.9412
    ),
    tests=Tests(
        1201,
        2,
        17,
        TESTS.skips,
        ("tests/unit/test_delta.py::test_a[1|2]", "tests/unit/test_delta.py::test_<b>"),
    ),
    families={
        **dict.fromkeys(FAMILIES, OK),
        "mixtral": "KL 0.0312 of the float32 merge, expected at most 1e-8",
        "jamba": "no forward: <mamba_ssm> is missing & needed",
        "longcat_flash": "refused by design: experts-incomplete",
    },
    crossed={
        "tf5.5.0-peft0.18.1-trl0.25.1": "other bytes: model-00001-of-00002.safetensors",
        "tf4.57.6-peft0.18.1-trl0.25.1": OK,
    },
    shortfalls=(
        Shortfall("merged", "191 of 192", "192 of 192"),
        Shortfall("kl_float32_merge", "0.0309", "at most 1e-08"),
        Shortfall("kl_trained_merged", "0.0312", "at most 0.00186, a thousandth of base‖trained"),
        Shortfall("samples", "1 of 3", "3 of 3"),
        Shortfall("tests", "2 failed", "0 failed"),
        Shortfall("families", "mixtral, jamba", "all ok"),
        Shortfall("crossed", "tf5.5.0-peft0.18.1-trl0.25.1", "all ok"),
    ),
)
UNINSTALLED = CellResult(
    cell="tf5.5.0-peft0.17.1-trl0.25.1",
    lane="released",
    status=NOT_INSTALLED,
    versions={"transformers": "5.5.0", "peft": "0.17.1", "trl": "0.25.1"},
    detail="ERROR: No matching distribution found for peft==0.17.1 <script>alert(1)</script>",
)
LATEST = CellResult(
    cell="latest", lane="latest", status=NOT_RUN, versions={}, detail="not asked for: lane latest"
)
DEV = CellResult(
    cell="dev",
    lane="dev",
    status=UNREACHABLE,
    versions={
        "transformers": "huggingface/transformers",
        "peft": "huggingface/peft",
        "trl": "huggingface/trl",
    },
    detail="github.com was not reached: [Errno -2] Name or service not known",
)

ALL = (SWAPPED, STANDARD, PER_EXPERT, BROKEN, UNINSTALLED, LATEST, DEV)
"""Each status at least once."""
OLDER = (
    SWAPPED,
    replace(STANDARD, status=FAILED, shortfalls=(Shortfall("samples", "2 of 3", "3 of 3"),)),
    replace(BROKEN, status=OK, shortfalls=(), families=dict.fromkeys(FAMILIES, OK)),
    UNINSTALLED,
    DEV,
    replace(SWAPPED, cell="tf5.4.0-peft0.18.1-trl0.25.1", versions=_versions("5.4.0", "0.18.1", "0.25.1")),
)
"""An older run: of ALL, one cell is fixed, one has regressed, one is gone, two are new."""
LAG = {"transformers": "5.25.0", "peft": "0.22.0"}
