"""Datasets of a training run, from its arguments."""

from pix2seq.arguments import TrainArguments
from pix2seq.color_augmentation import ColorAugmentation
from pix2seq.data import (
    Annotations,
    EvalDataset,
    Split,
    StepSampler,
    TrainDataset,
    find_split,
    load_annotations,
    recommended_sizes,
    repeat_factors,
)
from pix2seq.data.issues import count_by_kind
from pix2seq.errors import UserError
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform, TrainTransform


def find_splits(args: TrainArguments) -> tuple[Split, Split | None]:
    """Locates the training and the validation images; the latter are None with --overfit."""
    train = find_split("train", args.root, args.train_images, args.train_json, args.train_shards)
    return train, None if args.overfit else find_split("val", args.root, args.val_images, args.val_json)


def load_data(args: TrainArguments) -> tuple[TrainDataset, EvalDataset[Annotations]]:
    """Reads the annotations and builds the training and the validation dataset.

    Sets the arguments that are 0 and depend on the dataset, see `set_sizes`.
    """
    train_split, val_split = find_splits(args)
    train = load_annotations(train_split, None, args.follow_links)
    if not train.trainable.any():
        issues = f" ({count_by_kind(train.issues)})" if train.issues else ""
        raise UserError(f"{train.split.json}: has no objects to train on{issues}")
    if val_split is None:
        train = val = train.subset(range(min(args.overfit, len(train))))
    else:
        val = load_annotations(val_split, train.categories, args.follow_links)
    set_sizes(args, train)
    if args.mosaic and args.image_size % 2:
        raise UserError(f"--mosaic {args.mosaic:g}: needs an even --image_size, not {args.image_size}")
    sequence_builder = SequenceBuilder(
        Tokenizer(len(train.categories.ids), args.num_bins),
        max_objects=args.max_objects,
        order=args.object_order,
        noise_objects=args.noise_objects,
        class_corruption=args.class_corruption,
        noise_weight=args.noise_weight,
        eos_weight=args.eos_weight,
        box_jitter=args.box_jitter,
        mix_rate=args.mix_rate,
    )
    transform = TrainTransform(
        args.image_size,
        scale_min=args.scale_min,
        scale_max=args.scale_max,
        flip=args.flip,
        independent_crop=args.independent_crop,
        iou_crop=args.iou_crop,
    )
    colors = ColorAugmentation(args.color_jitter, args.grayscale, args.photometric_distortion)
    train_set = TrainDataset(
        train, transform, sequence_builder, args.seed, colors=colors if colors else None, mosaic=args.mosaic
    )
    return train_set, EvalDataset(val, EvalTransform(args.image_size))


def set_sizes(args: TrainArguments, images: Annotations | int) -> None:
    """Replaces --image_size, --num_bins and --max_objects of 0 by values that suit the training images.

    Raises:
        UserError: There are no annotations, but only the number of images.
    """
    unknown = [name for name in ("image_size", "num_bins", "max_objects") if getattr(args, name) == 0]
    if not unknown:
        return
    if isinstance(images, int):
        raise UserError(f"--{unknown[0]} 0: needs the annotations of the training images (--root)")
    sizes = recommended_sizes(images, args.image_size)
    for name in unknown:
        setattr(args, name, sizes[name])


def step_sampler(args: TrainArguments, images: Annotations | int, rank: int, world_size: int) -> StepSampler:
    """The order of the training images, or of so many images, of one process."""
    num_images, factors = images if isinstance(images, int) else len(images), None
    if args.repeat_threshold:
        if isinstance(images, int):
            raise UserError("--repeat_threshold: needs the annotations of the training images (--root)")
        factors = repeat_factors(images, args.repeat_threshold)
    return StepSampler(
        num_images=num_images,
        batch_size=args.batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=args.seed,
        repetition=args.batch_repetition,
        factors=factors,
    )
