"""Time and memory of a merge against `cp -r` and against PEFT, on layers of Qwen3-30B-A3B's shape.

    python -m benchmarks.merge [--layers 4] [--dir DIR] [--runs 3] [--peft] [--verify] [--rounding NAME…]

Builds a bf16 checkpoint with `--layers` layers (128 experts, hidden 2048, intermediate 768, per-expert on
disk, 4 GiB shards) and an adapter of rank 32 on experts and attention, as random numbers. Then, in turn and
each in a process of its own: `cp -r` of the base, which leaves much of it in memory; that followed by `sync`;
`dd` past the page cache, the shortest way to the disk; `loudmerge merge --no-verify`; with --verify also
without that; with --peft PEFT's load, merge_and_unload and save_pretrained. Prints each one's wall time and
peak resident memory, and the ratios run by run: a machine's speed drifts, ratios less so.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTER, EXPERTS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2048, 768, 128, 32, 4, 128, 151936
RANK, ALPHA = 32, 64
SHARD_BYTES = 4 << 30

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


DURABLE = """
mkdir "$2" && for file in "$1"/*; do
    dd if="$file" of="$2/${file##*/}" bs=8M oflag=direct conv=fsync status=none || exit
done
"""
"""The same bytes on the disk by the shortest way: no merge that is durable when it ends takes less."""


def base_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, as Qwen3-MoE names it."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                shape = (HIDDEN, INTER) if name == "down" else (INTER, HIDDEN)
                yield f"{prefix}.mlp.experts.{expert}.{name}_proj.weight", shape
        yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
        for name, (out, into) in attention().items():
            yield f"{prefix}.self_attn.{name}_proj.weight", (out, into)
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{name}.weight", (HEAD_DIM,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def attention() -> Mapping[str, tuple[int, int]]:
    """(out, in) of the attention's Linears."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {"q": (queries, HIDDEN), "k": (keys, HIDDEN), "v": (keys, HIDDEN), "o": (HIDDEN, queries)}


def build_base(path: Path, layers: int) -> None:
    """Writes the checkpoint; equal bytes for equal arguments."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    shards: list[dict[str, Tensor]] = []
    held = 0
    for name, shape in base_shapes(layers):
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        held += shard[name].nbytes
        if held > SHARD_BYTES:
            shards.append(shard)
            shard, held = {}, 0
    shards.append(shard)
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(model_config(layers)))


def model_config(layers: int) -> dict[str, Any]:
    """Qwen3-30B-A3B's config, with fewer layers."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTER,
        "intermediate_size": 6144,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def build_adapter(path: Path, layers: int) -> None:
    """Writes a standard, rank_major adapter of PEFT >= 0.19.1."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}

    def pair(module: str, rows: int, into: int, out: int) -> None:
        a = torch.empty(rows, into).normal_(0, 1 / math.sqrt(into), generator=generator)
        b = torch.empty(out, rows).normal_(0, 0.01, generator=generator)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        pair(f"{prefix}.mlp.experts.base_layer", RANK * EXPERTS, HIDDEN, 2 * INTER)
        pair(f"{prefix}.mlp.experts", RANK * EXPERTS, INTER, HIDDEN)
        for name, (out, into) in attention().items():
            pair(f"{prefix}.self_attn.{name}_proj", RANK, into, out)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "peft_version": "0.19.1",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of one process, as the operating system accounts for it."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - the commands are ours
    _, status, usage = os.wait4(process.pid, 0)
    elapsed, code = time.monotonic() - started, os.waitstatus_to_exitcode(status)
    process.returncode = code  # the wait was ours
    if code:
        raise SystemExit(f"{' '.join(command[:4])} …: exit code {code}, so there is no time to report")
    return elapsed, usage.ru_maxrss * 1024


def build(root: Path, layers: int) -> None:
    """Builds both inputs. Under their names only once they are whole: they are used again."""
    half = root.with_name(f"{root.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    build_base(half / "base", layers)
    build_adapter(half / "adapter", layers)
    half.rename(root)


def build_apart(root: Path, layers: int) -> None:
    """Builds in a process of its own: the peak of a child starts from that of its parent. Raises SystemExit
    where that fails.
    """
    builder = multiprocessing.get_context("spawn").Process(target=build, args=(root, layers))
    builder.start()
    builder.join()
    if builder.exitcode:
        raise SystemExit(f"the inputs could not be built: exit code {builder.exitcode}")


def main() -> None:
    """Builds, runs and prints."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="where to build; kept and reused when given")
    parser.add_argument("--peft", action="store_true", help="also run PEFT (needs 13 GiB for 4 layers)")
    parser.add_argument("--verify", action="store_true", help="also run with verification")
    parser.add_argument("--rounding", nargs="*", default=[], help="also run with these, auto aside")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loudmerge-benchmark-") as scratch:
        root = (arguments.dir or Path(scratch)) / f"{arguments.layers}-layers"
        base, adapter, out = root / "base", root / "adapter", root / "out"
        if not root.exists():
            build_apart(root, arguments.layers)
        python, inputs = sys.executable, [str(base), str(adapter), str(out)]
        merge = [python, "-m", "loudmerge", "merge", *inputs, "--json"]
        commands = {
            "cp -r": ["cp", "-r", str(base), str(out)],
            "cp -r + sync": ["sh", "-c", f"cp -r '{base}' '{out}' && sync"],
            "dd, durable": ["sh", "-c", DURABLE, "sh", str(base), str(out)],
            "loudmerge": [*merge, "--no-verify"],
        }
        for rounding in arguments.rounding:
            commands[f"loudmerge, {rounding}"] = [*merge, "--no-verify", "--rounding", rounding]
        if arguments.verify:
            commands["loudmerge, verified"] = merge
        if arguments.peft:
            commands["PEFT"] = [python, "-c", PEFT, *inputs]
        run_all(commands, out, arguments.runs)


def run_all(commands: Mapping[str, list[str]], out: Path, runs: int) -> None:
    """Runs the commands in turn, and prints medians and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, int] = {}
    for _ in range(runs):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            elapsed, peak = timed(command)
            seconds[name].append(elapsed)
            memory[name] = max(memory.get(name, 0), peak)
            print(f"  {name}: {elapsed:.2f} s", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    for name, times in seconds.items():
        plain, synced = (
            statistics.median(t / reference for t, reference in zip(times, seconds[copy], strict=True))
            for copy in ("cp -r", "cp -r + sync")
        )
        print(
            f"{name:22} {statistics.median(times):7.2f} s ({min(times):.2f} to {max(times):.2f}),"
            f" {plain:5.2f} x cp -r, {synced:5.2f} x cp -r + sync, peak {memory[name] / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main()
