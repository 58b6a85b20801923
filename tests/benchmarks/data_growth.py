"""What a list of many images costs before the first step: CPU seconds, and main memory.

    python tests/benchmarks/data_growth.py --images 10000 100000 1000000

A list of so many images with five captions each is written into a temporary folder: captions of
twelve words, frequent and rare ones, and small JPEG files in folders of 10,000, which are links to
one file a folder. A process of its own then does what train.py does with the data until the first
batch has come: it reads the lists, looks for the images, finds equal captions, prints the
warnings, and draws the first epoch. Its memory is that at the peak, with torch; the seconds are
without the imports. Then two workers read 3,200 images, forked or spawned; the memory is what one
of them has for itself alone. Linux only.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from measure import in_a_process, print_table
from PIL import Image

from models.host import run_script

CAPTIONS, WORDS = 5, 12  # of an image, of a caption
VOCABULARY = 20_000  # words
PER_FOLDER = 10_000  # images; a file has at most 65,000 links in ext4
BATCH_SIZE, STEPS = 64, 50


def write_data(root: Path, images: int, seed: int = 0) -> None:
    """A training list of so many images, and a validation list of the first ten."""
    from models.tokens import clip_tokenizer

    rng = np.random.default_rng(seed)
    endings = (token.removesuffix("</w>") for token in clip_tokenizer().decoder[512:])
    words = [word for word in endings if word.isalpha() and word.isascii()][:VOCABULARY]
    picture = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    with (root / "en_train.json").open("w", encoding="utf-8") as file:
        for i in range(images):
            folder, name = f"images/{i // PER_FOLDER:05}", f"{i:09}.jpg"
            if i % PER_FOLDER == 0:
                (root / folder).mkdir(parents=True)
                picture.save(first := root / folder / name)
            else:
                os.link(first, root / folder / name)
            drawn = (rng.random((CAPTIONS, WORDS)) ** 3 * len(words)).astype(int).tolist()
            captions = [" ".join([words[word] for word in row]) for row in drawn]
            entry = json.dumps({"image": f"{folder}/{name}", "caption": captions})
            file.write(("[" if i == 0 else ",\n") + entry)
        file.write("]\n")
    with (root / "en_train.json").open(encoding="utf-8") as file:
        first = "".join(next(file) for _ in range(10))
    (root / "en_val.json").write_text(first.removesuffix(",\n") + "]", encoding="utf-8")


def start_training(root: Path, method: str) -> list[float]:
    """CPU seconds and the peak of memory in MB until the first batch is there, and the MB of a
    worker after `STEPS` batches, started by `method`."""
    import multiprocessing

    import torch

    from models.clip_utils import create_model
    from utils.flickr8k_dataloader import TrainLoader
    from utils.machine.processes import ALONE
    from utils.training.progress import caption_warnings
    from utils.training.settings import read_data

    multiprocessing.set_start_method(method, force=True)
    model = create_model("ViT-demo", None)
    started = time.process_time()
    last = started

    def tell(what: str) -> None:
        nonlocal last
        now, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"  {what}: {now - last:.1f} s, peak {peak:,.0f} MB", flush=True)
        last = now

    sets = read_data(root, ["en"], BATCH_SIZE, ALONE)
    tell("lists and files")
    for dataset in sets.values():
        dataset.prepare_for(model)
        len(dataset.text_ids)
    tell("equal captions")
    loader = TrainLoader(sets["train"], BATCH_SIZE, torch.device("cpu"), num_workers=2,
                         captions_per_image=2)  # fmt: skip
    for dataset in sets.values():
        dataset.fingerprint()
    tell("fingerprint")
    for line in caption_warnings(sets["train"], sets["val"]):
        print(line)
    tell("warnings")
    batches = loader.epoch(1)
    next(batches)
    tell("first batch")
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    for _ in range(STEPS - 1):
        next(batches)
    worker = multiprocessing.active_children()[0].pid
    return [seconds, peak, private_megabytes(worker)]


def private_megabytes(process: int) -> float:
    """The main memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[10_000, 100_000], help="default: %(default)s")
    add("--folder", help="for the temporary files (default: the system's)")
    args = parser.parse_args()
    rows = []
    for images in args.images:
        with TemporaryDirectory(dir=args.folder) as folder:
            write_data(Path(folder), images)
            size = (Path(folder) / "en_train.json").stat().st_size / 1e6
            print(f"{images:,} images, a list of {size:,.0f} MB", flush=True)
            seconds, peak, forked = in_a_process(start_training, Path(folder), "fork")
            *_, spawned = in_a_process(start_training, Path(folder), "spawn")
        rows.append([f"{images:,}", *(f"{n:,.0f}" for n in (seconds, peak, forked, spawned))])
    header = ["images", "CPU seconds", "peak, MB", "forked worker, MB", "spawned worker, MB"]
    print_table(header, rows)


if __name__ == "__main__":
    run_script(main)
