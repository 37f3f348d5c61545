"""What a search chooses from, in Hydra's grammar: `interval(0,1)`, `choice(kd,dkd)`, `tag(log,interval(1,20))`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import FloatRange, IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.identity import canonical
from kdpipe.settings.overrides import names_as_typed

DIGITS = 4  # of a number that is chosen out of a range: people write it again
MARGIN = 1e-4  # of a range


@dataclass(frozen=True)
class Axis:
    """A setting that a search chooses.

    Attributes:
        key: as it was typed, `loss.alpha` or `++loss.alpha`.
        word: the whole override, `loss.alpha=interval(0,1)`.
    """

    key: str
    word: str
    distribution: BaseDistribution

    @property
    def name(self) -> str:
        """The setting."""
        return self.key.lstrip("+")

    @property
    def is_choice(self) -> bool:
        return isinstance(self.distribution, CategoricalDistribution)

    @property
    def is_endless(self) -> bool:
        """Whether it is a range of numbers without steps."""
        return isinstance(self.distribution, FloatDistribution) and self.distribution.step is None

    @property
    def is_group(self) -> bool:
        """Whether it chooses an option of a config group, such as `loss=kd`, which other settings depend on."""
        return self.is_choice and "." not in self.name

    @property
    def ends(self) -> list[str]:
        """Overrides with its smallest and its largest value, next to the ends of a range without steps; or with each of
        its choices."""
        if isinstance(self.distribution, CategoricalDistribution):
            return [self.written(value) for value in self.distribution.choices]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        return [self.written(self.distribution.low), self.written(self.distribution.high)]

    def written(self, value: object) -> str:
        """The override that sets a value."""
        if isinstance(value, float):
            value = _rounded(value, self.distribution)
        return f"{self.key}={value}"


@dataclass(frozen=True)
class Space:
    """What a search chooses, and what it does not.

    Attributes:
        fixed: the other overrides.
        seeds: of each trial.
    """

    axes: tuple[Axis, ...]
    fixed: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)

    @property
    def groups(self) -> list[Axis]:
        """Those that choose an option of a config group."""
        return [axis for axis in self.axes if axis.is_group]

    @property
    def values(self) -> list[Axis]:
        """Those that choose a value."""
        return [axis for axis in self.axes if not axis.is_group]

    @property
    def words(self) -> list[str]:
        """What is chosen, and for which seeds."""
        return [*(axis.word for axis in self.axes), f"seed={','.join(map(str, self.seeds))}"]

    @property
    def overrides(self) -> list[str]:
        """Those that `read_space` makes this space of."""
        return [*self.fixed, *self.words]

    def choices_of_groups(self) -> Iterator[list[str]]:
        """Each combination of the config groups' options, as overrides."""
        yield from map(list, product(*(axis.ends for axis in self.groups)))


def read_space(words: Sequence[str], parser: OverridesParser) -> Space:
    """The space of a command's overrides; the last one of a key counts.

    Raises:
        ConfigError: a range without values, or a tag that is not known.
    """
    axes: dict[str, Axis] = {}
    fixed: dict[str, str] = {}
    seeds: tuple[int, ...] = (0,)
    for override in parser.parse_overrides([names_as_typed(word) for word in words]):
        key = str(override.get_key_element())
        axes.pop(key, None)
        fixed.pop(key, None)
        if key == "seed":
            seeds = _seeds(override)
        elif override.is_sweep_override():
            axes[key] = Axis(key, str(override.input_line), _distribution(key, override))
        else:
            fixed[key] = str(override.input_line)
    if not axes:
        raise ConfigError("search.trials", expected="something to choose, such as loss.alpha='interval(0,1)'")
    return Space(tuple(axes.values()), tuple(fixed.values()), seeds)


