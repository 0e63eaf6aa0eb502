"""Quantizes a network of your own, and trains it in a loop of your own."""

# %% Any network, and any data: here 1,797 images of digits.
import torch
from bitladder import quant
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # (N, 1, 8, 8)
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 5 == 0

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)


def train(model: nn.Module, *, epochs: int, lr: float, bins: float = 0.0) -> float:
    """Trains on what is not held out; gives back the accuracy on what is."""
    own = [parameter for _, parameter in quant.quantizer_parameters(model)]  # steps and clips
    rest = [p for p in model.parameters() if all(p is not other for other in own)]
    groups = [{"params": rest, "weight_decay": 1e-4}, {"params": own, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9)
    x, y = images[~held_out], labels[~held_out]
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(64):
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            if bins:
                loss = loss + bins * quant.weight_bin_regularization(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
    model.train()
    return float(accuracy)


# %% First in full precision.
print(f"FP32  {train(model, epochs=10, lr=0.05):.4f}")

# %% Then at two bits, first and last layer at eight: probe, swap, set the ranges, train on.
found = quant.probe(model, [images[:64]])  # what runs, and where values below zero come in
policy = quant.QuantPolicy(weight_bits=2, activation_bits=2)
model = quant.quantize_model(model, policy, found)
quant.calibrate(model, [images[:256]])
print(quant.describe_text(model, found))
print(f"W2A2  {train(model, epochs=10, lr=0.02, bins=0.1):.4f}")

# %% What became of the weights: every layer's codes, and how tightly they sit on their levels.
for name, layer in quant.quant_layers(model).items():
    q = layer.weight_quantizer.encode(layer.weight)
    score = quant.effectiveness(layer.weight_quantizer.latent(layer.weight), q)
    print(f"{name}: {q.codes.unique().numel()} codes, effectiveness {score:.2f}")

# %% And of the inputs of the second convolution: at most four values.
with quant.record(model, layers="3", stage="quantized") as seen, torch.no_grad():
    model(images[:64])
print({name: x.unique().numel() for name, x in seen.items()})
