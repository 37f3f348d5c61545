"""`make bench`: kdpipe compared with the tutorial's loop and with the compute limit, measured in turns.

The compute limit is the same model stepping on one batch that is resident on the device, resized and normalised, with
everything set as kdpipe sets it. The tutorial's loop runs in a process of its own, because some of these settings hold
for a whole process.

Machines are shared and noisy: only ratios count, of figures measured right after each other, as the median over
sections of the data. Slow lines (marked ~) come from the rates of 30 steps.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import tutorial

from kdpipe.assembly.datasets import build_data
from kdpipe.assembly.devices import use_hardware
from kdpipe.assembly.epoch_views import build_views
from kdpipe.assembly.networks import build_network
from kdpipe.assembly.objectives import build_loss, build_optimizer
from kdpipe.data import ImageDataset, PerImageValues, split
from kdpipe.data.augmentation import Views
from kdpipe.data.dataset import Source
from kdpipe.losses import CrossEntropy
from kdpipe.models.weights import save_weights
from kdpipe.settings.composition import CONF, compose_settings, register_resolvers
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware
from kdpipe.system.progress import progress
from kdpipe.tracking import Tracker
from kdpipe.training.checkpoint import save_checkpoint
from kdpipe.training.loop import Hooks, Recipe, train_epoch
from kdpipe.training.observed import Observed
from kdpipe.training.precomputed import OutputRequest, compute_outputs
from kdpipe.training.state import Training
from kdpipe.training.teacher import FrozenTeacher

EPOCH = 50_000  # images, whatever the number measured on
SECTIONS = 10
SLOW_STEPS = 3  # of each slow loop in each section
TEACHER = "densenet121"
# What augmentations are held against, and what they may cost.
AUGMENTED, AUGMENTED_BATCH = "resnet20", 128
COST_GOALS = {"crop_flip": 0.05, "flip": 0.05, "random_resized_crop": 0.05}
COST_GOAL = 0.25  # of the others


class Bench:
    """The data, the networks and how they are measured; `more` are overrides of the config."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, more: Sequence[str] = ()) -> None:
        register_resolvers()
        self.folder = folder
        data = ["dataset=digits"]  # for whole runs
        if arguments.root:
            data = ["dataset=image_folder", f"dataset.root={arguments.root}", f"dataset.cache_dir={folder}/images"]
        self.overrides = [*data, f"model={arguments.model}", f"train.device={arguments.device}", *more]
        self.model_name = arguments.model
        self.hardware: Hardware = use_hardware(self.config("loss=cross_entropy"))
        if arguments.root:
            whole = build_data(self.config("dataset.val_fraction=0").dataset)
            self.what = f"{arguments.root.name}, {len(whole.splits['train']):,} training images"
        else:
            whole = random_images(arguments.images or 5_000)
            self.what = "random images, for there are no others (--root FOLDER)"
        train = whole.splits["train"][torch.randperm(len(whole.splits["train"]), generator=torch.manual_seed(0))]
        train = train[: arguments.images]
        self.data = replace(whole, splits={"train": train}).moved_to(self.hardware.device)
        self.sections = list(train.chunk(SECTIONS))

    def config(self, *overrides: str) -> Settings:
        return compose_settings([*self.overrides, *overrides])

    def model(self, *overrides: str) -> Any:
        config = self.config("model.weights=null", *overrides)
        torch.manual_seed(0)
        return build_network("model", config.model, self.data, config.model.freeze).to(self.hardware.device)

    def epoch(
        self,
        learner: nn.Module,
        data: ImageDataset,
        loss: str = "cross_entropy",
        teacher: FrozenTeacher | None = None,
        batch_size: int = tutorial.BATCH_SIZE,
    ) -> Callable[[Tensor], float]:
        """A function that trains on the images at some positions and says how many it took a second."""
        config = self.config(f"loss={loss}")
        criterion = build_loss(config)
        optimizer, scheduler = build_optimizer(config, learner, criterion, len(data.labels))

        def train(positions: Tensor) -> float:
            metrics = train_epoch(
                Training(Observed(learner), criterion, optimizer, scheduler, self.hardware),
                replace(data, splits={"train": positions}),
                Recipe(epochs=1, batch_size=batch_size, seed=0, teacher=teacher),
                Hooks(),
            )
            return metrics["train/images_per_second"]

        return train

    def limit(self) -> Callable[[int], float]:
        """A function that makes so many steps on one resident batch and says how many images it took a second."""
        model = self.model()
        optimizer, _ = build_optimizer(self.config("loss=cross_entropy"), model, CrossEntropy(), 1)
        batch = self.data.splits["train"][: tutorial.BATCH_SIZE]
        with torch.no_grad():
            pixels = model.preprocess(self.data.images[batch].to(self.hardware.device))
        labels = self.data.labels[batch].to(self.hardware.device)
        model.train()

        def step() -> None:
            with self.hardware.autocast():
                logits = model.network(pixels).float()
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()

        def steps(number: int) -> float:
            def work() -> None:
                for _ in range(number):
                    step()

            return number * len(batch) / self.seconds(work)

        return steps

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronise()
        started = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - started

    def synchronise(self) -> None:
        if self.hardware.device.type == "cuda":
            torch.cuda.synchronize(self.hardware.device)