def suggest(trial: Trial, space: Space, known: Callable[[Sequence[str]], Mapping[str, object]]) -> list[str]:
    """The overrides of a trial: options of groups first, then the settings that have an effect with these.

    Args:
        known: the flat settings that overrides compose, without those that have no effect.
    """
    words = [_suggested(trial, axis) for axis in space.groups]
    settings = known([*space.fixed, *words])
    return [*words, *(_suggested(trial, axis) for axis in space.values if has(settings, axis.name))]


def has(settings: Mapping[str, object], name: str) -> bool:
    """Whether flat settings have one, or a section of this name."""
    return name in settings or any(key.startswith(f"{name}.") for key in settings)


def _suggested(trial: Trial, axis: Axis) -> str:
    wanted = axis.distribution
    if isinstance(wanted, CategoricalDistribution):
        return axis.written(trial.suggest_categorical(axis.name, wanted.choices))
    if isinstance(wanted, IntDistribution):
        return axis.written(trial.suggest_int(axis.name, wanted.low, wanted.high, step=wanted.step, log=wanted.log))
    assert isinstance(wanted, FloatDistribution)
    return axis.written(trial.suggest_float(axis.name, wanted.low, wanted.high, step=wanted.step, log=wanted.log))


def _seeds(override: Override) -> tuple[int, ...]:
    if not override.is_sweep_override():
        values = [override.value()]
    elif override.is_discrete_sweep():
        values = list(override.sweep_iterator())
    else:
        raise ConfigError("seed", str(override.value()), "the seeds of each trial, such as range(5)")
    if not values or not all(isinstance(value, int) for value in values):
        raise ConfigError("seed", str(override.input_line).partition("=")[2], "integers, such as range(5)")
    return tuple(int(str(value)) for value in dict.fromkeys(values))


def _distribution(key: str, override: Override) -> BaseDistribution:
    """What a setting is chosen from."""
    typed, value = str(override.input_line).partition("=")[2], override.value()
    tags: set[str] = getattr(value, "tags", set())
    if unknown := sorted(tags - {"log"}):
        raise ConfigError(key, typed, "the tag log", f"unknown tag {unknown[0]}")
    if isinstance(value, IntervalSweep):
        return _range(key, typed, value.start, value.end, is_log="log" in tags)
    if tags:
        raise ConfigError(key, typed, "the tag log on an interval")
    if isinstance(value, RangeSweep) and not value.shuffle:
        found = list(override.sweep_iterator())
        if len(found) > 1:
            low, high, step = found[0], found[-1], found[1] - found[0]  # type: ignore[operator]
            if isinstance(value.range(), FloatRange):
                return FloatDistribution(float(low), float(high), step=float(step))  # type: ignore[arg-type]
            return IntDistribution(min(low, high), max(low, high), step=abs(step))  # type: ignore[type-var,arg-type]
    texts, values = list(override.sweep_string_iterator()), canonical(list(override.sweep_iterator()))
    if not texts:
        raise ConfigError(key, typed, "at least one value")
    if twice := [text for number, text in enumerate(texts) if values[number] in values[:number]]:
        raise ConfigError(key, twice[0], "each value once")
    return CategoricalDistribution(texts)


def _range(key: str, typed: str, low: object, high: object, is_log: bool) -> BaseDistribution:
    assert isinstance(low, int | float) and isinstance(high, int | float)
    if not low < high:
        raise ConfigError(key, typed, "interval(LOW,HIGH) with LOW below HIGH")
    if is_log and low <= 0:
        raise ConfigError(key, typed, "a logarithmic range that begins above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(float(low), float(high), log=is_log)


def _rounded(value: float, distribution: BaseDistribution) -> float:
    """A number as people write it, within its range. The ends of a range without steps do not belong to it: some
    methods take an alpha of 0, others one above it."""
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.step is None:
        low, high = low + MARGIN * (high - low), high - MARGIN * (high - low)
    return float(f"{min(max(float(f'{value:.{DIGITS}g}'), low), high):.{DIGITS + 4}g}")
