"""The benchmark of peers: records, the same images for all detectors, and boxes in the right coordinates."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import peer_training, peers
from benchmarks.peer_models import STRIDES, Peer, backbone_weights, build_backbone, build_detr
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.data import eval_loader
from pix2seq.evaluation.coco_metrics import coco_metrics, load_ground_truth
from pix2seq.models import build_model
from pix2seq.training.datasets import load_data

FLAGS = "--image_size 64 --batch_size 4 --num_workers 0 --num_queries 10 --no-pretrained"


def load(root, *words: str):
    return load_data(parse(TrainArguments, ["--root", str(root), "--image_size", "64", *words]))


def test_benchmark_writes_a_record(shapes_root, tmp_path, capsys):
    argv = f"--root {shapes_root} --output {tmp_path / 'peers.json'} {FLAGS} --detectors fcos detr".split()
    assert (
        peers.main([*argv, "--steps", "2", "--lr", "1e-3", "1e-4", "--", "--scale_min", "0.75", "--mosaic", "1"]) == 0
    )
    record = json.loads((tmp_path / "peers.json").read_text())
    assert record["settings"]["train_words"] == ["--scale_min", "0.75", "--mosaic", "1"]
    assert (record["data"]["scale_min"], record["data"]["mosaic"]) == (0.75, 1)
    assert list(record["rows"]) == ["fcos", "detr"]
    assert [row["lr"] for row in record["rows"].values()] == [1e-3, 1e-4]
    for row in record["rows"].values():
        assert row["steps"] == len(row["loss_by_step"]) == 2
        assert np.isfinite(list(row["loss_by_step"].values())).all()
        assert row["images_per_s"] > 0
        assert {"AP", "AP50", "per_class/ellipse"} <= row["metrics"].keys()
    assert "images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_pix2seq_takes_as_many_steps_as_fit_into_the_time(shapes_root, tmp_path):
    argv = f"--root {shapes_root} --output {tmp_path / 'peers.json'} --detectors pix2seq {FLAGS} --minutes 1"
    words = ["--batch_size", "2", "--decoder_layers", "1", "--output_dir", str(tmp_path / "run")]
    assert peers.main([*argv.split(), "--pix2seq_config", "configs/demo.yaml", "--", *words]) == 0
    row = json.loads((tmp_path / "peers.json").read_text())["rows"]["pix2seq"]
    assert row["steps"] > peers.PROBE_STEPS
    assert row["arguments"]["batch_size"] == 2
    assert (tmp_path / "run" / "final").is_dir()
    assert row["metrics"]["AP"] >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--detectors fcos detr --steps 1 --lr 1 1 1", "--lr: give one value, or one for each of fcos detr"),
        ("--detectors fcos fcos --steps 1", "--detectors fcos fcos: contains one twice"),
        ("--detectors pix2seq --steps 1", "--pix2seq_config: missing"),
        ("--steps 1 --image_size 48", "--image_size 48: must be a multiple of 32"),
        ("--minutes 0", "--minutes 0.0: must be above 0"),
        ("--steps 3 --lr 1e30", "--lr: the loss of fcos is not finite"),
        ("--minutes 0.0001", "--minutes 0.0001: the evaluation alone takes"),
    ],
)
def test_errors_name_the_flag(shapes_root, tmp_path, capsys, flags, message):
    argv = f"--root {shapes_root} --output {tmp_path / 'peers.json'} {FLAGS} --detectors fcos {flags}".split()
    try:
        code = peers.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_peers_see_the_images_and_boxes_of_train_py(shapes_root):
    train_set, _ = load(shapes_root)
    peer_set = replace(train_set, sequence_builder=peer_training.BoxTargets(9))
    for index in range(4):
        example, peer_example = train_set[3, index, 0], peer_set[3, index, 0]
        assert torch.equal(example["pixel_values"], peer_example["pixel_values"])
        kept = peer_example["labels"] >= 0
        rng = np.random.default_rng((train_set.seed, 3, index, 0))
        boxes, labels = train_set.annotations.objects(index)
        padded = train_set.transform(train_set.annotations.image_file(index), boxes, rng)
        np.testing.assert_allclose(peer_example["boxes"][kept], padded.boxes, atol=1e-6)
        np.testing.assert_array_equal(peer_example["labels"][kept], labels[padded.kept])


def test_true_boxes_have_ap_1_and_boxes_in_the_padding_are_dropped(shapes_root):
    _, val_set = load(shapes_root, "--image_size", "96")
    annotations = val_set.annotations
    val_set.transform = replace(val_set.transform, resize=False)  # the image covers 64 of 96 pixels

    def detect(pixels, mask):  # all images are in one batch
        detected = []
        for index, image_mask in enumerate(mask):
            assert image_mask.sum() == 64 * 64
            boxes, labels = annotations.objects(index)
            boxes = np.concatenate([boxes / 96, [[0.8, 0.1, 0.9, 0.9]]])
            labels = np.append(labels, 0)
            values = {"boxes": boxes, "labels": labels, "scores": np.ones(len(labels))}
            detected.append({name: torch.from_numpy(value) for name, value in values.items()})
        return detected

    model = torch.nn.Identity()
    peer = Peer(model, model, loss=lambda: None, detect=detect, max_grad_norm=0)
    loader = eval_loader(val_set, len(annotations), 0, 1)
    predictions = peer_training.predict(peer, loader, 96, annotations.categories.ids, torch.device("cpu"))
    assert len(predictions) == annotations.trainable.sum()
    ground_truth = load_ground_truth(annotations.split.json, annotations.image_ids, annotations.categories)
    assert coco_metrics(ground_truth, predictions)["AP"] == pytest.approx(1)


def test_frozen_batch_norms_keep_their_activations():
    weights, pixels = backbone_weights(pretrained=False), torch.rand(2, 3, 64, 64)
    args = Namespace(detr_stride=16, batch_norm="frozen", num_queries=5, frozen_stages=0)
    trained, frozen = (
        build_backbone(Namespace(batch_norm=batch_norm, frozen_stages=0), weights, STRIDES)
        for batch_norm in ("local", "frozen")
    )
    with torch.no_grad():
        for ours, expected in zip(frozen.train()(pixels), trained.eval()(pixels), strict=True):
            torch.testing.assert_close(ours, expected)
    peer = build_detr(args, weights, num_classes=3, side=64)
    assert peer.model.model.backbone.model is peer.backbone
    assert [tuple(features.shape[1:]) for features in peer.backbone(pixels)] == [(112, 4, 4)]


def test_peers_freeze_the_stages_that_train_py_freezes():
    weights = backbone_weights(pretrained=False)
    backbone = build_backbone(Namespace(batch_norm="local", frozen_stages=2), weights, STRIDES)
    model = build_model(
        category_ids=(1,),
        class_names=("a",),
        backbone="efficientnet-lite0",
        backbone_stage="p4",
        load_pretrained=False,
    )
    model.backbone.prepare_for_training(
        freeze=False, batch_norm="local", world_size=1, device=torch.device("cpu"), image_size=64, frozen_stages=2
    )
    names = {n for n, p in model.backbone.model._backbone.named_parameters() if not p.requires_grad}
    assert names
    assert {n for n, p in backbone.named_parameters() if not p.requires_grad} == names


def test_learning_rate_rises_and_decays():
    factors = [peer_training.learning_rate_factor(progress) for progress in (0, peer_training.WARMUP, 0.5, 1)]
    assert factors[1] == pytest.approx(1)
    assert factors[0] == factors[-1] == peer_training.LR_END < factors[2] < 1
