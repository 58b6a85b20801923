"""Commands that are printed to be pasted into a shell."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from models.scripts import from_here


def command(script: str, *words: object, processes: int = 1) -> str:
    """The line that runs a script of this repository with this Python, in several `processes`."""
    found = shutil.which("python")
    is_this = found and Path(found).parent == Path(sys.executable).parent
    start = ["python" if is_this else sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return quoted([*start, from_here(script), *words])


def quoted(words: Iterable[object]) -> str:
    """A command line that gives a program these words."""
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return join(map(str, words))


def what_to_try(image: str, weights: Path, labels: Iterable[str]) -> str:
    """Two commands that use new weights on an image."""
    words = image, "--weights", weights
    zero_shot = command("predict_zero_shot.py", *words, "--labels", *labels)
    return f"now try\n  {command('predict.py', *words)}\n  {zero_shot}"
