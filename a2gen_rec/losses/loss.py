"""Training losses as functions of (output, batch): METHODS §4.

Every term is a sum over its own valid steps. Division by the counts of the global batch makes the mean independent
of the number of ranks. Outcomes without positives in training are ignored: their error says nothing about
learning, but could dominate a validation loss.
"""

from collections.abc import Callable, Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import COUNT_NAMES, WindowBatch
from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.objectives import UncertaintyWeighting, binary_loss_sums, objective_losses
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.losses.towers import occurrence_bce, tower_loss_sums
from a2gen_rec.models.a2gen import A2GenOutput, OccurrenceHeadOutput
from a2gen_rec.models.base import RankerOutput
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
    "wide": ("targets", lambda config: config.wide_weight),
}
"""Term -> (count that the term is a mean over, weight of the term)."""
TERM_NAMES = tuple(_TERMS)
"""Terms of every loss; the terms of the model's objectives follow. Rankers without a generator use only ``action``
(whether each action occurs), ``time`` and ``label``; their other terms are 0."""
_IGNORED = -1
"""Label of steps that no loss uses."""
_COUNT_INDEX = tuple(COUNT_NAMES.index(count) for count, _ in _TERMS.values())


def term_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all terms of a model that predicts the objectives ``tasks``."""
    return (*TERM_NAMES, *tasks)


@singledispatch
def loss_sums(output: RankerOutput, batch: WindowBatch, config: LossConfig) -> Tensor:
    """Return the sums of the loss terms over this batch.

    Dispatches on the type of ``output``.

    Returns:
        [terms] in the order of :data:`TERM_NAMES`, then of the predicted objectives; terms that do not apply are 0.

    Raises:
        TypeError: No loss is registered for the type of ``output``.
    """
    raise TypeError(f"no loss is registered for {type(output).__name__}")


@loss_sums.register
def _generator_loss_sums(output: A2GenOutput, batch: WindowBatch, config: LossConfig) -> Tensor:
    label, time = _trained_steps(output, batch)
    order, zero = _order_sum(output, batch, config.order_power), output.context.sum() * 0
    draft = (zero, zero) if output.draft is None else _step_sums(output.draft, label, time, config)
    steps = _step_sums(output.steps, label, time, config)
    occurrence = (
        zero if output.occurrence is None else _occurrence_sum(output.occurrence, batch, _trained_actions(output))
    )
    return _join_terms(output, batch, config, steps, order, draft, occurrence)


@loss_sums.register
def _tower_loss_sums(output: TowerOutput, batch: WindowBatch, config: LossConfig) -> Tensor:
    zero = output.context.sum() * 0
    events, times = tower_loss_sums(output.event_logits, output.time, batch, config.time_loss, _trained_actions(output))
    return _join_terms(output, batch, config, (events.sum(), times.sum()), zero, (zero, zero), zero)


def _join_terms(
    output: RankerOutput,
    batch: WindowBatch,
    config: LossConfig,
    steps: tuple[Tensor, Tensor],
    order: Tensor,
    draft: tuple[Tensor, Tensor],
    occurrence: Tensor,
) -> Tensor:
    """Return [terms]: the given sums, and those of labels and objectives, which all outputs share."""
    labels = _label_sums(output, batch).sum()
    terms = torch.stack([*steps, order, labels, *draft, occurrence, _wide_sum(output, batch, config)])
    objectives, _ = objective_losses(
        output.objective_logits,
        output.watch_time,
        _trained_objectives(output, batch),
        batch.watch_s,
        config.time_loss,
    )
    return torch.cat([terms, objectives.to(terms.dtype)])


def task_losses(
    output: TowerOutput, batch: WindowBatch, config: LossConfig, tasks: Sequence[str], timed_actions: Tensor
) -> Tensor:
    """Return the loss of each tower; their sum is the total loss.

    Args:
        tasks: Objectives of the model.
        timed_actions: [times] codes of the actions that have a time tower.

    Returns:
        [towers] weighted means: of events, labels, objectives, then times.
    """
    num_objectives = output.objective_logits.shape[1]
    events, times = tower_loss_sums(output.event_logits, output.time, batch, config.time_loss, _trained_actions(output))
    labels = _label_sums(output, batch)
    objectives, _ = objective_losses(
        output.objective_logits, None, _trained_objectives(output, batch), batch.watch_s, config.time_loss
    )
    counts = term_counts(len(TERM_NAMES) + num_objectives, batch.counts, is_generative=False)
    weight = events.new_tensor(_weights(config, tasks)) / counts.clamp(min=1).to(events)
    action, time, label = (weight[TERM_NAMES.index(name)] for name in ("action", "time", "label"))
    objective = weight[len(TERM_NAMES) :]
    return torch.cat([action * events, label * labels, objective * objectives, time * times[timed_actions]])


def term_means(sums: Tensor, counts: Tensor, is_generative: bool = True) -> Tensor:
    """Return the means [terms] of the loss terms.

    Args:
        sums: [terms] sums over the global batch.
        counts: Counts of the same batch, named by :data:`COUNT_NAMES`.
        is_generative: The action term is a mean over steps if true, over targets otherwise.
    """
    return sums / term_counts(len(sums), counts, is_generative).clamp(min=1).to(sums)


def term_counts(num_terms: int, counts: Tensor, is_generative: bool = True) -> Tensor:
    """Return the count [terms] that each term is a mean over."""
    action = _COUNT_INDEX[0] if is_generative else COUNT_NAMES.index("targets")
    objectives = range(len(COUNT_NAMES), len(COUNT_NAMES) + num_terms - len(TERM_NAMES))
    return counts[[action, *_COUNT_INDEX[1:], *objectives]]


def total_loss(terms: Tensor, config: LossConfig, tasks: Sequence[str] = ()) -> Tensor:
    """Return the weighted sum of the terms [terms]; those after :data:`TERM_NAMES` are the objectives ``tasks``."""
    return (terms * terms.new_tensor(_weights(config, tasks))).sum()  # autocast would round a matrix product


def validate_objective_weights(config: LossConfig, tasks: Sequence[str]) -> None:
    """Check that only predicted objectives have a weight.

    Raises:
        ConfigError: A weight is given for an objective that is not in ``tasks``.
    """
    for name in config.objective_weights:
        if name not in tasks:
            predicted = f"this run predicts {', '.join(tasks)}" if tasks else "this run predicts none"
            raise ConfigError(f"loss.objective_weights.{name}: unknown objective; {predicted}")


class Loss(nn.Module):
    """Training loss as a leaf module, so that training pipelines do not trace into it.

    Args:
        config: Weights and forms of the terms.
        world_size: Number of ranks. The loss is multiplied by it, because gradients are averaged over ranks although
            the counts are already global.
        tasks: Objectives that the model predicts in addition to actions and labels.
        timed_actions: If given, :meth:`forward` returns one loss per tower, see :func:`task_losses`.
    """

    timed_actions: Tensor | None

    def __init__(
        self,
        config: LossConfig,
        world_size: int = 1,
        tasks: Sequence[str] = (),
        timed_actions: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config, self.world_size, self.tasks = config, world_size, tuple(tasks)
        self.register_buffer("timed_actions", timed_actions, persistent=False)
        squared = [task == WATCH_TIME and config.time_loss == "mse" for task in ("label", *tasks)]
        self.uncertainty_weighting = UncertaintyWeighting(squared, world_size) if config.uncertainty_weighting else None

    def forward(self, output: RankerOutput, batch: WindowBatch) -> tuple[Tensor, tuple[Tensor, RankerOutput]]:
        """Return the loss to differentiate (or one per tower), and (detached sums [terms], output)."""
        sums = loss_sums(output, batch, self.config)
        if self.timed_actions is not None and isinstance(output, TowerOutput):
            losses = task_losses(output, batch, self.config, self.tasks, self.timed_actions)
            return losses * self.world_size, (sums.detach(), output)
        terms = term_means(sums, batch.counts, output.is_generative)
        if self.uncertainty_weighting is None:
            loss = total_loss(terms, self.config, self.tasks)
        else:
            loss = self._uncertainty_weighted_loss(terms, batch, self.uncertainty_weighting)
        return loss * self.world_size, (sums.detach(), output)

    def _uncertainty_weighted_loss(self, terms: Tensor, batch: WindowBatch, weighting: UncertaintyWeighting) -> Tensor:
        """Weight the label and objective terms by learned weights, the generator's terms by configured ones."""
        learned = [TERM_NAMES.index("label"), *range(len(TERM_NAMES), len(terms))]
        fixed = terms.index_fill(0, torch.tensor(learned, device=terms.device), 0)
        counts = term_counts(len(terms), batch.counts)[learned]
        return total_loss(fixed, self.config, self.tasks) + weighting(terms[learned], counts)


