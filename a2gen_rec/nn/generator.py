"""Action-sequence autoregressive generator (AAG): METHODS §4 after A2Gen, arXiv 2604.25834.

Given a target's context, the generator predicts what happens in the impression, in order and in time. The
*explicit* form reads the actions emitted so far; the *implicit* form drafts all steps at once and refines the
draft. Times are in log1p seconds throughout this module.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.attention import ContextAwareAttention, ContextProjection, Residual, TokenProjection
from a2gen_rec.nn.encoder import log_bucketize
from a2gen_rec.utils.jagged import LengthBuckets


class StepPredictions(NamedTuple):
    """Predictions of the next (action, time), for any leading shape ``*``.

    Attributes:
        logits: [*, actions]; -inf for ``start`` and, in the explicit form, for actions already emitted.
        time: [*, actions] log1p seconds of the next step should it be that action.
        log_scale: [*, actions] of the log-normal head; None for point estimates.
    """

    logits: Tensor
    time: Tensor
    log_scale: Tensor | None

    def select(self, index: Tensor) -> "StepPredictions":
        """The predictions at ``index`` of the first axis."""
        return StepPredictions(*(None if part is None else part[index] for part in self))  # type: ignore[arg-type]

    def probability_before(self, seconds: float) -> Tensor:
        """P(time of the next step < ``seconds``) should it be that action, [*, actions].

        Raises:
            ValueError: the head gives point estimates only.
        """
        if self.log_scale is None:
            raise ValueError("a point estimate has no distribution; use time_distribution: lognormal")
        return torch.special.ndtr((math.log1p(seconds) - self.time) / self.log_scale.exp())


class StepEmbeddings(NamedTuple):
    """The small tables whole: action [actions, dim] and time bucket [buckets, dim]."""

    action: Tensor
    time: Tensor


class TokenTable(NamedTuple):
    """Every step there can be, as attention reads it: [actions * buckets, 4 * dim], an action's buckets of known times
    together."""

    projected: Tensor
    buckets: int


@dataclass(frozen=True)
class DecoderState:
    """Everything a prefix of emitted steps hands to its next step.

    Attributes:
        asked: [prefixes, 2·dim + heads] what the prefixes' contexts contribute to attention, side by side.
        past: attention's keys and values, as :meth:`ContextAwareAttention.step` has them; None before the first step.
        emitted: [prefixes, actions] bool.
        base: [prefixes, 1] log1p time reached by the prefix, the floor of the monotone head; None of a free head.
    """

    context_projection: Tensor
    kv_cache: Tensor | None
    emitted: Tensor
    time_floor: Tensor | None

    def select(self, index: Tensor) -> "DecoderState":
        """The states of the prefixes ``index`` (repetition allowed)."""
        # Rows as wholes: several times as fast on CPU as indexing, which goes by element.
        return DecoderState(
            self.context_projection.index_select(0, index),
            None if self.kv_cache is None else self.kv_cache.index_select(1, index),
            self.emitted.index_select(0, index),
            None if self.time_floor is None else self.time_floor.index_select(0, index),
        )

    def advance_time(self, time: Tensor) -> "DecoderState":
        """Note that each prefix went on at ``time`` [prefixes] log1p."""
        return self if self.time_floor is None else replace(self, time_floor=time[:, None])


class OutputHeads(nn.Module):
    """Next action and its time from a step's vector.

    Args:
        time_head: ``free``, or ``monotone``: an increment that only goes forward [ours].
        distribution: ``lognormal`` adds a scale.
        per_action: one time per possible next action, or one for all (the source's).
    """

    def __init__(
        self,
        dim: int,
        actions: int,
        time_head: Literal["unconstrained", "monotonic"],
        distribution: Literal["point", "lognormal"],
        per_action: bool,
    ) -> None:
        super().__init__()
        self.actions, self.monotone = actions, time_head == "monotonic"
        times = actions if per_action else 1
        self.action = nn.Linear(dim, actions)
        self.time = nn.Linear(dim, times)
        self.log_scale = nn.Linear(dim, times) if distribution == "lognormal" else None

    def forward(self, hidden: Tensor, forbidden: Tensor) -> StepPredictions:
        """Heads of hidden [*, dim]; ``forbidden`` [*, actions] bool gets no probability.

        A monotone head returns increments; :meth:`accumulate` or the decoder's state makes times of them.
        """
        logits = self.action(hidden).masked_fill(forbidden, -torch.inf)
        time = self.time(hidden).expand(*hidden.shape[:-1], self.actions)
        if self.monotone:
            time = F.softplus(time)
        scale = self.log_scale
        return StepPredictions(logits, time, None if scale is None else scale(hidden).expand_as(time).clamp(-5, 5))

    def accumulate(self, steps: StepPredictions, label: Tensor) -> StepPredictions:
        """Turn increments [m, n, actions] into times along the steps taken, ``label`` [m, n]."""
        if not self.monotone:
            return steps
        taken = steps.time.gather(-1, label[..., None])
        return steps._replace(time=steps.time + taken.cumsum(1) - taken)


class Generator(nn.Module):
    """What both forms share: the context, the heads and the vocabulary.

    Args:
        d_context: width of ``c_gen = [user ‖ target item ‖ history vector]``.
        actions: size of the vocabulary, ``start`` first and ``exit`` last.
        max_offset_s: times at and above it share the last time bucket.
        context_query, head_gate: as :class:`ContextAwareAttention` takes.
    """

    def __init__(
        self,
        d_context: int,
        dim: int,
        heads: int,
        actions: int,
        residual: Residual = "context",
        mlp_ratio: float = 0.0,
        time_head: Literal["unconstrained", "monotonic"] = "unconstrained",
        time_distribution: Literal["point", "lognormal"] = "point",
        time_per_action: bool = True,
        max_offset_s: float = 14_400.0,
        dropout: float = 0.0,
        context_query: bool = True,
        head_gate: bool = True,
    ) -> None:
        super().__init__()
        self.actions, self.exit, self.max_offset_s = actions, actions - 1, max_offset_s
        self.attention = ContextAwareAttention(
            self._d_token(dim), d_context, dim, heads, residual, mlp_ratio, dropout, context_query, head_gate
        )
        self.heads = OutputHeads(dim, actions, time_head, time_distribution, time_per_action)

    @torch.no_grad()
    def init_from_statistics(self, share: Tensor, time: Tensor) -> None:
        """Begin at what is known before training: shares of actions among steps, and typical log1p times.

        Args:
            share, time: [actions]; NaN times count as 0.
        """
        for heads in self._all_heads():
            # The rows of a rare action are hardly trained: begun at random, its times would stay noise. (Begun at
            # zero, the logits would learn rare actions much later: measured.)
            nn.init.zeros_(heads.time.weight)
            heads.action.bias.copy_(share.clamp(min=1e-6).log())
            bias = torch.nan_to_num(time)
            if heads.monotone:
                bias = torch.log(torch.expm1(bias.clamp(min=1e-2)))  # softplus of it is the time
            heads.time.bias.copy_(bias if heads.time.out_features > 1 else bias[self.exit])

    def _all_heads(self) -> list[OutputHeads]:
        return [self.heads]

    @property
    def max_steps(self) -> int:
        """Longest sequence of predictions: every action once, then ``exit``."""
        return self.actions - 1

    def _d_token(self, dim: int) -> int:
        return 2 * dim


class ExplicitGenerator(Generator):
    """Autoregressive over the emitted (action, time) steps; ``start`` comes first."""

    def forward(
        self,
        action: Tensor,
        offset_s: Tensor,
        label: Tensor,
        context: Tensor,
        groups: LengthBuckets,
        tables: StepEmbeddings,
    ) -> tuple[StepPredictions, StepPredictions | None]:
        """Teacher-forced predictions of every next step.

        Args:
            action, offset_s: [steps] what was emitted, ``start`` first, without ``exit``; NaN: time unknown.
            label: [steps] action that came next; used by the monotone head, whose times build on it.
            context: [targets, d_context]; groups: of the targets' steps.

        Returns:
            Steps of shape [steps, actions], and None (the explicit form has no draft).
        """
        tokens = self._embed(action, offset_s, tables)
        emitted = F.one_hot(action, self.actions)
        width = tokens.shape[1]

        # Padding follows what is real, where a causal attention never looks.
        def piece(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
            tokens, emitted, label = x[..., :width], x[..., width:-1], x[..., -1].long()
            hidden = self.attention(tokens, c, causal=True)
            steps = self.heads.accumulate(self.heads(hidden, emitted.cumsum(1) > 0), label)
            return torch.stack([part for part in steps if part is not None], dim=-1)

        packed = torch.cat([tokens, emitted.to(tokens.dtype), label[:, None].to(tokens.dtype)], dim=1)
        parts = groups.apply(piece, packed, context, per_token=True).unbind(-1)
        return StepPredictions(parts[0], parts[1], parts[2] if len(parts) > 2 else None), None

    def init_state(self, context: Tensor) -> DecoderState:
        """The state before ``start`` is emitted, for contexts [n, d_context]."""
        emitted = torch.zeros(len(context), self.actions, dtype=torch.bool, device=context.device)
        base = context.new_zeros(len(context), 1) if self.heads.monotone else None
        return DecoderState(torch.cat(self.attention.project_context(context), dim=1), None, emitted, base)

    def precompute_tokens(self, tables: StepEmbeddings, timed: Tensor) -> TokenTable:
        """What :meth:`step` may emit: few actions at few buckets of time, which many prefixes have in common.

        Args:
            timed: [actions] bool, whether an action's time is known; of others it is read as missing, whatever it is.
                ``start`` always has one.
        """
        buckets = len(tables.time) - 1
        known = timed.clone()
        known[0] = True
        time = torch.where(known[:, None, None], tables.time[1:], tables.time[:1]).flatten(0, 1)
        every = torch.cat([time, tables.action.repeat_interleave(buckets, 0)], dim=-1)
        return TokenTable(torch.cat(self.attention.project_tokens(every), dim=1), buckets)

    def step(
        self,
        action: Tensor,
        time: Tensor,
        state: DecoderState,
        tokens: TokenTable,
    ) -> tuple[StepPredictions, DecoderState]:
        """Emit one step and predict the next.

        Args:
            action, time: [prefixes] the step just emitted, in log1p seconds; state: of the prefixes before it.
            tokens: of :meth:`tokens`.

        Returns:
            Steps of shape [prefixes, actions] and the new state.
        """
        # As log_bucket has it, of seconds.
        scale = (tokens.buckets - 1) / math.log1p(self.max_offset_s)
        bucket = (time.clamp(min=0) * scale).long().clamp(max=tokens.buckets - 1)
        rows = tokens.projected.index_select(0, action * tokens.buckets + bucket)
        dim, heads = self.attention.dim, self.attention.heads
        token = TokenProjection(*rows.split([dim, dim, 2 * dim], dim=1))
        asked = ContextProjection(*state.context_projection.split([dim, dim, heads], dim=1))
        hidden, past = self.attention.decode_step(token, asked, state.kv_cache)
        emitted = state.emitted.scatter(1, action[:, None], True)
        steps = self.heads(hidden, emitted)
        if state.time_floor is not None:
            steps = steps._replace(time=state.time_floor + steps.time)
        return steps, DecoderState(state.context_projection, past, emitted, state.time_floor)

    def _embed(self, action: Tensor, offset_s: Tensor, tables: StepEmbeddings) -> Tensor:
        bucket = log_bucketize(offset_s, len(tables.time), self.max_offset_s)
        return torch.cat([tables.time[bucket], tables.action[action]], dim=-1)


class ImplicitGenerator(Generator):
    """A draft of all steps from the context alone, refined by one causal CAM.

    The draft's steps differ by learned step embeddings (METHODS §4; without them all steps would be the same).
    """

    def __init__(self, d_context: int, dim: int, heads: int, actions: int, **options: object) -> None:
        super().__init__(d_context, dim, heads, actions, **options)  # type: ignore[arg-type]
        self.step_embedding = nn.Parameter(torch.randn(self.max_steps, dim) * 0.05)
        self.draft = nn.Sequential(nn.Linear(d_context + dim, dim), nn.GELU(), nn.Linear(dim, dim))
        heads_of = self.heads
        self.draft_heads = OutputHeads(
            dim,
            actions,
            "monotonic" if heads_of.monotone else "unconstrained",
            "point" if heads_of.log_scale is None else "lognormal",
            heads_of.time.out_features > 1,
        )

    def forward(
        self,
        action: Tensor,
        offset_s: Tensor,
        label: Tensor,
        context: Tensor,
        groups: LengthBuckets,
        tables: StepEmbeddings,
    ) -> tuple[StepPredictions, StepPredictions | None]:
        """As the explicit form's, but only the number of steps and ``label`` (monotone head) are read.

        Returns:
            final and draft Steps of shape [steps, actions].
        """

        def piece(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
            final, draft = self.predict(c, x.shape[1], x[..., 0].long())
            return torch.stack([part for part in (*final, *draft) if part is not None], dim=-1)

        parts = groups.apply(piece, label[:, None].to(context.dtype), context, per_token=True).unbind(-1)
        half = len(parts) // 2
        final, draft = parts[:half], parts[half:]
        return StepPredictions(*final, *[None] * (3 - half)), StepPredictions(*draft, *[None] * (3 - half))

    def predict(
        self, context: Tensor, length: int, label: Tensor | None = None
    ) -> tuple[StepPredictions, StepPredictions]:
        """Final and draft predictions of the first ``length`` steps: context [m, d] -> [m, length, actions].

        Without ``label`` [m, length] a monotone head follows its own most probable actions.
        """
        steps = self.step_embedding[:length].to(context.dtype).expand(len(context), -1, -1)
        draft = self.draft(torch.cat([context[:, None].expand(-1, length, -1), steps], dim=-1))
        forbidden = torch.zeros(self.actions, dtype=torch.bool, device=context.device)
        forbidden[0] = True
        forbidden = forbidden.expand(len(context), length, -1)
        first = self.draft_heads(draft, forbidden)
        final = self.heads(self.attention(draft, context, causal=True), forbidden)
        taken = final.logits.argmax(-1) if label is None else label
        return self.heads.accumulate(final, taken), self.draft_heads.accumulate(first, taken)

    def _d_token(self, dim: int) -> int:
        return dim

    def _all_heads(self) -> list[OutputHeads]:
        return [self.heads, self.draft_heads]
