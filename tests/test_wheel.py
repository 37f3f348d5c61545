"""The built wheel, unpacked by pip into an empty folder, runs there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_in_an_empty_folder_runs(tmp_path: Path, empty_store: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = (tmp_path / "dist").glob("kdpipe-*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel)], check=True)

    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    where = [sys.executable, "-c", "from kdpipe.settings.composition import CONF; print(CONF)"]
    found = subprocess.run(where, cwd=empty, env=environment, check=True, capture_output=True, text=True).stdout
    assert found.strip() == str(installed / "kdpipe" / "conf")
    for file in (
        "compare/page.html.j2",
        "export/card.md.j2",
        "compare/published.csv",
        "conf/experiment/benchmark/vgg13_vgg8.yaml",
    ):
        assert (installed / "kdpipe" / file).is_file()

    store = f"tracking.uri=sqlite:///{empty_store}"
    overrides = ["dataset=digits", "experiment=student", "train.epochs=1", "train.threads=1", store]
    command = [sys.executable, str(installed / "bin" / "kdpipe"), "-m", *overrides]  # Hydra finds our sweeper here, too
    outcome = subprocess.run(command, cwd=empty, env=environment, check=False, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "verdict: cannot tell" in outcome.stdout
    assert len(list((empty / "outputs" / "runs").glob("*/model.safetensors"))) == 1
