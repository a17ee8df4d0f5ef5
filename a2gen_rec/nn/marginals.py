"""Marginal probabilities and times of actions, and most probable sequences, of a generator (METHODS §4 [ours]).

Ranking needs the probability that an action occurs at all, which no teacher-forced logit gives. For the explicit form
it is summed over the tree of emitted prefixes. Prefixes are pruned up to a bound on their total probability; pruned
prefixes are extrapolated from their siblings. For the implicit form it has a closed form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.nn.attention import small_softmax
from a2gen_rec.nn.decoding import DecodedSequences
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, TokenTable

PROBABILITY_EPS = (1e-6, 1 - 1e-4)
"""Clamp of probabilities before their log-odds; close to 1, single precision has few digits left."""


@dataclass(frozen=True)
class PrefixLevel:
    """Explored prefixes of one length.

    Attributes:
        owner: [prefixes] context, ascending.
        parent: [prefixes] row in the previous level.
        action: [prefixes] code of the prefix's last action.
        time: [prefixes] log1p seconds of the prefix's last action.
        end: [prefixes] probability of the sequence that ends right after the prefix.
        end_time: [prefixes] log1p seconds of its end.
    """

    owner: Tensor
    parent: Tensor
    action: Tensor
    time: Tensor
    end: Tensor
    end_time: Tensor


@dataclass(frozen=True)
class ActionMarginals:
    """Expected actions in n impressions, marginal over sequences.

    Attributes:
        probability: [n, actions] that the action occurs; 1 for ``start``. The error is at most ``unexplored_mass`` and
            typically far smaller, see :func:`_extrapolate_pruned`.
        time: [n, actions] expected log1p seconds given that the action occurs, 0 for ``start``; NaN if no explored
            sequence contains it.
        unexplored_mass: [n] total probability of the pruned sequences.
        prefix_tree: Explored prefixes by length; empty if computed in closed form.
    """

    probability: Tensor
    time: Tensor
    unexplored_mass: Tensor
    prefix_tree: Sequence[PrefixLevel] = ()


def mean_log_odds(marginals: ActionMarginals, logits: Tensor) -> ActionMarginals:
    """Return marginals with the mean, in log-odds, of their probabilities and ``logits`` [n, events].

    Events are the actions without ``start`` and ``exit``. The unexplored mass is unchanged.
    """
    probability = marginals.probability
    events = (torch.logit(probability[:, 1:-1].clamp(*PROBABILITY_EPS)) + logits) / 2
    return replace(marginals, probability=torch.cat([probability[:, :1], events.sigmoid(), probability[:, -1:]], dim=1))


@torch.no_grad()
def action_marginals(
    generator: Generator,
    context: Tensor,
    tables: StepEmbeddings,
    timed: Tensor,
    max_unexplored_mass: float = 1e-3,
    tokens: TokenTable | None = None,
) -> ActionMarginals:
    """Return the probability and expected time of every action.

    Args:
        generator: Trained generator.
        context: [n, d_context].
        tables: Full small tables.
        timed: [actions] bool, whether an emitted action is read with its time; otherwise its time is read as missing.
        max_unexplored_mass: Upper bound on every unexplored mass in the explicit form; 0 expands the full tree.
        tokens: Result of :meth:`ExplicitGenerator.precompute_tokens`, if computed before.
    """
    if isinstance(generator, ImplicitGenerator):
        return _closed_form(generator, context)
    assert isinstance(generator, ExplicitGenerator)
    tokens = generator.precompute_tokens(tables, timed) if tokens is None else tokens
    return _expand_tree(generator, context, tokens, timed, max_unexplored_mass)


def _expand_tree(
    generator: ExplicitGenerator, context: Tensor, tokens: TokenTable, timed: Tensor, max_unexplored_mass: float
) -> ActionMarginals:
    """Expand the tree level by level; of n children, those below 1/n of the context's remaining budget are pruned."""
    n, num_actions = len(context), generator.num_actions
    sums = context.new_zeros(n, 2 * num_actions + 1)
    probability, time_mass, unexplored_mass = sums[:, :num_actions], sums[:, num_actions:-1], sums[:, -1]
    owner = torch.arange(n, device=context.device)
    mass = context.new_ones(n)
    parent, action = owner, torch.zeros_like(owner)
    time = context.new_zeros(n)
    state = generator.init_state(context)
    tree = []
    while len(owner):
        steps, state = generator.step(action, time, state, tokens)
        conditional = small_softmax(steps.logits)
        # Every sequence through a child contains its action, so the child counts whether or not it is pruned.
        child = mass[:, None] * conditional
        # Clones: views would keep full levels in memory.
        tree.append(PrefixLevel(owner, parent, action, time, child[:, -1].clone(), steps.time[:, -1].clone()))
        open_mass = child.clone()
        open_mass[:, -1] = 0  # exit ends a sequence
        context_mass = context.new_zeros(n).index_add_(0, owner, open_mass.sum(1))
        num_children = torch.bincount(owner, minlength=n) * (num_actions - 1 - len(tree))
        budget = max_unexplored_mass - unexplored_mass
        # If the budget covers the whole level, all of it is pruned.
        threshold = torch.where(context_mass > budget, budget / num_children.clamp(min=1), torch.inf)
        explored = open_mass > threshold.index_select(0, owner)[:, None]
        pruned = open_mass.masked_fill(explored, 0)
        rest, rest_time, pruned_mass = _extrapolate_pruned(conditional, steps.time, pruned, timed)
        counted = [child + rest, torch.addcmul(child * steps.time, rest, rest_time), pruned_mass]
        sums.index_add_(0, owner, torch.cat(counted, dim=1))
        flat = explored.flatten().nonzero().squeeze(1)
        parent, action = flat // num_actions, flat % num_actions
        mass, time = (values.flatten().index_select(0, flat) for values in (child, steps.time))
        state = state.select(parent).advance_time(time)
        owner = owner.index_select(0, parent)
    probability[:, 0] = 1
    expected = time_mass / probability.masked_fill(probability == 0, torch.nan)
    return ActionMarginals(probability, expected, unexplored_mass, tree)


