"""The state of a run: weights, moments, averages, losses, scores."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.clip import CLIP
from models.weights.open_clip import to_open_clip
from utils.machine.precision import Precision
from utils.retrieval.scores import Scores
from utils.training.distillation import Distillation

MAX_GRAD_NORM = 1.0


class State:
    """A training run between two steps.

    model         in training
    optimizer     with its moments
    average       an exponential moving average of the weights with decay `ema`, or None
    distillation  from the starting model, or None
    precision     number formats; holds the loss scale of float16
    start         a row of the scores of the starting weights, epoch 0; None if they are random
    epochs        a row of losses and scores for each finished epoch
    losses        of the steps of the unfinished epoch, on the model's device
    baseline      recall of the starting weights, for `Guard`; empty without one
    lost          points of recall, at least and at most, if it fell clearly below; else empty
    restarts      the steps before which the run went back to the starting weights
    """

    def __init__(
        self,
        model: CLIP,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        ema: float | None = None,
        distillation: Distillation | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
        self.distillation = distillation
        self.start: dict[str, float] | None = None
        self.epochs: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.baseline: dict[str, list[float]] = {}
        self.lost: list[float] = []
        self.restarts: list[int] = []

    @property
    def scored(self) -> CLIP:
        """The model that is scored and saved: the average if there is one."""
        return self.average.module if self.average else self.model

    @property
    def is_at_start(self) -> bool:
        """Whether no step has been taken yet."""
        return not self.epochs and not self.losses

    @property
    def is_from_scratch(self) -> bool:
        """Whether the starting weights were random."""
        return self.start is None

    @property
    def best_epoch(self) -> int:
        """The number of the epoch with the best mean recall; of equal ones the first."""
        return max(self.epochs, key=lambda row: row["mean_recall"])["epoch"]

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer with the parameters' gradients; `loss` is the batch's."""
        self.precision.update(self.model, self.optimizer, MAX_GRAD_NORM)
        self.model.clamp_logit_scale()
        if self.average:
            self.average.update_parameters(self.model)
        self.losses.append(loss)

    @torch.no_grad()
    def restart(self, start: Mapping[str, Tensor], step: int) -> None:
        """Go back to the weights `start` before this step, with no moments and a new average."""
        for name, parameter in self.model.named_parameters():
            if name.endswith(".lora.b"):
                parameter.zero_()
            elif parameter.requires_grad and name in start:
                parameter.copy_(start[name])
        if self.average:
            self.average.n_averaged.zero_()  # the next step begins it
        self.optimizer.state.clear()
        self.lost = []
        self.restarts.append(step)

    def note_start(self, scores: Scores, val_loss: float, retention: dict[str, float]) -> None:
        """Keep the scores before the first step; `retention` comes from `Retention.measure`."""
        self.start = {"epoch": 0, **self._row(scores, val_loss), **retention}

    def finish_epoch(
        self,
        trained: dict[str, float],
        scores: Scores,
        val_loss: float,
        retention: dict[str, float],
    ) -> None:
        """Add the row of the epoch that has ended; `trained` comes from `Progress.summary`."""
        epoch = {"epoch": len(self.epochs) + 1, **trained}
        self.epochs.append({**epoch, **self._row(scores, val_loss), **retention})
        self.losses = []

    def _row(self, scores: Scores, val_loss: float) -> dict[str, float]:
        scale = self.scored.logit_scale.exp().item()
        return {"val_loss": val_loss, **scores.columns(), "logit_scale": scale}

    def release(self) -> None:
        """Free the memory of weights, gradients and moments, even if others refer to them."""
        start = self.distillation and self.distillation.start
        models: list[nn.Module | None] = [self.model, self.average, start]
        for parameter in (p for model in models if model for p in model.parameters()):
            parameter.data, parameter.grad = parameter.data.new_empty(0), None
        self.optimizer.state.clear()

    def state_dict(self) -> dict:
        """Everything that `restore` needs: tensors, numbers, lists and dicts."""
        return {
            "start": self.start,
            "rows": self.epochs,
            "losses": [loss.item() for loss in self.losses],
            "baseline": self.baseline,
            "lost": self.lost,
            "restarts": self.restarts,
            "config": to_open_clip(self.model.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def restore(self, saved: dict) -> None:
        """Go on from a `state_dict`. The model has its weights already."""
        moments = {"state": saved["optimizer"]["state"]}  # the settings are those of now
        self.optimizer.load_state_dict(self.optimizer.state_dict() | moments)
        if saved["scaler"]:  # empty where no loss scale was needed
            self.precision.scaler.load_state_dict(saved["scaler"])
        if self.average and saved["average"]:
            self.average.load_state_dict(saved["average"])
        self.start = saved["start"]
        self.epochs = saved["rows"]
        self.losses = list(torch.tensor(saved["losses"], device=self.model.device))
        self.baseline, self.lost = saved["baseline"], saved["lost"]
        self.restarts = saved["restarts"]
