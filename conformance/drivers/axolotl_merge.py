"""Axolotl's merge: what `axolotl merge-lora` calls, with merge_method memory_efficient, its default."""

from __future__ import annotations

import sys

import _driver
import torch
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

torch.set_num_threads(1)


def merge(base: str, adapter: str, out: str) -> None:
    """As axolotl.cli.merge_lora calls it, for an unquantised base on the CPU."""
    merge_lora_sharded_efficient(
        base_model_path=base, lora_adapter_path=adapter, output_path=out, safe_tensors=True, device="cpu"
    )


if __name__ == "__main__":
    sys.exit(_driver.main("axolotl merge-lora", ("axolotl", "peft", "transformers"), merge))
