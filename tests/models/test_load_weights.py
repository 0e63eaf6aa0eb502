"""FP32 weights from files: all of them or none, and no code."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from bitladder.models import build_model, load_weights
from bitladder.quant.registry import UnknownNameError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


def build(name: str = "tiny_convnet", seed: int = 0, **options: object) -> nn.Module:
    return build_model(
        name, num_classes=10, in_channels=1, image_size=8, options=options, seed=seed
    )


def trained(name: str = "tiny_convnet", **options: object) -> dict[str, Tensor]:
    """The state of a network that is not the one loaded into, with statistics of its own."""
    network = build(name, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        network(torch.rand(16, 1, 8, 8, generator=generator))
    return network.state_dict()


def assert_loaded(network: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) for k in state)


def refused(file, network: nn.Module | None = None, **arguments: object) -> str:
    """The message of the refusal; the network must be as it was before."""
    network = build() if network is None else network
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the caller looks at the message
        load_weights(network, file, **arguments)
    assert_loaded(network, before)
    return str(caught.value)


def saved(path, contents: object):
    torch.save(contents, path)
    return path


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}},
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.5},
    "net": lambda s: {"net": s, "acc": 91.2},
    "beside an EMA copy": lambda s: {"model_ema": {"other": torch.ones(1)}, "state_dict": s},
    "twice": lambda s: {"state_dict": {"model": s}},
    "module.": lambda s: with_prefix("module.", s),
    "_orig_mod.": lambda s: with_prefix("_orig_mod.", s),
    "both prefixes": lambda s: {"model": with_prefix("module._orig_mod.", s)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_state_dict_is_found_in_its_wrapping(wrapping, tmp_path):
    network, state = build(), trained()
    load_weights(network, saved(tmp_path / "w.pt", WRAPPINGS[wrapping](state)))
    assert_loaded(network, state)


def test_safetensors_are_read(tmp_path):
    network, state = build(), trained()
    save_file(state, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert_loaded(network, state)


def test_the_old_format_of_torch_is_read(tmp_path):
    network, state = build(), trained()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(network, tmp_path / "w.pth")
    assert_loaded(network, state)


def test_the_hash_is_the_files(tmp_path):
    file = saved(tmp_path / "w.pt", trained())
    assert load_weights(build(), file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_network_whose_own_names_begin_like_a_wrapper_keeps_them(tmp_path):
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    network, state = Wrapping(), Wrapping().state_dict()
    load_weights(network, saved(tmp_path / "w.pt", state))
    assert_loaded(network, state)


def test_batch_counters_may_be_absent(tmp_path):
    network, state = build(), trained()
    counted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    load_weights(network, saved(tmp_path / "w.pt", counted))
    assert all(torch.equal(network.state_dict()[k], v) for k, v in counted.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(dtype, tmp_path):
    network = build()
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained().items()}
    load_weights(network, saved(tmp_path / "w.pt", state))
    assert_loaded(network, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    state = trained()
    state["fc.bias"] = torch.full((10,), value, dtype=torch.float64)
    message = refused(saved(tmp_path / "w.pt", state))
    assert "infinite or NaN (1): fc.bias" in message


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    state = trained()
    state["head.weight"] = state.pop("fc.weight")
    state["fc.bias"] = torch.zeros(100)
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    message = refused(saved(tmp_path / "w.pt", state))
    assert "missing (1): fc.weight\n" in message
    assert "unexpected (1): head.weight\n" in message
    assert "do not match (2): " in message
    assert "fc.bias is (100,), the model's (10,)" in message
    assert "conv1.weight is torch.int8, the model's torch.float32" in message
    assert "way out: choose the model" in message


def test_a_long_list_is_cut_at_ten(tmp_path):
    message = refused(saved(tmp_path / "w.pt", trained()), build("preact_resnet20"))
    (missing,) = [line for line in message.splitlines() if "missing" in line]
    assert missing.count(",") == 10
    assert missing.endswith("more")


def test_names_of_pytorchcv_are_recognised_when_the_map_was_forgotten(tmp_path):
    state = {theirs: torch.ones(1) for theirs, _ in preact_names("basic")}
    assert "give key_map pytorchcv" in refused(saved(tmp_path / "w.pt", state))


@pytest.mark.parametrize(
    ("old", "new", "key_map"),
    [
        (r"^", "backbone.", {"backbone": ""}),
        (r"^fc\.", "head.", {"head": "fc"}),
        (r"^conv1\.weight$", "w", {"w": "conv1.weight"}),
        (r"^(fc\.)?", r"top.\1x.", {"top": "", "top.x": "", "top.fc.x": "fc"}),
    ],
)
def test_a_key_map_of_ones_own_renames_names_and_prefixes(old, new, key_map, tmp_path):
    network, state = build(), trained()
    file = saved(tmp_path / "w.pt", {re.sub(old, new, k): v for k, v in state.items()})
    load_weights(network, file, key_map=key_map)
    assert_loaded(network, state)


def test_a_key_map_that_joins_two_names_is_refused(tmp_path):
    file = saved(tmp_path / "w.pt", trained())
    assert "two tensors" in refused(file, key_map={"bn1": "bn2"})


def test_an_unknown_key_map_lists_the_known_ones(tmp_path):
    file = saved(tmp_path / "w.pt", trained())
    with pytest.raises(UnknownNameError, match="unknown key map 'timm'; known: none, pytorchcv"):
        load_weights(build(), file, key_map="timm")


# ---- files that are none


class Evil:
    """Unpickled without care, this makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("write", ["torch.save", "pickle"])
