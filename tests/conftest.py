"""Settings for all tests.

They test a copy of the sources, from which they import too, with a home and a working folder of
their own: none sees, needs or changes what users have beside the scripts (runs, data, weights) or
in their home (caches).
"""

import os
import shutil
import site
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = {".css", ".gz", ".j2", ".js", ".md", ".png", ".py", ".toml", ".tsv", ".txt"}
# Variables that move what belongs in the home, or say how libraries use it.
MOVING = ("HF_", "HUGGINGFACE_", "MPLCONFIGDIR", "TORCH_HOME", "TRANSFORMERS_", "XDG_")

# On a busy machine an example may take its time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers, and the scripts they start, share the cores
    folder = tempfile.TemporaryDirectory(prefix="tests_", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    place = config.place = Path(folder.name).resolve()
    copy_sources(CHECKOUT, place / "checkout")
    (place / "checkout" / "tests" / "__init__.py").touch()  # before a package that has this name
    sys.path[:0] = [str(place / "checkout"), str(place / "checkout" / "tests")]
    if (shared := CHECKOUT.parent / "shared").is_dir():
        (place / "shared").symlink_to(shared, target_is_directory=True)
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())  # where pip --user puts packages
    for name in [name for name in os.environ if name.startswith(MOVING)]:
        del os.environ[name]
    for name in ("HOME", "USERPROFILE"):
        os.environ[name] = str(place / "home")
    os.environ["LOCALAPPDATA"] = str(place / "home" / ".cache")
    for name in ("home", "work"):
        (place / name).mkdir()


def copy_sources(checkout: Path, copy: Path) -> None:
    """Copy the project's files, and none that users put beside them."""
    files = [*checkout.glob("*"), *checkout.glob("flickr8k/*.py")]
    for room in ("models", "utils", "tests"):
        files += (checkout / room).rglob("*")
    for file in files:
        target = copy / file.relative_to(checkout)
        if file.suffix in SOURCES and file.is_file() and "models_pth" not in file.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)


@pytest.fixture(scope="session")
def known(request: pytest.FixtureRequest) -> Iterator[set[tuple[Path, int]]]:
    """The files that no test may change. Tests start in an empty folder, not in the checkout."""
    started = Path.cwd()
    os.chdir(request.config.place / "work")
    yield files_in(request.config.place)
    os.chdir(started)


@pytest.fixture(autouse=True)
def nothing_left_behind(
    request: pytest.FixtureRequest, known: set[tuple[Path, int]]
) -> Iterator[None]:
    """A test fails that changes a file beside the scripts, in the home or in the folder where it
    starts."""
    yield
    changed = files_in(request.config.place) ^ known
    known ^= changed  # the next test did not do it
    assert not changed, f"write into tmp_path, not {sorted({str(path) for path, _ in changed})}"


def files_in(folder: Path) -> set[tuple[Path, int]]:
    """The files in `folder` and when they were written, but for those in hidden folders, where
    libraries keep what is theirs, such as a list of fonts."""
    found = set()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] not in "._" and name != "tests"]
        paths = [Path(parent, name) for name in files]
        found.update((path, path.lstat().st_mtime_ns) for path in paths)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no worker has one left at the end."""
    slow = [item.path for item in items if item.get_closest_marker("slow")]
    items.sort(key=lambda item: -slow.count(item.path))
