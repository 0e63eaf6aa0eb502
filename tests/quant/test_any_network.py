"""Networks nobody here wrote: what runs twice, is tied, is not run, or is no layer."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from bitladder.quant import (
    QuantizerChoice,
    QuantPolicy,
    Rule,
    apply_plan,
    bake,
    calibrate,
    describe,
    describe_text,
    ideal_bytes,
    layer_plan,
    layer_report,
    max_levels,
    probe,
    quant_layers,
    quantize_model,
    unquantized,
)
from quant_networks import images
from torch import Tensor, nn

W4A4 = QuantPolicy(4, 4, first_last_bits=4, first_last_weight=QuantizerChoice("lsq"))


def rows(n: int = 6, width: int = 8) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two linear layers of one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def test_layers_that_share_a_weight_share_its_quantizer():
    model = quantize_model(Tied(), W4A4, inputs=rows())
    assert model.one.weight_quantizer is model.two.weight_quantizer
    assert model.one.input_quantizer is not model.two.input_quantizer
    calibrate(model, [rows()])
    assert ideal_bytes(model) == 8 * 8 // 2 + 3 * 4 + 2 * 8 * 4  # codes once, steps, biases
    assert set(max_levels(model, [rows()])) == {
        "one.weight_quantizer",
        "one.input_quantizer",
        "two.input_quantizer",
    }
    assert all(row["weight_levels"] for row in layer_report(model, [rows()]))
    want = model.eval()(rows())
    rebuilt = apply_plan(Tied(), layer_plan(model)).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(rows()), want)
    assert torch.equal(bake(model)(rows()), want)
    assert model.one.layer.weight is model.two.layer.weight


def test_one_weight_at_two_widths_is_refused_and_nothing_is_swapped():
    model = nn.Sequential(Tied(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"'0\.one' and '0\.two' share one weight.*8 bits.*rules"):
        quantize_model(model, QuantPolicy(4, 4), inputs=rows())
    assert not quant_layers(model)
    rules = (Rule("0.*", weight_bits=4, weight=QuantizerChoice("lsq")),)
    quantize_model(model, QuantPolicy(4, 4, rules=rules), inputs=rows())
    assert model[0].two.plan.weight_bits == 4


class Language(nn.Module):
    """The classifier's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(tokens)).relu())


def test_a_weight_that_an_embedding_needs_in_float_is_left_alone():
    model = Language()
    found = probe(model, [torch.arange(6).view(2, 3)])
    assert set(found.layers) == {"mix"}
    assert found.skipped["embedding"].startswith("Embedding: a table")
    assert "function of Embedding, in float" in found.skipped["head"]


