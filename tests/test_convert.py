"""Conversion of YOLO and Pascal VOC: equal boxes, clear errors, and no files outside the source."""

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

from pix2seq.data.convert import MARKER, convert
from pix2seq.errors import UserError

CONFIG = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def write_image(path: Path, size=(20, 10), **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **kwargs)
    return path


def write_text(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_yolo(root: Path, config: str | bytes = CONFIG, line: str | bytes = "1 0.5 0.5 0.5 0.2\n") -> Path:
    """Writes two training images, one without a label file, and one validation image."""
    write_text(root / "data.yaml", config)
    for name in ("train/a", "train/b", "val/c"):
        write_image(root / f"images/{name}.png")
    write_text(root / "labels/train/a.txt", line)
    write_text(root / "labels/val/c.txt", "0 0.25 0.5 0.1 0.2\n")
    return root


def obj(name="cat", box=(1, 1, 10, 5), extra="") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{escape(name)}</name>{extra}<bndbox>{corners}</bndbox></object>\n"


def xml(*objects: str, name="a.png", size="<size><width>20</width><height>10</height></size>") -> str:
    return f"<annotation>\n<filename>{name}</filename>{size}\n{''.join(objects)}</annotation>"


def make_voc(root: Path, annotation: str | bytes | None = None) -> Path:
    """Writes the training images a and b and the validation image c."""
    for name in "abc":
        write_image(root / f"JPEGImages/{name}.png")
    write_text(root / "Annotations/a.xml", xml(obj("dog")) if annotation is None else annotation)
    write_text(root / "Annotations/b.xml", xml(name="b.png"))
    write_text(root / "Annotations/c.xml", xml(obj("cat", (3, 2, 4, 4)), name="c.png"))
    write_text(root / "ImageSets/Main/train.txt", "a\nb\n")
    write_text(root / "ImageSets/Main/val.txt", "c\n")
    return root


def convert_to_dict(root: Path) -> dict[str, dict]:
    """Converts a dataset and returns the annotation files by split, after checks that hold for all of them."""
    contents = {}
    for split in convert(root, root / "out"):
        assert split.json == root / f"out/annotations/instances_{split.name}2017.json"
        content = contents[split.name] = json.loads(split.json.read_text())
        assert all((split.images / image["file_name"]).is_file() for image in content["images"])
        assert (len(content["images"]), len(content["annotations"])) == (split.num_images, split.num_objects)
    return contents


def boxes(content: dict) -> list:
    return [[entry["category_id"], *entry["bbox"]] for entry in content["annotations"]]


def names(content: dict, key: str = "images") -> list[str]:
    return [entry["file_name" if key == "images" else "name"] for entry in content[key]]


def conversion_error(root: Path) -> str:
    """Returns the message of a failed conversion, which has written nothing."""
    with pytest.raises(UserError) as error:
        convert(root, root / "out")
    assert not (root / "out").exists()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def notes(root: Path) -> list[str]:
    messages = []
    convert(root, root / "out", notify=messages.append)
    return [message.replace(f"{root}/", "") for message in messages]


# -- YOLO ------------------------------------------------------------------------------------------


def test_yolo(tmp_path):
    train, val = convert_to_dict(make_yolo(tmp_path)).values()
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
    ("yaml_names", "expected"),
    [
        ("{0: cat, 1: dog}", [(1, "cat"), (2, "dog")]),
        ("\n  0: cat\n  1: dog\n  3: no", [(1, "cat"), (2, "dog"), (4, "no")]),
        ("\n- 'a, b'\n- 3 # three\n", [(1, "a, b"), (2, "3")]),
    ],
)
def test_yolo_class_names(tmp_path, yaml_names, expected):
    train = convert_to_dict(make_yolo(tmp_path, CONFIG.split("names")[0] + f"names: {yaml_names}\n"))["train"]
    assert [(entry["id"], entry["name"]) for entry in train["categories"]] == expected


@pytest.mark.parametrize("path", [".", "images", "/gone/coco8", "../datasets/coco8"])
def test_yolo_path_may_be_of_another_machine(tmp_path, path):
    entry = "train" if path == "images" else "images/train"
    config = f"path: {path}\ntrain: {entry}\nval: null\nnames: [cat, dog]\n"
    contents = convert_to_dict(make_yolo(tmp_path, config))
    assert list(contents) == ["train"]
    assert names(contents["train"]) == ["a.png", "b.png"]