def _weights(config: LossConfig, tasks: Sequence[str]) -> list[float]:
    weights = [weight(config) for _, weight in _TERMS.values()]
    return [*weights, *(config.objective_weights.get(task, config.default_objective_weight) for task in tasks)]


def _step_sums(steps: StepPredictions, label: Tensor, time: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    action = F.cross_entropy(steps.logits, label, reduction="sum", ignore_index=_IGNORED)
    label = label.clamp(min=0)  # ignored steps have no time either
    known = torch.isfinite(time)
    error = _gather_label(steps.time, label) - torch.where(known, time, 0)
    if steps.log_scale is not None:
        log_scale = _gather_label(steps.log_scale, label)
        losses = 0.5 * (error / log_scale.exp()).square() + log_scale
    else:
        losses = error.square() if config.time_loss == "mse" else error.abs()
    return action, torch.where(known, losses, 0).sum()


def _order_sum(output: A2GenOutput, batch: WindowBatch, power: float) -> Tensor:
    """Return Σ max(t̂_{i−1} − t̂_i, 0)^p over adjacent steps of one target whose times are both recorded."""
    predicted = output.step_times(batch)
    decrease = F.relu(predicted[:-1] - predicted[1:])
    # For p < 1 the power has no finite gradient at 0, which becomes NaN even where masked: clamp before the power.
    smallest = torch.finfo(decrease.dtype).tiny
    return torch.where(batch.timed_pairs & (decrease > 0), decrease.clamp(min=smallest) ** power, 0).sum()


def _occurrence_sum(occurrence: OccurrenceHeadOutput, batch: WindowBatch, trained: Tensor | None) -> Tensor:
    """Return Σ over targets and actions of the binary cross-entropy, in units of the action's own entropy."""
    occurred, _ = target_outcomes(batch, len(occurrence.entropy) + 2)
    return (occurrence_bce(occurrence.logits, occurred, trained) / occurrence.entropy).sum()


def _wide_sum(output: RankerOutput, batch: WindowBatch, config: LossConfig) -> Tensor:
    """Return the sum over targets of all losses of the wide part."""
    wide = output.wide
    if wide is None:
        return output.context.sum() * 0
    events, times = tower_loss_sums(wide.event_logits, wide.time, batch, config.time_loss, _trained_actions(output))
    labels = binary_loss_sums(wide.label_logits, _trained_labels(output, batch))
    objectives = binary_loss_sums(wide.objective_logits, _trained_objectives(output, batch))
    return events.sum() + times.sum() + labels.sum() + objectives.sum()


def _trained_actions(output: RankerOutput) -> Tensor | None:
    return None if output.trained is None else output.trained.actions


def _trained_steps(output: RankerOutput, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """Return labels [steps] and log1p seconds [steps]; steps of untrained actions have label -1 and no time."""
    label, time = batch.step_label, batch.step_time
    if output.trained is None:
        return label, time
    untrained = ~output.trained.actions[label]
    return label.masked_fill(untrained, _IGNORED), time.masked_fill(untrained, torch.nan)


def _trained_objectives(output: RankerOutput, batch: WindowBatch) -> Tensor:
    """Return the values [targets, predicted objectives], NaN for untrained objectives."""
    count = output.objective_logits.shape[1]
    values = batch.objectives[:, :count]
    return values if output.trained is None else values.masked_fill(~output.trained.objectives[:count], torch.nan)


def _label_sums(output: RankerOutput, batch: WindowBatch) -> Tensor:
    """Return the cross-entropy [labels] of every label, summed over targets with a known value."""
    return binary_loss_sums(output.label_logits, _trained_labels(output, batch))


def _trained_labels(output: RankerOutput, batch: WindowBatch) -> Tensor:
    """Return the values [targets, labels], NaN for untrained labels."""
    return batch.labels if output.trained is None else batch.labels.masked_fill(~output.trained.labels, torch.nan)


def _gather_label(values: Tensor, label: Tensor) -> Tensor:
    """Return the entries [steps] of ``values`` [steps, actions] at ``label`` [steps]."""
    return values.gather(1, label[:, None]).squeeze(1)
