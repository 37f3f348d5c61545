"""Finished runs as they were after an earlier epoch, or with the weights that they did not select."""

from dataclasses import replace

from kdpipe.compare.records import RunSource
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.metric_names import LAST_EPOCH, METRICS, Select, ending
from kdpipe.tracking import RunRecord

# With these, the first epochs are the same however many follow.
SAME_FROM_THE_START = ("kdpipe.training.schedules.constant", "kdpipe.training.schedules.multistep")
# Metrics of the weights themselves, beside the accuracies: those of the other weights are not known.
OF_THE_WEIGHTS = ("test/", "selected/", "teacher/agreement", "teacher/kl", "model/temperature")


class OtherWeights:
    """The runs of another source, with the accuracies of other weights. Teachers stay as they are; students whose other
    weights were not tested are left out.

    Args:
        epoch: the runs as if they had ended after this epoch (None: at their end). Needs `train.test_each_epoch`, and a
            learning rate that does not depend on the number of epochs.
        select: the weights of the last epoch, the best by validation, or the averaged ones (None: as each run
            selected).

    Attributes:
        note: what the accuracies are, for a reader of the comparison.
    """

    def __init__(self, source: RunSource, epoch: int | None, select: Select | None) -> None:
        self._source, self._epoch, self._select = source, epoch, select
        self._students: set[str] = set()
        self._left_out = 0

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def experiment(self) -> str:
        return self._source.experiment

    @property
    def note(self) -> str:
        chosen = {"last": "the last weights", "best": "the best weights by validation", "ema": "the averaged weights"}
        weights = chosen[self._select] if self._select else "the selected weights"
        when = "within" if self._select == "best" else "after"
        after = f" {when} {self._epoch} epochs" if self._epoch else ""
        left_out = f"; runs without a test of these weights are left out: {self._left_out}" if self._left_out else ""
        return f"accuracies are those of {weights}{after}{left_out}"

    def finished_runs(self) -> list[RunRecord]:
        """Raises ConfigError if no student's other weights were tested."""
        found = []
        self._left_out = 0
        records = self._source.finished_runs()
        for record in records:
            if record.tags["kdpipe.stage"] == "teacher":
                found.append(record)
            elif changed := self._changed(record):
                self._students.add(record.id)
                found.append(changed)
            else:
                self._left_out += 1
        if records and not self._students:
            if self._epoch:
                problem = "no run tested it: they need train.test_each_epoch=true, and a scheduler such as constant"
                raise ConfigError("--epoch", self._epoch, problem=problem)
            raise ConfigError("--select", self._select, problem="no run has tested these weights")
        return found

    def get_run(self, run_id: str) -> RunRecord | None:
        return self._source.get_run(run_id)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        points = self._source.history(run_id, metric)
        return [(epoch, value) for epoch, value in points if self._epoch is None or epoch <= self._epoch]

    def read(self, run_id: str, name: str) -> bytes | None:
        """None for students: what they have stored is of the weights that they selected."""
        return None if run_id in self._students else self._source.read(run_id, name)

    def _changed(self, record: RunRecord) -> RunRecord | None:
        own = record.params.get("train.select", "last")
        epochs = int(record.metrics.get(LAST_EPOCH, record.params["train.epochs"]))
        select, last = self._select or own, self._epoch or epochs
        if last > epochs or (last < epochs and record.params.get("scheduler._target_") not in SAME_FROM_THE_START):
            return None
        chosen_by = record.params.get("train.metric", "accuracy")
        validated = {name: dict(self.history(record.id, f"val/{name}{ending(select)}")) for name in METRICS}
        choice = validated[chosen_by]
        epoch = max(choice, key=choice.__getitem__, default=None) if select == "best" else last  # the first best
        if epoch is None:
            return None
        # At the run's end there are the metrics of both; the history has the selected weights' there.
        suffix = "" if select == own else f"_{select}"
        tested = {
            f"test/{name}": record.metrics.get(f"test/{name}{suffix}")
            if last == epochs
            else dict(self._source.history(record.id, f"test/{name}{ending(select)}")).get(epoch)
            for name in METRICS
        }
        if tested["test/accuracy"] is None:
            return None
        metrics = {key: value for key, value in record.metrics.items() if not key.startswith(OF_THE_WEIGHTS)}
        metrics |= {name: value for name, value in tested.items() if value is not None}
        metrics |= {f"selected/{name}": values[epoch] for name, values in validated.items() if epoch in values}
        params = {**record.params, "train.select": select}
        if self._epoch:
            params["train.epochs"] = str(last)
        seconds = record.seconds if last == epochs else float("nan")
        return replace(record, params=params, metrics=metrics, seconds=seconds)
