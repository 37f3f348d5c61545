"""The device and the precision of a run."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import distributed

from kdpipe.settings.errors import ConfigError
from kdpipe.settings.schema import Settings, TrainSettings
from kdpipe.system.hardware import Hardware, check_available, devices, prepare_device

_own_gpu: list[FileLock] = []  # held until the process ends


def check_device(settings: Settings) -> None:
    """Raise ConfigError for a device that this machine does not have, or a precision that the device does not."""
    name, precision = settings.train.device, settings.train.precision
    check_available("train.device", name, "auto")
    if precision == "float16" and not (devices()[0] if name == "auto" else name).startswith("cuda"):
        problem = "its gradients are scaled on CUDA devices only"
        raise ConfigError("train.precision", precision, "auto, float32 or bfloat16 on this device", problem)


def use_hardware(settings: Settings) -> Hardware:
    """The device and the precision of a run; under `torchrun` shared with its other processes."""
    check_device(settings)
    train = settings.train
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    precision = train.precision.replace("auto", "float32")
    if distributed.is_torchelastic_launched():
        return _shared_hardware(train, precision)
    name = train.device
    gpus = torch.cuda.device_count()
    if name == "auto" and settings.sweep.job and gpus > 1:
        name = devices()[own_gpu(gpus, Path(settings.output_dir) / "runs")]
    device = torch.device({"auto": devices()[0], "cuda": "cuda:0"}.get(name, name))
    prepare_device(device)
    return Hardware(device, precision)


def _shared_hardware(train: TrainSettings, precision: str) -> Hardware:
    has_gpu = torch.cuda.device_count() > 0 and train.device != "cpu"
    if train.device not in ("auto", "cpu", "cuda"):
        raise ConfigError("train.device", train.device, "auto, cpu or cuda", "torchrun gives each process its own")
    processes = int(os.environ["WORLD_SIZE"])
    if train.batch_size < processes:
        expected = f"at least {processes}, for the {processes} processes that share it"
        raise ConfigError("train.batch_size", train.batch_size, expected)
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if has_gpu else "cpu")
    prepare_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if has_gpu else "gloo")
    return Hardware(device, precision, distributed.get_rank(), processes)


def own_gpu(number_of_gpus: int, folder: Path) -> int:
    """The number of a GPU that no other process of the sweep uses, as long as there is one; this process keeps it until
    it ends."""
    if not _own_gpu:
        for number in range(number_of_gpus):
            lock = FileLock(folder / f".{socket.gethostname()}-cuda-{number}")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                _own_gpu.append(lock)
                return number
        return os.getpid() % number_of_gpus
    return int(Path(_own_gpu[0].lock_file).name.rpartition("-")[2])
