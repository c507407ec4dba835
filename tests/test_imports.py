"""Who may import whom, read from the source. A module that is not in the table fails: decide its place first."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Module -> modules of ours it may import. "pix2seq" is the package itself (its version); a module's own package is
# spelt out, so that its rooms have an order too.
ALLOWED = {
    "__init__": {"model", "prediction", "processing"},
    # level 0
    "errors": set(),
    "tokenizer": set(),
    "transforms": set(),
    "visualize": set(),
    "shapes": {"progress"},
    "sizes": set(),
    "launcher": set(),
    "preemption": {"launcher"},
    "optimizer": {"errors"},
    "run_folder": {"launcher", "pix2seq", "trackers", "visualize"},
    "trackers": set(),
    "command_line": {"errors"},
    "config": {"command_line", "decoding", "sizes"},
    "checkpoint": {"errors"},
    "cost": set(),
    "colors": set(),
    "progress": set(),
    "charts": {"visualize"},
    # level 1
    "sequence": {"tokenizer"},
    "metrics": {"tokenizer"},
    "scoring": {"data.coco", "data.faults", "errors"},
    "trainer_state": {"errors", "metrics", "sharding"},
    "decoding": {f"decoding.{m}" for m in ("generation", "grammar", "options")},
    "decoding.options": set(),
    "decoding.grammar": {"tokenizer"},
    "decoding.sentences": {"tokenizer", "decoding.options"},
    "decoding.generation": {"tokenizer", *(f"decoding.{m}" for m in ("grammar", "options", "sentences"))},
    # level 2
    "model": {"model.build", "model.configuration", "model.detector", "model.load", "model.transfer"},
    "model.positions": set(),
    "model.steps": set(),
    "model.llama": {"model.steps"},
    "model.transformer": {"model.steps"},
    "model.backbone": {"errors"},
    "model.loss": {"tokenizer"},
    "model.configuration": {"model.backbone", "model.positions"},
    "model.detector": {
        *("decoding", "tokenizer", "model.backbone", "model.configuration", "model.llama"),
        "model.positions",
        *("model.loss", "model.steps", "model.transformer"),
    },
    "model.build": {"errors", "tokenizer", "model.backbone", "model.configuration", "model.detector"},
    "model.load": {"checkpoint", "decoding", "errors", "model.configuration", "model.detector"},
    "model.transfer": {"tokenizer", "model.build", "model.detector"},
    "data": {"data.coco", "data.datasets", "data.loading", "data.sources"},
    "data.faults": set(),
    "data.sources": {"errors"},
    "data.images": {"errors", "transforms"},
    "data.coco": {"errors", "data.faults", "data.images", "data.sources"},
    "data.datasets": {"colors", "errors", "sequence", "transforms", "data.coco", "data.images"},
    "data.loading": {"data.datasets"},
    "data.unreadable": {"errors", "data.coco"},
    # what the commands do
    "data.check": {
        "charts",
        "errors",
        "progress",
        "visualize",
        *(f"data.{m}" for m in ("coco", "faults", "images", "sources")),
    },
    "data.show": {"colors", "tokenizer", "visualize", "data.datasets", "data.images"},
    "data.convert": {"errors", "data.faults", "data.convert.files", "data.convert.voc", "data.convert.yolo"},
    "data.convert.files": {"errors", "data.images"},
    "data.convert.yolo": {"errors", "progress", "data.convert.files"},
    "data.convert.voc": {"errors", "progress", "data.convert.files"},
    "data.shards": {"errors", "progress", "data.coco", "data.images", "data.sources"},
    "processing": {"sequence", "tokenizer", "transforms"},
    # level 3
    "sharding": {"model"},
    # level 4: what a run shows
    "reporting": {
        *("colors", "data", "data.images", "decoding", "evaluation", "preemption", "run_folder", "scoring"),
        *("tokenizer", "trackers", "visualize"),
    },
    "evaluation": {"evaluation.pictures", "evaluation.predictions"},
    "prediction": {"prediction.predictor"},
    "prediction.predictor": {
        *("command_line", "data", "data.faults", "data.images", "decoding", "errors", "model", "transforms"),
        "visualize",
    },
    "prediction.inputs": {"data.images", "errors"},
    "prediction.video": {"data.images", "errors"},
    "prediction.result_files": {"errors", "evaluation", "model", "prediction"},
    "evaluation.predictions": {
        "data",
        "data.images",
        "progress",
        "decoding",
        "preemption",
        "tokenizer",
        "transforms",
    },
    # what can be read from predictions
    "evaluation.pictures": {"data", "data.images", "scoring", "visualize"},
    "evaluation.matches": {"progress", "scoring"},
    "evaluation.analysis": {"progress", "scoring", "evaluation.matches"},
    "evaluation.figures": {"charts", "visualize"},
    "evaluation.examples": {"data", "data.images", "visualize", "evaluation.analysis", "evaluation.matches"},
    "evaluation.captions": set(),
    "evaluation.page": set(),
    "evaluation.report": {
        *("data", "progress", "scoring"),
        *(f"evaluation.{module}" for module in ("analysis", "captions", "examples", "figures", "matches", "page")),
        "evaluation.output_folder",
    },
    "evaluation.output_folder": {"data.faults", "errors", "scoring", "evaluation.figures", "evaluation.matches"},
    "evaluation.compare": {"data.faults", "progress", "scoring", "evaluation.matches"},
    # what can be read from a detector
    "evaluation.tokens": {"charts", "decoding", "errors", "tokenizer", "visualize"},
    "evaluation.commands": {
        *("data.coco", "data.faults", "data.images", "errors", "model", "scoring", "transforms"),
        *(f"evaluation.{module}" for module in ("compare", "output_folder", "tokens")),
    },
    "evaluation.__main__": {"evaluation.commands"},
    # level 6: what is left behind
    "saving": {"assembly", "checkpoint", "command_line", "config", "model", "processing", "trainer_state"},
    # level 5: from the flags to a run
    "assembly": {
        *("checkpoint", "colors", "command_line", "config", "cost", "data", "decoding", "errors", "metrics", "model"),
        *("data.faults", "data.unreadable"),
        *("optimizer", "preemption", "reporting", "run_folder", "scoring", "sequence", "sharding", "tokenizer"),
        *("trainer_state", "transforms"),
    },
    # the command line of the data package, an entry point: `train.py --check_data` is its check
    "data.commands": {
        *("assembly", "command_line", "config", "errors"),
        *(f"data.{module}" for module in ("check", "coco", "convert", "faults", "shards", "show")),
    },
    "data.__main__": {"data.commands"},
    # the page, an entry point too
    "demo": set(),
    "demo.desk": {
        *("data.images", "decoding", "decoding.sentences", "prediction.predictor", "tokenizer", "transforms"),
        "visualize",
    },
    "demo.page": {"errors", "tokenizer", "demo.desk"},
    "demo.__main__": {
        *("command_line", "config", "data", "errors", "model", "prediction", "shapes", "demo.desk", "demo.page"),
    },
}
LEVEL_0 = (
    "tokenizer",
    "transforms",
    "visualize",
    "config",
    "data.coco",
    "preemption",
    "checkpoint",
    "sizes",
    "model.backbone",
)
ENTRY_POINTS = ("train", "evaluate", "predict", "export", "plan")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "pix2seq").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in (ROOT / "pix2seq").rglob("*.py")}
FILES |= {name: ROOT / f"{name}.py" for name in ENTRY_POINTS}
MODULES = sorted(FILES.keys() - set(ENTRY_POINTS))


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, also inside functions: a.b for `import a.b` and `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where a name comes from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The modules of ours it imports: the longest known name at the start of each import."""
    found = set()
    for name in imports(FILES[module]):
        first, *rest = name.split(".")
        if first == "pix2seq":
            known = [".".join(rest[:length]) for length in (3, 2, 1) if ".".join(rest[:length]) in MODULES]
            found.add(known[0] if known else first)
    return found


