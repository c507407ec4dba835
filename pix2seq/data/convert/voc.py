"""Reads Pascal VOC datasets: an XML file for each image."""

import math
import os
from itertools import chain
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

from pix2seq.data.convert.source_folder import Classes, SourceFolder, SourceImage, absolute, is_image_name
from pix2seq.errors import UserError
from pix2seq.progress import progress


def read_voc(source: SourceFolder) -> tuple[dict[str, list[SourceImage]], Classes]:
    """Reads the splits train, val, trainval and test of a Pascal VOC dataset.

    Annotations/, JPEGImages/ and ImageSets/Main/ are read, or else XML files beside the images in train/, valid/ and
    test/, or in the folder itself. A trainval list without a train list becomes train. Category ids follow the sorted
    class names. The corners of a box are pixels counted from 1 and inclusive: x = xmin - 1, width = xmax - xmin + 1.
    Difficult objects are ordinary objects. Images without an XML file are omitted.

    Args:
        source: Folder of the dataset.

    Returns:
        The images of each split, and the classes.

    Raises:
        UserError: A file cannot be read; the message names it, with the line.
    """
    splits = _find_splits(source)
    if not any(splits.values()):
        raise UserError(
            f"{source.path}: is neither YOLO (data.yaml) nor Pascal VOC (Annotations/*.xml and JPEGImages/, or XML "
            "files beside the images, there or in train/, valid/, test/)"
        )
    listings: dict[Path, dict[str, list[str]]] = {}
    images: dict[Path, SourceImage] = {}
    xml_of_image: dict[Path, Path] = {}
    for xml, folder in progress(dict.fromkeys(chain(*splits.values())), "reading"):
        if folder not in listings:
            listings[folder] = _list_by_stem(source.allow(folder))
        images[xml] = _read_image(source, xml, folder, listings[folder])
        first = xml_of_image.setdefault(images[xml].path, xml)
        if first != xml:
            raise UserError(f"{xml}: describes {images[xml].path}, which {first} describes too; remove one of them")
    names = sorted({str(name) for image in images.values() for name, _ in image.objects})
    if not names:
        raise UserError(f"{source.path}: its XML files have no objects")
    existing = {folder / name for folder, stems in listings.items() for name in chain(*stems.values())}
    source.note_omitted("images have no XML file in a split", existing - set(xml_of_image))
    return (
        {split: [images[xml] for xml, _ in pairs] for split, pairs in splits.items()},
        {name: (category_id, name) for category_id, name in enumerate(names, start=1)},
    )


def _find_splits(source: SourceFolder) -> dict[str, list[tuple[Path, Path]]]:
    """Returns the (XML file, folder of its image) of each split."""
    annotations, images = source.path / "Annotations", source.path / "JPEGImages"
    if not annotations.is_dir():
        return _find_flat_splits(source)
    if not images.is_dir():
        raise UserError(f"{images}: no such folder, but {annotations} exists")
    splits = {}
    for name in ("train", "val", "trainval", "test"):
        file = source.path / "ImageSets" / "Main" / f"{name}.txt"
        lines = source.read_lines(file) if file.is_file() else ()
        files = {absolute(annotations / f"{line}.xml"): number for number, line in lines}
        for xml, number in files.items():
            if not xml.is_file() or annotations not in xml.parents:
                raise UserError(f"{file}:{number}: no such file: {xml}")
        if files:
            splits[name] = list(files)
    all_files = sorted(annotations.rglob("[!.]*.xml"))
    if not splits:
        splits["train"] = all_files
    elif "train" not in splits and "trainval" in splits:
        splits["train"] = splits.pop("trainval")
    source.note_omitted("XML files are in no list", set(all_files) - set(chain(*splits.values())))
    return {
        name: [(xml, images / xml.parent.relative_to(annotations)) for xml in files] for name, files in splits.items()
    }


def _find_flat_splits(source: SourceFolder) -> dict[str, list[tuple[Path, Path]]]:
    """As `_find_splits`, for XML files beside the images, as Roboflow and LabelImg write them."""
    splits: dict[str, list[tuple[Path, Path]]] = {}
    for name, folder in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test"), ("train", ".")):
        files = sorted((source.path / folder).glob("[!.]*.xml"))
        if files and (name in splits or (folder == "." and splits)):
            source.note_omitted(f"XML files are in no split, as there are also files in {', '.join(splits)}", files)
        elif files:
            splits[name] = [(xml, xml.parent) for xml in files]
    return splits


def _list_by_stem(folder: Path) -> dict[str, list[str]]:
    """Returns the names of the images in a folder by their stem."""
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if is_image_name(name):
            names.setdefault(os.path.splitext(name)[0], []).append(name)
    return names


def _read_image(source: SourceFolder, xml: Path, folder: Path, names: dict[str, list[str]]) -> SourceImage:
    content = source.read_bytes(xml)
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: an unknown encoding
        raise UserError(f"{xml}: is not XML ({error})") from None
    if root.tag != "annotation":
        raise UserError(f"{xml}: is not Pascal VOC: the root is <{root.tag}>, not <annotation>")
    # <filename> is used second: it is often outdated, of another machine, or without suffix.
    filename = PureWindowsPath(root.findtext("filename", "").strip()).name
    candidates = names.get(xml.stem, [])
    if len(candidates) != 1:
        candidates = [filename] if filename and (folder / filename).is_file() else names.get(filename, candidates)
    if len(candidates) != 1:
        quantity = "more than one" if candidates else "no"
        raise UserError(f"{xml}: {quantity} image {xml.stem} or {filename} in {folder}")
    path = source.allow(folder / candidates[0])
    # The annotation tool may or may not have applied the EXIF orientation; the XML has the size that it used.
    size = tuple(_to_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    if not all(value >= 1 and value.is_integer() for value in size):
        size = source.image_size(path)
    objects = []
    for number, entry in enumerate(root.findall("object"), start=1):
        name = entry.findtext("name", "").strip()
        x1, y1, x2, y2 = (
            _to_number(entry.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")
        )
        box = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
        if not (name and all(map(math.isfinite, box))):
            raise UserError(f"{xml}: object {number} needs a <name> and a <bndbox> of four finite numbers")
        objects.append((name, box))
    return SourceImage(path, (int(size[0]), int(size[1])), objects)


def _to_number(text: str | None) -> float:
    """Returns the number in a text, NaN if there is none."""
    try:
        return float(text or math.nan)
    except ValueError:
        return math.nan
