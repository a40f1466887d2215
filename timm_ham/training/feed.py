"""Recipe and dataset to batches: decoded in memory, opened by workers, or streamed."""

import os
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, Mapping, Tuple, Union

import numpy as np
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node

from timm_ham.errors import TimmHamError
from timm_ham.training.batches import TrainBatches, eval_batches
from timm_ham.training.cache import cached_parts
from timm_ham.training.data import DataInfo, Unusable, data_info
from timm_ham.training.pipeline import (
    Batch,
    Loading,
    PartBatches,
    StreamBatches,
    StreamImages,
    eval_transform,
    part_batches,
    stream_batches,
    train_transform,
)
from timm_ham.training.recipes import Recipe
from timm_ham.training.sources import OpenDataset, Part, UnreadableImage, open_dataset

__all__ = ['Feed', 'eval_feed', 'open_feed', 'open_recipe_dataset']

SMALL_SIDE = 128  # pixels; larger images are opened by workers
MEMORY = 2 * 2**30  # bytes of pixels at most, to choose memory without being told
LOOKS = 32  # images whose sizes are looked at
EVAL_BATCH = 500  # of small images
SHUFFLE_BUFFER = 2000  # encoded images that a worker keeps of a stream, to draw from


@dataclass(frozen=True)
class Feed:
    """What a run is fed with.

    data: The facts about it.
    batches: For training; `epoch(n)` yields images (b, C, H, W) and labels (b,), `len` is the steps of an epoch.
    evaluation: Makes the plain batches of 'test' and, if there is one, of 'holdout': this process's part of them.
    where: Where the images live, for the terminal.
    """

    data: DataInfo
    batches: Union[TrainBatches, PartBatches, StreamBatches]
    evaluation: Dict[str, Callable[[], Iterator[Batch]]]
    where: str


def open_recipe_dataset(recipe: Recipe) -> OpenDataset:
    """The recipe's dataset, not decoded."""
    return open_dataset(
        recipe.dataset,
        recipe.image_column,
        recipe.label_column,
        recipe.dataset_config,
        recipe.dataset_revision,
        recipe.streaming,
    )


def _sizes(part: Part) -> set:
    """Width and height of some images, evenly spread over the part."""
    sizes = set()
    for index in np.linspace(0, len(part) - 1, min(LOOKS, len(part))).astype(int):
        try:
            sizes.add(part.open(index).size)
        except UnreadableImage:  # reported where all of them are read
            continue
    return sizes


def _choose(recipe: Recipe, parts: Dict[str, Part]) -> Tuple[bool, str]:
    """Whether the images shall live in memory, and the reason."""
    sizes = _sizes(parts['train'])
    width, height = (max(sides) for sides in zip(*sizes)) if sizes else (0, 0)
    count = sum(map(len, parts.values()))
    side = recipe.image_size
    needed = count * 3 * (side * side if side else width * height)
    described = f'{count:,} images of {"up to " if len(sizes) > 1 else ""}{width}x{height}'
    small = len(sizes) <= 1 and max(width, height) <= SMALL_SIDE and needed <= MEMORY and not recipe.auto_augment
    in_memory = small and recipe.crop_scale == 1 if recipe.in_memory == 'auto' else recipe.in_memory == 'yes'
    if in_memory and (recipe.auto_augment or recipe.crop_scale < 1):
        raise TimmHamError('auto_augment and crop_scale work on single images: leave them out, or --in-memory yes')
    where = f'decoded in memory ({needed / 1e6:,.0f} MB)' if in_memory else 'opened by {workers} as they are needed'
    return in_memory, f'{described}, {where}'


def _workers(recipe: Recipe) -> int:
    if recipe.workers is not None:
        return recipe.workers
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1))


def open_feed(recipe: Recipe, cfg: Mapping[str, Any], accelerator: Accelerator) -> Feed:
    """Open the recipe's dataset, and decide where its images live.

    Args:
        recipe: What to train, and how.
        cfg: What the model expects (`input_size`, `mean`, `std`), for images that have no one size of their own and for
            training that starts from weights.
        accelerator: Knows device and processes.

    Raises:
        TimmHamError: If there is no such dataset, column or split, or something in it can't be used.
    """
    if (recipe.steps_per_epoch is not None) != recipe.streaming:
        raise TimmHamError('--streaming and --steps-per-epoch belong together: a stream has no end of its own')
    opened = open_recipe_dataset(recipe)
    if recipe.streaming:
        return _streamed(recipe, opened, cfg, accelerator)
    parts = opened.parts(recipe.holdout, recipe.test_share)
    in_memory, where = _choose(recipe, parts)
    if in_memory:
        return _in_memory(recipe, opened, parts, cfg, accelerator, where)
    size, loading = _size(recipe, cfg), _loading(recipe, cfg, accelerator)
    plain = eval_transform(size)
    batches = PartBatches(
        parts['train'], train_transform(recipe, size, loading.mean), loading, recipe.seed, recipe.cutout
    )
    evaluation = {
        name: lambda part=part: part_batches(part, plain, loading) for name, part in parts.items() if name != 'train'
    }
    sizes = {name: len(part) for name, part in parts.items()}
    where = where.format(workers=f'{loading.workers} workers')
    return Feed(data_info(opened, size, loading.mean, loading.std, sizes), batches, evaluation, where)


