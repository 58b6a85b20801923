"""Evaluation of a model on captioned images: retrieval scores and the validation loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import CLIP
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.loss import contrastive_loss
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.machine.processes import ALONE, Processes
from utils.retrieval.encode import Features, encode_set
from utils.retrieval.scores import Scores, score_features


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models with the batch size, workers and captions per image of the `loader`."""

    loader: TrainLoader
    precision: Precision
    processes: Processes = ALONE

    def encode(
        self, model: CLIP, dataset: Flickr8kDataset, cached: Mapping[str, Tensor] | None = None
    ) -> Features:
        """`encode_set` with these settings."""
        settings = self.loader.batch_size, self.loader.num_workers, self.precision, self.processes
        return encode_set(model, dataset, *settings, cached=cached)

    @explained()
    @torch.inference_mode()
    def score(
        self, model: CLIP, dataset: Flickr8kDataset, cached: Mapping[str, Tensor] | None = None
    ) -> tuple[Scores, float]:
        """Retrieval scores on the whole set, and its loss: `contrastive_loss`, averaged over the
        images, of batches of images in their order, each with its first captions (repeated where it
        has fewer). The last batch may be smaller, with fewer negatives."""
        features = self.encode(model, dataset, cached)
        if not self.processes.is_rank_0:
            return self.processes.broadcast(None)
        scores = score_features(*features, dataset.img_to_txt, dataset.txt_to_img)
        k = self.loader.captions_per_image
        loss = 0.0
        for rows in torch.arange(len(dataset)).split(self.loader.batch_size):
            own = [dataset.own_captions[row] for row in rows.tolist()]
            width = max(k, *map(len, own))
            captions = torch.tensor([[c[i % len(c)] for i in range(width)] for c in own])
            texts = features.texts[captions[:, :k].flatten()]
            of_batch = contrastive_loss(
                features.images[rows], texts, model.logit_scale,
                texts=dataset.text_ids[captions], logit_bias=model.logit_bias,
            )  # fmt: skip
            loss += of_batch.item() * len(rows) / len(dataset)
        return self.processes.broadcast((scores, loss))
