"""The flags of train.py and evaluate.py, their defaults, and checks across them. command_line.py parses them."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from pix2seq.command_line import read_flags
from pix2seq.decoding import DecodingOptions
from pix2seq.sizes import SIZES

# Flags that may differ from the checkpoint's when a run is resumed. A dataset may have moved. A run may be made
# longer, which moves the end of its schedule. batch_size and gradient_accumulation_steps may be traded for each other
# and for processes, see TrainerState.load. The others change nothing that a step computes.
FREE_ON_RESUME = {
    *("config", "output_dir", "project_name", "report_to", "resume", "num_workers", "keep_last", "check_data"),
    *("root", "train_images", "train_json", "train_shards", "val_images", "val_json", "follow_links"),
    *("max_unreadable", "batch_size", "gradient_accumulation_steps"),
    *("num_epochs", "max_steps", "log_every", "eval_every", "sample_every", "ckpt_every", "eval_batch_size"),
    *("max_skipped_steps", "compile", "gradient_checkpointing"),
}

# Flags of the model that may differ from those of the detector it starts from; the others are its shape.
FREE_ON_FINE_TUNING = {
    *("image_size", "num_bins", "max_objects", "noise_objects", "dropout", "drop_path"),
    *("label_smoothing", "coordinate_sigma"),
}


def flag(default, help: str):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """The keywords of build_detector."""

    backbone: str = flag(
        "microsoft/resnet-50",
        "Hugging Face vision model (ResNet, ViT, DINOv2, DINOv3, ConvNeXt, Swin, timm): hub name or local folder "
        '(pretrained weights), or an inline config like "{model_type: resnet}" (trained from scratch)',
    )
    backbone_stage: Literal["c3", "c4", "c5", "dc5"] = flag(
        "c5", "where a pyramid is cut: stride 8, 16 or 32; dc5: ResNet at stride 16 with a dilated last stage"
    )
    decoder: Literal["llama", "transformer"] = flag(
        "llama",
        "decoder that writes the sentence. llama: the picture is its prefix; transformer: the authors', which looks "
        "at the picture through cross-attention",
    )
    hidden_size: int = flag(256, "width of the encoder")
    encoder_layers: int = flag(6, "transformer layers between backbone and decoder")
    decoder_layers: int = flag(6, "layers of the decoder")
    num_heads: int = flag(8, "attention heads of the encoder")
    mlp_size: int = flag(1024, "inner width of the encoder's MLPs")
    decoder_size: int | None = flag(None, "width of the decoder (default: that of the encoder)")
    decoder_heads: int | None = flag(None, "attention heads of the decoder (default: as many as the encoder's)")
    decoder_mlp_size: int | None = flag(None, "inner width of the decoder's MLPs (default: that of the encoder's)")
    dropout: float = flag(
        0.1, "dropout on visual features, inside the encoder's MLPs and those of --decoder transformer"
    )
    drop_path: float = flag(0.1, "probability with which a residual branch of encoder and decoder is left out")
    position_code: Literal["original", "ruler"] = flag(
        "original", "code of the visual tokens' places; ruler: waves short enough to tell neighbours apart"
    )
    bin_init: Literal["random", "ruler"] = flag(
        "random", "how the embeddings of the bins start; ruler: as the code of their coordinate"
    )
    causal_prefix: bool = flag(False, "llama: a visual token sees only those before it, as in a text")
    image_size: int = flag(640, "side of the square canvas in pixels")
    num_bins: int = flag(1000, "coordinate bins")
    max_objects: int = flag(100, "objects in a sentence, in training and in evaluation")
    noise_objects: bool = flag(
        True, "sequence augmentation: fill sentences with noise objects; without, they end in EOS"
    )
    label_smoothing: float = flag(
        0.0, "share of a target that is spread evenly: a coordinate's over all bins, a class's over all classes"
    )
    coordinate_sigma: float = flag(
        0.0, "soft targets: a coordinate is right within a Gaussian of this many bins' deviation (0: one bin is right)"
    )

    def __post_init__(self):
        _check(self, "num_bins", self.num_bins >= 2, "at least 2")
        for name in ("hidden_size", "decoder_layers", "num_heads", "mlp_size", "image_size", "max_objects"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("decoder_size", "decoder_heads", "decoder_mlp_size"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        _check(self, "encoder_layers", self.encoder_layers >= 0, "at least 0")
        for name in ("dropout", "drop_path", "label_smoothing"):
            _check(self, name, 0 <= getattr(self, name) < 1, "0 up to 1")
        _check(self, "coordinate_sigma", 0 <= self.coordinate_sigma <= 100, "0 to 100")
        self._check_width("hidden_size", "num_heads", self.num_heads)
        heads = self.decoder_heads or self.num_heads
        name = "hidden_size" if self.decoder_size is None else "decoder_size"
        self._check_width(name, "decoder_heads" if self.decoder_heads else "num_heads", heads)
        _check(self, "causal_prefix", not self.causal_prefix or self.decoder == "llama", "off with this --decoder")

    def _check_width(self, name: str, heads_name: str, heads: int) -> None:
        # 4: the 2-D position code has sines and cosines for each of two directions.
        multiple = math.lcm(2 * heads, 4)
        _check(
            self, name, getattr(self, name) % multiple == 0, f"a multiple of {multiple} with --{heads_name} {heads}"
        )


@dataclass
class DataArguments:
    root: str | None = flag(
        None,
        "COCO layout: images/{train,val}2017 or {train,val}2017, folders or zip archives, and "
        "annotations/instances_{train,val}2017.json; or Roboflow's: {train,valid}/_annotations.coco.json",
    )
    train_images: str | None = flag(None, "folder of training images, for any other layout")
    train_json: str | None = flag(None, "COCO annotation file of the training images")
    train_shards: str | None = flag(None, "training images as WebDataset shards, in place of folder and file")
    val_images: str | None = flag(None, "folder of validation images")
    val_json: str | None = flag(None, "COCO annotation file of the validation images")
    overfit: int = flag(0, "train and evaluate on the first N training images (0: off)")
    follow_links: bool = flag(False, "open images that are symbolic links to files outside their folder")
    max_unreadable: float = flag(
        0.01,
        "share of the training images that may be missing or broken; each is replaced by another, more end the run",
    )
    scale_min: float = flag(0.3, "scale jitter, lower end; at 1 the image just fits the canvas")
    scale_max: float = flag(2.0, "scale jitter, upper end")
    independent_crop: bool = flag(
        False, "the crop's two offsets are drawn each for itself; with --scale_min 0.1, large-scale jitter"
    )
    iou_crop: bool = flag(False, "first SSD's crop: a part of the image that keeps enough of at least one object")
    flip: float = flag(0.5, "probability of a horizontal flip")
    color_jitter: float = flag(
        0.0, "strength of SimCLR's colour jitter (0: off; the authors: 0.5, but not for detection)"
    )
    grayscale: float = flag(0.0, "probability that an image loses its colours (the authors: 0.2 with colour jitter)")
    photometric_distortion: bool = flag(
        False, "SSD's distortion of brightness, contrast, saturation, hue and channels"
    )
    box_jitter: float = flag(0.0, "edges of real boxes are moved by up to this share of the box's size (0: off)")
    mix_rate: float = flag(
        0.0, "probability that wrong noise boxes are scattered among the real ones, not behind them"
    )
    object_order: Literal["random", "area", "distance", "none"] = flag("random", "order of the objects in a sentence")
    class_corruption: Literal["none", "rand_cls", "rand_n_fake_cls", "real_n_fake_cls", "real_n_rand_n_fake_cls"] = (
        flag("rand_n_fake_cls", "what the decoder reads in place of the class tokens")
    )
    noise_weight: float = flag(1.0, "loss weight of a noise object's class token")
    eos_weight: float = flag(0.1, "loss weight of EOS (without noise objects)")
    batch_repetition: int = flag(
        1, "samples made of an image, each augmented anew, one after the other; an epoch has so many times the steps"
    )
    num_workers: int = flag(4, "data loading processes for each training process")

    def __post_init__(self):
        _check(self, "batch_repetition", self.batch_repetition >= 1, "at least 1")
        explicit = {name: getattr(self, name) for name in ("train_images", "train_json", "val_images", "val_json")}
        given = [name for name, value in explicit.items() if value is not None]
        train = [] if self.train_shards else ["train_images", "train_json"]
        val = [] if self.overfit else ["val_images", "val_json"]
        missing = [f"--{name}" for name in (*train, *val) if name not in given]
        if self.root is None and missing:
            some = given or self.train_shards
            raise ValueError(
                f"{' '.join(missing)}: missing" if some else "--root: missing (the folder of a COCO-layout dataset)"
            )
        if self.root is not None and given:
            raise ValueError(f"--root and --{given[0]} exclude each other: name the dataset one way")
        if self.train_shards and (self.train_images or self.train_json):
            raise ValueError("--train_shards and --train_json exclude each other: name the training set one way")
        _check(self, "scale_min", 0 < self.scale_min <= self.scale_max, "above 0 and at most --scale_max")
        _check(self, "flip", 0 <= self.flip <= 1, "0 to 1")
        _check(self, "color_jitter", 0 <= self.color_jitter <= 2.5, "0 to 2.5")
        _check(self, "box_jitter", 0 <= self.box_jitter <= 0.4, "0 to 0.4")
        for name in ("grayscale", "mix_rate", "max_unreadable"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        good = not (self.photometric_distortion and self.color_jitter)
        _check(self, "photometric_distortion", good, "off with --color_jitter: each changes the same colours")
        for name in ("noise_weight", "eos_weight", "num_workers", "overfit"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")


@dataclass
class TrainArguments:
    config: str | None = flag(None, "YAML recipe of these flags; the command line wins over it")
    check_data: bool = flag(
        False, "only look at the dataset, and say what is wrong with it: see python -m pix2seq.data"
    )
    size: Literal["r50", "r50-c4", "vit-b", "vit-l"] | None = flag(
        None, "a size of the paper's, in place of the flags from --backbone to --mlp_size"
    )
    init_from: str | None = flag(
        None,
        "fine-tune this detector (folder or hub name, with its training.yaml): its shape and weights, classes matched "
        "by name; --image_size, "
        "--num_bins and --max_objects may change",
    )
    output_dir: str | None = flag(None, "run folder (default: runs/PROJECT_NAME)")
    project_name: str = flag("pix2seq", "project, for the trackers")
    report_to: list[str] = flag(["none"], "trackers: wandb, tensorboard, or any other name Accelerate knows; or none")
    resume: str | None = flag(
        None, "auto (the newest complete checkpoint of the run folder, if any) or a checkpoint folder"
    )
    seed: int = flag(0, "decides data order, augmentation, initial weights and dropout")
    deterministic: bool = flag(False, "deterministic algorithms on the GPU, at some cost in speed")
    batch_size: int = flag(32, "images for each process and micro-batch")
    eval_batch_size: int = flag(64, "images for each process in evaluation")
    gradient_accumulation_steps: int = flag(1, "micro-batches in an optimizer step")
    num_epochs: float = flag(40.0, "length of the run, unless --max_steps says it")
    max_steps: int = flag(0, "length of the run in optimizer steps (0: use --num_epochs)")
    lr: float = flag(1e-4, "peak learning rate")
    lr_backbone: float | None = flag(None, "peak learning rate of the backbone (default: that of --lr)")
    layer_decay: float = flag(
        1.0, "each layer of the backbone learns so many times as fast as the one above it; the last at --lr_backbone"
    )
    freeze_backbone: bool = flag(False, "the backbone does not learn")
    frozen_stages: int = flag(
        0, "the first stages of the backbone (layers of a ViT), and what comes before them, do not learn"
    )
    batch_norm: Literal["sync", "local", "frozen"] = flag(
        "sync",
        "batch norms of the backbone. sync: statistics over all processes (on GPUs; else local); local: of each "
        "process's own images; frozen: neither statistics nor weights change",
    )
    lr_scheduler: Literal["linear", "cosine", "wsd", "constant"] = flag(
        "linear", "learning rate after the warm-up; wsd: stable, then a decay in the last --decay_steps"
    )
    warmup_steps: int = flag(1000, "steps of linear warm-up")
    decay_steps: int = flag(0, "steps of the decay of --lr_scheduler wsd (0: the last fifth of the run)")
    lr_end: float = flag(
        0.01,
        "learning rate at the end, and before the warm-up, as a share of the peak; not with --lr_scheduler constant",
    )
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.95, "AdamW")
    weight_decay: float = flag(0.05, "AdamW, on kernels only")
    ema_decay: float = flag(
        0.0,
        "average the weights over the steps with this decay (0: off), evaluate the average too, leave it in final/",
    )
    max_grad_norm: float = flag(0.0, "clip the gradient's norm (0: off)")
    compile: bool = flag(False, "compile the model with torch.compile: faster after minutes of compiling")
    gradient_checkpointing: bool = flag(
        False, "compute the activations of transformer layers again instead of keeping them: slower, smaller"
    )
    max_skipped_steps: int = flag(
        10, "steps in a row that may be skipped because their loss or gradient is not finite, before the run stops"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "default: what accelerate launch was told")
    log_every: int = flag(50, "steps between rows of metrics.jsonl")
    eval_every: int = flag(5000, "steps between evaluations (0: only at the end)")
    sample_every: int = flag(1000, "steps between pictures of predictions (0: never)")
    ckpt_every: int = flag(1000, "steps between checkpoints (0: only at the end)")
    keep_last: int = flag(2, "checkpoints kept; the best and the final model are kept apart")
    top_p: float = flag(0.4, "nucleus of decoding; 0 is greedy")
    temperature: float = flag(1.0, "temperature of decoding")

    def __post_init__(self):
        self.output_dir = self.output_dir or str(Path("runs") / self.project_name)
        self.report_to = [name for name in self.report_to if name != "none"]
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "log_every"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "seed", 0 <= self.seed < 2**32, "0 to 2^32 - 1")
        for name in (
            "max_steps",
            "warmup_steps",
            "decay_steps",
            "frozen_stages",
            "eval_every",
            "sample_every",
            "ckpt_every",
            "weight_decay",
            "max_skipped_steps",
        ):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        _check(self, "max_grad_norm", self.max_grad_norm >= 0, "at least 0")
        _check(self, "num_epochs", self.num_epochs > 0, "above 0")
        _check(self, "lr", self.lr > 0, "above 0")
        _check(self, "lr_end", 0 <= self.lr_end <= 1, "0 to 1")
        _check(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        _check(
            self, "decay_steps", self.decay_steps == 0 or self.lr_scheduler == "wsd", "0 but for --lr_scheduler wsd"
        )
        for name, off in (("layer_decay", 1.0), ("frozen_stages", 0)):
            good = not self.freeze_backbone or getattr(self, name) == off
            _check(self, name, good, "left out with --freeze_backbone")
        _check(self, "lr_backbone", self.lr_backbone is None or self.lr_backbone >= 0, "at least 0")
        _check(self, "keep_last", self.keep_last >= 2, "at least 2: with one, a broken disk leaves nothing")
        for name in ("beta1", "beta2", "ema_decay"):
            _check(self, name, 0 <= getattr(self, name) < 1, "0 up to 1")
        _check_decoding(self)


@dataclass
class Arguments(TrainArguments, DataArguments, ModelArguments):
    """All flags of train.py."""

    PRESETS: ClassVar = {"size": lambda name: SIZES.get(name, {}), "init_from": lambda name: shape_flags(name)}
    DEFAULTS: ClassVar = {"init_from": lambda name: model_flags(name)}

    def __post_init__(self):
        for part in (ModelArguments, DataArguments, TrainArguments):
            part.__post_init__(self)
        _check(self, "mix_rate", self.noise_objects or not self.mix_rate, "0 with --no_noise_objects")


def model_flags(detector: str) -> dict:
    """The model flags a trained detector was made with."""
    flags = read_flags(detector, "--init_from")
    return {name: flags[name] for name in ModelArguments.__dataclass_fields__ if name in flags}


def shape_flags(detector: str) -> dict:
    """Those of them that a fine-tuned detector cannot change."""
    return {name: value for name, value in model_flags(detector).items() if name not in FREE_ON_FINE_TUNING}


@dataclass
class DecodingArguments:
    """How a trained detector writes, for commands that ask it to: DecodingOptions, None where the detector's hold."""

    seed: int | None = flag(None, "decides what is sampled (default: that of training)")
    top_p: float | None = flag(None, "nucleus of decoding; 0 is greedy (default: that of training)")
    temperature: float | None = flag(None, "temperature of decoding (default: that of training)")
    max_objects: int | None = flag(None, "objects to write for an image (default: that of training)")
    stop_after_noise: int | None = flag(
        None, "write no more for an image after so many objects in a row that score below --noise_score (0: never)"
    )
    noise_score: float | None = flag(None, "see --stop_after_noise (default: 0.5)")
    expected_bins: int | None = flag(
        None, "a coordinate is the mean of the bins up to so many from the one written, weighted by probability"
    )
    sharpness: float | None = flag(
        None, "scores are multiplied by the probability of those bins of all four coordinates, to this power"
    )

    def __post_init__(self):
        _check(self, "max_objects", self.max_objects is None or self.max_objects >= 1, "at least 1")
        _check(self, "seed", self.seed is None or 0 <= self.seed < 2**32, "0 to 2^32 - 1")
        for name in ("stop_after_noise", "expected_bins", "sharpness"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 <= value < math.inf, "at least 0")
        _check(self, "noise_score", self.noise_score is None or 0 <= self.noise_score <= 1, "0 to 1")
        _check_decoding(self)

    def decoding(self) -> dict:
        """The options that were said."""
        given = {option.name: getattr(self, option.name) for option in fields(DecodingOptions)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class EvaluateArguments(DecodingArguments):
    checkpoint: str | None = flag(None, "folder of a trained detector: OUT/best, OUT/final or a checkpoint")
    predictions: str | None = flag(None, "COCO results file to score instead, with --gt")
    gt: str | None = flag(None, "COCO annotation file to score --predictions against")
    oracle: bool = flag(
        False, "pass the ground truth through the tokenizer and back: the AP a perfect model would have"
    )
    root: str | None = flag(
        None, "COCO layout, of which the val split is read (default: what the detector was trained with)"
    )
    val_images: str | None = flag(None, "folder of images, for any other layout")
    val_json: str | None = flag(None, "COCO annotation file of the images")
    follow_links: bool = flag(False, "open images that are symbolic links to files outside their folder")
    output_dir: str | None = flag(None, "where metrics.json, predictions.json and predictions.png go, and the report")
    eval_batch_size: int | None = flag(None, "default: that of training")
    num_workers: int = flag(2, "data loading processes")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "default: that of training")
    image_size: int = flag(640, "canvas of --oracle")
    num_bins: int = flag(1000, "bins of --oracle")
    num_pictures: int = flag(8, "images shown in predictions.png")
    report: bool = flag(
        False, "write report.html too: AP by class, size and score, kinds of errors, examples; needs --output_dir"
    )

    def __post_init__(self):
        modes = [self.checkpoint is not None, self.predictions is not None, self.oracle]
        if sum(modes) != 1:
            raise ValueError("name exactly one of --checkpoint, --predictions (with --gt) and --oracle")
        if (self.predictions is None) != (self.gt is None):
            raise ValueError("--predictions and --gt go together")
        if (self.val_images is None) != (self.val_json is None):
            raise ValueError("--val_images and --val_json go together")
        if self.root is not None and self.val_json is not None:
            raise ValueError("--root and --val_json exclude each other: name the dataset one way")
        if self.oracle and self.root is None and self.val_json is None:
            raise ValueError("--oracle: --root (or --val_images and --val_json) is missing")
        if self.report and self.output_dir is None:
            raise ValueError("--report: needs --output_dir, the folder report.html goes to")
        for name in ("eval_batch_size", "image_size"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        _check(self, "num_bins", self.num_bins >= 2, "at least 2")
        for name in ("num_workers", "num_pictures"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        super().__post_init__()


def _check(arguments, name: str, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"--{name} {getattr(arguments, name)}: must be {allowed}")


def _check_decoding(arguments) -> None:
    _check(arguments, "top_p", arguments.top_p is None or 0 <= arguments.top_p <= 1, "0 (greedy) to 1")
    _check(arguments, "temperature", arguments.temperature is None or arguments.temperature > 0, "above 0")
