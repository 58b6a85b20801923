"""A search among the kept features of many images, against a sort of all similarities in float64.

    python tests/benchmarks/image_search.py

Features are random and written to a store in a temporary folder, as `predict.py FOLDER` does it.
Measured are the store's size, the time to load it with the memory at the peak of that, and a query;
the first ten are checked to be those of the sort. Memory is read from /proc: Linux only.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from measure import alternate, check, describe_cpu, extra_peak_megabytes, print_table, times_as_fast
from torch import Tensor

from models.host import run_script
from utils.machine.precision import Precision
from utils.retrieval.search import most_similar
from utils.retrieval.store import FILES, Store

FIRST = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=100_000, help="default: %(default)s")
    add("--dimensions", type=int, default=512, help="of a feature (default: %(default)s, ViT-B/32)")
    add("--rounds", type=int, default=20, help="queries that count (default: %(default)s)")
    args = parser.parse_args()

    print(describe_cpu())
    random = torch.Generator().manual_seed(0)
    made = F.normalize(torch.randn(args.images, args.dimensions, generator=random), dim=-1).half()
    queries = F.normalize(torch.randn(args.rounds + 1, args.dimensions, generator=random), dim=-1)
    with tempfile.TemporaryDirectory() as folder:
        features = load_from_store(made, Path(folder))
    del made
    compare(features, queries)


def load_from_store(made: Tensor, folder: Path) -> Tensor:
    """Keep the features in a store, and print what it costs to load them again."""
    keys = [f"123456 {10**18 + i} images/{i:08}.jpg" for i in range(len(made))]
    model = SimpleNamespace(embed_dim=made.shape[1], config=None, state_dict=dict)
    precision = Precision(torch.device("cpu"), use_amp=False)
    store = Store("images", model, folder / "weights.pt", "made", precision)
    store.features_of(keys, lambda rows: (rows, made[rows]), len(keys))
    (file,) = folder.rglob(FILES)
    loaded: list[Tensor] = []
    start = time.perf_counter()
    peak = extra_peak_megabytes(lambda: loaded.append(store.features_of(keys, None, 1)[1]))
    seconds = time.perf_counter() - start
    check("features as made and as loaded", [(loaded[0] - made).abs().max().item()], 0.0)
    print()
    print_table(
        ["the store", "MB on disk", "s to load", "extra peak MB"],
        [[f"{len(made):,} images", f"{file.stat().st_size / 1e6:.0f}", f"{seconds:.2f}",
          f"{peak:.0f}"]],
    )  # fmt: skip
    return loaded[0]


def compare(features: Tensor, queries: Tensor) -> None:
    whole = features.double().numpy()
    found: dict[str, list] = {"ours": [], "a sort in float64": []}

    def ours(query: Tensor) -> None:
        found["ours"].append([i for i, _ in most_similar(features, query, FIRST)])

    def theirs(query: Tensor) -> None:
        order = np.argsort(-(whole @ query.double().numpy()), kind="stable")
        found["a sort in float64"].append(order[:FIRST].tolist())

    seconds = alternate({"ours": ours, "a sort in float64": theirs}, queries)
    check("the first ten", [float(a != b) for a, b in zip(*found.values(), strict=True)], 0.0)
    print()
    print_table(
        [f"a query among {len(features):,} images", "ms", "ours: times as fast"],
        (
            [name, f"{1000 * median(values):.0f}", times_as_fast(seconds["ours"], values)]
            for name, values in seconds.items()
        ),
    )


if __name__ == "__main__":
    run_script(main)
