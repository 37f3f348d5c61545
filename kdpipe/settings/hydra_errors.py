"""What Hydra and OmegaConf say of a command line, in kdpipe's words: the key, the value, and what to write instead."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdpipe.settings.components import accepted_arguments
from kdpipe.settings.composition import CONF, GROUPS, keys_of_options, options_with
from kdpipe.settings.credentials import without_password
from kdpipe.settings.errors import ConfigError, as_typed, first_line, flat, folded, one_line, one_of, suggestion
from kdpipe.settings.identity import flatten
from kdpipe.settings.overrides import TEXT_KEYS

# Hydra's own settings that commands change.
HYDRA_SECTIONS = ("launcher", "sweeper", "run", "sweep", "job", "mode", "verbose", "output_subdir", "searchpath")
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)


def explain(error: BaseException, arguments: Sequence[str] | None = None) -> str:
    """`one_line` for errors of Hydra's and OmegaConf's as well, which are about the command line.

    Args:
        arguments: the overrides that the error is about; None for those of this process.
    """
    in_sweep = arguments is not None
    arguments = sys.argv[1:] if arguments is None else arguments
    cause: BaseException | None = error
    while isinstance(error, HYDRA_ERRORS) and cause:
        cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ConfigError):  # of a resolver, `${identity:}`
            return str(cause)
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, arguments)
    if isinstance(error, OverrideParseException):
        expected = "key=value without spaces around =" if "=" not in error.override.strip("=") else "key=value"
        key, equals, value = str(error.override).partition("=")
        shown = without_password(value.strip("'\""))  # all of it: this password may have spaces
        reason = f" ({first_line(error, None)})" if shown in value else ""  # which has parts of the value
        return (
            f"{key}{equals}{value if shown in value else shown}: cannot be parsed; expected {expected}, lists as "
            f"key=[1,2], text with special characters in quotes, 'key=\"value\"'{reason}"
        )
    if isinstance(error, HYDRA_ERRORS):
        return _bad_override(error, arguments, in_sweep)
    if str(error).startswith("Config group override must be a string"):
        for key, value in _words(arguments):
            if _group_of(key) and re.fullmatch(r"[-+.\w]+", value) and value not in _options(_group_of(key)):
                sets = f"{key.rpartition('@')[2]}.<key>=… sets a value in it"
                return str(ConfigError(key, value, f"{_no_such_option(key, value).expected}; {sets}"))
    return one_line(error)


def _words(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys, without + and ~, and the values of overrides."""
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and not word.startswith("-"):
            yield key.lstrip("+~"), value


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def _options(group: str) -> list[str]:
    """The options of a group, those in its folders (experiment=benchmark/…) last; bases are none."""
    files = [file.relative_to(CONF / group).with_suffix("") for file in (CONF / group).rglob("*.yaml")]
    return sorted((file.as_posix() for file in files if file.parts[0] != "base"), key=lambda name: ("/" in name, name))


def _group_of(key: str) -> str:
    """The group that a key chooses from, model for model@teacher; "" for other keys."""
    group = key.partition("@")[0]
    return group if group in _groups() or group.startswith("hydra/") else ""


def _unknown_option(error: MissingConfigException, arguments: Sequence[str]) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return first_line(error, None)
    options: Sequence[str] = error.options
    while group not in _groups() and "/" in group and not group.startswith("hydra/"):
        group, _, inner = group.rpartition("/")  # experiment=benchmark/…, a folder in a group
        option = f"{inner}/{option}"
    if group in _groups():
        options = sorted({*(options if "/" not in option else ()), *_options(group)}, key=lambda one: ("/" in one, one))
    key = next((key for key, value in _words(arguments) if _group_of(key) == group and option in value), group)
    return str(_no_such_option(key, option, options))


def _no_such_option(key: str, option: str, options: Sequence[str] = ()) -> ConfigError:
    """What to choose instead of an option that a group does not have."""
    group = _group_of(key)
    options = options or _options(group)
    near = suggestion(option, options)
    if group == "model" and folded(option) not in map(folded, options) and (network := _network_like(option)):
        library, name = network
        section = "teacher" if key == "model@teacher" else "model"
        near = f"did you mean {key}={library} {section}.name={name}?"
    elif group == "dataset" and ("/" in option or Path(option).expanduser().exists()):
        near = f"did you mean dataset=image_folder dataset.root={option}?"
    folders = sorted({name.partition("/")[0] for name in options if "/" in name})
    if not option.startswith(tuple(f"{folder}/" for folder in folders)):
        if option in folders:
            near = f"did you mean one of {', '.join(n for n in options if n.startswith(option))}?"
        options = [name for name in options if "/" not in name] + [f"{folder}/…" for folder in folders]
    else:
        options = [name for name in options if "/" in name]
    return ConfigError(key, option, one_of(options), near)


def _network_like(name: str) -> tuple[str, str] | None:
    """The library that has a network of this name, but for case and hyphens, and how that library writes it."""
    import torchvision.models  # for this message alone

    for network in torchvision.models.list_models(module=torchvision.models):
        if folded(network) == folded(name):
            return "torchvision", network
    try:
        import timm
    except ImportError:
        return None
    return next(
        (("timm", one) for one in (name, name.lower(), name.lower().replace("-", "_")) if timm.is_model(one)), None
    )


