"""From row files to an index on disk, once, under a lock, before any process group exists.

rows -> format -> what the objective eats -> condition (CPO) -> tokens -> index.  Every row that is left out has a
reason, is counted in the manifest and listed in ``rejected.jsonl`` (file, line, id, reason); examples that stand twice
or contradict each other are kept, counted and listed in ``findings.jsonl``.  The result lives in the content-addressed
cache: the same rows, template and lengths are never prepared twice, by no job of a sweep.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from alignlab.config import DataConfig, SourceConfig
from alignlab.data import cache
from alignlab.data.condition_preview import Change, count_row
from alignlab.data.encoding import encoded
from alignlab.data.index import Index, IndexWriter
from alignlab.data.ledger import SAMPLES_FILE, SampleWriter
from alignlab.data.overlap import Examples, Recorder, found_in
from alignlab.data.rows import RowError, fingerprint
from alignlab.data.sift import Sifted, Sifter, placed
from alignlab.data.sources import Needs, sources_of, split_share
from alignlab.data.template import Dropped, Encoder, Overlong
from alignlab.errors import DataError
from alignlab.types import EncodedSample, Sample

VERSION = 5
"""Part of every key: raise it when a change here or in :mod:`alignlab.data.sift` changes what an index holds."""

ADVICE = {
    "overlong": "raise data.max_length, or set data.overlong=cut",
    "no_target": "the rows hold no answer to learn, or data.max_length cuts all of it off",
    "control_token": "rendered conversations? Give them as turns (messages), and the template renders them",
    "leak": "every example is held out too; data.leaks=keep trains on them",
    "no_dimension": "give ratings by dimension, completions: [{response: ..., annotations: {helpfulness: 4, ...}}], or "
    "name those that are there in data.condition.dimensions, e.g. [overall]",
    "no_example": "no two answers of a prompt differ in what this objective compares: ratings, correctness or labels",
}
"""What to do when no row is left, by the most frequent reason."""


@dataclass
class Manifest:
    """The account of one preparation: rows ``read = kept + dropped`` by reason, and what was kept in tokens.

    ``parts`` counts what a kept row lost (a faulty completion, an overlong pair), by reason; ``findings`` counts
    examples that were kept although they stand twice (``duplicate``) or contradict another (``conflict``).
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    sequences: int = 0
    pairs: int = 0
    tokens: int = 0
    target_tokens: int = 0
    turns: int = 0
    """turns that are targets"""
    terminated: int = 0
    """of them, those whose terminator is a target"""
    largest_token: int = -1
    """the largest token id, and the row it stands in"""
    largest_at: str = ""
    findings: Counter[str] = field(default_factory=Counter)
    conditions: dict[str, Any] = field(default_factory=dict)
    """by condition as it is written: ``rows``, ``examples``, ``changed``, ``pairs``, ``reversed`` (CPSFT, CPO)"""
    sources: Counter[str] = field(default_factory=Counter)
    template: str = ""


@dataclass(frozen=True)
class Prepared:
    """An index in the cache with its account; ``fresh`` says that this job made it."""

    folder: Path
    index: Index
    manifest: dict[str, Any]
    fresh: bool

    def examples(self) -> Examples:
        """The hashes and places of what was kept."""
        return Examples.open(self.folder)

    def findings(self) -> Iterator[dict[str, Any]]:
        """The entries of ``findings.jsonl``."""
        with (self.folder / "findings.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def prepare(
    data: DataConfig, needs: Needs, encoder: Encoder, *, held_out: bool = False, seed: int = 0,
    without: Prepared | None = None,
) -> Prepared:  # fmt: skip
    """The index of the training rows, or of the held-out rows, from the cache or made now.

    Examples that stand in ``without`` are left out (``leak``).  Raises :class:`DataError` for an unreadable or wrongly
    shaped row (file, line, key), and when no row is left.
    """
    sources = sources_of(data, held_out=held_out)
    parts = {
        "version": VERSION,
        "sources": [asdict(s) | {"path": fingerprint(s.path, s.split, data.options)} for s in sources],
        "data": [data.max_reject_fraction, data.limit, data.options, split_share(data), held_out],
        "condition": {f.name: getattr(data.condition, f.name) for f in fields(data.condition)} if needs.stage else None,
        "encoder": encoder.fingerprint(),
        "needs": asdict(needs),
        "seed": seed if any(s.weight != 1.0 for s in sources) else None,
        "without": without.folder.name if without else None,
    }
    fresh = False

    def build(folder: Path) -> None:
        nonlocal fresh
        fresh = True
        examples = without.examples() if without else None
        sifter = Sifter(data, needs, encoder, held_out=held_out, seed=seed, without=examples)
        _Builder(folder, sifter).run(sources)

    folder = cache.obtain("index", cache.key(parts), build)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["kept"] == 0:
        why = _why_none(manifest, folder / "rejected.jsonl")
        raise DataError(f"{', '.join(s.path for s in sources)}: no row is left; {why}")
    return Prepared(folder, Index.open(folder / "index"), manifest, fresh)


def _why_none(manifest: dict[str, Any], rejected: Path) -> str:
    """What became of the rows, the most frequent reason's first instance, and what to do about it."""
    if not manifest["read"]:
        return "none was read"
    reasons = Counter(manifest["dropped"])
    said = f"{manifest['read']} read, dropped: {', '.join(f'{reason} {n}' for reason, n in sorted(reasons.items()))}"
    most = reasons.most_common(1)[0][0]
    if most == "no_dimension":
        entries = map(json.loads, rejected.read_text(encoding="utf-8").splitlines())
        said += next((f", {one['detail']}" for one in entries if one["reason"] == most), "")
    advice = ADVICE.get(most)
    return f"{said} ({advice})" if advice else said


