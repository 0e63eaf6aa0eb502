"""Networks as stages build them."""

import subprocess
import sys

import pytest
import torch
from bitladder.pipeline.network import build_network
from bitladder.quant import QuantPolicy, calibrate, quantize_model

NETWORK = {"name": "preact_resnet8", "num_classes": 10, "in_channels": 1, "image_size": 8}

# in a process of its own: what it guards against ends the process
TRAIN = """
import torch
from bitladder.pipeline.network import build_network
torch.set_num_threads(1)
network = {network!r}
model = build_network(network, seed=0)
for _ in range(20):
    images = torch.randn(64, 8, 8, network["in_channels"]).permute(0, 3, 1, 2)  # as data give them
    model(images).square().sum().backward()
"""


def network(width: int) -> dict:
    return {**NETWORK, "options": {"width": width}}


@pytest.mark.parametrize(("width", "last"), [(16, True), (4, False)])
def test_a_network_is_channels_last_where_that_is_safe(width, last):
    weight = build_network(network(width), seed=0).layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.parametrize("channels", [1, 3])
def test_a_very_narrow_network_runs_channels_first_whatever_the_strides_of_its_images(channels):
    model = build_network({**network(4), "in_channels": channels}, seed=0)
    seen = []
    model.conv1.register_forward_hook(lambda _, args, y: seen.append(y))
    images = torch.randn(2, 8, 8, channels).permute(0, 3, 1, 2)
    first, last = model(images.clone(memory_format=torch.contiguous_format)), model(images)
    assert all(y.stride() == (256, 64, 8, 1) for y in seen)
    assert torch.equal(first, last)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_very_narrow_network_trains_on_one_thread(channels):
    code = TRAIN.replace("{network!r}", repr({**network(4), "in_channels": channels}))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_grey_images_stay_channels_last_in_a_quantized_network():
    images = torch.randn(2, 8, 8, 1).permute(0, 3, 1, 2)  # as data give them
    student = build_network(network(8), seed=0)
    student = quantize_model(student, QuantPolicy(weight_bits=4, activation_bits=4), inputs=images)
    calibrate(student, [images])
    given = []
    student.conv1.register_forward_hook(lambda module, args, output: given.append(output))
    student(images).sum().backward()
    assert given[0].is_contiguous(memory_format=torch.channels_last)
    assert student.conv1.latent.grad is not None