def test_a_pickle_with_code_is_refused_and_does_not_run(write, tmp_path):
    harm, file = tmp_path / "harm", tmp_path / "w.pt"
    if write == "torch.save":
        torch.save(trained() | {"surprise": Evil(str(harm))}, file)
    else:
        file.write_bytes(pickle.dumps({"surprise": Evil(str(harm))}, protocol=2))
    message = refused(file)
    assert not harm.exists()
    assert f"{os.mkdir.__module__}.mkdir); loading it could run code, so it is refused" in message
    assert "way out: torch.save(model.state_dict(), FILE)" in message


@pytest.mark.parametrize("extra", [np.float64(91.2), nn.Linear(2, 2)], ids=["numpy", "module"])
def test_other_python_objects_are_named_with_the_way_out(extra, tmp_path):
    message = refused(saved(tmp_path / "w.pt", {"state_dict": trained(), "extra": extra}))
    assert "holds a Python object besides tensors (" in message
    assert "torch.save(model.state_dict(), FILE)" in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere\.pt"):
        load_weights(build(), tmp_path / "nowhere.pt")


def test_a_folder_is_no_file(tmp_path):
    assert "is not a file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "is empty"),
        (b"not weights at all", "whole"),
        (bytes(range(256)) * 4, "whole"),
        (b"PK\x03\x04 torn", "whole"),
    ],
)
def test_a_file_of_something_else_is_refused(name, contents, said, tmp_path):
    file = tmp_path / name
    file.write_bytes(contents)
    assert said in refused(file)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_refused(kept, tmp_path):
    whole = saved(tmp_path / "w.pt", trained())
    save_file(trained(), tmp_path / "w.safetensors")
    for file in (whole, tmp_path / "w.safetensors"):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
        assert "whole" in refused(file)