def test_yolo_export_of_roboflow(tmp_path):
    write_text(tmp_path / "data.yml", "train: ../train/images\nval: ../valid/images\ntest:\nnc: 1\nnames: ['cat']\n")
    for name in ("train", "valid"):
        write_image(tmp_path / name / "images/a_jpg.rf.12.jpg")
        write_text(tmp_path / name / "labels/a_jpg.rf.12.txt", "0 0.5 0.5 0.5 0.2")
    contents = convert_to_dict(tmp_path)
    assert list(contents) == ["train", "val"]
    assert boxes(contents["val"]) == [[1, 5, 4, 10, 2]]


def test_yolo_folders_are_read_at_any_depth(tmp_path):
    make_yolo(tmp_path, "train: [images/train, images/val]\nval: images\nnames: [cat, dog]\n")
    write_image(tmp_path / "images/deep/er/a.JPG", format="JPEG")
    contents = convert_to_dict(tmp_path)
    assert names(contents["train"]) == ["train/a.png", "train/b.png", "val/c.png"]
    assert names(contents["val"]) == ["deep/er/a.JPG", "train/a.png", "train/b.png", "val/c.png"]
    assert boxes(contents["val"]) == [[2, 5, 4, 10, 2], [1, 4, 4, 2, 2]]


def test_yolo_lists_of_images(tmp_path):
    make_yolo(tmp_path, "train: lists/train.txt\nnames: [cat, dog]\n")
    lines = ["./images/val/c.png\r", "", f"{tmp_path}/images/train/a.png", "images/val/c.png", "../images/train/b.png"]
    write_text(tmp_path / "lists/train.txt", "\n".join(lines))
    assert names(convert_to_dict(tmp_path)["train"]) == ["val/c.png", "train/a.png", "train/b.png"]
    write_text(tmp_path / "lists/train.txt", "\nimages/gone.png\n")
    with pytest.raises(UserError, match=r"lists/train.txt:2: .*images/gone.png"):
        convert(tmp_path, tmp_path / "out2")


def test_yolo_labels_beside_the_images(tmp_path):
    write_text(tmp_path / "data.yaml", "train: train\nnames: [cat]\n")
    write_image(tmp_path / "train/a.png")
    write_text(tmp_path / "train/a.txt", "0 0.5 0.5 0.5 0.2")
    assert boxes(convert_to_dict(tmp_path)["train"]) == [[1, 5, 4, 10, 2]]


def test_yolo_polygons_become_boxes_and_boxes_are_not_clipped(tmp_path):
    lines = "0 0.1 0.2 0.5 0.1 0.3 0.9\n\n1.0 0.5 0.5 0.5 0.2\r\n0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n0 1.5 0.5 2 -0.5\n"
    converted = boxes(convert_to_dict(make_yolo(tmp_path, line=b"\xef\xbb\xbf" + lines.encode()))["train"])
    expected = [[1, 2, 1, 8, 8], [2, 5, 4, 10, 2], [1, 2, 1, 8, 4], [1, 10, 7.5, 40, -5]]
    np.testing.assert_allclose(converted, expected, rtol=1e-12)


def test_yolo_sizes_have_the_exif_orientation_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(make_yolo(tmp_path) / "images/train/b.jpg", exif=exif)
    train = convert_to_dict(tmp_path)["train"]
    assert [(image["width"], image["height"]) for image in train["images"]] == [(20, 10), (10, 20), (20, 10)]


