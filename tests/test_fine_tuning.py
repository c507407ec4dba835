import json
import shutil

import pytest
import torch
from transformers import ViTConfig, ViTModel

from pix2seq import train
from pix2seq.argument_parser import parse, read_training_arguments
from pix2seq.arguments import TrainArguments
from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection, adapt_to_classes, load_model
from tests.runs import arguments, edited
from tests.test_architectures import BACKBONES, build

OLD = ("cat", "dog", "eel", "fox")
NEW = ("ant", "eel", "bee", "cat", "fox", "gnu")
both_decoders = pytest.mark.parametrize("decoder", ["llama", "transformer"])
IMAGES = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SEQUENCES = torch.randint(1, 27, (2, 10), generator=torch.Generator().manual_seed(1))


def trained_model(decoder: str = "llama", **kwargs) -> Pix2SeqForObjectDetection:
    model = build(decoder, category_ids=(1, 2, 3, 4), class_names=OLD, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    return model.eval()


def adapted(source: Pix2SeqForObjectDetection, class_names: tuple[str, ...] = NEW, **kwargs):
    same = ("image_size", "num_bins", "max_objects", "noise_objects", "decoding")
    values = {name: getattr(source.config, name) for name in same}
    values |= dict.fromkeys(("dropout", "drop_path", "label_smoothing", "coordinate_sigma"), 0.0)
    ids = tuple(range(10, 10 + len(class_names)))
    return adapt_to_classes(source, category_ids=ids, class_names=class_names, **values | kwargs)


def logits(model: Pix2SeqForObjectDetection) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES, SEQUENCES).logits


@both_decoders
def test_embeddings_are_kept_by_class_name(decoder):
    source = trained_model(decoder)
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
    assert report == ["classes kept: eel, cat, fox", "new classes: ant, bee, gnu", "classes dropped: dog"]
    assert model.config.class_names == NEW
    assert model.config.category_ids == list(range(10, 16))


@both_decoders
def test_all_other_parameters_are_kept(decoder):
    source = trained_model(decoder)
    old = source.state_dict()
    for name, value in adapted(source)[0].state_dict().items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")):
            assert torch.equal(value, old[name]), name
    assert torch.equal(logits(adapted(source, OLD)[0]), logits(source))


@both_decoders
def test_embeddings_of_bins_are_interpolated(decoder):
    source = trained_model(decoder)
    model, report = adapted(source, OLD, num_bins=39)
    old = source.decoder.lm_head.weight[source.tokenizer.first_bin_id :]
    new = model.decoder.lm_head.weight[model.tokenizer.first_bin_id :]
    torch.testing.assert_close(new[::2], old)
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert "num_bins: changed from 20 to 39" in report


@both_decoders
@pytest.mark.parametrize("max_objects", [2, 8])
def test_the_sequence_length_can_change(decoder, max_objects):
    source = trained_model(decoder)
    model, _ = adapted(source, OLD, max_objects=max_objects)
    torch.testing.assert_close(logits(model), logits(source))
    assert len(model.detect(IMAGES)[0].labels) == max_objects


@both_decoders
@pytest.mark.parametrize("backbone", ["resnet", "vit", "dinov2", "swin"])
def test_the_image_size_can_change(decoder, backbone):
    model, _ = adapted(trained_model(decoder, backbone=BACKBONES[backbone]), image_size=96)
    assert len(model.eval().detect(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))[0].labels) == 3


def test_an_image_size_that_the_backbone_does_not_accept_is_an_error():
    with pytest.raises(UserError, match="--image_size 24: must be a multiple of 16"):
        adapted(trained_model(backbone=BACKBONES["vit"]), image_size=24)


def test_a_model_saved_in_half_precision_is_trained_in_full_precision():
    source = trained_model().to(torch.bfloat16)
    source.config.dtype = source.config.backbone_config.dtype = torch.bfloat16
    model, _ = adapted(source)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# -- train.py --init_from ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("source") / "out"
    assert train.run_training(arguments(shapes_root, output, "--max_steps", "3", "--decoder", "transformer")) == 0
    return output / "final"


def rename_two(content):
    content["categories"][0]["name"] = "blob"
    content["categories"].append({"id": 77, "name": "star"})


