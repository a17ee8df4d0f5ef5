"""Decoding against enumeration of all sequences, with each step recomputed from its full prefix."""

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
GENERATORS = [ExplicitGenerator, ImplicitGenerator]
VARIANTS = [
    {},
    {"time_head": "monotonic"},
    {"time_distribution": "lognormal", "residual": "both", "mlp_ratio": 1.0},
    {"time_per_action": False, "time_head": "monotonic", "time_distribution": "lognormal"},
]


class Setup(NamedTuple):
    generator: Any
    context: Tensor
    tables: StepEmbeddings
    timed: Tensor


class Sequence(NamedTuple):
    """Codes after ``start`` up to ``exit``, their times in log1p seconds, and the sequence's log probability."""

    action: tuple[int, ...]
    time: tuple[float, ...]
    log_p: float


def make(generator_class: type[Generator], events: int = 3, sharp: float = 1.0, **options: Any) -> Setup:
    """Return random weights and contexts; ``sharp`` scales the first logits. The second event has no time."""
    actions = events + 2
    attention = {name: options.pop(name) for name in ("residual", "mlp_ratio") if name in options}
    generator = generator_class(
        D_CONTEXT, AttentionConfig(DIM, 2, **attention), actions, max_offset_s=100.0, **options
    ).double()
    torch.manual_seed(12)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    tables = StepEmbeddings(*(torch.randn(rows, DIM, dtype=torch.float64) for rows in (actions, BUCKETS)))
    timed = torch.ones(actions, dtype=torch.bool)
    timed[2] = False
    setup = Setup(generator, torch.randn(CONTEXTS, D_CONTEXT, dtype=torch.float64), tables, timed)
    with torch.no_grad():
        generator.heads.action.bias.zero_()
        spread = torch.tensor([next_step(setup, n, (), ())[0][1:] for n in range(CONTEXTS)]).std(1).mean()
        generator.heads.action.weight.mul_(sharp / spread)
    return setup


def fed_back(setup: Setup, action: int, time: float) -> float:
    return max(math.expm1(time), 0.0) if setup.timed[action] else math.nan


@torch.no_grad()
def next_step(setup: Setup, n: int, action: tuple[int, ...], time: tuple[float, ...]) -> tuple[list, list]:
    """Return log p and time of every next action after a prefix, by a teacher-forced pass over the prefix."""
    generator, length = setup.generator, len(action) + 1
    context = setup.context[n : n + 1]
    if isinstance(generator, ImplicitGenerator):
        steps, _ = generator.predict(context, generator.max_steps)
        logits, times = steps.logits[0, length - 1].clone(), steps.time[0, length - 1]
        logits[list(action)] = -torch.inf
    else:
        offset = [0.0, *(fed_back(setup, a, t) for a, t in zip(action, time, strict=True))]
        steps, _ = generator(
            torch.tensor([0, *action]),
            torch.tensor(offset, dtype=torch.float64),
            torch.tensor([*action, generator.exit]),
            context,
            LengthBuckets.from_lengths(torch.tensor([length])),
            setup.tables,
        )
        logits, times = steps.logits[-1], steps.time[-1]
    return torch.log_softmax(logits, -1).tolist(), times.tolist()


def enumerate_all(setup: Setup, n: int) -> list[Sequence]:
    """Return all sequences of distinct events that end in ``exit``, most probable first."""
    last = setup.generator.exit

    def grow(prefix: Sequence) -> Iterator[Sequence]:
        log_p, time = next_step(setup, n, prefix.action, prefix.time)
        for code in range(1, last + 1):
            if code in prefix.action:
                continue
            longer = Sequence((*prefix.action, code), (*prefix.time, time[code]), prefix.log_p + log_p[code])
            yield from [longer] if code == last else grow(longer)

    results = sorted(grow(Sequence((), (), 0.0)), key=lambda sequence: -sequence.log_p)
    orders = itertools.chain.from_iterable(itertools.permutations(range(1, last), k) for k in range(last))
    assert {sequence.action for sequence in results} == {(*order, last) for order in orders}
    return results


def expected_occurrence(sequences: list[Sequence], actions: int) -> tuple[list[float], list[float]]:
    """Return P(a occurs) and the probability-weighted mean of its times, from an enumeration."""
    probability, time = [1.0], [0.0]
    for code in range(1, actions):
        with_it = [s for s in sequences if code in s.action]
        mass = sum(math.exp(s.log_p) for s in with_it)
        probability.append(mass)
        time.append(sum(math.exp(s.log_p) * s.time[s.action.index(code)] for s in with_it) / mass)
    return probability, time


