"""YOLO and Pascal VOC datasets become COCO files with the same boxes, and faults are told with file and line."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

import hotcoco
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.data.convert import MARKER, convert
from pix2seq.errors import UserError

CONFIG = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def picture(path: Path, size=(20, 10), **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **kwargs)
    return path


def text(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def yolo(root: Path, config: str = CONFIG, line: str | bytes = "1 0.5 0.5 0.5 0.2\n") -> Path:
    """Two pictures of training, of which b has no label file, and one of validation."""
    text(root / "data.yaml", config)
    for name in ("train/a", "train/b", "val/c"):
        picture(root / f"images/{name}.png")
    text(root / "labels/train/a.txt", line)
    text(root / "labels/val/c.txt", "0 0.25 0.5 0.1 0.2\n")
    return root


def obj(name="cat", box=(1, 1, 10, 5), more="") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{escape(name)}</name>{more}<bndbox>{corners}</bndbox></object>\n"


def xml(*objects: str, name="a.png", size="<size><width>20</width><height>10</height></size>") -> str:
    return f"<annotation>\n<filename>{name}</filename>{size}\n{''.join(objects)}</annotation>"


def voc(root: Path, annotation: str | bytes | None = None) -> Path:
    for name in "abc":
        picture(root / f"JPEGImages/{name}.png")
    text(root / "Annotations/a.xml", xml(obj("dog")) if annotation is None else annotation)
    text(root / "Annotations/b.xml", xml(name="b.png"))
    text(root / "Annotations/c.xml", xml(obj("cat", (3, 2, 4, 4)), name="c.png"))
    text(root / "ImageSets/Main/train.txt", "a\nb\n")
    text(root / "ImageSets/Main/val.txt", "c\n")
    return root


def converted(root: Path) -> dict[str, dict]:
    """The files that come of a dataset, by split. Every picture in them exists, and the counts are right."""
    contents = {}
    for split in convert(root, root / "out"):
        assert split.json == root / f"out/annotations/instances_{split.name}2017.json"
        content = contents[split.name] = json.loads(split.json.read_text())
        assert all((split.images / image["file_name"]).is_file() for image in content["images"])
        assert (len(content["images"]), len(content["annotations"])) == (split.num_images, split.num_objects)
        COCO_of(content)
    return contents


def COCO_of(content: dict) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def boxes(content: dict) -> list:
    return [[entry["category_id"], *entry["bbox"]] for entry in content["annotations"]]


def files(content: dict) -> list[str]:
    return [image["file_name"] for image in content["images"]]


def complaint(root: Path) -> str:
    with pytest.raises(UserError) as error:
        convert(root, root / "out")
    assert not (root / "out").exists()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


# -- YOLO ------------------------------------------------------------------------------------------


def test_yolo(tmp_path):
    train, val = converted(yolo(tmp_path)).values()
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert train["images"] == [
        {"id": 1, "file_name": "a.png", "width": 20, "height": 10},
        {"id": 2, "file_name": "b.png", "width": 20, "height": 10},
    ]
    assert train["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [5, 4, 10, 2], "area": 20, "iscrowd": 0}
    ]
    assert boxes(val) == [[1, 4, 4, 2, 2]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("{0: cat, 1: dog}", [(1, "cat"), (2, "dog")]),
        ("\n  0: cat\n  1: dog\n  3: no", [(1, "cat"), (2, "dog"), (4, "no")]),
        ("\n- 'a, b'\n- 3 # three\n", [(1, "a, b"), (2, "3")]),
    ],
)
def test_yolo_names(tmp_path, names, expected):
    train = converted(yolo(tmp_path, CONFIG.split("names")[0] + f"names: {names}\n"))["train"]
    assert [(entry["id"], entry["name"]) for entry in train["categories"]] == expected


@pytest.mark.parametrize("config", ["path: .", "path: images", "path: /gone/coco8", "path: ../datasets/coco8"])
def test_yolo_path(tmp_path, config):
    entry = "train" if config.endswith("images") else "images/train"
    train = converted(yolo(tmp_path, f"{config}\ntrain: {entry}\nnames: [cat, dog]\n"))["train"]
    assert files(train) == ["a.png", "b.png"]


def test_yolo_as_roboflow_exports_it(tmp_path):
    text(tmp_path / "data.yml", "train: ../train/images\nval: ../valid/images\ntest:\nnc: 1\nnames: ['cat']\n")
    for name in ("train", "valid"):
        picture(tmp_path / name / "images/a_jpg.rf.12.jpg")
        text(tmp_path / name / "labels/a_jpg.rf.12.txt", "0 0.5 0.5 0.5 0.2")
    contents = converted(tmp_path)
    assert list(contents) == ["train", "val"]
    assert boxes(contents["val"]) == [[1, 5, 4, 10, 2]]


def test_yolo_several_folders_and_depths(tmp_path):
    yolo(tmp_path, "train: [images/train, images/val]\nvalid: images\nnames: [cat, dog]\n")
    picture(tmp_path / "images/deep/er/a.JPG", format="JPEG")
    contents = converted(tmp_path)
    assert files(contents["train"]) == ["train/a.png", "train/b.png", "val/c.png"]
    assert files(contents["val"]) == ["deep/er/a.JPG", "train/a.png", "train/b.png", "val/c.png"]
    assert boxes(contents["val"]) == [[2, 5, 4, 10, 2], [1, 4, 4, 2, 2]]


def test_yolo_lists(tmp_path):
    yolo(tmp_path, "train: lists/train.txt\nnames: [cat, dog]\n")
    content = f"./images/val/c.png\r\n\n{tmp_path}/images/train/a.png\nimages/val/c.png\n../images/train/b.png"
    text(tmp_path / "lists/train.txt", content)
    assert files(converted(tmp_path)["train"]) == ["val/c.png", "train/a.png", "train/b.png"]
    text(tmp_path / "lists/train.txt", "\nimages/gone.png\n")
    with pytest.raises(UserError, match="lists/train.txt:2: there is no picture images/gone.png"):
        convert(tmp_path, tmp_path / "out2")


def test_yolo_labels_beside_the_pictures(tmp_path):
    text(tmp_path / "data.yaml", "train: train\nnames: [cat]\n")
    picture(tmp_path / "train/a.png")
    text(tmp_path / "train/a.txt", "0 0.5 0.5 0.5 0.2")
    assert boxes(converted(tmp_path)["train"]) == [[1, 5, 4, 10, 2]]


def test_yolo_polygons_become_boxes(tmp_path):
    lines = "0 0.1 0.2 0.5 0.1 0.3 0.9\n\n1.0 0.5 0.5 0.5 0.2\r\n0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n"
    found = boxes(converted(yolo(tmp_path, line=b"\xef\xbb\xbf" + lines.encode()))["train"])
    np.testing.assert_allclose(found, [[1, 2, 1, 8, 8], [2, 5, 4, 10, 2], [1, 2, 1, 8, 4]], rtol=1e-12)


def test_yolo_boxes_outside_are_kept_as_they_are(tmp_path):
    train = converted(yolo(tmp_path, line="0 1.5 0.5 2 -0.5"))["train"]
    assert boxes(train) == [[1, 10, 7.5, 40, -5]]


def test_a_picture_turned_by_exif_has_the_size_it_is_shown_with(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(yolo(tmp_path) / "images/train/b.jpg", exif=exif)
    train = converted(tmp_path)["train"]
    assert [(image["width"], image["height"]) for image in train["images"]] == [(20, 10), (10, 20), (20, 10)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2 0.5 0.5 0.5 0.2", ["class 2 is none of 0, 1"]),
        ("-1 0.5 0.5 0.5 0.2", ["class -1 is none of 0, 1"]),
        ("0.5 0.5 0.5 0.5 0.2", ["class 0.5"]),
        ("cat 0.5 0.5 0.5 0.2", ["four finite numbers", "cat"]),
        ("0 nan 0.5 0.5 0.2", ["four finite numbers", "nan"]),
        ("0 0.5 0.5 0.5 1e999", ["four finite numbers"]),
        ("0 0.5 0.5 0.5", ["four finite numbers"]),
        ("0 0.5 0.5 0.5 0.2 0.9", ["four finite numbers"]),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1", ["three points"]),
        ("0,0.1,0.1,0.5,0.1", ["four finite numbers"]),
        (b"0 0.5 0.5 0.5 0.2\xff", ["is not UTF-8"]),
    ],
)
def test_yolo_faults_in_labels(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    message = complaint(yolo(tmp_path, line=b"0 0.5 0.5 0.5 0.2\n\n" + line + b"\n"))
    assert message.startswith(f"{tmp_path}/labels/train/a.txt:3: ")
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("names: [", "is not YAML"),
        ("train: images/train\n", "names must be a list"),
        ("names: []\ntrain: images/train\n", "names must be a list"),
        ("names: {a: b}\ntrain: images/train\n", "not a whole one"),
        ("names: [cat]\n", "none of train, val and test"),
        ("names: [cat, dog]\ntrain: gone\n", "train: gone is neither under"),
        ("names: [cat, dog]\ntrain: labels\n", "train: no pictures in labels"),
        ("- names", "names must be a list"),
        (b"names: [\xe4]", "data.yaml:1: is not UTF-8"),
        ("names: {0: cat, 0: dog}\n", "0 stands twice"),
        ("names: " + "[" * 5000, "is not YAML"),
    ],
)
def test_yolo_faults_in_the_config(tmp_path, config, says):
    text(yolo(tmp_path) / "data.yaml", config)
    message = complaint(tmp_path)
    assert message.startswith(f"{tmp_path}/data.yaml")
    assert says in message


def test_labels_that_are_nowhere_and_pictures_that_are_none_are_named(tmp_path):
    (yolo(tmp_path) / "labels/val/c.txt").unlink()
    assert f"val: not one picture has a label file; the first would be {tmp_path}/labels/val/c.txt" in complaint(
        tmp_path
    )
    text(tmp_path / "images/train/a.png", "nothing")
    assert complaint(tmp_path).startswith(f"{tmp_path}/images/train/a.png: cannot be read as a picture")


# -- Pascal VOC ------------------------------------------------------------------------------------


def test_voc(tmp_path):
    train, val = converted(voc(tmp_path)).values()
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert files(train) == ["a.png", "b.png"]
    assert train["images"][0] == {"id": 1, "file_name": "a.png", "width": 20, "height": 10}
    assert boxes(train) == [[2, 0, 0, 10, 5]]
    assert boxes(val) == [[1, 2, 1, 2, 3]]


def test_voc_lists(tmp_path):
    text(voc(tmp_path) / "ImageSets/Main/trainval.txt", "a\nb\nc\n")
    assert {name: len(content["images"]) for name, content in converted(tmp_path).items()} == {
        "train": 2,
        "val": 1,
        "trainval": 3,
    }
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    assert sorted(converted(tmp_path)) == ["train", "val"]
    for name in ("trainval", "val"):
        (tmp_path / f"ImageSets/Main/{name}.txt").unlink()
    assert files(converted(tmp_path)["train"]) == ["a.png", "b.png", "c.png"]


def test_voc_as_roboflow_exports_it(tmp_path):
    for folder in ("train", "valid", "test"):
        picture(tmp_path / folder / "a.png")
        text(tmp_path / folder / "a.xml", xml(obj(folder)))
        picture(tmp_path / folder / "not annotated.png")
    contents = converted(tmp_path)
    assert list(contents) == ["train", "val", "test"]
    assert [boxes(content)[0][0] for content in contents.values()] == [2, 3, 1]
    assert files(contents["val"]) == ["a.png"]


def test_voc_directly_in_the_folder(tmp_path):
    text(tmp_path / "a.xml", xml(obj()))
    picture(tmp_path / "a.png")
    assert boxes(converted(tmp_path)["train"]) == [[1, 0, 0, 10, 5]]


def test_voc_labels_decide_the_order(tmp_path):
    text(voc(tmp_path) / "labels.txt", "dog\n\nbird\ncat\n")
    train = converted(tmp_path)["train"]
    assert [entry["name"] for entry in train["categories"]] == ["dog", "bird", "cat"]
    assert boxes(train)[0][0] == 1
    text(tmp_path / "labels.txt", "dog\n")
    with pytest.raises(UserError, match=r"c.xml: the class cat is not in .*labels.txt"):
        convert(tmp_path, tmp_path / "out2")


def test_voc_details(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    objects = [
        obj(" a & b ", (1.5, 1.25, 10.75, 5.125), part + "<difficult>1</difficult>"),
        obj("Zürich", (" 0\n", "1.0", "1e1", 5)),
    ]
    content = '<?xml version="1.0" encoding="iso-8859-1"?>' + xml(*objects)
    train = converted(voc(tmp_path, content.encode("latin-1")))["train"]
    assert [entry["name"] for entry in train["categories"]] == ["Zürich", "a & b", "cat"]
    assert boxes(train) == [[2, 0.5, 0.25, 10.25, 4.875], [1, -1, 0, 11, 5]]
    assert [entry["iscrowd"] for entry in train["annotations"]] == [0, 0]


@pytest.mark.parametrize(
    "size", ["", "<size><width>0</width><height>0</height></size>", "<size><width>x</width></size>"]
)
def test_voc_without_a_size_the_picture_tells_it(tmp_path, size):
    image = converted(voc(tmp_path, xml(obj(), size=size)))["train"]["images"][0]
    assert (image["width"], image["height"]) == (20, 10)


@pytest.mark.parametrize("name", ["", "a", "old.jpg", "/home/me/a.png", r"C:\me\a.png"])
def test_voc_the_picture_is_found_whatever_its_filename(tmp_path, name):
    assert files(converted(voc(tmp_path, xml(obj(), name=name)))["train"]) == ["a.png", "b.png"]


@pytest.mark.parametrize("name", ["renamed", "renamed.png", "there/renamed.png"])
def test_voc_filename_is_asked_where_the_files_name_does_not_tell(tmp_path, name):
    (voc(tmp_path, xml(obj(), name=name)) / "JPEGImages/a.png").rename(tmp_path / "JPEGImages/renamed.png")
    assert files(converted(tmp_path)["train"]) == ["renamed.png", "b.png"]


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>' + xml(obj()).replace("cat", "&b;")


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (xml(obj(), obj(box=("x", 1, 2, 3))), ":5: an object needs a <name> and a <bndbox> of four finite"),
        (xml(obj(box=("nan", 1, 2, 3))), ":3: an object needs"),
        (xml(obj(box=(1, 1, "inf", 3))), ":3: an object needs"),
        (xml(obj(name=" ")), ":3: an object needs"),
        (xml("<object><name>cat</name></object>"), ":3: an object needs"),
        (xml(obj())[: -len("</annotation>")], ":5: is not XML"),
        ("", ":1: is not XML"),
        (xml(obj()).encode().replace(b"cat", b"\xff"), ":4: is not XML"),
        ('<?xml version="1.0" encoding="gibberish"?>' + xml(obj()), ":1: is not XML"),
        (BOMB, ":1: a DOCTYPE is not allowed"),
        (BOMB.encode("utf-16"), ":1: a DOCTYPE is not allowed"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + xml(obj()), ":1: a DOCTYPE is not allowed"),
        ("<annotations/>", ": is not Pascal VOC: it holds <annotations>"),
        (xml(obj(), name="b.png"), ": no picture a or b.png in"),
    ],
)
def test_voc_faults(tmp_path, annotation, says):
    voc(tmp_path, annotation)
    if "no picture" in says:
        for name in "ab":
            (tmp_path / f"JPEGImages/{name}.png").unlink()
    message = complaint(tmp_path)
    assert message.startswith(f"{tmp_path}/Annotations/a.xml{says}")


def test_voc_two_files_about_one_picture_are_named(tmp_path):
    (voc(tmp_path, xml(obj(), name="b.png")) / "JPEGImages/a.png").unlink()
    message = complaint(tmp_path)
    assert message == f"{tmp_path}/Annotations/b.xml: is about {tmp_path}/JPEGImages/b.png, and so is " + str(
        tmp_path / "Annotations/a.xml"
    )


def test_voc_two_pictures_of_one_name(tmp_path):
    picture(voc(tmp_path) / "JPEGImages/a.jpg")
    assert files(converted(tmp_path)["train"]) == ["a.png", "b.png"]
    text(tmp_path / "Annotations/a.xml", xml(obj(), name="gone.png"))
    with pytest.raises(UserError, match="more than one picture a or gone.png"):
        convert(tmp_path, tmp_path / "out2")


def test_voc_faults_of_the_layout(tmp_path):
    text(voc(tmp_path) / "ImageSets/Main/val.txt", "c\n\ngone\n")
    assert complaint(tmp_path).startswith(f"{tmp_path}/ImageSets/Main/val.txt:3: there is no")
    (tmp_path / "JPEGImages").rename(tmp_path / "pictures")
    assert complaint(tmp_path).startswith(f"{tmp_path}/JPEGImages: no such folder")


# -- both ------------------------------------------------------------------------------------------


def test_what_is_no_dataset_is_named(tmp_path):
    assert complaint(tmp_path / "gone") == f"{tmp_path}/gone: no such folder"
    assert "is neither YOLO (data.yaml) nor Pascal VOC" in complaint(tmp_path)
    text(tmp_path / "a.xml", xml())
    picture(tmp_path / "a.png")
    assert complaint(tmp_path) == f"{tmp_path}: there is no object in any of its XML files"


@pytest.mark.parametrize("theirs", ['{"info": {"description": "COCO 2017 Dataset"}}', "[]", "{", '{"info": null}'])
def test_only_files_of_a_conversion_are_overwritten(tmp_path, theirs):
    contents = converted(yolo(tmp_path))
    assert contents["val"]["info"]["description"] == MARKER
    assert converted(tmp_path) == contents
    target = text(tmp_path / "out/annotations/instances_val2017.json", theirs)
    before = (tmp_path / "out/annotations/instances_train2017.json").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"instances_val2017.json: is there and was not written by a conversion"):
        convert(tmp_path, tmp_path / "out")
    assert target.read_text() == theirs
    assert (tmp_path / "out/annotations/instances_train2017.json").stat().st_mtime_ns == before


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    text(yolo(tmp_path) / "file")
    with pytest.raises(UserError, match=r"file/annotations: cannot be written to"):
        convert(tmp_path, tmp_path / "file")
    assert sorted(path.name for path in converted(tmp_path) and (tmp_path / "out/annotations").iterdir()) == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]


def random_coco(whole: bool) -> dict:
    rng = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i:03}.png", "width": 640, "height": 480} for i in range(1, 31)]
    annotations = []
    for image in images:
        for _ in range(rng.integers(0, 31)):
            x1, x2 = np.sort(rng.choice(641, 2, replace=False)) * 1.0
            y1, y2 = np.sort(rng.choice(481, 2, replace=False)) * 1.0
            if not whole:
                x2, y2 = x2 - rng.random(), y2 - rng.random()
            box = [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]
            entry = {"image_id": image["id"], "category_id": int(rng.integers(1, 4)), "bbox": box}
            annotations.append(entry | {"id": len(annotations) + 1, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def scores(content: dict, truth: list[dict]) -> np.ndarray:
    """COCO's twelve numbers, against `content`, of predictions that are a little off the boxes of `truth`."""
    rng = np.random.default_rng(1)
    results = [
        {k: entry[k] for k in ("image_id", "category_id")}
        | {"bbox": (np.array(entry["bbox"]) + rng.normal(0, 8, 4)).tolist(), "score": rng.random()}
        for entry in truth
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO_of(content)
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize(("kind", "whole"), [("yolo", True), ("yolo", False), ("voc", True), ("voc", False)])
def test_boxes_come_back_and_score_the_same(tmp_path, kind, whole):
    """Written as the formats say, with six digits of YOLO's fractions and with all of VOC's pixels."""
    original = random_coco(whole)
    if kind == "yolo":
        text(tmp_path / "data.yaml", "train: images\nnames: [class 1, class 2, class 3]\n")
    for image in original["images"]:
        path = picture(tmp_path / ("images" if kind == "yolo" else "") / image["file_name"], (640, 480))
        entries = [entry for entry in original["annotations"] if entry["image_id"] == image["id"]]
        if kind == "yolo":
            lines = []
            for entry in entries:
                x, y, w, h = entry["bbox"]
                values = (x + w / 2) / 640, (y + h / 2) / 480, w / 640, h / 480
                lines.append(f"{entry['category_id'] - 1} " + " ".join(f"{v:.6f}" for v in values) + "\n")
            text(tmp_path / "labels" / path.with_suffix(".txt").name, "".join(lines))
        else:
            objects = []
            for entry in entries:
                x, y, w, h = entry["bbox"]
                corners = [f"{v:.10g}" for v in (x + 1, y + 1, x + w, y + h)]
                objects.append(obj(f"class {entry['category_id']}", corners))
            text(path.with_suffix(".xml"), xml(*objects, name=path.name, size=""))
    content = converted(tmp_path)["train"]
    assert [entry["name"] for entry in content["categories"]] == ["class 1", "class 2", "class 3"]
    found, expected = np.array(boxes(content)), np.array(boxes(original))
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    exact = kind == "voc" and whole
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-3)
    expected, found = (scores(against, original["annotations"]) for against in (original, content))
    assert 0.2 < expected[0] < 0.9
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-3)


