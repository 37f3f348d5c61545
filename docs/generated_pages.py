"""Pages that are made when the documentation is built: the options of `conf/`, the changelog, the first page.

mkdocs calls `on_files` (see mkdocs.yml). The options are read as text, so that their comments stay.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
TITLES = {
    "model": "Networks: `model` and `model@teacher`",
    "dataset": "Data sets: `dataset`",
    "loss": "Losses: `loss`",
    "optimizer": "Optimizers: `optimizer`",
    "scheduler": "Schedules of the learning rate: `scheduler`",
    "augmentation": "Augmentation: `augmentation`",
    "experiment": "Experiments: `experiment`",
    "hydra": "Launchers and the sweeper: `hydra/…`",
}
MOVED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
BASE = re.compile(r"^  - ([\w/]+)@_here_\n", re.MULTILINE)


def lead(text: str) -> tuple[str, str]:
    """The comment that a file begins with, without its number signs, and the rest."""
    lines = text.splitlines()
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    about = " ".join(line.lstrip("# ") for line in lines[:end] if "@package" not in line)
    return about, "\n".join(lines[end:]) + "\n"


def entries(text: str) -> dict[str, str]:
    """The text of each top-level key, with the comments above it."""
    found, above = {}, ""
    for part in re.findall(r"^#.*\n|^\w+:.*\n(?:^[ -].*\n|^\n(?= ))*", text, re.MULTILINE):
        if part.startswith("#"):
            above += part
        else:
            found[part.split(":")[0]], above = above + part, ""
    return found


def with_bases(file: Path) -> dict[str, str]:
    """The keys of an option, then those of the files that it builds on, whose comments stay where a value changes."""
    _, text = lead(file.read_text())
    own = entries(BASE.sub("", text))
    if own.get("defaults", "").strip() == "defaults:":
        del own["defaults"]
    inherited: dict[str, str] = {}
    for base in BASE.findall(text):
        inherited |= with_bases(file.parent / f"{base}.yaml")
    for key, part in own.items():
        comment = re.search(r" +# .*$", inherited.get(key, ""))
        if comment and "#" not in part:
            own[key] = f"{part.rstrip()}{comment[0].rstrip()}\n"
    return own | {key: part for key, part in inherited.items() if key not in own}


def options(group: str) -> list[Path]:
    """The files of a group that a user may choose, by name."""
    return sorted(file for file in (CONF / group).rglob("*.yaml") if "base" not in {*file.parent.parts, file.stem})


def group_page(group: str) -> str:
    """A page with a section for each option of a group: what it is, its keys, their defaults and comments."""
    use = f"Choose one with `{group}=NAME`" if group != "hydra" else "Choose one with `hydra/launcher=NAME`"
    page = [f"# {TITLES[group]}", f"{use}, and set its keys beside it. The values shown are the defaults."]
    for file in options(group):
        about, text = lead(file.read_text())
        if group not in ("experiment", "hydra"):
            text = "".join(with_bases(file).values())
        name = file.relative_to(CONF / group).with_suffix("").as_posix()
        page += [f"## {name}", about, f"```yaml\n{text.strip()}\n```"]
    return "\n\n".join(part for part in page if part) + "\n"


def config_page() -> str:
    """The keys that belong to no group."""
    page = ["# All other keys", "Set any of them on the command line, such as `train.epochs=30`."]
    for name in ("config", "skewed", "labels_and_weights"):
        about, text = lead((CONF / f"{name}.yaml").read_text())
        page += [f"## conf/{name}.yaml", about, f"```yaml\n{text.strip()}\n```"]
    return "\n\n".join(page) + "\n"


def pages() -> dict[str, str]:
    """Name and text of each page that is made."""
    made = {f"configuration/{group}.md": group_page(group) for group in TITLES}
    made["configuration/config.md"] = config_page()
    for name, file in MOVED.items():
        text = (ROOT / file).read_text().replace("](docs/", "](")
        for target, beside in MOVED.items():
            text = text.replace(f"]({beside})", f"]({target})")
        made[name] = re.sub(r"\[(LICENSE|CITATION\.cff)\]\(\1\)", r"`\1`", text)
    return made


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those in `docs/`."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files
