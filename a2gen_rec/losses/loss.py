"""Losses as functions of (output, batch): METHODS §4.

Every term is a sum over its own valid steps; dividing by the global batch's counts makes the mean the same on any
number of ranks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import COUNT_NAMES, WindowBatch
from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.objectives import UncertaintyWeighting, objective_losses
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.losses.towers import occurrence_bce, tower_loss_sums
from a2gen_rec.models.a2gen import A2GenOutput, OccurrenceHeadOutput
from a2gen_rec.models.base import TargetEncoding
from a2gen_rec.models.baselines.towers import TowerOutput
from a2gen_rec.nn.generator import StepPredictions

_TERMS: dict[str, tuple[str, Callable[[LossConfig], float]]] = {
    "action": ("steps", lambda config: config.action_weight),
    "time": ("timed_steps", lambda config: config.time_weight),
    "order": ("ordered_pairs", lambda config: config.order_weight),
    "label": ("labels", lambda config: config.label_weight),
    "draft_action": ("steps", lambda config: config.draft_weight),
    "draft_time": ("timed_steps", lambda config: config.draft_weight * config.time_weight),
    "occurrence": ("targets", lambda config: config.occurrence_weight),
}
"""Of each, the count that it is a mean over, and its weight."""
TERM_NAMES = tuple(_TERMS)
"""Terms that every loss has; those of the model's objectives follow. Without a generator, only the actions' (whether
they happen), the times' and the labels' apply."""
_MEAN_OVER = tuple(COUNT_NAMES.index(over) for over, _ in _TERMS.values())


def term_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """All terms of a model that predicts the objectives ``tasks`` beside actions and labels."""
    return (*TERM_NAMES, *tasks)


def loss_sums(output: A2GenOutput | TowerOutput, batch: WindowBatch, config: LossConfig) -> Tensor:
    """Sums of the loss terms over this batch.

    Returns:
        [terms], in the order of ``TERMS`` and then of the predicted objectives; terms that do not apply are 0.
    """
    if isinstance(output, A2GenOutput):
        label, time = batch.step_label, batch.step_time
        order, base = _order_sum(output.steps, label, time, batch, config.order_power), output.context.sum() * 0
        draft = (base, base) if output.draft is None else _step_sums(output.draft, label, time, config)
        acts = _step_sums(output.steps, label, time, config)
        occurring = base if output.occurrence is None else _occurrence_sum(output.occurrence, batch)
    else:
        order = base = output.context.sum() * 0
        events, times = tower_loss_sums(output.event_logits, output.time, batch, config.time_loss)
        acts, draft, occurring = (events.sum(), times.sum()), (base, base), base
    labels = _label_sums(output.label_logits, batch.labels).sum()
    always = torch.stack([*acts, order, labels, *draft, occurring])
    predicted = output.objective_logits.shape[1]
    objectives, _ = objective_losses(
        output.objective_logits, output.watch_time, batch.objectives[:, :predicted], batch.watch_s, config.time_loss
    )
    return torch.cat([always, objectives.to(always.dtype)])


def task_losses(
    output: TowerOutput, batch: WindowBatch, config: LossConfig, tasks: Sequence[str], timed: Tensor
) -> Tensor:
    """What each tower has in the loss; their sum is the loss.

    Args:
        tasks: the objectives; timed: [times] codes of the actions that have a tower for their time.

    Returns:
        [towers] weighted means: of events, labels, objectives, then times.
    """
    predicted = output.objective_logits.shape[1]
    events, times = tower_loss_sums(output.event_logits, output.time, batch, config.time_loss)
    labels = _label_sums(output.label_logits, batch.labels)
    objectives, _ = objective_losses(
        output.objective_logits, None, batch.objectives[:, :predicted], batch.watch_s, config.time_loss
    )
    terms = len(TERM_NAMES) + predicted
    weight = events.new_tensor(_weights(config, tasks)) / term_counts(terms, batch.counts, False).clamp(min=1).to(
        events
    )
    action, time, label = (weight[TERM_NAMES.index(name)] for name in ("action", "time", "label"))
    return torch.cat([action * events, label * labels, weight[len(TERM_NAMES) :] * objectives, time * times[timed]])


def term_means(sums: Tensor, counts: Tensor, generated: bool = True) -> Tensor:
    """[terms] as means, given ``sums`` [terms] and ``counts`` of the same (global) batches.

    Args:
        generated: by a generator, whose action term is a mean over steps; else it is one over targets.
    """
    return sums / term_counts(len(sums), counts, generated).clamp(min=1).to(sums)


def term_counts(terms: int, counts: Tensor, generated: bool = True) -> Tensor:
    """[terms] what each term is a mean over."""
    of_actions = _MEAN_OVER[0] if generated else COUNT_NAMES.index("targets")
    of_objectives = range(len(COUNT_NAMES), len(COUNT_NAMES) + terms - len(TERM_NAMES))
    return counts[[of_actions, *_MEAN_OVER[1:], *of_objectives]]


def total_loss(terms: Tensor, config: LossConfig, tasks: Sequence[str] = ()) -> Tensor:
    """The weighted sum of terms [terms], of which those after ``TERMS`` are of the objectives ``tasks``."""
    return (terms * terms.new_tensor(_weights(config, tasks))).sum()  # as a matrix product, autocast would round it


def validate_objective_weights(config: LossConfig, tasks: Sequence[str]) -> None:
    """Raise a ConfigError for the weight of an objective that is not predicted."""
    for name in config.objective_weights:
        if name not in tasks:
            predicted = f"this run predicts {', '.join(tasks)}" if tasks else "this run predicts none"
            raise ConfigError(f"loss.objective_weights.{name}: no such objective; {predicted}")


class Loss(nn.Module):
    """The training loss as a leaf module, so that pipelines need not look into it.

    Args:
        world: number of ranks; undoes the averaging of gradients over them, the counts being global already.
        tasks: objectives that the model predicts beside actions and labels.
        timed: as :func:`task_losses` takes, for the loss of each tower in place of their sum.
    """

    timed: Tensor | None

    def __init__(
        self, config: LossConfig, world: int = 1, tasks: Sequence[str] = (), timed: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config, self.world, self.tasks = config, world, tuple(tasks)
        self.register_buffer("timed", timed, persistent=False)
        squared = [task == WATCH_TIME and config.time_loss == "mse" for task in ("label", *tasks)]
        self.learned = UncertaintyWeighting(squared, world) if config.uncertainty_weighting else None

    def forward(
        self, output: A2GenOutput | TowerOutput, batch: WindowBatch
    ) -> tuple[Tensor, tuple[Tensor, TargetEncoding]]:
        """The loss to differentiate (each tower's, if so made), and (detached sums of the terms [terms], output)."""
        sums = loss_sums(output, batch, self.config)
        if self.timed is not None and isinstance(output, TowerOutput):
            losses = task_losses(output, batch, self.config, self.tasks, self.timed)
            return losses * self.world, (sums.detach(), output)
        terms = term_means(sums, batch.counts, isinstance(output, A2GenOutput))
        loss = (
            total_loss(terms, self.config, self.tasks) if self.learned is None else self._by_uncertainty(terms, batch)
        )
        return loss * self.world, (sums.detach(), output)

    def _by_uncertainty(self, terms: Tensor, batch: WindowBatch) -> Tensor:
        """The labels' and objectives' terms by learned weights, the generator's by those of the configuration."""
        assert self.learned is not None
        chosen = [TERM_NAMES.index("label"), *range(len(TERM_NAMES), len(terms))]
        others = terms.index_fill(0, torch.tensor(chosen, device=terms.device), 0)
        counts = term_counts(len(terms), batch.counts)[chosen]
        return total_loss(others, self.config, self.tasks) + self.learned(terms[chosen], counts)


def _weights(config: LossConfig, tasks: Sequence[str]) -> list[float]:
    always = [weight(config) for _, weight in _TERMS.values()]
    return [*always, *(config.objective_weights.get(task, config.default_objective_weight) for task in tasks)]


def _step_sums(steps: StepPredictions, label: Tensor, time: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    action = F.cross_entropy(steps.logits, label, reduction="sum")
    known = torch.isfinite(time)
    error = _at(steps.time, label) - torch.where(known, time, 0)
    if steps.log_scale is not None:
        log_scale = _at(steps.log_scale, label)
        each = 0.5 * (error / log_scale.exp()).square() + log_scale
    else:
        each = error.square() if config.time_loss == "mse" else error.abs()
    return action, torch.where(known, each, 0).sum()


def _order_sum(steps: StepPredictions, label: Tensor, time: Tensor, batch: WindowBatch, power: float) -> Tensor:
    """Σ max(t̂_{i−1} − t̂_i, 0)^p over neighbouring steps of one target whose times are both recorded."""
    predicted = _at(steps.time, label)
    back = F.relu(predicted[:-1] - predicted[1:])
    # The power's gradient at 0 is not finite for p < 1 and costs a NaN when masked afterwards.
    return torch.where(batch.timed_pairs & (back > 0), back.clamp(min=torch.finfo(back.dtype).tiny) ** power, 0).sum()


def _occurrence_sum(occurring: OccurrenceHeadOutput, batch: WindowBatch) -> Tensor:
    """Σ over targets and actions of the binary cross-entropy, in units of the action's own entropy."""
    happened, _ = target_outcomes(batch, len(occurring.entropy) + 2)
    return (occurrence_bce(occurring.logits, happened) / occurring.entropy).sum()


def _label_sums(logits: Tensor, labels: Tensor) -> Tensor:
    known = torch.isfinite(labels)
    target = torch.where(known, labels, 0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(known, each, 0).sum(0)


def _at(values: Tensor, label: Tensor) -> Tensor:
    return values.gather(1, label[:, None]).squeeze(1)
