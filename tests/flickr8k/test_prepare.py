"""flickr8k/prepare.py, on small copies of Flickr8k in every format, which are built here."""

import csv
import functools
import hashlib
import http.server
import io
import json
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flickr8k import prepare as module
from flickr8k.own_captions import split_at_random
from flickr8k.prepare import prepare
from flickr8k.sources import SourceFile
from models.errors import InputError

SCRIPT = Path(module.__file__)
SPLITS = {
    "train": ["40_d.jpg", "10_a.jpg", "30_c.jpg", "20_b.jpg", "50_e.jpg"],
    "val": ["70_g.jpg", "60_f.jpg"],
    "test": ["90_i.jpg", "80_h.jpg"],
}
UNLISTED = ["99_in_no_split.jpg"]
STRAY = "20_b.jpg.1"  # has captions but is no image; the official file contains such a name
NAMES = [name for names in SPLITS.values() for name in names]
LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}


def make_captions(name):
    return [
        f'{name}: one sign , reading " stop , now "',
        f"{name}: two dogs , one of them wet .",
        f"{name}: three's company",
        f"{name}: vier Hunde über dem Fluß",
        f"{name}: five",
    ]


def make_image(name):
    rng = random.Random(name)
    file = io.BytesIO()
    Image.frombytes("RGB", (24, 16), rng.randbytes(24 * 16 * 3)).save(file, "JPEG")
    return file.getvalue()


CAPTIONS = {name: make_captions(name) for name in [*NAMES, *UNLISTED, STRAY]}
IMAGES = {name: make_image(name) for name in [*NAMES, *UNLISTED]}


def official_images():
    junk = {f"__MACOSX/Flicker8k_Dataset/._{name}": b"junk" for name in IMAGES}
    return junk | {f"Flicker8k_Dataset/{name}": content for name, content in IMAGES.items()}


def official_text():
    lines = [
        f"{name}#{number}\t{caption}\n"
        for name, captions in CAPTIONS.items()
        for number, caption in enumerate(captions)
    ]
    files = {"Flickr8k.token.txt": "".join(lines).encode(), "__MACOSX/._readme.txt": b"junk"}
    for split, names in SPLITS.items():
        files[f"Flickr_8k.{LISTS[split]}.txt"] = "".join(f"{name}\n" for name in names).encode()
    return files


def as_csv(captions):
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["image", "caption"])
    writer.writerows((name, text) for name, texts in captions.items() for text in texts)
    return file.getvalue().encode()


def kaggle():
    captions = {name: texts for name, texts in CAPTIONS.items() if name in IMAGES}
    files = {f"Images/{name}": content for name, content in IMAGES.items()}
    return files | {"captions.txt": as_csv(captions)}


def karpathy():
    entries = [
        {
            "filename": name,
            "split": split,
            "sentences": [{"raw": text, "tokens": text.split()} for text in CAPTIONS[name]],
        }
        for split, names in SPLITS.items()
        for name in names
    ]
    random.Random(0).shuffle(entries)
    content = json.dumps({"images": entries, "dataset": "flickr8k"}).encode()
    return {"caption_datasets/dataset_flickr8k.json": content}


def as_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def as_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def register(monkeypatch, *zips):
    """Make the MD5s of these zips the official ones."""
    for path in zips:
        monkeypatch.setitem(module.MD5, path.name, hashlib.md5(path.read_bytes()).hexdigest())


def official_zips(folder, monkeypatch):
    zips = [
        as_zip(folder / "Flickr8k_Dataset.zip", official_images()),
        as_zip(folder / "Flickr8k_text.zip", official_text()),
    ]
    register(monkeypatch, *zips)
    return zips