def _extrapolate_pruned(
    conditional: Tensor, time: Tensor, pruned: Tensor, timed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the assumed continuations of pruned children.

    A pruned child continues with its siblings, at the probabilities and times that the prefix has for them, but not
    before the pruned children's mean time; and with ``exit``, with probability 1.

    Args:
        conditional: [prefixes, actions] probability of each child given the prefix.
        time: [prefixes, actions] log1p seconds of each child.
        pruned: [prefixes, actions] probability of the pruned children, else 0; 0 for ``exit``.
        timed: [actions] bool, whether the log records the action's time.

    Returns:
        [prefixes, actions] probability that each action follows a pruned child; [prefixes, actions] its log1p seconds;
        [prefixes, 1] total probability of the pruned children.
    """
    pruned_mass = pruned.sum(1, keepdim=True)
    # An almost certain child has almost no siblings to continue with.
    odds = pruned / (1 - conditional).clamp(min=1e-3)
    rest = conditional * (odds.sum(1, keepdim=True) - odds)
    rest[:, -1:] = pruned_mass
    known = pruned * timed
    floor = torch.finfo(pruned.dtype).tiny
    pruned_time = (known * time).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=floor)
    return rest, torch.maximum(time, pruned_time), pruned_mass


def _closed_form(generator: ImplicitGenerator, context: Tensor) -> ActionMarginals:
    """Return ``P(a) = Σ_i p_i(a) Π_{j<i} (1 − p_j(a) − p_j(exit))``; steps are independent given the context."""
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
    return ActionMarginals(probability, time, (1 - p_exit[..., 0]).prod(1))


def top_sequences(marginals: ActionMarginals, contexts: Tensor, width: int) -> DecodedSequences:
    """Return the most probable sequences of the prefix tree, on CPU, in single or double precision.

    A pruned sequence missing here has probability at most ``unexplored_mass``.

    Args:
        marginals: Marginals with a prefix tree.
        contexts: [n] distinct contexts.
        width: Maximum number of sequences per context.
    """
    # In numpy, whose calls cost a fraction of torch's: there are many calls on few sequences.
    tree = [{field: part.cpu().numpy() for field, part in vars(level).items()} for level in marginals.prefix_tree]
    n, last = len(contexts), marginals.probability.shape[1] - 1
    sizes = np.array([len(level["owner"]) for level in tree])
    offsets = np.cumsum(sizes) - sizes
    owner, action, time, end, end_time = (
        np.concatenate([level[field] for level in tree]) for field in ("owner", "action", "time", "end", "end_time")
    )
    # Parents as rows of the concatenated levels; the first level has no previous one.
    parents = [tree[0]["parent"], *(tree[i]["parent"] + offsets[i - 1] for i in range(1, len(tree)))]
    parent = np.concatenate(parents)

    # Last prefixes of the returned sequences, grouped by context, most probable first.
    context_row = np.full(len(marginals.probability), -1)
    context_row[contexts.cpu().numpy()] = np.arange(n)
    leaf = np.flatnonzero(context_row[owner] >= 0)
    leaf = leaf[np.lexsort((-end[leaf], context_row[owner[leaf]]))]
    row = context_row[owner[leaf]]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    in_width = rank < width
    leaf, slot = leaf[in_width], (row[in_width], rank[in_width])

    # Prefixes from the last step back to the first.
    current, backwards = leaf, []
    for _ in tree[1:]:
        backwards.append(current)
        current = parent[current]
    backwards.append(current)
    length = np.repeat(np.arange(len(tree)), sizes)[leaf][:, None]
    step = np.arange(len(tree))
    prefix = np.take_along_axis(np.stack(backwards, 1), (length - 1 - step).clip(min=0), 1)
    shape = n, width, len(tree)
    codes, times = np.full(shape, -1), np.full(shape, np.nan, time.dtype)
    codes[slot] = np.where(step < length, action[prefix], np.where(step == length, last, -1))
    times[slot] = np.where(step < length, time[prefix], np.where(step == length, end_time[leaf][:, None], np.nan))
    log_probability = np.full(shape[:2], -np.inf, end.dtype)
    with np.errstate(divide="ignore"):
        log_probability[slot] = np.log(end[leaf])
    return DecodedSequences(torch.from_numpy(codes), torch.from_numpy(times), torch.from_numpy(log_probability))
