"""Languages of rows, and the line that says that they were not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from alignlab.config import DataConfig
from alignlab.lint import report
from alignlab.lint.check import LintConfig, lint
from alignlab.lint.languages import UNDECIDED, Languages

TEXTS = {
    "en": "The museum opens at nine and closes in the late afternoon, except on Mondays.",
    "de": "Das Museum öffnet um neun Uhr und schließt am späten Nachmittag, außer montags.",
    "fr": "Le musée ouvre à neuf heures et ferme en fin d'après-midi, sauf le lundi.",
    "zh": "博物馆每天早上九点开门，下午晚些时候关门，星期一除外。",
}


def write(path: Path, answers: list[str]) -> DataConfig:
    rows = [{"prompt": "?", "completion": answer} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path))


def test_languages_of_one_script_are_told_apart() -> None:
    pytest.importorskip("py3langid")
    model = Languages()
    assert {code: model.of(text) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    assert [model.of(text) for text in ("42", "x = 3 + 4", "", "\\frac{1}{2}")] == [UNDECIDED] * 4


def test_rows_are_counted_by_language(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    found = lint(
        write(tmp_path / "rows.jsonl", [TEXTS["en"], TEXTS["en"] + " Really.", TEXTS["de"], "42"]), LintConfig()
    )
    assert found.languages == {"en": 2, "de": 1, UNDECIDED: 1}
    assert "language en 50.0% (2 rows), de 25.0% (1 rows), undecided 25.0% (1 rows)" in "\n".join(report.lines(found))
    assert report.as_json(found)["languages"] == {"en": 2, "de": 1, UNDECIDED: 1}


def test_without_the_library_scripts_are_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    found = lint(write(tmp_path / "rows.jsonl", [TEXTS["de"]]), LintConfig())
    assert found.languages == {}
    assert found.main_script == {"Latin": 1}
    assert any("pip install alignlab[languages]" in line for line in report.lines(found))