def fine_tuning_arguments(root, output, source, *flags) -> TrainArguments:
    common = ["--root", str(root), "--output_dir", str(output), "--init_from", str(source), "--max_steps", "2"]
    return parse(TrainArguments, [*common, "--batch_size", "4", "--num_workers", "0", "--warmup_steps", "0", *flags])


def test_fine_tuning_takes_the_architecture_from_the_model(trained, shapes_root, tmp_path):
    root = edited(edited(shapes_root, tmp_path / "a", "train", rename_two), tmp_path / "b", "val", rename_two)
    args = fine_tuning_arguments(root, tmp_path / "out", trained, "--num_bins", "16", "--lr", "1e-9")
    assert (args.decoder, args.image_size, args.num_bins) == ("transformer", 64, 16)
    assert train.run_training(args) == 0
    log = (tmp_path / "out" / "train.log").read_text()
    assert "classes kept: rectangle, triangle, cross" in log
    assert "new classes: blob, star" in log
    source, model = load_model(trained, ""), load_model(tmp_path / "out" / "final", "")
    rows = slice(model.tokenizer.first_class_id + 1, model.tokenizer.first_class_id + 4)
    torch.testing.assert_close(model.decoder.lm_head.weight[rows], source.decoder.lm_head.weight[rows])


def test_a_fine_tuned_run_resumes_without_its_source(trained, shapes_root, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    assert train.run_training(fine_tuning_arguments(shapes_root, tmp_path / "out", source)) == 0
    shutil.rmtree(source)
    flags = ("--max_steps", "3", "--resume", "auto")
    assert train.run_training(fine_tuning_arguments(shapes_root, tmp_path / "out", source, *flags)) == 0


def test_a_recipe_overrides_only_what_fine_tuning_may_change(trained, shapes_root, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("image_size: 96\nhidden_size: 512\nlr: 1e-5\n")
    args = fine_tuning_arguments(shapes_root, tmp_path / "out", trained, "--config", str(recipe))
    assert (args.image_size, args.hidden_size, args.num_bins, args.lr) == (96, 16, 32, 1e-5)


def test_an_older_model_has_no_spatial_modulation(shapes_root, tmp_path):
    """Its training.yaml does not name the argument, whose default is True now."""
    source = tmp_path / "source"
    build(spatial_modulation=False).save_pretrained(source)
    (source / "training.yaml").write_text("decoder: llama\nhidden_size: 16\nnum_heads: 2\nmlp_size: 32\n")
    args = fine_tuning_arguments(shapes_root, tmp_path / "out", source)
    assert not args.spatial_modulation
    assert read_training_arguments(source, "--init_from")["spatial_modulation"] is False
    (source / "training.yaml").write_text("spatial_modulation: true\n")
    assert read_training_arguments(source, "--init_from")["spatial_modulation"] is True
    (source / "training.yaml").unlink()
    assert read_training_arguments(source, "--init_from") == {}


def failure(args: TrainArguments, capsys) -> str:
    """The error message of a run that exits with code 2."""
    assert train.run_training(args) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("flag", ["--hidden_size 32", "--decoder llama"])
def test_another_architecture_is_an_error(trained, shapes_root, tmp_path, capsys, flag):
    args = fine_tuning_arguments(shapes_root, tmp_path / "out", trained, *flag.split())
    assert f"{flag}: " in failure(args, capsys)


def test_a_source_that_is_not_a_trained_model_is_an_error(trained, shapes_root, tmp_path, capsys):
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained, tmp_path / "no_flags")
    (tmp_path / "no_flags" / "training.yaml").unlink()
    (tmp_path / "no_flags" / "MANIFEST.json").unlink()
    for name, reason in (
        ("vit", "'vit'"),
        ("empty", "config.json"),
        ("missing", "no such folder"),
        ("no_flags", "training.yaml"),
    ):
        message = failure(arguments(shapes_root, tmp_path / "out", "--init_from", str(tmp_path / name)), capsys)
        assert message.startswith(f"train.py: error: --init_from {tmp_path / name}")
        assert reason in message


@pytest.mark.parametrize("change", [{"num_bins": 99}, {"decoding": {"top_p": 7}}])
def test_a_config_that_contradicts_the_weights_is_an_error(trained, tmp_path, change):
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "model" / "MANIFEST.json").unlink()
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"--checkpoint .*config\.json"):
        load_model(tmp_path / "model", "--checkpoint")
