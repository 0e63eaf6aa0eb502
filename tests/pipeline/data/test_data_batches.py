"""Order, augmentation and normalisation of the batches that a split hands out."""

import numpy as np
import pytest
import torch
from bitladder.pipeline.data import TensorSplit
from bitladder.pipeline.data.augment import Augmentation
from bitladder.pipeline.data.bundle import channel_statistics
from bitladder.pipeline.data.order import seed_of
from torch import Tensor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_split(
    num_samples: int = 50, *, channels: int = 3, size: int = 6, **augmentation: object
) -> TensorSplit:
    generator = torch.Generator().manual_seed(0)
    shape = (num_samples, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return TensorSplit(
        images,
        torch.arange(num_samples),  # the label says which sample it is
        mean=MEAN[:channels],
        std=STD[:channels],
        augmentation=Augmentation(**augmentation),
    )


def epoch(
    split: TensorSplit, batch_size: int = 8, **options: object
) -> list[tuple[Tensor, Tensor]]:
    options = {"seed": 3, "epoch": 1, "augment": True, "device": "cpu"} | options
    return list(split.batches(batch_size, **options))


def together(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def by_index(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    x, y = together(batches)
    return x[y.argsort()]


def as_pixels(x: Tensor) -> np.ndarray:
    """The uint8 images, (N, C, H, W), that were normalised."""
    channels = x.shape[1]
    mean = torch.tensor(MEAN[:channels]).view(1, -1, 1, 1)
    std = torch.tensor(STD[:channels]).view(1, -1, 1, 1)
    return ((x * std + mean) * 255).round().to(torch.uint8).numpy()


def test_the_same_seed_and_epoch_give_the_same_batches():
    first, second = (together(epoch(make_split(crop=2, flip=True))) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 2}])
def test_another_seed_or_epoch_gives_another_order_and_another_look(other):
    split = make_split(crop=2, flip=True)
    assert not torch.equal(together(epoch(split))[1], together(epoch(split, **other))[1])
    assert not torch.equal(by_index(epoch(split)), by_index(epoch(split, **other)))


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_starting_late_equals_skipping(start):
    split = make_split(crop=2, flip=True)
    skipped, started = epoch(split)[start:], epoch(split, start=start)
    assert len(started) == len(skipped)
    for (x, y), (u, v) in zip(skipped, started, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def test_a_start_after_the_last_batch_is_refused():
    with pytest.raises(ValueError, match="start must be from 0 to 7"):
        epoch(make_split(), start=8)


def test_the_look_of_a_sample_does_not_hang_on_the_batch_size():
    split = make_split(crop=2, flip=True)
    assert torch.equal(by_index(epoch(split, 6)), by_index(epoch(split, 50)))


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch(make_split(crop=2, flip=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_augmentation_equals_padding_cropping_and_flipping_each_image(channels, padding):
    split = make_split(channels=channels, crop=2, flip=True, padding=padding)
    draws = split.augmentation.draw(len(split), 3, 1)
    seen = as_pixels(by_index(epoch(split)))
    mode = "constant" if padding == "zero" else "reflect"
    for i, image in enumerate(split.images.numpy()):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode=mode)
        top, left = 2 + int(draws.down[i]), 2 + int(draws.right[i])
        expected = padded[:, top : top + 6, left : left + 6]
        if draws.flip[i]:
            expected = expected[:, :, ::-1]
        assert np.array_equal(seen[i], expected), i


def test_draws_reach_every_offset_and_flip_half():
    draws = Augmentation(crop=2, flip=True).draw(2000, 0, 0)
    offsets = torch.stack([draws.down, draws.right], 1).unique(dim=0)
    assert len(offsets) == 25
    assert draws.down.abs().max() == 2
    assert 0.45 < draws.flip.float().mean() < 0.55


def test_without_augment_images_are_as_stored():
    split = make_split(crop=2, flip=True)
    assert np.array_equal(as_pixels(by_index(epoch(split, augment=False))), split.images.numpy())


def test_normalisation_is_per_channel():
    split = make_split()
    x, _ = next(iter(split.evaluation_batches(50, "cpu")))
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.allclose(x, (split.images / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_float32_and_channels_last(augment):
    x, y = epoch(make_split(crop=1), augment=augment)[0]
    assert x.dtype == torch.float32
    assert x.shape == (8, 3, 6, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == torch.int64


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "sizes"),
    [(16, 8, [8, 8]), (18, 8, [8, 8, 2]), (17, 8, [8, 8]), (3, 1, [1, 1, 1]), (5, 8, [5])],
)
def test_a_last_batch_is_kept_unless_it_holds_one_sample(num_samples, batch_size, sizes):
    split = make_split(num_samples)
    assert [len(y) for _, y in epoch(split, batch_size)] == sizes
    assert split.num_batches(batch_size) == len(sizes)


def test_evaluation_gives_every_sample_once_in_order():
    split = make_split(17, crop=2, flip=True)
    _, y = together(list(split.evaluation_batches(8, "cpu")))
    assert y.tolist() == list(range(17))


def calibration(split, batch_size, num_batches, *, seed=0, augment=False):
    return list(
        split.calibration(batch_size, num_batches, seed=seed, augment=augment, device="cpu")
    )


def test_calibration_batches_are_distinct_samples_that_the_seed_chooses():
    split = make_split(crop=2, flip=True)
    first, again = calibration(split, 8, 4), calibration(split, 8, 4)
    other = calibration(split, 8, 4, seed=1)
    x, y = together(first)
    assert [len(labels) for _, labels in first] == [8, 8, 8, 8]
    assert len(y.unique()) == 32
    assert np.array_equal(as_pixels(x), split.images[y].numpy())
    assert torch.equal(y, together(again)[1])
    assert not torch.equal(y, together(other)[1])


def test_augmented_calibration_samples_look_as_in_the_first_epoch():
    split = make_split(crop=2, flip=True)
    images, labels = together(epoch(split, 8, seed=0, epoch=0))
    found, chosen = together(calibration(split, 8, 4, augment=True))
    plain, _ = together(calibration(split, 8, 4))
    assert not torch.equal(found, plain)
    place = {label: i for i, label in enumerate(labels.tolist())}
    assert torch.equal(found, images[[place[label] for label in chosen.tolist()]])


def test_calibration_asks_for_no_more_than_there_is():
    assert [len(y) for _, y in calibration(make_split(20), 8, 9)] == [8, 8, 4]


def test_a_crop_as_large_as_the_image_is_refused():
    with pytest.raises(ValueError, match="crop must be from 0 to 5"):
        make_split(crop=6)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        make_split().evaluation_batches(batch_size, "cpu")
    with pytest.raises(ValueError, match="batch_size"):
        epoch(make_split(), batch_size)


def test_seeds_are_the_same_in_every_process():
    assert seed_of(0, 1, "augment") == 1268962583367489462
    assert seed_of(0, 11) != seed_of(1, 1)


def test_channel_statistics_equal_numpys():
    pixels = make_split().images.permute(0, 2, 3, 1)
    mean, std = channel_statistics(pixels)
    values = pixels.double().numpy() / 255
    assert np.allclose(mean, values.mean((0, 1, 2)), atol=5e-5)
    assert np.allclose(std, values.std((0, 1, 2)), atol=5e-5)


def test_a_constant_channel_can_be_normalised():
    mean, std = channel_statistics(torch.full((4, 2, 2, 1), 51, dtype=torch.uint8))
    assert (mean, std) == ((0.2,), (1.0,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_what_the_cpu_sees():
    split = make_split(crop=2, flip=True)
    on_cpu, on_gpu = epoch(split), epoch(split, device="cuda")
    for (x, y), (u, v) in zip(on_cpu, on_gpu, strict=True):
        assert u.is_cuda
        assert u.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(x, u.cpu(), atol=1e-6)
        assert torch.equal(y, v.cpu())
