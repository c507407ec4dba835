"""The commands of docs/your-data.md run as written, on a YOLO dataset."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHORT_RUN = "--max_steps 3 --warmup_steps 1 --batch_size 4 --num_workers 0"


@pytest.fixture
def yolo(shapes_root, tmp_path) -> Path:
    """The shapes dataset in YOLO format."""
    folder = tmp_path / "yolo"
    for split in ("train", "val"):
        content = json.loads((shapes_root / f"annotations/instances_{split}2017.json").read_text())
        label_of = {category["id"]: label for label, category in enumerate(content["categories"])}
        (folder / "labels" / split).mkdir(parents=True)
        (folder / "images" / split).mkdir(parents=True)
        for image in content["images"]:
            lines = [
                f"{label_of[entry['category_id']]} {(x + w / 2) / image['width']} {(y + h / 2) / image['height']} "
                f"{w / image['width']} {h / image['height']}\n"
                for entry in content["annotations"]
                for x, y, w, h in [entry["bbox"]]
                if entry["image_id"] == image["id"]
            ]
            source = shapes_root / f"images/{split}2017" / image["file_name"]
            shutil.copy(source, folder / "images" / split)
            (folder / "labels" / split / source.with_suffix(".txt").name).write_text("".join(lines))
    names = [category["name"] for category in content["categories"]]
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    return folder


@pytest.mark.slow
def test_commands_of_the_page_run(yolo, tmp_path):
    """All commands before `accelerate launch`, with another path and shorter runs."""
    page = Path("docs/your-data.md").read_text().split("accelerate launch")[0]
    blocks = re.findall(r"```bash\n(.*?)(?:```|\Z)", page, flags=re.DOTALL)
    assert len(blocks) == 8
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("configs", "pix2seq", "train.py", "evaluate.py", "predict.py", "plan.py"):
        (checkout / name).symlink_to(Path(name).resolve())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in blocks:
        script = block.strip().replace("/path/to/yolo_or_voc", str(yolo))
        script = f"{script} {SHORT_RUN}" if script.startswith("python train.py") else script
        result = subprocess.run(
            ["bash", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, (script, result.stderr[-2000:])
    for name in ("runs/pix2seq/data/check.png", "show.png", "runs/mine-overfit/best", "out/report.html"):
        assert (checkout / name).exists(), name
    assert len(list((checkout / "boxes").glob("*.jpg"))) == len(list((yolo / "images" / "val").iterdir()))
