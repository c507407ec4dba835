"""Who may import whom, read from the source. A module that is not in the table fails: decide its place first."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Module -> modules of ours it may import. "pix2seq" is the package itself (its version).
ALLOWED = {
    "__init__": set(),
    # level 0
    "tokenizer": set(),
    "transforms": set(),
    "visualize": set(),
    "shapes": set(),
    "config": set(),
    "coco": set(),
    "backbone": set(),
    "preemption": set(),
    "checkpoint": set(),
    "run_folder": {"pix2seq"},
    # level 1
    "sequence": {"tokenizer"},
    "model": {"backbone"},
    "metrics": {"tokenizer"},
    # level 2: the model reaches decoding as an argument only
    "decoding": {"tokenizer"},
    "data": {"sequence", "transforms", "coco"},
    # level 3
    "evaluation": {"coco", "data", "decoding", "tokenizer", "transforms", "visualize"},
}
LEVEL_0 = ("tokenizer", "transforms", "visualize", "shapes", "config", "coco", "backbone", "preemption")
ENTRY_POINTS = ("train", "evaluate")
MODULES = sorted(path.stem for path in (ROOT / "pix2seq").glob("*.py"))


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


def source(module: str) -> Path:
    return ROOT / f"{module}.py" if module in ENTRY_POINTS else ROOT / "pix2seq" / f"{module}.py"


def ours(module: str) -> set[str]:
    names = [name.split(".") for name in imports(source(module))]
    return {
        parts[1] if len(parts) > 1 and parts[1] in MODULES else parts[0] for parts in names if parts[0] == "pix2seq"
    }


def outside(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source(module))}


def test_the_table_is_complete():
    assert set(MODULES) == set(ALLOWED)
    assert not [path for path in (ROOT / "pix2seq").iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    assert ours(module) <= ALLOWED.get(module, set())


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_an_entry_point(module):
    assert not outside(module) & set(ENTRY_POINTS)


@pytest.mark.parametrize("module", [*MODULES, *ENTRY_POINTS])
def test_outside_packages_stay_in_their_place(module):
    packages = outside(module)
    assert "wandb" not in packages  # reached through Accelerate's trackers
    if module != "evaluation":
        assert "pycocotools" not in packages
    if module not in ENTRY_POINTS:
        assert "accelerate" not in packages  # an argument elsewhere
    if module in LEVEL_0 and module != "shapes":
        assert "tqdm" not in packages


def test_the_codec_and_the_sentences_need_no_torch():
    """They run in workers and notebooks, and "knows numbers only" should stay true."""
    for module in ("tokenizer", "sequence", "coco", "preemption", "checkpoint"):
        assert not outside(module) & {"torch", "torchvision", "transformers"}