def test_hotcoco_reads_the_same(tmp_path):
    """Another reader, for what it reads right."""
    yolo(tmp_path / "yolo", line="1 0.5 0.123456 0.5 0.2\n0 0.1 0.2 0.3 0.4\n")
    text(tmp_path / "yolo/labels/train/data.yaml", "names: [cat, dog]\n")
    voc(tmp_path / "voc", xml(obj(box=(1.5, 2, 7, 3.25)), obj("dog")))
    readers = {"yolo": lambda path: hotcoco.COCO.from_yolo(f"{path}/labels/train", images_dir=f"{path}/images/train")}
    readers["voc"] = lambda path: hotcoco.COCO.from_voc(str(path))
    for kind, read in readers.items():
        theirs = boxes(read(tmp_path / kind).dataset)
        ours = [box for content in converted(tmp_path / kind).values() for box in boxes(content)]
        np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=1e-12)
        assert len(theirs) >= 2


# -- found by somebody who meant harm --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "keypoints"), [("[2, 3]", "0.1 0.1 2 0.9 0.9 2"), ("[3, 2]", "0.1 0.1 0.9 0.9 0.5 0.5")]
)
def test_the_box_of_a_pose_is_its_box_and_not_a_polygon(tmp_path, shape, keypoints):
    root = yolo(tmp_path, CONFIG + f"kpt_shape: {shape}\n", f"1 0.5 0.5 0.5 0.2 {keypoints}\n")
    text(root / "labels/val/c.txt", f"0 0.25 0.5 0.1 0.2 {keypoints}\n")
    (entry,) = converted(root)["train"]["annotations"]
    np.testing.assert_allclose(entry["bbox"], [5, 4, 10, 2])
    text(root / "labels/val/c.txt", "0 0.25 0.5 0.1 0.2 0.3\n")
    with pytest.raises(UserError, match="c.txt:1: "):
        convert(root, tmp_path / "other")


