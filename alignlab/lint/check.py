"""One pass over the rows of a data configuration that looks for what spoils a training or an evaluation.

Rows are judged as they were read (pairs where they have or make pairs, else answers), whatever objective is meant;
what the objective's template makes of them is looked at where an encoder is given.  Kept in memory are hashes,
signatures and findings, under a kilobyte a row, never texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from alignlab.config import DataConfig, SourceConfig
from alignlab.data.examples import fault, prune, rating, to_examples
from alignlab.data.overlap import Examples, Recorder, hashes
from alignlab.data.rows import Row, RowError
from alignlab.data.sources import Needs, rows_of, sample_of, sources_of
from alignlab.data.template import Dropped, Encoder, Overlong
from alignlab.errors import ConfigError, DataError
from alignlab.lint import languages
from alignlab.lint.content import gist, length_of, repeated, said, texts_of
from alignlab.lint.findings import KINDS, Findings, Place
from alignlab.lint.grams import Benchmark
from alignlab.lint.languages import Languages
from alignlab.lint.length import LengthBias
from alignlab.lint.near import Signatures, available
from alignlab.lint.text import oddities, scripts
from alignlab.registry import unknown_name
from alignlab.types import Sample, Unit

READ_AHEAD = 32
"""Rows whose templates are rendered in one exchange with the process that renders."""
ADVICE_EXTRA = "near duplicates: `pip install alignlab[lint]`"
ADVICE_LANGUAGES = "languages of one script: `pip install alignlab[languages]`"


@dataclass
class LintConfig:
    """What is looked for besides what always is; set as ``lint.<name>``."""

    benchmark: list[str] = field(default_factory=list)
    """Files (or hub data sets) of questions that no training row may hold a stretch of."""
    ngram: int = 8
    """Words in a row that make such a stretch."""
    against: list[str] = field(default_factory=list)
    """Evaluation sources besides ``data.eval_path`` whose prompts must not be trained on."""
    similarity: float = 0.85
    """From this share of common pieces on two rows are near duplicates; 0 switches the search off."""
    keep: list[str] = field(default_factory=list)
    """Findings that leave no row out of the cleaned file, though they would, e.g. ``[duplicate]``."""
    drop: list[str] = field(default_factory=list)
    """Findings that do, though they would not, e.g. ``[near_duplicate, mojibake]``."""


@dataclass
class Report:
    """What a lint found."""

    findings: Findings = field(default_factory=Findings)
    rows: int = 0
    held_out: Counter[str] = field(default_factory=Counter)
    """rows of each evaluation source"""
    examples: int = 0
    length: LengthBias = field(default_factory=LengthBias)
    letters: Counter[str] = field(default_factory=Counter)
    """letters by script"""
    main_script: Counter[str] = field(default_factory=Counter)
    """rows by the script most of their letters are of"""
    languages: Counter[str] = field(default_factory=Counter)
    """rows by language, where the library that tells them is installed"""
    benchmark_questions: int = 0
    benchmark_short: int = 0
    """questions too short to be looked for"""
    not_checked: list[str] = field(default_factory=list)


def lint(data: DataConfig, config: LintConfig, encoder: Encoder | None = None, needs: Needs | None = None) -> Report:
    """Look at every training row of ``data``, and compare them with every evaluation source.

    With ``encoder`` and ``needs`` (the objective's) also at what the template makes of each row.  Raises
    :class:`DataError` where a source as a whole cannot be read, and :class:`ConfigError` for settings that cannot be.
    """
    if config.ngram < 2 or not 0 <= config.similarity <= 1:
        raise ConfigError("lint.ngram must be at least 2, and lint.similarity from 0 to 1")
    for name, kinds in (("keep", config.keep), ("drop", config.drop)):
        for kind in kinds:
            if kind not in KINDS:
                raise ConfigError(f"lint.{name}: {unknown_name('finding', kind, list(KINDS))}")
    return _Lint(data, config, encoder, needs or Needs(Unit.SEQUENCE)).run()


def natural(sample: Sample, by: list[str]) -> Sample:
    """The examples that stand in a row, whatever the objective: its pairs, those its ratings make, or its answers."""
    rated = len(sample.sequences) > 1 and any(sequence.scores for sequence in sample.sequences)
    if sample.pairs or (rated and all(sequence.label is None for sequence in sample.sequences)):
        return to_examples(sample, Unit.PAIR, by=by)
    return sample


class _Lint:
    def __init__(self, data: DataConfig, config: LintConfig, encoder: Encoder | None, needs: Needs) -> None:
        self.data, self.config, self.encoder, self.needs = data, config, encoder, needs
        self.report = Report()
        self.found = self.report.findings
        self.recorder = Recorder()
        self.places: list[Place] = []
        self.benchmark = self._benchmark()
        self.signatures = Signatures() if config.similarity and available() else None
        if config.similarity and self.signatures is None:
            self.report.not_checked.append(ADVICE_EXTRA)
        self.languages = Languages() if languages.available() else None
        if self.languages is None:
            self.report.not_checked.append(ADVICE_LANGUAGES)
        if not config.benchmark:
            self.report.not_checked.append("overlap with a benchmark: lint.benchmark=FILE")
        if encoder is None:
            self.report.not_checked.append("what the template makes of the rows: model=... objective=...")

    def run(self) -> Report:
        for source in sources_of(self.data, held_out=False):
            for batch in _batches(self._read(source, self._malformed), READ_AHEAD):
                self._templates([(sample, place) for _, sample, place in batch], source)
                for row, sample, place in batch:
                    self._row(row, sample, place, source)
        if not self.report.rows:
            raise DataError(f"{', '.join(s.path for s in sources_of(self.data, held_out=False))}: holds no row")
        train = self.recorder.made()
        self.report.examples = len(train.example)
        self._twice(train)
        for source in self._evaluation():
            self._compare(train, source)
        self._near()
        if self.report.length.biased:
            low, high = self.report.length.interval
            self.found.add("length_bias", None, detail=f"accuracy of the longer answer {low:.3f} to {high:.3f}")
        return self.report

    def _read(
        self, source: SourceConfig, on_error: Callable[[RowError], None], *, held_out: bool = False
    ) -> Iterator[tuple[Row, Sample, Place]]:
        # What must not be trained on is read whole, however few rows are trained on.
        data = replace(self.data, limit=None) if held_out else self.data
        for row in rows_of(source, data, self.needs, held_out=held_out, on_error=on_error):
            place = Place(row.file, row.line)
            try:
                yield row, sample_of(row, source), place
            except DataError as error:
                detail = str(error).removeprefix(f"{row.file}: line {row.line}: ")
                on_error(RowError(row.file, row.line, "wrong_schema", detail, byte=row.byte))

    def _malformed(self, error: RowError) -> None:
        self.report.rows += 1
        self.found.add("malformed", Place(error.file, error.line), reason=error.reason, detail=error.detail)

    # One row

    def _row(self, row: Row, sample: Sample, place: Place, source: SourceConfig) -> None:
        self.report.rows += 1
        made = natural(sample, source.rating)
        if reason := fault(made, self.encoder.markup if self.encoder else None):
            self.found.add(reason, place, id=sample.id)
        else:
            sound, lost = prune(made, self.encoder.markup if self.encoder else None)
            if lost:
                self.found.add("faulty_part", place, id=sample.id, detail=_counted(lost))
            self.recorder.add(*place, hashes(sound))
            self._pairs(sound, sample, place)
        if again := repeated(sample):
            self.found.add("repeated_answer", place, id=sample.id, detail=f"{again} times")
        texts = list(texts_of(sample))
        self._unicode(texts, sample, place)
        if self.benchmark is not None and (hit := self._held(texts)):
            gram, file, line = hit
            self.found.add("benchmark", place, id=sample.id, detail=gram, other={"file": file, "line": line})
        if self.signatures is not None:
            self.signatures.add(gist(sample))
            self.places.append(place)
        if self.languages is not None:
            self.report.languages[self.languages.of(gist(sample))] += 1

    def _pairs(self, sound: Sample, sample: Sample, place: Place) -> None:
        sides = [(sound.sequences[pair.chosen], sound.sequences[pair.rejected]) for pair in sound.pairs]
        self.report.length.add([(length_of(chosen), length_of(rejected)) for chosen, rejected in sides])
        for chosen, rejected in sides if sample.pairs else ():
            scores = rating(chosen.scores), rating(rejected.scores)
            if scores[0] is not None and scores[1] is not None and scores[0] <= scores[1]:
                kind = "score_tie" if scores[0] == scores[1] else "score_order"
                self.found.add(kind, place, id=sample.id, detail=f"{scores[0]:g} and {scores[1]:g}")

    def _unicode(self, texts: list[str], sample: Sample, place: Place) -> None:
        odd: Counter[str] = Counter()
        for text in texts:
            odd.update(oddities(text))
        for kind, count in odd.items():
            self.found.add(kind, place, id=sample.id, detail=f"{count} times")
        letters = scripts(texts)
        self.report.letters.update(letters)
        if letters:
            self.report.main_script[letters.most_common(1)[0][0]] += 1

    def _held(self, texts: list[str]) -> tuple[str, str, int] | None:
        assert self.benchmark is not None
        return next((hit for text in texts if (hit := self.benchmark.find(text))), None)

    def _templates(self, batch: list[tuple[Sample, Place]], source: SourceConfig) -> None:
        """What the template leaves of the rows, as the objective eats them."""
        if self.encoder is None:
            return
        eaten: list[tuple[Sample, Place]] = []
        for sample, place in batch:
            try:
                whole = sample if self.needs.stage else self._eaten(sample, source)
                if fault(whole, self.encoder.markup) is None:
                    eaten.append((whole, place))
            except DataError as error:
                self.found.add("malformed", place, id=sample.id, reason="wrong_schema", detail=str(error))
        self.encoder.foresee(sample for sample, _ in eaten)
        for sample, place in eaten:
            try:
                encoded = self.encoder.encode(sample)
            except Overlong as error:
                encoded = Dropped("overlong", str(error))
            except DataError as error:
                encoded = Dropped("template", str(error))
            if isinstance(encoded, Dropped):
                kind = encoded.reason if encoded.reason in ("overlong", "identical_pair", "no_target") else "template"
                detail = encoded.detail or encoded.reason
                self.found.add(kind, place, id=sample.id, detail=detail)
                continue
            counts = [self.encoder.terminators(sequence) for sequence in encoded.sequences]
            open_ended = sum(turns - ended for turns, ended in counts)
            if open_ended:
                turns = sum(turns for turns, _ in counts)
                self.found.add("no_terminator", place, id=sample.id, detail=f"{open_ended} of {turns} answers")

    def _eaten(self, sample: Sample, source: SourceConfig) -> Sample:
        needs = self.needs
        return to_examples(sample, needs.example, labels=needs.labels, absolute=source.absolute, by=source.rating)

    # All rows

    def _twice(self, train: Examples) -> None:
        """Rows of which every example stood before, and both sides of a contradiction."""
        later, first = train.repeated()
        rows = train.file_number.astype(np.int64) << 40 | train.line  # one number for each row
        names, examples = np.unique(rows, return_counts=True)
        again = np.zeros(len(names), dtype=np.int64)
        np.add.at(again, np.searchsorted(names, rows[later]), 1)
        for number, other in zip(later.tolist(), first.tolist(), strict=True):
            at = np.searchsorted(names, rows[number])
            if again[at] == examples[at]:
                self.found.add("duplicate", Place(**train.place(number)), other=train.place(other))
        for pair in train.contradicted():
            for number, other in (pair, pair[::-1]):
                self.found.add("conflict", Place(**train.place(number)), other=train.place(other))

    def _evaluation(self) -> list[SourceConfig]:
        asked = sources_of(self.data, held_out=True) if self.data.eval_path is not None else []
        return [*asked, *(SourceConfig(path, split=self.data.eval_split) for path in self.config.against)]

    def _compare(self, train: Examples, source: SourceConfig) -> None:
        """The training rows against one evaluation source: the same examples, the same prompts."""
        held = Recorder()
        for _, sample, place in self._read(source, _raised, held_out=True):
            self.report.held_out[source.path] += 1
            held.add(*place, hashes(natural(sample, source.rating)))
            if self.signatures is not None:
                self.signatures.add(gist(sample))
                self.places.append(place)
        others = held.made()
        for kind, found in (("leak", others.stand_in(train.example)), ("shared_prompt", others.asks(train.prompt))):
            for number in np.flatnonzero(found >= 0).tolist():
                place = Place(**train.place(number))
                if not self.found.has(place, "leak"):
                    self.found.add(kind, place, other=others.place(int(found[number])))

    def _near(self) -> None:
        if self.signatures is None:
            return
        held = sum(self.report.held_out.values())
        border = self.signatures.count - held
        for number, other, similarity in self.signatures.pairs(self.config.similarity):
            place, there = self.places[number], self.places[other]
            if number >= border:
                if other < border and not self._known(there):
                    self.found.add("near_leak", there, other=place._asdict(), detail=f"similarity {similarity:.2f}")
            elif not self.found.has(place, "duplicate") and not self.found.has(place, "conflict"):
                self.found.add("near_duplicate", place, other=there._asdict(), detail=f"similarity {similarity:.2f}")

    def _known(self, place: Place) -> bool:
        return any(self.found.has(place, kind) for kind in ("leak", "shared_prompt"))

    def _benchmark(self) -> Benchmark | None:
        if not self.config.benchmark:
            return None
        made = Benchmark(self.config.ngram)
        for path in self.config.benchmark:
            for _, sample, place in self._read(SourceConfig(path, split=self.data.eval_split), _raised, held_out=True):
                made.add("\n".join(said(sample.sequences[0].prompt or sample.sequences[0].completion)), *place)
        self.report.benchmark_questions, self.report.benchmark_short = made.questions, made.short
        return made


def _raised(error: RowError) -> None:
    raise error


def _batches(rows: Iterable[tuple[Row, Sample, Place]], size: int) -> Iterator[list[tuple[Row, Sample, Place]]]:
    batch = []
    for one in rows:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
