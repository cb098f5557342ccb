"""A small suite, and merge tools that are right, wrong, slow or destructive: real scripts, without torch."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from loudmerge.conformance.cases import Suite, load

UNTOUCHED, TARGET, HEAD = "model.norm.weight", "model.q_proj.weight", "lm_head.weight"

START = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
base, adapter, out = map(Path, sys.argv[1:4])
file = base / "model.safetensors"
held = load_file(file)
lora = load_file(adapter / "adapter_model.safetensors")

def write(tensors, name="model.safetensors"):
    out.mkdir(exist_ok=True)
    save_file(tensors, out / name)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(base / name, out)

def index(files):
    named = {name: file for file, names in files.items() for name in names}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))

def config(**fields):
    write(merged())
    (out / "config.json").write_text(json.dumps({**json.loads((base / "config.json").read_text()), **fields}))

def merged():
    if any(not np.isfinite(value).all() for value in lora.values()):
        sys.exit("found NaN in the adapter")
    update = 2 * lora["q_proj.lora_B"] @ lora["q_proj.lora_A"]
    return {**held, "model.q_proj.weight": held["model.q_proj.weight"] + update}
"""

TOOLS = {
    "right": "write(merged())",
    "copies the base": "write(held)",
    "half the update": """
whole = merged()["model.q_proj.weight"]
write({**held, "model.q_proj.weight": (whole + held["model.q_proj.weight"]) / 2})""",
    "refuses": "sys.exit('error: I cannot do that')",
    "fails after writing": "write(held); sys.exit('disk full')",
    "loses a tensor": "all = merged(); del all['model.norm.weight']; write(all)",
    "adds a tensor": "write({**merged(), 'more': np.zeros(2, dtype=np.float32)})",
    "renames a tensor": "all = merged(); all['norm.weight'] = all.pop('model.norm.weight'); write(all)",
    "moves an untouched tensor": """
all = merged(); all['model.norm.weight'] = all['model.norm.weight'] + np.float32(1e-6); write(all)""",
    "in two shards": """
all = merged(); head = all.pop('lm_head.weight')
write(all, 'model-00001-of-00002.safetensors')
write({'lm_head.weight': head}, 'model-00002-of-00002.safetensors')
index({'model-00001-of-00002.safetensors': all, 'model-00002-of-00002.safetensors': ['lm_head.weight']})""",
    "in a shard that no index names": """
all = merged(); head = all.pop('lm_head.weight')
write(all, 'model-00001-of-00002.safetensors')
write({'lm_head.weight': head}, 'model-00002-of-00002.safetensors')
index({'model-00001-of-00002.safetensors': all})""",
    "an index of other shards": """
write(merged()); index({'model-00001-of-00002.safetensors': ['lm_head.weight']})""",
    "an index that is none": "write(merged()); (out / 'model.safetensors.index.json').write_text('[]')",
    "under another file name": "write(merged(), 'merged.safetensors')",
    "beside the base's file": "write(held); write(merged(), 'model-new.safetensors')",
    "with the adapter": """
write(merged())
for file in adapter.iterdir():
    shutil.copy(file, out)
(out / 'adapter_config.json').write_text('{}')""",
    "without a config": "write(merged()); (out / 'config.json').unlink()",
    "with a broken config": "write(merged()); (out / 'config.json').write_text('{')",
    "with a config without end": """
write(merged()); (out / 'config.json').write_text('{"a":' * 10**5 + '1' + '}' * 10**5)""",
    "another activation": "config(hidden_act='relu')",
    "another model": "config(model_type='other')",
    "a config with nothing in it": """
write(merged()); (out / 'config.json').write_text(json.dumps({'model_type': 'any'}))""",
    "another size": "config(sizes={'hidden_size': 5})",
    "a config of another transformers": """
config(dtype='float16', transformers_version='9')
text = (out / 'config.json').read_text().replace('num_experts', 'num_local_experts')
(out / 'config.json').write_text(text)""",
    "without a generation config": "write(merged()); (out / 'generation_config.json').unlink()",
    "a folder named like a shard": "write(merged()); (out / 'x.safetensors').mkdir()",
    "one file instead of a folder": "out.write_text('?'); sys.exit('I want a folder')",
    "in float8": """
import torch
from safetensors.torch import save_file as save
write(held)
all = {name: torch.tensor(value).to(torch.float8_e4m3fn) for name, value in merged().items()}
save(all, out / 'model.safetensors')""",
    "writes into its input": "write(merged()); (base / 'new.json').write_text('{}')",
    "merges only without options": """
if sys.argv[4:]:
    sys.exit('no options here')
write(merged())""",
    "in float16": "write({name: value.astype(np.float16) for name, value in merged().items()})",
    "changes its input": "write(merged()); (base / 'config.json').write_text('{}')",
    "writes no safetensors": "out.mkdir(); (out / 'model.safetensors').write_bytes(b'?' * 40)",
    "writes nothing": "pass",
    "never ends": """
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
Path(os.environ['PIDS']).write_text(f'{os.getpid()} {child.pid}')
time.sleep(600)""",
    "follows its option": """
write(merged() if sys.argv[4:] == ['--orientation', 'swapped'] else held)""",
}


