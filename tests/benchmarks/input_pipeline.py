"""Images/s of the training input: ours with and without --cache, and open_clip's own loader.

python tests/benchmarks/input_pipeline.py --data flickr8k --workers 4

All three decode the same files and make the same whole, normalised images and the tokens of one
caption each, in batches on the device; the pixels are compared first. They take turns in one
process, and an epoch of each is timed with everything it starts. The last row stops at uint8
pixels: what is left when a GPU normalises. open_clip's loader needs `pip install webdataset
braceexpand pandas` besides the test requirements.
"""

import argparse
import csv
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from measure import Seconds, alternate, describe_cpu, print_table, times_as_fast
from open_clip import get_tokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train.data import get_csv_dataset
from torch import Tensor

from models.host import run_script
from models.preprocess import normalize
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.runs.arguments import integer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("flickr8k"), help="data set (default: %(default)s)")
    add("--workers", type=integer(0), default=4, help="default: %(default)s")
    add("--images", type=integer(1), help="take the first IMAGES only (default: all)")
    add("--side", type=integer(1), default=224, help="of the images (default: %(default)s)")
    add("--batch_size", type=integer(2), default=64, help="default: %(default)s")
    add("--repeats", type=integer(1), default=5, help="epochs of each (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.device = torch.device(args.device)

    with TemporaryDirectory() as folder:
        plain = subset(args, Path(folder))
        cached = subset(args, Path(folder))
        start = time.perf_counter()
        cached.cache(Path(folder) / "cache", args.device, args.workers)
        built = time.perf_counter() - start
        place = "the GPU" if cached.cached.is_cuda else "disk"
        print(
            f"{describe_cpu()}, {args.device}; {len(plain)} images of side {args.side}, batches of "
            f"{args.batch_size}, {args.workers} workers; cache built in {built:.1f} s, on {place}"
        )
        theirs = open_clip_loader(plain, args, Path(folder) / "captions.csv")
        for name, dataset in (("without --cache", plain), ("with --cache", cached)):
            difference = largest_difference(dataset, theirs, args)
            print(f"{name}: normalised pixels differ from open_clip's by {difference:.1e} at most")
        epochs = {
            "open_clip": lambda: (
                images.to(args.device, non_blocking=True) for images, _ in theirs
            ),
            "ours": lambda: (images for images, _ in train_loader(plain, args).epoch(1)),
            "ours, --cache": lambda: (images for images, _ in train_loader(cached, args).epoch(1)),
            "--cache, pixels": lambda: pixel_batches(cached, args),
        }
        contestants = {
            name: lambda _, epoch=epoch: deque(epoch(), maxlen=0) for name, epoch in epochs.items()
        }
        finish = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
        seconds = alternate(contestants, range(args.repeats + 1), finish)
    print_rates(seconds, len(plain))


def subset(args: argparse.Namespace, folder: Path) -> Flickr8kDataset:
    """The first training images, as many as fill whole batches, seen through `folder`."""
    entries = json.loads((args.data / "en_train.json").read_text(encoding="utf-8-sig"))
    n = min(args.images or len(entries), len(entries))
    entries = entries[: n - n % args.batch_size]
    (folder / "en_train.json").write_text(json.dumps(entries), encoding="utf-8")
    if not (folder / "images").exists():
        (folder / "images").symlink_to((args.data / "images").resolve(), target_is_directory=True)
    return Flickr8kDataset(folder, args.side)


def train_loader(dataset: Flickr8kDataset, args: argparse.Namespace) -> TrainLoader:
    return TrainLoader(
        dataset, args.batch_size, args.device, num_workers=args.workers, augment=False
    )


def open_clip_loader(dataset: Flickr8kDataset, args: argparse.Namespace, file: Path) -> Iterable:
    """open_clip's loader of each image with its first caption, in order."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption"])
        for path, captions in zip(dataset.image, dataset.own_captions.values(), strict=True):
            writer.writerow([path, dataset.text[captions[0]]])
    options = SimpleNamespace(
        val_data=str(file), csv_img_key="image", csv_caption_key="caption", csv_separator=",",
        distributed=False, batch_size=args.batch_size, workers=args.workers,
    )  # fmt: skip
    transform = image_transform_v2(PreprocessCfg(size=(args.side, args.side)), is_train=False)
    tokenizer = get_tokenizer("ViT-B-32")
    return get_csv_dataset(options, transform, is_train=False, tokenizer=tokenizer).dataloader


def pixel_batches(dataset: Flickr8kDataset, args: argparse.Namespace) -> Iterator[Tensor]:
    """The uint8 images in order."""
    batches = [rows.tolist() for rows in torch.arange(len(dataset)).split(args.batch_size)]
    return dataset.batches(batches, args.workers)


def largest_difference(
    dataset: Flickr8kDataset, theirs: Iterable, args: argparse.Namespace
) -> float:
    """Between our normalised pixels and open_clip's, over the whole set."""
    return max(
        (normalize(pixels).cpu() - images).abs().max().item()
        for pixels, (images, _) in zip(pixel_batches(dataset, args), theirs, strict=True)
    )


def print_rates(seconds: Seconds, n: int) -> None:
    rows = []
    for name, values in seconds.items():
        rates = [n / value for value in values]
        ratios = [times_as_fast(values, seconds[peer]) for peer in ("ours", "open_clip")]
        rows.append([name, *(f"{f(rates):,.0f}" for f in (median, min, max)), *ratios])
    print_table(["images/s", "median", "least", "most", "x ours", "x open_clip"], rows)


if __name__ == "__main__":
    run_script(main)