@pytest.mark.parametrize(
    "line",
    [
        "2 0.5 0.5 0.5 0.2",
        "-1 0.5 0.5 0.5 0.2",
        "0.5 0.5 0.5 0.5 0.2",
        "cat 0.5 0.5 0.5 0.2",
        "0 nan 0.5 0.5 0.2",
        "0 0.5 0.5 0.5 1e999",
        "0 0.5 0.5 0.5",
        "0 0.5 0.5 0.5 0.2 0.9",
        "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1",
        "0,0.1,0.1,0.5,0.1",
        b"0 0.5 0.5 0.5 0.2\xff",
    ],
)
def test_yolo_label_errors_name_file_and_line(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    message = conversion_error(make_yolo(tmp_path, line=b"0 0.5 0.5 0.5 0.2\n\n" + line + b"\n"))
    assert message.startswith(f"{tmp_path}/labels/train/a.txt:3: ")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("names: [", "is not YAML"),
        ("names: " + "[" * 5000, "is not YAML"),
        (b"names: [\xe4]", "data.yaml:1: is not UTF-8"),
        ("- names", "names must be"),
        ("train: images/train\n", "names must be"),
        ("names: []\ntrain: images/train\n", "names must be"),
        ("names: {a: b}\ntrain: images/train\n", "whole numbers"),
        ("names: [cat]\n", "none of train, val and test"),
        ("names: [cat, dog]\ntrain: gone\n", "train: gone"),
        ("names: [cat, dog]\ntrain: labels\n", "train: no images in labels"),
        (CONFIG + "names: [dog, cat]\n", "'names' appears twice, in lines 3 and 4"),
        (CONFIG + "kpt_shape: [17, 3]\n", "kpt_shape"),
    ],
)
def test_yolo_config_errors_name_the_file(tmp_path, config, expected):
    message = conversion_error(make_yolo(tmp_path, config))
    assert message.startswith(f"{tmp_path}/data.yaml")
    assert expected in message


def test_yolo_missing_labels_and_broken_images_are_errors(tmp_path):
    (make_yolo(tmp_path) / "labels/val/c.txt").unlink()
    assert f"{tmp_path}/labels/val/c.txt" in conversion_error(tmp_path)
    write_text(tmp_path / "images/train/a.png", "no image")
    assert conversion_error(tmp_path).startswith(f"{tmp_path}/images/train/a.png: ")


def test_yolo_omitted_files_are_noted(tmp_path):
    make_yolo(tmp_path)
    for name in ("train/z.txt", "train/classes.txt", "train/train.txt", "val/heic.txt"):
        write_text(tmp_path / "labels" / name, "")
    expected = ["images/train/b.png", "labels/train/z.txt", "labels/val/heic.txt"]
    assert [(note[0], note.split()[-1]) for note in notes(tmp_path)] == [("1", name) for name in expected]


# -- Pascal VOC ------------------------------------------------------------------------------------


def test_voc(tmp_path):
    train, val = convert_to_dict(make_voc(tmp_path)).values()
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert names(train) == ["a.png", "b.png"]
    assert train["images"][0] == {"id": 1, "file_name": "a.png", "width": 20, "height": 10}
    assert boxes(train) == [[2, 0, 0, 10, 5]]
    assert boxes(val) == [[1, 2, 1, 2, 3]]


def test_voc_lists_of_splits(tmp_path):
    write_text(make_voc(tmp_path) / "ImageSets/Main/trainval.txt", "a\nb\nc\n")
    assert [(name, len(content["images"])) for name, content in convert_to_dict(tmp_path).items()] == [
        ("train", 2),
        ("val", 1),
        ("trainval", 3),
    ]
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    assert sorted(convert_to_dict(tmp_path)) == ["train", "val"]
    shutil.rmtree(tmp_path / "ImageSets")
    write_image(tmp_path / "JPEGImages/sub/d.png")
    write_text(tmp_path / "Annotations/sub/d.xml", xml(obj(), name="d.png"))
    assert names(convert_to_dict(tmp_path)["train"]) == ["a.png", "b.png", "c.png", "sub/d.png"]


def test_voc_export_of_roboflow(tmp_path):
    for folder in ("train", "valid", "test"):
        write_image(tmp_path / folder / "a.png")
        write_text(tmp_path / folder / "a.xml", xml(obj(folder)))
        write_image(tmp_path / folder / "not annotated.png")
    contents = convert_to_dict(tmp_path)
    assert list(contents) == ["train", "val", "test"]
    assert [boxes(content)[0][0] for content in contents.values()] == [2, 3, 1]
    assert names(contents["val"]) == ["a.png"]
    assert boxes(convert_to_dict(tmp_path / "test")["train"]) == [[1, 0, 0, 10, 5]]  # without subfolders


