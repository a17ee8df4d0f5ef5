"""A prepared dataset on disk: its card and the paths of its files."""

from dataclasses import dataclass, field

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.data.vectors import VectorTables, open_vectors
from a2gen_rec.utils import paths

ITEMS_FILE = "items.parquet"
USERS_FILE = "users.parquet"
ITEM_STATISTICS_FILE = "item_statistics.parquet"


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    Attributes:
        path: dataset directory.
        card: dataset card. A trained run uses the card of its checkpoint.
        vectors: vectors to use instead of those in the directory, as an exported model stores them; None for those.
        new_rows: table rows that the model of a run does not know; readers return row 0 instead.
    """

    path: str
    card: DatasetCard
    vectors: VectorTables | None = None
    new_rows: NewRows = field(default_factory=NewRows)

    @classmethod
    def open(cls, path: str) -> "Dataset":
        """Read the card of the dataset at ``path``.

        Raises:
            DataError: the card is missing or invalid.
        """
        return cls(path, DatasetCard.load(path))

    def open_vectors(self) -> VectorTables:
        """Return the vectors of the items.

        Raises:
            DataError: a file is missing or invalid.
        """
        return open_vectors(self.path, self.card.vectors) if self.vectors is None else self.vectors

    @property
    def items_file(self) -> str:
        return paths.join(self.path, ITEMS_FILE)

    @property
    def users_file(self) -> str:
        return paths.join(self.path, USERS_FILE)

    @property
    def item_statistics_file(self) -> str:
        return paths.join(self.path, ITEM_STATISTICS_FILE)

    def split_dir(self, split: str) -> str:
        return paths.join(self.path, split)

    def files(self, split: str) -> list[str]:
        """Return the Parquet files of a split in name order; none if the split is missing."""
        directory = self.split_dir(split)
        return [paths.join(directory, name) for name in paths.listdir(directory) if name.endswith(".parquet")]
