"""Unsloth's merge, save_method="merged_16bit", which its save_pretrained_merged calls.

On the CPU: UNSLOTH_FORCE_CPU=1 is Unsloth's own switch. That backend leaves out the patches through which
Unsloth on a GPU
loads experts' LoRA and reads its marker, `patch_param_wrapper_for_moe`: it is called here, so that the
merge is the GPU's.
"""

from __future__ import annotations

import os
import sys

import _driver

os.environ["UNSLOTH_FORCE_CPU"] = os.environ["UNSLOTH_IS_PRESENT"] = "1"
ANSWERS = _driver.standard_output() if "--serve" in sys.argv else None  # importing unsloth_zoo prints

import unsloth_zoo  # noqa: E402, F401, I001 - before torch and PEFT, as Unsloth asks
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from unsloth_zoo.saving_utils import merge_and_overwrite_lora  # noqa: E402
from unsloth_zoo.temporary_patches.moe_utils import patch_param_wrapper_for_moe  # noqa: E402

torch.set_num_threads(1)


def merge(base: str, adapter: str, out: str) -> None:
    """In the base's own dtype."""
    cls = getattr(transformers, AutoConfig.from_pretrained(base).architectures[0])
    model = PeftModel.from_pretrained(cls.from_pretrained(base, dtype="auto"), adapter)
    merge_and_overwrite_lora(lambda name, **_: name, model, save_directory=out)


if __name__ == "__main__":
    if not patch_param_wrapper_for_moe():
        raise SystemExit("unsloth_zoo could not patch PEFT")
    packages = ("unsloth_zoo", "peft", "transformers")
    sys.exit(_driver.main("unsloth_zoo merged_16bit", packages, merge, ANSWERS))
