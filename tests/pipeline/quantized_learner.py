import torch
from bitladder.models import build_model
from bitladder.pipeline.config import BinRegularizationConfig, OscillationConfig, TrainConfig
from bitladder.pipeline.learner import Learner, Objective
from bitladder.quant import QuantPolicy, calibrate, quantize_model


def quantized_learner(bits, precision="fp32"):
    """A learner of a tiny quantized network, in training mode, and eight images for it."""
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8).to(memory_format=torch.channels_last)
    student = build_model("tiny_convnet", num_classes=10, in_channels=1, image_size=8, seed=0)
    student = quantize_model(student, QuantPolicy(weight_bits=bits, activation_bits=bits), inputs=x)
    calibrate(student, [x])
    objective = Objective(TrainConfig(), None, BinRegularizationConfig(), OscillationConfig())
    return Learner(student, objective, precision=precision).train(), x
