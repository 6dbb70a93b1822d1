from dataclasses import dataclass, replace

import pytest

from hybrid.errors import PlanError
from hybrid.scheduler.cost import bytes_of, layer_seconds, transfer_seconds
from hybrid.scheduler.profile import LayerProfile


@dataclass(frozen=True)
class Chip:
    flops_per_s: float = 100.0
    hbm_bytes_per_s: float = 10.0

    def peak_flops(self, precision):
        return self.flops_per_s


@dataclass(frozen=True)
class Link:
    bandwidth_bytes_per_s: float
    latency_s: float


LAYER = LayerProfile(
    name="block 0",
    kind="block",
    num_parameters=5,
    forward_flops=1000.0,
    backward_flops=2000.0,
    saved_activation_bytes=6,
    output_bytes=4,
)


def test_a_layer_with_much_arithmetic_takes_its_flops_over_the_peak():
    assert layer_seconds(LAYER, Chip(), "bf16", 1.0) == (10.0, 20.0)


def test_efficiency_and_speed_scale_the_time():
    assert layer_seconds(LAYER, Chip(), "bf16", 0.5, speed=4.0) == (5.0, 10.0)


def test_a_layer_with_little_arithmetic_takes_its_bytes_over_the_bandwidth():
    layer = replace(LAYER, forward_flops=1.0, backward_flops=2.0)
    # bf16: 5 weights of 2 bytes, 6 saved, 4 out, over 10 bytes a second; the backward moves twice that.
    assert layer_seconds(layer, Chip(), "bf16", 1.0) == (2.0, 4.0)
    assert layer_seconds(layer, Chip(), "fp32", 1.0) == (3.0, 6.0)


def test_a_lookup_reads_its_rows_and_not_the_table():
    layer = replace(LAYER, kind="embedding", forward_flops=0.0, backward_flops=0.0, num_parameters=1000)
    assert layer_seconds(layer, Chip(), "bf16", 1.0) == (1.0, 402.0)


@pytest.mark.parametrize("efficiency", [0.0, -1.0, 1.5, float("nan")])
def test_an_impossible_efficiency_is_refused(efficiency):
    with pytest.raises(PlanError, match="efficiency out of range"):
        layer_seconds(LAYER, Chip(), "bf16", efficiency)


def test_an_impossible_speed_is_refused():
    with pytest.raises(PlanError, match="speed out of range"):
        layer_seconds(LAYER, Chip(), "bf16", 1.0, speed=0.0)


def test_an_unknown_precision_is_refused():
    with pytest.raises(PlanError, match=r"'int3'.*fp32"):
        bytes_of("int3")


def test_a_message_takes_latency_and_bytes_over_bandwidth():
    assert transfer_seconds(Link(bandwidth_bytes_per_s=100.0, latency_s=0.5), 50) == 1.0