def test_voc_parts_difficult_objects_fractions_and_encodings(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    objects = [
        obj(" a & b ", (1.5, 1.25, 10.75, 5.125), part + "<difficult>1</difficult>"),
        obj("Zürich", (" 0\n", "1.0", "1e1", 5)),
    ]
    content = '<?xml version="1.0" encoding="iso-8859-1"?>' + xml(*objects)
    train = convert_to_dict(make_voc(tmp_path, content.encode("latin-1")))["train"]
    assert names(train, "categories") == ["Zürich", "a & b", "cat"]
    assert boxes(train) == [[2, 0.5, 0.25, 10.25, 4.875], [1, -1, 0, 11, 5]]
    assert [entry["iscrowd"] for entry in train["annotations"]] == [0, 0]


@pytest.mark.parametrize(
    "size", ["", "<size><width>0</width><height>0</height></size>", "<size><width>x</width></size>"]
)
def test_voc_missing_size_is_read_from_the_image(tmp_path, size):
    image = convert_to_dict(make_voc(tmp_path, xml(obj(), size=size)))["train"]["images"][0]
    assert (image["width"], image["height"]) == (20, 10)


@pytest.mark.parametrize(
    ("image", "filename"),
    [
        *(("a.png", name) for name in ("", "a", "old.jpg", "/home/me/a.png", r"C:\me\a.png")),
        *(("renamed.png", name) for name in ("renamed", "renamed.png", "folder/renamed.png")),
    ],
)
def test_voc_image_is_found_by_the_name_of_the_xml_file_or_by_filename(tmp_path, image, filename):
    (make_voc(tmp_path, xml(obj(), name=filename)) / "JPEGImages/a.png").rename(tmp_path / "JPEGImages" / image)
    assert names(convert_to_dict(tmp_path)["train"]) == [image, "b.png"]


ENTITIES = '<!ENTITY a0 "aaaaaaaaaa">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (xml(obj(), obj(box=("x", 1, 2, 3))), "object 2 needs"),
        (xml(obj(box=("nan", 1, 2, 3))), "object 1 needs"),
        (xml(obj(box=(1, 1, "inf", 3))), "object 1 needs"),
        (xml(obj(name=" ")), "object 1 needs"),
        (xml("<object><name>cat</name></object>"), "object 1 needs"),
        (xml(obj())[: -len("</annotation>")], "is not XML (no element found: line 5"),
        ("", "is not XML"),
        (xml(obj()).encode().replace(b"cat", b"\xff"), "line 4"),
        ('<?xml version="1.0" encoding="gibberish"?>' + xml(obj()), "is not XML"),
        ('<?xml version="1.0" encoding="gbk"?>' + xml(obj()), "is not XML"),
        (f"<!DOCTYPE a [{ENTITIES}]>" + xml(obj()).replace("cat", "&a11;"), "is not XML"),
        ('<!DOCTYPE a [<!ENTITY f SYSTEM "/etc/passwd">]>' + xml(obj()).replace("cat", "&f;"), "is not XML"),
        ("<annotations/>", "<annotations>"),
    ],
)
def test_voc_xml_errors_name_the_file(tmp_path, annotation, expected):
    message = conversion_error(make_voc(tmp_path, annotation))
    assert message.startswith(f"{tmp_path}/Annotations/a.xml: ")
    assert expected in message


def test_voc_ambiguous_images_are_errors(tmp_path):
    make_voc(tmp_path / "two", xml(obj(), name="b.png"))
    (tmp_path / "two/JPEGImages/a.png").unlink()
    message = conversion_error(tmp_path / "two")
    assert all(f"{tmp_path}/two/Annotations/{name}.xml" in message for name in "ab")
    write_image(make_voc(tmp_path / "same") / "JPEGImages/a.jpg")
    assert names(convert_to_dict(tmp_path / "same")["train"]) == ["a.png", "b.png"]
    write_text(tmp_path / "same/Annotations/a.xml", xml(obj(), name="gone.png"))
    with pytest.raises(UserError, match=r"a.xml: more than one image a or gone.png"):
        convert(tmp_path / "same", tmp_path / "out")


@pytest.mark.parametrize("line", ["gone", "../../s", "/nowhere/elsewhere"])
def test_voc_lists_may_only_name_files_in_annotations(tmp_path, line):
    write_text(make_voc(tmp_path / "data").parent / "s.xml", xml(obj(), name="s.png"))
    write_text(tmp_path / "data/ImageSets/Main/val.txt", f"c\n\n{line}\n")
    assert conversion_error(tmp_path / "data").startswith(f"{tmp_path}/data/ImageSets/Main/val.txt:3: ")