def test_links_to_the_pictures_are_put_where_nothing_else_is(tmp_path):
    root = yolo(tmp_path / "a")
    for split in convert(root, tmp_path / "out"):
        assert split.linked
        assert (tmp_path / "out" / "images" / f"{split.name}2017").resolve() == split.images
    assert not any(split.linked for split in convert(root, root))
    assert sorted(path.name for path in (root / "images").iterdir()) == ["train", "val"]
    assert [split.linked for split in convert(voc(tmp_path / "b"), tmp_path / "out")] == [True, True]
    assert (tmp_path / "out" / "images" / "train2017").resolve() == tmp_path / "b" / "JPEGImages"
    text(tmp_path / "c" / "a.xml", xml(obj()))
    picture(tmp_path / "c" / "a.png")
    assert not any(split.linked for split in convert(tmp_path / "c", tmp_path / "c" / "out"))


def test_links_that_lead_back_multiply_nothing(tmp_path):
    root = yolo(tmp_path)
    (root / "images/train/loop").symlink_to(root / "images/train")
    (root / "images/train/more").symlink_to(root / "images/val")
    text(root / "images/train/._a.png", "a shadow of macOS")
    files = [image["file_name"] for image in converted(root)["train"]["images"]]
    assert files == ["a.png", "b.png", "more/c.png"]


