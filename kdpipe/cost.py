"""`python -m kdpipe.cost RUN`: what a finished run's network costs beside its teacher, measured again, for longer."""

import argparse
import os

import torch

from kdpipe.evaluation.costs import BATCH, cost
from kdpipe.evaluation.report import cost_table
from kdpipe.models import Classifier, Ensemble
from kdpipe.runs.command_line import add_store_arguments, existing_store, run_command
from kdpipe.runs.names import IMAGE_SHAPE, TIMED_ON
from kdpipe.settings.checks import check_number
from kdpipe.system.hardware import Hardware, check_there, prepare
from kdpipe.system.timing import threads


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.cost",
        description="Measure what a finished run's network costs beside its teacher, and log it to the run.",
    )
    parser.add_argument("run", help="the run's id, or runs:/<run id>")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of timing, without the warm-up (default: %(default)g)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads beside one (default: PyTorch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    add_store_arguments(parser)
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> str:
    """The table, and what was logged where.

    Raises:
        ValueError: no such run, one without weights, or a value that will not do.
    """
    check_number("--seconds", arguments.seconds, above=0)
    if arguments.threads is not None:
        check_number("--threads", arguments.threads, low=1, high=os.cpu_count() or 1, integer=True)
    uri = existing_store(arguments)
    check_there("--device", arguments.device)
    device = torch.device(arguments.device)
    prepare(device)

    # Seconds of imports, after what can fail sooner.
    from kdpipe.assembly.finished_runs import open_run, teacher_if_there
    from kdpipe.tracking import RunStore

    store = RunStore(uri)
    finished = open_run(arguments.run, store)
    networks: dict[str, Classifier | Ensemble] = {"model": finished.classifier.to(device)}
    teacher, notes = teacher_if_there(finished, store)
    if teacher:
        networks["teacher"] = teacher[0].to(device)
    images = torch.randint(0, 256, (BATCH, *finished.image_shape), dtype=torch.uint8)
    hardware = Hardware(device)
    with threads(arguments.threads or torch.get_num_threads()):
        found = cost(networks, images, hardware, arguments.seconds)
        where = hardware.machine
    if notes:  # its times of earlier would stand beside those of today
        logged = "not logged"
    else:
        store.log_metrics(finished.record.id, found, int(finished.record.params["train.epochs"]))
        store.set_tag(finished.record.id, TIMED_ON, where)
        logged = f"logged to run {finished.record.id}"
    names = {"model": finished.name, "teacher": teacher[1] if teacher else ""}
    lines = [cost_table(found, names), *notes]
    if IMAGE_SHAPE not in finished.record.tags:
        shape = "×".join(map(str, finished.image_shape))
        lines.append(f"the run does not tell the shape of its images: {shape} is what its network looks at")
    return "\n".join([*lines, f"measured on {where}; {logged}"])


if __name__ == "__main__":
    run_command("kdpipe.cost", lambda: run(arguments_of()))
