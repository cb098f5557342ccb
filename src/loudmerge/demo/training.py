"""A tiny Qwen3-MoE and a LoRA adapter for it, trained offline: real files that `demo` merges.

The text is `pydoc_data.topics` of the standard library, the tokenizer a byte-level BPE trained on it,
the base random weights. torch, transformers, peft and trl are imported inside the functions.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loudmerge.errors import require

PACKAGES = ("torch", "accelerate", "datasets", "tokenizers", "transformers", "peft", "trl")
END, PAD = "<|end|>", "<|pad|>"
SHOWN = ("torch", "transformers", "peft", "trl")
BASE, ADAPTER = "base", "adapter"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """What is built and how hard it is trained.

    hidden, intermediate, head: with these no expert matrix is square, so that a transposed update cannot fit.
    tokens: longest training example. learning_rate: high for LoRA, so that after a few steps the update
    stands clear of the base's bfloat16 rounding.
    embedding_gain, head_gain: what the random embedding and output matrix are multiplied with.
    optimizer: as TrainingArguments' `optim` names it, None for the trainer's own choice.
    checkpointing: activations are recomputed, not kept. device: "cpu" or "cuda".
    """

    hidden: int = 64
    intermediate: int = 40
    layers: int = 2
    heads: int = 4
    head: int = 24
    experts: int = 8
    experts_per_token: int = 2
    vocabulary: int = 512
    embedding_gain: float = 1.0
    head_gain: float = 1.0
    rank: int = 8
    alpha: int = 16
    steps: int = 40
    batch: int = 4
    tokens: int = 96
    learning_rate: float = 5e-3
    seed: int = 0
    optimizer: str | None = None
    checkpointing: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Trained:
    """The two inputs of a merge. losses: of each training step, nats a token. targets: what LoRA is on.

    versions: of the packages that trained it.
    """

    base: Path
    adapter: Path
    losses: tuple[float, ...]
    targets: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Fitted:
    """A `peft.PeftModel` right after its training, in memory. losses, targets: as of `Trained`."""

    model: Any
    losses: tuple[float, ...]
    targets: tuple[str, ...]


def train(directory: Path, recipe: Recipe = Recipe()) -> Trained:
    """Writes `directory`/base and `directory`/adapter, the latter trained by TRL and saved by PEFT.

    Seeds the global random generators of Python and NumPy, as TRL's trainer does; torch's is restored.
    Raises EnvironmentFailed, naming the extra, when a package is missing.
    """
    with quiet_libraries():
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            write_base(directory / BASE, recipe)
            return _fit(directory / BASE, directory / ADAPTER, recipe)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers and datasets draw no progress bars and log errors only, and no warning is raised.

    Which deprecations transformers, peft and trl announce changes with each of their releases, and is
    news about them, not about the merge. All is as before on leaving.
    Raises EnvironmentFailed where a package is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require("demo", *PACKAGES)
        with _quiet_transformers(), _quiet_datasets():
            yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def paragraphs() -> list[str]:
    """The paragraphs of Python's own help topics: real English, in every installation."""
    from pydoc_data.topics import topics

    return [part.strip() for text in topics.values() for part in text.split("\n\n") if part.strip()]


def write_base(directory: Path, recipe: Recipe) -> None:
    """A random Qwen3-MoE in bfloat16 with its tokenizer, as `save_pretrained` writes them."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        moe_intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads // 2,
        head_dim=recipe.head,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        norm_topk_prob=True,
        # Keeps the size of activations through each Linear, so that the experts matter as in a trained model.
        initializer_range=recipe.hidden**-0.5,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(recipe.embedding_gain)
        model.get_output_embeddings().weight.mul_(recipe.head_gain)
    model.to(torch.bfloat16).save_pretrained(directory)
    make_tokenizer(recipe.vocabulary).save_pretrained(directory)


def make_tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE of so many tokens, trained on `paragraphs`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def lora_targets(model: Any) -> dict[str, list[str]]:
    """LoraConfig's targets for experts and attention, as this model's modules have them in memory.

    Fused expert parameters (transformers 5) can only be named in `target_parameters`; each expert's
    own Linears (transformers 4) are `target_modules`.
    """
    names = [name for name, _ in model.named_parameters()]
    if any(name.endswith(FUSED_EXPERTS) for name in names):
        return {"target_modules": list(ATTENTION), "target_parameters": list(FUSED_EXPERTS)}
    return {"target_modules": [*ATTENTION, *EXPERT_LINEARS]}


def _fit(base: Path, adapter: Path, recipe: Recipe) -> Trained:
    fitted = fit(base, recipe)
    fitted.model.save_pretrained(adapter)
    versions = {package: version(package) for package in SHOWN}
    return Trained(base, adapter, fitted.losses, fitted.targets, versions)


def fit(base: Path, recipe: Recipe) -> Fitted:
    """Trains LoRA on attention and experts of the model in the directory `base`, as a user of TRL does.

    The model is left as the trainer left it: nothing is saved or reloaded.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **placement(recipe.device))
    targets = lora_targets(model)
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, task_type="CAUSAL_LM", **targets)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=_arguments(scratch, recipe),
            train_dataset=Dataset.from_dict({"text": training_texts(recipe)}),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora,
        )
        # It prints each log to stdout, which belongs to the caller.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    return Fitted(trainer.model, losses, tuple(name for group in targets.values() for name in group))


def placement(device: str) -> dict[str, Any]:
    """The option of `from_pretrained` that loads weights onto a device without a copy in the CPU's memory."""
    return {} if device == "cpu" else {"device_map": {"": device}}


def training_texts(recipe: Recipe) -> list[str]:
    """The paragraphs that a training runs over, each once."""
    return [text for text in paragraphs() if len(text) > recipe.tokens][: recipe.steps * recipe.batch]


def _arguments(scratch: str, recipe: Recipe) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=scratch,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        max_length=recipe.tokens,
        # TRL 1.x refuses a finite max_length with padding_free=True and no packing.
        padding_free=False,
        packing=False,
        **({} if recipe.optimizer is None else {"optim": recipe.optimizer}),
        gradient_checkpointing=recipe.checkpointing,
        bf16=False,
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=False,
        seed=recipe.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
