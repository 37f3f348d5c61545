"""What several tests of training share."""

from pathlib import Path

import pytest
from helpers import STUDENT, Started, result, the_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, store_template: Path) -> dict[str, object]:
    """What comes of the student when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    run = Started(folder, STUDENT)
    assert run.end() == 0, run.output
    return result(folder, the_run(folder))