def files_of(root):
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def times_of(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def read_entries(root, split):
    return json.loads((root / f"en_{split}.json").read_text("utf-8"))


def check(root):
    """Assert that `root` holds the images in `SPLITS` with their captions, and nothing else."""
    annotations = {f"en_{split}.json" for split in SPLITS}
    written = {
        name: content for name, content in files_of(root).items() if "downloads/" not in name
    }
    assert written.keys() - annotations == {f"images/{name}" for name in NAMES}
    assert all(written[f"images/{name}"] == IMAGES[name] for name in NAMES)
    assert annotations <= written.keys()
    for split, names in SPLITS.items():
        entries = read_entries(root, split)
        assert len(entries) == len(names)
        captions = {entry["image"]: entry["caption"] for entry in entries}
        assert captions == {f"images/{name}": CAPTIONS[name] for name in names}


def sources_of(name, folder, monkeypatch):
    """Write the sources of a test case to `folder`, and return their paths."""
    if name == "official zips":
        return official_zips(folder, monkeypatch)
    if name == "folder of official zips":
        official_zips(folder / "deep" / "down", monkeypatch)
        return [folder]
    if name == "official folders":
        as_folder(folder / "Flickr8k_Dataset", official_images())
        as_folder(folder / "Flickr8k_text", official_text())
        return [folder]
    if name == "official lists with Windows line ends":
        text = {
            n: content.replace(b"\n", b"\r\n") + b"\r\n" for n, content in official_text().items()
        }
        return [as_folder(folder, official_images() | text)]
    if name == "Kaggle folder and official text zip":
        zips = official_zips(folder / "official", monkeypatch)
        return [as_folder(folder / "kaggle", kaggle()), zips[1]]
    if name == "Karpathy's zip and Kaggle zip":
        return [
            as_zip(folder / "archive.zip", kaggle()),
            as_zip(folder / "caption_datasets.zip", karpathy()),
        ]
    if name == "Karpathy's JSON and a folder of images":
        json_file = as_folder(folder, karpathy()) / "caption_datasets" / "dataset_flickr8k.json"
        return [json_file, as_folder(folder / "images", IMAGES)]
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "official zips",
        "folder of official zips",
        "official folders",
        "official lists with Windows line ends",
        "Kaggle folder and official text zip",
        "Karpathy's zip and Kaggle zip",
        "Karpathy's JSON and a folder of images",
    ],
)
def test_every_format_gives_the_same_set(name, tmp_path, monkeypatch, capsys):
    sources = sources_of(name, tmp_path / "source", monkeypatch)
    before = files_of(tmp_path / "source")
    root = tmp_path / "flickr8k"
    counts = prepare(root, sources)
    check(root)
    assert counts == {split: len(names) for split, names in SPLITS.items()}
    assert "at random" not in capsys.readouterr().err
    assert files_of(tmp_path / "source") == before

    times = times_of(root)
    prepare(root, sources)
    assert times_of(root) == times


def test_formats_agree_byte_for_byte(tmp_path, monkeypatch):
    names = [
        "official zips",
        "Kaggle folder and official text zip",
        "Karpathy's zip and Kaggle zip",
    ]
    sets = []
    for number, name in enumerate(names):
        sources = sources_of(name, tmp_path / f"source{number}", monkeypatch)
        prepare(tmp_path / str(number), sources)
        sets.append(files_of(tmp_path / str(number)))
    assert sets[0] == sets[1] == sets[2]


def test_a_list_with_splits_that_is_called_as_kaggles_is_not_split_at_random(tmp_path):
    table = b"image,caption,split\n1.jpg,a,train\n2.jpg,b,val\n"
    source = as_folder(tmp_path, {"captions.txt": table, "1.jpg": b"1", "2.jpg": b"2"})
    assert prepare(tmp_path / "out", [source]) == {"train": 1, "val": 1}


def test_a_random_split_is_the_same_whatever_the_order_of_the_list():
    names = [f"{number}.jpg" for number in range(80)]
    splits = split_at_random(dict.fromkeys(names).keys())
    assert split_at_random(dict.fromkeys(names[::-1]).keys()) == splits
    assert sorted(name for split in splits.values() for name in split) == sorted(names)
    assert splits["train"] != sorted(splits["train"])
    assert [len(splits[split]) for split in ("train", "val", "test")] == [60, 10, 10]