def test_names_that_are_not_utf8_are_refused(tmp_path):
    root = yolo(tmp_path)
    picture(Path(os.fsdecode(os.fsencode(root / "images/train") + b"/caf\xe9.png")))
    with pytest.raises(UserError, match="its name is not UTF-8") as error:
        convert(root, root / "out")
    str(error.value).encode()


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "none-such"])
def test_encodings_that_cannot_be_read_are_named(tmp_path, encoding):
    root = voc(tmp_path, f'<?xml version="1.0" encoding="{encoding}"?><annotation/>')
    with pytest.raises(UserError, match="a.xml:1: is not XML"):
        convert(root, root / "out")


def test_a_list_may_not_lead_elsewhere(tmp_path):
    root = voc(tmp_path / "root")
    text(tmp_path / "elsewhere.xml", xml())
    text(root / "ImageSets/Main/train.txt", f"{tmp_path}/elsewhere\n")
    with pytest.raises(UserError, match="train.txt:1: there is no"):
        convert(root, root / "out")


# -- what lies elsewhere, and what is left out -----------------------------------------------------


def test_a_link_out_of_the_dataset_is_not_opened_and_not_quoted(tmp_path):
    secret = text(tmp_path / "secret", "root:x:0:0:root:/root:/bin/bash\n")
    (yolo(tmp_path / "data") / "labels/train/b.txt").symlink_to(secret)
    message = complaint(tmp_path / "data")
    assert message.startswith(f"{tmp_path}/data/labels/train/b.txt: lies outside {tmp_path}/data")
    assert "--follow_links" in message
    assert "root" not in message.replace(str(tmp_path), "")


