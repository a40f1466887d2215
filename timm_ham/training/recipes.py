"""Recipes: all that decides how a run trains, as values. A named recipe is another one with some fields changed."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Dict, List, Literal, Optional, Tuple

import tyro

from timm_ham.errors import TimmHamError

__all__ = ['RECIPES', 'Recipe', 'Saving', 'changes', 'differences', 'named_recipe']


def _json_object(words: List[str]) -> Dict[str, Any]:
    value = json.loads(words[0])
    if not isinstance(value, dict):
        raise ValueError(f'{words[0]} is not a JSON object')
    return value


# On the command line one word, such as '{"attn_kwargs": {"kernel_size": 3}}'.
JsonObject = Annotated[
    Dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar='JSON',
        instance_from_str=_json_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Each field is an option of `timm-ham train`."""

    model: str = 'resnet20_ham'
    """Name of a registered model, of timm's too."""
    model_args: JsonObject = field(default_factory=dict)
    """Arguments for timm.create_model, such as '{"attn_kwargs": {"kernel_size": 3, "separation_rate": 0.5}}'."""
    dataset: str = 'digits'
    """digits, cifar10, cifar100, stl10, the id of a dataset on the Hugging Face Hub, a local folder of images
    (<class>/*.jpg, or train/<class>/*.jpg with or without val/ and test/) or of parquet files, or a .csv file with the
    columns file_name and label beside its images."""
    dataset_config: Optional[str] = None
    """Config (subset) of a dataset that has several."""
    dataset_revision: Optional[str] = None
    """Branch, tag or commit of a dataset on the Hub."""
    image_column: Optional[str] = None
    """Column of the images; found by its type if not given."""
    label_column: Optional[str] = None
    """Column of the labels; found by its type if not given."""
    holdout: float = 0.1
    """Share of the training split that is kept out of training, for choosing anything. The same images for any seed.
    A validation split beside a test split takes its place."""
    test_share: float = 0.0
    """Share of all labelled images, of whatever split, that is the test part. The same images for any seed. 0: the test
    split, or a fifth of the training split where there is none."""
    bad_images: Literal['stop', 'skip'] = 'stop'
    """What to do about images that can not be read: stop and name them, or warn and go on without them."""
    image_size: Optional[int] = None
    """Side of the images for the model, pixels. Without it images in memory keep their size, and others, and those of a
    fine-tuning, get the size that the model's config names."""
    in_memory: Literal['auto', 'yes', 'no'] = 'auto'
    """Decode all images once, into memory, or let workers open each when it is needed. auto: memory for images of one
    size of at most 128 pixels that take at most 2 GiB, if neither auto_augment nor crop_scale is asked for."""
    workers: Optional[int] = None
    """Processes that open images; as many as there are CPUs, at most 8, if not given."""
    streaming: bool = False
    """Read the dataset while training instead of downloading it first."""
    steps_per_epoch: Optional[int] = None
    """Steps that count as an epoch of a streamed dataset."""
    crop_padding: int = 4
    """Pixels of zero padding around an image before a random crop of its size. 0: no crop."""
    flip: bool = True
    """Random horizontal flip."""
    cutout: int = 0
    """Side of a square that is blanked at a random place of each image, pixels. 0: none."""
    crop_scale: float = 1.0
    """Smallest share of the image's area that a random resized crop keeps, which takes the place of the padded crop.
    1: none."""
    auto_augment: Optional[str] = None
    """RandAugment, AugMix or AutoAugment as timm writes it, such as rand-m9-mstd0.5-inc1."""
    random_erasing: float = 0.0
    """Probability that a random rectangle of an image is blanked."""
    mixup: float = 0.0
    """Alpha of Mixup. 0: none. With CutMix too, each batch gets one of them."""
    cutmix: float = 0.0
    """Alpha of CutMix. 0: none."""
    weights: Optional[str] = None
    """Weights to start from, as timm-ham finetune takes them."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer further from the classifier."""
    freeze: bool = False
    """Train the classifier alone, on the features of the weights as they are."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images in a step, over all processes together."""
    learning_rate: float = 0.1
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = 5e-4
    """Weight decay."""
    decay_norm_and_bias: bool = False
    """Weight decay also on biases, norms and other one-dimensional parameters."""
    schedule: Literal['cosine', 'multistep'] = 'cosine'
    """Learning rate over the epochs: to zero along a cosine, or divided at milestones."""
    warmup_epochs: int = 0
    """Epochs in which a linear warm-up takes the place of the cosine's beginning."""
    milestones: Tuple[int, ...] = ()
    """Epochs after which `multistep` multiplies the learning rate by `decay_rate`."""
    decay_rate: float = 0.2
    """Factor at each milestone."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is measured and exported. 0: none."""
    precision: Literal['auto', 'bf16', 'fp16', 'fp32'] = 'fp32'
    """bf16: autocast to bfloat16. fp16: to float16 with a scaled loss, on GPUs. auto: bf16 where the processor
    computes in it, else fp32."""
    accumulation: int = 1
    """Parts in which each process works through its share of a batch, for less memory."""
    sync_batch_norm: bool = False
    """Batch norm statistics over the batches of all processes, not over those of each."""
    channels_last: bool = False
    """Keep feature maps in channels_last memory format."""
    compile: bool = False
    """Compile the training step with torch.compile (needs a C++ compiler on a CPU). Slow to start, then faster."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation."""

    @classmethod
    def from_json(cls, values: Dict[str, Any]) -> 'Recipe':
        """The recipe whose `asdict` went through JSON, which has no tuples."""
        return cls(**{**values, 'milestones': tuple(values['milestones'])})