class TutorialLoop:
    """The tutorial's loop in a process of its own, where PyTorch and the C library are as they come."""

    def __init__(
        self, data: ImageDataset, device: torch.device, model: nn.Module, teacher: nn.Module | None = None
    ) -> None:
        self.connection, far_end = multiprocessing.Pipe()
        networks = []
        for network in (model, teacher):
            if network:
                network = network.cpu().to(memory_format=torch.contiguous_format)
                vars(network).pop("imagenet_weights", None)  # a closure, which cannot be sent
            networks.append(network)
        arguments = (far_end, data.images[torch.arange(len(data.labels))].cpu(), data.labels.cpu(), device, *networks)
        multiprocessing.get_context("spawn").Process(target=serve_tutorial, args=arguments, daemon=True).start()

    def rate(self, positions: Tensor, steps: int | None = None) -> float:
        """Images a second, in so many steps on the images at some positions (None: in an epoch of them)."""
        self.connection.send((positions.cpu(), steps))
        rate: float = self.connection.recv()
        return rate


def serve_tutorial(
    connection: Connection,
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    model: nn.Module,
    teacher: nn.Module | None,
) -> None:
    """Train as long as somebody asks for it."""
    warnings.filterwarnings("ignore", category=UserWarning)
    model.to(device)
    if teacher:
        teacher.to(device)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=1e-3, amsgrad=True)
    with suppress(EOFError):
        while True:
            positions, steps = connection.recv()
            loop = tutorial.train(model, optimizer, images[positions], labels[positions], device, teacher)
            started = time.perf_counter()
            seen = sum(islice(loop, steps))  # each step waits for its loss
            connection.send(seen / (time.perf_counter() - started))


def random_images(number: int) -> ImageDataset:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=draw)
    source = Source(images, torch.arange(number) % 10, tuple("abcdefghij"))
    return split(source, "random", train_fraction=1, val_fraction=0, test_fraction=0.1, split_seed=0)