def _size(recipe: Recipe, cfg: Mapping[str, Any]) -> Tuple[int, int]:
    return (recipe.image_size,) * 2 if recipe.image_size else tuple(cfg['input_size'][1:])


def _loading(recipe: Recipe, cfg: Mapping[str, Any], accelerator: Accelerator) -> Loading:
    return Loading(
        tuple(cfg['mean']),
        tuple(cfg['std']),
        recipe.batch_size,
        _workers(recipe),
        accelerator.device,
        Unusable(recipe.bad_images),
        accelerator.process_index,
        accelerator.num_processes,
    )


def _in_memory(
    recipe: Recipe,
    opened: OpenDataset,
    parts: Dict[str, Part],
    cfg: Mapping[str, Any],
    accelerator: Accelerator,
    where: str,
) -> Feed:
    size = _size(recipe, cfg) if recipe.image_size or recipe.weights else None
    data, splits = cached_parts(opened, parts, recipe.bad_images, size)
    if recipe.weights:
        data = replace(data, mean=tuple(cfg['mean']), std=tuple(cfg['std']))
    if accelerator.device.type != 'cpu':  # to 'cpu:0', as it is among several processes, would be a copy
        splits = {name: split.to(accelerator.device) for name, split in splits.items()}
    ranks = (accelerator.process_index, accelerator.num_processes)
    batches = TrainBatches(
        splits['train'],
        data.mean,
        data.std,
        min(recipe.batch_size, len(splits['train'])),
        recipe.crop_padding,
        recipe.flip,
        recipe.cutout,
        recipe.seed,
        *ranks,
    )
    evaluation = {
        name: lambda split=split: eval_batches(split, data.mean, data.std, EVAL_BATCH, *ranks)
        for name, split in splits.items()
        if name != 'train'
    }
    return Feed(data, batches, evaluation, where)


def _streamed(recipe: Recipe, opened: OpenDataset, cfg: Mapping[str, Any], accelerator: Accelerator) -> Feed:
    if recipe.test_share:
        raise TimmHamError('a stream is not divided by test_share: leave it out, or leave streaming out')
    if recipe.batch_size % accelerator.num_processes:
        raise TimmHamError(
            f'a stream gives {accelerator.num_processes} processes the same number of images: {recipe.batch_size} is '
            'no multiple, change batch_size'
        )
    streams = opened.streams()
    if recipe.holdout and 'holdout' not in streams:
        raise TimmHamError('a stream has no share to hold out: give --holdout 0, or a dataset with a validation split')
    size, loading = _size(recipe, cfg), _loading(recipe, cfg, accelerator)
    columns = (opened.image_column, opened.label_column)

    def share(stream, transform) -> Tuple[StreamImages, Loading]:
        mine = split_dataset_by_node(stream, loading.rank, loading.processes)
        # No more workers than files: each is read by one of them.
        fewer = replace(loading, workers=min(loading.workers, mine.num_shards))
        return StreamImages(mine, columns, opened.classes, transform, recipe.seed), fewer

    endless = streams['train'].repeat(None).shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER)
    train = share(endless, train_transform(recipe, size, loading.mean))
    evaluation = {
        name: lambda stream=stream: stream_batches(*share(stream, eval_transform(size)))
        for name, stream in streams.items()
        if name != 'train'
    }
    sizes = {
        name: stream.info.splits[str(stream.split)].num_examples
        for name, stream in streams.items()
        if stream.info.splits
    }
    sizes['train'] = recipe.steps_per_epoch * recipe.batch_size
    data = data_info(opened, size, loading.mean, loading.std, sizes)
    batches = StreamBatches(*train, recipe.steps_per_epoch)
    return Feed(data, batches, evaluation, f'streamed by {batches.loading.workers} workers')


def eval_feed(
    part: Part, cfg: Mapping[str, Any], batch_size: int, workers: int, accelerator: Accelerator
) -> Iterator[Batch]:
    """This process's share of the plain images as weights expect them, each exactly once.

    Args:
        part: The images.
        cfg: As timm's resolve_model_data_config gives it.
        batch_size: Images in a batch of one process.
        workers: Processes that open images.
        accelerator: Knows device and processes.
    """
    size = tuple(cfg['input_size'][1:])
    transform = eval_transform(size, **{key: cfg[key] for key in ('crop_pct', 'crop_mode', 'interpolation')})
    processes = accelerator.num_processes
    loading = Loading(
        cfg['mean'],
        cfg['std'],
        batch_size * processes,
        workers,
        accelerator.device,
        Unusable('stop'),
        accelerator.process_index,
        processes,
    )
    return part_batches(part, transform, loading)
