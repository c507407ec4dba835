"""Fine-tuning: what is kept, what is new, and what is refused."""

import json
import shutil

import pytest
import torch

from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection, adapt_to_classes, load_model
from tests.runs import arguments, edited
from tests.test_architectures import BACKBONES, build, pictures, sentences

OLD = ("cat", "dog", "eel", "fox")
NEW = ("ant", "eel", "bee", "cat", "fox", "gnu")  # three of the four, in another order, and three more
both = pytest.mark.parametrize("decoder", ["llama", "transformer"])


def old_detector(decoder: str = "llama", **kwargs) -> Pix2SeqForObjectDetection:
    model = build(decoder, category_ids=(1, 2, 3, 4), class_names=OLD, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    return model


def adapted(source, **kwargs):
    config = source.config
    same = {name: getattr(config, name) for name in ("image_size", "num_bins", "max_objects", "noise_objects")}
    same |= {
        "dropout": 0.0,
        "drop_path": 0.0,
        "decoding": config.decoding,
        "label_smoothing": 0.0,
        "coordinate_sigma": 0.0,
    }
    names = kwargs.pop("class_names", NEW)
    ids = tuple(range(10, 10 + len(names)))
    return adapt_to_classes(source, category_ids=ids, class_names=names, **same | kwargs)


@both
def test_rows_of_classes_are_kept_by_name_exactly(decoder):
    source = old_detector(decoder)
    model, report = adapted(source)
    old, new = source.decoder.lm_head.weight, model.decoder.lm_head.weight
    first = source.tokenizer.first_class_id
    for label, name in enumerate(NEW):
        if name in OLD:
            assert torch.equal(new[first + label], old[first + OLD.index(name)])
        else:
            assert not (new[first + label] == old[first : first + 4]).all(1).any()
    assert torch.equal(new[:first], old[:first])
    assert torch.equal(new[model.tokenizer.first_bin_id :], old[source.tokenizer.first_bin_id :])
    if decoder == "transformer":
        assert torch.equal(model.decoder.lm_head.bias[first + 3], source.decoder.lm_head.bias[first])
    assert report[:3] == ["classes kept: eel, cat, fox", "new classes: ant, bee, gnu", "classes dropped: dog"]
    assert model.config.class_names == NEW
    assert model.config.category_ids == list(range(10, 16))


@both
def test_the_same_classes_give_the_same_detector(decoder):
    source = old_detector(decoder).eval()
    model, report = adapted(source, class_names=OLD)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(pictures(), sentences()).logits, source(pictures(), sentences()).logits)
    assert report == ["classes kept: cat, dog, eel, fox", "new classes: none", "classes dropped: none"]


@both
def test_everything_that_is_no_token_is_kept(decoder):
    source = old_detector(decoder)
    model, _ = adapted(source)
    theirs = source.state_dict()
    for name, value in model.state_dict().items():
        if value.shape == theirs[name].shape:
            assert torch.equal(value, theirs[name]), name
        else:
            assert name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")), name


@both
def test_another_number_of_bins_keeps_places(decoder):
    """Twice as fine: every second bin is an old one, the others lie halfway."""
    source = old_detector(decoder)
    model, report = adapted(source, class_names=OLD, num_bins=39)
    old = source.decoder.lm_head.weight[source.tokenizer.first_bin_id :]
    new = model.decoder.lm_head.weight[model.tokenizer.first_bin_id :]
    torch.testing.assert_close(new[::2], old)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert "num_bins: changed from 20 to 39" in report


@both
@pytest.mark.parametrize("max_objects", [2, 8])
def test_longer_and_shorter_sentences(decoder, max_objects):
    source = old_detector(decoder).eval()
    model, report = adapted(source, class_names=OLD, max_objects=max_objects)
    model.eval()
    with torch.no_grad():
        common = sentences(length=10)
        torch.testing.assert_close(model(pictures(), common).logits, source(pictures(), common).logits)
    assert len(model.detect(pictures())[0].labels) == max_objects
    assert f"max_objects: changed from 3 to {max_objects}" in report


@both
@pytest.mark.parametrize("backbone", ["resnet", "vit", "dinov2", "swin"])
def test_another_canvas(decoder, backbone):
    source = old_detector(decoder, backbone=BACKBONES[backbone])
    model, report = adapted(source, image_size=96)
    assert len(model.eval().detect(pictures(1, 96))[0].labels) == 3
    assert "image_size: changed from 64 to 96" in report


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("source") / "out"
    assert train.run_training(arguments(shapes_root, output, "--max_steps", "3", "--decoder", "transformer")) == 0
    return output / "final"


def rename_two(content):
    content["categories"][0]["name"] = "blob"
    content["categories"].append({"id": 77, "name": "star"})


