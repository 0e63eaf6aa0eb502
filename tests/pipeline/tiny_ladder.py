TINY = {
    "name": "tiny",
    "data": {"name": "digits", "batch_size": 128},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 2, "optimizer": {"lr": 0.1}, "calibration_batches": 2},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 4, "activation_bits": 8},
        {"weight_bits": 1, "activation_bits": 2},
    ],
}
