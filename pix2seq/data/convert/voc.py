"""Pascal VOC: an XML file for each image.

hotcoco 1.3 reads it too, but cuts class names at an &amp;, takes XML that ends halfway for whole, makes crowds of
difficult objects, and tells no line of a fault.
"""

import math
import os
from itertools import chain
from pathlib import Path, PureWindowsPath
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from pix2seq.data.convert.files import (
    Classes,
    Source,
    SourceImage,
    absolute,
    is_image_name,
    read_bytes,
)
from pix2seq.errors import UserError
from pix2seq.progress import progress


def read_voc(dataset: Source) -> tuple[dict[str, list[SourceImage]], Classes]:
    source, splits = dataset.folder, _voc_splits(dataset)
    if not any(splits.values()):
        raise UserError(
            f"{source}: is neither YOLO (data.yaml) nor Pascal VOC (Annotations/*.xml and JPEGImages/, or XML files "
            "beside the pictures, there or in train/, valid/, test/)"
        )
    classes = source / "labels.txt"
    known = list(dict.fromkeys(line for _, line in dataset.lines(classes))) if classes.is_file() else None
    listings: dict[Path, dict[str, list[str]]] = {}
    pictures: dict[Path, SourceImage] = {}
    owners: dict[Path, Path] = {}
    for xml, folder in progress(dict.fromkeys(chain(*splits.values())), "reading"):
        if folder not in listings:
            listings[folder] = _names_by_stem(dataset.own(folder))
        picture = pictures[xml] = _voc_picture(dataset, xml, folder, listings[folder])
        if owners.setdefault(picture.path, xml) != xml:
            raise UserError(f"{xml}: is about {picture.path}, and so is {owners[picture.path]}")
    used = {name for picture in pictures.values() for name, _ in picture.objects}
    if known is not None and (unknown := used - set(known)):
        first = next(xml for xml, picture in pictures.items() if unknown & {name for name, _ in picture.objects})
        raise UserError(f"{first}: the class {min(unknown)} is not in {classes}")
    if not used:
        raise UserError(f"{source}: there is no object in any of its XML files")
    names = known or sorted(used)
    there = {folder / name for folder, stems in listings.items() for found in stems.values() for name in found}
    dataset.left_out("pictures have no XML file in a split", there - set(owners))
    return (
        {name: [pictures[xml] for xml, _ in pairs] for name, pairs in splits.items()},
        {name: (index, name) for index, name in enumerate(names, start=1)},
    )


def _voc_splits(dataset: Source) -> dict[str, list[tuple[Path, Path]]]:
    """Of each split the XML files, each with the folder its picture is in."""
    source = dataset.folder
    annotations, pictures, lists = source / "Annotations", source / "JPEGImages", source / "ImageSets" / "Main"
    if not annotations.is_dir():
        splits = {}
        for name, folder in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test"), ("train", ".")):
            files = sorted((source / folder).glob("[!.]*.xml"))
            if files and (name in splits or (folder == "." and splits)):
                dataset.left_out(f"XML files are in no split: there are files in {' and '.join(splits)}, too", files)
            elif files:
                splits[name] = [(xml, xml.parent) for xml in files]
        return splits
    if not pictures.is_dir():
        raise UserError(f"{pictures}: no such folder, though there is {annotations}")
    splits = {}
    for name in ("train", "val", "trainval", "test"):
        if (lists / f"{name}.txt").is_file():
            files = {
                absolute(annotations / f"{line}.xml"): number for number, line in dataset.lines(lists / f"{name}.txt")
            }
            for xml, number in files.items():
                if not xml.is_file() or annotations not in xml.parents:
                    raise UserError(f"{lists / name}.txt:{number}: there is no {xml}")
            if files:
                splits[name] = list(files)
    if not splits:
        splits["train"] = sorted(annotations.rglob("[!.]*.xml"))
    elif "train" not in splits and "trainval" in splits:
        splits["train"] = splits.pop("trainval")
    dataset.left_out("XML files are in no list", set(annotations.rglob("[!.]*.xml")) - set(chain(*splits.values())))
    return {
        name: [(xml, pictures / xml.parent.relative_to(annotations)) for xml in files]
        for name, files in splits.items()
    }


def _names_by_stem(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if is_image_name(name):
            names.setdefault(os.path.splitext(name)[0], []).append(name)
    return names


def _voc_picture(dataset: Source, xml: Path, folder: Path, names: dict[str, list[str]]) -> SourceImage:
    root = _read_xml(dataset.own(xml))
    if root.tag != "annotation":
        raise UserError(f"{xml}: is not Pascal VOC: it holds <{root.tag}> and not <annotation>")
    # <filename> outlives the renaming of a picture, and comes with foreign folders or without its ending.
    said = PureWindowsPath(root.findtext("filename", "").strip()).name
    candidates = names.get(xml.stem, [])
    if len(candidates) != 1:
        candidates = [said] if (folder / said).is_file() and said else names.get(said, candidates)
    if len(candidates) != 1:
        raise UserError(
            f"{xml}: {'no' if not candidates else 'more than one'} picture {xml.stem} or {said} in {folder}"
        )
    path = dataset.own(folder / candidates[0])
    # The size that the boxes were drawn on, which for a picture that EXIF turns may be either.
    size = tuple(_number(root.find(f"size/{side}")) for side in ("width", "height"))
    if not all(value >= 1 and value.is_integer() for value in size):
        size = dataset.size(path)
    objects = []
    for entry in root.findall("object"):
        name = entry.findtext("name", "").strip()
        x1, y1, x2, y2 = (_number(entry.find(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
        box = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
        if not (name and all(map(math.isfinite, box))):
            raise UserError(
                f"{xml}:{entry.get('line')}: an object needs a <name> and a <bndbox> of four finite numbers"
            )
        objects.append((name, box))
    return SourceImage(path, (int(size[0]), int(size[1])), objects)


def _number(element: Element | None) -> float:
    """NaN for what is no number."""
    try:
        return float(element.text)
    except (AttributeError, TypeError, ValueError):
        return math.nan


def _read_xml(path: Path) -> Element:
    """The root. Every element has its line as attribute `line`."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def refuse(*_) -> None:  # it is where entities come from, which can unfold to gigabytes
        raise UserError(f"{path}:{parser.CurrentLineNumber}: a DOCTYPE is not allowed")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda tag, _: builder.start(tag, {"line": str(parser.CurrentLineNumber)})
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(read_bytes(path), True)
    except UserError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two: an encoding that expat does not know
        raise UserError(f"{path}:{parser.CurrentLineNumber}: is not XML ({error})") from None
    return builder.close()
