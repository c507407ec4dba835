"""Packs training images into WebDataset shards: few large files instead of many small ones.

Any WebDataset reader can read the shards. This project reads them by an index, in any order, so training on shards
takes the same steps as training on the files.
"""

import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

from pix2seq.data.coco import Annotations, read_json
from pix2seq.data.image_files import BadImageError
from pix2seq.data.image_stores import SHARDS_INDEX
from pix2seq.data.layouts import SHARDS_JSON
from pix2seq.errors import UserError
from pix2seq.progress import progress

MARKER = "pix2seq"
UNFINISHED = f".{SHARDS_INDEX}"


def write_shards(annotations: Annotations, output: Path, shard_mb: float = 512) -> dict[str, int]:
    """Packs the images of one split into shards NNNNNN.tar.

    A shard holds for each image the unchanged file and its objects as JSON. The annotation file is copied beside the
    shards; the index is written last. Shards of an earlier call, also of an interrupted one, are replaced.

    Args:
        annotations: The split.
        output: Folder to write to.
        shard_mb: Approximate size of a shard in megabytes.

    Returns:
        The numbers of "images" and "shards".

    Raises:
        UserError: An image cannot be read, or the folder has other files.
    """
    content = read_json(annotations.split.json)
    _prepare_folder(output, annotations)
    names = annotations.file_names.tolist()
    files: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    indices = progress(range(len(names)), "packing")
    index = next(indices, None)
    while index is not None:
        files.append(f"{len(files):06d}.tar")
        written = 0
        with tarfile.open(output / files[-1], "w", format=tarfile.PAX_FORMAT) as shard:
            while index is not None and written < shard_mb * 1e6:
                data = _read_image(annotations, index)
                key = f"{index:09d}"
                offset = _add_member(shard, f"{key}{Path(names[index]).suffix.lower() or '.img'}", data)
                sample = json.dumps(_describe(annotations, index), ensure_ascii=False)
                _add_member(shard, f"{key}.json", sample.encode())
                rows.append((len(files) - 1, offset, len(data), zlib.crc32(data)))
                written += len(data)
                index = next(indices, None)
    (output / SHARDS_JSON).write_text(json.dumps(content))
    sizes = [(output / name).stat().st_size for name in files]
    shards_index = {"made_by": MARKER, "files": files, "sizes": sizes, "names": names, "rows": rows}
    (output / UNFINISHED).write_text(json.dumps(shards_index))
    os.replace(output / UNFINISHED, output / SHARDS_INDEX)
    return {"images": len(names), "shards": len(files)}


def _read_image(annotations: Annotations, index: int) -> bytes:
    """Reads the file of an image and checks that it can be decoded."""
    try:
        annotations.image_file(index).pixels()
        return annotations.store.read(annotations.locations[index]).tobytes()
    except BadImageError as error:
        name = annotations.name(index)
        raise UserError(f"{name}: {error}; fix or remove it (`pix2seq check` lists all issues)") from None


def _describe(annotations: Annotations, index: int) -> dict:
    """Returns the JSON content of an image for other readers of the shards; boxes are xywh."""
    rows = slice(annotations.offsets[index], annotations.offsets[index + 1])
    boxes = annotations.boxes[rows].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    objects = [
        {"category_id": annotations.categories.ids[label], "bbox": box, "iscrowd": int(crowd)}
        for label, box, crowd in zip(annotations.labels[rows], boxes.tolist(), annotations.crowd[rows], strict=True)
    ]
    return {
        "image_id": int(annotations.image_ids[index]),
        "file_name": str(annotations.file_names[index]),
        "annotations": objects,
    }


def _prepare_folder(output: Path, annotations: Annotations) -> None:
    """Creates the folder, or removes earlier shards from it. Raises UserError if it has other files."""
    sources = annotations.split.images, annotations.split.json.parent
    if any(output.resolve() in (path.resolve(), *path.resolve().parents) for path in sources):
        raise UserError(f"{output}: contains the images or annotations to pack; name another folder")
    if output.exists() and any(output.iterdir()):
        shards = [path for path in output.iterdir() if re.fullmatch(r"\d{6,}\.tar", path.name)]
        replaceable = {*shards, *(output / name for name in (SHARDS_JSON, SHARDS_INDEX, UNFINISHED))}
        is_ours = _has_marker(output / SHARDS_INDEX) or _has_marker(output / UNFINISHED)
        if not is_ours or set(output.iterdir()) - replaceable:
            raise UserError(f"{output}: is not empty and has files that are not shards; name another folder")
        for path in replaceable:
            path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / UNFINISHED).write_text(json.dumps({"made_by": MARKER}))


def _has_marker(index: Path) -> bool:
    try:
        return json.loads(index.read_bytes())["made_by"] == MARKER
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _add_member(shard: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member and returns the offset of its content."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))
    return shard.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
