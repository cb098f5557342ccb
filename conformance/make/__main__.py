"""Makes the suite's data anew, each part in its own environment.

    PYTHONPATH=.:src python -m conformance.make --environments .compat/env --unsloth ENV --unsloth ENV
    [--data conformance]

--environments: a directory of virtual environments named as `nox -s matrix` names them, tfX-peftY-trlZ.
--unsloth: a virtual environment with one of the releases of unsloth_zoo that `packed` names,
beside transformers and peft.
The same versions give the same bytes.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conformance.make.edited import EDITED
from conformance.make.edits import OF_ADAPTER, OF_BASE
from conformance.make.made import MADE
from conformance.make.manifest import FILES, write
from conformance.make.packed import PACKED
from conformance.make.recipes import NEW, OLD

LOG = logging.getLogger("conformance.make")
ROOT = Path(__file__).parents[2]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m conformance.make")
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--unsloth", type=Path, action="append", default=[])
    parser.add_argument("--data", type=Path, default=ROOT / "conformance")
    return parser.parse_args()


def run(environment: Path, module: str, *words: str, **variables: str) -> None:
    """A module of this package, in an environment. Raises SystemExit when it fails."""
    fixed = {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src"))),
        "PYTHONHASHSEED": "0",  # PEFT writes sets into its configs
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(environment / "bin" / "python"), "-m", f"conformance.make.{module}", *words]
    LOG.info("%s: %s", environment.name, " ".join(words))
    done = subprocess.run(command, env={**os.environ, **fixed, **variables}, check=False)  # noqa: S603 - a line made here
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")


def edit(data: Path) -> None:
    """Makes the edited adapters and bases."""
    adapters = {made.id: made.base for made in MADE} | {packed.id: packed.base for packed in PACKED}
    for case in EDITED:
        if case.edit in OF_BASE:
            shutil.copytree(data / "bases" / adapters[case.of], data / "bases" / case.id)
            OF_BASE[case.edit](data / "bases" / case.id)
        elif case.edit:
            shutil.copytree(data / "adapters" / case.of, data / "adapters" / case.id)
            OF_ADAPTER[case.edit](data / "adapters" / case.id)


def main() -> int:
    """Makes everything anew."""
    given = arguments()
    data: Path = given.data.resolve()
    for folder in (*FILES, "notes"):
        shutil.rmtree(data / folder, ignore_errors=True)
        (data / folder).mkdir(parents=True)
    pairs = sorted({(made.transformers, made.peft) for made in MADE}, key=lambda pair: (pair[0] != OLD, pair))
    places = {pair: next(given.environments.glob(f"tf{pair[0]}-peft{pair[1]}-*")) for pair in pairs}
    for stage in ("bases", "adapters"):
        done: set[str] = set()
        # Adapters last: those that a newer PEFT saves again come from an older one.
        for pair in sorted(pairs, key=lambda pair: (pair[0] == NEW, pair[0] != OLD, pair)):
            if stage == "adapters" or pair[0] not in done:
                run(places[pair], "inside", *pair, str(data), stage)
            done.add(pair[0])
    for environment in given.unsloth:
        run(environment, "inside_unsloth", str(data), UNSLOTH_ALLOW_CPU="1", UNSLOTH_IS_PRESENT="1")
    edit(data)
    LOG.info("%d cases", write(data))
    shutil.rmtree(data / "notes")
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.exit(main())
