"""Batch norm folded into the layer before it."""

from __future__ import annotations

import pytest
import torch
from bitladder.models import build_model
from bitladder.models.tapped import tapped
from bitladder.quant import QuantLayer, QuantPolicy, bake, calibrate, quantize_model
from bitladder.quant.fold import fold_batch_norm
from quant_networks import images, quantized, residual
from torch import Tensor, nn
from torch.nn import functional as F


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is None:
                    continue
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                if module.affine:
                    module.weight.normal_(generator=generator)  # of both signs
                    module.bias.normal_(generator=generator)
    return model.eval().requires_grad_(False)


def agrees(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Folds, and asks for the same outputs; gives back what was folded."""
    before = model(x)
    folded = fold_batch_norm(model, x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    return folded


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_every_norm_of_a_torchvision_network_goes(name):
    from torchvision import models

    model = settled(getattr(models, name)(num_classes=7))
    all_of_them = norms(model)
    assert list(agrees(model, images(2, size=32))) == all_of_them
    assert norms(model) == []


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("cifar_resnet8", 9),
        ("preact_resnet8", 3),  # of 7: the first of each block stands behind an addition
        ("plane4", 4),
        ("tiny_convnet", 2),
    ],
)
def test_the_norms_of_our_own_networks_go_where_they_follow_a_layer(name, folded):
    model = settled(build_model(name, num_classes=7, in_channels=3, image_size=8))
    assert len(agrees(model, images(2))) == folded


def test_norms_behind_a_concatenation_stay():
    from torchvision.models import DenseNet

    model = settled(DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8))
    folded = agrees(model, images(2, size=32))
    assert "features.denseblock1.denselayer1.norm2" in folded
    assert "features.denseblock1.denselayer2.norm1" in norms(model)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.ConvTranspose2d(4, 6, 3, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("affine", [True, False])
def test_a_convolution_takes_its_norm(layer, affine):
    model = settled(nn.Sequential(layer, nn.BatchNorm2d(6, affine=affine), nn.ReLU()))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert agrees(model, x) == ("1",)


def test_layers_of_other_dimensions_take_their_norms():
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    parts = [nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), nn.Flatten()]
    model = settled(nn.Sequential(*parts, nn.Linear(60, 5), nn.BatchNorm1d(5)))
    assert agrees(model, x) == ("1", "4")
    model = settled(nn.Sequential(nn.Conv3d(4, 2, 2), nn.BatchNorm3d(2)))
    assert agrees(model, x.view(3, 4, 2, 2, 2)) == ("1",)


def test_a_norm_over_another_axis_than_the_layers_channels_stays():
    model = settled(nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))  # the 5 in the middle
    assert agrees(model, x) == ()


class Branches(nn.Module):
    """Each convolution's output goes into a norm, and something keeps that from being folded."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(8):
            self.add_module(f"conv{number}", nn.Conv2d(3, 3, 3, padding=1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(3))
        self.conv5.weight = self.conv4.weight  # shared
        self.bn6 = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.conv0(x)
        x = self.bn0(y) + y  # a function reads it too
        x = self.bn1(self.conv1(self.conv1(x)))  # runs twice
        x = self.bn2(self.bn2(self.conv2(x)))
        y = self.conv3(x)
        x = self.bn3(y) + y.flatten(1)[:, :1].mean()  # a view of it is read
        x = self.bn5(self.conv5(self.bn4(self.conv4(x))))
        x = self.bn6(self.conv6(x))  # no statistics of its own
        out = self.conv7(x)
        return self.bn7(out), {"inner": out}  # handed out


def test_what_others_read_or_what_runs_twice_is_left_alone():
    model = settled(Branches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert agrees(model, images(2)) == ()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_weight_that_a_function_reads_is_left_alone():
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)

    assert agrees(settled(Penalised()), images(2)) == ()


def test_layers_with_hooks_or_a_computed_weight_are_left_alone():
    parts = [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)]
    model = settled(nn.Sequential(*parts, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[2].register_forward_hook(lambda module, args, output: output.relu())
    assert agrees(model, images(2)) == ()


def test_a_norm_called_by_another_reference_than_its_name_acts_once():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]
            for number, step in enumerate(self.steps):
                self.add_module(f"step{number}", step)

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    assert agrees(settled(Listed()), images(2)) == ("step1",)


@pytest.mark.parametrize(
    ("wanted", "folded"),
    [
        ("0", ("3", "5.1")),  # a convolution's own output
        ("2", ("1", "5.1")),  # a block that ends with one
        ("5", ("1", "3", "5.1")),  # a block around both
        ("3", ("1", "3", "5.1")),  # a norm: the layer before it gives the same now
    ],
)
def test_outputs_that_are_wanted_stay_what_they_are(wanted, folded):
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    parts = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 3))]
    model = settled(nn.Sequential(*parts, nn.BatchNorm2d(4), nn.ReLU(), block))
    before = tapped(model, images(2), [wanted]).features[wanted]
    assert fold_batch_norm(model, images(2), keep=[wanted]) == folded
    after = tapped(model, images(2), [wanted]).features[wanted]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_it_is_the_same_for_mappings_and_leaves_no_hooks():
    model = settled(residual())
    assert fold_batch_norm(model, {"x": images(2)}) == ("norm", "body.norm")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_weight_keeps_its_memory_format_and_dtype():
    model = settled(residual()).to(memory_format=torch.channels_last)
    fold_batch_norm(model, images(2))
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.stem.weight.dtype == torch.float32
    assert not model.stem.weight.requires_grad


@pytest.mark.parametrize("part", ["model", "norm"])
def test_training_mode_is_refused(part):
    model = settled(residual())
    (model if part == "model" else model.norm).train()
    with pytest.raises(ValueError, match=r"is in training mode; call model\.eval\(\) first"):
        fold_batch_norm(model, images(2))


def test_weights_that_are_quantized_at_each_run_are_left_alone():
    assert agrees(settled(quantized(8, 8)), images()) == ()


def test_a_baked_network_folds_to_the_same_outputs_but_for_flips_of_codes():
    model = bake(settled(quantized(8, 8)))
    x = images(16)
    before = model(x)
    assert fold_batch_norm(model, x[:2]) == ("norm", "body.norm")
    # one code at 8 bits is 1/255 of a range, and a flip moves an output by a part of that
    torch.testing.assert_close(model(x), before, rtol=0.0, atol=0.02 * float(before.std()))


def test_a_transposed_quantized_layer_folds_like_a_plain_one():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU())
    model = quantize_model(settled(model), QuantPolicy(8, 32, first_last_bits=8), inputs=images(2))
    calibrate(model, [images()])
    assert isinstance(model[0], QuantLayer)
    assert agrees(bake(model), images()) == ("1",)


def test_a_quantizer_behind_a_folded_norm_sees_what_it_saw():
    model = bake(settled(quantized(8, 8)))
    seen = []
    model.body.conv1.input_quantizer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(images())
    fold_batch_norm(model, images(2))
    model(images())
    torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-5)
