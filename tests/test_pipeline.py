"""Images opened by workers and streams: the same batches for a seed, each image once, any size, damaged ones."""

import random
from dataclasses import replace

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image

from timm_ham import TimmHamError
from timm_ham.training import feed as feeding
from timm_ham.training.batches import normalize
from timm_ham.training.cache import cached_parts
from timm_ham.training.data import Unusable, decode, decode_parts
from timm_ham.training.feed import open_feed
from timm_ham.training.mixing import Mixer
from timm_ham.training.pipeline import (
    Loading,
    PartBatches,
    drawn_from,
    eval_transform,
    part_batches,
    train_transform,
)
from timm_ham.training.recipes import RECIPES
from timm_ham.training.sources import open_dataset

from .conftest import make_dataset, random_images, save_parquet
from .test_sources import image_folder

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CFG = dict(input_size=(3, 16, 16), mean=MEAN, std=STD)
PHOTOS = replace(RECIPES['photos'], image_size=16, batch_size=6, workers=0, holdout=0.0)


def loading(rank=0, processes=1, workers=0, batch_size=6, policy='stop'):
    return Loading(MEAN, STD, batch_size, workers, torch.device('cpu'), Unusable(policy), rank, processes)


@pytest.fixture
def part(tmp_path):
    """20 images of noise, each of a size of its own, labelled by their number."""
    images = [random_images(1, (20 + n, 40 - n), seed=n)[0] for n in range(20)]
    table = make_dataset(images, list(range(20)), names=map(str, range(20)))
    return open_dataset(str(save_parquet(tmp_path / 'd', train=table, test=table))).part('test')


def test_plain_images_are_timms(part):
    transform = timm.data.create_transform((3, 16, 16), mean=MEAN, std=STD, crop_pct=1.0, interpolation='bicubic')
    wanted = torch.stack([transform(part.open(index)) for index in range(20)])
    batches = list(part_batches(part, eval_transform((16, 16)), loading(workers=2)))
    assert [len(labels) for _, labels in batches] == [6, 6, 6, 2]
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(images, wanted, check_stride=False)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(20))
    # Decoded into memory with a size they are the same.
    split = decode(part, resize=eval_transform((16, 16)))
    torch.testing.assert_close(normalize(split.images, MEAN, STD), wanted, check_stride=False)


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_see_each_plain_image_once(part, processes):
    seen = [
        label
        for rank in range(processes)
        for _, labels in part_batches(part, eval_transform((16, 16)), loading(rank, processes))
        for label in labels.tolist()
    ]
    assert sorted(seen) == list(range(20))


def epoch(part, number=1, first=0, seed=0, recipe=PHOTOS, **kwargs):
    batches = PartBatches(part, train_transform(recipe, (16, 16), MEAN), loading(**kwargs), seed, recipe.cutout)
    return list(batches.epoch(number, first))


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for pair in zip(one, other) for a, b in zip(*pair))