def linked_folder(root: Path) -> None:
    for name in ("images", "labels"):
        (root / name / "val/more").symlink_to(root.parent / "elsewhere" / name)


def linked_config(root: Path) -> None:
    (root / "data.yaml").rename(root.parent / "elsewhere/data.yaml")
    (root / "data.yaml").symlink_to(root.parent / "elsewhere/data.yaml")


def listed_picture(root: Path) -> None:
    text(root / "list.txt", f"{root}/images/train/a.png\n{root.parent}/elsewhere/images/x.png\n")
    text(root / "data.yaml", CONFIG.replace("images/val", "list.txt"))


def other_folder(root: Path) -> None:
    text(root / "data.yaml", CONFIG.replace("images/val", "../elsewhere/images"))


def test_links_out_of_the_dataset_are_not_walked(tmp_path, monkeypatch):
    (yolo(tmp_path / "data") / "images/train/all").symlink_to("/usr")
    walk, walked = os.walk, []
    monkeypatch.setattr(os, "walk", lambda *a, **k: (walked.append(step[0]) or step for step in walk(*a, **k)))
    assert complaint(tmp_path / "data").startswith(f"{tmp_path}/data/images/train/all: lies outside")
    assert walked == [str(tmp_path / "data/images/train")]


@pytest.mark.parametrize(
    "name", ["labels.txt", "ImageSets/Main/train.txt", "Annotations/a.xml", "JPEGImages/a.png", "JPEGImages"]
)
def test_voc_nothing_elsewhere_is_opened(tmp_path, name):
    """Nor is a word of it told, also not the size of a picture that the XML does not say."""
    root = voc(tmp_path / "data", xml(obj("dog"), size=""))
    text(root / "labels.txt", "dog\ncat\n")
    elsewhere = tmp_path / "elsewhere"
    (root / name).rename(elsewhere)
    (root / name).symlink_to(elsewhere)
    opened, whole = [], Path.read_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: opened.append(path) or whole(path))
        patch.setattr(Image, "open", lambda path, **_: pytest.fail(f"{path} was opened"))
        assert complaint(root).startswith(f"{root}/{name}: lies outside {root}")
    assert root / name not in opened
    assert [split.name for split in convert(root, tmp_path / "out", follow_links=True)] == ["train", "val"]


