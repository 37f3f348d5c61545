"""The cost of a network: parameters, FLOPs and memory are counted, speed is timed."""

import time
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from kdpipe.evaluation.costs import cost, flops, peak_bytes
from kdpipe.evaluation.report import cost_table, was_busy
from kdpipe.models import Classifier
from kdpipe.system.hardware import Hardware
from kdpipe.system.timing import median_ratio, threads, time_interleaved

CPU = Hardware(torch.device("cpu"))


class Tower(nn.Module):
    """`depth` linear layers of `width` units; each keeps its input until it is done."""

    def __init__(self, depth: int, width: int = 100, pause: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.pause = pause

    def forward(self, values: Tensor) -> Tensor:
        time.sleep(self.pause)
        values = values.flatten(1)
        for layer in self.layers:
            values = layer(values)
        return values


def classifier(depth: int, pause: float = 0.0) -> Classifier:
    return Classifier(Tower(depth, pause=pause), image_size=10, mean=[0.5], std=[0.5])


IMAGES = torch.randint(0, 256, (5, 1, 10, 10), dtype=torch.uint8)


TIMES = ("latency_ms", "latency_p95_ms", "images_per_second")
NETWORKS = {"model": "mobilenet_v3_small", "teacher": "efficientnet_b0"}


def test_flops_are_two_for_each_weight_and_image() -> None:
    assert flops(Tower(3), torch.zeros(7, 100)) == 2 * 3 * 100 * 100 * 7


def test_activations_are_a_peak_and_not_a_sum() -> None:
    layer = 7 * 100 * 4
    assert peak_bytes(Tower(1), torch.zeros(7, 100)) == layer
    assert peak_bytes(Tower(2), torch.zeros(7, 100)) == peak_bytes(Tower(30), torch.zeros(7, 100)) == 2 * layer


def test_buffers_are_not_activations_even_if_they_are_not_saved() -> None:
    network = nn.Module()
    network.register_buffer("table", torch.zeros(1000, 100), persistent=False)
    network.forward = lambda images: network.table[:7] + images  # type: ignore[method-assign,operator,index]
    assert peak_bytes(network, torch.zeros(7, 100)) == 7 * 100 * 4


def test_flops_and_activations_of_a_convolution() -> None:
    network = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    assert flops(network, torch.zeros(1, 3, 16, 16)) == 2 * (3 * 3 * 3) * 8 * 16 * 16
    assert peak_bytes(network, torch.zeros(1, 3, 16, 16)) == 8 * 16 * 16 * 4


def test_the_speedup_over_a_teacher_that_takes_four_times_as_long() -> None:
    networks = {"model": classifier(1, 0.008), "teacher": classifier(4, 0.032)}
    networks["model"].train()
    found = cost(networks, IMAGES, CPU, seconds=0.5)
    for suffix in ("", "_1_thread"):
        assert 2 < found[f"speedup/latency{suffix}"] < 8 and 2 < found[f"speedup/throughput{suffix}"] < 8
        assert found[f"model/latency_ms{suffix}"] <= found[f"model/latency_p95_ms{suffix}"]
        assert found[f"model/images_per_second{suffix}"] < 64 / 0.008
    assert found["model/params"] == 100 * 100 and found["teacher/params"] == 4 * 100 * 100
    assert found["teacher/flops"] == 4 * found["model/flops"] == 4 * 2 * 100 * 100
    assert networks["model"].training  # as before


def test_without_seconds_nothing_is_timed() -> None:
    found = cost({"model": classifier(1)}, IMAGES, CPU, seconds=0)
    assert set(found) == {"model/params", "model/size_mb", "model/flops", "model/activation_mb"}


def test_the_speedup_is_the_median_ratio_of_the_rounds() -> None:
    """When a machine slows down halfway, the ratio in each round is 3, but that of the medians is not."""
    faster = [1.0, 1.0, 10.0, 10.0, 10.0]
    slower = [3.0, 3.0, 30.0, 30.0, 30.0]
    assert median_ratio(slower, faster) == 3
    assert (
        median_ratio([3.0, 3.0, 30.0], [10.0, 1.0, 10.0]) == 3 != median([3.0, 3.0, 30.0]) / median([10.0, 1.0, 10.0])
    )


def test_a_slowdown_of_the_machine_affects_both_networks() -> None:
    """They take turns, so the second half of the rounds is slow for both."""
    calls = 0

    def work(seconds: float) -> None:
        nonlocal calls
        calls += 1
        time.sleep(seconds * (8 if calls > 26 else 1))

    taken = time_interleaved({"slow": lambda: work(0.006), "fast": lambda: work(0.002)}, seconds=0, min_rounds=20)
    assert all(max(times) > 4 * min(times) for times in taken.values())
    assert median_ratio(taken["slow"], taken["fast"]) == pytest.approx(3, rel=0.3)


def test_a_frozen_network_costs_the_same_as_a_trainable_one() -> None:
    """In bfloat16, both cast their weights in each call."""
    networks = {"model": classifier(8), "teacher": classifier(8).requires_grad_(False)}
    found = cost(networks, IMAGES, Hardware(torch.device("cpu"), "bfloat16"), seconds=0)
    assert found["model/activation_mb"] == found["teacher/activation_mb"]
    assert all(parameter.requires_grad for parameter in networks["model"].parameters())
    assert torch.is_autocast_cache_enabled()


def test_the_input_is_not_an_activation() -> None:
    """Not even as a view: one channel is expanded to three, without a copy."""
    network = Classifier(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), 10, [0.5] * 3, [0.5] * 3)
    assert peak_bytes(network, IMAGES[:1]) == peak_bytes(network, IMAGES[:1].clone())