def test_training_batches_depend_on_seed_and_epoch_alone(part):
    state = random.getstate()[1], np.random.get_state()[1].copy(), torch.get_rng_state()
    wanted = epoch(part)
    # What else draws random numbers in this process is left alone.
    assert random.getstate()[1] == state[0] and (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert same(epoch(part, workers=2), wanted)
    assert not same(epoch(part, seed=1), wanted) and not same(epoch(part, number=2), wanted)
    assert same(epoch(part, first=1), wanted[1:])  # from the middle of an epoch on
    assert len(wanted) == 3 and len({label for _, labels in wanted for label in labels.tolist()}) == 18
    assert wanted[0][0].shape == (6, 3, 16, 16)


def test_workers_live_from_epoch_to_epoch(part):
    batches = PartBatches(part, train_transform(PHOTOS, (16, 16), MEAN), loading(workers=1))
    assert same(list(batches.epoch(0)), epoch(part, 0)) and same(list(batches.epoch(1)), epoch(part, 1))


def test_processes_share_each_global_batch(part):
    recipe = replace(PHOTOS, cutout=4)
    alone = epoch(part, recipe=recipe)
    for rank in range(2):
        share = epoch(part, recipe=recipe, rank=rank, processes=2)
        assert same(share, [(images[rank::2], labels[rank::2]) for images, labels in alone])
    assert any((images == 0).all(1).sum() >= 6 * 4 for images, _ in alone)


def test_without_a_random_crop_the_padded_one_is_taken(tmp_path):
    """An image of one colour with a border of padding: a crop at a random place, black where it went over."""
    grey = make_dataset([Image.new('RGB', (16, 16), (200,) * 3)], [0])
    part = open_dataset(str(save_parquet(tmp_path / 'd', train=grey, test=grey))).part('test')
    recipe = replace(PHOTOS, crop_scale=1.0, crop_padding=2, flip=False, auto_augment=None)
    transform = train_transform(recipe, (16, 16), MEAN)
    crops = [transform(part.open(0))[0] == 0 for _ in range(150)]
    borders = {tuple(black.all(axis).sum().item() for axis in (0, 1)) for black in crops}
    assert borders == {(rows, columns) for rows in range(3) for columns in range(3)}


@pytest.mark.parametrize('policy', ['rand-m10-n8-inc1', 'rand-m0-n8', 'v0', 'augmix-m10-w4'])
def test_automatic_augmentation_at_its_strongest(policy):
    transform = train_transform(replace(PHOTOS, auto_augment=policy), (8, 8), MEAN)
    with drawn_from(0):
        for _ in range(60):
            assert transform(random_images(1)[0]).shape == (3, 8, 8)


def test_decoded_images_are_cached_until_something_changes(tmp_path):
    """Images that are files of their own, listed in a table that stays the same."""
    folder = tmp_path / 'd'
    image_folder(folder, ('train',))
    files = sorted(folder.glob('train/*/*.png'))
    lines = [f'{file.relative_to(folder)},{file.parent.name}' for file in files]
    (folder / 'images.csv').write_text('\n'.join(['file_name,label', *lines]))

    def load(size=None):
        opened = open_dataset(str(folder / 'images.csv'))
        parts = opened.parts(0.25)
        return cached_parts(opened, parts, size=size), decode_parts(
            opened, parts, 'stop', size and eval_transform(size)
        )

    for step in range(3):
        if step == 1:
            shade = Image.open(files[0])
            Image.new(shade.mode, shade.size, 255).save(files[0])
        for size in (None, (4, 4)):
            (info, splits), (wanted, others) = load(size)
            assert info == wanted and info.sizes == dict(train=12, holdout=4, test=4)
            for name, split in splits.items():
                assert torch.equal(split.images, others[name].images) and torch.equal(split.labels, others[name].labels)


def damaged_folder(folder):
    image_folder(folder, ('train', 'test'))
    for name in ('3', '7'):
        (folder / 'train' / 'cat' / f'{name}.png').write_bytes(b'no image')
    return folder


def test_damaged_images_stop_or_are_skipped(tmp_path):
    part = open_dataset(str(damaged_folder(tmp_path / 'd'))).part('train')
    with pytest.raises(TimmHamError, match=r'1 image can not be read \(.*[37]\.png: .*by --bad-images skip'):
        epoch(part)
    with pytest.warns(UserWarning, match=r'[37]\.png.*2 in all so far: left out'):
        batches = epoch(part, policy='skip', workers=2)
    assert [len(labels) for _, labels in batches] == [6, 6, 6]  # others fill their places
    with pytest.warns(UserWarning, match='left out'):
        plain = list(part_batches(part, eval_transform((16, 16)), loading(policy='skip')))
    assert sum(len(labels) for _, labels in plain) == 18


def test_memory_or_workers(tmp_path, part):
    def where(**changed):
        return open_feed(replace(PHOTOS, **changed), CFG, Accelerator(cpu=True)).where

    small = save_parquet(
        tmp_path / 'small',
        train=make_dataset(random_images(20), [0, 1] * 10),
        test=make_dataset(random_images(2), [0, 1]),
    )
    plain = dict(dataset=str(small), crop_scale=1.0, auto_augment=None, image_size=None)
    assert where(**plain) == '22 images of 8x8, decoded in memory (0 MB)'
    assert where(**{**plain, 'image_size': 500}) == '22 images of 8x8, decoded in memory (16 MB)'
    assert where(**{**plain, 'image_size': 6000}) == '22 images of 8x8, opened by 0 workers as they are needed'
    assert where(**{**plain, 'in_memory': 'no'}).endswith('opened by 0 workers as they are needed')
    assert 'opened by' in where(**{**plain, 'crop_scale': 0.5}) and 'opened by' in where(
        **{**plain, 'auto_augment': 'rand-m9'}
    )
    with pytest.raises(TimmHamError, match='auto_augment and crop_scale work on single images'):
        where(**{**plain, 'crop_scale': 0.5, 'in_memory': 'yes'})
    assert 'up to 40x39, opened by 0 workers' in where(dataset=str(tmp_path / 'd'), crop_scale=1.0, auto_augment=None)


def test_fine_tuning_normalizes_as_the_weights_were(tiny_folder):
    recipe = replace(RECIPES['finetune'], dataset=str(tiny_folder), weights='resnet20_ham.cifar10')
    feed = open_feed(recipe, CFG, Accelerator(cpu=True))
    assert (feed.data.mean, feed.data.std, feed.data.image_size) == (MEAN, STD, (16, 16))
    assert open_feed(replace(recipe, weights=None), CFG, Accelerator(cpu=True)).data.image_size == (8, 8)
    assert open_feed(replace(recipe, image_size=20), CFG, Accelerator(cpu=True)).data.image_size == (20, 20)


def mixed(images, labels, step=0, processes=1, **changed):
    accelerator = Accelerator(cpu=True)
    mixer = Mixer(replace(PHOTOS, **{'random_erasing': 0.0, **changed}), 4, len(labels), accelerator)
    set_seed(step)  # as the training does
    return mixer(images.clone(), labels)


@pytest.mark.parametrize('changed', [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.2, cutmix=1.0)])
def test_mixed_images_and_labels_have_the_same_shares(changed):
    """Images that are one-hot planes: the share of a class in an image is that in its label."""
    labels = torch.tensor([0, 1, 2, 3])
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 16, 16).contiguous()
    outcomes = []
    for step in range(8):
        out, targets = mixed(images, labels, step, **changed)
        torch.testing.assert_close(out.mean((2, 3)), targets)
        torch.testing.assert_close(
            targets, targets.diag()[0] * torch.eye(4) + (1 - targets.diag()[0]) * torch.eye(4).flip(0)
        )
        outcomes.append(targets.diag()[0].item())
    assert len({round(share, 4) for share in outcomes}) > 4
    assert torch.equal(mixed(images, labels, 3, **changed)[0], mixed(images, labels, 3, **changed)[0])
    with pytest.raises(TimmHamError, match='need pairs of images: 3 is odd'):
        mixed(images[:3], labels[:3], **changed)


