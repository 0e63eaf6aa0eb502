import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitladder.pipeline.losses import LOSSES, Step

GOLDEN = Path(__file__).parents[1] / "golden"
ENTRIES = [
    entry
    for entry in json.loads((GOLDEN / "index.json").read_text())["entries"]
    if entry["quantizer"] == "distillation" and entry["variant"] in ("batchmean", "takd-as-coded")
]


def golden(entry):
    with np.load(GOLDEN / "golden.npz") as arrays:
        return {k: torch.from_numpy(arrays[f"{entry['id']}/{k}"]) for k in entry["arrays"]}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["id"])
def test_distillation_agrees_with_the_original_code(entry):
    case, config = golden(entry), entry["config"]
    logits = case["student_logits"].float().requires_grad_()
    step = Step(logits, case["labels"], case["teacher_logits"].float())
    hard = LOSSES["cross_entropy"].factory()(step)
    soft = LOSSES["kl"].factory(temperature=config["T"])(step)
    lam = config["lam"]
    if entry["variant"] == "takd-as-coded":  # its mean is over images and classes
        loss = (1 - lam) * hard + lam * soft / logits.shape[1]
    else:
        loss = (1 - lam) * hard + lam * soft
    loss.backward()
    assert loss.item() == pytest.approx(float(case["loss"]), rel=1e-4)
    torch.testing.assert_close(logits.grad, case["grad_student"].float(), rtol=1e-3, atol=1e-5)


def test_a_teacher_that_agrees_costs_nothing():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    step = Step(logits, torch.zeros(4, dtype=torch.long), logits.clone())
    assert LOSSES["kl"].factory(temperature=3.0)(step).item() == pytest.approx(0.0, abs=1e-6)


def test_kl_without_a_teacher_says_so():
    step = Step(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), None)
    with pytest.raises(ValueError, match="needs a teacher"):
        LOSSES["kl"].factory()(step)
