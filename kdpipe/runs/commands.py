"""Commands that are printed for a user to run next."""

import shlex

from kdpipe.settings.composition import Invocation
from kdpipe.settings.schema import NetworkSettings, Settings


def compare_command(settings: Settings) -> str:
    """The command that compares the runs of the experiment."""
    experiment = ["--experiment", settings.tracking.experiment]
    return shlex.join(["python", "-m", "kdpipe.compare", *experiment, *_store_flags(settings)])


def export_command(settings: Settings, run_id: str) -> str:
    """The command that exports a run's network."""
    out = ["--out", settings.model.name]
    return shlex.join(["python", "-m", "kdpipe.export", run_id, *out, *_store_flags(settings)])


def _store_flags(settings: Settings) -> list[str]:
    """What tells a command on finished runs where they are."""
    flags = ["--uri", settings.tracking.uri] if settings.tracking.uri else []
    return flags + (["--output-dir", settings.output_dir] if settings.output_dir != "outputs" else [])


def teacher_command(settings: Settings, invocation: Invocation) -> str:
    """The command that trains the teacher that a command asks for."""
    overrides = []
    experiment, choices = "teacher", invocation.choices
    if str(choices.get("experiment")).startswith("benchmark/"):  # whose pairs name the teacher themselves
        experiment = "benchmark/teacher"
        overrides.append(f"model={choices['model@teacher']}")
        if isinstance(settings.teacher, NetworkSettings) and "shortcut" in settings.teacher.arguments:
            overrides.append(f"model.shortcut={settings.teacher.arguments['shortcut']}")
    for override in invocation.overrides:
        key, _, value = override.partition("=")
        if key == "model@teacher":
            overrides.append(f"model={value}")
        elif key.startswith("teacher.") and key != "teacher.weights":
            overrides.append(f"model.{key.removeprefix('teacher.')}={value}")
        elif key == "dataset" or key.startswith(("dataset.", "tracking.", "output_dir")):
            overrides.append(override)
    folders = [f"--config-dir={folder}" for folder in invocation.config_dirs]
    return shlex.join(["python", "-m", "kdpipe", *folders, f"experiment={experiment}", *overrides])
