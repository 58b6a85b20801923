"""Scripts in notebooks, without a console, with any paths; the lines and commands they print."""

import contextlib
import gc
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from script_runs import ROOT, run_script, set_variables
from tiny import NAMED

from flickr8k.render_demo import render_demo
from models import host as host_module
from models import progress_bar as bars
from models.errors import InputError
from models.host import garbage_unsearched
from models.weights.registry import CONFIGS
from utils.machine.interrupt import Interrupt
from utils.retrieval.plots import save_figure
from utils.runs.commands import quoted

SCRATCH = ["--resume_training", "none", "--model", "ViT-tiny", "--batch_size", 16, "--epochs", 1]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=20, n_val=4)


def ascii_file() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


@pytest.mark.parametrize("host", [io.StringIO, ascii_file, lambda: None])
@pytest.mark.parametrize(
    "error, code", [(None, None), (InputError("狗"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_script_prints_anywhere_and_gives_everything_back(host, error, code, monkeypatch):
    """Also what the script replaces, as pyzjr's log and the signals of train.py do."""
    streams = host(), host()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def main() -> None:
        print("a dog, 一只狗")
        sys.stdout = sys.stderr = io.StringIO()
        Interrupt()
        assert os.environ["MPLBACKEND"] == "agg"
        if error is not None:
            raise error

    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as ended:
        host_module.run_script(main)
    assert (sys.stdout, sys.stderr) == streams
    assert code is None or ended.value.code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    if host is io.StringIO:
        assert streams[0].getvalue() == "a dog, 一只狗\n"
    elif host is ascii_file:
        assert streams[0].buffer.getvalue() == "a dog, 一只狗\n".encode()


@posix
def test_output_that_nobody_reads_any_more_is_no_error():
    """As of a program that SIGPIPE ends."""
    script = "from models.host import run_script; run_script(lambda: print('x' * 10**6))"
    done = subprocess.run(
        ["bash", "-c", f"{quoted([sys.executable, '-c', script])} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


NCCL = "NCCL error: unhandled system error\nLast error:\nError while creating /dev/shm/nccl-1"


@pytest.mark.parametrize("message", ["Connection closed by peer [127.0.0.1]", NCCL])
def test_only_the_process_that_fails_first_shows_a_traceback(message, monkeypatch, capsys):
    def main() -> None:
        raise RuntimeError(message)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        host_module.run_script(main)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == f"stopped: another process has ended, or cannot exchange data: {message}\n"
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError):
        host_module.run_script(main)


# Progress bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, states", [(io.StringIO, 0), (Terminal, 4)])
def test_a_bar_leaves_nothing_and_a_file_has_none_within_a_minute(stream, states, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with bars.progress_bar(total=3) as bar:
        for _ in range(3):
            time.sleep(0.15)  # tqdm draws on a terminal every 0.1 seconds
            bar.update()
    *drawn, last = sys.stderr.getvalue().split("\r")
    assert "".join(drawn).count("/3") == states and not last
    assert not any(drawn) or not drawn[-1].strip()  # blanks over the last state


# Commands to paste


NASTY = ["$(touch pwned)", "`touch pwned`"]


@pytest.fixture(scope="module")
def nasty_run(data, tmp_path_factory):
    """(folder, what was printed) of a run on a data set with such paths and captions."""
    work = tmp_path_factory.mktemp("it's a 文件夹 $(touch pwned)")
    folder = work / 'my "data" `touch pwned`'
    folder = work / folder.name.replace('"', "") if sys.platform == "win32" else folder
    shutil.copytree(data, folder)
    for split in ("train", "val"):
        file = folder / f"en_{split}.json"
        entries = json.loads(file.read_text("utf-8"))
        for entry in entries:
            entry["caption"] = [f'a {NASTY[0]} {NASTY[1]} "quotes" it\'s $HOME', "一只 狗 \\"]
        file.write_text(json.dumps(entries), encoding="utf-8")
    arguments = [*SCRATCH, "--dataset_path", folder.name, "--log_dir", "log s"]
    done = run_script("train.py", *arguments, cwd=work)
    return work, done.stdout


@pytest.mark.slow
@posix
def test_the_commands_that_train_prints_can_be_pasted(nasty_run):
    work, printed = nasty_run
    heading, *lines = printed.splitlines()[-5:-2]  # the last two lines are about the page
    assert heading == "now try"
    assert [Path(shlex.split(line)[1]).name for line in lines] == [
        "predict.py", "predict_zero_shot.py",
    ]  # fmt: skip
    # What bash makes of a line that is pasted: one argument of python on each line.
    shell = "python() { printf '%s\\n' \"$@\"; }\n"
    answers = []
    for line in lines:
        done = subprocess.run(
            ["bash"], input=shell + line, cwd=work, capture_output=True, encoding="utf-8",
            check=True,
        )  # fmt: skip
        script, *arguments = done.stdout.splitlines()
        answers.append(run_script(script, *arguments, cwd=work))
    labels = ["一只 狗 \\", "something else"]
    assert shlex.split(lines[1])[-2:] == labels
    assert all(repr(label) in answers[1].stdout for label in labels)
    assert not list(work.rglob("pwned"))


# Notebooks and other places

NOTEBOOK = """
import os, runpy, sys
class OutStream:
    def write(self, text): os.write(1, text.encode())
    def flush(self): pass
    def isatty(self): return False
sys.stdout = sys.stderr = mine = OutStream()
root, *sys.argv = sys.argv[1:]
sys.path.insert(0, root)
runpy.run_path(root + "/train.py", run_name="__main__")
print("the next cell")
assert sys.stdout is mine
"""


@pytest.mark.slow
def test_train_runs_in_a_notebook_and_leaves_its_output_alone(data, tmp_path):
    backend = "module://matplotlib_inline.backend_inline"
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    done = run_script(
        tmp_path / "notebook.py", ROOT, "train.py", *SCRATCH, "--dataset_path", data, cwd=tmp_path,
        prepare=partial(set_variables, MPLBACKEND=backend),
    )  # fmt: skip
    assert done.stdout.endswith("the next cell\n")
    (log,) = tmp_path.glob("logs/*/console_*.log")
    assert " 1/1 " in log.read_text("utf-8")
    assert "the next cell" not in log.read_text("utf-8")


@pytest.mark.slow
def test_scripts_run_in_ipython(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CONFIGS, "ViT-tiny", NAMED["ViT-tiny"])
    shell = InteractiveShell()
    before = sys.stdout, sys.stderr, sys.excepthook
    arguments = quoted([*SCRATCH, "--dataset_path", data])
    shell.run_cell(f"%run {ROOT / 'train.py'} {arguments}")
    assert (sys.stdout, sys.stderr, sys.excepthook) == before
    assert "now try" in capsys.readouterr().out


UNKNOWN_USER = """
import os, pwd, runpy, sys
def unknown(*_): raise KeyError("uid not found")
pwd.getpwuid = unknown
os.environ.pop("HOME", None)
sys.path.insert(0, sys.argv[1])
del sys.argv[0]
sys.argv[0] += "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@posix
def test_train_runs_for_an_unknown_user_without_a_console(data, tmp_path):
    """And with Chinese names, where the locale has no Chinese."""
    shutil.copytree(data, tmp_path / "数据")
    (tmp_path / "unknown.py").write_text(UNKNOWN_USER)
    train = [
        "unknown.py",
        ROOT,
        *SCRATCH,
        "--model",
        "ViT-demo",
        "--num_workers",
        1,
        "--dataset_path",
        "数据",
    ]
    environment = os.environ | {"LANG": "C", "LC_ALL": "POSIX"}
    done = subprocess.run(
        ["bash", "-c", f"{quoted([sys.executable, *train])} --log_dir 日志 <&- >&-"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("日志/*/console_*.log")
    assert " 1/1 " in log.read_text("utf-8") and "数据/images/" in log.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_names_that_are_not_utf8(data, tmp_path):
    """As that of a data set."""
    name = os.fsdecode(b"\xe4\xff")
    shutil.copytree(data, tmp_path / name)
    arguments = [*SCRATCH, "--dataset_path", name]
    run_script("train.py", *arguments, cwd=tmp_path)
    (file,) = tmp_path.glob("logs/*/arguments.json")
    assert json.loads(file.read_text("utf-8"))["dataset_path"] == str(tmp_path / name)


# Pictures


def test_every_format_of_pictures_is_written_or_refused_in_one_line(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2))
    figure.subplots().set(title="一只 dog $x^{2 \\frac", xlabel="x")
    figure.axes[0].title.set_parse_math(False)
    for kind in figure.canvas.get_supported_filetypes():
        path = tmp_path / f"picture.{kind}"
        if kind == "pgf":  # for which LaTeX is needed
            with pytest.raises(InputError, match=f"{re.escape(str(path))}: no format for pictures"):
                save_figure(figure, path)
            assert not path.exists()
        else:
            save_figure(figure, path)
            assert path.stat().st_size > 0
    assert not list(tmp_path.glob(".*"))


def test_parsers_answer_before_torch_is_imported():
    """It takes seconds. utils/metric.py, which computes with it, needs it for its own functions."""
    code = (
        "import runpy, sys\n"
        "for script in ('train.py', 'predict.py', 'predict_zero_shot.py'):\n"
        "    runpy.run_path(script)\n"
        "import models.config\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_garbage_is_searched_again_after_the_block():
    """Also after an error; what was made in between is not searched."""
    try:
        with contextlib.suppress(InputError), garbage_unsearched():
            made = [[] for _ in range(9)]
            assert not gc.isenabled()
            raise InputError("of the arguments")
        assert gc.isenabled()
        assert not any(found is made[0] for found in gc.get_objects())
    finally:
        gc.unfreeze()
