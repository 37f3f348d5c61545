"""The architecture: which room may import which, what lives in `kdpipe/`, one name for one thing."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdpipe

PACKAGE = Path(kdpipe.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if "conf" not in file.parts)
BOTTOM = {"system", "settings"}
ROOMS = {
    "settings": set(),
    "system": {"settings"},  # their errors, as all rooms do
    "losses": {"settings"},
    "models": BOTTOM,
    "data": BOTTOM,
    "runs": BOTTOM,
    "evaluation": {"data", "models", "runs", *BOTTOM},
    "training": {"data", "models", "losses", "evaluation", *BOTTOM},
    "tracking": {"runs", *BOTTOM},
    "assembly": {"data", "models", "losses", "training", "runs", "tracking", *BOTTOM},
    "compare": {"evaluation", "runs", "tracking", *BOTTOM},
    "export": {"assembly", "data", "evaluation", "models", "runs", "tracking", *BOTTOM},
    "sweeps": {"assembly", "compare", "evaluation", "runs", "tracking", *BOTTOM},
    "clean": {"runs", "tracking", *BOTTOM},
    "sync": {"runs", "settings", "tracking"},
    "cost": {"assembly", "evaluation", "models", "runs", "tracking", *BOTTOM},
    "views": {"assembly", "evaluation", "runs", *BOTTOM},
    "predict": {"data", "export", "runs", "tracking", *BOTTOM},
    "library": {
        "assembly",
        "compare",
        "data",
        "evaluation",
        "losses",
        "models",
        "runs",
        "tracking",
        "training",
        *BOTTOM,
    },
    "main": {"assembly", "evaluation", "models", "runs", "sweeps", "tracking", "training", *BOTTOM},
}
COMMAND_LINE = {"settings/composition", "settings/overrides", "settings/hydra_errors"}
LIBRARIES = {  # imported by these files alone
    "mlflow": {"tracking"},
    "hydra": {"main", "sweeps", *COMMAND_LINE},
    "omegaconf": {"main", "settings/yaml_files", *COMMAND_LINE},
}
SHARED_NAMES = {
    *("evaluate", "fit"),  # kdpipe.evaluate and kdpipe.fit are for people; each calls the function of its name
    "cli",  # of each command
    "classifier",  # kdpipe.models.timm.classifier and kdpipe.models.torchvision.classifier are targets of configs
}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


@pytest.mark.parametrize("file", FILES, ids=place_of)
def test_a_room_imports_only_the_rooms_below_it(file: Path) -> None:
    place = place_of(file)
    room = place.split("/")[0]
    for name in imports(file):
        package, *parts = name.split(".")
        if package == "kdpipe" and room in ROOMS:
            assert parts[0] in ROOMS[room] | {room, "__version__"}, f"{place} imports {name}"
        if package in LIBRARIES:
            allowed = LIBRARIES[package]
            assert room in allowed or place in allowed, f"{place} imports {name}"


def test_the_table_has_no_circle() -> None:
    left = dict(ROOMS)
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]


def test_the_package_fits_on_a_screen() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix != ".typed"]
    assert len(entries) <= 22, sorted(path.name for path in entries)
    for path in entries:
        file = path / "__init__.py" if path.is_dir() else path
        assert ast.get_docstring(ast.parse(file.read_text())), f"{path.name} does not say what lives there"
        assert path.name.removesuffix(".py") in {*ROOMS, "__init__", "__main__"}


def test_one_name_is_one_thing() -> None:
    modules = Counter(file.stem for file in FILES if not file.stem.startswith("__"))
    names = Counter(
        node.name
        for file in FILES
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, number in modules.items() if number > 1] == []
    assert {name for name, number in names.items() if number > 1} <= SHARED_NAMES


@pytest.mark.parametrize("file", FILES, ids=place_of)
def test_no_function_is_longer_than_a_page(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name}: {(node.end_lineno or 0) - node.lineno + 1}"
