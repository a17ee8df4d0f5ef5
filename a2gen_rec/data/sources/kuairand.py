"""KuaiRand-Pure, -1K and -27K: short-video impressions of Kuaishou (Gao et al., CIKM 2022).

Only logs of the standard policy are read; random-exposure logs (``log_random_*``) have another distribution. Feedback
flags have no times: every action except ``exit`` occurs at an unknown time.
"""

from collections.abc import Mapping
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.files import RawFiles, check_unique, find_files
from a2gen_rec.data.sources.lists import value_lists
from a2gen_rec.data.sources.times import TimeFormat, time_ms
from a2gen_rec.data.sources.values import MAX_DURATION_S, Column, Value, finite_number, flag, identifier, number, text
from a2gen_rec.data.sql import quote_identifier
from a2gen_rec.data.time_zone import TimeZone

ACTIONS = ("profile_enter", "like", "follow", "comment", "forward", "hate")
LABELS = {"click": "is_click", "long_view": "long_view"}
USER_COLUMNS = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_COLUMNS = ("author_id", "video_type", "upload_type", "music_type")
UNBOUNDED_MIN_COUNT = 2
"""Identifiers with one impression train the unknown row, which new users and items use."""
FLAGS = (*LABELS.values(), *(f"is_{name}" for name in ACTIONS))


class KuaiRand:
    """The official directory, or its ``data/``.

    Raises:
        DataError: a file or a column is missing.
    """

    def __init__(self, raw: str) -> None:
        root = Path(raw)
        directory = root / "data" if (root / "data").is_dir() else root
        logs = find_files(directory, "log_standard_*.csv")
        users = find_files(directory, "user_features_*.csv")
        videos = find_files(directory, "video_features_basic_*.csv")
        times = ("time_ms", "play_time_ms", "duration_ms")
        self.logs = RawFiles(logs, ("user_id", "video_id", "tab", *times, *FLAGS))
        self.users = RawFiles(users, ("user_id", *USER_COLUMNS, *USER_NUMBERS))
        self.videos = RawFiles(videos, ("video_id", *VIDEO_COLUMNS, "upload_dt", "tag"))

    def describe(self) -> SourceInfo:
        features = [FeatureSpec("user_id", "user", min_count=UNBOUNDED_MIN_COUNT)]
        features += [FeatureSpec(name, "user") for name in USER_COLUMNS]
        features += [FeatureSpec(name, "user", "number") for name in USER_NUMBERS]
        features += [FeatureSpec("item_id", "item", min_count=UNBOUNDED_MIN_COUNT)]
        features += [
            FeatureSpec(name, "item", min_count=UNBOUNDED_MIN_COUNT if name == "author_id" else 1)
            for name in VIDEO_COLUMNS
        ]
        features += [
            FeatureSpec("tag", "item", multi_valued=True),
            FeatureSpec("upload_week", "item"),
            FeatureSpec("duration", "item", "buckets", size=32),
            FeatureSpec("duration_s", "item", "number"),
            FeatureSpec("tab", "context"),
        ]
        return SourceInfo(
            name="kuairand",
            actions=ACTIONS,
            labels=tuple(LABELS),
            duration_feature="duration",
            negative_actions=("hate",),
            features=tuple(features),
            split=SplitRule(valid_start="-2d", test_start="-1d"),
            time_zone=TimeZone(utc_offset_hours=8),
            licence="CC BY-SA 4.0",
            citation="Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed "
            "Videos, CIKM 2022",
            url="https://kuairand.com",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        log = self.logs.relation(connection, _log_values)
        users = self.users.relation(connection, _user_values)
        videos = self.videos.relation(connection, _video_values)
        check_unique(connection, users, "user_id", self.users.files)
        check_unique(connection, videos, "video_id", self.videos.files)
        actions = ", ".join(f"CASE WHEN log.is_{name} = 1 THEN 'nan'::DOUBLE END AS at_{name}" for name in ACTIONS)
        labels = ", ".join(f"log.{column} AS label_{name}" for name, column in LABELS.items())
        user = ", ".join(f"users.{quote_identifier(name)}" for name in (*USER_COLUMNS, *USER_NUMBERS))
        video = ", ".join(f"videos.{quote_identifier(name)}" for name in VIDEO_COLUMNS)
        return f"""
            SELECT log.user_id, log.video_id AS item_id, log.time_ms AS ts_ms,
                log.play_time_ms / 1000 AS dwell_s, {actions}, {labels}, {user}, {video},
                videos.tag,
                date_trunc('week', TRY_CAST(videos.upload_dt AS DATE))::DATE::VARCHAR AS upload_week,
                CASE WHEN log.duration_ms > 0 THEN log.duration_ms / 1000 END AS duration, duration AS duration_s,
                log.tab,
                CASE WHEN log.play_time_ms < 0 THEN 'negative play time' END AS drop_reason
            FROM ({log}) AS log
            LEFT JOIN ({users}) AS users ON log.user_id = users.user_id
            LEFT JOIN ({videos}) AS videos ON log.video_id = videos.video_id"""


def _log_values(columns: Mapping[str, Column]) -> dict[str, Value]:
    return {
        "user_id": identifier([columns["user_id"]]),
        "video_id": identifier([columns["video_id"]]),
        "time_ms": time_ms([columns["time_ms"]], TimeFormat("ms")),
        "play_time_ms": number([columns["play_time_ms"]], max_value=1000 * MAX_DURATION_S),
        "duration_ms": number([columns["duration_ms"]], max_value=1000 * MAX_DURATION_S),
        "tab": text([columns["tab"]]),
        **{name: flag([columns[name]]) for name in FLAGS},
    }


def _user_values(columns: Mapping[str, Column]) -> dict[str, Value]:
    values = {"user_id": identifier([columns["user_id"]])} | {name: text([columns[name]]) for name in USER_COLUMNS}
    return values | {name: finite_number([columns[name]]) for name in USER_NUMBERS}


def _video_values(columns: Mapping[str, Column]) -> dict[str, Value]:
    values = {"video_id": identifier([columns["video_id"]]), "tag": value_lists([columns["tag"]], ",")}
    return values | {name: text([columns[name]]) for name in (*VIDEO_COLUMNS, "upload_dt")}
