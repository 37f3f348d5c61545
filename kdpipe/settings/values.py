"""Types of values with their ranges, checked by pydantic; an error names the key, the value and what was expected."""

import inspect
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, validate_call
from pydantic.fields import FieldInfo

from kdpipe.settings.errors import ConfigError, one_of, suggestion

P = ParamSpec("P")
R = TypeVar("R")

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]  # 0 and 1 included
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Resize = Literal["squeeze", "crop"]  # how images become a network's input
StoredResize = Literal["squeeze", "crop", "keep"]  # how photos become the images of a data set
Interpolation = Literal["bilinear", "bicubic"]
# Of images: those to train on, to validate on and to test on.
TrainShare = PositiveShare
ValidationShare = Annotated[float, Field(ge=0, lt=1)]
TestShare = Annotated[float, Field(gt=0, lt=1)]
MAX_SEED = 2**32 - 1  # of NumPy
SplitSeed = Annotated[int, Field(ge=0, le=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED}")]
LARGE_TEMPERATURE = 100  # above it, softened outputs need formulas that do not cancel
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def composed(names: Iterable[str]) -> tuple[str, ...]:
    """Names in Unicode's composed form (NFC), in which they are compared: macOS writes é as e with an accent (NFD)."""
    return tuple(unicodedata.normalize("NFC", name) for name in names)


def check_shares(validation: float, test: float | None) -> None:
    """Raise ConfigError where validation and test images leave none to train on."""
    if test is not None and validation + test >= 1:
        problem = f"no training images are left with val_fraction={validation}"
        raise ConfigError("test_fraction", test, "a sum below 1", problem)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function or a constructor against its annotations, strictly: no text where a number is
    meant, no number where true or false is.

    Raises:
        ConfigError: when it is called; the key is the argument's name.
    """
    validated = validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))(function)
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return validated(*args, **kwargs)
        except ValidationError as error:
            raise _argument_error(error, signature, hints) from None

    return call


def _argument_error(error: ValidationError, signature: inspect.Signature, hints: Mapping[str, Any]) -> ConfigError:
    first = error.errors()[0]
    names = list(signature.parameters)
    place = first["loc"][0]
    key = names[place] if isinstance(place, int) else str(place)
    if first["type"].startswith("missing"):
        return ConfigError(key, problem="a value is required")
    if key not in hints:
        known = [name for name in names if name != "self"]
        return ConfigError(key, first["input"], one_of(known), suggestion(key, known))
    return ConfigError(key, first["input"], _expected(hints[key], first["loc"][1:]))


def model_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """The first error of a model's values, under the dotted key where the value stands."""
    first = next((found for found in error.errors() if found["type"] == "value_error"), error.errors()[0])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    annotation: Any = model
    path: list[str] = []
    for part in first["loc"]:
        fields = _fields(annotation)
        if fields is None or part not in fields:
            break
        path.append(str(part))
        annotation = fields[str(part)]
    key = ".".join([*([prefix] if prefix else []), *path])
    if first["type"] == "missing":
        return ConfigError(key, problem="a value is required")
    if first["type"] == "extra_forbidden":
        known = [".".join([*path, name]) for name in _fields(annotation) or ()]
        key = ".".join(filter(None, [key, str(first["loc"][-1])]))
        return ConfigError(key, problem="; ".join(filter(None, ["no such key", suggestion(key, known)])))
    return ConfigError(key, first["input"], _expected(annotation, first["loc"][len(path) :]))


def _fields(annotation: Any) -> dict[str, Any] | None:
    """The annotations of a model's fields by the names that configs use; None for anything else."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return {
                field.alias or name: Annotated[field.annotation, field] for name, field in option.model_fields.items()
            }
    return None


def _expected(annotation: Any, inner: Sequence[object] = ()) -> str:
    """What was expected, in words; of an item of a list what the items are."""
    items = [get_args(option)[0] for option in _options(annotation) if _is_list(option)]
    return expected(items[0] if items and inner and isinstance(inner[0], int) else annotation)


def _options(annotation: Any) -> list[Any]:
    """The types that an annotation allows."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for option in get_args(annotation) for inner in _options(option)]
    return [annotation]


def takes_text(annotation: Any) -> bool:
    """Whether a value, or an item of a list of them, may be any text."""
    items = [get_args(option)[0] for option in _options(annotation) if _is_list(option) and get_args(option)]
    options = [*_options(annotation), *(inner for item in items for inner in _options(item))]
    return any(option in (str, Path, Any) for option in options)


def _is_list(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def expected(annotation: Any) -> str:
    """An annotation in words: "a number from 0 to 1", "one of A, B", "a list of whole numbers from 1, or null"."""
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        if described := next((part.description for part in metadata if isinstance(part, FieldInfo)), None):
            return described
        bounds = [bound for part in metadata for bound in getattr(part, "metadata", [part])]
        return " ".join([expected(base), *_limits(bounds)])
    if get_origin(annotation) is Literal:
        return one_of(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        words = [expected(option) for option in options]
        if len(options) < len(get_args(annotation)):
            words.append("null")
        return ", ".join(words[:-1]) + (f"{',' if ',' in words[0] else ''} or {words[-1]}")
    if _is_list(annotation):
        item = expected(get_args(annotation)[0])
        plural = item.replace("a whole number", "whole numbers").replace("a number", "numbers").replace("text", "names")
        return f"a list of {plural}"
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return simple.get(annotation) or f"a {getattr(annotation, '__name__', annotation)}"


def _limits(bounds: Sequence[Any]) -> list[str]:
    words = {"gt": "above", "ge": "from", "le": "to", "lt": "below"}
    found = {name: getattr(bound, name) for name in words for bound in bounds if hasattr(bound, name)}
    return [f"{words[name]} {limit:g}" for name, limit in found.items() if limit is not None]