@pytest.mark.parametrize("contents", [[torch.ones(2)], {}, torch.ones(2), {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_refused(contents, tmp_path):
    assert "holds no state dict" in refused(saved(tmp_path / "w.pt", contents))


def test_values_that_are_no_tensors_are_named(tmp_path):
    message = refused(saved(tmp_path / "w.pt", trained() | {"epoch": 3}))
    assert "not tensors (1): epoch" in message


# ---- pytorchcv

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def preact_names(block: str, units: int = 2) -> Iterator[tuple[str, str]]:
    """(pytorchcv's name, ours) of every tensor of a pre-activation network."""
    yield "features.init_block.weight", "conv1.weight"
    for stage, unit in ((s, u) for s in (1, 2, 3) for u in range(1, units + 1)):
        theirs, ours = f"features.stage{stage}.unit{unit}", f"layer{stage}.{unit - 1}"
        for k in (1, 2) if block == "basic" else (1, 2, 3):
            yield f"{theirs}.body.conv{k}.conv.weight", f"{ours}.conv{k}.weight"
            yield from ((f"{theirs}.body.conv{k}.bn.{x}", f"{ours}.bn{k}.{x}") for x in BN)
        if unit == 1 and (stage > 1 or block == "bottleneck"):
            yield f"{theirs}.identity_conv.weight", f"{ours}.shortcut.weight"
    yield from ((f"features.post_activ.bn.{x}", f"bn.{x}") for x in BN)
    yield from ((f"output.{x}", f"fc.{x}") for x in ("weight", "bias"))


def postact_names(block: str, units: int = 2) -> Iterator[tuple[str, str]]:
    """(pytorchcv's name, ours) of every tensor of a post-activation network."""
    yield "features.init_block.conv.weight", "conv1.weight"
    yield from ((f"features.init_block.bn.{x}", f"bn1.{x}") for x in BN)
    for stage, unit in ((s, u) for s in (1, 2, 3) for u in range(1, units + 1)):
        theirs, ours = f"features.stage{stage}.unit{unit}", f"layer{stage}.{unit - 1}"
        for k in (1, 2) if block == "basic" else (1, 2, 3):
            yield f"{theirs}.body.conv{k}.conv.weight", f"{ours}.conv{k}.weight"
            yield from ((f"{theirs}.body.conv{k}.bn.{x}", f"{ours}.bn{k}.{x}") for x in BN)
        if unit == 1 and (stage > 1 or block == "bottleneck"):
            yield f"{theirs}.identity_conv.conv.weight", f"{ours}.shortcut.weight"
            yield from ((f"{theirs}.identity_conv.bn.{x}", f"{ours}.shortcut_bn.{x}") for x in BN)
    yield from ((f"output.{x}", f"fc.{x}") for x in ("weight", "bias"))


PYTORCHCV = [
    (family, names, block, depth)
    for family, names in (("preact_resnet", preact_names), ("cifar_resnet", postact_names))
    for block, depth in (("basic", 14), ("bottleneck", 20))  # two blocks in each stage
]


@pytest.mark.parametrize(("family", "names", "block", "depth"), PYTORCHCV)
def test_every_name_of_pytorchcv_is_known(family, names, block, depth, tmp_path):
    network, state = (
        build(f"{family}{depth}", block=block),
        trained(f"{family}{depth}", block=block),
    )
    theirs = {their_name: state[our_name] for their_name, our_name in names(block)}
    assert len(theirs) == len(state)
    load_weights(network, saved(tmp_path / "w.pth", theirs), key_map="pytorchcv")
    assert_loaded(network, state)


def pytorchcv_logits(state: dict[str, Tensor], x: Tensor, *, preact: bool) -> Tensor:
    """What pytorchcv's basic CIFAR networks compute, from their state dict."""

    def bn(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def preact_unit(unit: str, x: Tensor, stride: int) -> Tensor:
        active = bn(f"{unit}.body.conv1.bn", x).relu()
        resized = f"{unit}.identity_conv.weight" in state
        identity = conv(f"{unit}.identity_conv", active, stride) if resized else x
        y = conv(f"{unit}.body.conv1.conv", active, stride)
        return identity + conv(f"{unit}.body.conv2.conv", bn(f"{unit}.body.conv2.bn", y).relu())

    def postact_unit(unit: str, x: Tensor, stride: int) -> Tensor:
        identity = x
        if f"{unit}.identity_conv.conv.weight" in state:
            identity = conv(f"{unit}.identity_conv.conv", x, stride)
            identity = bn(f"{unit}.identity_conv.bn", identity)
        y = bn(f"{unit}.body.conv1.bn", conv(f"{unit}.body.conv1.conv", x, stride)).relu()
        return (identity + bn(f"{unit}.body.conv2.bn", conv(f"{unit}.body.conv2.conv", y))).relu()

    if preact:
        x = conv("features.init_block", x)
    else:
        x = bn("features.init_block.bn", conv("features.init_block.conv", x)).relu()
    for stage, unit in ((s, u) for s in (1, 2, 3) for u in (1, 2)):
        stride = 2 if stage > 1 and unit == 1 else 1
        run = preact_unit if preact else postact_unit
        x = run(f"features.stage{stage}.unit{unit}", x, stride)
    if preact:
        x = bn("features.post_activ.bn", x).relu()
    return F.linear(x.mean((2, 3)), state["output.weight"], state["output.bias"])


@pytest.mark.parametrize(
    ("name", "names"), [("preact_resnet14", preact_names), ("cifar_resnet14", postact_names)]
)
def test_weights_of_pytorchcv_compute_what_they_computed_there(name, names, tmp_path):
    state = trained(name)
    theirs = {their_name: state[our_name] for their_name, our_name in names("basic")}
    network = build(name)
    load_weights(network, saved(tmp_path / "w.pth", theirs), key_map="pytorchcv")
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = pytorchcv_logits(theirs, images, preact=name.startswith("preact"))
    torch.testing.assert_close(network.eval()(images), expected)
