"""The cache of decoded images: the same batches as without it, and never a stale or broken file."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from flickr8k.render_demo import render_demo
from models.errors import InputError
from models.preprocess import Preprocess, normalize
from utils import Flickr8kDataset
from utils.data.image_cache import cached_pixels
from utils.flickr8k_dataloader import TrainLoader

SIDE = 24
NAME = f"data_train_{SIDE}.pixels"
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    return render_demo(tmp_path / "data", n_train=11, n_val=3)


def decoded(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def cached(root, side=SIDE, **arguments):
    """A data set with its cache, whose pixels are those of its files."""
    dataset = Flickr8kDataset(root, side, **arguments)
    dataset.cache()
    assert torch.equal(dataset.cached, decoded(dataset))
    return dataset


def identity(file):
    """What changes when a file is written anew."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def noise(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def edit_entries(root, edit):
    path = root / "en_train.json"
    entries = json.loads(path.read_text("utf-8"))
    edit(entries)
    path.write_text(json.dumps(entries), "utf-8")


# The same inputs


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augment", [True, False])
def test_training_batches_are_those_of_the_uncached_loader(root, num_workers, augment):
    plain, fast = Flickr8kDataset(root, SIDE), cached(root)
    for seed in (0, 5):
        expected = TrainLoader(plain, 4, CPU, seed, num_workers, augment)
        loader = TrainLoader(fast, 4, CPU, seed, num_workers, augment)
        for epoch in (1, 2, 3):
            for batch, same in zip(expected.epoch(epoch), loader.epoch(epoch), strict=True):
                assert torch.equal(
                    *(one.augmented_images(Preprocess(SIDE)) for one in (batch, same))
                )
                assert torch.equal(batch.tokens, same.tokens)


def test_the_cache_holds_what_open_clip_makes_of_the_images(root):
    dataset = cached(root, is_train=False)
    transform = image_transform_v2(PreprocessCfg(size=(SIDE, SIDE)), is_train=False)
    for path, pixels in zip(dataset.image, dataset.cached, strict=True):
        torch.testing.assert_close(normalize(pixels), transform(Image.open(path)))


def test_any_batches_are_gathered(root):
    dataset = cached(root)
    pixels = decoded(dataset)

    @given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=12), max_size=5))
    def check(batches):
        gathered = list(dataset.batches(batches, num_workers=0))
        assert len(gathered) == len(batches)
        for images, batch in zip(gathered, batches, strict=True):
            assert torch.equal(images, torch.stack([pixels[i] for i in batch]))

    check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fits", [True, False])
def test_batches_on_a_gpu(root, monkeypatch, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9 if fits else 10**4, 10**9))
    dataset = Flickr8kDataset(root, SIDE)
    dataset.cache(device="cuda")
    assert dataset.cached.is_cuda == fits
    batches = [[3, 1, 3], [10]]
    for images, batch in zip(dataset.batches(batches, 0), batches, strict=True):
        assert torch.equal(images.cpu(), decoded(dataset)[batch])
    expected = TrainLoader(Flickr8kDataset(root, SIDE), 4, torch.device("cuda"))
    found = TrainLoader(dataset, 4, torch.device("cuda"))
    for batch, same in zip(expected.epoch(1), found.epoch(1), strict=True):
        assert batch.images.is_cuda and same.images.is_cuda
        assert torch.equal(batch.images, same.images) and torch.equal(batch.tokens, same.tokens)


def test_all_sets_together_take_a_quarter_of_the_free_memory(root, monkeypatch):
    """80 kB are free: 19 kB of training images go to the GPU, another 5 kB stay off it."""
    on_gpu = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: sum(p.nbytes for p in on_gpu))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda d: (80_000 - torch.cuda.memory_allocated(d), 10**9)
    )
    with FakeGpu(monkeypatch):
        for is_train in (True, False):
            dataset = Flickr8kDataset(root, SIDE, is_train=is_train)
            dataset.cache(device="cuda")
            on_gpu += [dataset.cached] if dataset.cached.is_cuda else []
            assert dataset.cached.is_cuda == is_train