def test_random_erasing_blanks_rectangles_of_some_images():
    images, labels = torch.ones(200, 3, 16, 16), torch.zeros(200, dtype=torch.long)
    out, targets = mixed(images, labels, random_erasing=0.5)
    blank = (out == 0).all(1)
    erased = blank.any(2).any(1)
    assert targets is labels and 0.35 < erased.float().mean() < 0.65
    for mask in blank[erased]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None]) and 0.01 < mask.float().mean() < 0.4
    untouched = mixed(images, labels)
    assert torch.equal(untouched[0], images)


def stream_folder(folder, shards=4, rows=10):
    """Images of one grey each, in several files, and the greys."""
    folder.mkdir()
    for shard in range(shards):
        greys = range(shard * rows, (shard + 1) * rows)
        table = make_dataset([Image.new('RGB', (8, 8), (grey,) * 3) for grey in greys], [grey % 2 for grey in greys])
        table.to_parquet(folder / f'train-{shard:05}-of-{shards:05}.parquet')
    table.to_parquet(folder / 'test-00000-of-00001.parquet')
    return str(folder)


def streamed(folder, epochs, first=0, **changed):
    recipe = replace(
        PHOTOS, dataset=folder, streaming=True, steps_per_epoch=3, batch_size=4, flip=False, crop_scale=1.0,
        auto_augment=None, image_size=8, **changed,
    )  # fmt: skip
    feed = open_feed(recipe, dict(CFG, mean=(0.0,) * 3, std=(1.0,) * 3), Accelerator(cpu=True))
    assert len(feed.batches) == 3
    batches = [batch for epoch in epochs for batch in feed.batches.epoch(epoch, first)]
    return [(255 * images[:, 0, 0, 0]).round().int().tolist() for images, _ in batches], batches, feed


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_streams_go_on_from_epoch_to_epoch(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(feeding, 'SHUFFLE_BUFFER', 8)
    monkeypatch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0)
    folder = stream_folder(tmp_path / 'd')
    greys, batches, feed = streamed(folder, range(3), workers=workers)
    assert [len(batch) for batch in greys] == [4] * 9
    flat = [grey for batch in greys for grey in batch]
    assert set(flat) <= set(range(40)) and flat != sorted(flat)
    assert all([grey % 2 for grey in shown] == labels.tolist() for shown, (_, labels) in zip(greys, batches))
    assert len({tuple(batch) for batch in greys}) == 9  # no epoch begins at the beginning again
    assert streamed(folder, range(3), workers=workers)[0] == greys
    assert streamed(folder, range(3), workers=workers, seed=1)[0] != greys
    # Begun in the second epoch, or in its middle, by a new process.
    assert streamed(folder, [1, 2], workers=workers)[0] == greys[3:]
    assert streamed(folder, [1], first=2, workers=workers)[0] == greys[5:6]
    plain = [label for _, labels in feed.evaluation['test']() for label in labels.tolist()]
    assert plain == [grey % 2 for grey in range(30, 40)]


def test_what_a_stream_can_not_do(tmp_path):
    folder = stream_folder(tmp_path / 'd', 1, 4)
    for changed, message in (
        (dict(steps_per_epoch=None), 'belong together'),
        (dict(holdout=0.1), '--holdout 0'),
        (dict(test_share=0.3), 'not divided by test_share'),
    ):
        recipe = replace(PHOTOS, **{'dataset': folder, 'streaming': True, 'steps_per_epoch': 3, **changed})
        with pytest.raises(TimmHamError, match=message):
            open_feed(recipe, CFG, Accelerator(cpu=True))


def test_wrong_labels_in_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(feeding, 'SHUFFLE_BUFFER', 2)
    monkeypatch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0)
    data = make_dataset(random_images(4), [0, 1, -1, 1])
    folder = save_parquet(tmp_path / 'd', train=data, test=data)
    with pytest.raises(TimmHamError, match='label -1 is not one of the 2 classes'):
        streamed(str(folder), range(2))
