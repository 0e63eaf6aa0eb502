import subprocess
import sys

import openvino
import pytest
import torch
from bitladder.quant.export.canonical import coded_weights, make_canonical
from bitladder.quant.export.onnx_qdq import onnx_qcdq
from bitladder.quant.export.openvino_ir import openvino_model, the_core
from shipped_networks import agree, images, of_method, quantized

BINARY = [
    ("uniq", {"width": 8}),  # inputs 0 and s
    ("uniq", {"name": "cifar_resnet8", "width": 8}),
    ("bireal", {"name": "preact_resnet8", "block": "bireal", "width": 8}),  # inputs -s and s
    ("reactnet", {"name": "cifar_resnet8", "block": "react", "width": 8}),  # threshold by channel
    ("xnor", {"name": "cifar_resnet8", "block": "react", "width": 8}),
]


def graph_of(model):
    weights = coded_weights(model)
    make_canonical(model, weights)
    return onnx_qcdq(model, weights, (3, 8, 8), metadata={}, in_int16=True)


def compiled(model, path):
    """Saved and read again, as a user would have it."""
    openvino.save_model(model, path, compress_to_fp16=False)
    core = the_core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(core.read_model(path), "CPU", hints)


def logits(found, x):
    return torch.from_numpy(found(x.numpy())[0].copy())


def kernels(found):
    infos = [op.get_rt_info() for op in found.get_runtime_model().get_ordered_ops()]
    return [i["primitiveType"].astype(str) for i in infos if "Conv" in i["layerType"].astype(str)]


@pytest.mark.parametrize(
    ("method", "bits"), [("lsq", 8), ("lsq", 4), ("lsq", 2), ("uniq", 1), ("n2uq", 2), ("apot", 4)]
)
def test_openvino_gives_the_same_logits(method, bits, tmp_path):
    model = of_method(method, bits)
    found = compiled(openvino_model(graph_of(model)), tmp_path / "model.xml")
    assert agree(logits(found, images()), model(images()))
    assert any(name.endswith("I8") for name in kernels(found))


@pytest.mark.parametrize("bits", [8, 4])
def test_openvino_adds_a_convolution_that_several_read(bits):
    """As a pre-activation network's stem; of whole numbers it adds them wrongly."""
    model = quantized(bits, "lsq", width=16)
    weights = coded_weights(model)
    make_canonical(model, weights)
    file = onnx_qcdq(model, weights, (3, 8, 8), metadata={}).model.SerializeToString()
    found = the_core().compile_model(
        the_core().read_model(file, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert agree(logits(found, images()), model(images()))


@pytest.mark.parametrize(("method", "more"), BINARY)
def test_binary_layers_run_on_bits(method, more, tmp_path):
    model = quantized(1, method, **more)
    graph = graph_of(model)
    assert len(graph.binary) == 6  # two in each of three blocks
    found = compiled(openvino_model(graph, batch=8), tmp_path / "model.xml")
    assert sum(name.endswith("u1") for name in kernels(found)) == 6
    assert agree(logits(found, images()), model(images()))


def test_an_input_at_the_threshold_is_the_upper_level(tmp_path):
    model = quantized(1, "bireal", name="preact_resnet8", block="bireal")
    graph = graph_of(model)
    found = compiled(openvino_model(graph, batch=1), tmp_path / "model.xml")
    x = torch.zeros(1, 3, 8, 8)
    assert agree(logits(found, x), model(x))


def test_without_a_batch_nothing_runs_on_bits():
    model = openvino_model(graph_of(quantized(1, "uniq")))
    assert not any(op.get_type_name() == "BinaryConvolution" for op in model.get_ops())
    assert model.input(0).get_partial_shape()[0].is_dynamic


def test_layers_that_openvino_gets_wrong_stay_in_float(tmp_path):
    model = quantized(1, "bireal", name="preact_resnet8", block="bireal", width=4)
    graph = graph_of(model)
    found = compiled(openvino_model(graph, batch=8), tmp_path / "model.xml")
    # 4 input channels: the first block, and the first layer of the second
    assert sum(name.endswith("u1") for name in kernels(found)) == 3
    assert agree(logits(found, images()), model(images()))


SIGNALLED = """
import gc, os, signal, sys
from pathlib import Path
from bitladder.pipeline.runtimes import open_openvino

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first = open_openvino(Path(sys.argv[1]), threads=1)
second = open_openvino(Path(sys.argv[1]), threads=1)
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_networks_is_handled(tmp_path):
    graph = graph_of(quantized(4, "lsq"))
    openvino.save_model(openvino_model(graph), tmp_path / "model.xml")
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path / "model.xml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr
