"""What a run computes on: a device, a precision, and the processes that share each batch."""

import ctypes
import platform
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdpipe.settings.errors import ConfigError, one_of

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Hardware:
    """Where a run computes."""

    device: torch.device
    precision: str = "float32"  # or "bfloat16" or "float16", for autocast
    rank: int = 0  # of this process among those that `torchrun` started
    processes: int = 1

    @property
    def described(self) -> str:
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.device} ({self._name}), {self.precision}{processes}"

    @property
    def _name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        number = torch.get_num_threads()
        return f"{number} thread{'s' if number > 1 else ''}"

    @property
    def machine(self) -> str:
        """What timings hold for: any GPU of this name, or this machine's CPU."""
        where = "" if self.device.type == "cuda" else f", on {platform.node()}"
        return f"{self.device.type} ({self._name}), {self.precision}{where}"

    @property
    def inference_batch_size(self) -> int:
        """On a CPU more images are no faster and take memory: DenseNet-121 at 128×128 a gigabyte for 100."""
        return 250 if self.device.type == "cuda" else 50

    def autocast(self) -> torch.autocast:
        narrow = torch.float16 if self.precision == "float16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=narrow, enabled=self.precision != "float32")

    def shard(self, positions: Tensor) -> Tensor:
        """This process's part of `positions` [n]: every `processes`-th of them."""
        return positions[self.rank :: self.processes].contiguous()

    def check_agreement(self, mine: object) -> None:
        """Raise ValueError unless all processes have the same value."""
        if any(other != mine for other in self.gather(mine)):
            raise ValueError(
                "torchrun: its processes found different images, weights or finished runs; expected a shared folder "
                "(output_dir) or a server (tracking.uri)"
            )

    def gather(self, mine: Any) -> list[Any]:
        """The values of all processes, ordered by rank."""
        found: list[Any] = [mine] * self.processes
        if self.processes > 1:
            distributed.all_gather_object(found, mine)
        return found

    def broadcast(self, mine: Any) -> Any:
        """The first process's value."""
        return self.gather(mine)[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in a new tensor."""
        total = values.clone()
        if self.processes > 1:
            distributed.all_reduce(total)
        return total

    def distribute(self, module: nn.Module) -> nn.Module:
        """A module that averages its gradients over all processes; with one process the module itself. Raises
        ConfigError if BatchNorm would differ from that of a single process."""
        if self.processes == 1:
            return module
        if self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        elif any(isinstance(part, _BatchNorm) and part.training for part in module.train().modules()):
            problem = "PyTorch synchronizes BatchNorm across processes on GPUs only"
            raise ConfigError("train.device", self.device, "one process, or a network without BatchNorm", problem)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name that older versions do not know
            # Processes may evaluate different numbers of batches, so none may wait for the others' buffers.
            return DistributedDataParallel(module, broadcast_buffers=False)


def devices() -> list[str]:
    """The devices of this machine, the fastest first."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def check_available(key: str, name: str, *also: str) -> None:
    """Raise ConfigError for a device that this machine does not have, unless it is one of `also`."""
    choices = [*also, *devices()]
    if name not in (*choices, "cuda" if "cuda:0" in choices else "cpu"):
        raise ConfigError(key, name, f"{one_of(choices)} on this machine")


def prepare_device(device: torch.device) -> None:
    """Set up this process to compute on a device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches but the last have one shape
    elif device.type == "cpu" and sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        # Keep freed memory instead of returning it to the system at each step: large activations would get fresh,
        # zeroed pages, which takes close to half of a student's step.
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
