"""Normalization, augmentation and the order of the images."""

import pytest
import torch
from timm.data import create_transform
from torchvision.transforms.functional import to_pil_image

from timm_ham.training.batches import TrainBatches, cutout, eval_batches, normalize, random_crop_flip
from timm_ham.training.data import Split

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def pixels(count=6, height=5, width=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def numbered(count):
    """A split whose images and labels are their own number."""
    labels = torch.arange(count)
    return Split(labels[:, None, None, None].expand(count, 4, 4, 3).to(torch.uint8).contiguous(), labels)


def test_normalize_equals_timms_transform():
    images = pixels(height=32, width=32)
    transform = create_transform((3, 32, 32), mean=MEAN, std=STD, crop_pct=1.0, interpolation='bicubic')
    wanted = torch.stack([transform(to_pil_image(image.permute(2, 0, 1))) for image in images])
    out = normalize(images, MEAN, STD)
    torch.testing.assert_close(out, wanted, check_stride=False)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_crop_and_flip_equal_loops():
    images, padding = pixels(), 2
    offsets = torch.tensor([[0, 0], [2, 2], [4, 4], [1, 3], [4, 0], [3, 2]])
    flips = torch.tensor([False, False, False, True, True, False])
    out = random_crop_flip(images, offsets, flips, padding)
    assert out.shape == images.shape and out.dtype == torch.uint8
    count, height, width, _ = images.shape
    for n in range(count):
        for i in range(height):
            for j in range(width):
                row = i + offsets[n, 0].item() - padding
                column = (width - 1 - j if flips[n] else j) + offsets[n, 1].item() - padding
                inside = 0 <= row < height and 0 <= column < width
                wanted = images[n, row, column].tolist() if inside else [0, 0, 0]
                assert out[n, i, j].tolist() == wanted, (n, i, j)
    assert torch.equal(out[1], images[1])  # an offset of the padding is the image itself


@pytest.mark.parametrize('size', [1, 2, 3, 8, 20])
def test_cutout_equals_loops(size):
    images = normalize(pixels(), MEAN, STD)
    centers = torch.tensor([[0, 0], [4, 6], [2, 3], [0, 6], [3, 1], [1, 5]])
    out = cutout(images, centers, size)
    for n, (row, column) in enumerate(centers.tolist()):
        top, left = row - size // 2, column - size // 2
        for i in range(5):
            for j in range(7):
                blank = top <= i < top + size and left <= j < left + size
                assert torch.equal(out[n, :, i, j], torch.zeros(3) if blank else images[n, :, i, j])


def test_cutout_is_centered_anywhere_and_leaves_the_rest_of_the_augmentation_alone():
    split = Split(torch.full((2000, 5, 7, 3), 255, dtype=torch.uint8), torch.zeros(2000, dtype=torch.long))
    kwargs = dict(mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=2000, seed=1)
    ((images, _),) = TrainBatches(split, cutout=1, **kwargs).epoch(0)
    places = (images == 0).all(1).nonzero()
    assert len(places) == 2000 and len(set(map(tuple, places[:, 1:].tolist()))) == 35
    augmented = [next(TrainBatches(numbered(50), MEAN, STD, 50, 2, True, size).epoch(3)) for size in (0, 2)]
    assert torch.equal(augmented[0][1], augmented[1][1])
    kept = augmented[1][0] != 0
    assert torch.equal(augmented[0][0][kept], augmented[1][0][kept]) and not kept.all()


def test_augmentation_varies_over_its_range():
    """Over an epoch every offset is drawn and about half of the images are mirrored."""
    image = torch.zeros(9, 9, 3, dtype=torch.uint8)
    image[4, 4] = 255
    image[4, 5] = 100  # to the right of the centre, unless mirrored
    split = Split(image.expand(2000, 9, 9, 3).contiguous(), torch.zeros(2000, dtype=torch.long))
    batches = TrainBatches(split, (0.0,) * 3, (1.0,) * 3, 2000, padding=2, flip=True)
    ((images, _),) = batches.epoch(0)
    bright = (images[:, 0] == 1).nonzero()[:, 1:]
    places = {tuple(place) for place in bright.tolist()}
    assert places == {(i, j) for i in range(2, 7) for j in range(2, 7)}
    columns = bright[:, 1]
    mirrored = images[torch.arange(2000), 0, bright[:, 0], (columns - 1).clamp(min=0)] > 0.1
    assert 0.45 < mirrored.float().mean() < 0.55
    unflipped = TrainBatches(split, (0.0,) * 3, (1.0,) * 3, 2000, padding=0, flip=False)
    assert torch.equal(next(unflipped.epoch(0))[0], normalize(split.images, (0.0,) * 3, (1.0,) * 3))


def test_an_epoch_visits_each_image_once_in_a_new_order():
    batches = TrainBatches(numbered(50), MEAN, STD, batch_size=8)
    orders = [[label for _, labels in batches.epoch(epoch) for label in labels.tolist()] for epoch in range(3)]
    assert len(batches) == 6 and all(len(set(order)) == len(order) == 48 for order in orders)
    assert orders[0] != orders[1] != orders[2]
    again = [label for _, labels in batches.epoch(1) for label in labels.tolist()]
    assert again == orders[1]
    for images, labels in batches.epoch(2):
        assert torch.equal(images, normalize(numbered(50).images[labels], MEAN, STD))


def test_seeds_differ():
    orders = {
        tuple(torch.cat([labels for _, labels in TrainBatches(numbered(50), MEAN, STD, 8, seed=seed).epoch(epoch)]))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_each_global_batch(processes):
    kwargs = dict(mean=MEAN, std=STD, batch_size=12, padding=1, flip=True, cutout=2, seed=3)
    alone = list(TrainBatches(numbered(50), **kwargs).epoch(1))
    shares = [
        list(TrainBatches(numbered(50), **kwargs, rank=rank, processes=processes).epoch(1)) for rank in range(processes)
    ]
    for step, (images, labels) in enumerate(alone):
        for rank in range(processes):
            assert torch.equal(shares[rank][step][0], images[rank::processes])
            assert torch.equal(shares[rank][step][1], labels[rank::processes])


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_evaluation_sees_each_image_exactly_once(processes):
    seen = [
        label
        for rank in range(processes)
        for _, labels in eval_batches(numbered(23), MEAN, STD, 4, rank, processes)
        for label in labels.tolist()
    ]
    assert sorted(seen) == list(range(23))
