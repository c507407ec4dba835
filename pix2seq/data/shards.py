"""Images packed into WebDataset shards: few large files instead of many small ones, for network file systems and for
data that is copied around. Any reader of WebDataset takes them; this project reads them by an index, in any order,
so that training on shards is training on the files."""

import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

from pix2seq.data.coco import Annotations, read_json
from pix2seq.data.image_files import SHARDS_INDEX, BadImageError
from pix2seq.data.layouts import SHARDS_JSON
from pix2seq.errors import UserError
from pix2seq.progress import progress

MARKER = "pix2seq"
UNFINISHED = f".{SHARDS_INDEX}"


def write_shards(annotations: Annotations, output: Path, shard_mb: float = 512) -> dict[str, int]:
    """Packs the images of one split into `output`: NNNNNN.tar of about `shard_mb` megabytes each, which hold for every
    image its file, unchanged, and its objects as JSON; the annotation file, and the index, which is written last.

    Returns the numbers of images and shards. Raises UserError if an image cannot be read or the folder holds something
    else. Shards that were written there before, or half of them, are written anew.
    """
    content = read_json(annotations.split.json)
    _clear(output, annotations)
    names = annotations.file_names.tolist()
    files, rows = [], []
    todo = progress(range(len(names)), "packing")
    index = next(todo, None)
    while index is not None:
        files.append(f"{len(files):06d}.tar")
        written = 0
        with tarfile.open(output / files[-1], "w", format=tarfile.PAX_FORMAT) as shard:
            while index is not None and written < shard_mb * 1e6:
                data = _file(annotations, index)
                key = f"{index:09d}"
                offset = _add(shard, f"{key}{Path(names[index]).suffix.lower() or '.img'}", data)
                _add(shard, f"{key}.json", json.dumps(_about(annotations, index), ensure_ascii=False).encode())
                rows.append((len(files) - 1, offset, len(data), zlib.crc32(data)))
                written += len(data)
                index = next(todo, None)
    (output / SHARDS_JSON).write_text(json.dumps(content))
    sizes = [(output / name).stat().st_size for name in files]
    index = {"made_by": MARKER, "files": files, "sizes": sizes, "names": names, "rows": rows}
    (output / UNFINISHED).write_text(json.dumps(index))
    os.replace(output / UNFINISHED, output / SHARDS_INDEX)
    return {"images": len(names), "shards": len(files)}


def _file(annotations: Annotations, index: int) -> bytes:
    """The bytes of an image that can be decoded."""
    try:
        annotations.image_file(index).pixels()
        return annotations.store.read(annotations.locations[index]).tobytes()
    except BadImageError as bad:
        raise UserError(
            f"{annotations.name(index)}: {bad}; mend or remove it first (`python -m pix2seq check` lists all)"
        ) from None


def _about(annotations: Annotations, index: int) -> dict:
    """An image and its objects, boxes xywh, for other readers of the shards."""
    part = slice(annotations.offsets[index], annotations.offsets[index + 1])
    boxes = annotations.boxes[part].astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    objects = [
        {"category_id": annotations.categories.ids[label], "bbox": box, "iscrowd": int(crowd)}
        for label, box, crowd in zip(annotations.labels[part], boxes.tolist(), annotations.crowd[part], strict=True)
    ]
    about = {"image_id": int(annotations.image_ids[index]), "file_name": str(annotations.file_names[index])}
    return about | {"annotations": objects}


def _clear(output: Path, annotations: Annotations) -> None:
    """Makes the folder, or empties it of shards that were written here before: nobody else's file is removed."""
    sources = annotations.split.images, annotations.split.json.parent
    if any(output.resolve() in (path.resolve(), *path.resolve().parents) for path in sources):
        raise UserError(f"{output}: holds what is to be packed; name another folder")
    if output.exists() and any(output.iterdir()):
        shards = [path for path in output.iterdir() if re.fullmatch(r"\d{6,}\.tar", path.name)]
        ours = {*shards, *(output / name for name in (SHARDS_JSON, SHARDS_INDEX, UNFINISHED))}
        if not (_is_ours(output / SHARDS_INDEX) or _is_ours(output / UNFINISHED)) or set(output.iterdir()) - ours:
            raise UserError(f"{output}: is not empty and holds something else than shards; name another folder")
        for path in ours:
            path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / UNFINISHED).write_text(json.dumps({"made_by": MARKER}))


def _is_ours(index: Path) -> bool:
    try:
        return json.loads(index.read_bytes())["made_by"] == MARKER
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a member; where its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))
    return shard.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
