"""Comparison of exported and original models, and rejected exports."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from a2gen_rec.cli.main import main
from a2gen_rec.errors import UserError
from a2gen_rec.runs import export as exporting
from a2gen_rec.runs.export import check_auc_drop, compare_auc
from a2gen_rec.training.entrypoint import train
from tests.helpers.cards import make_card, short_training, write_dataset

pytestmark = pytest.mark.training


def evaluation(**auc: tuple[float | None, int]) -> dict:
    actions = {name: {"auc": value, "positives": positives} for name, (value, positives) in auc.items()}
    return {"split": "test", "targets": 1000, "actions": actions, "loss": {"total": 1.5}}


def test_auc_drop_counts_only_with_enough_positives() -> None:
    before = evaluation(like=(0.8, 300), rare=(0.8, 99), usual=(0.8, 950), none=(None, 0))
    after = evaluation(like=(0.7992, 300), rare=(0.5, 99), usual=(0.5, 950), none=(None, 0))
    metrics = compare_auc(before, after, 1e-3)
    assert {name: auc["within_tolerance"] for name, auc in metrics["auc"].items()} == {
        "like": True,
        "rare": None,
        "usual": None,
        "none": None,
    }
    check_auc_drop(metrics, "out")
    worse_metrics = compare_auc(
        before, evaluation(like=(0.7988, 300), rare=(0.8, 99), usual=(0.8, 950), none=(None, 0)), 1e-3
    )
    with pytest.raises(UserError, match=r"out: not written: on test .* 0.001 \(like 0.8000 -> 0.7988\)"):
        check_auc_drop(worse_metrics, "out")
    check_auc_drop(compare_auc(after, before, 0.0), "out")  # an improvement is accepted


def test_failed_export_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_card()
    data, run, out = write_dataset(tmp_path / "data", card, windows=25), tmp_path / "run", tmp_path / "new" / "model"
    config = short_training(2)
    train(config, str(data), str(run))

    def error_line(*options: str) -> str:
        with pytest.raises(SystemExit):
            main(["export", "--run", str(run), "--out", str(out), *options])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("a2gen: error"))
        assert not out.parent.exists()
        return line

    # A dataset without entity tables cannot be exported.
    assert "users.parquet: cannot be read" in error_line()
    users = pa.table({"user": ["a"], "user_key": [1], "user_id": [1], "group": [1]})
    pq.write_table(users, data / "users.parquet")
    assert "vocabulary/group.parquet: cannot be read" in error_line()
    (data / "vocabulary").mkdir()
    for name in ("group", "tab"):
        pq.write_table(pa.table({"value": ["x"], "row": [1]}), data / "vocabulary" / f"{name}.parquet")
    worse_metrics = compare_auc(evaluation(like=(0.9, 300)), evaluation(like=(0.8, 300)), 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "compare_auc", lambda *_: worse_metrics)
        assert (
            "not written: on test the AUC drops by more than --max-auc-drop 0.001 (like 0.9000 -> 0.8000)"
            in error_line()
        )
    with monkeypatch.context() as patch:
        state = exporting.full_state_dict

        def broken_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
            tensors = {name: value.clone() for name, value in state(module).items()}
            next(value for name, value in tensors.items() if "item_id" in name)[5, 0] = torch.nan
            return tensors

        patch.setattr(exporting, "full_state_dict", broken_state)
        assert "rows are not finite; the training has diverged (first: row 5)" in error_line()
    assert "--max-auc-drop -1.0 must be at least 0" in error_line("--max-auc-drop", "-1")
    assert json.loads((exported(run, out) / "manifest.json").read_text())["metrics"]["loss"]["original"] > 0


def exported(run: Path, out: Path) -> Path:
    main(["export", "--run", str(run), "--out", str(out)])
    return out
