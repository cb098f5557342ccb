"""The journey of a cell at the size of Qwen3-30B-A3B, on a GPU: `nox -s e2e_gpu`.

    python -m loudmerge.compat.gpu [--weights DIR|OWNER/NAME] [--layers N] [--device cpu] [--require]

Without weights it makes random ones, at full size, from the model's own config. Leaves a row in
.compat/results, also where there is no GPU, or the run does not end: then the row says so.

0  the row shows what it must; or there is no GPU, and --require is not given
1  it falls short, or there is no GPU
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loudmerge.compat.arguments import DONE, SHORT, add_results, at_least_one
from loudmerge.compat.environments.children import exit_on_signals
from loudmerge.compat.inside import journey, weights
from loudmerge.compat.inside.cell import source
from loudmerge.compat.inside.journey import Journey
from loudmerge.compat.judging import document
from loudmerge.compat.judging.result import FAILED, NOT_RUN, OK, CellResult, Shortfall
from loudmerge.compat.judging.verdict import no_figures
from loudmerge.demo import training
from loudmerge.demo.training import Recipe
from loudmerge.errors import EnvironmentFailed
from loudmerge.hub import client
from loudmerge.merging.merge import peak_rss_bytes
from loudmerge.reading.checkpoint import open_checkpoint
from loudmerge.reading.sidefiles import CONFIG

MODEL_CONFIG = Path(__file__).with_name("qwen3_30b_a3b.json")
"""config.json of Qwen/Qwen3-30B-A3B on the Hub, as it is there."""

CELL = "gpu-qwen3-30b-a3b"
LANE = "gpu"
RANDOM = "random"

RECIPE = Recipe(
    rank=32,
    alpha=64,
    steps=5,
    batch=8,
    tokens=128,
    learning_rate=5e-3,
    embedding_gain=35.0,
    head_gain=0.8,
    vocabulary=4096,
    optimizer="adafactor",
    checkpointing=True,
    device="cuda",
)
"""How hard the model is trained; its size is its config's.

Weights of 61 GB leave 23 GB of an 80 GB GPU. The LoRA factors, 1.26e9 numbers in float32, and their gradients
take 10 GB: Adam's two moments would take 10 GB more, Adafactor's are sums over rows and columns. Without
checkpointing each layer would keep its W + dW for the backward pass, 1.2 GB.
head_gain, learning_rate: by runs of the first 2 layers, at full width, on a CPU, in nats a token. KL(base ||
trained) is 0.55 with these, and trained || merged 1.5e-6, in bfloat16 arithmetic 1.3e-4 where its noise is
1.6e-4. With the usual head it was 0.47 at 2e-3, and 1.4e-4 in bfloat16; with half of it 0.23 at 5e-3, no more
at 8e-3, and 2e-6. All 48 layers had six times the KL of 2, in models 128 wide.
"""

KL_AT_MOST = 1e-4
"""Nats a token, KL(trained || merged) in float32 and bfloat16 arithmetic, as in unslothai/unsloth-zoo#647."""
ORIGINAL: Mapping[tuple[str, str, str], float] = {
    ("5.5.0", "0.19.1", "0.25.1"): 1.6e-5,
    ("5.5.0", "0.18.1", "0.25.1"): 1.3e-5,
    ("4.57.6", "0.19.1", "0.25.1"): 5.5e-5,
    ("5.5.0", "0.19.1", "1.4.0"): 2.1e-4,
}
"""That table's rows: the same figure of (transformers, peft, trl)."""
MOVED_AT_LEAST = 0.5
"""Nats a token, KL(base || trained): less would prove nothing."""
TOLD = (OSError, RuntimeError, ValueError)
"""What a run ends in by its inputs or the machine: torch's CUDA errors, out of memory among them, are
RuntimeErrors. Any other is a defect, and is raised."""
PROJECTIONS = 3
"""Of each expert: gate, up, down."""


def model_config() -> dict[str, Any]:
    """Qwen3-30B-A3B's config.json."""
    found: dict[str, Any] = json.loads(MODEL_CONFIG.read_text("utf-8"))
    return found


@dataclass(frozen=True)
class Options:
    """weights: "random", or a directory or Hub id. layers: the first so many, None for all.

    config: of random weights. recipe: its sizes are not read, but for `vocabulary`.
    """

    weights: str = RANDOM
    layers: int | None = None
    recipe: Recipe = RECIPE
    config: Mapping[str, Any] = field(default_factory=model_config)


