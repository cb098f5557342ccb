"""One run at a time in a checkout, what it started among it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loudmerge.compat.environments.alone import alone
from loudmerge.errors import EnvironmentFailed
from tests.unit.compat.environments.test_children import ends

RUN = '''
import os, sys, time
from pathlib import Path
from loudmerge.compat.environments.alone import alone
from loudmerge.compat.environments.children import Children

INSTALLS = """
import os, time
open("pid", "w").write(str(os.getpid()))
print("begun", flush=True)
time.sleep(60)
"""
with alone(Path.cwd()), Children() as children:
    children.run([sys.executable, "-c", INSTALLS], seconds=60, env=os.environ, log=sys.stdout)
'''


def test_what_a_killed_run_had_started_keeps_others_out_until_it_ends(tmp_path: Path) -> None:
    """An installer would go on filling the environment that the next run makes anew."""
    with subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        running.kill()
        running.wait()
        with (
            pytest.raises(EnvironmentFailed, match="or what one that was killed had started"),
            alone(tmp_path),
        ):
            pass
        os.kill(int((tmp_path / "pid").read_text("utf-8")), signal.SIGKILL)
        assert ends(tmp_path)
    with alone(tmp_path):
        pass
