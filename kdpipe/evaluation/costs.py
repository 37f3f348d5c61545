"""The cost of inference: parameters, bytes, operations, memory, time."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kdpipe.models import Classifier, Ensemble, size_mb
from kdpipe.models.classifier import eval_mode
from kdpipe.runs.names import ONE_THREAD
from kdpipe.system.hardware import Hardware
from kdpipe.system.timing import median_ratio, percentile_95, threads, time_interleaved

BATCH = 64  # images, for the throughput
MIN_ROUNDS = {1: 10, BATCH: 3}  # by batch size: a percentile needs more of them than a median
MB = 2**20

# "model", and "teacher" or "peer" (a second student), if the run has one.
Networks = Mapping[str, Classifier | Ensemble]


def cost(
    networks: Networks,
    images: Tensor,
    hardware: Hardware,
    seconds: float,
    attempt: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """What each network costs, by its name: `model/params`, …

    Args:
        images: some of the networks' inputs, uint8 [N, C, H, W].
        seconds: of timing in total, without the warm-up, longer for slow networks; 0 for no timing.
        attempt: what to measure but parameters and size in, by its name; `optional` lets it fail.

    Returns:
        For each network `params`; `size_mb` (parameters and buffers, MB of 2²⁰ bytes); `flops` (of convolutions and
        matrix products for one image, a multiply-add being two); `activation_mb` (the most memory that tensors other
        than the weights take at once during the forward pass of one image); and, if timed, `latency_ms` and
        `latency_p95_ms` (the median and the 95th percentile for one image, from raw image to logits) and
        `images_per_second` (64 at once), with all CPU threads of the process, and with one thread as `…_1_thread`.
        `speedup/latency` and `speedup/throughput` say how many times faster the model is than its teacher: the median
        ratio over rounds in which both alternate.
    """
    found: dict[str, float] = {}
    with eval_mode(*networks.values()), torch.no_grad(), torch.compiler.set_stance("force_eager"), hardware.autocast():
        # The cache would cast trainable weights once, but those of a frozen teacher in each call.
        torch.set_autocast_cache_enabled(False)
        for name, network in networks.items():
            found[f"{name}/params"] = float(sum(parameter.numel() for parameter in network.network.parameters()))
            found[f"{name}/size_mb"] = size_mb(network.network)
            with attempt(f"{name}: operations and activations"):
                one = images[:1].to(hardware.device)
                counted = {"flops": float(flops(network, one)), "activation_mb": peak_bytes(network, one) / MB}
                found |= {f"{name}/{what}": value for what, value in counted.items()}
        if seconds > 0:
            with attempt("timing"):
                found |= _time_networks(networks, images, hardware, seconds)
    return found


def _time_networks(networks: Networks, images: Tensor, hardware: Hardware, seconds: float) -> dict[str, float]:
    wanted = {"": torch.get_num_threads()} | ({ONE_THREAD: 1} if hardware.device.type == "cpu" else {})
    measured = {}
    for number in (numbers := set(wanted.values())):
        with threads(number):
            measured[number] = _time(networks, images, hardware.device, seconds / len(numbers))
    return {f"{name}{suffix}": value for suffix, number in wanted.items() for name, value in measured[number].items()}


def _time(networks: Networks, images: Tensor, device: torch.device, seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for size, what in ((1, "latency"), (BATCH, "throughput")):
        batch = images[torch.arange(size) % len(images)].to(device)
        forwards = {name: partial(_forward, network, batch) for name, network in networks.items()}
        taken = time_interleaved(forwards, seconds / 2, MIN_ROUNDS[size])
        for name, times in taken.items():
            if size == 1:
                found[f"{name}/latency_ms"] = 1000 * median(times)
                found[f"{name}/latency_p95_ms"] = 1000 * percentile_95(times)
            else:
                found[f"{name}/images_per_second"] = size / median(times)
        if "teacher" in taken:
            found[f"speedup/{what}"] = median_ratio(taken["teacher"], taken["model"])
    return found


def _forward(network: nn.Module, images: Tensor) -> None:
    network(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)


@torch.no_grad()
def flops(network: nn.Module, images: Tensor) -> int:
    """Floating-point operations of convolutions and matrix products, by PyTorch's counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see inside fused attention
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


@torch.no_grad()
def peak_bytes(network: nn.Module, images: Tensor) -> int:
    """The most bytes that tensors other than the weights and `images` take at once during a forward pass."""
    with _LiveTensors([*network.parameters(), *network.buffers(), images]) as living:
        network(images)
    return living.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the results of operations while they are alive."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        # Views of existing tensors take no memory.
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return given

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size
