"""Answers pip in place of an sdist's build backend, so that no upstream code runs to learn the metadata.

pip starts it as it would start Python on a backend's hook (PEP 517): SCRIPT HOOK CONTROL_DIRECTORY, in the
source tree, with the question in `input.json` and the answer expected in `output.json`. The metadata is the
sdist's own PKG-INFO. Anything else that pip wants of it fails.
"""

from __future__ import annotations

import email
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any


def answer(hook: str, question: dict[str, Any], source: Path) -> Any:
    """What the hook returns. Raises SystemExit for a hook that would build something."""
    if hook in {"_supported_features", "get_requires_for_build_wheel"}:
        return []
    if hook != "prepare_metadata_for_build_wheel":
        sys.exit(f"{hook} is refused: an sdist is read, not built")
    metadata = source / "PKG-INFO"
    place = Path(question["metadata_directory"], f"{_named(metadata)}.dist-info")
    place.mkdir()
    shutil.copyfile(metadata, place / "METADATA")
    return place.name


def _named(metadata: Path) -> str:
    """NAME-VERSION, which pip reads off the directory's name."""
    message = email.message_from_bytes(metadata.read_bytes())
    parts = [re.sub(r"[^\w.+!]+", "_", str(message[field])) for field in ("Name", "Version")]
    return "-".join(parts)


def main() -> None:
    """Answers one question. Raises SystemExit when it is none."""
    if len(sys.argv) != 4:
        sys.exit("refused: an sdist is read, not run")
    control = Path(sys.argv[3])
    question = json.loads((control / "input.json").read_text(encoding="utf-8"))["kwargs"]
    found = {"unsupported": False, "return_val": answer(sys.argv[2], question, Path.cwd())}
    (control / "output.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