def _bad_override(error: BaseException, arguments: Sequence[str], in_sweep: bool) -> str:
    text = str(error).strip()
    if several := re.search(r"Ambiguous value for argument '(.+)'|Sweep parameters '(.+)' requires", text):
        override = several[1] or several[2]
        key, _, value = override.partition("=")
        text_in_quotes = f"; one value with a comma stands in quotes, '{key}=\"{value}\"'" if key in TEXT_KEYS else ""
        return f"{override}: several values are a sweep: python -m kdpipe -m {override} …{text_in_quotes}"
    if there := re.search(r"already at '([^']+)'|Multiple values for ([^\s.]+(?:\.\w+)*)\.", text):
        key = there[1] or there[2]
        value = next((value for name, value in _words(arguments) if name == key), "…")
        return f"+{key}={value}: there is such a key; write {key}={value}, without +"
    if absent := re.search(r"Could not (?:override|delete)(?: from config\.)? '([^']+)'", text):
        inner = _full_key(error)
        return _unknown_key(inner if inner.startswith(f"{absent[1]}.") else absent[1], arguments, in_sweep)
    if strange := re.search(r"Override (\S+?)=\S* looks like a config group override", text):
        return _unknown_key(strange[1], arguments, in_sweep)
    known = {name: value for name, value in _composed(arguments).items() if name != "hydra"}
    given = [key for key, _ in _words(arguments)]
    if missing := [key for key, value in flatten(known).items() if value == "???" and key not in given]:
        return f"{missing[0]}: a value is required, there is no default; expected {missing[0]}=…"
    lines = text.split("\n")
    return flat(" ".join(lines[:2] if lines[0].endswith(":") else lines[:1]))


def _full_key(error: BaseException) -> str:
    """The key within a value, `scheduler={gama: 3}`, that OmegaConf did not find."""
    cause = error.__cause__ or error.__context__
    return str(getattr(cause, "full_key", None) or "")


def _unknown_key(key: str, arguments: Sequence[str], in_sweep: bool) -> str:
    """What to write instead of a key that the config does not have."""
    if "@" in key or "/" in key:
        groups = [*_groups(), *GROUPS.values(), "hydra/sweeper"]
        return f"{key}: no such group; {suggestion(key, groups) or f'expected {one_of(groups)}'}"
    config = _composed(arguments)
    own = {name: value for name, value in config.items() if name != "hydra"}
    if key.startswith("hydra."):
        own = {"hydra": {name: value for name, value in config.get("hydra", {}).items() if name in HYDRA_SECTIONS}}
    known = flatten(own)
    section, _, name = key.rpartition(".")
    option = _chosen(section, config)
    siblings = [one for one in known if one.rpartition(".")[0] == section and section and one[-1] != "_"]
    if name in (accepted_arguments(config.get(section)) or ()):
        instead = f"+{key}=… adds it"
    elif option and (others := [one for one in options_with(section, name) if one != option]):
        instead = (
            f"{', '.join(others[:4])}{', …' if len(others) > 4 else ''} {'has' if len(others) == 1 else 'have'} it"
        )
        if in_sweep:
            instead += f"; ++{key}=… sets it where there is one and leaves it out elsewhere"
    else:
        sections = {part for dotted in known for part in _prefixes(dotted)}
        elsewhere = {f"{section}.{other}" for keys in keys_of_options(section).values() for other in keys}
        instead = suggestion(key, [*known, *sections, *_groups(), *sorted(elsewhere)])
        if not instead and siblings:
            instead = f"expected {one_of(siblings)}"
    where = f" with {option}" if option and not instead.endswith("?") else ""
    all_keys = f"python -m kdpipe --cfg {'hydra' if key.startswith('hydra.') else 'job'} lists all"
    between = "" if not instead else " " if instead.endswith("?") else "; "
    return f"{key}: no such key{where}; {instead}{between}{all_keys}"


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    yield from (".".join(parts[:number]) for number in range(1, len(parts)))


def _chosen(section: str, config: dict[str, Any]) -> str:
    """The option whose keys stand in a section, such as loss=kd; "" where no group fills it."""
    group = GROUPS.get(section, section)
    choices = config.get("hydra", {}).get("runtime", {}).get("choices", {})
    return f"{group}={as_typed(choices[group])}" if group in choices else ""


def _composed(arguments: Sequence[str]) -> dict[str, Any]:
    """The plain config of the command's choice of groups, whatever else is wrong with the command."""
    choices = []
    for key, value in _words(arguments):
        # A target knows keys of its own.
        if (_group_of(key) or key.endswith("._target_")) and value and not re.search(r"[,{\[(]", value):
            choices.append(f"{key}={value}")
    hydra = GlobalHydra.instance()
    before = hydra.hydra
    hydra.clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", choices, return_hydra_config=True), resolve=False)
    except Exception:  # only a help for the message of another error
        return {}
    finally:
        hydra.hydra = before
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
