"""Builds a training run from its arguments."""

import math
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pix2seq.argument_parser import TRAINING_FILE, changed_arguments, read_training_arguments, to_yaml
from pix2seq.arguments import (
    MAY_CHANGE_ON_FINE_TUNING,
    MAY_CHANGE_ON_RESUME,
    MODEL_DEFAULTS,
    TrainArguments,
    model_arguments,
)
from pix2seq.data import Annotations, Categories
from pix2seq.data.unreadable import UnreadableImages
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.generation import DecodingOptions
from pix2seq.models import Pix2SeqForObjectDetection, adapt_to_classes, build_model, load_model
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.training.checkpoint import find_checkpoint
from pix2seq.training.context import TrainContext
from pix2seq.training.cost import model_step_cost, peak_flops
from pix2seq.training.datasets import load_data, step_sampler
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.metrics import Meter
from pix2seq.training.optimizer import learning_rate_schedule, parameter_groups
from pix2seq.training.plateau import PlateauHint
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.trainer_state import TRAINER_FILE, TrainerState


def build_context(
    args: TrainArguments, *, accelerator: Accelerator, folder: RunFolder, stop: StopRequest
) -> TrainContext:
    """Reads the data, builds model and optimizer, and restores the checkpoint of --resume, if any.

    Raises:
        UserError: an argument or file is wrong.
    """
    checkpoint = find_checkpoint(
        folder.checkpoints, args.resume, required_files=(TRAINER_FILE, TRAINING_FILE), warn=folder.log
    )
    previous = read_training_arguments(checkpoint, "--resume") if checkpoint is not None else {}
    if checkpoint is not None and args.init_from is not None and not model_arguments(args.init_from):
        for name, default in MODEL_DEFAULTS.items():  # the model of --init_from may have been deleted meanwhile
            setattr(args, name, previous.get(name, default))
    train_set, val_set = load_data(args)
    annotations = train_set.annotations
    unreadable = UnreadableImages.from_annotations(annotations, args.max_unreadable)
    if checkpoint is None:
        model = create_model(args, annotations.categories, folder)
    else:
        if changed := changed_arguments(previous, args, MAY_CHANGE_ON_RESUME):
            raise UserError(f"--resume {checkpoint}: these arguments differ from the checkpoint's: {changed}")
        model = load_model(checkpoint, "--resume").train()
        if Categories(tuple(model.config.category_ids), model.config.class_names) != annotations.categories:
            raise UserError(f"--resume {checkpoint}: its classes differ from those of {annotations.split.json}")
    meter = Meter(accelerator.device, mfu_factor(args, model, annotations, accelerator.device, folder))
    prepare_for_training(args, model, accelerator.num_processes, accelerator.device)
    sampler = step_sampler(args, annotations, accelerator.process_index, accelerator.num_processes)
    max_steps = args.max_steps or math.ceil(args.num_epochs * sampler.steps_per_epoch)
    optimizer = build_optimizer(args, model)
    # The scheduler is not prepared by Accelerate, which would step it once per process.
    scheduler = learning_rate_schedule(
        optimizer,
        args.lr_scheduler,
        warmup_steps=args.warmup_steps,
        max_steps=max_steps,
        min_lr_ratio=args.lr_end,
        decay_steps=args.decay_steps,
    )
    ema_model = None
    if args.ema_decay:
        ema_model = AveragedModel(model, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    model, optimizer = accelerator.prepare(model, optimizer)
    state = TrainerState(
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=accelerator.scaler,
        meter=meter,
        samples_per_step=sampler.samples_per_step,
        num_images=len(annotations),
        images_digest=annotations.digest,
        ema_model=ema_model,
        hard_negatives=train_set.hard_negatives,
    )
    if checkpoint is not None:
        restore_state(state, checkpoint, model=model, max_steps=max_steps, accelerator=accelerator, folder=folder)
    steps = accelerator.gather(torch.tensor([state.step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"--output_dir {folder.path}: processes resume from different steps {steps}; "
            "all nodes must share this folder"
        )
    sampler.start_step = state.step
    evaluator = TrainingEvaluator(
        folder=folder,
        accelerator=accelerator,
        val_set=val_set,
        ground_truth=load_ground_truth(
            val_set.annotations.split.json, val_set.annotations.image_ids, annotations.categories
        ),
        options=DecodingOptions(max_objects=args.max_objects, **args.decoding()),
        batch_size=args.eval_batch_size,
        num_workers=args.num_workers,
        stop=stop,
    )
    return TrainContext(
        args=args,
        accelerator=accelerator,
        folder=folder,
        train_set=train_set,
        evaluator=evaluator,
        sampler=sampler,
        max_steps=max_steps,
        model=model,
        state=state,
        stop=stop,
        unreadable=unreadable,
        plateau=PlateauHint(args.num_bins, plateau_remedies(args)),
    )


def restore_state(
    state: TrainerState,
    checkpoint: Path,
    *,
    model: torch.nn.Module,
    max_steps: int,
    accelerator: Accelerator,
    folder: RunFolder,
) -> None:
    """Loads trainer.pt of a checkpoint into `state`."""
    # With weights_only, loading cannot execute code.
    state_dict = torch.load(checkpoint / TRAINER_FILE, map_location="cpu", weights_only=True)
    state.load_state_dict(state_dict, model, is_main_process=accelerator.is_main_process)
    if state.step > max_steps:
        raise UserError(f"--resume {checkpoint}: its step {state.step} is beyond --max_steps {max_steps}")
    if not (folder.path / "best").exists():  # the checkpoint is from another run folder
        state.best_ap, state.evaluations_since_best = -math.inf, 0
    folder.log(f"resumed from {checkpoint}")


def plateau_remedies(args: TrainArguments) -> list[str]:
    """Flags that the run does not use and that end the plateau of x1 earlier."""
    remedies = [] if args.spatial_modulation else ["--spatial_modulation"]
    return remedies if args.object_order == "top_to_bottom" else [*remedies, "--object_order top_to_bottom"]


def create_model(args: TrainArguments, categories: Categories, folder: RunFolder) -> Pix2SeqForObjectDetection:
    """Builds a new model, or adapts the one of --init_from."""
    values = {name: getattr(args, name) for name in MODEL_DEFAULTS} | {
        "category_ids": categories.ids,
        "class_names": categories.names,
        "decoding": args.decoding(),
    }
    if args.init_from is None:
        return build_model(**values)
    source = load_model(args.init_from, "--init_from")
    source_arguments = model_arguments(args.init_from)
    if not source_arguments:
        raise UserError(f"--init_from {args.init_from}: has no {TRAINING_FILE} with the arguments of its model")
    for name in MODEL_DEFAULTS.keys() - MAY_CHANGE_ON_FINE_TUNING:
        source_value = source_arguments.get(name, MODEL_DEFAULTS[name])
        if values[name] != source_value:
            raise UserError(
                f"--{name} {values[name]}: the model of --init_from has {source_value}; omit this flag, or build a "
                "new model with --init_from none"
            )
    changeable = MAY_CHANGE_ON_FINE_TUNING | {"category_ids", "class_names", "decoding"}
    model, report = adapt_to_classes(source, **{name: values[name] for name in changeable})
    for line in report:
        folder.log(f"--init_from {args.init_from}: {line}")
    return model


def prepare_for_training(
    args: TrainArguments, model: Pix2SeqForObjectDetection, world_size: int, device: torch.device
) -> None:
    """Freezes what --freeze_backbone, --frozen_stages and --batch_norm name, and sets up gradient checkpointing."""
    model.backbone.prepare_for_training(
        freeze=args.freeze_backbone,
        batch_norm=args.batch_norm,
        world_size=world_size,
        device=device,
        image_size=model.config.image_size,
        frozen_stages=args.frozen_stages,
    )
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)


def enable_gradient_checkpointing(model: Pix2SeqForObjectDetection) -> None:
    """Recomputes the activations of the layers in the backward pass instead of storing them."""
    # Newer versions of transformers deprecate `gradient_checkpointing_enable`, the only name in 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_optimizer(args: TrainArguments, model: Pix2SeqForObjectDetection) -> torch.optim.AdamW:
    """AdamW with the learning rates and the weight decay of the arguments."""
    lr_backbone = args.lr if args.lr_backbone is None else args.lr_backbone
    groups = parameter_groups(model, args.lr, lr_backbone, args.weight_decay, args.layer_decay)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=True)


def mfu_factor(
    args: TrainArguments,
    model: Pix2SeqForObjectDetection,
    annotations: Annotations,
    device: torch.device,
    folder: RunFolder,
) -> float:
    """FLOPs of a training step per image, divided by the peak FLOP/s of the GPU; 0 if either is unknown."""
    precision = args.mixed_precision or "no"
    peak = peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    if peak is None:
        return 0.0
    num_real = min(annotations.trainable.sum() / len(annotations), args.max_objects)
    sequence_length = TOKENS_PER_OBJECT * args.max_objects + (not args.noise_objects)
    loss_positions = TOKENS_PER_OBJECT * num_real + (args.max_objects - num_real if args.noise_objects else 1)
    try:
        with torch.device("meta"):
            meta_model = type(model)(model.config)
        prepare_for_training(args, meta_model, 1, torch.device("meta"))
        cost = model_step_cost(meta_model, 1, sequence_length, precision, round(loss_positions))
        return cost.step_flops / peak
    except Exception as error:  # a backbone may need values, and a metric must not end a run
        folder.log(f"perf/mfu is not available: the FLOPs of the step cannot be counted ({error})")
        return 0.0


def create_run_folder(context: TrainContext) -> None:
    """Writes the arguments and the environment, and starts the trackers."""
    args, accelerator, folder = context.args, context.accelerator, context.folder
    try:
        folder.write_config(to_yaml(args), accelerator.device, accelerator.num_processes)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: cannot be written to ({error.strerror})") from None
    keep_evaluation = context.state.last_evaluated_step == context.step
    for row in folder.rewind_metrics(context.step, keep_evaluation):
        context.plateau.update(row)
    folder.status("running", context.step)
    # TensorBoard accepts plain values only.
    flags = {k: v if isinstance(v, int | float) else str(v) for k, v in yaml.safe_load(to_yaml(args)).items()}
    try:
        folder.trackers.start(accelerator, args.project_name, flags, resumed=context.step > 0)
    except Exception as error:  # each tracker has its own exceptions
        message = f"--report_to {' '.join(args.report_to)}: cannot be started ({error})"
        folder.status("failed", context.step, message)
        raise UserError(message) from None


def log_summary(context: TrainContext) -> None:
    """Logs the datasets, the size of the model and the number of steps."""
    args, accelerator, folder = context.args, context.accelerator, context.folder
    for name, dataset in (("train", context.train_set), ("val", context.evaluator.val_set)):
        for line in dataset.annotations.summary(args.max_objects):
            folder.log(f"{name + ':':6} {line}")
    if (factors := context.sampler.factors) is not None:
        folder.log(
            f"--repeat_threshold {args.repeat_threshold:g}: {(factors > 1).sum()} images are repeated, up to "
            f"{factors.max():.1f} times; an epoch has {context.sampler.images_per_epoch} images"
        )
    for line in sorted(context.unreadable.lines):
        folder.log(f"replaced by another image: {line}")
    folder.log(
        f"{args.image_size} x {args.image_size} pixels, {args.num_bins} bins, {args.max_objects} objects in a sequence"
    )
    folder.log(
        f"{sum(p.numel() for p in context.model.parameters()) / 1e6:.1f} M parameters on {accelerator.device}; "
        f"steps {context.step} to {context.max_steps} of {context.sampler.samples_per_step} images "
        f"({args.batch_size} x {args.gradient_accumulation_steps} accumulated x {accelerator.num_processes} processes)"
    )