@pytest.mark.parametrize("is_cached", [True, False])
def test_without_a_model_on_the_gpu_nothing_is_pinned_for_it(root, monkeypatch, is_cached):
    """--device cpu on a machine with a GPU, where pinning would open a context of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = Flickr8kDataset(root, SIDE)
    if is_cached:
        dataset.cache()
    for batch in TrainLoader(dataset, 4, CPU).epoch(1):
        assert not batch.images.is_pinned()


def test_a_transform_is_refused(root):
    with pytest.raises(InputError, match="transform"):
        Flickr8kDataset(root, SIDE, transform=lambda image: image).cache()


# One file for all runs


def test_a_file_that_is_current_is_used_as_it_is(root, tmp_path):
    cached(root)
    file = root / ".cache" / NAME
    written = identity(file)
    cached(root)
    cached(root, language="cn")  # the same images in the same order
    cached(root, side=16)
    cached(root, is_train=False)
    assert identity(file) == written
    assert len(list(file.parent.iterdir())) == 3

    (tmp_path / "elsewhere").mkdir()
    moved = root.rename(tmp_path / "elsewhere" / "data")
    cached(moved)
    assert identity(moved / ".cache" / NAME) == written


def test_another_pillow_may_decode_otherwise(root, monkeypatch):
    cached(root)
    written = identity(root / ".cache" / NAME)
    monkeypatch.setattr("PIL.__version__", "0.0")
    cached(root)
    assert identity(root / ".cache" / NAME) != written


def test_a_folder_can_be_named(root, tmp_path):
    dataset = Flickr8kDataset(root, SIDE)
    dataset.cache(tmp_path / "fast" / "disk")
    assert torch.equal(dataset.cached, decoded(dataset))
    assert [file.name for file in (tmp_path / "fast" / "disk").iterdir()] == [NAME]
    assert not (root / ".cache").exists()


def replace_image(root):
    image = root / "images" / "train_0004.png"
    times = image.stat().st_atime_ns, image.stat().st_mtime_ns
    noise(image, seed=1)
    os.utime(image, ns=times)  # only its size tells


def replace_image_by_one_of_its_size(root):
    image = root / "images" / "train_0004.png"
    noise(image.with_suffix(".bmp"), seed=1)
    shutil.copyfile(image.with_suffix(".bmp"), image)
    cached(root)
    time = image.stat().st_mtime_ns
    noise(image.with_suffix(".bmp"), seed=2)
    shutil.copyfile(image.with_suffix(".bmp"), image)
    os.utime(image, ns=(time, time + 1000))  # only its time tells


def replace_image_by_one_of_its_size_and_time(root):
    image = root / "images" / "train_0004.png"
    for seed in (1, 2):
        noise(image.with_suffix(".bmp"), seed)
        shutil.copyfile(image.with_suffix(".bmp"), image)
        os.utime(image, ns=(0, 10**18))
        if seed == 1:
            cached(root)


def add_image(root):
    noise(root / "images" / "new.png", seed=3)
    edit_entries(root, lambda e: e.insert(2, {"image": "images/new.png", "caption": "noise"}))


def swap_images_of_one_size_and_time(root):
    for seed in (1, 2):
        image = root / "images" / f"{seed}.bmp"
        noise(image, seed)
        os.utime(image, ns=(0, 10**18))
    pair = [{"image": f"images/{seed}.bmp", "caption": "noise"} for seed in (1, 2)]
    edit_entries(root, lambda entries: entries.extend(pair))
    cached(root)
    edit_entries(root, lambda entries: entries.append(entries.pop(-2)))  # only their names tell


@pytest.mark.parametrize(
    "change",
    [
        replace_image,
        replace_image_by_one_of_its_size,
        pytest.param(
            replace_image_by_one_of_its_size_and_time,
            marks=pytest.mark.skipif(os.name == "nt", reason="files have no time of their change"),
        ),
        add_image,
        lambda root: edit_entries(root, lambda entries: entries.pop(4)),
        swap_images_of_one_size_and_time,
    ],
    ids=["size", "time", "neither", "added", "removed", "reordered"],
)
def test_a_stale_file_is_written_anew(root, change):
    before = cached(root)
    pixels = before.cached.clone()
    change(root)
    after = cached(root)
    assert not torch.equal(after.cached, pixels)
    assert [file.name for file in (root / ".cache").iterdir()] == [NAME]
    if sys.platform != "win32":  # a run that goes on keeps the pixels that it has
        assert torch.equal(before.cached, pixels)


@pytest.mark.parametrize("other", [{"resize_mode": "squash"}, {"interpolation": "bilinear"}])
def test_a_model_that_resizes_otherwise_gets_pixels_of_its_own(root, other):
    """At the same side: a ViT and a Chinese-CLIP in turn."""
    for image in (root / "images").iterdir():
        noise(image, seed=1)  # not square
    pixels = cached(root).cached.clone()
    dataset = Flickr8kDataset(root, SIDE)
    dataset.preprocess = replace(dataset.preprocess, **other)
    dataset.cache()
    assert torch.equal(dataset.cached, decoded(dataset))
    assert not torch.equal(dataset.cached, pixels)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: content[:-32] + bytes(32),
        lambda content: content[1:] + b"\0",
    ],
)
def test_a_broken_file_is_written_anew(root, damage):
    dataset = cached(root)
    del dataset.cached
    file = root / ".cache" / NAME
    content = file.read_bytes()
    file.write_bytes(damage(content))
    cached(root)
    assert file.read_bytes() == content


# Two runs, an interrupted run


def test_a_run_that_finishes_while_another_writes(root):
    dataset = Flickr8kDataset(root, SIDE)
    pixels = decoded(dataset)
    file = root / ".cache" / NAME
    other = None

    def interrupted_by_the_other():
        nonlocal other
        yield pixels[:5], {}
        assert not file.exists()
        other = cached(root).cached
        yield pixels[5:], {}

    mine, _ = cached_pixels(file, dataset, interrupted_by_the_other())
    assert torch.equal(mine, pixels) and torch.equal(other, pixels)
    assert [file.name for file in file.parent.iterdir()] == [NAME]
    written = identity(file)
    cached(root)
    assert identity(file) == written


def start_together(root, barrier, wrong):
    barrier.wait()
    try:
        cached(root)
    except BaseException:
        wrong.set()
        raise


def test_two_processes_start_at_once(root):
    barrier, wrong = multiprocessing.Barrier(2), multiprocessing.Event()
    runs = [
        multiprocessing.Process(target=start_together, args=(root, barrier, wrong))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert not wrong.is_set() and [run.exitcode for run in runs] == [0, 0]
    assert [file.name for file in (root / ".cache").iterdir()] == [NAME]
    cached(root)


def test_an_interrupted_run_leaves_nothing(root):
    dataset = Flickr8kDataset(root, SIDE)
    pixels = decoded(dataset)

    def interrupted():
        yield pixels[:5], {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_pixels(root / ".cache" / NAME, dataset, interrupted())
    assert list((root / ".cache").iterdir()) == []
    cached(root)


def write_until_killed(root):
    dataset = Flickr8kDataset(root, SIDE)

    def killed():
        yield decoded(dataset)[:5], {}
        os.kill(os.getpid(), signal.SIGTERM)

    cached_pixels(root / ".cache" / NAME, dataset, killed())


def test_a_killed_run_leaves_no_file_of_the_final_name(root):
    run = multiprocessing.Process(target=write_until_killed, args=(root,))
    run.start()
    run.join()
    assert run.exitcode not in (0, 1)
    assert not (root / ".cache" / NAME).exists()
    cached(root)


# What cannot be written, what cannot be read


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(root):
    (root / ".cache").touch()
    with pytest.raises(InputError, match=rf"{NAME}: cannot be written.*--cache FOLDER") as error:
        Flickr8kDataset(root, SIDE).cache()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="nothing is read-only for this user"
)
def test_a_read_only_data_set(root, tmp_path):
    root.chmod(0o555)
    try:
        dataset = Flickr8kDataset(root, SIDE)
        with pytest.raises(InputError, match=r"Permission denied.*--cache FOLDER"):
            dataset.cache()
        dataset.cache(tmp_path / "elsewhere")
        assert torch.equal(dataset.cached, decoded(dataset))
    finally:
        root.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_what_was_there(root):
    import resource

    cached(root)
    file = root / ".cache" / NAME
    content = file.read_bytes()
    replace_image(root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\).* room"):
            Flickr8kDataset(root, SIDE).cache()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == content
    assert [file.name for file in file.parent.iterdir()] == [NAME]
    cached(root)


def test_a_disk_without_room_for_the_cache_is_left_as_it_is(root, monkeypatch):
    needed = 11 * 3 * SIDE**2  # bytes of the pixels
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(InputError, match=r"the disk has 0 MB left\); it takes 0 MB\. Make room"):
        Flickr8kDataset(root, SIDE).cache()
    assert not list((root / ".cache").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    Flickr8kDataset(root, SIDE).cache()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_remembered_and_named_when_it_is_asked_for(root, num_workers):
    image = root / "images" / "train_0007.png"
    content = image.read_bytes()
    image.write_bytes(content[:100])
    for _ in ("written", "read"):
        dataset = Flickr8kDataset(root, SIDE)
        with pytest.raises(InputError) as problem:
            dataset.reader[7]
        dataset.cache(num_workers=num_workers)
        assert dataset.unreadable == {7: str(problem.value)}
        with pytest.raises(InputError, match=r"train_0007\.png") as error:
            list(dataset.batches([[0, 1]], num_workers))
        assert "\n" not in str(error.value)
    image.write_bytes(content)
    assert cached(root).unreadable == {}
