import os
import platform
import subprocess
import sys

import openvino
import pytest
import torch
from bitladder.quant import QuantPolicy, calibrate, quantize_model
from bitladder.quant.export.canonical import coded_weights, make_canonical
from bitladder.quant.export.onnx_qdq import onnx_qcdq
from bitladder.quant.export.openvino_ir import (
    adds_in_int32,
    needs_vnni,
    openvino_model,
    the_core,
)
from shipped_networks import agree, build, images, of_method, quantized

BINARY = [
    ("uniq", {"width": 8}),  # inputs 0 and s
    ("uniq", {"name": "cifar_resnet8", "width": 8}),
    ("bireal", {"name": "preact_resnet8", "block": "bireal", "width": 8}),  # inputs -s and s
    ("reactnet", {"name": "cifar_resnet8", "block": "react", "width": 8}),  # threshold by channel
    ("xnor", {"name": "cifar_resnet8", "block": "react", "width": 8}),
]


def graph_of(model, *, in_int16=True):
    weights = coded_weights(model)
    make_canonical(model, weights)
    return onnx_qcdq(model, weights, (3, 8, 8), metadata={}, in_int16=in_int16)


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


@pytest.mark.parametrize("name", ["preact_resnet8", "cifar_resnet8"])
def test_shortcuts_that_skip_pixels_run_on_whole_numbers(name, tmp_path):
    model = quantized(4, "lsq", name=name, width=16)
    found = compiled(openvino_model(graph_of(model)), tmp_path / "model.xml")
    assert agree(logits(found, images()), model(images()))
    singles = [kernel for kernel in kernels(found) if "1x1" in kernel]
    assert len(singles) == 2
    assert all(kernel.endswith("I8") for kernel in singles)


VNNI = """
import sys
from pathlib import Path
from bitladder.pipeline.runtimes import NeedsVnni, open_openvino
from bitladder.quant.export.openvino_ir import adds_in_int32

assert not adds_in_int32()
open_openvino(Path(sys.argv[1]), threads=1)
for file in sys.argv[2:]:
    try:
        open_openvino(Path(file), threads=1)
    except NeedsVnni as error:
        print(error)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 processors")
def test_without_vnni_a_file_that_needs_it_is_refused_with_the_way_out(tmp_path):
    """On a processor that OpenVINO is told to take for an older one."""
    ways, files = {"anywhere": True, "vnni": False}, []
    for name, in_int16 in ways.items():
        graph = graph_of(quantized(8, "lsq"), in_int16=in_int16)
        assert graph.needs_vnni == (not in_int16)
        openvino.save_model(openvino_model(graph), tmp_path / f"{name}.xml", compress_to_fp16=False)
        files.append(tmp_path / f"{name}.xml")
    onnx_file = tmp_path / "vnni.onnx"
    onnx_file.write_bytes(graph.model.SerializeToString())
    command = [sys.executable, "-c", VNNI, *map(str, files), str(onnx_file)]
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(files[1]), str(onnx_file)]
    assert all("export --format openvino, without --vnni" in line for line in lines)


@pytest.mark.skipif(not adds_in_int32(), reason="this processor has no VNNI")
def test_with_vnni_no_layer_is_in_two_parts(tmp_path):
    model = quantized(8, "lsq", width=16)
    parts, whole = (graph_of(quantized(8, "lsq", width=16), in_int16=way) for way in (True, False))
    found = compiled(openvino_model(whole), tmp_path / "whole.xml")
    halved = compiled(openvino_model(parts), tmp_path / "parts.xml")
    assert agree(logits(found, images()), model(images()))
    assert len(kernels(found)) == 9 < len(kernels(halved))


@pytest.mark.parametrize(("weight_bits", "needs"), [(4, False), (7, False), (8, True)])
def test_a_model_says_whether_it_needs_vnni(weight_bits, needs):
    policy = QuantPolicy(weight_bits, 8, first_last_weight_bits=weight_bits)
    model = quantize_model(build(), policy, inputs=images())
    calibrate(model, [images()])
    assert needs_vnni(openvino_model(graph_of(model.eval(), in_int16=False))) == needs


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