class Functional(nn.Module):
    """A layer that is called, one whose weight goes into a function, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)
        self.both = nn.Linear(8, 8)
        self.token = nn.Parameter(torch.zeros(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called((x + self.token).to(self.called.weight.dtype))
        x = F.linear(x, self.read.weight, self.read.bias)
        return self.both(x) @ self.both.weight.t()


def test_what_goes_into_a_function_is_left_alone_and_says_whose():
    model = quantize_model(Functional(), W4A4, inputs=rows())
    assert set(quant_layers(model)) == {"called"}
    found = probe(Functional(), [rows()])
    assert found.skipped == {
        "token": "parameter: (1, 8), for code of Functional itself to use",
        "read": "Linear: used by Functional as a function, not called",
        "both": "Linear: its weight also goes into a function of Functional, in float",
    }
    calibrate(model, [rows()])
    assert model(rows()).isfinite().all()


def test_a_computed_weight_is_left_alone():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2)
    )
    found = probe(model, [rows()])
    assert list(found.layers) == ["2"]
    assert list(found.skipped) == ["0"]
    assert "computed from other parameters" in found.skipped["0"]
    calibrate(quantize_model(model, W4A4, found), [rows()])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.auxiliary = nn.Linear(8, 2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)


def test_a_branch_that_evaluation_does_not_run_stays_in_float_and_trains():
    model = Branches()
    found = probe(model, [rows()])
    quantize_model(model, W4A4, found)
    assert set(quant_layers(model)) == {"body", "head"}
    for name in ("unused", "auxiliary"):
        assert "not run in evaluation mode" in unquantized(model, found)[name]
    calibrate(model, [rows()])
    model.train()(rows()).square().mean().backward()
    assert model.auxiliary.weight.grad is not None
    assert model.unused.weight.grad is None


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, *, query: Tensor, key: Tensor, scaled: bool = False) -> Tensor:
        product = self.left(query) * self.right(key)
        return product / 8 if scaled else product


def test_a_model_that_takes_keywords_is_probed_and_calibrated_by_mappings():
    batch = {"query": rows(), "key": rows(), "scaled": True}
    model = quantize_model(ByKeyword(), W4A4, inputs=batch)
    calibrate(model, [batch])
    assert set(quant_layers(model)) == {"left", "right"}
    assert len(layer_report(model, [batch, batch])) == 2


def test_a_layer_that_runs_twice_is_calibrated_on_both_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(100 * self.inner(x))

    edges = QuantizerChoice("range_linear")
    policy = QuantPolicy(8, 8, first_last_activation=edges)
    model = Twice()
    found = probe(model, [rows()])
    quantize_model(model, policy, found)
    calibrate(model, [rows()])
    assert model.inner.input_quantizer.high > 10 * rows().max()
    assert describe(model, found)[0]["note"] == "runs 2 times"


def test_a_bare_layer_becomes_the_model():
    model = quantize_model(nn.Linear(8, 2), QuantPolicy(4, 4), inputs=rows())
    assert model.plan.weight_bits == 8  # it is the first layer and the last
    assert describe(model)[0]["layer"] == ""
    assert "(the model)  Linear" in describe_text(model)


def test_without_an_example_the_way_out_is_named():
    with pytest.raises(ValueError, match="give inputs="):
        quantize_model(Tied(), W4A4)


def test_a_policy_that_does_nothing_is_said(caplog):
    rules = (Rule("layer1.*", weight_bits=3),)
    policy = QuantPolicy(4, 4, first_last_bits=32, rules=rules)
    with caplog.at_level(logging.WARNING):
        model = quantize_model(Tied(), policy, inputs=rows())
    assert not quant_layers(model)
    assert "leaves every layer in float: one, two" in caplog.text
    assert "no layer fits Rule(match='layer1.*'" in caplog.text


def test_attention_keeps_its_projections_and_is_the_same_in_both_modes():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.parts["attention"](x, x, x, need_weights=False)[0])

    x = rows(12).view(2, 6, 8)
    network = quantize_model(Attending(), W4A4, inputs=x)
    calibrate(network, [x])
    left = unquantized(network)
    assert "(in_proj_weight)" in left["parts.attention"]
    assert "parts.attention.out_proj" in left
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), network.train()(x))


@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_a_transformer_layer_runs_its_quantized_layers_in_evaluation(activation):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation=activation, batch_first=True
    )
    model = nn.TransformerEncoder(layer, 2)
    x = rows(12).view(2, 6, 8)
    coarse = QuantPolicy(2, 2, first_last_bits=2, first_last_weight=QuantizerChoice("lsq"))
    with torch.no_grad():
        plain = model.eval()(x)
    quantize_model(model, coarse, inputs=x)
    assert set(quant_layers(model)) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    calibrate(model, [x])
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        trained = model.train()(x)
        torch.testing.assert_close(model.eval()(x), trained)
        padded = model(x, src_key_padding_mask=padding)
    assert (plain - trained).abs().max() > 0.01
    torch.testing.assert_close(padded[1], trained[1])


def test_an_import_path_works_like_any_other_network(tmp_path, monkeypatch):
    from bitladder.models import build_model

    (tmp_path / "their_net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, depth=2):\n"
        "    body = [nn.Conv2d(3, 3, 3, padding=1, groups=3) for _ in range(depth)]\n"
        "    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)]\n"
        "    return nn.Sequential(*body, *head)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = build_model("their_net:make", num_classes=4, in_channels=3, image_size=8)
    quantize_model(model, QuantPolicy(4, 4), inputs=images())
    calibrate(model, [images()])
    assert [row["weight_bits"] for row in describe(model)] == [8, 4, 8]
    assert not unquantized(model)


def test_the_table_names_every_layer_its_widths_and_why_it_was_left():
    model = Functional()
    found = probe(model, [rows()])
    quantize_model(model, W4A4, found)
    lines = describe_text(model, found).splitlines()
    assert lines[0].split() == ["layer", "kind", "weight", "input", "note"]
    assert lines[1].split() == ["called", "Linear", "4", "lsq", "4", "lsq"]
    assert lines[3].split(maxsplit=4)[:4] == ["read", "Linear", "float", "float"]
    assert lines[3].endswith("used by Functional as a function, not called")


def test_a_layer_of_which_only_the_input_is_quantized_is_listed_once():
    policy = QuantPolicy(32, 4, first_last_weight_bits=32, first_last_activation_bits=4)
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), policy, inputs=rows())
    assert unquantized(model) == dict.fromkeys("01", "Linear: only its input is quantized")
    assert [(r["weight_bits"], r["activation_bits"]) for r in describe(model)] == [(32, 4)] * 2
