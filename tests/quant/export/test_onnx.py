import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bitladder.quant import QuantPolicy, calibrate, quantize_model
from bitladder.quant.export.canonical import coded_weights, make_canonical
from bitladder.quant.export.onnx_qdq import onnx_qcdq
from bitladder.quant.export.tracing import CannotExport
from onnx import TensorProto, numpy_helper
from shipped_networks import agree, cases, images, of_method, quantized, settled
from torch import nn


def exported(model, image=(3, 8, 8), **more):
    weights = coded_weights(model)
    make_canonical(model, weights)
    return onnx_qcdq(model, weights, image, metadata={"made": "here"}, **more)


def run(graph, x):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = 1
    file = graph.model.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize(("method", "bits"), cases())
def test_onnx_runtime_gives_the_same_logits(method, bits):
    model = of_method(method, bits)
    graph = exported(model)
    assert agree(run(graph, images()), model(images()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet8", {}),
        ("cifar_resnet8", {"shortcut": "pad"}),
        ("cifar_resnet8", {"shortcut": "pool"}),
        ("preact_resnet8", {"activation_clip": 6}),
        ("preact_resnet20", {"block": "bottleneck"}),
        ("plane4", {}),
    ],
)
def test_every_kind_of_network_of_ours_exports(name, options):
    model = quantized(4, "lsq", name=name, **options)
    graph = exported(model)
    assert agree(run(graph, images()), model(images()))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", pytest.param("vgg11_bn", marks=pytest.mark.slow)]
)
def test_networks_of_torchvision_export(name):
    from torchvision import models

    x = images(4, size=32)
    model = settled(getattr(models, name)(num_classes=5)).eval()
    model = quantize_model(model, QuantPolicy(4, 4), inputs=x)
    calibrate(model, [x])
    graph = exported(model.eval(), image=(3, 32, 32))
    assert agree(run(graph, x), model(x))


def test_values_beyond_the_range_are_clipped():
    model = quantized(4, "lsq")
    graph = exported(model)
    x = 30 * images()
    assert agree(run(graph, x), model(x))
    clips = {n.name for n in graph.model.graph.node if n.op_type == "Clip"}
    assert "layer1.0.conv1.clipped" in clips


def test_weights_are_int8_codes_of_few_levels():
    graph = exported(quantized(2, "lsq"))
    found = {t.name: numpy_helper.to_array(t) for t in graph.model.graph.initializer}
    codes = found["layer1.0.conv1.codes"]
    assert codes.dtype == np.int8
    # rows of a batch norm with a negative weight have their signs turned
    assert max(len(np.unique(row)) for row in codes) <= 4
    # but for the stem, which the first block adds to its own: see test_openvino
    assert [name for name in found if name.endswith(".weight")] == ["conv1.weight"]


@pytest.mark.parametrize(("bits", "kind"), [(4, TensorProto.INT4), (2, TensorProto.INT2)])
def test_narrow_codes_take_their_own_width(bits, kind):
    model = quantized(bits, "lsq", name="cifar_resnet8", shortcut="pad")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bn" in name and name.endswith("weight"):
                parameter.abs_()  # a sign turned would make -2^(b-1) one too large
    wide = exported(copy.deepcopy(model))
    narrow = exported(model, narrow=True)
    assert agree(run(narrow, images()), model(images()))
    types = {t.name: t.data_type for t in narrow.model.graph.initializer}
    assert types["layer1.0.conv1.codes"] == kind
    assert narrow.model.ByteSize() < wide.model.ByteSize() - 1000


def test_any_batch_goes():
    model = quantized(4, "lsq")
    graph = exported(model)
    for count in (1, 3):
        assert run(graph, images(count)).shape == (count, 5)


def test_the_file_says_where_it_comes_from():
    needs = {"openvino_needs": "VNNI"}  # of the 8-bit classifier
    for in_int16, more in ((True, {}), (False, needs)):
        model = exported(quantized(4, "lsq"), in_int16=in_int16).model
        onnx.checker.check_model(model, full_check=True)
        assert {p.key: p.value for p in model.metadata_props} == {"made": "here"} | more
        assert model.opset_import[0].version == 21


def test_16_bits_hold_the_sum_of_two_products():
    model = quantized(8, "lsq")
    graph = exported(copy.deepcopy(model), in_int16=True)
    found = {t.name: numpy_helper.to_array(t) for t in graph.model.graph.initializer}
    codes = [array for name, array in found.items() if ".codes" in name]
    assert any(name.endswith(".codes1") for name in found)
    assert max(int(np.abs(array.astype(int)).max()) for array in codes) * 2 * 255 < 2**15
    make_canonical(model, coded_weights(model))
    assert agree(run(graph, images()), model(images()))
    four = exported(quantized(4, "lsq"), in_int16=True)
    names = [t.name for t in four.model.graph.initializer]
    assert "layer1.0.conv1.codes" in names  # 15 * 8 * 2 fits: one part


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m, "act", nn.GELU()), "no GELU"),
        (lambda m: setattr(m.conv1.layer, "padding_mode", "reflect"), "reflect padding"),
        (lambda m: setattr(m.conv1.layer, "padding", "same"), "padding in pixels"),
    ],
)
def test_what_onnx_export_has_not_is_named(change, says):
    model = quantized(4, "lsq")
    change(model)
    with pytest.raises(CannotExport, match=says):
        exported(model)


def test_a_table_of_many_levels_on_inputs_is_refused():
    with pytest.raises(CannotExport, match="255 thresholds"):
        exported(quantized(8, "lsq", "nulsq"))


def test_a_network_that_asks_for_values_is_refused():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            x = x.mean((2, 3))
            return self.head(x) if x.sum() > 0 else self.head(-x)

    with pytest.raises(CannotExport, match="cannot be traced"):
        onnx_qcdq(Asks().eval(), {}, (3, 8, 8), metadata={})
