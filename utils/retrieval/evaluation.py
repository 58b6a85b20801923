"""TODO."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from models.clip import CLIP
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.loss import contrastive_loss
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.machine.processes import ALONE, Processes
from utils.metric import retrieval_metrics
from utils.retrieval.encode import encode_set
from utils.retrieval.tables import K_VALUES, Metrics


@explained()
@torch.inference_mode()
def evaluate(
    model: CLIP,
    dataset: Flickr8kDataset,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    k_values: Iterable[int] = K_VALUES,
    processes: Processes = ALONE,
    captions_per_image: int = 1,
    known: Mapping[str, Tensor] | None = None,
) -> tuple[Metrics, float]:
    """Retrieval metrics over the whole set, and its loss.

    The loss is that of training, `contrastive_loss` of batches of `batch_size` images, each with
    its first `captions_per_image` captions (from the first on again where it has fewer), averaged
    over the images: the last batch, which may be smaller, counts by its number of images. So it can
    be compared with the training loss for the same two numbers, up to what the last batch, with
    fewer wrong answers, makes it smaller; a set smaller than `batch_size` is such a batch. Features
    that are `known`, by tower, are not computed.
    """
    features = encode_set(model, dataset, batch_size, num_workers, precision,
                          processes=processes, known=known)  # fmt: skip
    if not processes.is_rank_0:
        return processes.broadcast(None)
    metrics = retrieval_metrics(*features, dataset.img_to_txt, dataset.txt_to_img, k_values)
    own = dataset.own_captions.values()
    width = max(captions_per_image, *map(len, own))
    captions = torch.tensor([[c[i % len(c)] for i in range(width)] for c in own])
    loss = 0.0
    for rows in torch.arange(len(dataset)).split(batch_size):
        texts = features.texts[captions[rows, :captions_per_image].flatten()]
        of_batch = contrastive_loss(features.images[rows], texts, model.logit_scale,
                                    texts=dataset.text_ids[captions[rows]])  # fmt: skip
        loss += of_batch.item() * len(rows) / len(dataset)
    return processes.broadcast((metrics, loss))