def test_voc_omitted_files_are_noted(tmp_path):
    write_text(make_voc(tmp_path / "lists") / "ImageSets/Main/train.txt", "a\n")
    write_text(tmp_path / "lists/Annotations/sub/d.xml", xml(name="d.png"))
    assert [(note[0], note.split()[-1]) for note in notes(tmp_path / "lists")] == [
        ("2", "Annotations/b.xml"),
        ("1", "JPEGImages/b.png"),
    ]
    for folder in ("train", "val", "valid", "."):
        write_image(tmp_path / "flat" / folder / "a.png")
        write_text(tmp_path / "flat" / folder / "a.xml", xml(obj()))
    assert [note.split()[-1] for note in notes(tmp_path / "flat")] == ["valid/a.xml", "a.xml"]


# -- both formats ----------------------------------------------------------------------------------


def test_a_folder_without_a_dataset_is_an_error(tmp_path):
    assert conversion_error(tmp_path / "gone").startswith(f"{tmp_path}/gone: ")
    assert "neither YOLO (data.yaml) nor Pascal VOC" in conversion_error(tmp_path)
    write_text(tmp_path / "a.xml", xml())
    write_image(tmp_path / "a.png")
    assert conversion_error(tmp_path) == f"{tmp_path}: its XML files have no objects"
    (make_voc(tmp_path / "voc") / "JPEGImages").rename(tmp_path / "voc/images")
    assert conversion_error(tmp_path / "voc").startswith(f"{tmp_path}/voc/JPEGImages: ")


@pytest.mark.parametrize("content", ['{"info": {"description": "COCO 2017 Dataset"}}', "[]", "{", '{"info": null}'])
def test_other_annotation_files_are_never_overwritten(tmp_path, content):
    contents = convert_to_dict(make_yolo(tmp_path))
    assert contents["val"]["info"]["description"] == MARKER
    assert convert_to_dict(tmp_path) == contents  # an earlier conversion is replaced
    file = write_text(tmp_path / "out/annotations/instances_val2017.json", content)
    train = tmp_path / "out/annotations/instances_train2017.json"
    before = train.stat().st_mtime_ns
    with pytest.raises(UserError, match=r"instances_val2017.json: exists"):
        convert(tmp_path, tmp_path / "out")
    assert file.read_text() == content
    assert train.stat().st_mtime_ns == before


def test_an_earlier_conversion_is_removed(tmp_path):
    convert(make_yolo(tmp_path / "a"), tmp_path / "out")
    make_yolo(tmp_path / "b", "train: images/train\nnames: [cat, dog]\n")
    write_text(tmp_path / "out/annotations/instances_mine2017.json", "{}")
    convert(tmp_path / "b", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out/annotations").iterdir())
    assert files == ["instances_mine2017.json", "instances_train2017.json"]
    assert [path.name for path in (tmp_path / "out/images").iterdir()] == ["train2017"]


def test_an_unwritable_output_is_an_error(tmp_path):
    write_text(make_yolo(tmp_path) / "file")
    with pytest.raises(UserError, match=r"file/annotations: cannot be written to"):
        convert(tmp_path, tmp_path / "file")


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_converted_boxes_equal_the_original(tmp_path, kind):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, [[640, 480]], (200, 2, 2)), axis=1).reshape(-1, 4)
    expected = np.column_stack([rng.integers(1, 4, 200), corners[:, :2], corners[:, 2:] - corners[:, :2]])
    if kind == "yolo":
        write_text(tmp_path / "data.yaml", "train: images\nnames: [class 1, class 2, class 3]\n")
        write_image(tmp_path / "images/a.png", (640, 480))
        lines = [
            f"{k - 1:.0f} {(x + w / 2) / 640:.6f} {(y + h / 2) / 480:.6f} {w / 640:.6f} {h / 480:.6f}\n"
            for k, x, y, w, h in expected
        ]
        write_text(tmp_path / "labels/a.txt", "".join(lines))
    else:
        write_image(tmp_path / "a.png", (640, 480))
        objects = [obj(f"class {k:.0f}", (x + 1, y + 1, x + w, y + h)) for k, x, y, w, h in expected]
        write_text(tmp_path / "a.xml", xml(*objects, size=""))
    content = convert_to_dict(tmp_path)["train"]
    assert names(content, "categories") == ["class 1", "class 2", "class 3"]
    np.testing.assert_allclose(boxes(content), expected, rtol=0, atol=1e-3 if kind == "yolo" else 1e-10)


