"""Errors that a user can act on, each as one line: the key, the value, and what was expected."""

import difflib
import errno
import re
from collections.abc import Iterable
from enum import Enum
from typing import Self

from kdpipe.settings.credentials import without_passwords


class _Missing(Enum):  # a member stays itself when an error is pickled, on its way from a worker
    MISSING = "missing"


MISSING = _Missing.MISSING  # the value of a ConfigError that is about a key alone
MOST_LISTED = 30  # accepted values in a message


class ConfigError(ValueError):
    """A value that cannot be used: `loss.alpha=2: expected a number from 0 to 1`.

    Whoever raises it names the key as it knows it (`alpha`); whoever knows where that stands adds the rest, with
    `under`.

    Args:
        key: of the config, such as `loss.alpha`, or a flag of a command, such as `--seconds`.
        value: as it was given; `MISSING` where there is none to show.
        expected: what would have been accepted, such as "a number from 0 to 1".
        problem: what is wrong, where `expected` does not say it.
    """

    def __init__(self, key: str, value: object = MISSING, expected: str = "", problem: str = "") -> None:
        super().__init__(key, value, expected, problem)  # which is all that pickle needs
        self.key, self.value, self.expected, self.problem = key, value, expected, problem

    def __str__(self) -> str:
        equals = " " if self.key.startswith("--") else "="
        given = "" if self.value is MISSING else f"{equals}{as_typed(self.value)}"
        what = [self.problem, f"expected {self.expected}" if self.expected else ""]
        if self.problem.endswith("?"):  # a suggestion is best remembered at the end
            what.reverse()
        return flat(f"{self.key}{given}: {'; '.join(filter(None, what))}")

    def under(self, prefix: str) -> Self:
        """The same error, with its key below another one."""
        return type(self)(f"{prefix}.{self.key}", self.value, self.expected, self.problem)


def as_typed(value: object) -> str:
    """A value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_typed(item)}' for key, item in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)


def one_of(choices: Iterable[object]) -> str:
    """What was expected where only these values are accepted; of a long list, its beginning."""
    texts = [as_typed(choice) for choice in choices]
    if len(texts) > MOST_LISTED:
        return f"one of {len(texts)} values, such as {', '.join(texts[:3])}"
    return texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"


def shortened(names: Iterable[object], most: int = 3) -> str:
    """Names with commas between them: the first ones of many, and how many more there are."""
    texts = list(map(str, names))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean …?`, with up to three near misses; "" where there are none. A dotted key is looked for among its
    neighbours first (loss.alfa among those of loss), then by its last part anywhere (alpha, train.alpha)."""
    known = [key for key in dict.fromkeys(known) if key != word]
    section, _, name = word.rpartition(".")
    siblings: dict[str, str] = {}
    anywhere: dict[str, str] = {}
    for key in known:
        before, _, last = key.rpartition(".")
        anywhere.setdefault(last, key)
        if before == section:
            siblings[last] = key
    near = [siblings[found] for found in _close(name, siblings) or (_around(name, siblings) if not section else [])]
    near = near or [key for key in known if key.rpartition(".")[2] == name]
    near = near or [anywhere[found] for found in _close(name, anywhere, cutoff=0.8)] or _close(word, known, cutoff=0.8)
    return f"did you mean {' or '.join(near[:3])}?" if near else ""


def _close(word: str, known: Iterable[str], cutoff: float = 0.65) -> list[str]:
    """Near misses among known words: the one that is the same but for case and hyphens, else similar ones."""
    plain: dict[str, str] = {}
    for name in known:
        plain.setdefault(folded(name), name)
    if folded(word) in plain:
        return [plain[folded(word)]]
    return [plain[near] for near in difflib.get_close_matches(folded(word), plain, n=3, cutoff=cutoff)]


def _around(word: str, known: Iterable[str]) -> list[str]:
    """Known words that contain a word, or that it contains."""
    return [name for name in known if min(len(name), len(word)) > 2 and (name in word or word in name)]


def folded(word: str) -> str:
    """A name without what people write differently: case, hyphens, underscores."""
    return re.sub(r"[-_ ]", "", word.lower())


def flat(error: object, limit: int | None = None) -> str:
    """The text of an error, or any text, on one line and without passwords."""
    text = " ".join(without_passwords(str(error)).split())[:limit]
    return text or (type(error).__name__ if isinstance(error, BaseException) else "")


def first_line(error: BaseException, limit: int | None = 300) -> str:
    """The first line of an error; libraries go on for many."""
    return flat(str(error).strip().split("\n")[0], limit) or type(error).__name__


def one_line(error: BaseException) -> str:
    """What went wrong, for someone who wants to fix a command and not to read kdpipe."""
    text, first = flat(error), first_line(error, None)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        return f"out of memory; lower train.batch_size or the image size ({first})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror}; existing files are intact: free some space, or choose another output_dir or "
            f"dataset.cache_dir, and run the same command to continue"
        )
    if "disk is full" in text:  # SQLite's, passed on by MLflow
        return (
            "the disk of the MLflow store is full; existing data is intact: free some space and run the same command "
            "to continue"
        )
    if isinstance(error, OSError) and error.filename is not None:
        keys = "output_dir, dataset.root and dataset.cache_dir"
        return f"{error.filename}: {error.strerror}; {keys} set where kdpipe reads and writes"
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text} (HYDRA_FULL_ERROR=1 shows the traceback)"
