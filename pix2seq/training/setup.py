"""A training run put together from its flags. The one module beside the entry points that knows them all."""

import math
from dataclasses import dataclass

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pix2seq.argument_parser import TRAINING_FILE, changed_arguments, read_training_arguments
from pix2seq.arguments import (
    MAY_CHANGE_ON_FINE_TUNING,
    MAY_CHANGE_ON_RESUME,
    MODEL_DEFAULTS,
    TrainArguments,
    model_arguments,
)
from pix2seq.colors import ColorAugmentation
from pix2seq.data import (
    Annotations,
    Categories,
    EvalDataset,
    Split,
    StepSampler,
    TrainDataset,
    find_split,
    load_annotations,
)
from pix2seq.data.issues import count_by_kind
from pix2seq.data.unreadable import UnreadableImages
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.generation import DecodingOptions
from pix2seq.models import Pix2SeqForObjectDetection, adapt, build_model, load_model
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer
from pix2seq.training import checkpoint, trainer_state
from pix2seq.training.cost import model_step_cost, peak_flops
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.metrics import Meter
from pix2seq.training.optimizer import learning_rate_schedule, parameter_groups
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.sharding import gather_full_model
from pix2seq.training.trainer_state import TrainerState
from pix2seq.transforms import EvalTransform, TrainTransform