def loops(bench: Bench) -> dict[str, Any]:
    """Student alone, distilling, and a teacher's head: each section of the data once through every loop."""
    data, device = bench.data, bench.hardware.device
    teacher_overrides = [f"model={TEACHER}", "model.freeze=none"]
    teacher = FrozenTeacher(bench.model(*teacher_overrides))
    classes = data.num_classes
    everything = torch.arange(len(data.labels), device=data.splits["train"].device)
    # What the answers are does not matter for the time that it takes to look them up.
    teacher.remember([PerImageValues(everything, torch.randn(len(everything), classes, device=everything.device))])

    ours_alone = bench.epoch(bench.model(), data)
    ours_distilling = bench.epoch(bench.model(), data, "kd", teacher)
    limit = bench.limit()
    frozen = bench.model(f"model={TEACHER}", "model.freeze=backbone")
    with torch.no_grad():
        width = frozen.eval().features(data.images[torch.arange(2)].to(device)).shape[1]
    features = PerImageValues(everything, torch.randn(len(everything), width, device=everything.device))
    ours_head = bench.epoch(frozen.head, replace(data, images=features))

    def ours_pass(positions: Tensor) -> float:
        question = OutputRequest("features", TEACHER, frozen.eval(), frozen.features, data, positions.sort().values)
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            seconds = bench.seconds(
                lambda: compute_outputs(question, (1, len(positions), width), Path(folder), bench.hardware)
            )
        return len(positions) / seconds

    plain_teacher = bench.model(*teacher_overrides).network
    theirs_alone = TutorialLoop(data, device, bench.model().network)
    theirs_distilling = TutorialLoop(data, device, bench.model().network, plain_teacher)
    theirs_head = TutorialLoop(data, device, bench.model(f"model={TEACHER}", "model.freeze=backbone").network)
    rates: dict[str, list[float]] = {}
    slow = SLOW_STEPS * tutorial.BATCH_SIZE
    for number, section in enumerate([bench.sections[0], *bench.sections]):
        steps = max(1, len(section) // tutorial.BATCH_SIZE)
        measured = {
            "ours alone": ours_alone(section),
            "limit": limit(steps),
            "ours distilling": ours_distilling(section),
            "tutorial alone": theirs_alone.rate(section),
            "tutorial distilling": theirs_distilling.rate(section, SLOW_STEPS),
            "ours head": ours_head(section),
            "ours backbone": ours_pass(section[: 2 * slow]),
            "tutorial head": theirs_head.rate(section, SLOW_STEPS),
        }
        if number == 0:
            continue  # a warm-up
        for name, rate in measured.items():
            rates.setdefault(name, []).append(rate)
        print(f"section {number} of {SECTIONS}: " + ", ".join(f"{k} {v:,.0f}" for k, v in measured.items()), flush=True)
    return rates


def loop_lines(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    def images_per_second(name: str) -> str:
        return f"{statistics.median(rates[name]):,.0f}"

    # Ten epochs: the backbone once and the head ten times, or all of it ten times.
    ten_epochs = [
        (10 / theirs) / (1 / backbone + 10 / head)
        for theirs, backbone, head in zip(
            rates["tutorial head"], rates["ours backbone"], rates["ours head"], strict=True
        )
    ]
    alone, limit = images_per_second("ours alone"), images_per_second("limit")
    distilling = images_per_second("ours distilling")
    return [
        line(
            "student alone, of the compute limit",
            ratio("ours alone", "limit"),
            ">=",
            0.85,
            f"{alone} of {limit} images/s",
        ),
        line(
            "student alone, vs. the tutorial's loop",
            ratio("ours alone", "tutorial alone"),
            ">=",
            2,
            f"{alone} and {images_per_second('tutorial alone')} images/s",
        ),
        line(
            "distilling, an epoch after the first, vs. alone",
            ratio("ours alone", "ours distilling"),
            "<=",
            1.05,
            f"{distilling} and {alone} images/s",
        ),
        line(
            "~ distilling, vs. the tutorial's loop",
            ratio("ours distilling", "tutorial distilling"),
            ">=",
            40,
            f"{distilling} and {images_per_second('tutorial distilling')} images/s",
        ),
        line(
            "~ a teacher's head, 10 epochs, vs. the tutorial's loop",
            statistics.median(ten_epochs),
            ">=",
            5,
            f"backbone {images_per_second('ours backbone')}, head {images_per_second('ours head')}; "
            f"{images_per_second('tutorial head')} images/s",
        ),
    ]


def line(name: str, value: float, sign: str, goal: float, details: str) -> dict[str, Any]:
    met = value >= goal if sign == ">=" else value <= goal
    return {"line": name, "value": round(value, 4), "goal": f"{sign} {goal:g}", "met": met, "details": details}


def augmentation_lines(bench: Bench) -> list[dict[str, Any]]:
    """What each augmentation adds to an epoch without one: the time that the views of a section take, of the time that
    training on it takes. Epochs with and without differ by less than they do by themselves on a busy machine."""
    train = bench.epoch(bench.model(f"model={AUGMENTED}"), bench.data, batch_size=AUGMENTED_BATCH)
    options = sorted(file.stem for file in (CONF / "augmentation").glob("*.yaml") if file.stem != "none")
    all_views = {name: build_views(bench.config(f"augmentation={name}"), bench.data) for name in options}
    shares: dict[str, list[float]] = {name: [] for name in options}
    for number, section in enumerate([bench.sections[0], *bench.sections]):
        training = len(section) / train(section)
        for name, views in all_views.items():
            assert views
            seconds = bench.seconds(partial(augment_section, bench, views, section))
            if number > 0:  # the first one warms up
                shares[name].append(seconds / training)
    return [
        line(
            f"{name}, of an epoch",
            statistics.median(found),
            "<=",
            COST_GOALS.get(name, COST_GOAL),
            f"{AUGMENTED}, batch {AUGMENTED_BATCH}; from {min(found):.1%} to {max(found):.1%}",
        )
        for name, found in shares.items()
    ]


def augment_section(bench: Bench, views: Views, section: Tensor) -> None:
    """All that an epoch does for the views of some images."""
    draws = views.draws(1)[section.cpu()].to(bench.hardware.device)
    images = bench.data.images
    for batch, own in zip(section.split(AUGMENTED_BATCH), draws.split(AUGMENTED_BATCH), strict=True):
        views.augment(images[batch].to(bench.hardware.device), own)


def sweep_lines(bench: Bench, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """12 distilled students and 12 students alone, one command: `python -m kdpipe experiment=sweep …`."""
    output = bench.folder / "sweep"
    weights = bench.folder / "teacher.safetensors"
    save_weights(bench.model(f"model={TEACHER}").network, weights, build_data(bench.config().dataset).class_names)
    share = (arguments.images or EPOCH) / EPOCH if arguments.root else 1
    command = [sys.executable, "-m", "kdpipe", "experiment=sweep", *bench.overrides, f"output_dir={output}"]
    command += [f"model@teacher={TEACHER}", f"teacher.weights={weights}", "train.epochs=1"]
    command += [f"dataset.train_fraction={min(1.0, share):g}", "loss.alpha=0,0.5", "loss.temperature=5"]
    command += ["seed=range(12)", "evaluation.timing_seconds=0"]
    run(command, output)
    tracker = Tracker(f"sqlite:///{output.resolve()}/mlflow.db", "kdpipe", output / "mlartifacts", create=False)
    found = tracker.finished_runs()
    alone = [record.seconds for record in found if record.tags["kdpipe.stage"] == "student"]
    distilled = [record.seconds for record in found if record.tags["kdpipe.stage"] == "distill"]
    logs = "".join(file.read_text() for file in (output / "runs").glob("*/kdpipe.log"))
    worked_out = re.findall(r"logits of \S+ for ([\d,]+) images .*: computed in ([\d.]+) s", logs)
    passes = [float(seconds) for _, seconds in worked_out]  # over the training images, and over the test images
    most = max(Counter(images for images, _ in worked_out).values(), default=0)
    assert len(alone) == len(distilled) == 12, (len(alone), len(distilled))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [
        line("sweep of 12 cells, teacher's passes over the same images", most, "<=", 1, f"{sum(passes):,.0f} s"),
        line(
            "sweep of 12 cells, of 12 students alone and these passes",
            sum(distilled) / (sum(alone) + sum(passes)),
            "<=",
            1.1,
            f"{sum(distilled):,.0f} s and {sum(alone):,.0f} s + {sum(passes):,.0f} s",
        ),
        line("memory of that sweep at its peak, GB", peak / 1e9, "<=", 2.5, "resident"),
    ]


def run(command: list[str], log_folder: Path, **environment: str) -> str:
    log_folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    (log_folder / "log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stderr


def bookkeeping_line(bench: Bench, images_per_second: float) -> dict[str, Any]:
    """What an epoch costs besides its training: a line of metrics, a checkpoint, a progress bar, metrics; a thread logs
    them to MLflow."""
    folder = bench.folder / "books"
    folder.mkdir()
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "bench", folder / "artifacts")
    metrics = {f"train/{name}": 0.5 for name in "abcdefgh"}
    model = bench.model()
    loss = CrossEntropy()
    optimizer, scheduler = build_optimizer(bench.config("loss=cross_entropy"), model, loss, 1)
    training = Training(Observed(model), loss, optimizer, scheduler, bench.hardware)
    with tracker.run("bench", folder, {}, {}) as current:
        logging = statistics.median(bench.seconds(partial(current.log, metrics, n)) for n in range(20))

        def save() -> None:
            save_checkpoint(folder, {"training": training.state(), "history": current.rows})
            current.commit()

        saving = statistics.median(bench.seconds(save) for _ in range(5))

    steps = EPOCH // tutorial.BATCH_SIZE
    totals = torch.zeros(3, device=bench.hardware.device)
    logits = torch.randn(tutorial.BATCH_SIZE, 10, device=bench.hardware.device)
    labels = torch.zeros(tutorial.BATCH_SIZE, dtype=torch.int64, device=bench.hardware.device)

    def bar_and_metrics() -> None:
        with Path(os.devnull).open("w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                with progress("epoch", EPOCH) as bar:
                    for _ in range(steps):
                        for total in totals:
                            total += (logits.argmax(dim=1) == labels).sum()
                        bar.advance(tutorial.BATCH_SIZE)
                        if bar.wants_note():
                            bar.note(f"{totals[0].item():.1%}")
            finally:
                sys.stdout = stdout

    os.environ["FORCE_COLOR"] = "1"  # rich takes the file for a terminal
    showing = statistics.median(bench.seconds(bar_and_metrics) for _ in range(3))
    del os.environ["FORCE_COLOR"]
    epoch = EPOCH / images_per_second
    details = f"line {logging:.3f} s, checkpoint {saving:.3f} s, bar and metrics {showing:.3f} s of {epoch:.1f} s"
    return line(
        "tracking, checkpoint, bar, metrics, of an epoch", (logging + saving + showing) / epoch, "<=", 0.02, details
    )


FIRST_STEP = """
import os, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
def stop(*_):
    seconds = time.clock_gettime(time.CLOCK_MONOTONIC) - float(os.environ["STARTED"])
    print(f"first step after {seconds:.2f} s", file=sys.stderr, flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
from kdpipe.main import cli
cli()
"""


def start_lines(bench: Bench) -> list[dict[str, Any]]:
    """From the command to the first training step, with the images' cache filled."""
    totals, ours = [], []
    for number in range(7):
        folder = bench.folder / "start"
        counted = ["-X", "importtime"] if number % 2 == 0 else []  # which takes time itself
        command = [sys.executable, *counted, "-c", FIRST_STEP, "experiment=student", *bench.overrides]
        command += [f"output_dir={folder}", "train.resume=never"]
        text = run(command, folder, STARTED=str(time.clock_gettime(time.CLOCK_MONOTONIC)))
        total = float(re.findall(r"first step after ([\d.]+) s", text)[0])
        imports = sum(map(int, re.findall(r"^import time: +(\d+) \|", text, re.MULTILINE))) / 1e6
        if number == 0:
            continue  # it made the store
        if counted:
            ours.append(total - imports)
        else:
            totals.append(total)
    total, own = statistics.median(totals), statistics.median(ours)
    remark = f"{total - own:.1f} s of it imports: PyTorch, the compiler that its optimizers load, MLflow, scikit-learn"
    return [
        line("start to first step on a warm cache, s", total, "<=", 10, remark),
        line("of which ours, s", own, "<=", 2, "all but imports"),
    ]


def machine(hardware: Hardware) -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())
        model = names[0] if names else model
    return f"{os.cpu_count()} cores of {model}, PyTorch {torch.__version__}, on {hardware.described}"


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "| work | measured | goal | |"
    yield "| --- | ---: | ---: | --- |"
    for row in lines:
        value = (
            f"{row['value']:.1%}"
            if "of an epoch" in row["line"] or "compute limit" in row["line"]
            else f"{row['value']:,.3g}"
        )
        yield f"| {row['line']} | {value} | {row['goal']} {'' if row['met'] else '**missed**'} | {row['details']} |"


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=lambda text: Path(text).resolve(),
        help="class folders, such as CIFAR-10's; default: random images",
    )
    parser.add_argument("--images", type=int, help="training images to measure on (default: all, or 5,000 random ones)")
    parser.add_argument("--model", default="student_cnn", help="an option of the group model (default: student_cnn)")
    parser.add_argument("--device", default="auto", help="as train.device (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"), help="(default: outputs/bench.json)")
    only = "measure nothing but what each augmentation costs"
    parser.add_argument("--only-augmentation", action="store_true", help=only)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-") as folder:
        bench = Bench(arguments, Path(folder))
        print(f"{machine(bench.hardware)}; {bench.model_name} and {TEACHER}; {bench.what}", flush=True)
        augmenting = augmentation_lines(bench)
        if arguments.only_augmentation:
            print("\n".join(table(augmenting)))
            return
        rates = loops(bench)
        lines = [*loop_lines(rates), *augmenting]
        lines += [bookkeeping_line(bench, statistics.median(rates["ours alone"])), *start_lines(bench)]
        print("\n".join(table(lines)), flush=True)
        lines += sweep_lines(bench, arguments)
        print("\n".join(table(lines)))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(bench.hardware), "data": bench.what, "model": bench.model_name, "lines": lines}
        arguments.out.write_text(json.dumps(content | {"images_per_second": rates}, indent=1) + "\n")
        print(f"as JSON: {arguments.out}")


if __name__ == "__main__":
    main()
