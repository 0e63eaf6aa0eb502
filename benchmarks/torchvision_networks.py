"""Puts LSQ at W4A4 on torchvision's networks and trains one step of each.

    OMP_NUM_THREADS=1 python benchmarks/torchvision_networks.py

Random weights and images: what is shown is that each network is quantized as it comes, which
layers are left in float and why, that a step of training is finite, and that every weight's codes
give back exactly what training saw. Prints a Markdown table; seconds are of one run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from bitladder.quant import (
    QuantPolicy,
    calibrate,
    describe_text,
    probe,
    quant_layers,
    quantize_model,
)
from torch import nn
from torch.nn.functional import cross_entropy

SIZES = {  # height and width of the images; vit's weights are of one size only
    "resnet18": 64,
    "resnet34": 64,
    "resnet50": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "vgg11_bn": 64,
    "vit_b_16": 224,
}


@dataclass(frozen=True)
class Result:
    """What came of one network; seconds to quantize (probe, swap, calibrate) and for a step."""

    name: str
    size: int
    quantized: int
    share: float  # of the weights of two or more axes
    left: int
    loss: float
    finite: bool
    exact: int
    quantize_seconds: float
    step_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(SIZES), metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--layers", action="store_true", help="list every layer too")
    args = parser.parse_args()
    results = []
    reasons: dict[str, list[str]] = {}
    for name in args.names:
        result, left, table = examine(name, SIZES.get(name, 64), args.batch_size)
        results.append(result)
        reasons[name] = left
        if args.layers:
            print(f"\n{name}\n{table}\n")
    print(
        f"LSQ W4A4, first and last layer W8A8, batch {args.batch_size}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| network | input | layers quantized | share of weights | left alone | exact round trips "
        "| loss | all finite | quantize, s | one step, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.name} | {r.size} | {r.quantized} | {100 * r.share:.1f} % | {r.left} | "
            f"{r.exact}/{r.quantized} | {r.loss:.3f} | {'yes' if r.finite else 'NO'} | "
            f"{r.quantize_seconds:.2f} | {r.step_seconds:.2f} |"
        )
    for name, left in reasons.items():
        for line in left:
            print(f"\n{name}: {line}")


def examine(name: str, size: int, batch_size: int) -> tuple[Result, list[str], str]:
    """One network's row, what was left alone (a line for each reason), and the table of layers."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    x, y = torch.randn(batch_size, 3, size, size), torch.randint(1000, (batch_size,))
    in_all = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    began = time.perf_counter()
    found = probe(model, [x])
    quantize_model(model, QuantPolicy(4, 4), found)
    calibrate(model, [x])
    quantized_at = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = cross_entropy(model.train()(x), y)
    loss.backward()
    optimizer.step()
    done = time.perf_counter()
    layers = quant_layers(model)
    result = Result(
        name=name,
        size=size,
        quantized=len(layers),
        share=sum(layer.weight.numel() for layer in layers.values()) / in_all,
        left=len(found.skipped),
        loss=loss.item(),
        finite=bool(loss.isfinite()) and _finite(model),
        exact=sum(_exact(layer.weight_quantizer, layer.weight) for layer in layers.values()),
        quantize_seconds=quantized_at - began,
        step_seconds=done - quantized_at,
    )
    return result, _by_reason(found.skipped), describe_text(model, found)


def _exact(quantizer: nn.Module | None, weight: torch.Tensor) -> bool:
    assert quantizer is not None
    with torch.no_grad():
        return torch.equal(quantizer(weight), quantizer.encode(weight).dequantize())


def _finite(model: nn.Module) -> bool:
    """Every parameter got a gradient, and it and the updated value are finite."""
    return all(
        p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.isfinite().all())
        for p in model.parameters()
    )


def _by_reason(skipped: dict[str, str]) -> list[str]:
    """What was left alone, those of one kind and reason together."""
    groups: dict[str, list[str]] = {}
    for name, why in skipped.items():
        groups.setdefault(why, []).append(name)
    return [
        f"{why} ({len(names)}: {names[0]}{', ...' if len(names) > 1 else ''})"
        for why, names in groups.items()
    ]


if __name__ == "__main__":
    main()
