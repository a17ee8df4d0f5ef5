"""Whether and when each action happens, and the likeliest sequences: a generator read as a whole (METHODS §4 [ours]).

Ranking needs the probability that an action happens at all, which no teacher-forced logit tells. For the explicit
form it is summed over the tree of emitted prefixes, of which those that make up at most a bound of the probability are
not followed to their end, but taken to go on as their siblings do; for the implicit form it is in closed form.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.nn.attention import small_softmax
from a2gen_rec.nn.decoding import DecodedSequences
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, TokenTable


@dataclass(frozen=True)
class PrefixLevel:
    """The prefixes of one length that were followed.

    Attributes:
        owner: [prefixes] context, ascending; parent: [prefixes] place in the level before.
        action, time: [prefixes] code of what each ends with, and its log1p seconds.
        end, end_time: [prefixes] probability of the sequence that ends right after, and log1p seconds of its end.
    """

    owner: Tensor
    parent: Tensor
    action: Tensor
    time: Tensor
    end: Tensor
    end_time: Tensor


@dataclass(frozen=True)
class ActionMarginals:
    """What is expected to happen in n impressions.

    Attributes:
        probability: [n, actions] that the action happens; ``start`` is 1. As sequences tell it, off by at most
            ``remainder``, and by far less than that: see :func:`_gone_on`.
        time: [n, actions] expected log1p seconds given that it happens, 0 for ``start``; NaN where nothing that was
            followed has it.
        remainder: [n] probability of the sequences that were not followed to their end.
        tree: the prefixes that were followed, those of one step more each; none where it is not told by a tree.
    """

    probability: Tensor
    time: Tensor
    unexplored_mass: Tensor
    prefix_tree: Sequence[PrefixLevel] = ()


@torch.no_grad()
def action_marginals(
    generator: Generator,
    context: Tensor,
    tables: StepEmbeddings,
    timed: Tensor,
    max_error: float = 1e-3,
    tokens: TokenTable | None = None,
) -> ActionMarginals:
    """Probability and expected time of every action.

    Args:
        context: [n, d_context].
        timed: [actions] bool, whether the log records the action's time; else it is read as missing once emitted.
        max_error: explicit form: bound on every ``remainder``; 0 expands the whole tree.
        tokens: of :meth:`ExplicitGenerator.tokens`, if they are known already.
    """
    if isinstance(generator, ImplicitGenerator):
        return _closed_form(generator, context)
    assert isinstance(generator, ExplicitGenerator)
    tokens = generator.precompute_tokens(tables, timed) if tokens is None else tokens
    return _expand_tree(generator, context, tokens, timed, max_error)


def _expand_tree(
    generator: ExplicitGenerator, context: Tensor, tokens: TokenTable, timed: Tensor, max_error: float
) -> ActionMarginals:
    """Level by level. Of n children at one level, those below 1/n of what a context need not have followed are left."""
    n, actions = len(context), generator.actions
    sums = context.new_zeros(n, 2 * actions + 1)
    probability, time_mass, remainder = sums[:, :actions], sums[:, actions:-1], sums[:, -1]
    owner = torch.arange(n, device=context.device)
    mass = context.new_ones(n)
    parent, action = owner, torch.zeros_like(owner)
    time = context.new_zeros(n)
    state = generator.init_state(context)
    tree = []
    while len(owner):
        steps, state = generator.step(action, time, state, tokens)
        share = small_softmax(steps.logits)
        # Every sequence through a child contains its action, so a child counts whether or not it is followed.
        child = mass[:, None] * share
        # Copies: views would keep whole levels.
        tree.append(PrefixLevel(owner, parent, action, time, child[:, -1].clone(), steps.time[:, -1].clone()))
        after = child.clone()
        after[:, -1] = 0  # exit ends a sequence
        mass_left = context.new_zeros(n).index_add_(0, owner, after.sum(1))
        children = torch.bincount(owner, minlength=n) * (actions - 1 - len(tree))
        budget = max_error - remainder
        # Once none need be followed any more, none is.
        least = torch.where(mass_left > budget, budget / children.clamp(min=1), torch.inf)
        follow = after > least.index_select(0, owner)[:, None]
        left = after.masked_fill(follow, 0)
        rest, rest_time, all_left = _extrapolate_pruned(share, steps.time, left, timed)
        counted = [child + rest, torch.addcmul(child * steps.time, rest, rest_time), all_left]
        sums.index_add_(0, owner, torch.cat(counted, dim=1))
        flat = follow.flatten().nonzero().squeeze(1)
        parent, action = flat // actions, flat % actions
        mass, time = (each.flatten().index_select(0, flat) for each in (child, steps.time))
        state = state.select(parent).advance_time(time)
        owner = owner.index_select(0, parent)
    probability[:, 0] = 1
    expected = time_mass / probability.masked_fill(probability == 0, torch.nan)
    return ActionMarginals(probability, expected, remainder, tree)


def _extrapolate_pruned(share: Tensor, time: Tensor, left: Tensor, timed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What children that are not followed are taken to go on with: their siblings, with the shares and at the times
    that the prefix has for them, but not before the children's mean time; and ``exit``, for certain.

    Args:
        share, time: [prefixes, actions] probability given the prefix, and log1p seconds, of each child.
        left: [prefixes, actions] probability of the children that are not followed, else 0; none of them is ``exit``.
        timed: [actions] bool, whether an action's times mean anything.

    Returns:
        [prefixes, actions] probability that each action comes after such a child, and its log1p seconds; and
        [prefixes, 1] probability of such a child.
    """
    all_left = left.sum(1, keepdim=True)
    # A child that is all but certain has next to no siblings to go on with.
    each = left / (1 - share).clamp(min=1e-3)
    rest = share * (each.sum(1, keepdim=True) - each)
    rest[:, -1:] = all_left
    known = left * timed
    left_at = (known * time).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
    return rest, torch.maximum(time, left_at), all_left