def read_with_hotcoco(root: Path) -> dict:
    if (root / "JPEGImages").is_dir():
        return hotcoco.COCO.from_voc(str(root)).dataset
    shutil.copy(root / "data.yaml", root / "labels/train/data.yaml")
    return hotcoco.COCO.from_yolo(f"{root}/labels/train", images_dir=f"{root}/images/train").dataset


def test_hotcoco_reads_the_same_boxes(tmp_path):
    make_yolo(tmp_path / "yolo", line="1 0.5 0.123456 0.5 0.2\n0 0.1 0.2 0.3 0.4\n")
    make_voc(tmp_path / "voc", xml(obj(box=(1.5, 2, 7, 3.25)), obj("dog")))
    for kind in ("yolo", "voc"):
        expected = boxes(read_with_hotcoco(tmp_path / kind))
        actual = [box for content in convert_to_dict(tmp_path / kind).values() for box in boxes(content)]
        np.testing.assert_allclose(actual[: len(expected)], expected, rtol=1e-12)
        assert len(expected) >= 2


def test_hotcoco_loses_data(tmp_path):
    """The reason for readers of our own; when this test fails, hotcoco may replace them."""
    assert names(read_with_hotcoco(make_yolo(tmp_path / "yolo"))) == ["a"]  # neither b nor the suffix
    assert np.isnan(boxes(read_with_hotcoco(make_yolo(tmp_path / "nan", line="0 nan 0.5 0.5 0.2")))).any()
    for config, line in ((CONFIG, "0 0.1 0.2 0.5 0.1 0.3 0.9"), ("names: {0: cat, 1: dog}", "0 0.5 0.5 0.5 0.2")):
        with pytest.raises(ValueError, match="expected"):
            read_with_hotcoco(make_yolo(tmp_path / "refused", config, line))
    voc = read_with_hotcoco(
        make_voc(tmp_path / "voc", xml(obj("a & b", extra="<difficult>1</difficult>"))[: -len("</annotation>")])
    )
    assert names(voc, "categories") == ["b", "cat"]
    assert voc["annotations"][0]["iscrowd"] == 1


# -- links and files outside the source ------------------------------------------------------------


def test_links_to_the_images_are_created_only_among_links(tmp_path):
    root = make_yolo(tmp_path / "a")
    for split in convert(root, tmp_path / "out"):
        assert split.linked
        assert (tmp_path / "out/images" / f"{split.name}2017").resolve() == split.images
    write_image(tmp_path / "d/images/real.png")
    assert not any(split.linked for split in convert(root, tmp_path / "d"))
    assert [path.name for path in (tmp_path / "d/images").iterdir()] == ["real.png"]
    write_text(tmp_path / "out/images/.DS_Store")
    assert all(split.linked for split in convert(make_voc(tmp_path / "b"), tmp_path / "out"))
    assert (tmp_path / "out/images/train2017").resolve() == tmp_path / "b/JPEGImages"
    write_text(tmp_path / "c/a.xml", xml(obj()))
    write_image(tmp_path / "c/a.png")
    assert not any(split.linked for split in convert(tmp_path / "c", tmp_path / "c/out"))


def test_links_of_the_user_are_kept(tmp_path):
    link = tmp_path / "out/images/train2017"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path)
    for _ in range(2):
        train, val = convert(make_yolo(tmp_path / "data"), tmp_path / "out")
        assert (train.linked, val.linked) == (False, True)
        assert link.readlink() == tmp_path


