"""The check of every dataset that meets something trained: a run, its resumption, or what was made of it."""

from dataclasses import replace

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.data.schema import Feature
from a2gen_rec.errors import UserError

_OUTCOMES = ("actions", "labels", "objectives", "timed_actions")


def load_compatible_card(data: str, trained: DatasetCard, run: str) -> DatasetCard:
    """Return the card of a dataset whose inputs and outcomes mean the same as in the training data of a run.

    These are the training data, later increments of their lineage, and other data with equal encodings of all inputs,
    such as other targets of the same log. In later increments, vocabularies may have more rows (``new_rows.py``).

    Args:
        data: Dataset directory.
        trained: Card of the training data.
        run: Run directory, for messages.

    Raises:
        UserError: Naming the first input or outcome that differs.
        DataError: The card is missing or invalid.
    """
    current = DatasetCard.load(data)
    check_compatible_card(current, trained, data, run)
    return current


def check_compatible_card(current: DatasetCard, trained: DatasetCard, data: str, run: str) -> None:
    """Check a card as :func:`load_compatible_card`."""
    for name in _OUTCOMES:
        if getattr(current, name) != getattr(trained, name):
            raise UserError(f"{data}: {name} differ from those of run {run}")
    if difference := current.identity.difference(trained.identity):
        raise UserError(
            f"{data}: belongs to another lineage than run {run}: {difference}; "
            "use the run's dataset or a later increment"
        )
    inputs, expected = _inputs(current), _inputs(trained)
    is_later = current.identity.continues(trained.identity)
    for name in expected | inputs:
        new, old = inputs.get(name), expected.get(name)
        if isinstance(new, Feature) and isinstance(old, Feature) and new.cardinality != old.cardinality:
            if is_later and new.kind == "vocabulary" and new.cardinality > old.cardinality:
                new = replace(new, cardinality=old.cardinality)  # the table has grown
            else:
                raise UserError(f"{data}: {name} has {new.cardinality} rows, but {old.cardinality} in run {run}")
        if new != old:
            raise UserError(f"{data}: {name} is defined differently than in run {run}")
    if list(inputs) != list(expected):
        raise UserError(f"{data}: inputs are in another order than in run {run}")


def check_same_data(current: DatasetCard, trained: DatasetCard, data: str, run: str) -> None:
    """Check that training can continue on a dataset: the training data or a later increment of their lineage.

    New values may have rows that had none. Rows of retired values would keep their vectors.

    Raises:
        UserError: Naming the first input or outcome that differs, the first table that has grown or has reused rows,
            or both digests.
    """
    check_compatible_card(current, trained, data, run)
    _check_lineage(current, trained, run)
    new_rows = NewRows.since(data, current, trained)
    for feature in trained.features:
        name, rows = feature.name, next(each.cardinality for each in current.features if each.name == feature.name)
        if rows > feature.cardinality:
            raise UserError(
                f"{run}: cannot continue with {data}: {name} has grown to {rows} rows; choose another --run"
            )
        if name in new_rows.reused and (count := int(new_rows.reused[name].sum())):
            reason = f"{count} rows of {name} had another value when they were trained"
            raise UserError(f"{run}: cannot continue with {data}: {reason}; choose another --run")


def check_later_data(current: DatasetCard, trained: DatasetCard, data: str, run: str) -> None:
    """Check that a new run can start from the parameters of ``run`` on a dataset: its data or a later increment.

    Tables may have grown, and rows of retired values may have new values; the warm start initializes these rows.

    Raises:
        UserError: Naming the first input or outcome that differs, or both digests.
    """
    check_compatible_card(current, trained, data, run)
    _check_lineage(current, trained, run)


def _check_lineage(current: DatasetCard, trained: DatasetCard, run: str) -> None:
    if not current.identity.continues(trained.identity):
        digests = trained.identity.data_digest, current.identity.data_digest
        raise UserError(
            f"{run}: was trained on other data (data_digest {digests[0]}, now {digests[1]}); "
            "restore them, or choose another --run"
        )


def _inputs(card: DatasetCard) -> dict[str, object]:
    """Return all inputs by name, without the measurements of features."""
    inputs: dict[str, object] = {feature.name: replace(feature, mean_values=1.0) for feature in card.features}
    inputs |= {number.name: number for number in card.numbers}
    inputs |= {vector.name: vector for vector in card.vectors}
    return inputs | {f"statistic {each.outcome} of {each.feature}": each for each in card.statistics}
