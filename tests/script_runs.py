"""Running the project's scripts as a user does."""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest.mock import MagicMock

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def run_script(
    script: str,
    *arguments: object,
    cwd: Path,
    stdin: str = "",
    code: int = 0,
    fresh: bool = sys.platform == "win32",
    start_method: str | None = None,
    prepare: Callable[[], object] | None = None,
    draws: bool = False,
) -> subprocess.CompletedProcess:
    """Run a script of the repository in folder `cwd`; check its exit code.

    The script runs in a fork of a process that has imported its packages, or, if `fresh`, in a new
    process with this one's environment. A fork starts its workers by `start_method`, by default as
    a new process would; train.py `draws` in it only if told.
    """
    if fresh:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, input=stdin, capture_output=True, encoding="utf-8", check=False
        )
    else:
        how = {"start_method": start_method, "prepare": prepare, "draws": draws}
        done = _run_forked(script, arguments, cwd, stdin, how)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def printed_by(main: Callable[[], None], *arguments: object, cwd: Path) -> str:
    """What the `main` of a script prints in this process, which has its packages already."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        patch.chdir(cwd)
        main()
    return printed.getvalue()


def error_line(script: str, *arguments: object, cwd: Path, code: int = 2, **how: object) -> str:
    """The one line on which a script ends when its input cannot be used."""
    done = run_script(script, *arguments, cwd=cwd, code=code, **how)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def printed_code(text: str) -> str:
    """The Python that `convert.py` prints: the lines that start with four blanks."""
    lines = [line for line in text.splitlines(keepends=True) if line.startswith("    ")]
    return textwrap.dedent("".join(lines))


@cache
def forks() -> BaseContext:
    """Processes that are forks of one that has imported what scripts need; on Windows, new ones."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        multiprocessing.forkserver.ensure_running()
    return context


def start_script(
    script: str,
    *arguments: object,
    cwd: Path,
    streams: Sequence[Path | str] = (os.devnull,) * 3,
    start_method: str | None = None,
    prepare: Callable[[], object] | None = None,
    draws: bool = False,
) -> multiprocessing.Process:
    """Start a script in a fork; `streams` are the files of standard input, output and error."""
    if script == "train.py" and not draws:
        prepare = Undrawn(prepare)
    process = forks().Process(
        target=_script, args=(script, arguments, cwd, streams, start_method, prepare)
    )
    process.start()
    return process


def set_variables(**variables: str) -> None:
    """For `prepare`: environment variables that only the script sees."""
    os.environ.update(variables)


class Undrawn(NamedTuple):
    """For `prepare`: writes empty plots, since drawing takes longer than a small run itself."""

    prepare: Callable[[], object] | None

    def __call__(self) -> None:
        from utils.retrieval import plots  # matplotlib writes a list of fonts into the home

        plots.Figure = Blank
        if self.prepare:
            self.prepare()


class Blank(MagicMock):
    """A figure on which anything can be drawn, and nothing shows."""

    def subplots(self, rows: int = 1, columns: int | None = None, **how: object) -> object:
        panels = [MagicMock(**{"plot.return_value": [MagicMock()]}) for _ in range(columns or 1)]
        if columns is None:
            return panels[0]
        return panels if how.get("squeeze", True) else [panels]

    def savefig(self, file: Path | IO[bytes], *, format: str, **style: object) -> None:
        if format == "svg":
            file.write(b"<svg/>")
        else:
            Image.new("L", (1, 1)).save(file, format)


def _run_forked(
    script: str, arguments: Sequence[object], cwd: Path, stdin: str, how: dict[str, Any]
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        given, printed, errors = (Path(folder) / name for name in ("in", "out", "err"))
        given.write_text(stdin, "utf-8", "surrogateescape")
        streams = given, printed, errors
        process = start_script(script, *arguments, cwd=cwd, streams=streams, **how)
        process.join()
        texts = [file.read_text("utf-8") for file in (printed, errors)]
    return subprocess.CompletedProcess(script, process.exitcode, *texts)


def _script(
    script: str,
    arguments: Sequence[object],
    cwd: Path,
    streams: Sequence[Path | str],
    start_method: str | None,
    prepare: Callable[[], object] | None,
) -> None:
    """What `python script arguments` does, in a process that has its packages imported already."""
    for number, file in enumerate(streams):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(file, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    # As at a terminal: what a shell starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A new process would start its workers in the default way, which is first in this list.
    start_method = start_method or multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(start_method, force=True)
    os.chdir(cwd)
    sys.argv = [script, *map(str, arguments)]
    if prepare:
        prepare()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of a new process; forks skip it
        sys.stdout.flush()
