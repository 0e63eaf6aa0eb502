"""Feeds the loader of packed files with damaged ones: every one has to end in one message.

    python benchmarks/fuzz_packed.py --files 10000

Half of the files have a correct checksum, so that what lies behind it is reached: bytes changed,
cut, repeated and swapped in the tensors and in the header, and values changed in the description.
Each is loaded under a limit of memory and watched for time. Exits 1 at the first that crashes,
hangs, or is accepted though its network differs and its checksum was not forged.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bitladder.models import build_model
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.packed_description import PackedImages
from bitladder.pipeline.packed_file import checksum, read_packed, write_packed
from bitladder.quant import QuantizerChoice, QuantPolicy, calibrate, quantize_model
from safetensors import safe_open
from safetensors.torch import save

SECONDS = 20  # for one file
GIGABYTES = 8  # of address space, of which importing torch takes the most
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    255,
    2**31,
    2**63,
    1e308,
    "",
    "x",
    [],
    {},
    [[]],
)


class TooSlow(BaseException):
    """A file took too long; no error that the loader could take for its own."""


def main() -> None:
    """Loads the files; exits 1 where one does what it must not."""
    args = parse_arguments()
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30, resource.RLIM_INFINITY))
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = [make(Path(folder) / f"{bits}.safetensors", bits) for bits in (4, 1)]
        ends: Counter[str] = Counter()
        slowest, began = 0.0, time.monotonic()
        for number in range(args.files):
            source = chance.choice(whole)
            forged = chance.random() < 0.5
            damaged = (with_valid_checksum if forged else damage)(source, chance)
            file = Path(folder) / "damaged.safetensors"
            file.write_bytes(damaged)
            start = time.monotonic()
            end = outcome(file)
            slowest = max(slowest, time.monotonic() - start)
            if end == "accepted" and not forged and meaning(file) != meaning(source):
                end = "ACCEPTED THOUGH CHANGED"
            elif end == "accepted":
                end = "accepted: another network that fits together" if forged else "accepted"
            ends[end] += 1
            if end.isupper() or end.startswith("CRASH"):
                kept = Path(f"fuzz-{number}.safetensors").resolve()
                kept.write_bytes(damaged)
                print(f"file {number}: {end}; kept as {kept}")
                sys.exit(1)
            if number % 100 == 99:
                print(f"\r{number + 1} of {args.files}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{args.files} files, seed {args.seed}, {time.monotonic() - began:.0f} s")
    print(f"slowest {slowest:.2f} s, most memory {memory():.0f} MB")
    for end, count in ends.most_common():
        print(f"{count:6}  {end}")


def make(file: Path, bits: int) -> Path:
    """A packed file of a small network."""
    network = {
        **{"name": "preact_resnet8", "options": {"width": 4}},
        **{"num_classes": 10, "in_channels": 1, "image_size": 8},
    }
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = build_model(**network)
    method = QuantizerChoice("uniq" if bits == 1 else "lsq")
    policy = QuantPolicy(bits, bits, weight=method, activation=method)
    model = quantize_model(model, policy, inputs=x)
    calibrate(model, [x])
    images = PackedImages(mean=[0.5], std=[0.5], classes=[str(n) for n in range(10)])
    write_packed(file, model.eval(), network=network, images=images, made={"by": "fuzzing"})
    return file


def damage(source: Path, chance: random.Random) -> bytes:
    """The bytes of a file after something happened to it."""
    data = bytearray(source.read_bytes())
    # the header is a tenth of the file, and where most of what can go wrong is said
    reach = len(data) if chance.random() < 0.5 else int.from_bytes(data[:8], "little") + 8
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(min(reach, len(data)))
        match chance.randrange(5):
            case 0:
                data[place] = chance.randrange(256)
            case 1:
                data[place] ^= 1 << chance.randrange(8)
            case 2:
                del data[place : place + chance.randint(1, 64)]
            case 3:
                data[place:place] = data[: chance.randint(1, 64)]
            case 4:
                data[:8] = chance.choice(
                    [b"\xff" * 8, bytes(8), chance.randrange(2**40).to_bytes(8, "little")]
                )
        if not data:
            break
    return bytes(data)


def with_valid_checksum(source: Path, chance: random.Random) -> bytes:
    """The file with its description or its tensors changed, and a checksum of what it is now."""
    with safe_open(source, framework="pt") as opened:
        names = opened.keys()
        tensors = {name: opened.get_tensor(name) for name in names}
        description = json.loads(opened.metadata()["bitladder"])["description"]
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.6:
            change_value(description, chance)
            continue
        name = chance.choice(sorted(tensors))
        match chance.randrange(4):
            case 0:
                tensors.pop(name)
            case 1:
                tensors[f"{name}x"] = tensors[name].clone()
            case 2:
                tensors[name] = torch.cat([tensors[name].reshape(-1)] * 2)
            case 3:
                tensors[name] = tensors[name].to(chance.choice([torch.int64, torch.float16]))
        if not tensors:
            break
    try:
        text = json.dumps({"sha256": checksum(description, tensors), "description": description})
    except ValueError:
        return source.read_bytes()[:-1]
    return save(tensors, {"bitladder": text})


def change_value(value: Any, chance: random.Random) -> None:
    """Puts something else in one place of nested lists and mappings."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        value[key] = chance.choice(STRANGE)
        return


def outcome(file: Path) -> str:
    """How loading ends."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        read_packed(file)
    except ConfigError as error:
        # of the message only what kind it is
        text = str(error).removeprefix(f"{file}: ")
        return f"refused: {''.join(c for c in text.split(':')[0] if not c.isdigit())[:50]}"
    except TooSlow:
        return "HUNG"
    except BaseException as error:
        return f"CRASHED with {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "accepted"


def meaning(file: Path) -> Any:
    """What of a file counts; provenance and class names may say anything."""
    packed = read_packed(file)
    description = packed.description.model_dump(exclude={"made", "images"})
    state = {name: value.tolist() for name, value in packed.model.state_dict().items()}
    return description, state


def memory() -> float:
    """The most that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _too_slow(*_: Any) -> None:
    raise TooSlow


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
