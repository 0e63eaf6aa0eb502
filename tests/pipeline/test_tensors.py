"""Tensors on disk."""

from __future__ import annotations

import torch
from bitladder.pipeline.tensors import write_tensors
from safetensors.torch import load_file
from torch import nn


def test_a_weight_of_two_names_is_written_under_both(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    write_tensors(tmp_path / "model.safetensors", model.state_dict())
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].weight, model[0].weight)
