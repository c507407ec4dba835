"""A small detector of drawn shapes, from which training on a small dataset starts: `--init_from starter`."""

from pathlib import Path

NAME = "starter"
FOLDER = Path(__file__).parent / "model"  # written by `make starter`


def resolve_model_name(name: str | Path) -> str | Path:
    """Returns the folder of the starter detector for its name, unless there is a folder of this name, or `name`."""
    return FOLDER if str(name) == NAME and not Path(name).exists() else name