def test_flops_of_attention_do_not_depend_on_its_kernel() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True).eval()
    tokens = 10
    projections = 4 * 64 * 64 + 2 * 64 * 128
    assert flops(layer, torch.zeros(1, tokens, 64)) == 2 * tokens * projections + 2 * 2 * tokens * tokens * 64
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_first_in_a_round_rotates() -> None:
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "abc"}
    taken = time_interleaved(works, seconds=0, min_rounds=3)
    assert "".join(order[-9:]) == "abcbcacab"
    assert [len(times) for times in taken.values()] == [3, 3, 3] and median(taken["a"]) >= 0


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_a_busy_machine_is_detected() -> None:
    quiet = {"model/latency_ms_1_thread": 1.0, "model/latency_p95_ms_1_thread": 1.5}
    quiet |= {"model/latency_ms": 0.7, "model/latency_p95_ms": 0.9}
    assert not was_busy(quiet)
    assert was_busy({**quiet, "model/latency_p95_ms": 5.0})
    assert was_busy({**quiet, "model/latency_ms": 2.5, "model/latency_p95_ms": 2.6})
    assert not was_busy({"model/params": 1.0})


def test_the_table_of_a_run_fits_a_terminal_of_80_columns_with_the_time_before_each_line() -> None:
    counted = {"params": 4_200_000.0, "size_mb": 16.3, "flops": 1.2e9, "activation_mb": 12.5}
    times = {f"{name}{suffix}": 123.456 for name in TIMES for suffix in ("", "_1_thread")}
    metrics = {f"{network}/{name}": value for network in NETWORKS for name, value in {**counted, **times}.items()}
    metrics |= {f"speedup/{name}{suffix}": 3.2 for name in ("latency", "throughput") for suffix in ("", "_1_thread")}
    for width in (69, 109):
        table = cost_table(metrics, NETWORKS, width)
        assert max(map(len, table.splitlines())) <= width
        assert all(name in table for name in NETWORKS.values())
    assert "times less / faster" in cost_table(metrics, NETWORKS, 109)
