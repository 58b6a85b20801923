"""Downloads from a local server that does all that servers and networks do wrong.

What should arrive is known beforehand and judged by hashlib; the server's answers follow RFC 9110.
"""

import errno
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from script_runs import ROOT

from models.errors import InputError
from models.host import run_script
from models.weights import download as module
from models.weights import registry
from models.weights.download import CHUNK, download
from models.weights.hub import HUB

PAYLOAD = random.Random(0).randbytes(5 * CHUNK + 123)
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
MD5 = hashlib.md5(PAYLOAD).hexdigest()
SCRIPT = (
    "import sys; from pathlib import Path; from models.weights.download import download\n"
    "download(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"
)


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request with the server's n-th answer, and later ones with the last."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers["Range"]))
        answer = server.answers[min(len(server.requests), len(server.answers)) - 1]
        with suppress(ConnectionError):
            answer(self)

    def start(self, status: int, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


Answer = Callable[[Handler], None]


def whole(
    handler: Handler, body: bytes = PAYLOAD, end: int | None = None, lie: int = 0, ranges=True
) -> None:
    """All that was asked for, up to byte `end` of the file; the promised length is off by `lie`."""
    asked = handler.headers["Range"] if ranges else None
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if asked and start >= len(body):
        handler.start(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
        return
    length = len(body) - start + lie
    if asked:
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        handler.start(206, Content_Length=length, Content_Range=span)
    else:
        handler.start(200, Content_Length=length)
    handler.wfile.write(body[start:end])


def no_ranges(handler: Handler) -> None:
    whole(handler, ranges=False)


def breaks_off(end: int, ranges: bool = True) -> Answer:
    return partial(whole, end=end, ranges=ranges)


def stalls(end: int) -> Answer:
    """Sends up to byte `end`, then nothing until the test is over."""

    def answer(handler: Handler) -> None:
        whole(handler, end=end)
        handler.server.over.wait()

    return answer


def status(code: int) -> Answer:
    return lambda handler: handler.start(code, Content_Length=0)


def redirect(to: str) -> Answer:
    return lambda handler: handler.start(302, Location=to, Content_Length=0)


def is_silent(handler: Handler) -> None:
    """Takes the request, and does not answer until the test is over."""
    handler.server.over.wait()


def hangs_up(handler: Handler) -> None:
    """Closes the connection without an answer."""


def chunked(end: int | None = None) -> Answer:
    """No promised length; cut short at `end`, the last chunk does not come."""

    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.start(200, Transfer_Encoding="chunked", Connection="close")
        for start in range(0, len(PAYLOAD[:end]), CHUNK):
            data = PAYLOAD[:end][start : start + CHUNK]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        if end is None:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


@contextmanager
def running(handler=Handler, answers=(whole,)):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.answers, server.requests, server.over = answers, [], threading.Event()
    server.root = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.root}/weights.pt"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def serve():
    """serve(answer, ...): a server that gives these answers, one after the other."""
    stack = []

    def start(*answers: Answer):
        stack.append(running(answers=answers))
        return stack[-1].__enter__()

    yield start
    for context in stack:
        context.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # There is no copy on the Hugging Face hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "models_pth" / "weights.pt"


@pytest.fixture
def closed_port_url():
    with running() as server:
        return server.url


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def leave(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def left(path: Path) -> set[str]:
    """The names in the folder of a download, but for its lock, which stays on some systems."""
    return {file.name for file in path.parent.iterdir()} - {f"{path.name}.lock"}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def ranges(server) -> list[str | None]:
    return [asked for _, asked in server.requests]


@pytest.mark.parametrize("digest", [SHA256, MD5])
def test_brings_the_file_and_leaves_nothing_else(serve, path, digest):
    server = serve(whole)
    assert download(server.url, path, digest) == path
    assert path.read_bytes() == PAYLOAD
    assert left(path) == {path.name}


def test_a_server_of_the_standard_library(tmp_path):
    """It knows no ranges."""
    source, target = tmp_path / "source", tmp_path / "target" / "weights.pt"
    leave(source / "weights.pt", PAYLOAD)
    leave(beside(target, "part"), PAYLOAD[:1000])

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with running(partial(Quiet, directory=source)) as server:
        assert download(server.url, target, SHA256).read_bytes() == PAYLOAD


def test_a_file_that_is_there_is_taken_as_it_is(path):
    """Put there by hand, or by a download before."""
    leave(path, PAYLOAD)
    assert download("http://127.0.0.1:1/weights.pt", path, SHA256) == path


class TestNetwork:
    def test_a_part_is_continued(self, serve, path):
        server = serve(whole)
        leave(beside(path, "part"), PAYLOAD[:70_000])
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == ["bytes=70000-"]

    def test_what_has_arrived_is_not_asked_for_again(self, serve, path):
        server = serve(breaks_off(CHUNK), breaks_off(3 * CHUNK), whole)
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [None, f"bytes={CHUNK}-", f"bytes={3 * CHUNK}-"]

    def test_many_break_offs_are_fine_as_long_as_bytes_arrive(self, serve, path):
        steps = [breaks_off(end) for end in range(CHUNK // 2, len(PAYLOAD), CHUNK // 2)]
        assert download(serve(*steps, whole).url, path, SHA256).read_bytes() == PAYLOAD

    def test_a_stalled_server_is_asked_again(self, serve, path, monkeypatch):
        monkeypatch.setattr(module, "TIMEOUT", 0.2)
        server = serve(stalls(CHUNK), whole)
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [None, f"bytes={CHUNK}-"]

    def test_a_server_that_never_answers_is_given_up(self, serve, path, monkeypatch):
        monkeypatch.setattr(module, "TIMEOUT", 0.2)
        server = serve(is_silent)
        with pytest.raises(InputError, match=r"timed out\); run it again"):
            download(server.url, path, SHA256)
        assert len(server.requests) == 1

    @pytest.mark.parametrize("target", ["file:///etc/hosts", "FILE:///etc/hosts"])
    def test_a_redirect_to_a_file_is_not_followed(self, serve, path, target):
        server = serve(redirect(target))
        with pytest.raises(InputError) as caught:
            download(server.url, path, SHA256)
        assert len(server.requests) == 1
        for part in (server.url, f"save it as {path}"):
            assert part in str(caught.value)

    def test_a_redirect_in_a_circle_ends_in_one_line(self, serve, path):
        server = serve(redirect("/weights.pt"))
        with pytest.raises(InputError, match="redirect") as caught:
            download(server.url, path, SHA256)
        assert len(server.requests) < 20
        assert len(str(caught.value).splitlines()) == 2

    @pytest.mark.parametrize("part", [b"", PAYLOAD[:1000]])
    def test_a_redirect_is_followed_with_the_range(self, serve, path, part):
        target = serve(whole)
        server = serve(redirect(target.url))
        leave(beside(path, "part"), part)
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(target) == (["bytes=1000-"] if part else [None])

    @pytest.mark.parametrize("code", [401, 403, 404, 410, 416, 429, 503])
    def test_a_refusal_is_final(self, serve, path, code):
        server = serve(status(code))
        with pytest.raises(InputError) as caught:
            download(server.url, path, SHA256)
        assert len(server.requests) == 1
        for part in (server.url, str(code), f"save it as {path}"):
            assert part in str(caught.value)
        assert not left(path)

    @pytest.mark.parametrize("answer", [status(500), hangs_up, breaks_off(0), breaks_off(CHUNK)])
    def test_trouble_that_stays_ends(self, serve, path, answer):
        """Advice comes before the address."""
        server = serve(answer)
        with pytest.raises(InputError) as caught:
            download(server.url, path, SHA256)
        assert len(server.requests) <= 2
        advice, address = str(caught.value).splitlines()
        assert f"run it again, or get the file by other means and save it as {path}" in advice
        assert address == f"from {server.url}"

    def test_it_is_counted_without_a_bar_too(self, serve, path, monkeypatch):
        """As with TQDM_DISABLE=1 in the environment."""
        monkeypatch.setattr(module, "progress_bar", partial(module.progress_bar, disable=True))
        download(serve(whole).url, path, SHA256)
        assert path.read_bytes() == PAYLOAD

    def test_a_server_that_ignores_ranges_and_always_breaks_off(self, serve, path):
        with pytest.raises(InputError, match=f"broke off at {CHUNK:,} of {len(PAYLOAD):,} bytes"):
            download(serve(breaks_off(CHUNK, ranges=False)).url, path, SHA256)

    @pytest.mark.parametrize("host", ["closed port", "no such name"])
    def test_no_connection_is_told(self, closed_port_url, path, host):
        url = closed_port_url if host == "closed port" else "http://no-such-name.invalid/weights.pt"
        with pytest.raises(InputError) as caught:
            download(url, path, SHA256)
        assert url in str(caught.value)
        assert f"save it as {path}" in str(caught.value)


class TestWrongBytes:
    @pytest.mark.parametrize(
        ("answer", "described"),
        [
            (partial(whole, body=PAYLOAD[::-1]), f"another file of {len(PAYLOAD):,} bytes"),
            (partial(whole, body=b"<html>Log in</html>"), "a web page of 19 bytes"),
            (partial(whole, lie=-1000), f"another file of {len(PAYLOAD) - 1000:,} bytes"),
            (partial(whole, body=b""), "an empty file of 0 bytes"),
        ],
    )
    def test_they_are_deleted(self, serve, path, answer, described):
        server = serve(answer)
        with pytest.raises(InputError) as caught:
            download(server.url, path, SHA256)
        for part in (server.url, "wrong digest", described, "deleted", f"save it as {path}"):
            assert part in str(caught.value)
        assert not left(path)

    def test_a_promise_of_more_than_there_is(self, serve, path):
        """The file is whole, only the length was wrong: asked for the rest, the server has none."""
        server = serve(partial(whole, lie=1000))
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [None, f"bytes={len(PAYLOAD)}-"]

    @pytest.mark.parametrize("lie", [0, 1000])
    def test_a_part_that_is_whole_already(self, serve, path, lie):
        server = serve(partial(whole, lie=lie))
        leave(beside(path, "part"), PAYLOAD)
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [f"bytes={len(PAYLOAD)}-"]

    @pytest.mark.parametrize("part", [bytes(1000), PAYLOAD + b"!", bytes(len(PAYLOAD))])
    def test_a_part_of_another_file_is_given_up(self, serve, path, part):
        server = serve(whole)
        leave(beside(path, "part"), part)
        with pytest.raises(InputError, match=r"wrong digest.*run it again"):
            download(server.url, path, SHA256)
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [f"bytes={len(part)}-", None]


offsets = st.integers(0, len(PAYLOAD))
answers = st.one_of(
    st.just(whole),
    st.just(hangs_up),
    st.just(chunked()),
    st.builds(breaks_off, offsets, st.booleans()),
    st.builds(chunked, offsets),
    st.builds(status, st.sampled_from([403, 404, 416, 429, 500, 503])),
    st.builds(partial, st.just(whole), lie=st.integers(-1000, 1000)),
    st.builds(partial, st.just(whole), body=st.binary(max_size=100)),
)
parts = st.one_of(st.none(), st.builds(lambda end: PAYLOAD[:end], offsets), st.binary(max_size=100))


@settings(max_examples=80)
@given(st.lists(answers, min_size=1, max_size=6), parts)
def test_whatever_the_server_does_the_file_is_right_or_absent(answers, part):
    with tempfile.TemporaryDirectory() as folder, running(answers=answers) as server:
        path = Path(folder) / "weights.pt"
        if part is not None:
            leave(beside(path, "part"), part)
        with suppress(InputError):
            download(server.url, path, SHA256)
            assert path.exists()
        assert not path.exists() or path.read_bytes() == PAYLOAD
        # What a failure leaves is gone after one more run.
        server.answers = [whole]
        with suppress(InputError):
            download(server.url, path, SHA256)
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD


class TestDisk:
    def test_a_file_in_the_folder_s_place(self, serve, tmp_path):
        leave(tmp_path / "models_pth", b"not a folder")
        path = tmp_path / "models_pth" / "weights.pt"
        with pytest.raises(InputError, match="cannot be saved") as caught:
            download(serve(whole).url, path, SHA256)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.fixture
    def read_only(self):
        """A path in a folder that may be read, not written; root has to be someone else for it."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o555)
            is_root = hasattr(os, "geteuid") and os.geteuid() == 0
            if is_root:
                os.seteuid(65534)
            try:
                if os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                    pytest.skip("nothing is read-only to this user")
                yield Path(folder) / "weights.pt"
            finally:
                if is_root:
                    os.seteuid(0)
                Path(folder).chmod(0o755)

    def test_a_read_only_folder(self, serve, read_only):
        with pytest.raises(InputError, match="cannot be saved") as caught:
            download(serve(whole).url, read_only, SHA256)
        for part in (str(read_only), "Permission denied", "choose another folder"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_full_disk(self, serve, path):
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        path.parent.mkdir()
        beside(path, "part").symlink_to("/dev/full")
        with pytest.raises(InputError, match=r"No space left on device.*make room"):
            download(serve(whole).url, path, SHA256)
        assert not path.exists()

    def test_what_fitted_on_the_disk_is_kept(self, serve, path):
        resource = pytest.importorskip("resource")
        server = serve(whole)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * CHUNK, hard))
        try:
            with pytest.raises(InputError, match="cannot be saved"):
                download(server.url, path, SHA256)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert beside(path, "part").read_bytes() == PAYLOAD[: 3 * CHUNK]
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [None, f"bytes={3 * CHUNK}-"]


class TestTwoProcesses:
    @pytest.fixture
    def start(self, path):
        """start(url): another process that downloads the file."""
        processes = []

        def start(url: str) -> subprocess.Popen:
            command = [sys.executable, "-c", SCRIPT, url, str(path), SHA256]
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            processes.append(process)
            return process

        yield start
        for process in processes:
            process.kill()
            process.communicate()

    def test_one_downloads_and_the_other_waits(self, serve, path, start):
        def after_release(handler: Handler) -> None:
            release.wait(30)
            whole(handler)

        release = threading.Event()
        server = serve(after_release)
        first = start(server.url)
        until(lambda: server.requests)
        second = start(server.url)
        assert "waiting for another process" in second.stderr.readline()
        release.set()
        for process in (first, second):
            process.communicate(timeout=30)
            assert process.returncode == 0
        assert len(server.requests) == 1
        assert path.read_bytes() == PAYLOAD
        assert left(path) == {path.name}

    def test_a_killed_one_leaves_its_part_and_no_lock(self, serve, path, start):
        server = serve(stalls(2 * CHUNK), whole)
        process = start(server.url)
        part = beside(path, "part")
        until(lambda: part.exists() and part.stat().st_size == 2 * CHUNK)
        process.kill()
        process.wait(30)
        assert not path.exists()
        assert download(server.url, path, SHA256).read_bytes() == PAYLOAD
        assert ranges(server) == [None, f"bytes={2 * CHUNK}-"]

    def test_the_one_that_waits_takes_over_from_one_that_fails(self, serve, path, start):
        def after_release(handler: Handler) -> None:
            release.wait(30)
            status(404)(handler)

        release = threading.Event()
        server = serve(after_release, whole)
        first = start(server.url)
        until(lambda: server.requests)
        second = start(server.url)
        assert "waiting for another process" in second.stderr.readline()
        release.set()
        for process in (first, second):
            process.communicate(timeout=30)
        assert (first.returncode, second.returncode) == (1, 0)
        assert path.read_bytes() == PAYLOAD

    @pytest.mark.filterwarnings("ignore:flock not supported")
    @pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
    def test_a_file_system_without_locks_is_no_obstacle(self, serve, path, monkeypatch, code):
        fcntl = pytest.importorskip("fcntl")
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))
        assert download(serve(whole).url, path, SHA256).read_bytes() == PAYLOAD

    def test_of_many_that_fail_and_succeed_only_one_at_a_time_downloads(self, serve, path):
        busy, most = threading.Semaphore(1), []

        def answer(handler: Handler) -> None:
            most.append(busy.acquire(blocking=False))
            time.sleep(0.05)
            turn = len(most)
            busy.release()  # before the answer, which lets the next one in
            (status(404) if turn < 8 else whole)(handler)

        def try_it() -> None:
            with suppress(InputError):
                download(server.url, path, SHA256)

        server = serve(answer)
        threads = [threading.Thread(target=try_it) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(most) == 8 and all(most)
        assert path.read_bytes() == PAYLOAD
        assert left(path) == {path.name}


class TestCommandLine:
    """`python models/clip_utils.py`"""

    @pytest.fixture
    def run(self, monkeypatch, tmp_path):
        """run(argument, ...): the script on the folder `tmp_path`, in this process."""
        from models import clip_utils

        def run(*arguments: str, base_url: str) -> None:
            monkeypatch.setattr(registry, "BASE_URL", base_url)
            monkeypatch.setitem(clip_utils.SHA256, "ViT-B/16", SHA256)
            monkeypatch.setattr(clip_utils, "MODELS_PTH", tmp_path)
            monkeypatch.setattr(sys, "argv", ["clip_utils.py", *arguments])
            run_script(clip_utils.main)

        return run

    def test_model(self, run, serve, tmp_path, capsys):
        server = serve(whole)
        run("--model", "ViT-B/16", base_url=server.root)
        assert server.requests == [(f"/{SHA256}/ViT-B-16.pt", None)]
        assert capsys.readouterr().out.strip() == str(tmp_path / "ViT-B-16.pt")
        assert (tmp_path / "ViT-B-16.pt").read_bytes() == PAYLOAD

    def test_offline(self, run, closed_port_url, tmp_path, capsys):
        root = closed_port_url.removesuffix("/weights.pt")
        with pytest.raises(SystemExit) as caught:
            run("--model", "ViT-B/16", base_url=root)
        assert caught.value.code == 2
        _, _, message = capsys.readouterr().err.rpartition("error: ")
        assert f"{root}/{SHA256}/ViT-B-16.pt" in message
        assert f"save it as {tmp_path / 'ViT-B-16.pt'}" in message

    def test_what_is_not_verified_is_never_read(self, run, serve, tmp_path, monkeypatch):
        """A wrong file was downloaded: `load` ends before it looks into it."""
        from models import clip_utils

        wrong = PAYLOAD[::-1]
        server = serve(partial(whole, body=wrong))
        monkeypatch.setattr(registry, "BASE_URL", server.root)
        monkeypatch.setitem(clip_utils.SHA256, "ViT-B/16", SHA256)
        read = Mock()
        monkeypatch.setattr(clip_utils, "read_weights", read)
        with pytest.raises(InputError, match="wrong digest"):
            clip_utils.load("ViT-B/16", "cpu", download_root=tmp_path)
        assert not read.called

    def test_list(self, run, capsys):
        run("--list", base_url="http://127.0.0.1:1")
        lines = capsys.readouterr().out.splitlines()
        rows = {row.split()[0]: row.split()[1:] for row in lines}
        assert rows["ViT-L/14@336px"] == ["OpenAI's", "WIT-400M", "427.9", "336", "quick_gelu"]
        assert rows["ViT-B-16-SigLIP/webli"][-1] == "open_clip"
        assert max(map(len, lines)) <= 100 and {*registry.SHA256, *HUB} < rows.keys()

    def test_help_from_any_folder(self, tmp_path):
        command = [sys.executable, str(ROOT / "models" / "clip_utils.py"), "--help"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "--list" in result.stdout


def test_torch_is_not_needed():
    code = "import sys, models.weights.download; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
