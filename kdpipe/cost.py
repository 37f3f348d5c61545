"""The command `python -m kdpipe.cost`: what a finished run's network costs compared with its teacher, timed again."""

import argparse
import os
from typing import Annotated

from kdpipe.runs.command_line import (
    add_store_arguments,
    add_wide_argument,
    check_flags,
    existing_store,
    run_command,
    table_width,
)
from kdpipe.runs.names import IMAGE_SHAPE, TIMED_ON


def cost_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.cost",
        description="Measure what a finished run's network costs compared with its teacher, and log it to the run.",
    )
    parser.add_argument("run", help="the run's id, or runs:/<run id>")
    parser.add_argument("--seconds", type=float, default=20, help="of timing, without the warm-up (default: 20)")
    parser.add_argument("--threads", type=int, help="CPU threads, as well as one (default: PyTorch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    add_wide_argument(parser)
    add_store_arguments(parser)
    return parser.parse_args(words)


def measure_cost(arguments: argparse.Namespace) -> str:
    """Measure, log, and return the table. Raises ValueError for an invalid flag, and a run without weights."""
    from pydantic import Field

    from kdpipe.settings.values import Positive

    check_flags(arguments, seconds=Positive)
    if arguments.threads is not None:
        check_flags(arguments, threads=Annotated[int, Field(ge=1, le=os.cpu_count() or 1)])
    uri = existing_store(arguments)

    # These imports take seconds, so they come after the quick checks.
    import torch

    from kdpipe.system.hardware import Hardware, check_available, prepare_device

    check_available("--device", arguments.device)
    device = torch.device(arguments.device)
    prepare_device(device)

    from kdpipe.assembly.finished_runs import open_run, teacher_if_there
    from kdpipe.evaluation.costs import BATCH, cost
    from kdpipe.evaluation.report import cost_table
    from kdpipe.models import Classifier, Ensemble
    from kdpipe.system.timing import threads
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
    logged = "not logged"
    if not notes:  # otherwise the teacher's times in the run would be older than the student's
        store.log_metrics(finished.record.id, found, int(finished.record.params["train.epochs"]))
        store.set_tag(finished.record.id, TIMED_ON, where)
        logged = f"logged to run {finished.record.id}"
    names = {"model": finished.name, "teacher": teacher[1] if teacher else ""}
    lines = [cost_table(found, names, table_width(arguments)), *notes]
    if IMAGE_SHAPE not in finished.record.tags:
        shape = "×".join(map(str, finished.image_shape))
        lines.append(f"the run does not store the shape of its images: measured with its network's input size, {shape}")
    return "\n".join([*lines, f"measured on {where}; {logged}"])


def cli() -> None:
    """`python -m kdpipe.cost`."""
    run_command("kdpipe.cost", lambda: measure_cost(cost_arguments()))


if __name__ == "__main__":
    cli()