def _closed_form(generator: ImplicitGenerator, context: Tensor) -> ActionMarginals:
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
    return ActionMarginals(probability, time, (1 - p_exit[..., 0]).prod(1))


def top_sequences(marginals: ActionMarginals, contexts: Tensor, width: int) -> DecodedSequences:
    """The most probable sequences of a tree in single or double precision, told on the CPU. One that is not told, of
    those not followed to their end, has at most the probability of the ``remainder``.

    Args:
        contexts: [n] distinct ones, whose sequences are told; width: most of each.
    """
    # In numpy, whose calls cost a fraction of torch's: there are many, on few sequences.
    tree = [{field: part.cpu().numpy() for field, part in vars(level).items()} for level in marginals.prefix_tree]
    n, last = len(contexts), marginals.probability.shape[1] - 1
    sizes = np.array([len(level["owner"]) for level in tree])
    firsts = np.cumsum(sizes) - sizes
    owner, action, time, end, end_time = (
        np.concatenate([level[field] for level in tree]) for field in ("owner", "action", "time", "end", "end_time")
    )
    # The first level stays where it is.
    parent = np.concatenate([tree[0]["parent"], *(tree[at]["parent"] + firsts[at - 1] for at in range(1, len(tree)))])

    # The prefixes whose ends are told, context by context.
    place = np.full(len(marginals.probability), -1)
    place[contexts.cpu().numpy()] = np.arange(n)
    leaf = np.flatnonzero(place[owner] >= 0)
    leaf = leaf[np.lexsort((-end[leaf], place[owner[leaf]]))]
    row = place[owner[leaf]]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < width
    leaf, slot = leaf[kept], (row[kept], rank[kept])

    # From their last step back to their first.
    at, back = leaf, []
    for _ in tree[1:]:
        back.append(at)
        at = parent[at]
    back.append(at)
    length = np.repeat(np.arange(len(tree)), sizes)[leaf][:, None]
    step = np.arange(len(tree))
    prefix = np.take_along_axis(np.stack(back, 1), (length - 1 - step).clip(min=0), 1)
    steps = n, width, len(tree)
    codes, times = np.full(steps, -1), np.full(steps, np.nan, time.dtype)
    codes[slot] = np.where(step < length, action[prefix], np.where(step == length, last, -1))
    times[slot] = np.where(step < length, time[prefix], np.where(step == length, end_time[leaf][:, None], np.nan))
    chance = np.full(steps[:2], -np.inf, end.dtype)
    with np.errstate(divide="ignore"):
        chance[slot] = np.log(end[leaf])
    return DecodedSequences(torch.from_numpy(codes), torch.from_numpy(times), torch.from_numpy(chance))
