"""Decoding against plain enumeration of every sequence, each step recomputed from its whole prefix."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from a2gen_rec.nn.attention import AttentionConfig
from a2gen_rec.nn.decoding import DecodedSequences, decode
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings
from a2gen_rec.nn.marginals import action_marginals, top_sequences
from a2gen_rec.utils.jagged import LengthBuckets

DIM, D_CONTEXT, BUCKETS, CONTEXTS = 8, 5, 7, 3
FORMS = [ExplicitGenerator, ImplicitGenerator]
VARIANTS = [
    {},
    {"time_head": "monotonic"},
    {"time_distribution": "lognormal", "residual": "both", "mlp_ratio": 1.0},
    {"time_per_action": False, "time_head": "monotonic", "time_distribution": "lognormal"},
]


class World(NamedTuple):
    generator: Any
    context: Tensor
    tables: StepEmbeddings
    timed: Tensor


class Sequence(NamedTuple):
    """Codes after ``start`` up to ``exit``, their times in log1p seconds, and the probability of all of it."""

    action: tuple[int, ...]
    time: tuple[float, ...]
    log_p: float


def make(form: type[Generator], events: int = 3, sharp: float = 1.0, **options: Any) -> World:
    """Random weights and contexts; the logits of first steps spread by ``sharp``. The second event is not timed."""
    actions = events + 2
    attention = {name: options.pop(name) for name in ("residual", "mlp_ratio") if name in options}
    generator = form(D_CONTEXT, AttentionConfig(DIM, 2, **attention), actions, max_offset_s=100.0, **options).double()
    torch.manual_seed(12)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    tables = StepEmbeddings(*(torch.randn(rows, DIM, dtype=torch.float64) for rows in (actions, BUCKETS)))
    timed = torch.ones(actions, dtype=torch.bool)
    timed[2] = False
    world = World(generator, torch.randn(CONTEXTS, D_CONTEXT, dtype=torch.float64), tables, timed)
    with torch.no_grad():
        generator.heads.action.bias.zero_()
        spread = torch.tensor([next_step(world, n, (), ())[0][1:] for n in range(CONTEXTS)]).std(1).mean()
        generator.heads.action.weight.mul_(sharp / spread)
    return world


def fed_back(world: World, action: int, time: float) -> float:
    return max(math.expm1(time), 0.0) if world.timed[action] else math.nan


@torch.no_grad()
def next_step(world: World, n: int, action: tuple[int, ...], time: tuple[float, ...]) -> tuple[list, list]:
    """log p and time of every possible next action after a prefix, from the teacher-forced forward over all of it."""
    generator, length = world.generator, len(action) + 1
    context = world.context[n : n + 1]
    if isinstance(generator, ImplicitGenerator):
        steps, _ = generator.predict(context, generator.max_steps)
        logits, times = steps.logits[0, length - 1].clone(), steps.time[0, length - 1]
        logits[list(action)] = -torch.inf
    else:
        offset = [0.0, *(fed_back(world, a, t) for a, t in zip(action, time, strict=True))]
        steps, _ = generator(
            torch.tensor([0, *action]),
            torch.tensor(offset, dtype=torch.float64),
            torch.tensor([*action, generator.exit]),
            context,
            LengthBuckets.from_lengths(torch.tensor([length])),
            world.tables,
        )
        logits, times = steps.logits[-1], steps.time[-1]
    return torch.log_softmax(logits, -1).tolist(), times.tolist()


def enumerate_all(world: World, n: int) -> list[Sequence]:
    """Every sequence of events without repetition that ends in ``exit``, most probable first."""
    last = world.generator.exit

    def grow(prefix: Sequence) -> Iterator[Sequence]:
        log_p, time = next_step(world, n, prefix.action, prefix.time)
        for code in range(1, last + 1):
            if code in prefix.action:
                continue
            longer = Sequence((*prefix.action, code), (*prefix.time, time[code]), prefix.log_p + log_p[code])
            yield from [longer] if code == last else grow(longer)

    found = sorted(grow(Sequence((), (), 0.0)), key=lambda sequence: -sequence.log_p)
    orders = itertools.chain.from_iterable(itertools.permutations(range(1, last), k) for k in range(last))
    assert {sequence.action for sequence in found} == {(*order, last) for order in orders}
    return found


def expected_occurrence(sequences: list[Sequence], actions: int) -> tuple[list[float], list[float]]:
    """P(a happens), and the probability-weighted mean of its times, from an enumeration."""
    probability, time = [1.0], [0.0]
    for code in range(1, actions):
        with_it = [s for s in sequences if code in s.action]
        mass = sum(math.exp(s.log_p) for s in with_it)
        probability.append(mass)
        time.append(sum(math.exp(s.log_p) * s.time[s.action.index(code)] for s in with_it) / mass)
    return probability, time


def sequence_of(decoded: DecodedSequences, n: int, k: int) -> Sequence:
    action = [code for code in decoded.action[n, k].tolist() if code >= 0]
    return Sequence(
        tuple(action), tuple(decoded.time[n, k, : len(action)].tolist()), decoded.log_probability[n, k].item()
    )


def assert_same(got: Sequence, expected: Sequence) -> None:
    assert got.action == expected.action
    assert got.time == pytest.approx(expected.time, rel=1e-9, abs=1e-9)
    assert got.log_p == pytest.approx(expected.log_p, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_tree_equals_enumeration(options: dict) -> None:
    world = make(ExplicitGenerator, events=4, **options)
    got = action_marginals(*world, max_unexplored_mass=0.0)
    assert got.probability.shape == got.time.shape == (CONTEXTS, 6)
    assert not got.unexplored_mass.any()
    for n in range(CONTEXTS):
        sequences = enumerate_all(world, n)
        assert len(sequences) == 65
        assert sum(math.exp(s.log_p) for s in sequences) == pytest.approx(1, abs=1e-12)
        probability, time = expected_occurrence(sequences, 6)
        assert got.probability[n].tolist() == pytest.approx(probability, rel=1e-9, abs=1e-12)
        assert got.time[n].tolist() == pytest.approx(time, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["offset", "missing"])
def test_the_tree_feeds_times_back(name: str) -> None:
    """What is emitted, and that an unrecorded time is emitted as missing, changes the predictions that follow."""
    world = make(ExplicitGenerator)
    before = action_marginals(*world, max_unexplored_mass=0.0).probability
    if name == "missing":
        after = action_marginals(
            *world._replace(timed=torch.ones_like(world.timed)), max_unexplored_mass=0.0
        ).probability
    else:
        with torch.no_grad():
            world.generator.heads.time.bias.add_(3.0)
        after = action_marginals(*world, max_unexplored_mass=0.0).probability
    assert ((before - after).abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("sharp", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("max_unexplored_mass", [0.0, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.3])
def test_what_is_pruned_is_accounted_for_and_bounded(sharp: float, max_unexplored_mass: float) -> None:
    world = make(ExplicitGenerator, events=4, sharp=sharp)
    exact, pruned = (
        action_marginals(*world, max_unexplored_mass=0.0),
        action_marginals(*world, max_unexplored_mass=max_unexplored_mass),
    )
    ends = pruned.probability[:, [0, -1]]
    torch.testing.assert_close(ends, torch.ones_like(ends), rtol=0, atol=1e-12)
    error = (exact.probability - pruned.probability).abs()
    assert (error <= pruned.unexplored_mass[:, None] + 1e-12).all()
    assert (pruned.unexplored_mass <= max_unexplored_mass + 1e-12).all()
    if max_unexplored_mass >= 0.3:
        assert (pruned.unexplored_mass > 0).any()
        assert (error > 1e-6).any()
        assert error[:, 1:-1].mean() < 0.1 * pruned.unexplored_mass.mean(), "what is not followed is told well"


@pytest.mark.parametrize(
    "max_unexplored_mass", [20.0, 1.0]
)  # all that is left may be lost: it is, however it is spread
def test_what_is_not_followed_goes_on_as_its_siblings_do(max_unexplored_mass: float) -> None:
    """With the first step alone, two events come in either order: the second with its share of what the first leaves,
    at its own time but not before the first, as far as times are known."""
    world = make(ExplicitGenerator, events=2)
    pruned = action_marginals(*world, max_unexplored_mass=max_unexplored_mass)
    for n in range(CONTEXTS):
        log_p, at = next_step(world, n, (), ())
        _, one, two, end = (math.exp(value) for value in log_p)
        for code, first, other in ((1, one, two), (2, two, one)):
            then = other * first / (1 - other)
            assert pruned.probability[n, code].item() == pytest.approx(first + then)
            time = first * at[code] + then * max(at[code], at[1])  # the second event's times mean nothing
            assert pruned.time[n, code].item() == pytest.approx(time / (first + then))
        assert pruned.unexplored_mass[n].item() == pytest.approx(one + two) == 1 - end


@pytest.mark.parametrize("form", FORMS)
def test_an_impossible_action_has_no_time(form: type[Generator]) -> None:
    world = make(form)
    with torch.no_grad():
        world.generator.heads.action.bias[2] = -1e6
    got = action_marginals(*world, max_unexplored_mass=0.0)
    assert not got.probability[:, 2].any()
    assert got.time[:, 2].isnan().all()
    assert got.time[:, [1, 3, 4]].isfinite().all()
    assert (got.probability[:, 0] == 1).all()


@pytest.mark.parametrize("options", VARIANTS)
def test_implicit_closed_form_equals_independent_draws(options: dict) -> None:
    """Draw every step on its own; an action happens if it is drawn before the first ``exit``, for the first time."""
    world = make(ImplicitGenerator, **options)
    generator = world.generator
    with torch.no_grad():
        steps, _ = generator.predict(world.context, generator.max_steps)
    p, times = torch.softmax(steps.logits, -1), steps.time
    got = action_marginals(*world, max_unexplored_mass=0.1)
    for n in range(CONTEXTS):
        mass, time_mass, endless = [0.0] * 5, [0.0] * 5, 0.0
        for draw in itertools.product(range(1, 5), repeat=generator.max_steps):
            chance = math.prod(p[n, i, code].item() for i, code in enumerate(draw))
            ends = draw.index(4) if 4 in draw else len(draw)
            endless += chance * (4 not in draw)
            for code in set(draw[: ends + 1]):
                mass[code] += chance
                time_mass[code] += chance * times[n, draw.index(code), code].item()
        assert got.probability[n].tolist() == pytest.approx([1.0, *mass[1:]], rel=1e-9)
        expected = [0.0, *(t / m for t, m in zip(time_mass[1:], mass[1:], strict=True))]
        assert got.time[n].tolist() == pytest.approx(expected, rel=1e-9)
        assert got.unexplored_mass[n].item() == pytest.approx(endless, rel=1e-9)
    torch.testing.assert_close(got.probability[:, -1] + got.unexplored_mass, torch.ones(CONTEXTS, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", VARIANTS)
def test_greedy_equals_recomputing_every_step(form: type[Generator], options: dict) -> None:
    world = make(form, events=4, **options)
    decoded = decode(*world, strategy="greedy")
    for n in range(CONTEXTS):
        action, time, total = (), (), 0.0
        while not action or action[-1] != world.generator.exit:
            log_p, times = next_step(world, n, action, time)
            best = max(range(len(log_p)), key=log_p.__getitem__)
            action, time, total = (*action, best), (*time, times[best]), total + log_p[best]
        assert_same(sequence_of(decoded, n, 0), Sequence(action, time, total))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("width", [16, 21])
def test_a_wide_beam_is_the_enumeration_in_order(form: type[Generator], options: dict, width: int) -> None:
    world = make(form, **options)
    decoded = decode(*world, strategy="beam", width=width)
    assert decoded.action.shape == decoded.time.shape == (CONTEXTS, width, 4)
    for n in range(CONTEXTS):
        expected = enumerate_all(world, n)
        assert len(expected) == 16
        for k, sequence in enumerate(expected):
            assert_same(sequence_of(decoded, n, k), sequence)
        assert (decoded.log_probability[n, 16:] == -torch.inf).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_narrow_beam_holds_true_sequences_in_order(form: type[Generator]) -> None:
    world = make(form, events=4)
    decoded = decode(*world, strategy="beam", width=5)
    for n in range(CONTEXTS):
        known = {sequence.action: sequence for sequence in enumerate_all(world, n)}
        found = [sequence_of(decoded, n, k) for k in range(5)]
        assert len({sequence.action for sequence in found}) == 5
        assert [s.log_p for s in found] == sorted((s.log_p for s in found), reverse=True)
        for sequence in found:
            assert_same(sequence, known[sequence.action])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", VARIANTS)
def test_a_beam_of_one_is_greedy(form: type[Generator], options: dict) -> None:
    world = make(form, events=4, **options)
    beam, greedy = decode(*world, strategy="beam", width=1), decode(*world, strategy="greedy", width=7)
    assert torch.equal(beam.action, greedy.action)
    torch.testing.assert_close(beam.time, greedy.time, equal_nan=True, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(beam.log_probability, greedy.log_probability, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("width", [1, 7, 20])
def test_the_likeliest_of_a_whole_tree_are_the_enumeration_in_order(options: dict, width: int) -> None:
    world, contexts = make(ExplicitGenerator, **options), [2, 0]
    decoded = top_sequences(action_marginals(*world, max_unexplored_mass=0.0), torch.tensor(contexts), width)
    assert decoded.log_probability.shape == (2, width)
    for n, context in enumerate(contexts):
        expected = enumerate_all(world, context)
        for k, sequence in enumerate(expected[:width]):
            assert_same(sequence_of(decoded, n, k), sequence)
            assert (decoded.action[n, k, len(sequence.action) :] == -1).all()
            assert decoded.time[n, k, len(sequence.action) :].isnan().all()
        assert (decoded.log_probability[n, len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("max_unexplored_mass", [0.5, 0.1, 0.01])
def test_no_sequence_that_a_pruned_tree_leaves_out_is_likelier_than_its_remainder(max_unexplored_mass: float) -> None:
    world = make(ExplicitGenerator, events=4, sharp=2.0)
    what = action_marginals(*world, max_unexplored_mass=max_unexplored_mass)
    decoded = top_sequences(what, torch.arange(CONTEXTS), 70)
    for n in range(CONTEXTS):
        known = {sequence.action: sequence for sequence in enumerate_all(world, n)}
        told = [sequence_of(decoded, n, k) for k in range(70) if decoded.log_probability[n, k].isfinite()]
        assert 0 < len(told) < len(known)
        assert [s.log_p for s in told] == sorted((s.log_p for s in told), reverse=True)
        for sequence in told:
            assert_same(sequence, known[sequence.action])
        left_out = [math.exp(s.log_p) for action, s in known.items() if action not in {each.action for each in told}]
        assert sum(left_out) == pytest.approx(what.unexplored_mass[n].item(), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_samples_come_as_often_as_they_are_probable(form: type[Generator]) -> None:
    world, draws = make(form, sharp=0.5), 4_000
    rng = torch.Generator().manual_seed(0)
    decoded = decode(*world, strategy="sample", width=draws, rng=rng)
    for n in range(CONTEXTS):
        known = {sequence.action: sequence for sequence in enumerate_all(world, n)}
        seen: Counter[tuple[int, ...]] = Counter(
            tuple(code for code in row if code >= 0) for row in decoded.action[n].tolist()
        )
        assert set(seen) <= set(known)
        for action, sequence in known.items():
            p = math.exp(sequence.log_p)
            assert abs(seen[action] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 2 / draws
        for k in (0, draws // 2, draws - 1):
            sample = sequence_of(decoded, n, k)
            assert_same(sample, known[sample.action])


def test_sampling_is_reproducible_by_its_source_of_randomness() -> None:
    world = make(ExplicitGenerator, events=4, sharp=0.3)
    draws = [
        decode(*world, strategy="sample", width=50, rng=torch.Generator().manual_seed(seed)).action
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("sharp", [0.1, 5.0])
def test_no_action_comes_twice_and_exit_comes_last(form: type[Generator], strategy: Any, sharp: float) -> None:
    world = make(form, events=4, sharp=sharp)
    decoded = decode(*world, strategy=strategy, width=40, rng=torch.Generator().manual_seed(0))
    assert (decoded.log_probability <= 0).all()
    assert decoded.log_probability.isfinite().all()
    for n in range(CONTEXTS):
        assert (decoded.log_probability[n].diff() <= 0).all(), "most probable first"
        for row, time in zip(decoded.action[n], decoded.time[n], strict=True):
            codes = row.tolist()
            length = codes.index(world.generator.exit) + 1
            assert len(set(codes[:length])) == length
            assert 0 not in codes
            assert codes[length:] == [-1] * (len(codes) - length)
            assert time[:length].isfinite().all()
            assert time[length:].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_contexts_do_not_touch_each_other(form: type[Generator]) -> None:
    world = make(form, events=4)
    together = decode(*world, strategy="beam", width=6), action_marginals(*world, max_unexplored_mass=0.01)
    for n in range(CONTEXTS):
        one = world._replace(context=world.context[n : n + 1])
        alone = decode(*one, strategy="beam", width=6), action_marginals(*one, max_unexplored_mass=0.01)
        for k in range(6):
            assert_same(sequence_of(together[0], n, k), sequence_of(alone[0], 0, k))
        for name in ("probability", "time", "unexplored_mass"):
            torch.testing.assert_close(getattr(together[1], name)[n], getattr(alone[1], name)[0])


def test_no_contexts_no_predictions() -> None:
    for form in FORMS:
        world = make(form)
        nothing = action_marginals(world.generator, world.context[:0], world.tables, world.timed)
        assert nothing.probability.shape == nothing.time.shape == (0, 5)
