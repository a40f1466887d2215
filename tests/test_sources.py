"""Which datasets are taken: folders of images, tables beside images, columns, and the parts that are split off."""

import csv

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_ham import TimmHamError
from timm_ham.training.data import decode
from timm_ham.training.sources import open_dataset

from .conftest import make_dataset, random_images, save_parquet


def shade(image):
    """The mean grey of a PIL image, by which these tests know one image from another."""
    return round(np.asarray(image).mean())


def save_image(path, grey, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (grey,) * 3).save(path)


def image_folder(folder, splits, classes=('cat', 'dog'), count=10):
    """`<split>/<class>/<n>.png`, each image of a grey of its own."""
    grey = 0
    for split in splits:
        for name in classes:
            for n in range(count):
                save_image(folder / split / name / f'{n}.png', grey)
                grey += 1
    return str(folder)


def greys(part):
    return [shade(part.open(index)) for index in range(len(part))]


@pytest.mark.parametrize(
    'splits, sizes',
    [
        (('train', 'val', 'test'), dict(train=20, holdout=20, test=20)),
        (('train', 'val'), dict(train=16, holdout=4, test=20)),
        (('train', 'test'), dict(train=16, holdout=4, test=20)),
        (('train',), dict(train=12, holdout=4, test=4)),
        (('.',), dict(train=12, holdout=4, test=4)),
    ],
)
def test_image_folders_with_and_without_val_and_test(tmp_path, splits, sizes):
    opened = open_dataset(image_folder(tmp_path / 'pets', splits))
    assert (opened.name, opened.source, opened.label_names) == ('pets', 'a local folder', ('cat', 'dog'))
    parts = opened.parts(holdout=0.2)
    assert {name: len(part) for name, part in parts.items()} == sizes
    found = [grey for part in parts.values() for grey in greys(part)]
    assert sorted(found) == list(range(20 * len(splits)))  # each image once
    for part in parts.values():
        assert part.labels.bincount().tolist() == [len(part) // 2] * 2
        assert [grey // 10 % 2 for grey in greys(part)] == part.labels.tolist()
    again = opened.parts(holdout=0.2)
    assert all(greys(part) == greys(again[name]) for name, part in parts.items())
    assert greys(opened.part('test')) == greys(parts['test'])


def test_stl10_is_put_together_and_split_seven_to_three(tmp_path):
    """All labelled images together, 3 in 10 of each class for the test; a seed of its own."""
    folder = image_folder(tmp_path / 'd', ('train', 'test'), classes=('a', 'b', 'c'), count=20)
    parts = open_dataset(folder).parts(test_share=0.3)
    assert [part.labels.bincount().tolist() for part in parts.values()] == [[28] * 3, [12] * 3]
    train, test = (set(greys(part)) for part in parts.values())
    assert train | test == set(range(120)) and not train & test
    assert min(test) < 60 < max(test)  # from both published parts
    assert set(greys(open_dataset(folder).part('test', 0.3))) == test


def write_csv(file, rows):
    with file.open('w', newline='') as out:
        csv.writer(out).writerows(rows)
    return file


def test_a_table_beside_images(tmp_path):
    for n in range(10):
        save_image(tmp_path / 'pictures' / f'{n}.png', 10 * n)
    rows = [(f'pictures/{n}.png', ('cat', 'dog')[n % 2]) for n in range(10)]
    table = write_csv(tmp_path / 'pets.csv', [('file_name', 'kind'), *rows])
    opened = open_dataset(str(table))  # a single column beside the images is the label's, whatever its name
    assert (opened.name, opened.image_column, opened.label_column) == ('pets', 'image', 'kind')
    assert opened.label_names == ('cat', 'dog')
    parts = opened.parts()
    assert sorted(grey for part in parts.values() for grey in greys(part)) == list(range(0, 100, 10))
    assert all([grey // 10 % 2 for grey in greys(part)] == part.labels.tolist() for part in parts.values())
    for name in ('revision', 'config'):
        with pytest.raises(TimmHamError, match='leave'):
            open_dataset(str(table), **{name: 'x'})
    table = write_csv(tmp_path / 'other.csv', [('path', 'label'), *rows])
    with pytest.raises(TimmHamError, match=r'other\.csv has no column file_name .*, only path, label'):
        open_dataset(str(table))


def test_metadata_inside_an_image_folder(tmp_path):
    for n in range(4):
        save_image(tmp_path / 'd' / 'train' / f'{n}.png', n)
        save_image(tmp_path / 'd' / 'test' / f'{n}.png', n)
    rows = [('file_name', 'label', 'place'), *((f'{n}.png', ('dog', 'cat')[n % 2], 'x') for n in range(4))]
    for split in ('train', 'test'):
        write_csv(tmp_path / 'd' / split / 'metadata.csv', rows)
    parts = open_dataset(str(tmp_path / 'd')).parts()
    assert parts['test'].labels.tolist() == [1, 0, 1, 0] and greys(parts['train']) == [0, 1, 2, 3]


def test_missing_labels_and_files_are_named(tmp_path):
    for n in range(4):
        save_image(tmp_path / f'{n}.png', n)
    table = write_csv(
        tmp_path / 'a.csv', [('file_name', 'label'), ('0.png', 'cat'), ('1.png', ''), ('2.png', 'dog'), ('3.png', '')]
    )
    with pytest.raises(TimmHamError, match=r"label None of row 1 in split 'train' .* \(2 such rows\)"):
        open_dataset(str(table)).parts()
    rows = [('file_name', 'label'), *((f'{n}.png', 'cat') for n in range(10))]
    part = open_dataset(str(write_csv(tmp_path / 'b.csv', rows))).parts()['train']
    with pytest.raises(TimmHamError, match=r'[4-6] images can not be read \(.*[4-9]\.png: .*; .*--bad-images skip'):
        decode(part)


def test_a_column_that_can_not_be_labels(tmp_path):
    data = make_dataset(random_images(4), [0, 1, 0, 1]).add_column('box', [[1, 2]] * 4)
    folder = str(save_parquet(tmp_path / 'd', train=data, test=data))
    with pytest.raises(TimmHamError, match="column 'box' does not hold labels: name another with --label-column"):
        open_dataset(folder, label_column='box').parts()


def test_configs_are_chosen_by_name(tmp_path):
    folder = tmp_path / 'd'
    for config, names in (('small', ('cat', 'dog')), ('large', ('ant', 'bee'))):
        data = make_dataset(random_images(2), [0, 1], names)
        save_parquet(folder / config, train=data, test=data)
    (folder / 'README.md').write_text(
        '---\nconfigs:\n'
        + ''.join(f'- config_name: {name}\n  data_dir: {name}\n' for name in ('small', 'large'))
        + '---\n'
    )
    assert open_dataset(str(folder), config='large').label_names == ('ant', 'bee')
    with pytest.raises(TimmHamError, match=r'Config name is missing|pick one among the available configs'):
        open_dataset(str(folder))


def test_revision_of_a_hub_dataset_reaches_the_library(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict(train=make_dataset(random_images(2), [0, 1]))

    monkeypatch.setattr(datasets, 'load_dataset', load)
    opened = open_dataset('org/pets', config='small', revision='v2')
    assert asked == [(('org/pets', 'small'), dict(revision='v2', streaming=False))]
    assert opened.source == 'org/pets on the Hugging Face Hub'


def test_streams_need_named_classes_and_a_test_split(tmp_path):
    folder = image_folder(tmp_path / 'a', ('train', 'val'), count=2)
    streams = open_dataset(folder, streaming=True).streams()
    assert sorted(streams) == ['test', 'train'] and len(list(streams['test'])) == 4
    with pytest.raises(TimmHamError, match="'b' has no test split, which streaming needs"):
        open_dataset(image_folder(tmp_path / 'b', ('train',), count=2), streaming=True).streams()
    with pytest.raises(TimmHamError, match="dataset 'digits' has no configs and is not streamed"):
        open_dataset('digits', streaming=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    table = datasets.Dataset.from_dict({'image': random_images(2), 'label': [0, 1]}, features=features)
    with pytest.raises(TimmHamError, match=r"column 'label' does not list its classes \(ClassLabel\)"):
        open_dataset(str(save_parquet(tmp_path / 'c', train=table)), streaming=True)


def test_labels_are_int64(tmp_path):
    assert open_dataset(image_folder(tmp_path / 'a', ('train',))).part('train').labels.dtype == torch.int64
