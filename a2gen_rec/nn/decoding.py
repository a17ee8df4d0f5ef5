"""Reading a generator: whether and when each action happens, and whole sequences (METHODS §4 [ours]).

Ranking needs the probability that an action happens at all, which no teacher-forced logit tells. For the explicit
form it is summed over the tree of emitted prefixes, pruned within a bound on the error; for the implicit form it is
in closed form.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.nn.attention import softmax
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, Steps


@dataclass(frozen=True)
class Occurrence:
    """What is expected to happen in n impressions.

    Attributes:
        probability: [n, actions] that the action happens; ``start`` is 1. As sequences tell it, too low by at most
            ``remainder``.
        time: [n, actions] expected log1p seconds given that it happens, 0 for ``start``; NaN where no explored branch
            has it.
        remainder: [n] probability of the sequences that were not followed to their end.
    """

    probability: Tensor
    time: Tensor
    remainder: Tensor


@torch.no_grad()
def occurrence(
    generator: Generator, context: Tensor, tables: StepEmbeddings, timed: Tensor, max_error: float = 1e-3
) -> Occurrence:
    """Probability and expected time of every action.

    Args:
        context: [n, d_context].
        timed: [actions] bool, whether the log records the action's time; else it is emitted as "missing".
        max_error: explicit form: bound on every ``remainder``; 0 expands the whole tree.
    """
    if isinstance(generator, ImplicitGenerator):
        return _closed_form(generator, context)
    assert isinstance(generator, ExplicitGenerator)
    return _expand_tree(generator, context, tables, timed, max_error)


def _expand_tree(
    generator: ExplicitGenerator, context: Tensor, tables: StepEmbeddings, timed: Tensor, max_error: float
) -> Occurrence:
    """Level by level. Of n children at one level, those below 1/n of what a context may still lose are dropped."""
    n, actions, last = len(context), generator.actions, generator.exit
    probability = context.new_zeros(n, actions)
    time_mass = context.new_zeros(n, actions)
    remainder = context.new_zeros(n)
    probability[:, 0] = 1
    owner = torch.arange(n, device=context.device)
    mass = context.new_ones(n)
    action = torch.zeros_like(owner)
    offset = context.new_zeros(n)
    state, tokens = generator.begin(context), generator.tokens(tables)
    while len(owner):
        steps, state = generator.step(action, offset, state, tokens)
        child = mass[:, None] * softmax(steps.logits)
        # Every sequence through a child contains its action, so a child counts whether or not it is expanded.
        probability.index_add_(0, owner, child)
        time_mass.index_add_(0, owner, child * steps.time)
        child[:, last] = 0
        left = torch.stack([child.sum(1), (child > 0).sum(1).to(child.dtype)], dim=1)
        mass_left, children = context.new_zeros(n, 2).index_add_(0, owner, left).unbind(1)
        budget = max_error - remainder
        # Once all that is left may be lost, it is.
        least = torch.where(mass_left > budget, budget / children.clamp(min=1), torch.inf)
        expand = child > least[owner, None]
        remainder.index_add_(0, owner, child.masked_fill(expand, 0).sum(1))
        parent, action = expand.nonzero(as_tuple=True)
        mass = child[parent, action]
        state = state.select(parent).reach(action, steps.time[parent])
        offset = emitted_offset(steps.time[parent, action], action, timed)
        owner = owner[parent]
    time = time_mass / probability.masked_fill(probability == 0, torch.nan)
    return Occurrence(probability, time, remainder)


def _closed_form(generator: ImplicitGenerator, context: Tensor) -> Occurrence:
    """``P(a) = Σ_i p_i(a) Π_{j<i} (1 − p_j(a) − p_j(exit))``, the steps being independent given the context."""
    steps, _ = generator.predict(context, generator.max_steps)
    p = torch.softmax(steps.logits, dim=-1)
    p_exit = p[..., -1:]
    stay = 1 - p - p_exit
    stay[..., -1] = 1 - p_exit[..., 0]
    reach = torch.cat([torch.ones_like(stay[:, :1]), stay[:, :-1].clamp(min=0).cumprod(1)], dim=1)
    at_step = reach * p
    probability = at_step.sum(1)
    probability[:, 0] = 1
    time = (at_step * steps.time).sum(1) / probability.masked_fill(probability == 0, torch.nan)
    return Occurrence(probability, time, (1 - p_exit[..., 0]).prod(1))


def emitted_offset(time: Tensor, action: Tensor, timed: Tensor) -> Tensor:
    """Seconds that an emitted action is fed back with: its predicted time, NaN where logs do not record it."""
    return torch.expm1(time).clamp(min=0).masked_fill(~timed[action], torch.nan)


@dataclass(frozen=True)
class Decoded:
    """Generated sequences, ``width`` per context, most probable first.

    Attributes:
        action: [n, width, steps] codes up to and including ``exit``; -1 beyond it.
        time: [n, width, steps] log1p seconds; NaN beyond ``exit``.
        log_probability: [n, width] of the whole sequence; -inf where there are fewer sequences than ``width``.
    """

    action: Tensor
    time: Tensor
    log_probability: Tensor


@torch.no_grad()
def decode(
    generator: Generator,
    context: Tensor,
    tables: StepEmbeddings,
    timed: Tensor,
    strategy: Literal["greedy", "sample", "beam"] = "greedy",
    width: int = 1,
    rng: torch.Generator | None = None,
) -> Decoded:
    """Generate action sequences with cached attention.

    Args:
        context: [n, d_context]; width: sequences per context (1 for ``greedy``).
        rng: source of randomness for ``sample``.
    """
    if strategy == "greedy":
        width = 1
    n, actions = len(context), generator.actions
    context = context.repeat_interleave(width, 0)
    score = context.new_zeros(n, width)
    if strategy == "beam":
        score[:, 1:] = -torch.inf  # all beams start alike: only one may count
    reader = _Reader(generator, context, tables, timed)
    history_action: list[Tensor] = []
    history_time: list[Tensor] = []
    done = torch.zeros(n * width, dtype=torch.bool, device=context.device)
    stop = F.one_hot(torch.tensor(actions - 1, device=context.device), actions).bool()
    for place in range(generator.max_steps):
        steps = reader.next(place)
        # A finished sequence goes on with a free `exit`, which keeps it one candidate among the beams.
        log_p = torch.log_softmax(steps.logits, -1)
        log_p = torch.where(done[:, None], torch.where(stop, 0.0, -torch.inf), log_p).view(n, width, actions)
        if strategy == "beam":
            score, best = (score[..., None] + log_p).flatten(1).topk(width)
            parent = (best // actions + torch.arange(n, device=best.device)[:, None] * width).flatten()
            action = (best % actions).flatten()
        else:
            flat = log_p.flatten(0, 1)
            chosen = (
                flat.argmax(-1, keepdim=True)
                if strategy == "greedy"
                else torch.multinomial(flat.exp(), 1, generator=rng)
            )
            score = score + flat.gather(1, chosen).view(n, width)
            parent, action = torch.arange(n * width, device=context.device), chosen.squeeze(1)
        time = steps.time[parent, action]
        was_done = done[parent]
        history_action = [h[parent] for h in history_action] + [action.masked_fill(was_done, -1)]
        history_time = [h[parent] for h in history_time] + [time.masked_fill(was_done, torch.nan)]
        reader.emit(parent, action, steps)
        done = was_done | (action == actions - 1)
        if done.all():
            break
    order = score.argsort(1, descending=True)
    shape = (n, width, len(history_action))
    by_rank = order[..., None].expand(shape)
    return Decoded(
        torch.stack(history_action, -1).view(shape).gather(1, by_rank),
        torch.stack(history_time, -1).view(shape).gather(1, by_rank),
        score.gather(1, order),
    )


class _Reader:
    """The next step's predictions of many growing prefixes, for either form of generator."""

    def __init__(self, generator: Generator, context: Tensor, tables: StepEmbeddings, timed: Tensor) -> None:
        self.generator, self.timed = generator, timed
        self.action = torch.zeros(len(context), dtype=torch.long, device=context.device)
        self.offset = context.new_zeros(len(context))
        self.emitted = torch.zeros(len(context), generator.actions, dtype=torch.bool, device=context.device)
        if isinstance(generator, ExplicitGenerator):
            self.state, self.tokens = generator.begin(context), generator.tokens(tables)
        elif isinstance(generator, ImplicitGenerator):
            self.draft, _ = generator.predict(context, generator.max_steps)

    def next(self, place: int) -> Steps:
        generator = self.generator
        if isinstance(generator, ExplicitGenerator):
            steps, self.state = generator.step(self.action, self.offset, self.state, self.tokens)
            return steps
        scale = self.draft.log_scale
        return Steps(
            self.draft.logits[:, place].masked_fill(self.emitted, -torch.inf),
            self.draft.time[:, place],
            None if scale is None else scale[:, place],
        )

    def emit(self, parent: Tensor, action: Tensor, steps: Steps) -> None:
        self.action = action
        self.offset = emitted_offset(steps.time[parent, action], action, self.timed)
        if isinstance(self.generator, ExplicitGenerator):
            self.state = self.state.select(parent).reach(action, steps.time[parent])
        else:
            self.emitted = self.emitted[parent] | F.one_hot(action, self.generator.actions).bool()
            self.emitted[:, -1] = False  # a finished sequence goes on with `exit`
