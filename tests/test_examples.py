"""The notebooks in examples/ run from the first cell to the last, and say what is printed below their cells."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
VERDICT = re.compile(r"^(distillation helped|distillation hurt|no evidence|cannot tell)", re.MULTILINE)


def printed(notebook: Any) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not a checkout")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_comes_to_its_verdict(file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    shown = printed(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert VERDICT.findall(printed(notebook)) == VERDICT.findall(shown) != []
