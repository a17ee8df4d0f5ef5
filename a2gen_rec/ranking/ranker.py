"""Ranking with an exported model in one process, without any training code."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.artifact.artifact import Artifact, load_artifact
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.errors import UserError
from a2gen_rec.models.scoring import predict_targets
from a2gen_rec.ranking.action_cache import ActionStateCache
from a2gen_rec.ranking.checks import check_identifier, check_identifiers, describe_value
from a2gen_rec.ranking.encoder import ImpressionEncoder
from a2gen_rec.ranking.history import EncodedHistory, session_features_at
from a2gen_rec.ranking.selection import RankingTask, Scorer, resolve_sort_key, sort_keys, top_candidates
from a2gen_rec.ranking.types import CacheStats, Impression, RankedList, RankQuery
from a2gen_rec.ranking.what_if import check_what_if, evaluate_what_if
from a2gen_rec.ranking.window import check_time, next_timestamp
from a2gen_rec.utils.malloc import retain_freed_memory
from a2gen_rec.utils.warning_filters import silence_known_warnings

CACHE_BYTES = 256 * 2**20


class Ranker:
    """Exported model, ready to rank. Not thread-safe: threads that share a ranker must take turns.

    Attributes:
        card: Dataset card: actions, features and objectives.
        version: Unique version of the model, twelve hexadecimal digits.
    """

    def __init__(self, artifact: Artifact, cache_bytes: int = CACHE_BYTES) -> None:
        self.card: DatasetCard = artifact.card
        self.version = artifact.manifest.version
        self._users, self._items = artifact.users, artifact.items
        self._vectors = artifact.vectors
        self._model, self._settings = artifact.model, artifact.settings
        self._scorer = Scorer(artifact.card, artifact.model.ranker, artifact.ensemble)
        self._encoder = ImpressionEncoder(artifact.card, artifact.vocabularies, artifact.items, self.max_history)
        self._action_cache = ActionStateCache(cache_bytes)

    @classmethod
    def load(cls, model_dir: str, cache_bytes: int = CACHE_BYTES, threads: int = 1) -> "Ranker":
        """Read and check a model directory written by ``a2gen export``.

        Args:
            model_dir: Local or remote directory.
            cache_bytes: Memory bound of the cache of action-level states.
            threads: Number of intra-op threads of this process; 0 leaves it unchanged. The operations of one request
                are too small to parallelize; other cores can serve other requests.

        Raises:
            UserError: A file is missing, truncated or corrupted, or the format is unsupported; names file and reason.
        """
        if threads:
            torch.set_num_threads(threads)
        retain_freed_memory()
        silence_known_warnings()
        return cls(load_artifact(model_dir), cache_bytes)

    def rank(self, request: RankQuery) -> RankedList:
        """Return the top candidates of one request.

        Raises:
            UserError: No candidates, an unknown action, feature or sort key, or a time in another unit.
        """
        return self.rank_batch([request])[0]

    def rank_batch(self, requests: Sequence[RankQuery]) -> list[RankedList]:
        """Rank the requests of many users in one batch. Results do not depend on the rest of the batch, up to rounding.

        Raises:
            UserError: As :meth:`rank`, for the first invalid request; see :meth:`validate`.
        """
        if not requests:
            return []
        for request in requests:
            self.validate(request)
        histories = [self._history(request) for request in requests]
        tasks = [self._task(request) for request in requests]
        windows = [self._window(*inputs) for inputs in zip(requests, histories, tasks, strict=True)]
        columns = WindowColumns.concat(windows)
        state_keys = [key for history in histories for key in history.state_keys]
        rows, missing = self._action_cache.lookup(state_keys)
        with torch.inference_mode():
            batch = collate(
                columns,
                np.arange(len(windows)),
                {},  # full tables are always present, whether looked up or not
                dedup=False,
                request_gap_s=FULL_WINDOW,
                bucket_overhead=self._settings.bucket_overhead_tokens,
                include_outcomes=False,
                token_history=np.array(missing, np.int64),
                vectors=self._vectors,
            )
            embeddings = self._model.embeddings(batch.sparse)
            action_states = self._action_states(embeddings, batch, state_keys, rows, missing)
            predictions = predict_targets(
                embeddings, self._model.ranker, batch, self._settings.max_unexplored_mass, action_states
            )
            top = top_candidates(self._scorer, predictions, batch, tasks)
            what_ifs = [
                evaluate_what_if(request.what_if, self._scorer, predictions, batch, window, task)
                if request.what_if
                else []
                for window, (request, task) in enumerate(zip(requests, tasks, strict=True))
            ]
        return [
            RankedList(
                user=request.user,
                user_known=self.knows_user(request.user),
                history_length=min(len(history), self._model.ranker.max_history),
                sort_by=task.sort_by,
                num_candidates=len(task.items.ids),
                unknown_items=int((~task.items.is_known).sum()),
                candidates=[replace(candidate, duration_s=self.duration_s(candidate.item)) for candidate in candidates],
                ascending=task.sort_by in self._scorer.lower_is_better,
                model_version=self.version,
                what_if=what_if,
            )
            for request, history, task, candidates, what_if in zip(
                requests, histories, tasks, top, what_ifs, strict=True
            )
        ]

    def validate(self, request: RankQuery) -> None:
        """Raise the error that :meth:`rank` would raise, at low cost: for servers that batch requests of many users."""
        check_identifier(request.user, "request: user")
        check_identifiers(request.candidates, "request: candidates")
        if not request.candidates:
            raise UserError("request: no candidates")
        if not isinstance(request.k, Integral) or request.k < 1:
            raise UserError(f"request: k {describe_value(request.k)} must be a whole number of at least 1")
        if request.now_ms is not None:
            check_time(request.now_ms, "request: now_ms", self.card.has_calendar_time)
        sort_by = self._sort_by(request)
        if request.what_if is not None:
            check_what_if(request.what_if, sort_by, request.candidates, self._scorer)
        self._encoder.validate_values(request.context, request.user_features)
        if not isinstance(request.history, EncodedHistory):
            self._encoder.validate(request.history)

    def encode(self, impressions: Sequence[Impression], after: EncodedHistory | None = None) -> EncodedHistory:
        """Encode a user's history, to be kept by the caller: a few milliseconds, once per impression.

        Impressions may arrive late: they are sorted by time. An impression with the same item and time as one in
        ``after`` replaces it, for example once its actions are known.

        Args:
            impressions: Raw impressions of one user, in any order.
            after: Previously encoded history of the same user; it is not modified.

        Raises:
            UserError: Unknown action or feature, duplicate action, negative time, or a time in another unit.
        """
        return self._encoder.encode(impressions, after)

    def knows_user(self, user: str) -> bool:
        """Return whether the dataset contains impressions of this user."""
        return user in self._users.index_of

    def duration_s(self, item: str) -> float | None:
        """Return the duration of a video in seconds; None if the dataset does not have it."""
        index = self._items.index_of.get(item, -1)
        duration = float(self._items.duration_s[index]) if len(self._items.duration_s) else math.nan
        return duration if math.isfinite(duration) else None

    def sample_users(self, count: int) -> list[str]:
        """Return some users of the dataset, the same ones on every call."""
        return list(islice(self._users.index_of, count))

    def sample_items(self, count: int) -> list[str]:
        """Return some items of the dataset, the same ones on every call."""
        return list(islice(self._items.index_of, count))

    @property
    def sort_keys(self) -> list[str]:
        """Available sort keys, the default first."""
        return sort_keys(self.card, self._model.ranker.objective_tasks, self._scorer.ensemble is not None)

    @property
    def max_history(self) -> int:
        """Maximum number of impressions in an encoded history.

        One more than the model attends to, so that the gap before the oldest one is known.
        """
        return self._model.ranker.max_history + 1

    @property
    def cache_stats(self) -> CacheStats:
        """Counters of the action-state cache since the model was loaded."""
        return self._action_cache.stats

    def _history(self, request: RankQuery) -> EncodedHistory:
        history, now = request.history, request.now_ms
        if not isinstance(history, EncodedHistory):
            return self.encode([impression for impression in history if now is None or impression.ts_ms <= now])
        return history if now is None else history.up_to(now)

    def _task(self, request: RankQuery) -> RankingTask:
        # Candidates are sorted, so that neither rounding nor the order of ties depends on the order of the request.
        items = self._items.items(sorted(set(request.candidates)))
        return RankingTask(items, self._sort_by(request), request)

    def _sort_by(self, request: RankQuery) -> str:
        return resolve_sort_key(
            self.card, request.sort_by, self._model.ranker.objective_tasks, self._scorer.ensemble is not None
        )

    def _window(self, request: RankQuery, history: EncodedHistory, task: RankingTask) -> WindowColumns:
        """Return the request as one window: the user's history, then the candidates."""
        one, length = np.zeros(1, np.int64), len(history)
        index, given = self._users.lookup([request.user]), self._encoder.user(request.user_features)
        user = {
            name: np.array([given[name]]) if name in given else row for name, row in self._users.rows_at(index).items()
        }
        bags = self._users.bags_at(index)
        bags |= {name: value for name, value in given.items() if isinstance(value, Bags)}
        numbers = self._users.numbers[index]
        for column, number in enumerate(self.card.numbers_at("user")):
            numbers[:, column] = given.get(number.name, numbers[0, column])
        columns = replace(
            history.columns,
            user_key=one,
            first_target=one,
            starts=one,
            lengths=np.array([length]),
            user_ids=user,
            user_numbers=numbers,
            user_bags=bags,
        )
        now = next_timestamp(columns) if request.now_ms is None else request.now_ms
        context = self._encoder.context(now, request.context)
        session = session_features_at(history, now, self.card)
        return columns.append_candidates(task.items, self.card, now, context, session)

    def _action_states(
        self,
        embeddings: dict[str, JaggedTensor],
        batch: WindowBatch,
        state_keys: list[bytes],
        rows: list[int],
        missing: list[int],
    ) -> Tensor:
        """Return action-level states [keys, d] of the histories: ``missing`` ones are computed, others are cached."""
        if state_keys and not missing:
            return self._action_cache.gather(rows)
        is_missing = torch.tensor(missing, dtype=torch.long)
        computed = self._model.ranker.encode_actions(
            embeddings, replace(batch, history_index=batch.history_index[is_missing])
        )
        states = computed
        if len(missing) < len(state_keys):
            states = self._action_cache.gather(rows)
            states[is_missing] = computed
        self._action_cache.put([state_keys[index] for index in missing], computed)
        return states
