"""Action-sequence autoregressive generator (AAG): METHODS §4 after A2Gen, arXiv 2604.25834.

Given a target's context, the generator predicts the actions inside the impression, in order and in time. The *explicit*
form reads the actions emitted so far; the *implicit* form drafts all steps at once and refines the draft. Times are in
log1p seconds throughout this module.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.attention import AttentionConfig, ContextAwareAttention, ContextProjection, TokenProjection
from a2gen_rec.nn.encoder import log_bucketize
from a2gen_rec.utils.jagged import LengthBuckets


class StepPredictions(NamedTuple):
    """Predictions of the next (action, time), for any leading shape ``*``.

    Attributes:
        logits: [*, actions]; -inf for ``start`` and, in the explicit form, for actions already emitted.
        time: [*, actions] log1p seconds of the next step, given that it is this action.
        log_scale: [*, actions] of the log-normal head; None for point estimates.
    """

    logits: Tensor
    time: Tensor
    log_scale: Tensor | None

    def select(self, index: Tensor) -> "StepPredictions":
        """Return the predictions at ``index`` of the first axis."""
        return StepPredictions(*(None if part is None else part[index] for part in self))  # type: ignore[arg-type]

    def probability_before(self, seconds: float) -> Tensor:
        """Return P(time of the next step < ``seconds``), given that it is this action, [*, actions].

        Raises:
            ValueError: The head predicts point estimates only.
        """
        if self.log_scale is None:
            raise ValueError("a point estimate has no distribution; use time_distribution: lognormal")
        return torch.special.ndtr((math.log1p(seconds) - self.time) / self.log_scale.exp())


class StepEmbeddings(NamedTuple):
    """Full small tables.

    Attributes:
        action: [actions, dim].
        time: [buckets, dim] of time buckets.
    """

    action: Tensor
    time: Tensor


class TokenTable(NamedTuple):
    """Attention terms of every possible step.

    Attributes:
        projected: [actions * buckets, 4 * dim] terms of an action at a bucket of known times, action by action.
        buckets: Number of buckets of known times.
    """

    projected: Tensor
    buckets: int


@dataclass(frozen=True)
class DecoderState:
    """State of prefixes of emitted steps, for their next step.

    Attributes:
        context_projection: [prefixes, 2·dim + heads] attention terms of the prefixes' contexts, concatenated.
        kv_cache: Keys and values, see :meth:`ContextAwareAttention.decode_step`; None before the first step.
        emitted: [prefixes, actions] bool.
        time_floor: [prefixes, 1] log1p time of the last step, lower bound of the monotonic head; None for an
            unconstrained head.
    """

    context_projection: Tensor
    kv_cache: Tensor | None
    emitted: Tensor
    time_floor: Tensor | None

    def select(self, index: Tensor) -> "DecoderState":
        """Return the states of the prefixes ``index``; repetition is allowed."""
        # index_select copies full rows: several times as fast on CPU as indexing, which copies elements.
        return DecoderState(
            self.context_projection.index_select(0, index),
            None if self.kv_cache is None else self.kv_cache.index_select(1, index),
            self.emitted.index_select(0, index),
            None if self.time_floor is None else self.time_floor.index_select(0, index),
        )

    def advance_time(self, time: Tensor) -> "DecoderState":
        """Return the state after each prefix emitted its next step at ``time`` [prefixes] log1p seconds."""
        return self if self.time_floor is None else replace(self, time_floor=time[:, None])


class OutputHeads(nn.Module):
    """Heads for the next action and its time.

    Args:
        dim: Width of a step's vector.
        num_actions: Size of the vocabulary.
        time_head: ``unconstrained``, or ``monotonic``: a non-negative increment on the previous time [ours].
        distribution: ``lognormal`` adds a scale.
        per_action: One time per possible next action, or one for all actions (the source's).
    """

    def __init__(
        self,
        dim: int,
        num_actions: int,
        time_head: Literal["unconstrained", "monotonic"],
        distribution: Literal["point", "lognormal"],
        per_action: bool,
    ) -> None:
        super().__init__()
        self.num_actions, self.is_monotonic = num_actions, time_head == "monotonic"
        num_times = num_actions if per_action else 1
        self.action = nn.Linear(dim, num_actions)
        self.time = nn.Linear(dim, num_times)
        self.log_scale = nn.Linear(dim, num_times) if distribution == "lognormal" else None

    def forward(self, hidden: Tensor, forbidden: Tensor) -> StepPredictions:
        """Return predictions from hidden [*, dim]; actions of ``forbidden`` [*, actions] bool get no probability.

        A monotonic head returns increments; :meth:`accumulate` or the decoder's state converts them to times.
        """
        logits = self.action(hidden).masked_fill(forbidden, -torch.inf)
        time = self.time(hidden).expand(*hidden.shape[:-1], self.num_actions)
        if self.is_monotonic:
            time = F.softplus(time)
        scale = self.log_scale
        return StepPredictions(logits, time, None if scale is None else scale(hidden).expand_as(time).clamp(-5, 5))

    def accumulate(self, steps: StepPredictions, label: Tensor) -> StepPredictions:
        """Convert increments [m, n, actions] to times along the steps ``label`` [m, n]."""
        if not self.is_monotonic:
            return steps
        increment = steps.time.gather(-1, label[..., None])
        return steps._replace(time=steps.time + increment.cumsum(1) - increment)


class Generator(nn.Module):
    """Base of both forms: attention, heads and vocabulary.

    Args:
        d_context: Width of ``c_gen = [user ‖ target item ‖ history vector]``.
        config: Hyper-parameters of the attention.
        num_actions: Size of the vocabulary, ``start`` first and ``exit`` last.
        time_head: As in :class:`OutputHeads`.
        time_distribution: As in :class:`OutputHeads`.
        time_per_action: As in :class:`OutputHeads`.
        max_offset_s: Times at and above it share the last time bucket.
    """

    def __init__(
        self,
        d_context: int,
        config: AttentionConfig,
        num_actions: int,
        time_head: Literal["unconstrained", "monotonic"] = "unconstrained",
        time_distribution: Literal["point", "lognormal"] = "point",
        time_per_action: bool = True,
        max_offset_s: float = 14_400.0,
    ) -> None:
        super().__init__()
        self.num_actions, self.exit, self.max_offset_s = num_actions, num_actions - 1, max_offset_s
        self.attention = ContextAwareAttention(self._d_token(config.dim), d_context, config)
        self.heads = OutputHeads(config.dim, num_actions, time_head, time_distribution, time_per_action)

    @torch.no_grad()
    def init_from_statistics(self, share: Tensor, time: Tensor) -> None:
        """Initialize the heads to shares of actions among steps and to typical times.

        Args:
            share: [actions] share among steps.
            time: [actions] log1p seconds; NaN counts as 0.
        """
        for heads in self._all_heads():
            # The rows of a rare action are hardly trained: initialized at random, its times would stay noise.
            # Initialized to zero, the logits would learn rare actions much later: measured.
            nn.init.zeros_(heads.time.weight)
            heads.action.bias.copy_(share.clamp(min=1e-6).log())
            bias = torch.nan_to_num(time)
            if heads.is_monotonic:
                bias = torch.log(torch.expm1(bias.clamp(min=1e-2)))  # its softplus is the time
            heads.time.bias.copy_(bias if heads.time.out_features > 1 else bias[self.exit])

    def _all_heads(self) -> list[OutputHeads]:
        return [self.heads]

    @property
    def max_steps(self) -> int:
        """Maximum number of predicted steps: every action once, then ``exit``."""
        return self.num_actions - 1

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
        buckets: LengthBuckets,
        tables: StepEmbeddings,
    ) -> tuple[StepPredictions, StepPredictions | None]:
        """Return teacher-forced predictions of every next step.

        Args:
            action: [steps] emitted actions, ``start`` first, without ``exit``.
            offset_s: [steps] their times in seconds; NaN if unknown.
            label: [steps] next action; the monotonic head adds its times up along it.
            context: [targets, d_context].
            buckets: Length buckets of the targets' steps.
            tables: Full small tables.

        Returns:
            Predictions of shape [steps, actions], and None (the explicit form has no draft).
        """
        tokens = self._embed(action, offset_s, tables)
        emitted = F.one_hot(action, self.num_actions)
        width = tokens.shape[1]

        # Padding is at the end, where causal attention never looks.
        def predict_bucket(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
            tokens, emitted, label = x[..., :width], x[..., width:-1], x[..., -1].long()
            hidden = self.attention(tokens, c, causal=True)
            steps = self.heads.accumulate(self.heads(hidden, emitted.cumsum(1) > 0), label)
            return torch.stack([part for part in steps if part is not None], dim=-1)

        packed = torch.cat([tokens, emitted.to(tokens.dtype), label[:, None].to(tokens.dtype)], dim=1)
        parts = buckets.apply(predict_bucket, packed, context, per_token=True).unbind(-1)
        return StepPredictions(parts[0], parts[1], parts[2] if len(parts) > 2 else None), None

    def init_state(self, context: Tensor) -> DecoderState:
        """Return the state before ``start`` is emitted, for contexts [n, d_context]."""
        emitted = torch.zeros(len(context), self.num_actions, dtype=torch.bool, device=context.device)
        time_floor = context.new_zeros(len(context), 1) if self.heads.is_monotonic else None
        return DecoderState(torch.cat(self.attention.project_context(context), dim=1), None, emitted, time_floor)

    def precompute_tokens(self, tables: StepEmbeddings, timed: Tensor) -> TokenTable:
        """Return the attention terms of every step: the few actions and time buckets are shared by many prefixes.

        Args:
            tables: Full small tables.
            timed: [actions] bool, whether an action's time is known; otherwise it is read as missing, whatever its
                value. The time of ``start`` is always known.
        """
        buckets = len(tables.time) - 1
        known = timed.clone()
        known[0] = True
        time = torch.where(known[:, None, None], tables.time[1:], tables.time[:1]).flatten(0, 1)
        tokens = torch.cat([time, tables.action.repeat_interleave(buckets, 0)], dim=-1)
        return TokenTable(torch.cat(self.attention.project_tokens(tokens), dim=1), buckets)

    def step(
        self, action: Tensor, time: Tensor, state: DecoderState, tokens: TokenTable
    ) -> tuple[StepPredictions, DecoderState]:
        """Emit one step and predict the next.

        Args:
            action: [prefixes] action of the emitted step.
            time: [prefixes] its log1p seconds.
            state: State of the prefixes before it.
            tokens: Result of :meth:`precompute_tokens`.

        Returns:
            Predictions of shape [prefixes, actions] and the new state.
        """
        # As in log_bucketize, but from log1p seconds.
        scale = (tokens.buckets - 1) / math.log1p(self.max_offset_s)
        bucket = (time.clamp(min=0) * scale).long().clamp(max=tokens.buckets - 1)
        rows = tokens.projected.index_select(0, action * tokens.buckets + bucket)
        dim, heads = self.attention.dim, self.attention.heads
        token = TokenProjection(*rows.split([dim, dim, 2 * dim], dim=1))
        context = ContextProjection(*state.context_projection.split([dim, dim, heads], dim=1))
        hidden, kv_cache = self.attention.decode_step(token, context, state.kv_cache)
        emitted = state.emitted.scatter(1, action[:, None], True)
        steps = self.heads(hidden, emitted)
        if state.time_floor is not None:
            steps = steps._replace(time=state.time_floor + steps.time)
        return steps, DecoderState(state.context_projection, kv_cache, emitted, state.time_floor)

    def _embed(self, action: Tensor, offset_s: Tensor, tables: StepEmbeddings) -> Tensor:
        bucket = log_bucketize(offset_s, len(tables.time), self.max_offset_s)
        return torch.cat([tables.time[bucket], tables.action[action]], dim=-1)


class ImplicitGenerator(Generator):
    """A draft of all steps from the context alone, refined by one causal CAM.

    Learned step embeddings distinguish the draft's steps (METHODS §4; without them all steps would be equal).
    ``options`` are those of :class:`Generator`.
    """

    def __init__(self, d_context: int, config: AttentionConfig, num_actions: int, **options: Any) -> None:
        super().__init__(d_context, config, num_actions, **options)
        dim, heads = config.dim, self.heads
        self.step_embedding = nn.Parameter(torch.randn(self.max_steps, dim) * 0.05)
        self.draft = nn.Sequential(nn.Linear(d_context + dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.draft_heads = OutputHeads(
            dim,
            num_actions,
            "monotonic" if heads.is_monotonic else "unconstrained",
            "point" if heads.log_scale is None else "lognormal",
            heads.time.out_features > 1,
        )

    def forward(
        self,
        action: Tensor,
        offset_s: Tensor,
        label: Tensor,
        context: Tensor,
        buckets: LengthBuckets,
        tables: StepEmbeddings,
    ) -> tuple[StepPredictions, StepPredictions | None]:
        """Return final and draft predictions of every next step, each of shape [steps, actions].

        Arguments are those of the explicit form; only the number of steps and ``label`` (monotonic head) are used.
        """

        def predict_bucket(x: Tensor, c: Tensor, _: Tensor | None) -> Tensor:
            final, draft = self.predict(c, x.shape[1], x[..., 0].long())
            return torch.stack([part for part in (*final, *draft) if part is not None], dim=-1)

        parts = buckets.apply(predict_bucket, label[:, None].to(context.dtype), context, per_token=True).unbind(-1)
        half = len(parts) // 2
        final, draft = parts[:half], parts[half:]
        return StepPredictions(*final, *[None] * (3 - half)), StepPredictions(*draft, *[None] * (3 - half))

    def predict(
        self, context: Tensor, num_steps: int, label: Tensor | None = None
    ) -> tuple[StepPredictions, StepPredictions]:
        """Return final and draft predictions of the first ``num_steps`` steps: [m, d_context] -> [m, steps, actions].

        Without ``label`` [m, num_steps] a monotonic head adds its times up along its own most probable actions.
        """
        steps = self.step_embedding[:num_steps].to(context.dtype).expand(len(context), -1, -1)
        draft = self.draft(torch.cat([context[:, None].expand(-1, num_steps, -1), steps], dim=-1))
        forbidden = torch.zeros(self.num_actions, dtype=torch.bool, device=context.device)
        forbidden[0] = True
        forbidden = forbidden.expand(len(context), num_steps, -1)
        first = self.draft_heads(draft, forbidden)
        final = self.heads(self.attention(draft, context, causal=True), forbidden)
        action = final.logits.argmax(-1) if label is None else label
        return self.heads.accumulate(final, action), self.draft_heads.accumulate(first, action)

    def _d_token(self, dim: int) -> int:
        return dim

    def _all_heads(self) -> list[OutputHeads]:
        return [self.heads, self.draft_heads]
