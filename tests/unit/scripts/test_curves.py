import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "curves.py"
spec = importlib.util.spec_from_file_location("curves", SCRIPT)
curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(curves)


def write_run(folder, records):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_repeated_step_counts_once_and_text_is_left_out(tmp_path):
    run = write_run(
        tmp_path / "a",
        [
            {"step": 1, "attempt": 0, "loss": 3.0, "note": "x"},
            {"step": 2, "attempt": 0, "loss": 2.0},
            {"step": 2, "attempt": 1, "loss": 2.5, "eval_loss": 2.6},
        ],
    )
    assert curves.read_series(run) == {"loss": [(1, 3.0), (2, 2.5)], "eval_loss": [(2, 2.6)]}


def test_draws_the_metrics_that_are_there(tmp_path):
    run = write_run(tmp_path / "a", [{"step": i, "attempt": 0, "loss": 1 / i} for i in range(1, 9)])
    out = tmp_path / "out.png"
    assert curves.draw({"a": run}, curves.DEFAULT_METRICS, out) == ["loss"]
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="nothing"):
        curves.draw({"a": run}, ("nothing",), out)
