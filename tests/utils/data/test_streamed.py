"""Training from tar shards that are streamed, compared with the list of the same images."""

import io
import json
import pickle
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from caption_files import write_tar
from PIL import Image
from tiny import READING, tiny_clip

from models.errors import InputError
from utils import Flickr8kDataset, flickr8k_dataloader
from utils.data.streamed import Stream
from utils.flickr8k_dataloader import StreamLoader
from utils.machine.processes import Processes

pytest.importorskip("webdataset")
CPU = torch.device("cpu")
MODEL = tiny_clip(READING)


def encoded(number):
    """A picture whose first pixel tells its number."""
    pixels = np.full((32, 32, 3), (number // 256, number % 256, 7), np.uint8)
    Image.fromarray(pixels).save(stream := io.BytesIO(), "png")
    return stream.getvalue()


def members(number):
    return {f"{number:05}.png": encoded(number), f"{number:05}.txt": f"number {number}".encode()}


def write_shards(folder, shards, size, stats=False):
    """Shards of so many samples each; returns webdataset's name of them."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        content = {}
        for number in range(shard * size, (shard + 1) * size):
            content |= members(number)
        write_tar(folder / f"{shard:05}.tar", content)
        if stats:
            (folder / f"{shard:05}_stats.json").write_text(json.dumps({"successes": size}))
    return f"{folder.as_posix()}/{{00000..{shards - 1:05}}}.tar"


def loader_of(patterns, batch_size, samples=None, **options):
    stream = Stream([patterns] if isinstance(patterns, str) else patterns, samples)
    stream.prepare_for(MODEL)
    return StreamLoader(stream, batch_size, CPU, **{"augment": False, **options})


def numbers(batch):
    return [int(256 * high + low) for high, low in batch.images[:, :2, 0, 0].tolist()]


def steps(loader, epoch=1, start=0):
    return [numbers(batch) for batch in loader.epoch(epoch, start)]


@pytest.mark.parametrize("batch_size", [8, 6])
def test_two_processes_of_two_workers_see_each_sample_once_an_epoch(batch_size, tmp_path):
    """Also where the workers have unequal parts of a batch, 2 and 1."""
    pattern = write_shards(tmp_path, 4, 6)
    loaders = [
        loader_of(pattern, batch_size, num_workers=2, processes=Processes(rank, 2))
        for rank in range(2)
    ]
    for_epochs = []
    for epoch in (1, 2):
        parts = [steps(loader, epoch) for loader in loaders]
        assert [len(part) for part in parts] == [24 // batch_size] * 2
        seen = [n for part in parts for step in part for n in step]
        assert sorted(seen) == list(range(24))
        for_epochs.append(seen)
    assert for_epochs[0] != for_epochs[1]


def test_an_epoch_has_equally_many_steps_in_processes_with_unequal_shards(tmp_path):
    pattern = write_shards(tmp_path, 3, 5)
    parts = [steps(loader_of(pattern, 4, processes=Processes(rank, 2))) for rank in range(2)]
    assert [list(map(len, part)) for part in parts] == [[2, 2, 2], [2, 2, 2]]
    few = [n for part in parts for step in part for n in step]
    assert max(Counter(few).values()) <= 2  # one process goes on with its shard


def test_a_batch_has_what_the_list_has_of_the_same_samples(tmp_path):
    """And so the same loss."""
    pattern = write_shards(tmp_path / "train", 2, 4)
    (batch,) = loader_of(pattern, 8).epoch(1)
    dataset, rows = Flickr8kDataset(tmp_path, model=MODEL), numbers(batch)
    assert torch.equal(batch.images, torch.stack([dataset[row][0] for row in rows]))
    assert torch.equal(batch.tokens, dataset.tokens[rows])
    assert batch.texts.shape == (8, 1) and len(batch.texts.unique()) == 8
    assert batch.crops is None and batch.altered is None


def test_equal_texts_are_positives_in_all_processes(tmp_path):
    """Tokens decide, as in lists: case and space do not count. JSON's captions are read too."""
    texts = ["A dog", "a  dog ", "a cat"]
    content = {}
    for number, text in enumerate(texts * 2):
        content |= {f"{number}.png": encoded(number)}
        content |= {f"{number}.json": json.dumps({"caption": text, "url": "x"}).encode()}
    shards = [tmp_path / f"{number}.tar" for number in range(2)]
    for shard in shards:
        write_tar(shard, content)
    ids = {}
    for rank in range(2):
        (batch,) = loader_of(list(map(str, shards)), 12, processes=Processes(rank, 2)).epoch(1)
        ids[rank] = dict(zip(numbers(batch), batch.texts[:, 0].tolist(), strict=True))
    assert ids[0] == ids[1]
    assert ids[0][0] == ids[0][1] == ids[0][3] != ids[0][2] == ids[0][5]


def test_broken_samples_are_counted_and_left_out(tmp_path, capsys):
    pattern = write_shards(tmp_path, 3, 6, stats=True)
    content = {}
    for number in range(100, 106):
        content |= members(number)
    del content["00101.txt"]
    content["00102.png"] = b"no image"
    content["00103.txt"] = b"\xff"
    content["00104.txt"] = b"  "
    write_tar(tmp_path / "00000.tar", content)
    cut = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(cut[: 3 * 2048 + 600])  # in the fourth image
    loader = loader_of(pattern, 6, num_workers=1)
    seen = [n for step in steps(loader) for n in step]
    assert len(seen) == 18 and set(seen) == {100, 105, 6, 7, 8, *range(12, 18)}
    assert max(Counter(seen).values()) <= 2
    (line,) = capsys.readouterr().out.splitlines()
    told = r"samples of the stream that cannot be read: (\d+); the first: (.*)"
    count, first = re.fullmatch(told, line).groups()
    assert int(count) >= 5 and ".tar" in first


def test_where_nothing_can_be_read_the_epoch_ends(tmp_path):
    loader = loader_of(write_shards(tmp_path, 1, 4), 4)
    write_tar(tmp_path / "00000.tar", {"1.png": b"", "1.txt": b"a"})
    with pytest.raises(InputError, match=r"no sample of any shard .*/1.png: not an image"):
        steps(loader)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(InputError, match=r"no sample of any shard .*/00000.tar: No such file"):
        steps(loader)


def test_a_resumed_epoch_goes_on_with_the_samples_not_yet_seen(tmp_path):
    pattern = write_shards(tmp_path, 4, 6)
    options = {"num_workers": 2, "augment": True, "seed": 3, "alter": True}
    whole = list(loader_of(pattern, 5, **options).epoch(2))
    rest = list(loader_of(pattern, 5, **options).epoch(2, 2))
    assert len(rest) == 2
    for found, expected in zip(rest, whole[2:], strict=True):
        assert numbers(found) == numbers(expected) and torch.equal(found.crops, expected.crops)
        assert torch.equal(found.altered.tokens, expected.altered.tokens)


def test_workers_that_are_no_forks_read_the_same(tmp_path):
    """What such a worker gets is pickled."""
    pattern, made = write_shards(tmp_path, 1, 4), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flickr8k_dataloader, "read_in_workers", lambda parts, _: made.append(parts))
        with pytest.raises(TypeError):
            steps(loader_of(pattern, 4))
    (first,), (second,) = made[0], pickle.loads(pickle.dumps(made[0]))
    assert torch.equal(first.images, second.images) and first.captions == second.captions


def test_random_choices_do_not_depend_on_the_number_of_processes(tmp_path):
    pattern = write_shards(tmp_path, 2, 4)
    (whole,) = loader_of(pattern, 8, augment=True).epoch(1)
    halves = [
        next(loader_of(pattern, 8, augment=True, processes=Processes(rank, 2)).epoch(1))
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([half.crops for half in halves]), whole.crops)


def test_samples_are_counted_beside_or_in_the_shards_or_given(tmp_path):
    pattern = write_shards(tmp_path, 2, 3)
    assert len(Stream([pattern])) == 6
    assert len(Stream([pattern, f"{tmp_path}/00001.tar"])) == 9  # as a shell expands names
    (tmp_path / "00000_stats.json").write_text('{"successes": 40}')
    assert len(Stream([pattern])) == 6  # of one shard only
    (tmp_path / "00001_stats.json").write_text('{"successes": 2}')
    assert len(Stream([pattern])) == 42 and len(Stream([pattern], 7)) == 7
    piped = f"pipe:cat {pattern}"
    assert len(Stream([piped], 6)) == 6
    with pytest.raises(InputError, match="give --stream_samples N"):
        Stream([piped])


@pytest.mark.skipif(sys.platform == "win32", reason="has no cat")
def test_a_command_can_give_the_shards(tmp_path):
    pattern = write_shards(tmp_path, 2, 4)
    assert steps(loader_of(f"pipe:cat {pattern}", 4, 8)) == steps(loader_of(pattern, 4))


def test_what_the_start_can_know_is_told_then(tmp_path):
    pattern = write_shards(tmp_path, 2, 3, stats=True)

    def refused(patterns, text):
        with pytest.raises(InputError, match=text):
            loader_of(patterns, 3, processes=Processes(0, 3))

    refused(pattern, "2 shards are fewer than the 3 processes")
    refused(f"{tmp_path}/{{0..", "Unbalanced braces")
    (tmp_path / "00001.tar").write_bytes(b"<html>")
    refused(pattern.replace("1}", "2}"), "2 of 3 shards are .* no tars: .*00001.tar, .*00002.tar;")
    (tmp_path / "00000_stats.json").unlink()
    write_tar(tmp_path / "00001.tar", {"1.png": b"", "1.txt": b"a", "2.jpg": b""})
    refused(pattern, r"00001.tar/2: should be an image beside a .txt or a .json; it has .jpg")


def test_without_webdataset_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(InputError, match="pip install webdataset"):
        Stream([str(tmp_path)])


def test_a_fingerprint_tells_shards_and_samples_wherever_they_lie(tmp_path):
    first, second = (write_shards(tmp_path / name, 2, 2) for name in "ab")
    assert Stream([first]).fingerprint() == Stream([second]).fingerprint()
    assert Stream([first], 5).fingerprint() != Stream([first]).fingerprint()
    others = write_shards(tmp_path / "c", 1, 4)
    assert (
        len(Stream([others])) == 4
        and Stream([others]).fingerprint() != Stream([first]).fingerprint()
    )