def test_kaggle_copy_alone_is_split_at_random_and_says_so(tmp_path, capsys):
    source = as_folder(tmp_path / "source", kaggle())
    for root in (tmp_path / "first", tmp_path / "second"):
        prepare(root, [source])
        said = capsys.readouterr().err
        assert "official splits" in said and "Flickr8k_text.zip" in said and "--download" in said
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    entries = {split: read_entries(root, split) for split in SPLITS}
    assert {split: len(part) for split, part in entries.items()} == {
        "train": 8,
        "val": 1,
        "test": 1,
    }
    captions = {e["image"]: e["caption"] for part in entries.values() for e in part}
    assert captions == {f"images/{name}": CAPTIONS[name] for name in IMAGES}


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n")), min_size=1))
def test_any_line_survives_the_token_file(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("tokens") / "Flickr8k.token.txt"
    lines = (f"1.jpg#{number}\t{text}\n" for number, text in enumerate(texts))
    path.write_bytes("".join(lines).encode())
    read = module.read_tokens(SourceFile(path, path.stat().st_size))
    assert read == {"1.jpg": [text.strip() for text in texts]}


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Serve the official zips on this machine, and yield the list of files that are requested."""
    official_zips(tmp_path / "server", monkeypatch)
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requested.append(Path(self.path).name)

    handler = functools.partial(Handler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(module, "RELEASE", f"http://127.0.0.1:{server.server_port}")
        yield requested
        server.shutdown()


def test_download(tmp_path, release):
    root = tmp_path / "flickr8k"
    prepare(root, download=True)
    check(root)
    assert sorted(release) == ["Flickr8k_Dataset.zip", "Flickr8k_text.zip"]
    times = times_of(root)
    prepare(root, download=True)
    assert times_of(root) == times
    (root / "downloads" / "Flickr8k_Dataset.zip").unlink()
    prepare(root, download=True)
    assert len(release) == 2


def test_a_download_that_cannot_be_had_names_the_other_way_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RELEASE", "http://127.0.0.1:1")
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "flickr8k", download=True)
    advice, _, address = str(caught.value).splitlines()
    assert "--source" in advice and "Kaggle" in advice and "captions.txt" in advice
    assert address == "from http://127.0.0.1:1/Flickr8k_text.zip"


def test_download_brings_only_what_the_sources_lack(tmp_path, release):
    root = tmp_path / "flickr8k"
    prepare(root, [as_zip(tmp_path / "archive.zip", kaggle())], download=True)
    check(root)
    assert release == ["Flickr8k_text.zip"]
    prepare(tmp_path / "other", [as_folder(tmp_path / "json", karpathy())], download=True)
    check(tmp_path / "other")
    assert release == ["Flickr8k_text.zip", "Flickr8k_Dataset.zip"]


def test_another_set_is_noticed_before_the_images_are_downloaded(tmp_path, release):
    as_folder(tmp_path / "flickr8k", {"en_test.json": b"[]"})
    with pytest.raises(InputError, match=r"en_test\.json.*another folder"):
        prepare(tmp_path / "flickr8k", download=True)
    assert release == ["Flickr8k_text.zip"]


def test_sources_may_lie_in_the_output_folder(tmp_path):
    as_zip(tmp_path / "source.zip", official_text() | official_images())
    left_by_a_killed_run = {f".images.a1b2/{NAMES[1]}": IMAGES[NAMES[1]][:-7]}
    as_folder(tmp_path, left_by_a_killed_run | {"._source.zip": b"what macOS adds"})
    prepare(tmp_path, [tmp_path])
    name = NAMES[0]
    (tmp_path / "images" / name).write_bytes(IMAGES[name][:-7])
    prepare(tmp_path, [tmp_path])
    assert all((tmp_path / "images" / n).read_bytes() == IMAGES[n] for n in NAMES)


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_karpathys_other_sets_are_prepared_too(tmp_path, name):
    """COCO calls those of its validation images that are trained on "restval"."""
    (content,) = karpathy().values()
    content = content.replace(b'"train"', b'"restval"')
    files = {f"val2014/{image}": pixels for image, pixels in IMAGES.items()}
    as_folder(tmp_path / "source", files | {f"dataset_{name}.json": content})
    prepare(tmp_path / "out", [tmp_path / "source"])
    check(tmp_path / "out")


def test_images_that_are_there_need_no_source(tmp_path):
    as_folder(tmp_path / "flickr8k" / "images", {name: IMAGES[name] for name in NAMES})
    source = as_folder(tmp_path / "json", karpathy())
    prepare(tmp_path / "flickr8k", [source])
    check(tmp_path / "flickr8k")
    (tmp_path / "flickr8k" / "images" / NAMES[3]).write_bytes(b"")
    with pytest.raises(InputError, match=rf"1 of 9 images .*{NAMES[3]}"):
        prepare(tmp_path / "flickr8k", [source])


def test_damaged_images_are_mended(tmp_path):
    source = as_folder(tmp_path / "source", official_text() | official_images())
    root = tmp_path / "flickr8k"
    prepare(root, [source])
    times = times_of(root)
    lost, empty, short = (root / "images" / name for name in NAMES[:3])
    lost.unlink()
    empty.write_bytes(b"")
    short.write_bytes(short.read_bytes()[:50])
    prepare(root, [source])
    check(root)
    assert {p for p, time in times_of(root).items() if time != times[p]} <= {lost, empty, short}


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_run_leaves_no_half_file(tmp_path, monkeypatch, raised):
    source = as_folder(tmp_path / "source", official_text() | official_images())
    root = tmp_path / "flickr8k"
    write_bytes, written = Path.write_bytes, []

    def break_off(path, content):
        written.append(path)
        if len(written) == 4:
            write_bytes(path, content[: len(content) // 2])
            raise raised
        return write_bytes(path, content)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, InputError)) as error:
        patch.setattr(Path, "write_bytes", break_off)
        prepare(root, [source])
    if error.type is InputError:
        assert str(root) in str(error.value) and "No space left" in str(error.value)
    left = files_of(root)
    assert len(left) == 3
    assert all(content == IMAGES[Path(name).name] for name, content in left.items())
    prepare(root, [source])
    check(root)


def test_another_set_is_not_overwritten(tmp_path):
    source = as_folder(tmp_path / "source", official_text() | official_images())
    root = tmp_path / "flickr8k"
    as_folder(root, {"en_val.json": b"[]"})
    with pytest.raises(InputError, match=r"en_val\.json.*another folder"):
        prepare(root, [source])
    assert files_of(root) == {"en_val.json": b"[]"}


def test_names_that_leave_the_folder_are_refused(tmp_path):
    text, name = official_text(), "../../outside.jpg"
    text["Flickr_8k.testImages.txt"] += f"{name}\n".encode()
    text["Flickr8k.token.txt"] += f"{name}#0\tA caption .\n".encode()
    archive = as_zip(tmp_path / "source.zip", text | official_images() | {name: IMAGES[NAMES[0]]})
    with pytest.raises(InputError, match=r"outside\.jpg"):
        prepare(tmp_path / "a" / "b", [archive])
    assert files_of(tmp_path).keys() == {"source.zip"}


def changed(files, name, change):
    return files | {name: change(files[name])}


def without(files, *names):
    return {name: content for name, content in files.items() if Path(name).name not in names}


def with_an_image_added(content):
    return content + NAMES[0].encode()


TOKENS, DEV, JSON = (
    "Flickr8k.token.txt",
    "Flickr_8k.devImages.txt",
    "caption_datasets/dataset_flickr8k.json",
)
OFFICIAL = official_text() | official_images()
UNUSABLE = {
    "nothing recognisable": (
        {"notes.txt": b"hello"},
        ["Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json", "--source", "--download"],
    ),
    "no images": (official_text(), ["9 of 9 images", "--source", "--download"]),
    "an image missing": (without(OFFICIAL, NAMES[1]), ["1 of 9 images", NAMES[1]]),
    "an image without captions": (
        changed(OFFICIAL, TOKENS, lambda c: c.replace(NAMES[1].encode(), b"other.jpg")),
        [NAMES[1], "no caption"],
    ),
    "an image in two splits": (
        changed(OFFICIAL, DEV, with_an_image_added),
        [NAMES[0], "2 times"],
    ),
    "a list missing": (without(OFFICIAL, DEV), [DEV, "Flickr8k_text.zip"]),
    "a list empty": (changed(OFFICIAL, DEV, lambda c: b"\n"), ["no images for val"]),
    "no tab": (changed(OFFICIAL, TOKENS, lambda c: b"a.jpg#0 caption\n" + c), [TOKENS, "line 1"]),
    "not UTF-8": (changed(OFFICIAL, TOKENS, lambda c: c + b"a.jpg#0\t\xff\n"), [TOKENS, "UTF-8"]),
    "another header": (
        changed(kaggle(), "captions.txt", lambda c: c.partition(b"\n")[2]),
        ["captions.txt", "image and caption"],
    ),
    "an unquoted comma": (
        changed(kaggle(), "captions.txt", lambda c: c + b"a.jpg,one, two\n"),
        ["captions.txt", "1 of 51 entries cannot be used", "line 52", "3 fields"],
    ),
    "an open quote": (
        changed(kaggle(), "captions.txt", lambda c: c + b'a.jpg,"one\n'),
        ["captions.txt", "broken table from line 52"],
    ),
    "broken JSON": (
        changed(karpathy() | IMAGES, JSON, lambda c: c[:-9]),
        ["dataset_flickr8k.json", "JSON"],
    ),
    "another JSON": (karpathy() | IMAGES | {JSON: b"[]"}, ["dataset_flickr8k.json", "filename"]),
    "a number too long to read": (
        changed(karpathy() | IMAGES, JSON, lambda c: c[:-1] + b', "n": ' + b"9" * 5000 + b"}"),
        ["dataset_flickr8k.json", "JSON"],
    ),
    "JSON nested too deeply": (
        karpathy() | IMAGES | {JSON: b"[" * 200_000},
        ["dataset_flickr8k.json", "JSON"],
    ),
    "JSON that is not UTF-8": (
        changed(karpathy() | IMAGES, JSON, lambda c: c.replace(b"company", b"\xff")),
        ["dataset_flickr8k.json", "UTF-8"],
    ),
    "an unknown split": (
        changed(karpathy() | IMAGES, JSON, lambda c: c.replace(b'"val"', b'"vall"')),
        ["dataset_flickr8k.json", "vall"],
    ),
    "a broken zip": (OFFICIAL | {"more.zip": b"PK\3\4 and no more"}, ["more.zip", "new copy"]),
}


@pytest.mark.parametrize("files, words", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_source_is_named(tmp_path, files, words):
    source = as_folder(tmp_path / "source", files)
    with pytest.raises(InputError) as error:
        prepare(tmp_path / "flickr8k", [source])
    message = str(error.value)
    assert len(message.splitlines()) == 1 + message.count("cannot be used; mend") + message.count(
        "hold no"
    )
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "flickr8k").exists()


def test_damage_inside_a_zip_is_found(tmp_path):
    path = as_zip(tmp_path / "source.zip", OFFICIAL)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"Flicker8k_Dataset/{NAMES[2]}")
    content = bytearray(path.read_bytes())
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    content[middle : middle + 4] = bytes(255 - byte for byte in content[middle : middle + 4])
    path.write_bytes(content)
    root = tmp_path / "flickr8k"
    with pytest.raises(InputError, match=rf"source\.zip/.*{NAMES[2]}.*new copy"):
        prepare(root, [path])
    assert files_of(root) == {f"images/{name}": IMAGES[name] for name in NAMES[:2]}


def test_script(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    as_folder(tmp_path / "kept apart", OFFICIAL)
    first = run("--source", "kept apart", "--output", "made")
    assert first.returncode == 0, first.stderr
    assert "5 training, 2 validation and 2 test images" in first.stdout
    check(tmp_path / "made")
    nothing = run()
    assert nothing.returncode == 2
    assert "--download" in nothing.stderr and "--source" in nothing.stderr
    absent = run("--source", "nowhere", "--output", "other")
    assert absent.returncode == 2
    assert absent.stderr.startswith("error: nowhere") and "Traceback" not in absent.stderr
    assert "Traceback" in run("--source", "nowhere", "--output", "other", "--debug").stderr


def test_script_takes_a_tilde_and_refuses_empty_paths(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    as_folder(tmp_path / "kept apart", OFFICIAL)
    for source, output in (("~/kept apart", "~/made"), ("", "made"), ("~/kept apart", "")):
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--source", source, "--output", output])
        if source and output:
            module.main()
            check(tmp_path / "made")
        else:
            with pytest.raises(InputError, match="the path is empty"):
                module.main()


def test_preparing_does_not_load_torch():
    code = "import sys, flickr8k.prepare, models.weights.download; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], check=True)
