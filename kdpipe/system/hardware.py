"""What a run computes on: a device, a precision, and the processes that share its batches."""

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

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Hardware:
    """Where a run computes.

    Attributes:
        precision: "float32", or "bfloat16" for autocast.
        rank, processes: this process among those that `torchrun` started; 0 of 1 without it.
    """

    device: torch.device
    precision: str = "float32"
    rank: int = 0
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
        """What timings belong to: GPUs of one name are equal, CPUs are their machine's."""
        where = "" if self.device.type == "cuda" else f", on {platform.node()}"
        return f"{self.device.type} ({self._name}), {self.precision}{where}"

    @property
    def batch_without_gradients(self) -> int:
        """Images that a network sees together where it does not learn. On a CPU more are no faster, and take memory:
        DenseNet-121 at 128×128 a gigabyte for 100."""
        return 250 if self.device.type == "cuda" else 50

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def share(self, positions: Tensor) -> Tensor:
        """This process's part of `positions` [n]: every `processes`-th of them."""
        return positions[self.rank :: self.processes].contiguous()

    def check_agreement(self, mine: object) -> None:
        """Raise ValueError unless all processes have the same."""
        if any(other != mine for other in self.gather(mine)):
            raise ValueError(
                "torchrun: its processes found different images, weights or finished runs; a folder that all share "
                "(output_dir) or a server (tracking.uri) is accepted"
            )

    def gather(self, mine: Any) -> list[Any]:
        """What each process has, in their order."""
        found: list[Any] = [mine] * self.processes
        if self.processes > 1:
            distributed.all_gather_object(found, mine)
        return found

    def of_the_first(self, mine: Any) -> Any:
        """What the first process has."""
        return self.gather(mine)[0]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.processes > 1:
            distributed.all_reduce(values)
        return values

    def check_sharing(self, loss: nn.Module, has_unlabelled: bool) -> None:
        """Raise ValueError where a loss would be another one if several processes each saw their part of a batch."""
        if self.processes == 1:
            return
        for part in loss.modules():
            name = f"torchrun: {type(part).__name__}"
            if getattr(part, "compares_images", False):
                raise ValueError(f"{name} compares the images of a batch, of which each has a part; one is accepted")
        if any(parameter.requires_grad for parameter in loss.parameters()):
            own = f"{type(loss).__name__} has weights of its own"
            raise ValueError(f"torchrun: {own}, which processes do not share yet; one is accepted")
        if has_unlabelled:
            raise ValueError("torchrun: processes would weigh images with a label differently; one is accepted")

    def distribute(self, module: nn.Module) -> nn.Module:
        """The module that averages its gradients over all processes; the module itself where there is but one.

        Raises:
            ValueError: BatchNorm would be another one than that of one process.
        """
        if self.processes == 1:
            return module
        if self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        elif any(isinstance(part, _BatchNorm) and part.training for part in module.train().modules()):
            raise ValueError(
                f"train.device={self.device}: PyTorch shares BatchNorm between processes on GPUs only; one process "
                f"or a network without BatchNorm is accepted"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the new name, which older versions do not know
            # Processes may evaluate different numbers of batches, so none may wait for another to share its buffers.
            return DistributedDataParallel(module, broadcast_buffers=False)


def devices() -> list[str]:
    """The devices of this machine, the fastest first."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def check_there(key: str, name: str, *also: str) -> None:
    """Raise ValueError for a device that this machine does not have, unless it is one of the other words."""
    accepted = [*also, *devices()]
    if name not in (*accepted, "cuda" if "cuda:0" in accepted else "cpu"):
        raise ValueError(f"{key}={name}: one of {', '.join(accepted)} is accepted on this machine")


def prepare(device: torch.device) -> None:
    """Set this process up to compute on a device, in a run and where one is timed again."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # all batches but the last have one shape


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors give back, instead of handing it to the system at each step.

    Large activations on the CPU come from fresh, zeroed pages otherwise: close to half of the time of a student's step.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
