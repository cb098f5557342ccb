"""PEFT's own merge, as its documentation has it: from_pretrained, merge_and_unload, save_pretrained."""

from __future__ import annotations

import sys

import _driver
import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)


def merge(base: str, adapter: str, out: str) -> None:
    """In the base's own dtype."""
    architecture = AutoConfig.from_pretrained(base).architectures[0]
    cls = getattr(transformers, architecture, AutoModelForCausalLM)
    model = PeftModel.from_pretrained(cls.from_pretrained(base, dtype="auto"), adapter)
    model.merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    sys.exit(_driver.main("PEFT merge_and_unload", ("peft", "transformers"), merge))
