"""The tags of a run in MLflow. Its git tags, and those of its user, are the tracker's own."""

from kdpipe.assembly.parts import Parts
from kdpipe.runs.names import DUPLICATES, IMAGE_SHAPE, TIMED_ON, UNLABELLED_IMAGES
from kdpipe.settings.schema import Settings
from kdpipe.system.hardware import Hardware


def run_tags(settings: Settings, parts: Parts, hardware: Hardware) -> dict[str, str]:
    """What a run is found by, in MLflow's UI too."""
    tags = {**parts.tags, "kdpipe.data": parts.data.fingerprint, "kdpipe.hardware": hardware.described}
    tags[IMAGE_SHAPE] = "x".join(map(str, parts.data.image_shape))
    tags[TIMED_ON] = hardware.machine if settings.evaluation.timing_seconds > 0 else ""
    if parts.data.duplicates:
        tags[DUPLICATES] = "; ".join(map(str, parts.data.duplicates))
    if parts.data.unlabelled:
        tags["kdpipe.unlabelled"] = parts.data.unlabelled
        tags[UNLABELLED_IMAGES] = str(int((parts.data.labels < 0).sum()))
    if parts.teacher_source:
        tags["kdpipe.teacher_run"] = parts.teacher_source
    if job := settings.sweep.job:
        tags |= {"kdpipe.sweep": job.id, "mlflow.parentRunId": job.parent}
    return tags