def get_sequence(decoded: DecodedSequences, n: int, k: int) -> Sequence:
    action = [code for code in decoded.action[n, k].tolist() if code >= 0]
    return Sequence(
        tuple(action), tuple(decoded.time[n, k, : len(action)].tolist()), decoded.log_probability[n, k].item()
    )


def assert_same(actual: Sequence, expected: Sequence) -> None:
    assert actual.action == expected.action
    assert actual.time == pytest.approx(expected.time, rel=1e-9, abs=1e-9)
    assert actual.log_p == pytest.approx(expected.log_p, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_tree_equals_enumeration(options: dict) -> None:
    setup = make(ExplicitGenerator, events=4, **options)
    actual = action_marginals(*setup, max_unexplored_mass=0.0)
    assert actual.probability.shape == actual.time.shape == (CONTEXTS, 6)
    assert not actual.unexplored_mass.any()
    for n in range(CONTEXTS):
        sequences = enumerate_all(setup, n)
        assert len(sequences) == 65
        assert sum(math.exp(s.log_p) for s in sequences) == pytest.approx(1, abs=1e-12)
        probability, time = expected_occurrence(sequences, 6)
        assert actual.probability[n].tolist() == pytest.approx(probability, rel=1e-9, abs=1e-12)
        assert actual.time[n].tolist() == pytest.approx(time, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["offset", "missing"])
def test_tree_feeds_times_back(name: str) -> None:
    """Emitted times, and missing times of untimed actions, affect later predictions."""
    setup = make(ExplicitGenerator)
    before = action_marginals(*setup, max_unexplored_mass=0.0).probability
    if name == "missing":
        after = action_marginals(
            *setup._replace(timed=torch.ones_like(setup.timed)), max_unexplored_mass=0.0
        ).probability
    else:
        with torch.no_grad():
            setup.generator.heads.time.bias.add_(3.0)
        after = action_marginals(*setup, max_unexplored_mass=0.0).probability
    assert ((before - after).abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("sharp", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("max_unexplored_mass", [0.0, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.3])
def test_pruned_mass_is_reported_and_bounded(sharp: float, max_unexplored_mass: float) -> None:
    setup = make(ExplicitGenerator, events=4, sharp=sharp)
    exact, pruned = (
        action_marginals(*setup, max_unexplored_mass=0.0),
        action_marginals(*setup, max_unexplored_mass=max_unexplored_mass),
    )
    ends = pruned.probability[:, [0, -1]]
    torch.testing.assert_close(ends, torch.ones_like(ends), rtol=0, atol=1e-12)
    error = (exact.probability - pruned.probability).abs()
    assert (error <= pruned.unexplored_mass[:, None] + 1e-12).all()
    assert (pruned.unexplored_mass <= max_unexplored_mass + 1e-12).all()
    if max_unexplored_mass >= 0.3:
        assert (pruned.unexplored_mass > 0).any()
        assert (error > 1e-6).any()
        assert error[:, 1:-1].mean() < 0.1 * pruned.unexplored_mass.mean(), (
            "extrapolated probabilities must be accurate"
        )


@pytest.mark.parametrize("max_unexplored_mass", [20.0, 1.0])  # the budget covers the whole first level
def test_pruned_prefixes_are_extrapolated_from_siblings(max_unexplored_mass: float) -> None:
    """With the first step alone, two events occur in either order: the second with its share of the remaining
    probability, at its own time but not before the first, if times are known."""
    setup = make(ExplicitGenerator, events=2)
    pruned = action_marginals(*setup, max_unexplored_mass=max_unexplored_mass)
    for n in range(CONTEXTS):
        log_p, at = next_step(setup, n, (), ())
        _, one, two, end = (math.exp(value) for value in log_p)
        for code, first, other in ((1, one, two), (2, two, one)):
            then = other * first / (1 - other)
            assert pruned.probability[n, code].item() == pytest.approx(first + then)
            time = first * at[code] + then * max(at[code], at[1])  # the second event has no recorded times
            assert pruned.time[n, code].item() == pytest.approx(time / (first + then))
        assert pruned.unexplored_mass[n].item() == pytest.approx(one + two) == 1 - end


@pytest.mark.parametrize("generator_class", GENERATORS)
def test_impossible_action_has_no_time(generator_class: type[Generator]) -> None:
    setup = make(generator_class)
    with torch.no_grad():
        setup.generator.heads.action.bias[2] = -1e6
    actual = action_marginals(*setup, max_unexplored_mass=0.0)
    assert not actual.probability[:, 2].any()
    assert actual.time[:, 2].isnan().all()
    assert actual.time[:, [1, 3, 4]].isfinite().all()
    assert (actual.probability[:, 0] == 1).all()


@pytest.mark.parametrize("options", VARIANTS)
def test_implicit_closed_form_equals_independent_sampling(options: dict) -> None:
    """Sample steps independently; an action occurs if it is drawn before the first ``exit``."""
    setup = make(ImplicitGenerator, **options)
    generator = setup.generator
    with torch.no_grad():
        steps, _ = generator.predict(setup.context, generator.max_steps)
    p, times = torch.softmax(steps.logits, -1), steps.time
    actual = action_marginals(*setup, max_unexplored_mass=0.1)
    for n in range(CONTEXTS):
        mass, time_mass, endless = [0.0] * 5, [0.0] * 5, 0.0
        for draw in itertools.product(range(1, 5), repeat=generator.max_steps):
            chance = math.prod(p[n, i, code].item() for i, code in enumerate(draw))
            ends = draw.index(4) if 4 in draw else len(draw)
            endless += chance * (4 not in draw)
            for code in set(draw[: ends + 1]):
                mass[code] += chance
                time_mass[code] += chance * times[n, draw.index(code), code].item()
        assert actual.probability[n].tolist() == pytest.approx([1.0, *mass[1:]], rel=1e-9)
        expected = [0.0, *(t / m for t, m in zip(time_mass[1:], mass[1:], strict=True))]
        assert actual.time[n].tolist() == pytest.approx(expected, rel=1e-9)
        assert actual.unexplored_mass[n].item() == pytest.approx(endless, rel=1e-9)
    torch.testing.assert_close(
        actual.probability[:, -1] + actual.unexplored_mass, torch.ones(CONTEXTS, dtype=torch.float64)
    )


@pytest.mark.parametrize("generator_class", GENERATORS)
@pytest.mark.parametrize("options", VARIANTS)
def test_greedy_equals_recomputation(generator_class: type[Generator], options: dict) -> None:
    setup = make(generator_class, events=4, **options)
    decoded = decode(*setup, strategy="greedy")
    for n in range(CONTEXTS):
        action, time, total = (), (), 0.0
        while not action or action[-1] != setup.generator.exit:
            log_p, times = next_step(setup, n, action, time)
            best = max(range(len(log_p)), key=log_p.__getitem__)
            action, time, total = (*action, best), (*time, times[best]), total + log_p[best]
        assert_same(get_sequence(decoded, n, 0), Sequence(action, time, total))


@pytest.mark.parametrize("generator_class", GENERATORS)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("width", [16, 21])
def test_wide_beam_equals_enumeration(generator_class: type[Generator], options: dict, width: int) -> None:
    setup = make(generator_class, **options)
    decoded = decode(*setup, strategy="beam", width=width)
    assert decoded.action.shape == decoded.time.shape == (CONTEXTS, width, 4)
    for n in range(CONTEXTS):
        expected = enumerate_all(setup, n)
        assert len(expected) == 16
        for k, sequence in enumerate(expected):
            assert_same(get_sequence(decoded, n, k), sequence)
        assert (decoded.log_probability[n, 16:] == -torch.inf).all()


@pytest.mark.parametrize("generator_class", GENERATORS)
def test_narrow_beam_returns_sorted_valid_sequences(generator_class: type[Generator]) -> None:
    setup = make(generator_class, events=4)
    decoded = decode(*setup, strategy="beam", width=5)
    for n in range(CONTEXTS):
        known = {sequence.action: sequence for sequence in enumerate_all(setup, n)}
        results = [get_sequence(decoded, n, k) for k in range(5)]
        assert len({sequence.action for sequence in results}) == 5
        assert [s.log_p for s in results] == sorted((s.log_p for s in results), reverse=True)
        for sequence in results:
            assert_same(sequence, known[sequence.action])


@pytest.mark.parametrize("generator_class", GENERATORS)
@pytest.mark.parametrize("options", VARIANTS)
def test_beam_of_width_one_is_greedy(generator_class: type[Generator], options: dict) -> None:
    setup = make(generator_class, events=4, **options)
    beam, greedy = decode(*setup, strategy="beam", width=1), decode(*setup, strategy="greedy", width=7)
    assert torch.equal(beam.action, greedy.action)
    torch.testing.assert_close(beam.time, greedy.time, equal_nan=True, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(beam.log_probability, greedy.log_probability, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("width", [1, 7, 20])
def test_top_sequences_of_full_tree_equal_enumeration(options: dict, width: int) -> None:
    setup, contexts = make(ExplicitGenerator, **options), [2, 0]
    decoded = top_sequences(action_marginals(*setup, max_unexplored_mass=0.0), torch.tensor(contexts), width)
    assert decoded.log_probability.shape == (2, width)
    for n, context in enumerate(contexts):
        expected = enumerate_all(setup, context)
        for k, sequence in enumerate(expected[:width]):
            assert_same(get_sequence(decoded, n, k), sequence)
            assert (decoded.action[n, k, len(sequence.action) :] == -1).all()
            assert decoded.time[n, k, len(sequence.action) :].isnan().all()
        assert (decoded.log_probability[n, len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("max_unexplored_mass", [0.5, 0.1, 0.01])
def test_missing_sequences_are_bounded_by_unexplored_mass(max_unexplored_mass: float) -> None:
    setup = make(ExplicitGenerator, events=4, sharp=2.0)
    marginals = action_marginals(*setup, max_unexplored_mass=max_unexplored_mass)
    decoded = top_sequences(marginals, torch.arange(CONTEXTS), 70)
    for n in range(CONTEXTS):
        known = {sequence.action: sequence for sequence in enumerate_all(setup, n)}
        returned = [get_sequence(decoded, n, k) for k in range(70) if decoded.log_probability[n, k].isfinite()]
        assert 0 < len(returned) < len(known)
        assert [s.log_p for s in returned] == sorted((s.log_p for s in returned), reverse=True)
        for sequence in returned:
            assert_same(sequence, known[sequence.action])
        left_out = [
            math.exp(s.log_p) for action, s in known.items() if action not in {sequence.action for sequence in returned}
        ]
        assert sum(left_out) == pytest.approx(marginals.unexplored_mass[n].item(), rel=1e-9)


@pytest.mark.parametrize("generator_class", GENERATORS)
def test_sample_frequencies_match_probabilities(generator_class: type[Generator]) -> None:
    setup, draws = make(generator_class, sharp=0.5), 4_000
    rng = torch.Generator().manual_seed(0)
    decoded = decode(*setup, strategy="sample", width=draws, rng=rng)
    for n in range(CONTEXTS):
        known = {sequence.action: sequence for sequence in enumerate_all(setup, n)}
        counts: Counter[tuple[int, ...]] = Counter(
            tuple(code for code in row if code >= 0) for row in decoded.action[n].tolist()
        )
        assert set(counts) <= set(known)
        for action, sequence in known.items():
            p = math.exp(sequence.log_p)
            assert abs(counts[action] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 2 / draws
        for k in (0, draws // 2, draws - 1):
            sample = get_sequence(decoded, n, k)
            assert_same(sample, known[sample.action])


def test_sampling_is_reproducible() -> None:
    setup = make(ExplicitGenerator, events=4, sharp=0.3)
    draws = [
        decode(*setup, strategy="sample", width=50, rng=torch.Generator().manual_seed(seed)).action
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("generator_class", GENERATORS)
@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("sharp", [0.1, 5.0])
def test_actions_are_distinct_and_exit_is_last(generator_class: type[Generator], strategy: Any, sharp: float) -> None:
    setup = make(generator_class, events=4, sharp=sharp)
    decoded = decode(*setup, strategy=strategy, width=40, rng=torch.Generator().manual_seed(0))
    assert (decoded.log_probability <= 0).all()
    assert decoded.log_probability.isfinite().all()
    for n in range(CONTEXTS):
        assert (decoded.log_probability[n].diff() <= 0).all(), "most probable first"
        for row, time in zip(decoded.action[n], decoded.time[n], strict=True):
            codes = row.tolist()
            length = codes.index(setup.generator.exit) + 1
            assert len(set(codes[:length])) == length
            assert 0 not in codes
            assert codes[length:] == [-1] * (len(codes) - length)
            assert time[:length].isfinite().all()
            assert time[length:].isnan().all()


@pytest.mark.parametrize("generator_class", GENERATORS)
def test_contexts_are_independent(generator_class: type[Generator]) -> None:
    setup = make(generator_class, events=4)
    joint = decode(*setup, strategy="beam", width=6), action_marginals(*setup, max_unexplored_mass=0.01)
    for n in range(CONTEXTS):
        one = setup._replace(context=setup.context[n : n + 1])
        single = decode(*one, strategy="beam", width=6), action_marginals(*one, max_unexplored_mass=0.01)
        for k in range(6):
            assert_same(get_sequence(joint[0], n, k), get_sequence(single[0], 0, k))
        for name in ("probability", "time", "unexplored_mass"):
            torch.testing.assert_close(getattr(joint[1], name)[n], getattr(single[1], name)[0])


def test_no_contexts_give_empty_results() -> None:
    for generator_class in GENERATORS:
        setup = make(generator_class)
        nothing = action_marginals(setup.generator, setup.context[:0], setup.tables, setup.timed)
        assert nothing.probability.shape == nothing.time.shape == (0, 5)
