"""Features of towers of which nothing learns, computed once in a run instead of in every step."""

import argparse

from torch import Tensor

from models.clip import CLIP
from utils.data.check_images import refuse_unreadable
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.retrieval.encode import encode_images, encode_texts
from utils.training.gradients import TOWERS
from utils.training.layer_groups import learning_towers


@explained()
def cache_features(
    args: argparse.Namespace,
    model: CLIP,
    loader: TrainLoader,
    val_set: Flickr8kDataset,
    precision: Precision,
) -> dict[str, Tensor]:
    """With --cache_features, give `loader` the features of all its images or captions by the tower
    that does not learn, in the place of these, and return those of `val_set`, by tower, as
    `encode_set` takes them. They are normalised, float32.

    The images have to be the same in every epoch. Raises `InputError` with a list of the training
    images that cannot be read: in the middle of the set none can take another's place.
    """
    of_val: dict[str, Tensor] = {}
    if not args.cache_features:
        return of_val
    processes, learning = loader.processes, learning_towers(model)
    for tower in (tower for tower in TOWERS if tower not in learning):
        if tower == "image" and processes.is_first:
            refuse_unreadable([loader.dataset], loader.num_workers)
        for dataset, features in ((loader.dataset, loader.features), (val_set, of_val)):
            sizes = loader.batch_size, loader.num_workers
            with precision.autocast():
                if tower == "image":
                    features[tower] = encode_images(model, dataset, *sizes, processes)
                else:
                    features[tower] = encode_texts(model, dataset.tokens, processes=processes)
        loader.features[tower] = loader.features[tower].cpu()
    return of_val
