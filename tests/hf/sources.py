"""Downloads the source distribution of the installed transformers and imports the test suites that it contains.

`python -m tests.hf.sources` downloads it to `build/` from the package index that pip is configured with. It exits with
code 1 and one line if the index cannot be reached or does not have this version.
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

PACKAGE = "transformers_tests"  # the suites are imported under this name, because `tests` is our own package
VERSION = version("transformers")
FOLDER = Path(__file__).parents[2] / "build" / f"transformers-{VERSION}" / "tests"


def download() -> None:
    """Downloads and unpacks the tests of the installed version, unless they are there already.

    Raises:
        subprocess.CalledProcessError: pip could not download the source distribution.
    """
    if FOLDER.exists():
        return
    FOLDER.parent.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--retries", "1", "--timeout", "15", "--no-binary", "transformers"]
        command += ["--dest", temporary, f"transformers=={VERSION}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        name = f"transformers-{VERSION}"
        with tarfile.open(Path(temporary) / f"{name}.tar.gz") as archive:
            members = [member for member in archive.getmembers() if member.name.startswith(f"{name}/tests/")]
            archive.extractall(temporary, members=members, filter="data")
        shutil.rmtree(FOLDER.parent, ignore_errors=True)
        (Path(temporary) / name).rename(FOLDER.parent)


def import_suite(name: str) -> types.ModuleType:
    """Imports one of the test files, such as "test_modeling_common".

    The source distribution contains only the files at the top of the folder `tests`. What they import from other
    folders is replaced: the tests of `generate` and of the exporters by empty classes, because the model does not
    support `generate` and the exporters are tested here; images of the hub by an error, because there is no network.
    """
    if PACKAGE not in sys.modules:
        (FOLDER / "__init__.py").touch()  # transformers.utils.direct_transformers_import executes it
        package = _module(PACKAGE)
        package.__path__ = [str(FOLDER)]
        for folder in ("exporters", "generation", "utils"):
            _module(f"{PACKAGE}.{folder}").__path__ = []
        _module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
        _module("fetch_hub_objects_for_ci", url_to_local_path=_no_network)
    return importlib.import_module(f"{PACKAGE}.{name}")


def _module(name: str, **attributes) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _no_network(url: str) -> str:
    raise OSError(f"{url}: the tests use no network")


if __name__ == "__main__":
    try:
        download()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        sys.exit(f"The source distribution of transformers {VERSION} cannot be downloaded: {reason[0]}")
