"""Packing told from weights: of adapters trained under it, and what merge, convert and inspect make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loudmerge.converting.convert import convert
from loudmerge.errors import MergeRefused
from loudmerge.evidence.clustering import MOST_CONFIDENT, SiteTraces, Traces
from loudmerge.evidence.weighing import LAYERS, FusedSite, Weighed, combined, sites_of, weigh
from loudmerge.inspecting.inspect import inspect
from loudmerge.inspecting.inspect_page import render
from loudmerge.inspecting.traceplot import SHOWN_SITES, short_name, svg, terminal_lines
from loudmerge.layout import LoraBLayout
from loudmerge.merging.merge import merge, plan
from loudmerge.reading.adapter import read_adapter
from loudmerge.verifying.verify import verify
from tests.support.command import run_inside
from tests.unit.builders import pair
from tests.unit.trained_adapters import DIRECTORY, NAMES, SILENT, other, trained

MAJOR, GROUPED = LoraBLayout
UNMARKED: dict[str, Any] = {"auto_mapping": {"unsloth_fixed": True}}
TOLD = "8x8-PEFT-read-as-Unsloth-5-steps"
TELLING = [name for name in NAMES if name not in SILENT]


def written(tmp_path: Path, name: str = TOLD, **fields: Any) -> tuple[Path, Path]:
    """Base and adapter."""
    one = trained(name)
    return one.write_base(tmp_path / "base"), one.write(tmp_path / "adapter", **fields)


def test_the_trained_adapters_are_small_and_of_both_packings() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 2_000_000
    assert {trained(name).packing for name in TELLING} == set(LoraBLayout)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_adapter_is_read_as_it_was_trained_or_not_at_all(name: str, tmp_path: Path) -> None:
    found = weigh(sites_of(read_adapter(trained(name).write(tmp_path / "adapter"))))
    says = None if name in SILENT else trained(name).packing
    assert {leaf: one.says for leaf, one in found.verdicts.items()} == {
        "gate_up_proj": says,
        "down_proj": says,
    }
    assert len(found.sites) == 2 * trained(name).recipe["layers"]


@pytest.mark.parametrize("name", TELLING)
def test_shuffled_columns_are_no_evidence(name: str, tmp_path: Path) -> None:
    """The same numbers in another order: what tells is the order alone."""
    one = trained(name)
    draw = torch.Generator().manual_seed(0)
    mixed = {
        key: value[:, torch.randperm(value.shape[1], generator=draw)] if ".lora_B." in key else value
        for key, value in one.tensors.items()
    }
    found = weigh(sites_of(read_adapter(replace(one, tensors=mixed).write(tmp_path / "adapter"))))
    assert {verdict.says for verdict in found.verdicts.values()} == {None}


def test_weights_that_are_not_finite_say_nothing_and_fail_nothing(tmp_path: Path) -> None:
    one = trained(TOLD)
    tensors = {key: value.clone() for key, value in one.tensors.items()}
    for key, value in tensors.items():
        value[3, 3] = torch.nan if "layers.0" in key else 0
    found = weigh(sites_of(read_adapter(replace(one, tensors=tensors).write(tmp_path / "adapter"))))
    assert [short_name(site) for site, _ in found.sites] == ["1 down_proj", "1 gate_up_proj"]


def test_infinities_in_lora_a_leave_one_witness_which_is_not_enough(tmp_path: Path) -> None:
    one = trained(TOLD)
    tensors = {key: value * torch.inf if "_A." in key else value for key, value in one.tensors.items()}
    found = weigh(sites_of(read_adapter(replace(one, tensors=tensors).write(tmp_path / "adapter"))))
    assert {(verdict.says, verdict.pairs) for verdict in found.verdicts.values()} == {(None, 0.0)}


def test_sites_are_known_without_a_base(tmp_path: Path) -> None:
    adapter = trained(TOLD).write(tmp_path / "adapter")
    found = sites_of(read_adapter(adapter))
    assert [(site.name, site.experts, site.rank) for site in found] == [
        (f"model.layers.{layer}.mlp.experts.{leaf}", 8, 8)
        for layer in range(2)
        for leaf in ("down_proj", "gate_up_proj")
    ]
    for site in found:
        assert site.pair.b.shape[0] == (48 if site.leaf == "down_proj" else 64)


@pytest.mark.parametrize("rank", [64, 3, 7])
def test_ranks_that_do_not_fit_two_experts_are_no_sites(rank: int, tmp_path: Path) -> None:
    adapter = trained(TOLD).write(tmp_path / "adapter", r=rank)
    assert sites_of(read_adapter(adapter)) == ()


@pytest.mark.parametrize(("experts", "rank"), [(1, 8), (8, 1)])
def test_where_both_packings_are_the_same_nothing_is_read(experts: int, rank: int) -> None:
    """The pair is in no file."""
    place = pair("experts", (experts * rank, 4), (6, experts * rank))
    assert weigh([FusedSite("experts.down_proj", "down_proj", place, experts, rank)]) == Weighed({}, ())


def many(name: str, tmp_path: Path) -> list[FusedSite]:
    """48 layers, each with the bytes of the first."""
    site = sites_of(read_adapter(trained(name).write(tmp_path / "adapter")))[0]
    return [replace(site, name=f"layers.{n}.down_proj") for n in range(48)]


@pytest.mark.parametrize(
    ("name", "layers"),
    [("16x16-8-bit-5-steps", 2), ("8x16-idle-experts-20-steps", 4), ("8x8-AdamW-5-steps", 8)],
)
def test_no_more_layers_are_read_than_settle_it(name: str, layers: int, tmp_path: Path) -> None:
    found = weigh(many(name, tmp_path))
    assert [site.name for site, _ in found.sites] == [
        f"layers.{n}.down_proj" for n in range(0, 48, 48 // layers)
    ]
    assert found.verdicts["down_proj"].sites == layers
    assert found.verdicts["down_proj"].says is trained(name).packing


def test_more_layers_are_read_where_few_do_not_settle_it_but_not_all(tmp_path: Path) -> None:
    found = weigh(many(next(iter(SILENT)), tmp_path))
    assert [site.name for site, _ in found.sites] == [f"layers.{n}.down_proj" for n in range(0, 48, 3)]
    assert found.verdicts["down_proj"].sites == LAYERS[-1]


@pytest.mark.parametrize(("layers", "looked_at"), [(48, 4), (3, 2)])
def test_no_more_layers_are_read_where_all_would_show_nothing(
    layers: int, looked_at: int, tmp_path: Path
) -> None:
    """As of an adapter that was not trained, with a lora_B of zeros. Of three layers, one is left."""
    one = trained(TOLD)
    untrained = {key: value * 0 if ".lora_B." in key else value for key, value in one.tensors.items()}
    site = sites_of(read_adapter(replace(one, tensors=untrained).write(tmp_path / "adapter")))[0]
    found = weigh([replace(site, name=f"layers.{n}.down_proj") for n in range(layers)])
    assert found.verdicts["down_proj"].sites == looked_at
    assert found.verdicts["down_proj"].says is None


def looked(leaf: str, columns: float, pairs: float) -> tuple[FusedSite, SiteTraces]:
    nothing = Traces(0.0, 0.0, 0.0, 0.0)
    traces = SiteTraces(Traces(columns, columns, pairs, pairs), nothing)
    return FusedSite(f"layers.0.{leaf}", leaf, pair("experts", (4, 4), (4, 4)), 2, 2), traces


@pytest.mark.parametrize(
    ("down", "gate_up", "says"),
    [
        ((9, 9), (9, 9), (MAJOR, MAJOR)),
        ((9, 3), (9, 3), (MAJOR, MAJOR)),
        ((9, 9), (2, 1), (MAJOR, MAJOR)),
        ((9, 9), (-1, 1), (MAJOR, None)),
        ((9, 9), (-9, -9), (MAJOR, GROUPED)),
        ((9, 9), (-9, -5), (MAJOR, GROUPED)),
        ((9, 9), (0, 0), (MAJOR, MAJOR)),
        ((1, 1), (1, 1), (None, None)),
        ((0, 0), (0, 0), (None, None)),
    ],
    ids=["both", "together", "for both", "alone", "each", "unequal", "untrained", "none", "nothing"],
)
def test_parameters_that_lean_alike_speak_together(
    down: tuple[float, float], gate_up: tuple[float, float], says: tuple[LoraBLayout | None, ...]
) -> None:
    found = combined([looked("down_proj", *down), looked("gate_up_proj", *gate_up)])
    assert (found["down_proj"].says, found["gate_up_proj"].says) == says


@pytest.mark.parametrize("name", TELLING)
def test_an_unmarked_adapter_of_unsloth_is_merged_as_it_was_trained(name: str, tmp_path: Path) -> None:
    base, adapter = written(tmp_path, name, **UNMARKED)
    packing = trained(name).packing
    out = tmp_path / "out"
    layout = merge(base, adapter, out, verify=False).document["layout"]
    assert layout["lora_b_layout"] == packing.value
    said = [e for e in layout["evidence"] if e["source"] == "weights"]
    assert {(e["site"], e["says"], e["confidence"] >= 0.99) for e in said} == {
        ("gate_up_proj", packing.value, True),
        ("down_proj", packing.value, True),
    }
    told = plan(base, adapter, lora_b_layout=packing.value)
    assert plan(base, adapter).layout.packing == told.layout.packing
    assert verify(out, base, adapter).ok


@pytest.mark.parametrize("name", sorted(SILENT))
def test_an_unmarked_adapter_of_unsloth_that_shows_too_little_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MergeRefused, match="without the lora_B_layout marker"):
        plan(*written(tmp_path, name, **UNMARKED))


@pytest.mark.parametrize("name", TELLING)
def test_a_marker_that_the_weights_contradict_is_refused_and_the_option_decides(
    name: str, tmp_path: Path
) -> None:
    wrong = other(trained(name).packing).value
    base, adapter = written(tmp_path, name, lora_B_layout=wrong)
    with pytest.raises(MergeRefused, match="weights that were trained as") as caught:
        merge(base, adapter, tmp_path / "out")
    assert caught.value.code == "ambiguous-layout"
    assert f"--lora-b-layout {trained(name).packing.value}, as the weights say" in caught.value.hint
    assert not (tmp_path / "out").exists()
    for option in LoraBLayout:
        assert plan(base, adapter, lora_b_layout=option.value).layout.lora_b_layout == option.value


@pytest.mark.parametrize("name", TELLING)
def test_a_marker_that_the_weights_agree_with_holds(name: str, tmp_path: Path) -> None:
    packing = trained(name).packing.value
    assert plan(*written(tmp_path, name, lora_B_layout=packing)).layout.lora_b_layout == packing


@pytest.mark.parametrize("name", TELLING)
def test_an_unmarked_adapter_that_is_not_packed_as_peft_packs_is_refused(name: str, tmp_path: Path) -> None:
    base, adapter = written(tmp_path, name)
    if trained(name).packing is MAJOR:
        evidence = plan(base, adapter).layout.evidence
        assert max(e.confidence for e in evidence if e.source == "module") > 0.998
    else:
        with pytest.raises(MergeRefused, match="as no marker says otherwise"):
            plan(base, adapter)


@pytest.mark.parametrize("with_base", [True, False])
def test_convert_reads_the_packing_as_merge_does(with_base: bool, tmp_path: Path) -> None:
    base, adapter = written(tmp_path, **UNMARKED)
    given: dict[str, Any] = {"base": base} if with_base else {"orientation": "standard"}
    done = convert(adapter, tmp_path / "out", "peft-0.19", **given)
    assert done.before["lora_b_layout"] == "grouped_by_expert"
    found = weigh(sites_of(read_adapter(tmp_path / "out")))
    assert {verdict.says for verdict in found.verdicts.values()} == {MAJOR}


def test_convert_without_a_base_refuses_what_merge_refuses(tmp_path: Path) -> None:
    _, adapter = written(tmp_path, lora_B_layout="rank_major")
    with pytest.raises(MergeRefused, match="weights that were trained as grouped_by_expert"):
        convert(adapter, tmp_path / "out", "peft-0.19", orientation="standard")
    done = convert(adapter, tmp_path / "out", "peft-0.19", orientation="standard", lora_b_layout="rank_major")
    assert done.before["lora_b_layout"] == "rank_major"


def test_inspect_shows_each_site(tmp_path: Path) -> None:
    base, adapter = written(tmp_path, **UNMARKED)
    for found in (inspect(adapter), inspect(adapter, base)):
        text = found.summary()
        assert "packing   " in text
        assert "gate_up_proj: grouped_by_expert (0.99" in text
        assert text.count("│") == 2 * 4
        document = found.to_json()["packing"]
        assert {one["says"] for one in document["verdicts"].values()} == {"grouped_by_expert"}
        assert [one["columns"] < 0 for one in document["sites"]] == [True] * 4


def test_inspect_of_a_refused_merge_shows_the_weights_that_contradict(tmp_path: Path) -> None:
    base, adapter = written(tmp_path, lora_B_layout="rank_major")
    found = inspect(adapter, base)
    assert found.refusal is not None
    assert "down_proj: grouped_by_expert (0.99" in found.summary()


def test_inspect_writes_one_self_contained_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = written(tmp_path, **UNMARKED)
    adapter = adapter.rename(tmp_path / "not UTF-8: \udce9")
    page = tmp_path / "page.html"
    ended = run_inside(capsys, "inspect", adapter, "--base", base, "--html", page, "--json")
    assert ended.code == 0
    assert json.loads(ended.stdout)["plan"]["layout"]["lora_b_layout"] == "grouped_by_expert"
    text = page.read_text("utf-8")
    assert text.count("<rect ") == 2 * 4
    assert "not UTF-8: \\udce9" in text
    assert "<strong>grouped_by_expert, confidence 0.99" in text
    assert "<td>weights</td>" in text
    assert not any(word in text for word in ("<script", "http://", "https://", "<link", "@import", "url("))


def test_the_page_says_that_a_merge_is_refused_and_escapes_what_it_shows(tmp_path: Path) -> None:
    one = trained(TOLD)
    base, adapter = one.write_base(tmp_path / "base"), one.write(tmp_path / "<b>", lora_B_layout="rank_major")
    text = render(inspect(adapter, base))
    assert "The merge would be refused. ambiguous-layout" in text
    assert "<b>" not in text
    assert "&lt;b&gt;" in text


def test_an_adapter_without_fused_experts_has_no_plot(tmp_path: Path) -> None:
    adapter = trained(TOLD).write(tmp_path / "adapter", r=64)
    found = inspect(adapter)
    assert found.weighed == Weighed({}, ())
    assert "packing" not in found.summary()
    assert "<svg" not in render(found)


def test_the_terminals_plot_has_some_sites_and_says_how_many_more() -> None:
    sites = tuple(looked("down_proj", 50.0 * (-1) ** n, 1e-3) for n in range(40))
    lines = list(terminal_lines(Weighed(combined(sites), sites)))
    assert len(lines) == 1 + 1 + SHOWN_SITES + 1
    assert lines[0].startswith("down_proj: no evidence; 40 sites:")
    assert lines[-1] == f"and {40 - SHOWN_SITES} more sites"
    assert {line.count("│") for line in lines[2:-1]} == {2}
    assert svg(Weighed(combined(sites), sites)).count("<rect ") == 80


@pytest.mark.parametrize(("value", "left", "right"), [(0.0, 0, 0), (1e9, 0, 12), (-1e9, 12, 0), (4.0, 0, 5)])
def test_a_bar_goes_to_its_side(value: float, left: int, right: int) -> None:
    clipped = max(-30.0, min(30.0, value))
    line = list(terminal_lines(Weighed({}, (looked("down_proj", value, 0.0),))))[1]
    before, after = line.partition("│")[0], line.split("│")[1]
    expected = 9 if abs(clipped) == 30.0 else max(left, right)
    assert (before.count("█"), after.count("█")) == (expected * bool(left), expected * bool(right))


def test_a_site_without_a_layers_number_has_its_whole_name() -> None:
    site = looked("down_proj", 0.0, 0.0)[0]
    assert short_name(site) == "0 down_proj"
    assert short_name(replace(site, name="experts.down_proj")) == "experts.down_proj"


def test_proof_is_as_confident_as_can_be() -> None:
    site, traces = looked("gate_up_proj", 0.0, 5.0)
    found = combined([(site, replace(traces, blocks=MAJOR))])["gate_up_proj"]
    assert found.to_json() == {
        "says": "rank_major",
        "confidence": MOST_CONFIDENT,
        "columns": 0.0,
        "pairs": 5.0,
        "sites": 1,
        "blocks": True,
    }