@dataclass(frozen=True)
class Saving:
    """When the state of a run is written. It changes nothing about the weights that come out."""

    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch. 0: none, as each epoch ends with one, and a run that is told to stop
    (Ctrl-C, SIGTERM) writes one first; set it where an epoch takes longer than you would want to repeat."""
    keep_checkpoints: int = 2
    """Checkpoints to keep. A damaged one is passed over for the one before."""


PAPER = Recipe(
    dataset='cifar10',
    holdout=0.0,
    epochs=200,
    batch_size=128,
    learning_rate=0.1,
    nesterov=False,
    weight_decay=5e-4,
    decay_norm_and_bias=True,
    schedule='multistep',
    milestones=(60, 120, 160),
    decay_rate=0.2,
)

STL10 = replace(PAPER, dataset='stl10', model='resnet18_ham', test_share=0.3, batch_size=64, crop_padding=12)

FAST = Recipe(
    dataset='cifar10',
    epochs=25,
    batch_size=128,
    learning_rate=0.2,
    warmup_epochs=3,
    label_smoothing=0.05,
    precision='auto',
    channels_last=True,
)

RECIPES: Dict[str, Recipe] = {
    # Digits change their meaning when they are flipped.
    'digits_quick': replace(FAST, dataset='digits', epochs=12, batch_size=64, flip=False),
    # Section 4 of the paper, word by word.
    'cifar_paper': PAPER,
    # Without an average of the weights: after the cosine it made no difference (resnet20_plain, 5 epochs, one run:
    # 82.90 % of the held-out images with ema_decay 0.999, 82.94 % without).
    'cifar_fast': FAST,
    # Section 4.3: the 13 000 labelled images together, 7:3 in each class.
    'stl10_paper': STL10,
    # Photos of any size.
    'photos': replace(
        FAST,
        model='resnet18_ham',
        dataset='photos',
        epochs=60,
        batch_size=64,
        learning_rate=0.1,
        crop_padding=0,
        crop_scale=0.35,
        auto_augment='rand-m9-mstd0.5-inc1',
        random_erasing=0.1,
    ),
    'finetune': replace(
        FAST, dataset='digits', epochs=30, batch_size=32, learning_rate=0.02, warmup_epochs=2, layer_decay=0.8
    ),
}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        TimmHamError: If there is none.
    """
    if name not in RECIPES:
        raise TimmHamError(f'unknown recipe {name!r}: choose from {", ".join(RECIPES)}')
    return RECIPES[name]


def differences(old: Recipe, new: Recipe) -> Dict[str, Tuple[Any, Any]]:
    """The fields in which two recipes differ, with both values."""
    values, others = asdict(old), asdict(new)
    return {field: (value, others[field]) for field, value in values.items() if value != others[field]}


def changes(recipe: Recipe, name: str) -> Dict[str, Any]:
    """The fields in which a recipe differs from the named one."""
    return {field: value for field, (_, value) in differences(named_recipe(name), recipe).items()}
