"""FP32 weights that somebody trained before, into a network of ours."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..quant.registry import UnknownNameError, unknown

KeyMap = Literal["none", "pytorchcv"] | Mapping[str, str]

# Where training programs put the state dict; what stands beside it (an EMA copy, the optimizer,
# the epoch) is not read.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and DDP, and by torch.compile

# The names of pytorchcv's CIFAR networks (`preresnet20_cifar10`, `resnet20_cifar10`, ...), in
# preresnet_cifar.py and resnet_cifar.py of osmr/imgclsmob; each rule is applied in turn.
_PYTORCHCV: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^features\.init_block\.bn\.", "bn1."),
    (r"^features\.init_block\.(conv\.)?", "conv1."),
    (r"^features\.post_activ\.bn\.", "bn."),
    (r"^output\.", "fc."),
    (r"^features\.stage(\d+)\.unit(\d+)\.", lambda m: f"layer{m[1]}.{int(m[2]) - 1}."),
    (r"\.body\.conv(\d)\.conv\.", r".conv\1."),
    (r"\.body\.conv(\d)\.bn\.", r".bn\1."),
    (r"\.identity_conv\.bn\.", ".shortcut_bn."),
    (r"\.identity_conv\.(conv\.)?", ".shortcut."),
)


def load_weights(model: nn.Module, file: Path, *, key_map: KeyMap = "none") -> str:
    """Loads an FP32 state dict, all or nothing, and returns the file's sha256.

    A `.safetensors` file or one that `torch.save` wrote; plain or under `state_dict`,
    `model_state_dict`, `model` or `net`; `module.` and `_orig_mod.` before the names are
    dropped. Half, bfloat16 and double become float32. `num_batches_tracked` may be absent.
    Nothing is unpickled but tensors and plain containers, so a file cannot run code.

    Args:
        model: changed in place, and only if everything fits.
        file: the weights.
        key_map: `pytorchcv` for the names of its CIFAR ResNets; or names or dotted prefixes
            of the file -> those of the model (`{"backbone": "", "head": "fc"}`), the longest
            that fits a name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, does not fit, or holds infinite or NaN weights; the
            message lists what is missing, unexpected, and of another shape.
    """
    file = Path(file)
    data = _read(file)
    wanted = model.state_dict()
    found = _renamed(_parse(data, file), wanted, key_map, file)

    counters = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    complaints = [
        _listing("missing", [k for k in wanted if k not in found and k not in counters]),
        _listing("unexpected", [k for k in found if k not in wanted]),
        _listing("do not match", _mismatches(found, wanted)),
    ]
    if any(complaints):
        raise ValueError(
            f"the weights in {file} do not fit the model:\n{''.join(complaints)}{_way_out(found)}"
        )
    state = counters | {k: v.to(wanted[k].dtype) for k, v in found.items()}
    if bad := [k for k, v in state.items() if not v.isfinite().all()]:
        raise ValueError(
            f"the weights in {file} are not finite in float32:\n{_listing('infinite or NaN', bad)}"
            "  way out: take an earlier checkpoint of that training"
        )
    model.load_state_dict(state)
    return hashlib.sha256(data).hexdigest()


def _read(file: Path) -> bytes:
    """The whole file, so that what is hashed is what is loaded."""
    if not file.exists():
        raise FileNotFoundError(f"no weights at {file}")
    if not file.is_file():
        raise ValueError(f"{file} is not a file; give the file of weights itself")
    data = file.read_bytes()
    if not data:
        raise ValueError(f"{file} is empty; copy it again from where it was trained")
    return data


def _parse(data: bytes, file: Path) -> dict[str, Tensor]:
    """The state dict in the file, out of its wrapping."""
    loaded = _parse_safetensors(data, file) if file.suffix == ".safetensors" else _load(data, file)
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"{file} holds no state dict but {_kind(loaded)}; {_SAVE}")
    if other := [str(k) for k, v in loaded.items() if not isinstance(v, Tensor)]:
        raise ValueError(f"{file} is no state dict:\n{_listing('not tensors', other)}  {_SAVE}")
    return {str(key): value.detach() for key, value in loaded.items()}


_SAVE = "way out: torch.save(model.state_dict(), FILE) in the program that trained it"


def _kind(loaded: object) -> str:
    return "an empty one" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"


def _parse_safetensors(data: bytes, file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _load(data: bytes, file: Path) -> object:
    """What torch.save wrote, tensors and plain containers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; a failure is reported below
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torn bytes raise nearly anything: KeyError, EOFError, ...
        named = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise ValueError(
                f"{file} holds a Python object besides tensors ({named[1]}); loading it could run "
                f"code, so it is refused. {_SAVE}, or write .safetensors"
            ) from error
        raise ValueError(
            f"{file} cannot be read as weights; is it whole, and written by "
            "torch.save(model.state_dict(), FILE) or safetensors?"
        ) from error


def _renamed(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], key_map: KeyMap, file: Path
) -> dict[str, Tensor]:
    """The file's tensors under the model's names."""
    rename = _rename(key_map)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = key
        while bare not in wanted and bare.startswith(PREFIXES):
            bare = bare.partition(".")[2]
        name = rename(bare)
        if name in renamed:
            raise ValueError(f"two tensors in {file} are {name!r} by the key map; one is {key!r}")
        renamed[name] = value
    return renamed


def _rename(key_map: KeyMap) -> Callable[[str], str]:
    if isinstance(key_map, Mapping):
        return lambda key: _with_prefix_replaced(key, key_map)
    if key_map == "pytorchcv":
        return _from_pytorchcv
    if key_map == "none":
        return lambda key: key
    raise UnknownNameError(unknown("key map", key_map, ("none", "pytorchcv")))


def _from_pytorchcv(key: str) -> str:
    for pattern, replacement in _PYTORCHCV:
        key = re.sub(pattern, replacement, key)
    return key


def _with_prefix_replaced(key: str, prefixes: Mapping[str, str]) -> str:
    for old in sorted(prefixes, key=len, reverse=True):
        if f"{key}.".startswith(f"{old}."):
            return f"{prefixes[old]}{key[len(old) :]}".removeprefix(".")
    return key


def _mismatches(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key in [k for k in wanted if k in found]:
        ours, theirs = wanted[key], found[key]
        if theirs.shape != ours.shape:
            problems.append(f"{key} is {tuple(theirs.shape)}, the model's {tuple(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
            problems.append(f"{key} is {theirs.dtype}, the model's {ours.dtype}")
        elif theirs.is_meta or theirs.layout is not torch.strided:
            problems.append(f"{key} has no plain values (meta or sparse)")
    return problems


def _listing(title: str, names: Iterable[str], most: int = 10) -> str:
    """One line: how many, and the first ten of them; empty if there are none."""
    names = list(names)
    if not names:
        return ""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"  {title} ({len(names)}): {', '.join(names[:most])}{more}\n"


def _way_out(found: Mapping[str, Tensor]) -> str:
    if any(key.startswith("features.init_block.") for key in found):
        return "  way out: these are pytorchcv's names; give key_map pytorchcv"
    return (
        "  way out: choose the model (depth, width, block, shortcut, classes) that these weights "
        "were trained in, or map the names with key_map"
    )
