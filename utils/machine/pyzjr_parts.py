"""What training uses of pyzjr, which takes seconds to import. Where a slim container lacks OpenCV's
system libraries (libGL.so.1), an empty module takes OpenCV's place, which is not used here."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from models.host import garbage_unsearched


class _Constants(ModuleType):
    """Has any name, such as the constants that pyzjr's functions have as defaults."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _opencv_or_constants() -> Iterator[None]:
    found_in = sys.path[:]
    try:
        import cv2  # noqa: F401
    except ImportError:
        sys.path[:] = found_in  # OpenCV has added its `typing` and `utils`
        sys.modules["cv2"] = _Constants("cv2")
        try:
            yield
        finally:
            del sys.modules["cv2"]
    else:
        yield


with _opencv_or_constants(), warnings.catch_warnings(), garbage_unsearched():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # a package of pyzjr's uses it
    from pyzjr import LossHistory, SeedEvery, get_optimizer, show_config
    from pyzjr.visualize.printf import ConsoleLogger

__all__ = ["ConsoleLogger", "LossHistory", "SeedEvery", "get_optimizer", "show_config"]
