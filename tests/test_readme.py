"""The README's examples work as written."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_loss_the_data_set_and_the_network_run(
    tmp_path: Path, empty_store: Path, photo: Callable[..., Image.Image]
) -> None:
    for folder in ("kdpipe", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    examples = re.findall(r"^`((?:kdpipe|conf)/\S+)`:\n\n```\w+\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(examples) == 6
    for name, text in examples:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    np.savez(
        tmp_path / "scenes.npz",
        images=np.stack([np.asarray(photo(kind, n)).transpose(2, 0, 1) for kind in (0, 1) for n in range(30)]),
        labels=np.repeat([0, 1], 30),
        class_names=np.array(["temple", "flower"]),
    )
    store = f"tracking.uri=sqlite:///{empty_store}"
    commands = re.findall(r"^    python -m kdpipe (.*dataset=npz.*)$", README, re.MULTILINE)
    assert len(commands) == 2
    for overrides in commands:
        command = [sys.executable, "-m", "kdpipe", *overrides.split(), store, "train.epochs=2", "train.threads=1"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_script_that_asks_a_teacher_writes_what_teaches(class_folders: Path, kdpipe: Callable) -> None:
    script = next(text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "answers.parquet" in text)
    (command,) = re.findall(r"^    python -m kdpipe (.*teacher.file=answers.parquet.*)$", README, re.MULTILINE)
    asks = "def ask(file):\n    share = 0.9 if 'temple' in str(file) else 0.2\n"
    Path("my_teacher.py").write_text(f"{asks}    return {{'temple': share, 'flower': 1 - share}}\n")
    subprocess.run([sys.executable, "-c", script], check=True)
    done = kdpipe(*command.split(), "dataset.val_fraction=0.2", "train.epochs=1", "train.threads=1")
    assert done.status == 0, done.errors
    assert "teacher answers: 100.0 % of 8 validation images" in done.output
    assert "teacher: probabilities for 40 images from answers.parquet" in done.output


def test_every_option_of_every_group_is_in_the_table() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.MULTILINE))
    for group in (folder for folder in (ROOT / "conf").iterdir() if folder.is_dir()):
        for option in group.glob("*.yaml"):
            if not option.stem.startswith("tutorial_"):
                assert f"`{option.stem}`" in rows[group.name], option


def test_the_table_of_rooms_is_complete() -> None:
    table = README[README.index("## Working on kdpipe") :]
    entries = [path for path in (ROOT / "kdpipe").iterdir() if not path.name.startswith(("_", "py."))]
    assert [path.name for path in entries if f"{path.name}{'/' * path.is_dir()}`" not in table] == []


def test_the_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"`((?:kdpipe|tests|benchmarks|conf|hydra_plugins)/[\w/.]*)[` ]", README)
    examples = re.findall(r"^`(\S+)`:$", README, re.MULTILINE)
    assert [name for name in named if name not in examples and not (ROOT / name).exists()] == []


def test_every_target_of_the_readme_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE)) <= targets
