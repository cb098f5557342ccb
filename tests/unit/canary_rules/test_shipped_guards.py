"""Shipped guards on small files that do what upstream's do: each notices what takes its guarantee away."""

from __future__ import annotations

from pathlib import Path

import pytest

from loudmerge.canary.guards import load_guards
from loudmerge.canary.rules.rules import check

GUARDS = {one.id: one for one in load_guards(Path(__file__).parents[3] / "canary" / "guards")}

MERGE = """
def _merge_lora(W, lora_stats, name):
    if lora_stats.module is not None:
        raise RuntimeError(name)
    W = W.addmm_(lora_stats.lora_B, lora_stats.lora_A, alpha=lora_stats.alpha)
    if not torch.isfinite(torch.amax(W)).item():
        raise ValueError(name)
    return W
"""
COUNT = """
def merge_and_overwrite_lora(model, save_method):
    done = 0
    for name in names(model):
        merged, keys = _merge_and_overwrite_lora(name)
        done += merged
    backed = _count_backed_lora_modules(model)
    if backed != done:
        raise RuntimeError("some")
    return model
"""
CONFIG = """
def merge_and_overwrite_lora(model, save_directory):
    config = getattr(model, "generation_config", None)
    if config is None:
        config = getattr(getattr(model, "config", None), "generation_config", None)
    if config is not None:
        config.save_pretrained(save_directory)
"""
SAVE = """
def unsloth_generic_save(model, save_directory, save_method, push_to_hub):
    if not isinstance(model, PeftModel):
        return model.save_pretrained(save_directory)
    elif _is_adapter_save_method(save_method):
        unsloth_save_model(model, save_method="lora")
    else:
        merge_and_overwrite_lora(model, save_directory, save_method, low_disk_space_usage=True)
"""
DROPPED = """
def merge_lora_sharded_efficient(shards, state):
    if _detect_per_expert_unfused_mismatch(shards, state):
        LOG.warning("the experts' LoRA is dropped")
"""
FUSED = """
class LoRAModelManager:
    def _validate_moe_lora_format(self, lora_model):
        if self._enable_mixed_moe_lora_format and lora_model.is_3d_lora_weight:
            return
        for name, module in self.modules.items():
            if isinstance(module, FusedMoEWithLoRA) and not isinstance(module, FusedMoE3DWithLoRA):
                lora = self._get_lora_layer_weights(lora_model, name)
                if lora is not None and torch.is_tensor(lora.lora_a):
                    raise ValueError(name)
"""
TRIED = """
def _merge_tensor_with_lora(tensor, key, lora_state, scale, config, device):
    if tensor.ndim >= 3:
        a, b, name = _find_param_wrapper_lora(lora_state, key, tensor.shape)
    return tensor
"""
TOLD = """
def _build_peft_layer_and_get_delta(a, b, config, base, is_param_wrapper=False, is_transposed=None):
    from peft.tuners.lora.layer import ParamWrapper
    fake = torch.nn.Module()
    if is_transposed is not None:
        fake.is_transposed = is_transposed
    return ParamWrapper(fake, adapter_name="a").get_delta_weight("a")
"""
STRICT = " and os.environ.get('STRICT')"


@pytest.mark.parametrize(
    ("name", "source", "kept", "gone"),
    [
        ("zoo-non-finite-raises", MERGE, "    if not torch.isfinite(torch.amax(W)).item():", "    if False:"),
        ("zoo-non-finite-raises", MERGE, "raise ValueError(name)", "print(name)"),
        ("zoo-non-finite-raises", MERGE, "if not torch.isfinite", "if torch.isfinite"),
        ("zoo-lora-count-raises", COUNT, "backed != done", "backed == done"),
        ("zoo-lora-count-raises", COUNT, "backed != done", "backed < done"),
        ("zoo-lora-count-raises", COUNT, "backed != done", f"backed != done{STRICT}"),
        ("zoo-generation-config-saved", CONFIG, "config is not None", "config is None"),
        ("zoo-generation-config-saved", CONFIG, "is not None", f"is not None{STRICT}"),
        ("unsloth-lora-not-merged", SAVE, "elif _is", "elif not _is"),
        ("unsloth-merged-routes-to-zoo", SAVE, "elif _is", "elif not _is"),
        ("unsloth-lora-not-merged", SAVE, "(save_method):", f"(save_method){STRICT}:"),
        ("unsloth-merged-routes-to-zoo", SAVE, "(save_method):", f"(save_method){STRICT}:"),
        ("axolotl-dropped-experts-are-said", DROPPED, "if _detect", "if not _detect"),
        (
            "axolotl-dropped-experts-are-said",
            DROPPED,
            "state):\n        LOG",
            f"state){STRICT}:\n        LOG",
        ),
        ("axolotl-fused-tried-for-3d", TRIED, "ndim >= 3", "ndim < 3"),
        ("axolotl-fused-tells-peft-transposed", TOLD, "= is_transposed\n", "= False\n"),
        ("axolotl-fused-tells-peft-transposed", TOLD, "= is_transposed\n", "= not is_transposed\n"),
        ("vllm-fused-on-per-expert-model-refused", FUSED, "torch.is_tensor", "not torch.is_tensor"),
        ("vllm-fused-on-per-expert-model-refused", FUSED, "lora_a):", "lora_a) and envs.VLLM_STRICT:"),
    ],
)
def test_a_guard_notices_that_what_it_is_about_is_gone(name: str, source: str, kept: str, gone: str) -> None:
    assert kept in source
    imports = "import os\nimport torch\nimport vllm.envs as envs\n"
    before = check(GUARDS[name].rule, imports + source, "upstream.py")
    assert before.holds, before.detail
    assert not check(GUARDS[name].rule, imports + source.replace(kept, gone), "upstream.py").holds
