"""Step-by-step generation of action sequences (METHODS §4)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, StepPredictions


@dataclass(frozen=True)
class DecodedSequences:
    """Generated sequences, ``width`` per context, most probable first.

    Attributes:
        action: [n, width, steps] codes up to and including ``exit``; -1 beyond it.
        time: [n, width, steps] log1p seconds; NaN beyond ``exit``.
        log_probability: [n, width] of the full sequence; -inf if a context has fewer than ``width`` sequences.
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
) -> DecodedSequences:
    """Generate action sequences with cached attention.

    Args:
        generator: Trained generator.
        context: [n, d_context].
        tables: Full small tables.
        timed: [actions] bool, whether an emitted action is read with its time.
        strategy: Search strategy.
        width: Sequences per context; 1 for ``greedy``.
        rng: Random generator for ``sample``.
    """
    if strategy == "greedy":
        width = 1
    n, num_actions = len(context), generator.num_actions
    context = context.repeat_interleave(width, 0)
    score = context.new_zeros(n, width)
    if strategy == "beam":
        score[:, 1:] = -torch.inf  # all beams start equal: only one may count
    predictor = _StepPredictor(generator, context, tables, timed)
    history_action: list[Tensor] = []
    history_time: list[Tensor] = []
    done = torch.zeros(n * width, dtype=torch.bool, device=context.device)
    stop = F.one_hot(torch.tensor(num_actions - 1, device=context.device), num_actions).bool()
    for step in range(generator.max_steps):
        steps = predictor.predict(step)
        # A finished sequence continues with `exit` at no cost, which keeps it one candidate among the beams.
        log_p = torch.log_softmax(steps.logits, -1)
        log_p = torch.where(done[:, None], torch.where(stop, 0.0, -torch.inf), log_p).view(n, width, num_actions)
        if strategy == "beam":
            score, best = (score[..., None] + log_p).flatten(1).topk(width)
            parent = (best // num_actions + torch.arange(n, device=best.device)[:, None] * width).flatten()
            action = (best % num_actions).flatten()
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
        predictor.advance(parent, action, time)
        done = was_done | (action == num_actions - 1)
        if done.all():
            break
    order = score.argsort(1, descending=True)
    shape = (n, width, len(history_action))
    by_rank = order[..., None].expand(shape)
    return DecodedSequences(
        torch.stack(history_action, -1).view(shape).gather(1, by_rank),
        torch.stack(history_time, -1).view(shape).gather(1, by_rank),
        score.gather(1, order),
    )


class _StepPredictor:
    """Predictions of the next step of many prefixes, for either form of generator."""

    def __init__(self, generator: Generator, context: Tensor, tables: StepEmbeddings, timed: Tensor) -> None:
        self.generator = generator
        self.action = torch.zeros(len(context), dtype=torch.long, device=context.device)
        self.time = context.new_zeros(len(context))
        self.emitted = torch.zeros(len(context), generator.num_actions, dtype=torch.bool, device=context.device)
        if isinstance(generator, ExplicitGenerator):
            self.state, self.tokens = generator.init_state(context), generator.precompute_tokens(tables, timed)
        elif isinstance(generator, ImplicitGenerator):
            self.draft, _ = generator.predict(context, generator.max_steps)

    def predict(self, step: int) -> StepPredictions:
        generator = self.generator
        if isinstance(generator, ExplicitGenerator):
            steps, self.state = generator.step(self.action, self.time, self.state, self.tokens)
            return steps
        scale = self.draft.log_scale
        return StepPredictions(
            self.draft.logits[:, step].masked_fill(self.emitted, -torch.inf),
            self.draft.time[:, step],
            None if scale is None else scale[:, step],
        )

    def advance(self, parent: Tensor, action: Tensor, time: Tensor) -> None:
        self.action, self.time = action, time
        if isinstance(self.generator, ExplicitGenerator):
            self.state = self.state.select(parent).advance_time(time)
        else:
            self.emitted = self.emitted[parent] | F.one_hot(action, self.generator.num_actions).bool()
            self.emitted[:, -1] = False  # a finished sequence continues with `exit`
