"""Ranking by an exported model, in one process, without anything of training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.artifact.artifact import Artifact, load_artifact
from a2gen_rec.data.batch import WHOLE_WINDOW, WindowBatch, collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.models.scoring import predict_targets
from a2gen_rec.ranking.action_cache import ActionStateCache, CacheStats
from a2gen_rec.ranking.encoder import ImpressionEncoder
from a2gen_rec.ranking.history import EncodedHistory, session_features_at
from a2gen_rec.ranking.selection import RankingTask, Scorer, resolve_sort_key, sort_keys, top_candidates
from a2gen_rec.ranking.types import Impression, RankedList, RankQuery
from a2gen_rec.ranking.what_if import check_what_if, evaluate_what_if
from a2gen_rec.ranking.window import next_timestamp
from a2gen_rec.utils.malloc import retain_freed_memory

CACHE_BYTES = 256 * 2**20


class Ranker:
    """An exported model, ready to rank. One request at a time: threads that share one must take turns.

    Attributes:
        card: of the dataset: its actions, features and objectives.
        version: of the model, twelve hexadecimal digits that no other model has.
    """

    def __init__(self, artifact: Artifact, cache_bytes: int = CACHE_BYTES) -> None:
        self.card: DatasetCard = artifact.card
        self.version = artifact.manifest.version
        self._users, self._items = artifact.users, artifact.items
        self._model, self._settings = artifact.model, artifact.settings
        self._scorer = Scorer(artifact.card, artifact.model.ranker, artifact.ensemble)
        self._encoder = ImpressionEncoder(artifact.card, artifact.vocabularies, artifact.items, self.max_history)
        self._states = ActionStateCache(cache_bytes)

    @classmethod
    def load(cls, folder: str, cache_bytes: int = CACHE_BYTES, threads: int = 1) -> "Ranker":
        """Read and check a folder that ``a2gen export`` wrote.

        Args:
            folder: local or remote.
            cache_bytes: bound on the memory of cached action-level states.
            threads: of this process for one operation, 0 leaves them as they are: a request's operations are too
                small to share among cores, which can answer other requests.

        Raises:
            UserError: a file is missing, truncated or damaged, or the format is newer: naming file and reason.
        """
        if threads:
            torch.set_num_threads(threads)
        retain_freed_memory()
        return cls(load_artifact(folder), cache_bytes)

    def rank(self, request: RankQuery) -> RankedList:
        """The best candidates of one request.

        Raises:
            UserError: no candidate, an action or feature that the dataset does not have, or nothing to rank by of
                that name.
        """
        return self.rank_batch([request])[0]

    def rank_batch(self, requests: Sequence[RankQuery]) -> list[RankedList]:
        """The same for many users in one batch; no request changes another's answer but for rounding.

        Raises:
            UserError: as :meth:`rank`, of the first request that has such an error; check with :meth:`check`.
        """
        if not requests:
            return []
        for request in requests:
            self.validate(request)
        pasts = [self._past(request) for request in requests]
        orders = [self._order(request) for request in requests]
        parts = [self._window(*each) for each in zip(requests, pasts, orders, strict=True)]
        columns = WindowColumns.concat(parts)
        names = [name for past in pasts for name in past.states]
        places, missing = self._states.lookup(names)
        with torch.inference_mode():
            batch = collate(
                columns,
                np.arange(len(parts)),
                {},  # small tables are there whole, asked for or not
                dedup=False,
                request_gap_s=WHOLE_WINDOW,
                bucket_overhead=self._settings.group_cost,
                include_outcomes=False,
                token_history=np.array(missing, np.int64),
            )
            rows = self._model.embeddings(batch.sparse)
            actions = self._actions(rows, batch, names, places, missing)
            judged = predict_targets(rows, self._model.ranker, batch, self._settings.max_unexplored_mass, actions)
            best = top_candidates(self._scorer, judged, batch, orders)
            answers = [
                evaluate_what_if(request.what_if, self._scorer, judged, batch, window, order) if request.what_if else []
                for window, (request, order) in enumerate(zip(requests, orders, strict=True))
            ]
        return [
            RankedList(
                user=request.user,
                user_known=self.knows_user(request.user),
                history_length=min(len(past), self._model.ranker.max_history),
                by=order.by,
                num_candidates=len(order.items.ids),
                unknown_items=int((~order.items.is_known).sum()),
                candidates=[replace(each, duration_s=self.duration_s(each.item)) for each in candidates],
                ascending=order.by in self._scorer.lower_is_better,
                model_version=self.version,
                what_if=answer,
            )
            for request, past, order, candidates, answer in zip(requests, pasts, orders, best, answers, strict=True)
        ]

    def validate(self, request: RankQuery) -> None:
        """Raise what :meth:`rank` would raise, at little cost: for a server that batches requests of many users."""
        if not request.candidates:
            raise UserError("request: no candidates")
        if request.k < 1:
            raise UserError(f"request: k {request.k} must be at least 1")
        by = self._by(request)
        if request.what_if is not None:
            check_what_if(request.what_if, by, request.candidates, self._scorer)
        self._encoder.check_values(request.context, request.user_features)
        if not isinstance(request.history, EncodedHistory):
            self._encoder.check(request.history)

    def encode(self, impressions: Sequence[Impression], after: EncodedHistory | None = None) -> EncodedHistory:
        """A user's past as the model reads it, to be kept by the caller: a few milliseconds, once per impression.

        Impressions may come late: they are put in order of time. One of an item and moment that ``after`` has too
        takes its place, as when more is known of it than when it began.

        Args:
            impressions: raw, of one user, in any order.
            after: what was kept of the same user before; it stays as it is.

        Raises:
            UserError: an action or feature that the dataset does not have, an action twice, a negative time.
        """
        return self._encoder.history(impressions, after)

    def knows_user(self, user: str) -> bool:
        """Whether the dataset has any impression of this user."""
        return user in self._users.row_of

    def duration_s(self, item: str) -> float | None:
        """Length of a video in seconds; None where the dataset does not tell."""
        place = self._items.row_of.get(item, -1)
        length = float(self._items.duration_s[place]) if len(self._items.duration_s) else math.nan
        return length if math.isfinite(length) else None

    def sample_users(self, count: int) -> list[str]:
        """Users that the dataset has, the same ones every time."""
        return list(islice(self._users.row_of, count))

    def sample_items(self, count: int) -> list[str]:
        """Items that the dataset has, the same ones every time."""
        return list(islice(self._items.row_of, count))

    @property
    def sort_keys(self) -> list[str]:
        """What requests may rank ``by``, the default first."""
        return sort_keys(self.card, self._model.ranker.objective_tasks, self._scorer.ensemble is not None)

    @property
    def max_history(self) -> int:
        """Most impressions that a history keeps.

        One more than any target sees: the gap of the oldest one to the impression before it is known too.
        """
        return self._model.ranker.max_history + 1

    @property
    def cache_stats(self) -> CacheStats:
        """What became of cached states since the model was loaded."""
        return self._states.counts

    def _past(self, request: RankQuery) -> EncodedHistory:
        past, now = request.history, request.now_ms
        if not isinstance(past, EncodedHistory):
            return self.encode([each for each in past if now is None or each.ts_ms <= now])
        return past if now is None else past.up_to(now)

    def _order(self, request: RankQuery) -> RankingTask:
        # In one order, whatever they came in: then no rounding depends on it, and equals are ordered by name.
        items = self._items.items(sorted(set(request.candidates)))
        return RankingTask(items, self._by(request), request)

    def _by(self, request: RankQuery) -> str:
        return resolve_sort_key(
            self.card, request.sort_by, self._model.ranker.objective_tasks, self._scorer.ensemble is not None
        )

    def _window(self, request: RankQuery, past: EncodedHistory, order: RankingTask) -> WindowColumns:
        """The request as one window: the user's past, then the candidates."""
        one, seen = np.zeros(1, np.int64), len(past)
        user = self._users.rows_at(self._users.lookup([request.user])) | {
            name: np.array([row]) for name, row in self._encoder.user(request.user_features).items()
        }
        history = replace(
            past.columns,
            user_key=one,
            first_target=one,
            starts=one,
            lengths=np.array([seen]),
            user_ids=user,
        )
        now = next_timestamp(history) if request.now_ms is None else request.now_ms
        context = self._encoder.context(now, request.context)
        return history.append_candidates(
            order.items, self.card, now, context, session_features_at(past, now, self.card)
        )

    def _actions(
        self,
        rows: dict[str, JaggedTensor],
        batch: WindowBatch,
        names: list[bytes],
        places: list[int],
        missing: list[int],
    ) -> Tensor:
        """[keys, d] action-level states of the past: those ``missing`` are computed, the others are kept."""
        if names and not missing:
            return self._states.gather(places)
        lost = torch.tensor(missing, dtype=torch.long)
        fresh = self._model.ranker.encode_actions(rows, replace(batch, history_index=batch.history_index[lost]))
        states = fresh
        if len(missing) < len(names):
            states = self._states.gather(places)
            states[lost] = fresh
        self._states.put([names[place] for place in missing], fresh)
        return states