def _write(file: TextIO, entry: dict[str, Any]) -> None:
    # In ASCII: a row's text or a file's name may hold what other readers take for a line's end, or half a character.
    file.write(json.dumps(entry) + "\n")


def _detailed(place: dict[str, Any], detail: str | None) -> dict[str, Any]:
    return {**place, "detail": detail} if detail else place


class _Builder:
    """One pass over all rows; nothing but counts and the examples' hashes is kept in memory."""

    def __init__(self, folder: Path, sifter: Sifter) -> None:
        self.folder, self.sifter = folder, sifter
        self.data, self.needs, self.encoder = sifter.data, sifter.needs, sifter.encoder
        self.manifest = Manifest(template=self.encoder.template_name)
        self.recorder = Recorder()

    def run(self, sources: list[SourceConfig]) -> None:
        manifest = self.manifest
        with (
            IndexWriter(self.folder / "index") as writer,
            (self.folder / "rejected.jsonl").open("w", encoding="utf-8") as self.rejected,
            SampleWriter(self.folder / SAMPLES_FILE, self.needs.example) as self.ledger,
        ):
            for source in sources:
                self._source(source, writer)
            writer.close(meta={"needs": asdict(self.needs)})
        manifest.findings, entries = found_in(self.recorder.close(self.folder))
        with (self.folder / "findings.jsonl").open("w", encoding="utf-8") as findings:
            for entry in entries:
                _write(findings, entry)
        (self.folder / "manifest.json").write_text(json.dumps(vars(manifest), indent=1), encoding="utf-8")

    def _source(self, source: SourceConfig, writer: IndexWriter) -> None:
        malformed: list[RowError] = []
        before = self.manifest.read

        def malformed_row(error: RowError, sample: Sample | None = None) -> None:
            if not self.data.max_reject_fraction:
                raise error
            malformed.append(error if not malformed else malformed[0])
            place: dict[str, Any] = {"file": error.file, "line": error.line}
            place |= {"byte": error.byte} if error.byte is not None else {}
            place |= {"id": sample.id} if sample else {}
            self._drop(error.reason, {**place, "detail": error.detail})

        with closing(encoded(self.sifter.rows(source), self.encoder, self.data.num_proc)) as rows:
            for one in rows:
                if one.last is not None:
                    raise one.last
                if one.error is not None:
                    malformed_row(one.error, one.sample)
                    continue
                try:
                    self._settle(one, writer)
                except Overlong as error:
                    raise placed(error, one.row) from None
                except DataError as error:
                    malformed_row(placed(error, one.row), one.sample)
        allowed = self.data.max_reject_fraction * (self.manifest.read - before)
        if len(malformed) > allowed:
            raise DataError(
                f"{malformed[0]} ({len(malformed)} rows of {source.path} are malformed, "
                f"data.max_reject_fraction={self.data.max_reject_fraction} allows {int(allowed)})"
            )

    def _settle(self, row: Sifted, writer: IndexWriter) -> None:
        """Keep or drop one row; DataError, with nothing written or counted, where it is of the wrong schema."""
        place, lost, details = row.place, row.lost, row.details
        if row.drop:
            self._drop(row.drop, place)
            return
        kept: list[EncodedSample] = []
        changes: list[Change] = []
        for number, (found, parts) in enumerate(row.outcomes):
            if isinstance(found, DataError):
                raise found
            lost.update(parts)
            if isinstance(found, Dropped):
                lost[found.reason] += 1
                details.setdefault(found.reason, found.detail)
            else:
                kept.append(found)
                changes += row.changes[number : number + 1]
        if not kept:
            reason = next(iter(details), "no_example")
            self._drop(reason, _detailed(place, details.get(reason)))
            return
        self.manifest.read += 1
        self.manifest.kept += 1
        stored = [one for one in kept for _ in range(row.repeats)]
        for one in stored:
            writer.add(one)
            self._count(one, place)
        for one, change in zip(kept, changes, strict=False):
            count_row(self.manifest.conditions, change, len(one.pairs) or len(one.sequences), row.repeats)
        self.recorder.add(place["file"], place["line"], row.examples)
        self.ledger.kept(self.manifest.read, place, stored, lost)
        self.manifest.sources[kept[0].source or Path(place["file"]).name] += 1
        self.manifest.parts.update(lost)
        for reason, count in lost.items():
            _write(self.rejected, {**_detailed(place, details.get(reason)), "reason": reason, "parts": count})

    def _drop(self, reason: str, place: dict[str, Any]) -> None:
        self.manifest.read += 1
        self.manifest.dropped[reason] += 1
        self.ledger.dropped(self.manifest.read, place, reason)
        _write(self.rejected, {**place, "reason": reason})

    def _count(self, encoded: EncodedSample, place: dict[str, Any]) -> None:
        manifest = self.manifest
        manifest.samples += 1
        manifest.sequences += len(encoded.sequences)
        manifest.pairs += len(encoded.pairs)
        for sequence in encoded.sequences:
            manifest.tokens += len(sequence.tokens)
            if (largest := int(sequence.tokens.max())) > manifest.largest_token:
                manifest.largest_token, manifest.largest_at = largest, f"{place['file']}: line {place['line']}"
            manifest.target_tokens += int(sequence.target.sum())
            turns, terminated = self.encoder.terminators(sequence)
            manifest.turns += turns
            manifest.terminated += terminated