def line(name: str, folder: Path, *, more: str = "") -> str:
    """The command line of a tool, written into `folder`."""
    script = folder / f"{name.replace(' ', '_')}.py"
    script.write_text(START + TOOLS[name] + "\n")
    return f"{shlex.join((sys.executable, str(script)))} {{base}} {{adapter}} {{out}} {more}".strip()


def make_suite(root: Path) -> Suite:
    """Four cases: a merge, one that needs an option, a refusal made from the first, one of either."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    for folder in ("bases/b", "adapters/plain", "adapters/nan", "expected"):
        (root / folder).mkdir(parents=True)
    base = {UNTOUCHED: random(4), TARGET: random(6, 4), HEAD: random(5, 4)}
    save_file(base, root / "bases/b/model.safetensors")
    config = {"model_type": "any", "hidden_act": "silu", "num_experts": 7, "sizes": {"hidden_size": 4}}
    config |= {
        "dtype": "float32",
        "transformers_version": "4.57.6",
        "eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (root / "bases/b/config.json").write_text(json.dumps(config))
    (root / "bases/b/generation_config.json").write_text("{}")
    lora = {"q_proj.lora_A": random(2, 4), "q_proj.lora_B": random(6, 2)}
    save_file(lora, root / "adapters/plain/adapter_model.safetensors")
    bad = {**lora, "q_proj.lora_A": np.full((2, 4), np.nan, dtype=np.float32)}
    save_file(bad, root / "adapters/nan/adapter_model.safetensors")
    changed = base[TARGET] + 2 * lora["q_proj.lora_B"] @ lora["q_proj.lora_A"]
    save_file({TARGET: changed}, root / "expected/plain.safetensors")
    cases = [
        case("plain"),
        case("told", options={"orientation": "swapped"}),
        case("nan", adapter="nan", expect="refuse", expected=None, of="plain", edit="nan"),
        case("pickle", expect="either", topic="others"),
    ]
    write_manifest(root, cases)
    return load(root)


def case(name: str, **fields: Any) -> dict[str, Any]:
    """One case's entry in the manifest."""
    plain = {"topic": "plain", "base": "b", "adapter": "plain", "expect": "merge", "expected": "plain"}
    made = {"peft": "0.19.1", "transformers": "5.5.0"}
    rest = {"refusal": "", "options": {}, "config": {}, "made": made, "of": "", "edit": "", "layout": "dense"}
    return {"id": name, "why": f"why {name} matters.", **plain, **rest, **fields}


def write_manifest(root: Path, cases: list[dict[str, Any]], **fields: Any) -> None:
    """The manifest of what lies in `root`."""
    files = {
        file.relative_to(root).as_posix(): {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }
    document = {"schema": 1, "layouts": {"dense": "no experts"}, "cases": cases, "files": files, **fields}
    (root / "manifest.json").write_text(json.dumps(document))


def expected(root: Path) -> Any:
    """The tensors that the plain case changes."""
    return load_file(root / "expected/plain.safetensors")