def outside(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(FILES[module])}


def test_the_table_is_complete():
    assert set(MODULES) == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    assert ours(module) <= ALLOWED.get(module, set())


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_an_entry_point(module):
    assert not outside(module) & set(ENTRY_POINTS)


def test_importing_the_package_loads_no_more_than_its_models():
    body = ast.parse(FILES["__init__"].read_text(encoding="utf-8")).body
    names = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.startswith("pix2seq")} == {"pix2seq.model", "pix2seq.processing"}


@pytest.mark.parametrize("module", [*MODULES, *ENTRY_POINTS])
def test_outside_packages_stay_in_their_place(module):
    packages = outside(module)
    if module != "trackers":  # and there only while it runs, for what Accelerate's tracker does not know
        assert "wandb" not in packages
    if module != "prediction.video":  # and there only while there is one
        assert "cv2" not in packages
    if module != "demo.page":  # and there only while it serves
        assert "gradio" not in packages
    if module != "scoring":
        assert not {"pycocotools", "hotcoco"} & packages
    if module not in ENTRY_POINTS:
        assert "accelerate" not in packages  # an argument elsewhere
    if module in LEVEL_0:
        assert "tqdm" not in packages


def test_the_codec_and_the_sentences_need_no_torch():
    """They run in workers and notebooks, and "knows numbers only" should stay true."""
    for module in ("tokenizer", "sequence", "data.faults", "errors", "checkpoint"):
        assert not outside(module) & {"torch", "torchvision", "transformers"}
