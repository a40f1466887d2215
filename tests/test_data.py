"""Opening, decoding and splitting datasets, and what is refused."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_ham import TimmHamError
from timm_ham.training.data import decode, decode_parts
from timm_ham.training.sources import DATASETS, open_dataset

from .conftest import make_dataset, random_images, save_parquet


def load_splits(name, holdout=0.0, test_share=0.0, **columns):
    opened = open_dataset(name, **columns)
    return decode_parts(opened, opened.parts(holdout, test_share))


def as_set(split):
    return {image.numpy().tobytes() for image in split.images}


def test_digits_are_scikit_learns():
    info, splits = load_splits('digits')
    assert info.sizes == {'train': 1437, 'test': 360}
    assert info.label_names == tuple('0123456789')
    labels = torch.cat([split.labels for split in splits.values()])
    assert labels.bincount().tolist() == np.bincount(load_digits().target).tolist()
    # Every class has its share of the test part.
    assert all(34 <= count <= 38 for count in splits['test'].labels.bincount().tolist())
    # The resized image keeps the mean of the original, up to what bicubic interpolation clips.
    originals = load_digits().images.mean() * 255 / 16
    images = torch.cat([split.images for split in splits.values()])
    assert images.dtype == torch.uint8 and images.shape == (1797, 32, 32, 3)
    assert abs(images.double().mean().item() - originals) < 3


def test_holdout_is_disjoint_stratified_and_the_same_each_time():
    info, splits = load_splits('digits', holdout=0.2)
    whole = load_splits('digits')[1]['train']
    assert info.sizes == {'train': 1149, 'holdout': 288, 'test': 360}
    assert not as_set(splits['train']) & as_set(splits['holdout'])
    assert as_set(splits['train']) | as_set(splits['holdout']) == as_set(whole)
    shares = splits['holdout'].labels.bincount() / whole.labels.bincount()
    assert ((shares - 0.2).abs() < 0.01).all()
    assert torch.equal(load_splits('digits', holdout=0.2)[1]['holdout'].images, splits['holdout'].images)


def test_cifar10_from_a_folder(cifar10):
    info, splits = load_splits(str(cifar10), holdout=0.1)
    assert info.name == 'cifar10'
    assert (info.image_column, info.label_column) == ('img', 'label')
    assert info.label_names[:3] == ('airplane', 'automobile', 'bird')
    assert splits['train'].labels.bincount().tolist() == [4500] * 10
    assert splits['holdout'].labels.bincount().tolist() == [500] * 10
    assert splits['test'].labels.bincount().tolist() == [1000] * 10
    # The figures that everybody uses for CIFAR-10.
    assert info.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-4)
    assert info.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-4)


def test_statistics_and_order_of_pixels(tmp_path):
    images = random_images(10, size=(4, 6))
    folder = save_parquet(tmp_path / 'd', train=make_dataset(images, [0, 1] * 5), test=make_dataset(images[:2], [0, 1]))
    info, splits = load_splits(str(folder))
    pixels = np.stack([np.asarray(image) for image in images])
    assert np.array_equal(splits['train'].images.numpy(), pixels)
    assert splits['train'].labels.tolist() == [0, 1] * 5
    assert info.image_size == (4, 6)
    assert info.mean == pytest.approx(pixels.mean((0, 1, 2)) / 255, abs=1e-4)
    assert info.std == pytest.approx(pixels.std((0, 1, 2)) / 255, abs=1e-4)
    assert str(tmp_path) not in str(info)


@pytest.mark.parametrize('mode', ['L', 'RGBA'])
def test_grey_and_transparent_images_become_rgb(tmp_path, mode):
    images = random_images(4, mode=mode)
    folder = save_parquet(tmp_path / 'd', train=make_dataset(images, [0, 1, 0, 1]), test=make_dataset(images, [0] * 4))
    splits = load_splits(str(folder))[1]
    wanted = np.asarray(images[3])
    wanted = wanted[..., :3] if mode == 'RGBA' else wanted[..., None].repeat(3, axis=-1)
    assert np.array_equal(splits['train'].images[3].numpy(), wanted)


def cifar100_like(count):
    features = datasets.Features(
        coarse_label=datasets.ClassLabel(names=['animal', 'thing']),
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=['cat', 'dog', 'car']),
    )
    labels = {'coarse_label': [0, 0, 1] * count, 'fine_label': [0, 1, 2] * count}
    return datasets.Dataset.from_dict({**labels, 'img': random_images(3 * count)}, features=features)


def test_columns_are_found_by_type_and_can_be_named(tmp_path):
    folder = str(save_parquet(tmp_path / 'd', train=cifar100_like(4), test=cifar100_like(1)))
    info = load_splits(folder)[0]
    assert (info.image_column, info.label_column, len(info.label_names)) == ('img', 'fine_label', 3)
    assert load_splits(folder, label_column='coarse_label')[0].label_names == ('animal', 'thing')


def test_labels_without_class_names(tmp_path):
    """Plain integers with gaps: the classes are the values of the training split, in order."""
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))

    def split(labels):
        return datasets.Dataset.from_dict({'image': random_images(len(labels)), 'label': labels}, features=features)

    folder = save_parquet(tmp_path / 'd', train=split([7, 3, 7, 3]), test=split([3, 7]))
    info, splits = load_splits(str(folder))
    assert info.label_names == ('3', '7')
    assert splits['train'].labels.tolist() == [1, 0, 1, 0]
    folder = save_parquet(tmp_path / 'e', train=split([7, 3, 7, 3]), test=split([3, 8]))
    with pytest.raises(TimmHamError, match=r"label 8 of row 1 in split 'test' is not one of the 2 classes"):
        load_splits(str(folder))


def test_unknown_dataset_lists_the_choices():
    with pytest.raises(TimmHamError, match="unknown dataset 'cifar11': choose from digits, cifar10, cifar100, "):
        load_splits('cifar11')


def test_hub_dataset_without_network_says_so(monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(TimmHamError, match='check the name, the network and the files, or give another local folder'):
        load_splits('nobody/nothing-of-that-name')


@pytest.mark.parametrize('kwargs', [dict(image_column='picture'), dict(label_column='kind')])
def test_unknown_column_lists_the_choices(tiny_folder, kwargs):
    with pytest.raises(TimmHamError, match=r'choose from image \(Image\), label \(ClassLabel\)'):
        load_splits(str(tiny_folder), **kwargs)


def test_dataset_without_images(tmp_path):
    table = datasets.Dataset.from_dict({'text': ['a', 'b'], 'label': [0, 1]})
    folder = save_parquet(tmp_path / 'd', train=table, test=table)
    with pytest.raises(
        TimmHamError, match=r'no image column found .* text \(Value\), label \(Value\) with --image-column'
    ):
        load_splits(str(folder))
    with pytest.raises(TimmHamError, match="column 'label' does not hold images"):
        load_splits(str(folder), image_column='label')


@pytest.mark.parametrize('empty', ['train', 'test'])
def test_empty_split(tmp_path, monkeypatch, empty):
    splits = {'train': make_dataset(random_images(2), [0, 1]), 'test': make_dataset(random_images(2), [0, 1])}
    splits[empty] = make_dataset([], [])
    monkeypatch.setitem(DATASETS, 'hollow', lambda: datasets.DatasetDict(splits))
    with pytest.raises(TimmHamError, match=f"split '{empty}' of dataset 'hollow' is empty"):
        load_splits('hollow')
    # The datasets library itself refuses an empty parquet file.
    with pytest.raises(TimmHamError, match=f'"{empty}" corresponds to no data'):
        load_splits(str(save_parquet(tmp_path / 'd', **splits)))


def test_no_training_split(tmp_path):
    data = make_dataset(random_images(2), [0, 1])
    with pytest.raises(TimmHamError, match='has no train split, only test'):
        load_splits(str(save_parquet(tmp_path / 'b', test=data)))


def test_label_out_of_range(tmp_path):
    """-1 is what unlabelled splits on the Hub have."""
    data = make_dataset(random_images(3), [0, -1, -1])
    folder = save_parquet(tmp_path / 'd', train=make_dataset(random_images(2), [0, 1]), test=data)
    with pytest.raises(
        TimmHamError, match=r"label -1 of row 1 in split 'test' is not one of the 2 classes \(2 such rows\)"
    ):
        load_splits(str(folder))


def test_images_of_several_sizes(tmp_path):
    images = [*random_images(2), *random_images(1, size=(9, 8))]
    folder = save_parquet(tmp_path / 'd', train=make_dataset(images, [0, 1, 1]), test=make_dataset(images[:1], [0]))
    with pytest.raises(
        TimmHamError, match=r"row 2 of split 'train' is 8x9, but the first image is 8x8: .* --image-size"
    ):
        load_splits(str(folder))


@pytest.mark.parametrize('content', [b'not an image', b'', None])
def test_unreadable_image(tmp_path, content):
    good = make_dataset(random_images(2), [0, 1])
    rows = [
        {'bytes': image['bytes'], 'path': None}
        for image in good.cast_column('image', datasets.Image(decode=False))['image']
    ]
    rows[1] = None if content is None else {'bytes': content, 'path': None}
    bad = datasets.Dataset.from_dict({'image': rows, 'label': [0, 1]}, features=good.features)
    folder = save_parquet(tmp_path / 'd', train=bad, test=good)
    with pytest.raises(TimmHamError, match=r"1 image can not be read \(row 1 of split 'train': .*by --bad-images skip"):
        load_splits(str(folder))
    opened = open_dataset(str(folder))
    with pytest.warns(UserWarning, match=r'1 image can not be read \(row 1 .*1 in all so far: left out'):
        split = decode(opened.part('train'), 'skip')
    assert np.array_equal(split.images[0].numpy(), np.asarray(random_images(2)[0])) and split.labels.tolist() == [0]


@pytest.mark.parametrize('holdout, message', [(-0.1, 'at least 0'), (1.0, 'less than 1'), (0.001, 'change holdout')])
def test_wrong_holdout(tiny_folder, holdout, message):
    with pytest.raises(TimmHamError, match=message):
        load_splits(str(tiny_folder), holdout=holdout)


def test_one_split_can_be_decoded_alone(tiny_folder, monkeypatch):
    """Measuring a test split does not decode the training images."""
    opened = open_dataset(str(tiny_folder))
    whole = load_splits(str(tiny_folder))[1]
    monkeypatch.delitem(opened.splits, 'train')
    assert torch.equal(decode(opened.part('test')).images, whole['test'].images)
    assert opened.label_names == ('cat', 'dog')


def test_a_channel_that_never_changes_stays_finite(tmp_path):
    black = [Image.new('RGB', (8, 8))] * 4
    data = make_dataset(black, [0, 1, 0, 1])
    info = load_splits(str(save_parquet(tmp_path / 'd', train=data, test=data)))[0]
    assert info.mean == (0, 0, 0) and info.std == (0.0039,) * 3