@dataclass
class TrainContext:
    """What a run consists of."""

    args: TrainArguments
    accelerator: object  # Accelerate's
    folder: RunFolder
    train_set: TrainDataset
    evaluator: TrainingEvaluator
    sampler: StepSampler
    max_steps: int
    model: torch.nn.Module
    state: TrainerState
    stop: StopRequest
    unreadable: UnreadableImages

    @property
    def unwrapped(self) -> Pix2SeqForObjectDetection:
        """The detector that learns; this process's part of it, if FSDP has sharded it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def detectors(self) -> dict[str, Pix2SeqForObjectDetection]:
        """Those to evaluate, by name: the one that learns, and its average over the steps if there is one. All ranks
        call this together."""
        average = self.state.average
        return {"": gather_full_model(self.unwrapped)} | ({"ema": average.module} if average is not None else {})

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def is_last_step(self) -> bool:
        return self.step == self.max_steps

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def build(args: TrainArguments, accelerator, folder: RunFolder, stop: StopRequest) -> TrainContext:
    """Reads the data and builds everything, from the checkpoint to resume from if there is one."""
    resumed = checkpoint.find(folder.checkpoints, args.resume, (trainer_state.FILE, TRAINING_FILE), folder.log)
    then = read_training_arguments(resumed, "--resume") if resumed is not None else {}
    if resumed is not None and args.init_from is not None and not model_arguments(args.init_from):
        for name, default in MODEL_DEFAULTS.items():  # what it started from has gone, and may
            setattr(args, name, then.get(name, default))
    train_set, val_set = load_data(args)
    unreadable = UnreadableImages.from_annotations(train_set.annotations, args.max_unreadable)
    categories, num_images = train_set.annotations.categories, len(train_set.annotations)
    if resumed is not None:
        if changed := changed_arguments(then, args, MAY_CHANGE_ON_RESUME):
            raise UserError(f"--resume {resumed}: a resumed run keeps its flags; changed: {changed}")
        model = load_model(resumed, "--resume").train()
        if Categories(tuple(model.config.category_ids), model.config.class_names) != categories:
            raise UserError(f"--resume {resumed}: its classes are not those of {train_set.annotations.split.json}")
    else:
        model = new_detector(args, categories, folder)

    world, rank = accelerator.num_processes, accelerator.process_index
    meter = Meter(accelerator.device, mfu_factor(args, model, train_set.annotations, accelerator.device, folder))
    prepare_for_training(args, model, world, accelerator.device)
    sampler = step_sampler(args, num_images, rank, world)
    max_steps = args.max_steps or math.ceil(args.num_epochs * sampler.steps_per_epoch)
    lr_backbone = args.lr if args.lr_backbone is None else args.lr_backbone
    groups = parameter_groups(model, args.lr, lr_backbone, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    # The scheduler is not prepared: Accelerate would step it once per process.
    scheduler = learning_rate_schedule(
        optimizer, args.lr_scheduler, args.warmup_steps, max_steps, args.lr_end, args.decay_steps
    )
    average = None
    if args.ema_decay:
        average = AveragedModel(model, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    model, optimizer = accelerator.prepare(model, optimizer)
    state = TrainerState(
        *(optimizer, scheduler, accelerator.scaler, meter),
        samples_per_step=sampler.samples_per_step,
        num_images=num_images,
        images=train_set.annotations.digest,
        average=average,
    )
    if resumed is not None:
        state.load(resumed, model, accelerator.is_main_process)
        if state.step > max_steps:
            raise UserError(f"--resume {resumed}: it is past --max_steps {max_steps}")
        if not (folder.path / "best").exists():  # this folder is not the one the checkpoint comes from
            state.best_ap = -math.inf
        folder.log(f"resumed from {resumed}")
    steps = accelerator.gather(torch.tensor([state.step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"--output_dir {folder.path}: processes stand at steps {steps}; all nodes have to share this folder"
        )
    sampler.start_step = state.step
    truth = load_ground_truth(val_set.annotations.split.json, val_set.annotations.image_ids, categories)
    options = DecodingOptions(args.max_objects, args.top_p, args.temperature, args.seed)
    evaluator = TrainingEvaluator(
        folder, accelerator, val_set, truth, options, args.eval_batch_size, args.num_workers, stop
    )
    return TrainContext(
        *(args, accelerator, folder, train_set, evaluator, sampler, max_steps, model, state, stop, unreadable)
    )


def find_splits(args: TrainArguments) -> tuple[Split, Split | None]:
    """Where the images to train on and those to evaluate lie; None where these are the same."""
    train = find_split("train", args.root, args.train_images, args.train_json, args.train_shards)
    return train, None if args.overfit else find_split("val", args.root, args.val_images, args.val_json)


def load_data(args: TrainArguments) -> tuple[TrainDataset, EvalDataset]:
    """The images to train on, as sentences, and those to evaluate."""
    train, val = find_splits(args)
    train = load_annotations(train, None, args.follow_links)
    if not train.trainable.any():
        raise UserError(
            f"{train.split.json}: holds no objects to train on"
            + (f" ({count_by_kind(train.faults)})" if train.faults else "")
        )
    if args.overfit:
        train = val = train.subset(range(min(args.overfit, len(train))))
    else:
        val = load_annotations(val, train.categories, args.follow_links)
    return training_set(args, train), EvalDataset(val, EvalTransform(args.image_size))


def training_set(args: TrainArguments, annotations: Annotations) -> TrainDataset:
    """Images as sentences, augmented as the flags say."""
    builder = SequenceBuilder(
        Tokenizer(len(annotations.categories.ids), args.num_bins),
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
        *(args.image_size, args.scale_min, args.scale_max, args.flip),
        independent_crop=args.independent_crop,
        iou_crop=args.iou_crop,
    )
    colors = ColorAugmentation(args.color_jitter, args.grayscale, args.photometric_distortion)
    return TrainDataset(annotations, transform, builder, args.seed, colors if colors else None)


def new_detector(args: TrainArguments, categories: Categories, folder: RunFolder) -> Pix2SeqForObjectDetection:
    """From scratch, or from the detector to fine-tune."""
    values = {name: getattr(args, name) for name in MODEL_DEFAULTS} | {
        "category_ids": categories.ids,
        "class_names": categories.names,
        "decoding": {"top_p": args.top_p, "temperature": args.temperature, "seed": args.seed},
    }
    if args.init_from is None:
        return build_model(**values)
    source = load_model(args.init_from, "--init_from")
    shape = model_arguments(args.init_from)
    if not shape:
        raise UserError(f"--init_from {args.init_from}: has no {TRAINING_FILE}, which says how it was made")
    for name in MODEL_DEFAULTS.keys() - MAY_CHANGE_ON_FINE_TUNING:
        had = shape.get(name, MODEL_DEFAULTS[name])
        if values[name] != had:
            raise UserError(f"--{name} {values[name]}: the detector of --init_from has {had}; leave this flag out")
    free = MAY_CHANGE_ON_FINE_TUNING | {"category_ids", "class_names", "decoding"}
    model, report = adapt(source, **{name: values[name] for name in free})
    for line in report:
        folder.log(f"--init_from {args.init_from}: {line}")
    return model


def prepare_for_training(
    args: TrainArguments, model: Pix2SeqForObjectDetection, world: int, device: torch.device
) -> None:
    """Decides what learns, and what is kept for the backward pass."""
    model.backbone.prepare_for_training(
        *(args.freeze_backbone, args.batch_norm, world, device, model.config.image_size),
        frozen_stages=args.frozen_stages,
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def mfu_factor(
    args: TrainArguments,
    model: Pix2SeqForObjectDetection,
    images: Annotations,
    device: torch.device,
    folder: RunFolder,
) -> float:
    """FLOPs of an image's share of a step, over what the GPU can do in a second; 0 where that is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device), args.mixed_precision) if device.type == "cuda" else None
    if peak is None:
        return 0.0
    real = min(images.trainable.sum() / len(images), args.max_objects)
    length = TOKENS_PER_OBJECT * args.max_objects + (not args.noise_objects)
    targets = TOKENS_PER_OBJECT * real + (args.max_objects - real if args.noise_objects else 1)
    try:
        with torch.device("meta"):
            twin = type(model)(model.config)
        prepare_for_training(args, twin, 1, torch.device("meta"))
        return model_step_cost(twin, 1, length, args.mixed_precision, round(targets)).step_flops / peak
    except Exception as error:  # a backbone of anybody's may ask for values, and no run fails for a metric
        folder.log(f"perf/mfu is left out: the step's FLOPs cannot be counted ({error})")
        return 0.0


def step_sampler(args: TrainArguments, num_images: int, rank: int, world: int) -> StepSampler:
    return StepSampler(
        *(num_images, args.batch_size, args.gradient_accumulation_steps, rank, world, args.seed),
        repetition=args.batch_repetition,
    )
