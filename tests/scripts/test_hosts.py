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
import threading
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from script_runs import ROOT, run_script

import predict
from flickr8k.render_demo import render_demo
from models import errors
from models import progress_bar as bars
from models.errors import InputError
from models.host import garbage_unsearched
from models.simple_tokenizer import clean
from models.tokens import chinese_tokenizer, clip_tokenizer, token_rows
from predict_zero_shot import check_labels
from utils.machine.interrupt import Interrupt
from utils.runs.commands import labels_to_try, quoted
from utils.runs.files import save_figure

SCRATCH = ["--resume_training", "none", "--model", "ViT-demo", "--batch_size", 16, "--epochs", 1]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash")


class WritesOnly:
    """All that a stream of some hosts has."""

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> None:
        text.encode()  # refuses what is no text, as a file does
        self.text += text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=20, n_val=4)


def closed() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


def ascii_file() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


@pytest.mark.parametrize("host", [WritesOnly, io.StringIO, ascii_file, closed, lambda: None])
@pytest.mark.parametrize(
    "error, code", [(None, None), (InputError("狗"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_script_prints_anywhere_and_gives_everything_back(host, error, code, monkeypatch):
    """Also what the script replaces, as pyzjr's log and the signals of train.py do."""
    streams = host(), host()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    settings = [(s.encoding, s.errors) for s in streams if isinstance(s, io.TextIOWrapper)]
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    filters, options = list(warnings.filters), list(sys.warnoptions)

    def main() -> None:
        print("a dog, 一只狗, \udcff")
        sys.stdout = sys.stderr = io.StringIO()
        Interrupt()
        warnings.simplefilter("ignore")
        assert os.environ["MPLBACKEND"] == "agg"
        if error is not None:
            raise error

    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as ended:
        errors.run_script(main)
    assert (sys.stdout, sys.stderr) == streams
    assert code is None or ended.value.code == code
    assert [(s.encoding, s.errors) for s in streams if hasattr(s, "reconfigure")] == settings
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (warnings.filters, sys.warnoptions) == (filters, options)
    assert os.environ["MPLBACKEND"] == "module://nowhere"
    if isinstance(streams[0], (WritesOnly, io.StringIO)):
        printed = streams[0].text if host is WritesOnly else streams[0].getvalue()
        assert printed == "a dog, 一只狗, ?\n"
    elif host is ascii_file:
        assert streams[0].buffer.getvalue() == "a dog, 一只狗, ?\n".encode()


def test_warnings_are_shown_where_they_would_be_errors(tmp_path):
    """In processes that the script starts, too: Python passes -W on to them."""
    script = (
        "import subprocess, sys, warnings\n"
        "from models.errors import run_script\n"
        "def main():\n"
        "    warnings.warn('first', FutureWarning)\n"
        "    child = [sys.executable, *subprocess._args_from_interpreter_flags(), '-c',\n"
        "             'import warnings; warnings.warn(\"second\", FutureWarning)']\n"
        "    subprocess.run(child, check=True)\n"
        "run_script(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "first" in done.stderr and "second" in done.stderr


@posix
def test_output_that_nobody_reads_any_more_is_no_error():
    """As of a program that SIGPIPE ends."""
    script = "from models.errors import run_script; run_script(lambda: print('x' * 10**6))"
    done = subprocess.run(
        ["bash", "-c", f"{quoted([sys.executable, '-c', script])} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("message", ["Connection closed by peer [127.0.0.1]", "NCCL error"])
def test_only_the_process_that_fails_first_shows_a_traceback(message, monkeypatch, capsys):
    def main() -> None:
        raise RuntimeError(message)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        errors.run_script(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "stopped: another process of this run has ended\n"
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RuntimeError):
        errors.run_script(main)


def test_signals_are_left_alone_in_a_thread():
    raised = []

    def use() -> None:
        try:
            Interrupt().release()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not raised


def test_without_an_input_to_ask_on_an_image_is_to_be_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="name an IMAGE"):
        next(predict.ask_for_images())


# Progress bars


def follow(steps: int, seconds: float, leave: bool, stream, monkeypatch) -> str:
    """What a bar writes to `stream` in so many steps, which take so long together."""
    now = [1000.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with bars.progress_bar(total=steps, desc="epoch 1", leave=leave) as bar:
        for step in range(steps):
            now[0] += seconds / steps
            bar.set_postfix(loss=step)
            bar.update()
    return stream.getvalue()


@pytest.mark.parametrize("seconds, lines", [(10, 0), (100, 3), (3600, 120)])
@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_in_a_file_is_a_line_every_30_seconds(seconds, lines, leave, monkeypatch):
    text = follow(720, seconds, leave, io.StringIO(), monkeypatch)
    assert not set("\r\x1b") & set(text)
    written = text.splitlines()
    assert lines <= len(written) - leave <= lines or (leave and len(written) == lines)
    assert all(line.startswith("epoch 1: ") for line in written)
    assert not leave or "720/720" in written[-1]


def test_a_bar_on_a_terminal_is_drawn_in_its_place(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = follow(5, 1, True, Terminal(), monkeypatch)
    assert text.count("\n") == 1 and text.count("\r") > 1


def test_a_bar_without_a_console_counts_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with bars.progress_bar(total=3) as bar:
        bar.update(2)
    assert bar.n == 2


# Commands to paste

words = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
NASTY = ["", "two words", "it's", 'say "hi"', "$(touch pwned)", "`touch pwned`", "一只 狗", "a\\",
         'a\\"b c\\\\', "%PATH%", "a&b|c<d>e^f(g)", "!x", "*?[a]~#;", "a\nb\tc\x1b[2J"]  # fmt: skip


@posix
@given(words)
def test_bash_gives_a_program_the_very_words(given_words):
    given_words = [*given_words, *NASTY]
    line = quoted(["printf", "%s\\0", *given_words], windows=False)
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == given_words
    assert line.isprintable()  # nothing that a terminal would take for a key, such as Enter


@posix
def test_bash_gives_a_program_a_name_that_is_not_utf8():
    line = quoted(["printf", "%s", os.fsdecode(b"\xff 1")], windows=False)
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout == b"\xff 1"


def parsed_as_c_arguments(line: str) -> list[str]:
    """By Microsoft's "Parsing C command-line arguments", the rules of python.exe: backslashes are
    plain but before a quote, where two stand for one; two quotes within quotes stand for one."""
    words, word, within, i = [], None, False, 0
    while i < len(line):
        slashes = len(line[i:]) - len(line[i:].lstrip("\\"))
        i += slashes
        if line[i : i + 1] == '"':
            word = (word or "") + "\\" * (slashes // 2)
            if slashes % 2:
                word += '"'
            elif within and line[i + 1 : i + 2] == '"':
                word += '"'
                i += 1
            else:
                within = not within
            i += 1
        elif slashes:
            word = (word or "") + "\\" * slashes
        elif line[i] in " \t" and not within:
            words += [] if word is None else [word]
            word, i = None, i + 1
        else:
            word = (word or "") + line[i]
            i += 1
    return words if word is None else [*words, word]


def test_the_parser_takes_microsofts_examples():
    """From the table in the documentation."""
    assert parsed_as_c_arguments(r'"abc" d e') == ["abc", "d", "e"]
    assert parsed_as_c_arguments(r'a\\b d"e f"g h') == [r"a\\b", "de fg", "h"]
    assert parsed_as_c_arguments(r"a\\\"b c d") == [r"a\"b", "c", "d"]
    assert parsed_as_c_arguments(r'a\\\\"b c" d e') == [r"a\\b c", "d", "e"]
    assert parsed_as_c_arguments('a"b"" c d') == ['ab" c d']
    for word in NASTY:
        assert parsed_as_c_arguments(subprocess.list2cmdline([word])) == [word]


@given(words)
def test_windows_gives_a_program_the_very_words_and_cmd_takes_none_apart(given_words):
    given_words = [*given_words, *NASTY]
    line = quoted(["python", *given_words], windows=True)
    assert parsed_as_c_arguments(line) == ["python", *given_words]
    outside = line.split('"')[::2]  # for cmd every quote begins or ends a quotation
    assert not set("&|<>^()%!$`'\r\n") & set("".join(outside))


texts = st.text(max_size=200) | st.sampled_from(
    ["a dog", "A  Dog", "-5 degrees", "--labels", "&nbsp;", "\x1b[201~", "狗" * 300, "word " * 500,
     "word " * 500 + "end", *NASTY[1:]]
)  # fmt: skip


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), chinese_tokenizer()])
@given(st.lists(texts, min_size=1, max_size=5))
def test_labels_to_try_are_two_that_the_script_takes(tokenizer, captions):
    labels = labels_to_try(captions, tokenizer, 52)
    assert len(labels) == 2
    check_labels(labels, tokenizer)  # two that the model reads differently
    token_rows(tokenizer, labels, 52)  # which both fit
    assert all(label.isprintable() and not label.startswith("-") for label in labels)


def test_labels_to_try_are_captions_and_long_ones_what_the_model_reads_of_them():
    clip = clip_tokenizer(), 77
    assert labels_to_try(["a dog", "A cat!", "a  Dog"], *clip) == ["a dog", "A cat!"]
    long = "word " * 500
    first, second = labels_to_try([long, long + "end", "一只狗"], *clip)
    assert first == ("word " * 75).strip() and second == "一只狗"
    assert clip_tokenizer().encode(first) == clip_tokenizer().encode(long)[:75]
    assert clean(labels_to_try(["a dog", "a  dog"], *clip)[1]) not in ("", "a dog")


@pytest.fixture(scope="module")
def nasty_run(data, tmp_path_factory):
    """(folder, what was printed, errors) of a run on a data set with such paths and captions."""
    work = tmp_path_factory.mktemp("it's a 文件夹 $(touch pwned)")
    folder = work / 'my "data" `touch pwned`'
    folder = work / folder.name.replace('"', "") if sys.platform == "win32" else folder
    shutil.copytree(data, folder)
    for split in ("train", "val"):
        file = folder / f"en_{split}.json"
        entries = json.loads(file.read_text("utf-8"))
        for entry in entries:
            entry["caption"] = [f'{NASTY[4]} {NASTY[5]} "quotes" it\'s $HOME', "一只 狗 \\"]
        file.write_text(json.dumps(entries), encoding="utf-8")
    arguments = [*SCRATCH, "--dataset_path", folder.name, "--log_dir", "log s"]
    done = run_script("train.py", *arguments, cwd=work)
    return work, done.stdout, done.stderr


@pytest.mark.slow
@posix
def test_the_commands_that_train_prints_can_be_pasted(nasty_run):
    work, printed, _ = nasty_run
    heading, *lines = printed.splitlines()[-3:]
    assert heading == "now try"
    assert [Path(shlex.split(line)[1]).name for line in lines] == [
        "predict.py", "predict_zero_shot.py",
    ]  # fmt: skip
    answers = [
        subprocess.run(
            ["bash"], input=line, cwd=work, capture_output=True, encoding="utf-8", check=False
        )
        for line in lines
    ]
    assert [answer.returncode for answer in answers] == [0, 0], answers
    labels = [f'{NASTY[4]} {NASTY[5]} "quotes" it\'s $HOME', "一只 狗 \\"]
    assert shlex.split(lines[1])[-2:] == labels
    assert all(repr(label) in answers[1].stdout for label in labels)
    assert not list(work.rglob("pwned"))


@pytest.mark.slow
def test_what_a_run_prints_into_a_file_has_no_codes_for_terminals(nasty_run):
    work, printed, errors = nasty_run
    (log,) = work.glob("log s/*/console_*.log")
    for text in (printed, errors, log.read_text("utf-8")):
        assert not set("\r\x1b") & set(text)
    assert log.read_text("utf-8") in printed
    assert len([line for line in errors.splitlines() if line.startswith("epoch 1: ")]) == 1


# Notebooks and other places

NOTEBOOK = """
import os, runpy, sys
class OutStream:
    def write(self, text): os.write(1, text.encode())
    def flush(self): pass
sys.stdout = sys.stderr = mine = OutStream()
root, *sys.argv = sys.argv[1:]
sys.path.insert(0, root)
runpy.run_path(root + "/train.py", run_name="__main__")
print("the next cell")
sys.argv[1:] = ["--dataset_path", "nowhere"]
import train
try: train.main()
except ValueError: pass
assert sys.stdout is mine
"""


@pytest.mark.slow
def test_train_runs_in_a_notebook_and_leaves_its_output_alone(data, tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    arguments = map(str, [ROOT, "train.py", *SCRATCH, "--dataset_path", data])
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the next cell\n")
    (log,) = tmp_path.glob("logs/*/console_*.log")
    assert "epoch 1/1" in log.read_text("utf-8")
    assert "the next cell" not in log.read_text("utf-8")


@pytest.mark.slow
def test_scripts_run_in_ipython(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
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
def test_train_runs_for_an_unknown_user_without_a_console_with_warnings_as_errors(data, tmp_path):
    """And with Chinese names, where the locale has no Chinese."""
    shutil.copytree(data, tmp_path / "数据")
    python = quoted([sys.executable, "-W", "error", "-c", UNKNOWN_USER, ROOT])
    train = f"{python} {quoted([*SCRATCH, '--num_workers', 1, '--dataset_path', '数据'])}"
    environment = os.environ | {"LANG": "C", "LC_ALL": "POSIX"}
    done = subprocess.run(
        ["bash", "-c", f"{train} --log_dir 日志 <&- >&-"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("日志/*/console_*.log")
    assert "epoch 1/1" in log.read_text("utf-8") and "数据/images/" in log.read_text("utf-8")
    done = subprocess.run(
        ["bash", "-c", f"{train} --cache '~/x'"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"home directory. Give paths without ~" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_names_that_are_not_utf8(data, tmp_path):
    """As a data set they work; a folder for runs is refused, because TensorBoard refuses it."""
    name = os.fsdecode(b"\xe4\xff")
    shutil.copytree(data, tmp_path / name)
    arguments = [*SCRATCH, "--dataset_path", name]
    done = run_script("train.py", *arguments, cwd=tmp_path)
    image = shlex.split(done.stdout.splitlines()[-1].strip())[2]
    assert image.startswith(r"$\344\377/images/")  # in bash's $'...', which shlex does not know
    (file,) = tmp_path.glob("logs/*/arguments.json")
    assert json.loads(file.read_text("utf-8"))["dataset_path"] == str(tmp_path / name)
    done = run_script("train.py", *arguments, "--log_dir", name, cwd=tmp_path, code=2)
    assert "??: the name is not UTF-8" in done.stderr.splitlines()[-1]


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
        "import models.weights.config\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_for_garbage_is_the_hosts_own_again(enabled):
    """Also after an error; what was made in between is not searched."""
    (gc.enable if enabled else gc.disable)()
    try:
        with contextlib.suppress(InputError), garbage_unsearched():
            made = [[] for _ in range(9)]
            assert not gc.isenabled()
            raise InputError("of the arguments")
        assert gc.isenabled() == enabled
        assert not any(found is made[0] for found in gc.get_objects())
    finally:
        gc.enable()
        gc.unfreeze()