class Meter:
    """Seconds, and the peak of the GPU's memory in bytes, of each stage. Call it with a stage that begins."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self._stage = ""
        self._since = 0.0
        self.seconds: dict[str, float] = {}
        self.gpu_bytes: dict[str, int] = {}

    def __call__(self, stage: str) -> None:
        self.end()
        self._stage, self._since = stage, time.monotonic()

    def end(self) -> None:
        """Of the last stage."""
        if self._stage:
            self.seconds[self._stage] = round(time.monotonic() - self._since, 1)
            if self._on_gpu:
                self.gpu_bytes[self._stage] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        self._stage = ""

    def summary(self) -> str:
        """`peak memory 70.1 GiB of GPU (train), 9.3 GiB of host`"""
        host = f"{peak_rss_bytes() / 2**30:.1f} GiB of host"
        if not self.gpu_bytes:
            return f"peak memory {host}"
        stage = max(self.gpu_bytes, key=lambda name: self.gpu_bytes[name])
        return f"peak memory {self.gpu_bytes[stage] / 2**30:.1f} GiB of GPU ({stage}), {host}"


def run(directory: Path, options: Options, meter: Meter | None = None) -> CellResult:
    """The journey in `directory`, and its row, judged. No merge in float32: its file would be twice the base.

    meter: has the figures also of a run that does not end. Raises as `journey.run` does; EnvironmentFailed
    where the disk or the Hub fails.
    """
    started = time.monotonic()
    meter = meter or Meter(options.recipe.device)
    meter("base")
    base = _base(directory, options)
    config = json.loads((base / CONFIG).read_text("utf-8"))
    shown = journey.run(directory, options.recipe, base=base, float32_merge=False, stage=meter)
    meter.end()
    found = tuple(shortfalls(shown, config))
    weights_of = "random weights" if options.weights == RANDOM else options.weights
    return CellResult(
        cell=name_of(options),
        lane=LANE,
        status=FAILED if found else OK,
        versions={**shown.versions, "python": platform.python_version()},
        path=shown.path,
        orientation=shown.orientation,
        merged=shown.merged,
        figures=shown.figures,
        shortfalls=found,
        detail=f"{config['num_hidden_layers']} layers, {weights_of}; {meter.summary()}",
        seconds=round(time.monotonic() - started, 1),
        stages=meter.seconds,
        date=_today(),
        source=source(Path.cwd()),
        unmoved=shown.unmoved,
    )


def attempt(options: Options, directory: Path | None, results: Path) -> CellResult:
    """`run` in a folder of its own below `directory`, and its row, also where it ends in an error.

    Until it has ended the row in `results` says that it has not: so no older row stands for it. Raises what
    is none of TOLD, a compiler's for instance, once the row says it.
    """
    meter = Meter(options.recipe.device)
    _leave(results, did_not_end(options, "the run did not end: its log says why"))
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gpu-", dir=directory) as scratch:
            return run(Path(scratch), options, meter)
    except Exception as error:
        meter.end()
        first = (str(error).splitlines() or [""])[0]
        row = did_not_end(options, f"the run ended in {type(error).__name__}: {first}; {meter.summary()}")
        _leave(results, row)
        if not isinstance(error, TOLD):
            raise
        traceback.print_exc()
        return row


def name_of(options: Options) -> str:
    """gpu-qwen3-30b-a3b, gpu-qwen3-30b-a3b-2-layers"""
    return CELL if options.layers is None else f"{CELL}-{options.layers}-layers"


def _base(directory: Path, options: Options) -> Path:
    """The checkpoint to train on, written into `directory` unless it is somewhere whole."""
    base, given = directory / training.BASE, None
    if options.weights != RANDOM:
        given = client.resolve(options.weights)
    config = dict(options.config if given is None else open_checkpoint(given).config)
    if options.layers is not None:
        config["num_hidden_layers"] = options.layers
    whole = given is not None and options.layers is None
    _check_disk(directory, config, options.recipe.rank, models=1 if whole else 2)
    if given is None:
        weights.write_random(base, config, options.recipe)
        training.make_tokenizer(options.recipe.vocabulary).save_pretrained(base)
        return base
    if options.layers is None:
        return given
    weights.first_layers(given, base, options.layers)
    return base


def _check_disk(directory: Path, config: Mapping[str, Any], rank: int, *, models: int) -> None:
    """models: how many are written: the merged one, and the base where it is not somewhere whole."""
    needed = models * weights.nbytes(config) + weights.lora_nbytes(config, rank)
    free = shutil.disk_usage(directory).free
    if free < needed:
        what = "base, adapter and merged model" if models > 1 else "adapter and merged model"
        raise EnvironmentFailed(
            f"{directory}: found {free / 1e9:.0f} GB free, expected {needed / 1e9:.0f} GB for {what}. "
            "Give --directory on a larger disk, or --layers."
        )


def shortfalls(shown: Journey, config: Mapping[str, Any]) -> Iterator[Shortfall]:
    """What a run does not show of what it must. Every comparison is written so that it fails on nan."""
    found = shown.figures
    projections = config["num_hidden_layers"] * config["num_experts"] * PROJECTIONS
    if shown.merged != (projections, projections):
        applied, attempted = shown.merged
        yield Shortfall("merged", f"{applied} / {attempted}", f"{projections} / {projections}")
    if not found.kl_base_trained >= MOVED_AT_LEAST:
        yield Shortfall("kl_base_trained", f"{found.kl_base_trained:.3g}", f"at least {MOVED_AT_LEAST}")
    if not found.kl_trained_merged <= KL_AT_MOST:
        yield Shortfall("kl_trained_merged", f"{found.kl_trained_merged:.3g}", f"at most {KL_AT_MOST:g}")
    limit = most_divergence(shown.versions, found.kl_floor)
    if not found.kl_bfloat16_arithmetic <= limit:
        yield Shortfall("kl_bfloat16_arithmetic", f"{found.kl_bfloat16_arithmetic:.3g}", f"at most {limit:g}")
    matched, total = found.samples
    if not matched == total == journey.SAMPLES:
        yield Shortfall("samples", f"{matched} / {total}", f"all {journey.SAMPLES} the same")
    if shown.unmoved >= total:
        yield Shortfall("unmoved", f"the base says all {total} samples", "one at least is other")


def most_divergence(versions: Mapping[str, str], floor: float) -> float:
    """The largest KL(trained || merged) in bfloat16 arithmetic that passes.

    KL_AT_MOST, or the original table's figure for these versions, or the noise of that arithmetic, which no
    merge can be under: floor is that of the trained weights alone, against themselves in float32.
    """
    key = (versions["transformers"], versions["peft"], versions["trl"])
    return max(KL_AT_MOST, ORIGINAL.get(key, 0.0), floor)


def why_not(device: str) -> str | None:
    """Why nothing can be run on this device, None where it can."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no CUDA device"


