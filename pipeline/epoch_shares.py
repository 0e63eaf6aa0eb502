"""How the epochs of a ladder are shared among its rungs: few for the wide ones, most for the last.

`total_epochs` above the ladder is what all quantized rungs get together. Those that say their
own `epochs` take them off it; the others divide the rest by their `share`. What comes out are
ordinary epochs, as if they had been written, so the keys of the stages are those as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

# by the narrower of a rung's weights and activations; only the proportions count
SHARES = {16: 1, 8: 1, 7: 1, 6: 1, 5: 2, 4: 2, 3: 3, 2: 6, 1: 12}

Mistake = tuple[tuple[Any, ...], str]  # where, from the top of the config, and what is wrong


def divide(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers of at least 1 in proportion to the shares, with exactly the sum `total`.

    By the largest remainder, of equal ones the last. Where a proportion is below 1, 1 is given
    and the others divide what is left.

    Raises:
        ValueError: the total is smaller than the number of shares, or there is none.
    """
    if not shares or total < len(shares):
        raise ValueError(f"{total} cannot be divided by {len(shares)} with at least 1 each")
    weights = [Fraction(share) for share in shares]
    small: set[int] = set()
    while True:
        rest = [i for i in range(len(weights)) if i not in small]
        whole = sum(weights[i] for i in rest)
        quotas = {i: (total - len(small)) * weights[i] / whole for i in rest}
        below = {i for i in rest if quotas[i] < 1}
        if not below:
            break
        small |= below
    given = {i: math.floor(quota) for i, quota in quotas.items()}
    left = total - len(small) - sum(given.values())
    by_remainder = sorted(quotas, key=lambda i: (quotas[i] - given[i], i), reverse=True)
    for i in by_remainder[:left]:
        given[i] += 1
    return [given.get(i, 1) for i in range(len(weights))]


def share_epochs(rungs: Sequence[Any], total: Any) -> tuple[list[Any], list[Mistake]]:
    """The rungs as YAML has them, with `epochs` in place of `share`, and all mistakes.

    Args:
        rungs: mappings; anything else is left for the rungs' own check to refuse.
        total: `total_epochs`; None where it is not given.
    """
    errors: list[Mistake] = []
    sharing: dict[int, float] = {}
    taken = 0
    for index, rung in enumerate(rungs):
        if not isinstance(rung, Mapping):
            continue
        if "share" in rung and (wrong := _wrong_share(rung, total)):
            errors.append((("ladder", index, "share"), wrong))
        elif _full_precision(rung):
            continue
        elif (own := _own_epochs(rung)) is None:
            sharing[index] = rung["share"] if "share" in rung else _default_share(rung)
        elif isinstance(own, int):
            taken += own
    epochs: dict[int, int] = {}
    if total is not None:
        wrong = _wrong_total(total, taken, len(sharing))
        if wrong is None:
            divided = divide(total - taken, list(sharing.values()))
            epochs = dict(zip(sharing, divided, strict=True))
        elif not errors:  # a rung with a wrong share would be missing here
            errors.append((("total_epochs",), wrong))
    return [_with_epochs(rung, epochs.get(index)) for index, rung in enumerate(rungs)], errors


def _wrong_share(rung: Mapping[str, Any], total: Any) -> str | None:
    share = rung["share"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        return f"must be a number above 0, not {share!r}"
    if total is None:
        return "is of total_epochs, which is not given; give total_epochs: N, or epochs here"
    if _full_precision(rung):
        return "is for quantized rungs; a rung of 32 bits has epochs of its own"
    if _own_epochs(rung) is not None:
        return "and epochs are both given; give one of them"
    return None


def _wrong_total(total: Any, taken: int, sharing: int) -> str | None:
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        return f"must be a whole number of at least 1, not {total!r}"
    if sharing == 0:
        return "no rung shares it: there is no quantized one without epochs of its own"
    if total - taken < sharing:
        own = f", after the {taken} that others have of their own" if taken else ""
        return f"{total} is too small: each rung that shares it ({sharing}) needs 1{own}"
    return None


def _full_precision(rung: Mapping[str, Any]) -> bool:
    return rung.get("weight_bits") == rung.get("activation_bits") == 32


def _own_epochs(rung: Mapping[str, Any]) -> Any:
    train = rung.get("train")
    inner = train.get("epochs") if isinstance(train, Mapping) else None
    return rung.get("epochs", inner)


def _default_share(rung: Mapping[str, Any]) -> float:
    widths = [rung.get("weight_bits"), rung.get("activation_bits")]
    known = [SHARES[bits] for bits in widths if isinstance(bits, int) and bits in SHARES]
    return max(known, default=1)  # the narrower, the more


def _with_epochs(rung: Any, epochs: int | None) -> Any:
    if not isinstance(rung, Mapping):
        return rung
    own = {key: value for key, value in rung.items() if key != "share"}
    return own if epochs is None else {**own, "epochs": epochs}