@pytest.mark.parametrize("plant", [linked_folder, listed_picture, other_folder, linked_config])
def test_pictures_elsewhere_are_opened_if_one_says_so(tmp_path, plant):
    picture(tmp_path / "elsewhere/images/x.png")
    text(tmp_path / "elsewhere/labels/x.txt", "1 0.5 0.5 0.5 0.2\n")
    plant(yolo(tmp_path / "data"))
    assert f"lies outside {tmp_path}/data, and is not opened (--follow_links allows it)" in complaint(
        tmp_path / "data"
    )
    val = convert(tmp_path / "data", tmp_path / "out", follow_links=True)[1]
    last = "c.png" if plant == linked_config else "x.png"
    assert any(name.endswith(last) for name in files(json.loads(val.json.read_text())))


def test_a_list_behind_a_link_is_not_quoted(tmp_path):
    text(tmp_path / "elsewhere/secret.txt", "password\n")
    (yolo(tmp_path / "data") / "link").symlink_to(text(tmp_path / "elsewhere/images/x").parent)
    text(tmp_path / "data/data.yaml", CONFIG.replace("images/val", "link/../secret.txt"))
    assert "password" not in complaint(tmp_path / "data")


def test_the_whole_disk_is_no_folder_of_images(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        listed = f"{picture(Path(elsewhere) / 'x.png')}\nimages/train/a.png\n"
        text(yolo(tmp_path) / "list.txt", listed)
        text(tmp_path / "data.yaml", CONFIG.replace("images/train", "list.txt"))
        with pytest.raises(UserError, match="train: its pictures lie in .*, which have no folder in common but /$"):
            convert(tmp_path, tmp_path / "out", follow_links=True)
    assert not (tmp_path / "out").exists()


def test_voc_a_list_that_climbs_leads_nowhere(tmp_path):
    text(voc(tmp_path / "data").parent / "s.xml", xml(obj(), name="s.png"))
    picture(tmp_path / "s.png")
    text(tmp_path / "data/ImageSets/Main/train.txt", "a\n../../s\n")
    assert complaint(tmp_path / "data").startswith(f"{tmp_path}/data/ImageSets/Main/train.txt:2: there is no")


def test_another_dataset_leaves_nothing_of_the_one_before(tmp_path):
    convert(yolo(tmp_path / "a"), tmp_path / "out")
    text(yolo(tmp_path / "b") / "data.yaml", "train: images/train\nnames: [cat, dog]\n")
    text(tmp_path / "out/annotations/instances_mine2017.json", "{}")
    convert(tmp_path / "b", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/annotations").iterdir()) == [
        "instances_mine2017.json",
        "instances_train2017.json",
    ]
    assert [path.name for path in (tmp_path / "out/images").iterdir()] == ["train2017"]


def told(root: Path) -> list[str]:
    lines = []
    convert(root, root / "out", tell=lines.append)
    return [line.replace(f"{root}/", "") for line in lines]


def test_yolo_what_is_left_out_is_told(tmp_path):
    yolo(tmp_path, CONFIG + "valid: images/val\n")
    for name in ("train/z.txt", "train/classes.txt", "train/train.txt", "val/heic.txt"):
        text(tmp_path / "labels" / name, "")
    assert told(tmp_path) == [
        "1 pictures of train have no label file, and so no objects, the first of them images/train/b.png",
        "1 label files of train have no picture, the first of them labels/train/z.txt",
        "data.yaml: valid is left out: there is val",
        "1 label files of val have no picture, the first of them labels/val/heic.txt",
    ]


def test_voc_what_is_left_out_is_told(tmp_path):
    text(voc(tmp_path) / "ImageSets/Main/train.txt", "a\n")
    picture(tmp_path / "JPEGImages/x.png")
    text(tmp_path / "Annotations/sub/d.xml", xml(name="d.png"))
    assert told(tmp_path) == [
        "2 XML files are in no list, the first of them Annotations/b.xml",
        "2 pictures have no XML file in a split, the first of them JPEGImages/b.png",
    ]


def test_voc_folders_that_are_left_out_are_told(tmp_path):
    for folder in ("train", "val", "valid", "."):
        picture(tmp_path / folder / "a.png")
        text(tmp_path / folder / "a.xml", xml(obj()))
    assert told(tmp_path) == [
        "1 XML files are in no split: there are files in train and val, too, the first of them valid/a.xml",
        "1 XML files are in no split: there are files in train and val, too, the first of them a.xml",
    ]


def test_voc_without_lists_takes_folders_at_any_depth(tmp_path):
    shutil.rmtree(voc(tmp_path) / "ImageSets")
    picture(tmp_path / "JPEGImages/sub/d.png")
    text(tmp_path / "Annotations/sub/d.xml", xml(obj(), name="d.png"))
    assert files(converted(tmp_path)["train"]) == ["a.png", "b.png", "c.png", "sub/d.png"]


def test_a_split_that_is_null_is_none(tmp_path):
    assert list(converted(yolo(tmp_path, CONFIG.replace("images/val", "null")))) == ["train"]


def test_what_systems_put_into_folders_changes_nothing(tmp_path):
    """macOS, for one: .DS_Store, and a shadow of every file on disks that are not its own."""
    root = voc(tmp_path / "data")
    for name in ("JPEGImages/._a.png", "Annotations/._a.xml"):
        text(root / name, "shadow")
    shutil.rmtree(root / "ImageSets")
    convert(root, tmp_path / "out")
    text(tmp_path / "out/images/.DS_Store")
    (split,) = convert(root, tmp_path / "out")
    assert split.linked
    assert split.num_images == 3


def test_a_link_that_is_somebodys_stays(tmp_path):
    mine = tmp_path / "out/images/train2017"
    mine.parent.mkdir(parents=True)
    mine.symlink_to(tmp_path)
    for _ in "12":
        train, val = convert(yolo(tmp_path / "data"), tmp_path / "out")
        assert (train.linked, val.linked) == (False, True)
        assert mine.readlink() == tmp_path
