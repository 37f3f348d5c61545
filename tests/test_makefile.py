"""`make setup` completes an existing environment, and keeps what its owner has added."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.mark.skipif(not MAKEFILE.is_file(), reason="not a checkout")
def test_an_existing_environment_is_not_built_from_nothing(tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    # In place of uv, which would install all of PyTorch.
    (programs / "uv").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/uv.log\n')
    (programs / "uv").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["make", "setup", f"PYTHON={sys.executable}"]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for is_there in (False, True):
        if is_there:
            (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
            os.utime(tmp_path / "pyproject.toml", (2e9, 2e9))
        (tmp_path / "uv.log").write_text("")
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        asked = (tmp_path / "uv.log").read_text()
        assert "pip install" in asked and "--clear" not in asked
        assert ("venv --quiet" in asked) is not is_there