def test_cyclic_links_and_hidden_files_are_ignored(tmp_path):
    root = make_yolo(tmp_path / "yolo")
    (root / "images/train/loop").symlink_to(root / "images/train")
    (root / "images/train/more").symlink_to(root / "images/val")
    write_text(root / "images/train/._a.png", "resource fork of macOS")
    assert names(convert_to_dict(root)["train"]) == ["a.png", "b.png", "more/c.png"]
    root = make_voc(tmp_path / "voc")
    shutil.rmtree(root / "ImageSets")
    for name in ("JPEGImages/._a.png", "Annotations/._a.xml"):
        write_text(root / name, "resource fork of macOS")
    assert names(convert_to_dict(root)["train"]) == ["a.png", "b.png", "c.png"]


def test_file_names_that_are_not_utf8_are_refused(tmp_path):
    root = make_yolo(tmp_path)
    write_image(Path(os.fsdecode(os.fsencode(root / "images/train") + b"/caf\xe9.png")))
    assert "not UTF-8" in conversion_error(root).encode().decode()


def link_folder(root: Path) -> None:
    for name in ("images", "labels"):
        (root / name / "val/more").symlink_to(root.parent / "elsewhere" / name)


def link_config(root: Path) -> None:
    (root / "data.yaml").rename(root.parent / "elsewhere/data.yaml")
    (root / "data.yaml").symlink_to(root.parent / "elsewhere/data.yaml")


def list_image(root: Path) -> None:
    write_text(root / "list.txt", f"{root}/images/train/a.png\n{root.parent}/elsewhere/images/x.png\n")
    write_text(root / "data.yaml", CONFIG.replace("images/val", "list.txt"))


def name_folder(root: Path) -> None:
    write_text(root / "data.yaml", CONFIG.replace("images/val", "../elsewhere/images"))


@pytest.mark.parametrize("reference", [link_folder, link_config, list_image, name_folder])
def test_yolo_files_outside_the_source_need_follow_links(tmp_path, reference):
    write_image(tmp_path / "elsewhere/images/x.png")
    write_text(tmp_path / "elsewhere/labels/x.txt", "1 0.5 0.5 0.5 0.2\n")
    reference(make_yolo(tmp_path / "data"))
    message = conversion_error(tmp_path / "data")
    assert f"lies outside {tmp_path}/data" in message
    assert "--follow_links" in message
    val = convert(tmp_path / "data", tmp_path / "out", follow_links=True)[1]
    expected = "c.png" if reference == link_config else "x.png"
    assert any(name.endswith(expected) for name in names(json.loads(val.json.read_text())))


@pytest.mark.parametrize("name", ["ImageSets/Main/train.txt", "Annotations/a.xml", "JPEGImages/a.png", "JPEGImages"])
def test_voc_files_outside_the_source_need_follow_links(tmp_path, name):
    root = make_voc(tmp_path / "data", xml(obj("dog"), size=""))
    elsewhere = tmp_path / "elsewhere"
    (root / name).rename(elsewhere)
    (root / name).symlink_to(elsewhere)
    opened, read_bytes = [], Path.read_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
        patch.setattr(Image, "open", lambda path, **_: pytest.fail(f"{path} was opened"))
        assert conversion_error(root).startswith(f"{root}/{name}: lies outside {root}")
    assert root / name not in opened
    assert [split.name for split in convert(root, tmp_path / "out", follow_links=True)] == ["train", "val"]


def test_files_outside_the_source_are_not_quoted(tmp_path):
    secret = write_text(tmp_path / "elsewhere/secret.txt", "password\n")
    label = make_yolo(tmp_path / "data") / "labels/train/b.txt"
    label.symlink_to(secret)
    assert conversion_error(tmp_path / "data").startswith(f"{label}: lies outside")
    label.unlink()
    (tmp_path / "data/link").symlink_to(write_text(tmp_path / "elsewhere/images/x").parent)
    write_text(tmp_path / "data/data.yaml", CONFIG.replace("images/val", "link/../secret.txt"))
    assert "password" not in conversion_error(tmp_path / "data")


def test_images_without_a_common_folder_are_refused(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        write_text(make_yolo(tmp_path) / "list.txt", f"{write_image(Path(elsewhere) / 'x.png')}\nimages/train/a.png\n")
        write_text(tmp_path / "data.yaml", CONFIG.replace("images/train", "list.txt"))
        with pytest.raises(UserError, match=r"train: its images are in .*no common folder"):
            convert(tmp_path, tmp_path / "out", follow_links=True)
    assert not (tmp_path / "out").exists()
