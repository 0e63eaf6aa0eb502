import copy

import pytest
import torch
from bitladder.quant import QuantPolicy, calibrate, quantize_model
from bitladder.quant.export.canonical import ChannelAffine, coded_weights, make_canonical
from bitladder.quant.export.packed import Packed, pack_network, unpack_network
from bitladder.quant.swap import apply_plan, layer_plan, quant_layers
from shipped_networks import build, cases, images, of_method, quantized
from torch import nn


def rebuilt(model, packed, **more):
    """Another network of the same build, from packed tensors alone."""
    return unpack_network(apply_plan(build(**more), layer_plan(model)), packed)


@pytest.mark.parametrize(("method", "bits"), cases())
def test_a_network_comes_back_from_its_codes_bit_for_bit(method, bits):
    model = of_method(method, bits)
    plan, more = layer_plan(model), {}
    if bits == 1 and method in ("bireal", "reactnet", "xnor"):
        more = {"name": "cifar_resnet8", "block": "react"}
    packed = pack_network(model)
    other, weights = unpack_network(apply_plan(build(**more), plan), packed)
    assert torch.equal(other(images()), model(images()))
    assert max(q.bits for q in weights.values()) == 8  # first and last layer
    assert min(q.bits for q in weights.values()) == bits


def test_canonical_is_the_network_in_evaluation():
    model = quantized(4, "lsq")
    before = model(images())
    canonical = make_canonical(copy.deepcopy(model), coded_weights(model))
    torch.testing.assert_close(canonical(images()), before, rtol=1e-4, atol=1e-5)
    kinds = {type(module) for module in canonical.modules()}
    assert ChannelAffine in kinds
    assert nn.BatchNorm2d not in kinds
    assert all(layer.weight_quantizer is None for layer in quant_layers(canonical).values())


def test_a_float_network_packs_as_it_is():
    model = quantized(32, "lsq")
    packed = pack_network(model)
    assert packed.codings == {}
    other, weights = unpack_network(build(), packed)
    assert weights == {}
    assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_weights_of_grey_images_have_the_strides_of_their_layer(format):
    # both formats are one content there, and by the strides' name a convolution adds otherwise
    def grey():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5)).to(memory_format=format)

    x = images()[:, :1]
    model = quantize_model(grey(), QuantPolicy(4, 4), batches=[x])
    calibrate(model, [x])
    model.eval()
    canonical = make_canonical(copy.deepcopy(model), coded_weights(model))
    other, weights = unpack_network(apply_plan(grey(), layer_plan(model)), pack_network(model))
    packed = make_canonical(other, weights)
    for name, layer in quant_layers(model).items():
        strides = layer.latent.stride()
        assert canonical.get_submodule(name).layer.weight.stride() == strides
        assert packed.get_submodule(name).layer.weight.stride() == strides
    assert torch.equal(canonical(x), packed(x))


def test_codes_take_as_many_bits_as_the_rung_has():
    sizes = {}
    for bits in (8, 4, 2):
        packed = pack_network(quantized(bits, "lsq"))
        inner = [n for n, c in packed.codings.items() if c.bits == bits and n.startswith("layer")]
        sizes[bits] = sum(packed.tensors[f"{name}.codes"].numel() for name in inner)
    assert sizes[4] == sizes[8] / 2
    assert sizes[2] == sizes[8] / 4


def test_a_weight_that_layers_share_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.first = nn.Conv2d(4, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))

    from bitladder.quant import QuantPolicy, calibrate, quantize_model

    model = quantize_model(Twice(), QuantPolicy(4, 4), inputs=images())
    calibrate(model, [images()])
    plan = layer_plan(model)
    packed = pack_network(model.eval())
    assert [name for name in packed.tensors if name.endswith(".codes")] == [
        "stem.codes",
        "first.codes",
        "head.codes",
    ]
    other, _ = unpack_network(apply_plan(Twice(), plan), packed)
    assert torch.equal(other(images()), model(images()))
    assert other.first.latent is other.second.latent


def changed(packed, **tensors):
    return Packed({**packed.tensors, **tensors}, packed.codings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: {"layer1.0.conv1.codes": p["layer1.0.conv1.codes"][:-1]}, "fill"),
        (lambda p: {"layer1.0.conv1.scale": torch.ones(3)}, "for a weight of shape"),
        (lambda p: {"layer1.0.conv1.scale": p["layer1.0.conv1.scale"].double()}, "float32"),
        (lambda p: {"layer1.0.conv1.input_quantizer": torch.ones(9)}, "2 float32 numbers"),
        (lambda p: {"layer1.0.bn1.shift": torch.ones(5)}, r"float32 \(5,\), the network has"),
        (lambda p: {"more": torch.ones(1)}, "with unknown more"),
    ],
)
def test_tensors_of_another_network_are_refused(change, says):
    model = quantized(4, "lsq")
    plan = layer_plan(model)
    packed = pack_network(model)
    with pytest.raises(ValueError, match=says):
        unpack_network(apply_plan(build(), plan), changed(packed, **change(packed.tensors)))


def test_a_missing_tensor_is_named():
    model = quantized(4, "lsq")
    plan, packed = layer_plan(model), pack_network(model)
    for name in ("layer1.0.conv1.codes", "layer1.0.conv1.input_quantizer", "layer1.0.bn1.scale"):
        kept = {key: value for key, value in packed.tensors.items() if key != name}
        with pytest.raises(ValueError, match=name):
            unpack_network(apply_plan(build(), plan), Packed(kept, packed.codings))
