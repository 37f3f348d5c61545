"""The examples of the README and of docs/ work as written, and the pages made from conf/ have every option."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import generated_pages
import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from PIL import Image

from kdpipe.settings.schema import Settings

ROOT = Path(__file__).parents[1]
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text()
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
TEXT = "\n".join(PAGES.values())
MADE = generated_pages.pages()


def test_the_loss_the_data_set_and_the_network_run(
    tmp_path: Path, empty_store: Path, photo: Callable[..., Image.Image]
) -> None:
    for folder in ("kdpipe", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    examples = re.findall(r"^`((?:kdpipe|conf)/\S+)`:\n\n```\w+\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
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
    commands = re.findall(r"^python -m kdpipe (.*dataset=npz.*)$", TEXT, re.MULTILINE)
    assert len(commands) == 2
    for overrides in commands:
        command = [sys.executable, "-m", "kdpipe", *overrides.split(), store, "train.epochs=2", "train.threads=1"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_script_that_asks_a_teacher_writes_what_teaches(class_folders: Path, kdpipe: Callable) -> None:
    script = next(text for text in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "answers.parquet" in text)
    (command,) = re.findall(r"^python -m kdpipe (.*teacher.file=answers.parquet.*)$", TEXT, re.MULTILINE)
    asks = "def ask(file):\n    share = 0.9 if 'temple' in str(file) else 0.2\n"
    Path("my_teacher.py").write_text(f"{asks}    return {{'temple': share, 'flower': 1 - share}}\n")
    subprocess.run([sys.executable, "-c", script], check=True)
    done = kdpipe(*command.split(), "dataset.val_fraction=0.2", "train.epochs=1", "train.threads=1")
    assert done.status == 0, done.errors
    assert "teacher answers: 100.0 % of 8 validation images" in done.output
    assert "teacher: probabilities for 40 images from answers.parquet" in done.output


def one_cell(words: str) -> list[str]:
    """The overrides of a command of a page, the first value of each axis, with what a reader would fill in."""
    given = dict(re.findall(r'^(PHOTOS)="(.*)"$', TEXT, re.MULTILINE))
    runs = itertools.count()
    words = re.sub("runs:/ID", lambda _: f"runs:/{next(runs):032}", words.replace(" …", ""))
    words = words.replace("$PHOTOS", given["PHOTOS"])
    overrides = []
    for override in OverridesParser.create().parse_overrides(
        [word for word in shlex.split(words, comments=True) if word != "-m"]
    ):
        if override.is_sweep_override():
            sweep = override.value()
            first = str(sweep.start) if isinstance(sweep, IntervalSweep) else next(override.sweep_string_iterator())
            overrides.append(f"{override.get_key_element()}={first}")
        else:
            overrides.append(str(override.input_line))
    return [*overrides, "chain=null"]  # a link by itself, as the chain runs it


COMMANDS = dict.fromkeys(
    command
    for text in PAGES.values()
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text.replace("\\\n", " "), re.MULTILINE | re.DOTALL)
    for command in re.findall(r"^ *python -m kdpipe (.*)$", block, re.MULTILINE)
    if "mlp" not in command  # those of the user's own components: the first test runs them
)


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_settings(words: str, composed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDPIPE_ALLOW_TARGETS", "my_package")
    composed(*one_cell(words))


@pytest.mark.parametrize("group", generated_pages.TITLES)
def test_a_page_has_every_option_of_its_group_with_its_keys(group: str) -> None:
    page = MADE[f"configuration/{group}.md"]
    sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    files = [
        file for file in (ROOT / "conf" / group).rglob("*.yaml") if file.stem != "base" and file.parent.name != "base"
    ]
    assert {file.relative_to(ROOT / "conf" / group).with_suffix("").as_posix() for file in files} == sections.keys()
    for file in files:
        section = sections[file.relative_to(ROOT / "conf" / group).with_suffix("").as_posix()]
        keys = (yaml.safe_load(file.read_text()) or {}).keys() - {"defaults"}
        assert [key for key in keys if not re.search(rf"^{key}:", section, re.MULTILINE)] == [], file


def test_a_page_shows_what_an_option_takes_from_its_bases_with_their_comments() -> None:
    page = MADE["configuration/model.md"]
    section = page[page.index("## resnet20\n") :]
    assert "depth: 20\n" in section[: section.index("## ", 3)]
    assert "freeze: none        # none | backbone" in section[: section.index("## ", 3)]


def test_pages_have_every_loss_and_augmentation_in_a_table() -> None:
    for page, group in (("methods", "loss"), ("recipe", "augmentation")):
        rows = set(re.findall(r"^\| `(\w+)` \|", PAGES[f"docs/{page}.md"], re.MULTILINE))
        assert {file.stem for file in generated_pages.options(group)} - {"none"} <= rows


def test_the_readme_counts_the_methods_and_quotes_a_verdict() -> None:
    methods = {file.stem for file in generated_pages.options("loss")} - {"cross_entropy", "label_smoothing", "bce"}
    assert set(re.findall(r"(\d+) (?:distillation )?methods, ", PAGES["README.md"])) == {str(len(methods))}
    (verdict,) = re.findall(r"^> (verdict: .*)$", PAGES["README.md"], re.MULTILINE)
    assert verdict in PAGES["docs/results/README.md"]


def test_the_readme_fits_a_screen_and_a_half() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_a_page_begins_with_what_its_reader_can_do_after_it() -> None:
    written = {name: text for name, text in PAGES.items() if name.startswith("docs/") and "results/" not in name}
    assert [name for name, text in written.items() if not re.match(r"# .+\n\nAfter this page you ", text)] == []


def test_links_between_pages_and_to_pictures_lead_somewhere() -> None:
    made = {f"docs/{name}" for name in MADE}
    for name, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            place = (ROOT / name).parent / link
            assert place.exists() or os.path.relpath(place, ROOT) in made, f"{name}: {link}"


def test_the_table_of_rooms_is_complete() -> None:
    table = PAGES["docs/how-it-works.md"]
    entries = [path for path in (ROOT / "kdpipe").iterdir() if not path.name.startswith(("_", "py."))]
    assert [path.name for path in entries if f"{path.name}{'/' * path.is_dir()}`" not in table] == []


def test_the_files_that_the_pages_name_exist() -> None:
    named = re.findall(r"`((?:kdpipe|tests|benchmarks|conf|hydra_plugins)/[\w/.]*)[` ]", TEXT)
    examples = re.findall(r"^`(\S+)`:$", TEXT, re.MULTILINE)
    assert [name for name in named if name not in examples and not (ROOT / name).exists()] == []


def test_every_target_of_the_pages_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE)) <= targets


def test_the_version_that_is_cited_is_in_the_changelog() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f"## {cited['version']}, {cited['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()