def flags(root, output, *words) -> TrainArguments:
    common = ["--root", str(root), "--output_dir", str(output), "--max_steps", "2", "--batch_size", "4"]
    return parse(TrainArguments, [*common, "--num_workers", "0", "--warmup_steps", "0", *words])


def test_a_run_from_a_detector_of_other_classes(trained, shapes_root, tmp_path):
    """Its shape comes with it: no flag has to be repeated, and it resumes like any other."""
    root = edited(edited(shapes_root, tmp_path / "a", "train", rename_two), tmp_path / "b", "val", rename_two)
    args = flags(root, tmp_path / "out", "--init_from", str(trained), "--num_bins", "16", "--lr", "1e-9")
    assert (args.decoder, args.image_size, args.num_bins) == ("transformer", 64, 16)
    assert train.run_training(args) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "classes kept: rectangle, triangle, cross" in log
    assert "new classes: blob, star" in log
    assert "num_bins: changed from 32 to 16" in log
    model = load_model(tmp_path / "out" / "final", "")
    source = load_model(trained, "")
    first = model.tokenizer.first_class_id
    torch.testing.assert_close(
        model.decoder.lm_head.weight[first + 1 : first + 4], source.decoder.lm_head.weight[first + 1 : first + 4]
    )
    words = ("--init_from", str(trained), "--num_bins", "16", "--lr", "1e-9", "--max_steps", "3", "--resume", "auto")
    assert train.run_training(flags(root, tmp_path / "out", *words)) == 0


def test_a_recipe_may_say_what_fine_tuning_may_change(trained, shapes_root, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("image_size: 96\nhidden_size: 512\nlr: 1e-5\n")
    args = flags(shapes_root, tmp_path / "out", "--config", str(recipe), "--init_from", str(trained))
    assert (args.image_size, args.hidden_size, args.num_bins, args.lr) == (96, 16, 32, 1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hidden_size", "32"], "--hidden_size 32: the detector of --init_from has 16"),
        (["--decoder", "llama"], "--decoder llama: the detector of --init_from has transformer"),
    ],
)
def test_another_shape_is_refused(trained, shapes_root, tmp_path, capsys, words, says):
    assert train.run_training(flags(shapes_root, tmp_path / "out", "--init_from", str(trained), *words)) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_what_is_no_detector_is_refused_in_one_line(trained, shapes_root, tmp_path, capsys):
    from transformers import ViTConfig, ViTModel

    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    shutil.copytree(trained, tmp_path / "no_flags")
    (tmp_path / "no_flags" / "training.yaml").unlink()
    (tmp_path / "no_flags" / "MANIFEST.json").unlink()
    for name, says in (
        ("vit", "holds a model of type 'vit', not 'pix2seq'"),
        ("nowhere", "no such folder and no such model on the hub"),
        ("no_flags", "has no training.yaml"),
    ):
        tiny = arguments(shapes_root, tmp_path / "out", "--init_from", str(tmp_path / name))
        assert train.run_training(tiny) == 2
        message = capsys.readouterr().err
        assert says in message
        assert message.startswith(f"train.py: error: --init_from {tmp_path / name}")
        assert message.count("\n") == 1


def test_load_detector_names_the_flag(tmp_path):
    with pytest.raises(UserError, match="--init_from .*no config.json"):
        load_model(tmp_path, "--init_from")


def test_a_detector_saved_in_half_precision_is_trained_in_full():
    source = old_detector().to(torch.bfloat16)
    source.config.dtype = source.config.backbone_config.dtype = torch.bfloat16
    model, _ = adapted(source)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_canvas_the_backbone_cannot_take_is_refused():
    with pytest.raises(UserError, match="--image_size 24: must be a multiple of 16"):
        adapted(old_detector(backbone=BACKBONES["vit"]), image_size=24)


def test_a_fine_tuned_run_resumes_without_what_it_started_from(trained, shapes_root, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    assert train.run_training(flags(shapes_root, tmp_path / "out", "--init_from", str(source))) == 0
    shutil.rmtree(source)
    words = ("--init_from", str(source), "--max_steps", "3", "--resume", "auto")
    assert train.run_training(flags(shapes_root, tmp_path / "out", *words)) == 0


def spoil(config: dict, change: dict) -> dict:
    return {key: value for key, value in (config | change).items() if value is not None}


@pytest.mark.parametrize("change", [{"id2label": None}, {"num_bins": 99}, {"decoding": {"top_p": 7}}])
def test_a_config_that_does_not_fit_its_weights_is_refused(trained, tmp_path, change):
    shutil.copytree(trained, tmp_path / "spoilt")
    (tmp_path / "spoilt" / "MANIFEST.json").unlink()
    path = tmp_path / "spoilt" / "config.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()), change)))
    with pytest.raises(UserError, match="config.json"):
        load_model(tmp_path / "spoilt", "--checkpoint")
