"""What our networks say reads an activation, against what a forward pass does with it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from bitladder.models import MODELS, build_model
from bitladder.quant.absorb import declared_readers
from torch import Tensor, nn

# each kind of block once: what holds of other depths follows from the loop that repeats them
NETWORKS = [
    *((name, {}) for name in MODELS if "_resnet" not in name),
    *(("cifar_resnet18", {"shortcut": shortcut}) for shortcut in ("conv", "pad", "pool")),
    *((f"{family}_resnet8", {}) for family in ("preact", "cifar")),
]
NETWORKS += [
    (f"{family}_resnet20", {"block": block, "shortcut": shortcut})
    for family, blocks in (
        ("preact", ("basic", "bottleneck", "bireal")),
        ("cifar", ("basic", "bottleneck", "bireal", "react")),
    )
    for block, shortcut in product(blocks, ("conv", "pad", "pool"))
]


def build(name: str, **options: object) -> nn.Module:
    structure = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    return build_model(name, **structure, options={"width": 4, "activation": "relu"} | options)


def uses(output: Tensor) -> Counter[torch.autograd.graph.Node]:
    """How many operations of the forward pass read what each other one gave."""
    count: Counter[torch.autograd.graph.Node] = Counter()
    open_nodes, seen = [output.grad_fn], {output.grad_fn}
    while open_nodes:
        for node, _ in open_nodes.pop().next_functions:
            if node is not None:
                count[node] += 1
                if node not in seen:
                    seen.add(node)
                    open_nodes.append(node)
    return count


def observed(network: nn.Module, x: Tensor) -> dict[str, tuple[str, ...]]:
    """Activation -> the layers that read it, where all that reads it are such layers."""
    given: dict[str, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, args, y, name=name: given.update({name: y}))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
            )
    count = uses(network(x))
    found = {}
    for activation, y in given.items():
        readers = [name for name, seen in inputs.items() if any(y is one for one in seen)]
        assert all(len(inputs[name]) == 1 for name in readers)
        if readers and len(readers) == count[y.grad_fn]:
            found[activation] = tuple(sorted(readers))
    return found


@pytest.mark.parametrize(("name", "options"), NETWORKS, ids=str)
def test_what_a_network_says_of_its_activations_is_what_happens(name, options):
    network = build(name, **options)
    said = {activation: tuple(sorted(names)) for activation, names in declared_readers(network)}
    assert said == observed(network, torch.rand(2, 1, 8, 8))


def test_the_comparison_sees_a_second_reader():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.conv = nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)
            self.act2, self.last = nn.ReLU(), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.norm(x))
            return self.last(self.act2(self.conv(y) + y))

    assert observed(Sum(), torch.rand(2, 2, 4, 4)) == {"act2": ("last",)}


def test_in_a_residual_network_most_inner_activations_have_one_reader():
    said = dict(declared_readers(build("preact_resnet20")))
    assert len(said) == 18
    assert said["layer1.0.act1"] == ("layer1.0.conv1",)
    assert said["layer2.0.act1"] == ("layer2.0.conv1", "layer2.0.shortcut")
