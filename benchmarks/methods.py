"""`make bench-methods`: how fast a student learns by each method, compared with plain kd; what each needs and learns.

The teacher's answers are known, as they are where every epoch sees the same images. All methods take turns on the same
sections of the images, and each is held against kd on the same section: the median of these ratios counts.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from bench import Bench, machine

from kdpipe.assembly.networks import build_network
from kdpipe.assembly.objectives import build_loss, build_optimizer, fit_loss
from kdpipe.data import PerImageValues
from kdpipe.settings.composition import CONF
from kdpipe.settings.schema import NetworkSettings, Settings
from kdpipe.system.tables import markdown_table
from kdpipe.training.loop import Hooks, Recipe, train_epoch
from kdpipe.training.observed import Observed
from kdpipe.training.state import Training
from kdpipe.training.teacher import FrozenTeacher

NO_TEACHER = ("cross_entropy", "label_smoothing")
BATCH_SIZE = 64
SECTION = 10 * BATCH_SIZE


class Method:
    """A student that learns by one method, on one section after the other.

    Attributes:
        roles: the features it needs from both networks in addition to logits.
        learned: its own parameters, in addition to the student's.
    """

    def __init__(self, bench: Bench, name: str, teacher_name: str) -> None:
        config = bench.config(f"loss={name}", f"model@teacher={teacher_name}")
        torch.manual_seed(0)
        self.bench, self.name = bench, name
        self.loss = build_loss(config)
        self.roles = self.loss.roles
        model = bench.model()
        student = Observed(model, model.network, self.roles)
        self.teacher = None
        if name not in NO_TEACHER:
            assert isinstance(config.teacher, NetworkSettings)
            network = build_network("teacher", config.teacher, bench.data, "none").to(bench.hardware.device)
            self.teacher = self.taught_by(config, FrozenTeacher(network), student)
        self.learned = sum(parameter.numel() for parameter in self.loss.parameters())
        optimizer, scheduler = build_optimizer(config, model, self.loss, 1)
        self.training = Training(student, self.loss.to(bench.hardware.device), optimizer, scheduler, bench.hardware)

    def taught_by(self, config: Settings, teacher: FrozenTeacher, student: Observed) -> FrozenTeacher:
        """The teacher with answers for the first section, made up: what they are does not matter for the time."""
        data, device = self.bench.data, self.bench.hardware.device
        positions = data.splits["train"].sort().values
        teacher.observe(self.roles)
        fit_loss(config, self.loss, student, teacher, data, device)
        like = teacher.answer(data.images[positions[:2]].to(device))
        section = positions[:SECTION]
        rows = torch.rand(len(section), like.pack().shape[1], device=device)
        teacher.remember([PerImageValues(section, rows)], like)
        return teacher

    def rate(self) -> float:
        """Images a second, over one section."""
        data = self.bench.data
        section = data.splits["train"].sort().values[:SECTION]
        self.training.begin_epoch(1)
        metrics = train_epoch(
            self.training,
            replace(data, splits={"train": section}),
            Recipe(epochs=1, batch_size=BATCH_SIZE, seed=0, teacher=self.teacher),
            Hooks(),
        )
        return metrics["train/images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-methods", description=__doc__)
    parser.add_argument("--root", type=Path, help="class folders (default: random images)")
    parser.add_argument("--images", type=int, default=10_000, help="training images (default: %(default)s)")
    parser.add_argument("--model", default="resnet20", help="the student (default: %(default)s)")
    parser.add_argument("--teacher", default="resnet56", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    arguments = parser.parse_args()
    names = sorted(path.stem for path in (CONF / "loss").glob("*.yaml") if path.stem != "mutual")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        print(f"{machine(bench.hardware)}; {bench.what}; {arguments.teacher} → {arguments.model}, batch {BATCH_SIZE}")
        methods = {name: Method(bench, name, arguments.teacher) for name in names}
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(arguments.rounds + 1):
            for name, method in methods.items():
                rate = method.rate()
                if number > 0:  # the first one warms up
                    rates[name].append(rate)
        print(table(methods, rates))


def table(methods: dict[str, Method], rates: dict[str, list[float]]) -> str:
    rows = []
    for name, method in methods.items():
        rate = statistics.median(rates[name])
        ratio = statistics.median(mine / kd for mine, kd in zip(rates[name], rates["kd"], strict=True))
        asks = "nothing" if name in NO_TEACHER else ", ".join(method.roles) or "logits"
        rows.append([f"`{name}`", asks, f"{method.learned:,}", f"{rate:,.0f}", f"{ratio:.2f}"])
    return markdown_table(["loss", "needs", "extra parameters", "images/s", "vs. kd"], rows, left=(0, 1))


if __name__ == "__main__":
    main()
