import pytest
from bitladder.pipeline.config import WIDTHS
from bitladder.pipeline.config_load import load_config, parse_config
from bitladder.pipeline.epoch_shares import SHARES, divide
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.plan import make_plan
from hypothesis import given
from hypothesis import strategies as st

FP32 = {"weight_bits": 32, "activation_bits": 32, "epochs": 7}
BASE = {"name": "t", "data": {"name": "digits"}, "model": {"name": "tiny_convnet"}}

SHARE = st.floats(min_value=1e-6, max_value=1e6)


def rung(weight_bits, activation_bits=None, **own):
    return {"weight_bits": weight_bits, "activation_bits": activation_bits or weight_bits, **own}


def ladder(*rungs, **top):
    return {**BASE, **top, "ladder": [FP32, *rungs]}


def epochs_of(raw):
    return [stage.train.epochs for stage in parse_config(raw).ladder]


def errors_of(raw):
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value.errors


# the division


@given(st.lists(SHARE, min_size=1, max_size=20), st.integers(0, 500))
def test_parts_are_whole_and_at_least_1_and_sum_to_the_total(shares, more):
    parts = divide(len(shares) + more, shares)
    assert sum(parts) == len(shares) + more
    assert all(isinstance(part, int) and part >= 1 for part in parts)


@given(st.lists(SHARE, min_size=2, max_size=20), st.integers(0, 500))
def test_a_larger_share_never_gets_less(shares, more):
    ordered = sorted(shares)
    parts = divide(len(shares) + more, ordered)
    assert parts == sorted(parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.integers(1, 20))
def test_what_divides_evenly_is_in_proportion(shares, factor):
    assert divide(factor * sum(shares), shares) == [factor * share for share in shares]


def test_the_largest_remainders_get_what_is_left():
    assert divide(10, [1, 1, 1]) == [3, 3, 4]
    assert divide(10, [1.0, 2.0, 4.0]) == [1, 3, 6]  # 1.43, 2.86, 5.71
    assert divide(10, [1, 100, 100]) == [1, 4, 5]


@pytest.mark.parametrize(("total", "shares"), [(2, [1, 1, 1]), (3, []), (0, [1])])
def test_too_little_to_divide_is_refused(total, shares):
    with pytest.raises(ValueError, match="at least 1 each"):
        divide(total, shares)


def test_every_width_has_a_share_and_narrower_ones_no_smaller_one():
    assert set(SHARES) == set(WIDTHS) - {32}
    falling = [SHARES[bits] for bits in sorted(SHARES)]
    assert falling == sorted(falling, reverse=True)


# the config


def test_quantized_rungs_share_the_total_by_their_narrowest_width():
    raw = ladder(rung(8), rung(4), rung(2), rung(1), total_epochs=42)
    assert epochs_of(raw) == [7, 2, 4, 12, 24]
    mixed = ladder(rung(2, 1), rung(1, 32), rung(8, 2), total_epochs=30)
    assert epochs_of(mixed) == [7, 12, 12, 6]


def test_a_rung_may_have_another_share():
    raw = ladder(rung(8, share=1), rung(2, share=0.5), rung(1, share=2.5), total_epochs=8)
    assert epochs_of(raw) == [7, 2, 1, 5]


@pytest.mark.parametrize("own", [{"epochs": 10}, {"train": {"epochs": 10}}])
def test_a_rung_with_epochs_of_its_own_takes_them_off_the_total(own):
    raw = ladder(rung(8), rung(4, **own), rung(1), total_epochs=23)
    assert epochs_of(raw) == [7, 1, 10, 12]


def test_the_epochs_above_the_ladder_are_those_of_full_precision_rungs_alone():
    raw = ladder(rung(8), rung(8), total_epochs=10, train={"epochs": 99})
    raw["ladder"].append({"weight_bits": 32, "activation_bits": 32})
    assert epochs_of(raw) == [7, 5, 5, 99]


def test_shared_epochs_give_the_keys_of_written_ones():
    shared = make_plan(parse_config(ladder(rung(4), rung(1, share=4), total_epochs=12)))
    written = make_plan(parse_config(ladder(rung(4, epochs=4), rung(1, epochs=8))))
    assert shared.run == written.run


def test_a_shared_config_is_stored_and_loads_again_as_the_same():
    config = parse_config(ladder(rung(4), rung(1), total_epochs=12))
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_total_can_be_set_over_a_file(tmp_path):
    path = tmp_path / "shared.yaml"
    path.write_text(
        "name: shared\ndata: {name: digits}\nmodel: {name: tiny_convnet}\nladder:\n"
        "  - {weight_bits: 8, activation_bits: 8}\n  - {weight_bits: 1, activation_bits: 2}\n"
    )
    config = load_config(str(path), ["total_epochs=26", "ladder.0.share=12"])
    assert [stage.train.epochs for stage in config.ladder] == [13, 13]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            ladder(rung(8), rung(4), rung(1), total_epochs=2),
            "total_epochs: 2 is too small: each rung that shares it (3) needs 1",
        ),
        (
            ladder(rung(8, epochs=9), rung(4), total_epochs=9),
            "total_epochs: 9 is too small: each rung that shares it (1) needs 1, after the 9 that",
        ),
        (ladder(rung(8, epochs=9), total_epochs=9), "total_epochs: no rung shares it"),
        (ladder(rung(8), total_epochs=0), "total_epochs: must be a whole number"),
        (ladder(rung(8), total_epochs=7.5), "total_epochs: must be a whole number"),
        (ladder(rung(8), total_epochs=True), "total_epochs: must be a whole number"),
        (ladder(rung(8, share=2)), "ladder.1.share: is of total_epochs, which is not given"),
        (
            ladder(rung(8, share=2, epochs=3), rung(4), total_epochs=9),
            "ladder.1.share: and epochs are both given",
        ),
        (ladder(rung(8, share=0), total_epochs=9), "ladder.1.share: must be a number above 0"),
        (ladder(rung(8, share="2"), total_epochs=9), "ladder.1.share: must be a number above 0"),
        (
            ladder(rung(32, share=2), rung(8), total_epochs=9),
            "ladder.1.share: is for quantized rungs",
        ),
        (ladder("w8a8", rung(8), total_epochs=9), "ladder.1: must be a mapping"),
        (ladder(rung(8, shaer=1), total_epochs=9), "did you mean 'share'?"),
    ],
)
def test_a_wrong_total_or_share_is_named(raw, message):
    found = errors_of(raw)
    assert len(found) == 1
    assert message in found[0]
