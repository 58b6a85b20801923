"""Retention: scores on data sets of other images, to see what fine-tuning forgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from models.clip import CLIP
from models.errors import InputError, one_line
from utils.classification import accuracy, readable_features, zero_shot_classifier
from utils.data.annotations import caption_file
from utils.data.labelled_images import LabelledImages, find_labelled_images
from utils.data.templates import TEMPLATE_SETS
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.machine.processes import ALONE, Processes
from utils.retrieval.evaluation import Evaluator
from utils.retrieval.tables import RETENTION, points_lost


class Retention:
    """The sets named by `data`, if any: folders of class folders, data sets of torchvision, folders
    of captioned images. They are scored in float32, after `prepare_for`. `InputError` for unusable
    ones."""

    def __init__(self, data: Sequence[str], languages: Sequence[str], processes: Processes = ALONE):
        self.sets: dict[str, LabelledImages | Flickr8kDataset] = {}
        with processes.rank_0_first():  # rank 0 downloads
            for name, path in zip(names_of(data), data, strict=True):
                self.sets[name] = _find(path, languages)

    def prepare_for(self, model: CLIP, loader: TrainLoader, folder: str | None) -> None:
        """Prepare the sets for `model`, and decode all images once, into `folder` or by default
        `.cache` in each set. They stay off the GPU, whose memory training needs."""
        self.loader = loader
        for images in self.sets.values():
            if isinstance(images, Flickr8kDataset):
                images.prepare_for(model)
            else:
                images.preprocess = model.preprocess
        with loader.processes.rank_0_first():  # rank 0 decodes
            for images in self.sets.values():
                images.cache(folder or None, num_workers=loader.num_workers)

    @explained()
    def measure(self, model: CLIP, processes: Processes = ALONE) -> dict[str, float]:
        """Columns in percent: top-1 of each set of classes, mean recall of each set of captions."""
        scores = {}
        for name, images in self.sets.items():
            if isinstance(images, Flickr8kDataset):
                precision = Precision(model.device, use_amp=False)
                found, _ = Evaluator(self.loader, precision, processes).score(model, images)
                scores[RETENTION + name] = found.mean_recall
            else:
                templates = TEMPLATE_SETS[model.text_tower.templates]
                classifier = zero_shot_classifier(model, images.classes, templates, processes)
                sizes = self.loader.batch_size, self.loader.num_workers
                features = readable_features(model, images, *sizes, processes)
                found = accuracy(features.images @ classifier.T, features.labels)
                scores[RETENTION + name] = found.top1
        return scores

    def compare(self, model: CLIP, before: Mapping[str, float] | None) -> dict[str, float]:
        """`measure`, and the `points_lost` since the row `before`; empty without sets."""
        now = self.measure(model)
        return now | {"points_lost": points_lost(now, before)} if now else {}


def names_of(data: Sequence[str]) -> list[str]:
    """The names of the sets' folders, or torchvision's. Raises `InputError` for equal ones."""
    names = [one_line(Path(path).resolve().name) for path in data]
    if len(set(names)) < len(names):
        raise InputError("--retention: two sets have the same name; rename a folder")
    return names


def _find(data: str, languages: Sequence[str]) -> LabelledImages | Flickr8kDataset:
    """The set, with captions in those of `languages` that it has, or else in all that it has."""
    root = Path(data)
    having = [name for name in ("en", "cn") if caption_file(root, name, "val").is_file()]
    if not having:
        return find_labelled_images(data, option="--retention")
    wanted = [name for name in having if name in languages]
    return Flickr8kDataset(root, language=wanted or having, split="val")
