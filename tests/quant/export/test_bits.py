import pytest
import torch
from bitladder.quant.export.bits import pack_bits, packed_size, unpack_bits
from hypothesis import given
from hypothesis import strategies as st


@given(bits=st.integers(1, 16), count=st.integers(0, 70), seed=st.integers(0, 2**16))
def test_codes_come_back_from_as_many_bits_as_they_have(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (count,), generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(count, bits) == -(-count * bits // 8)
    back = unpack_bits(packed, bits, count)
    assert back.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(back.long(), codes)


def test_the_lowest_bit_comes_first():
    assert pack_bits(torch.tensor([1, 0, 0, 1, 1]), 1).tolist() == [0b11001]
    assert pack_bits(torch.tensor([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit into 2 bits"):
        pack_bits(torch.tensor([4]), 2)


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (torch.zeros(3, dtype=torch.uint8), "fill 2 bytes"),
        (torch.zeros(2), "fill 2 bytes"),
        (torch.tensor([0, 0b1000_0000], dtype=torch.uint8), "behind the last code"),
    ],
)
def test_other_bytes_than_the_codes_fill_are_refused(packed, says):
    with pytest.raises(ValueError, match=says):
        unpack_bits(packed, 3, 5)


def test_codes_have_between_1_and_16_bits():
    with pytest.raises(ValueError, match="1 to 16"):
        pack_bits(torch.tensor([0]), 17)