def not_run(options: Options, reason: str) -> CellResult:
    """The row that says why there is none."""
    row = CellResult(name_of(options), LANE, NOT_RUN, _installed(), detail=reason)
    return replace(row, date=_today(), source=source(Path.cwd()))


def did_not_end(options: Options, reason: str) -> CellResult:
    """The row of a run that shows nothing because it stopped."""
    return replace(not_run(options, reason), status=FAILED, shortfalls=(no_figures(reason),))


def _installed() -> dict[str, str]:
    """The versions of what a row shows, so far as it is installed."""
    found = {}
    for package in training.SHOWN:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _today() -> str:
    """In UTC: `2026-11-29`."""
    return datetime.now(timezone.utc).date().isoformat()


def _leave(results: Path, row: CellResult) -> str:
    """Writes the row; returns what the file holds."""
    file = results / f"{row.cell}.json"
    document.write(file, row.to_json())
    return file.read_text("utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code. The row goes to stdout, too."""
    given = _parser().parse_args(arguments)
    recipe = replace(RECIPE, device=given.device, learning_rate=given.learning_rate)
    options = Options(given.weights, given.layers, recipe)
    reason = why_not(given.device)
    row = not_run(options, reason) if reason else attempt(options, given.directory, given.results)
    sys.stdout.write(_leave(given.results, row))
    return SHORT if row.status == FAILED or (given.require and row.status == NOT_RUN) else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nox -s e2e_gpu --", description="Qwen3-30B-A3B, end to end.")
    parser.add_argument("--weights", default=RANDOM, help="a directory, a Hub id, or random (the default)")
    parser.add_argument("--layers", type=at_least_one, metavar="N", help="only the first N")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--learning-rate", type=float, default=RECIPE.learning_rate, metavar="X")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for 129 GB: base, adapter and OUT")
    add_results(parser)
    parser.add_argument("--require", action="store_true", help="fail where torch finds no GPU")
    return parser


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(main())
