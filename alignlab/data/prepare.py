"""From row files to an index on disk, once, under a lock, before any process group exists.

rows -> format -> what the objective eats -> condition (CPO) -> tokens -> index.  Every row that is left out has a
reason, is counted in the manifest and listed in ``rejected.jsonl`` (file, line, id, reason).  The result lives in the
content-addressed cache: the same rows, template and lengths are never prepared twice, by no job of a sweep.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignlab.config import DataConfig, SourceConfig
from alignlab.data import cache, world
from alignlab.data.condition import Conditioner
from alignlab.data.examples import fault, prune, to_examples
from alignlab.data.formats import to_sample
from alignlab.data.index import Index, IndexWriter
from alignlab.data.rows import Row, fingerprint, read_rows
from alignlab.data.template import Dropped, Encoder
from alignlab.errors import DataError
from alignlab.types import EncodedSample, Sample, Unit

VERSION = 3
"""Part of every key: raise it when a change here changes what an index holds."""

ADVICE = {
    "overlong": "raise data.max_length, or set data.overlong=cut",
    "no_target": "the rows hold no answer to learn, or data.max_length cuts all of it off",
    "no_example": "no two answers of a prompt differ in what this objective compares: ratings, correctness or labels",
}
"""What to do when no row is left, by the most frequent reason."""


@dataclass(frozen=True)
class Needs:
    """What an objective wants of the data."""

    example: Unit
    labels: bool = False
    """two labelled sequences a pair (KTO)"""
    stage: str | None = None
    """``cpsft`` | ``cpo``: rows are conditioned"""
    world_kind: str = "demonstrations"
    """which rows the built-in world makes"""


@dataclass
class Manifest:
    """The account of one preparation: rows ``read = kept + dropped`` by reason, and what was kept in tokens.

    ``parts`` counts what a kept row lost (a faulty completion, an overlong pair), by reason.
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
    conditions: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    template: str = ""


@dataclass(frozen=True)
class Prepared:
    """An index in the cache with its account; ``fresh`` says that this job made it."""

    folder: Path
    index: Index
    manifest: dict[str, Any]
    fresh: bool


def sources_of(data: DataConfig, *, held_out: bool) -> list[SourceConfig]:
    """The files behind ``data.path`` / ``data.sources``, or behind ``data.eval_path``.

    With ``eval_fraction`` and no ``eval_path`` both sides read the training files and keep their share.
    """
    if held_out and data.eval_path is not None:
        return [SourceConfig(data.eval_path, 1.0, data.eval_split, data.format, data.absolute, data.columns)]
    if data.sources:
        return list(data.sources)
    if data.path is None:
        raise DataError("data is missing: data=<file.jsonl>, data=<hub name>, data=sums or data.sources=[{path: ...}]")
    return [SourceConfig(data.path, 1.0, data.split, data.format, data.absolute, data.columns)]


def prepare(data: DataConfig, needs: Needs, encoder: Encoder, *, held_out: bool = False, seed: int = 0) -> Prepared:
    """The index of the training rows, or of the held-out rows, from the cache or made now.

    Raises :class:`DataError` for an unreadable or wrongly shaped row (file, line, key), and when no row is left.
    """
    sources = sources_of(data, held_out=held_out)
    parts = {
        "version": VERSION,
        "sources": [asdict(s) | {"path": fingerprint(s.path, s.split, data.options)} for s in sources],
        "data": [data.max_reject_fraction, data.limit, data.options, _split_share(data), held_out],
        "condition": asdict(data.condition) if needs.stage else None,
        "encoder": encoder.fingerprint(),
        "needs": asdict(needs),
        "seed": seed if any(s.weight != 1.0 for s in sources) else None,
    }
    fresh = False

    def build(folder: Path) -> None:
        nonlocal fresh
        fresh = True
        _Builder(folder, data, needs, encoder, held_out=held_out, seed=seed).run(sources)

    folder = cache.obtain("index", cache.key(parts), build)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["kept"] == 0:
        raise DataError(f"{', '.join(s.path for s in sources)}: no row is left; {_why_none(manifest)}")
    return Prepared(folder, Index.open(folder / "index"), manifest, fresh)


def _why_none(manifest: dict[str, Any]) -> str:
    """What became of the rows, and what to do about the most frequent reason."""
    if not manifest["read"]:
        return "none was read"
    reasons = Counter(manifest["dropped"])
    said = f"{manifest['read']} read, dropped: {', '.join(f'{reason} {n}' for reason, n in sorted(reasons.items()))}"
    advice = ADVICE.get(reasons.most_common(1)[0][0])
    return f"{said} ({advice})" if advice else said


def rows_of(
    source: SourceConfig, data: DataConfig, needs: Needs, *, held_out: bool,
    on_error: Callable[[DataError], None] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """The rows of one source: of a file, of a hub data set, or of the built-in world."""
    if source.path == "sums":
        options = dict(data.options)
        counts = {"train": int(options.pop("rows", 2000)), "test": int(options.pop("eval_rows", 200))}
        split = "test" if held_out and not _split_share(data) else "train"
        # The held-out problems stay the same whatever the training rows' seed, so that runs can be compared.
        seeds = {"train": int(options.pop("seed", 0)), "test": int(options.pop("eval_seed", 0))}
        made = world.rows(options.pop("kind", needs.world_kind), counts[split], seeds[split], split, **options)
        return (Row("sums", number, value) for number, value in enumerate(made, 1))
    return read_rows(source.path, columns=source.columns, split=source.split, limit=data.limit, on_error=on_error)


def sample_of(row: Row, source: SourceConfig) -> Sample:
    """What a row means, by its source's format; raises DataError at a row of the wrong schema (file, line, key)."""
    return to_sample(row, source.format, absolute=source.absolute)


def kept_apart(sample: Sample, data: DataConfig, *, held_out: bool) -> bool:
    """Whether a row belongs to the other side of a split by ``data.eval_fraction`` (equal prompts stay together)."""
    share = _split_share(data)
    return bool(share) and (_unit_interval("held-out", _prompt_key(sample)) < share) != held_out


def _split_share(data: DataConfig) -> float:
    return data.eval_fraction if data.eval_path is None else 0.0


def _unit_interval(*keys: object) -> float:
    digest = hashlib.blake2b(json.dumps(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _prompt_key(sample: Sample) -> str:
    """Text that equal prompts share."""
    first = sample.sequences[0]
    if first.input_ids is not None:
        targets = first.target_mask or []
        context = targets.index(True) if True in targets else 0
        return json.dumps([int(token) for token in first.input_ids[: context or None]])
    said = first.completion or ""
    return json.dumps(first.prompt or (said if isinstance(said, str) else said[:1]), sort_keys=True)


def _placed(error: DataError, row: Row) -> DataError:
    """``error`` with the row's file and line, where it does not name them yet."""
    text = str(error)
    return error if text.startswith(f"{row.file}: ") else DataError(f"{row.file}: line {row.line}: {text}")


def _detailed(place: dict[str, Any], detail: str | None) -> dict[str, Any]:
    return {**place, "detail": detail} if detail else place


def _repeats(source: SourceConfig, row: Row, seed: int) -> int:
    """How often a row of a weighted source is used: the whole part always, the fraction by a seeded draw."""
    whole = int(source.weight)
    return whole + (_unit_interval(seed, Path(row.file).name, row.line) < source.weight - whole)


class _Builder:
    """One pass over all rows; nothing but counts is kept in memory."""

    def __init__(
        self, folder: Path, data: DataConfig, needs: Needs, encoder: Encoder, *, held_out: bool, seed: int
    ) -> None:
        self.folder, self.data, self.needs, self.encoder = folder, data, needs, encoder
        self.held_out, self.seed = held_out, seed
        self.manifest = Manifest(template=encoder.template_name)
        self.conditioner = Conditioner(data.condition, needs.stage) if needs.stage else None

    def run(self, sources: list[SourceConfig]) -> None:
        manifest = self.manifest
        with IndexWriter(self.folder / "index") as writer, (self.folder / "rejected.jsonl").open("w") as self.rejected:
            for source in sources:
                self._source(source, writer)
            if self.conditioner:
                manifest.conditions.update(self.conditioner.counts)
            writer.close(meta={"needs": asdict(self.needs)})
        (self.folder / "manifest.json").write_text(json.dumps(vars(manifest), indent=1), encoding="utf-8")

    def _source(self, source: SourceConfig, writer: IndexWriter) -> None:
        malformed: list[DataError] = []
        before = self.manifest.read

        def malformed_row(error: DataError) -> None:
            malformed.append(error)
            if not self.data.max_reject_fraction:
                raise error
            self.manifest.read += 1
            self._drop("malformed", {"detail": str(error)})

        for row in rows_of(source, self.data, self.needs, held_out=self.held_out, on_error=malformed_row):
            try:
                sample = sample_of(row, source)
                wanted = sample if self.conditioner else self._adapted(sample, source)
            except DataError as error:
                malformed_row(_placed(error, row))
                continue
            if kept_apart(sample, self.data, held_out=self.held_out):
                continue
            self.manifest.read += 1
            try:
                self._row(row, source, wanted, writer)
            except DataError as error:
                raise _placed(error, row) from None
        allowed = self.data.max_reject_fraction * (self.manifest.read - before)
        if len(malformed) > allowed:
            raise DataError(
                f"{malformed[0]} ({len(malformed)} rows of {source.path} are malformed, "
                f"data.max_reject_fraction={self.data.max_reject_fraction} allows {int(allowed)})"
            )

    def _adapted(self, sample: Sample, source: SourceConfig) -> Sample:
        return to_examples(sample, self.needs.example, labels=self.needs.labels, absolute=source.absolute)

    def _row(self, row: Row, source: SourceConfig, sample: Sample, writer: IndexWriter) -> None:
        place = {"file": row.file, "line": row.line, "id": sample.id}
        reason = fault(sample)
        repeats = _repeats(source, row, self.seed)
        if reason or not repeats:
            self._drop(reason or "not_drawn", place)
            return
        pruned, lost = prune(sample)
        made = [pruned]
        if self.conditioner:
            made = [self._adapted(one, source) for one in self.conditioner.rows(pruned)]
        kept = 0
        details: dict[str, str] = {}
        for one in made:
            self.encoder.partial.clear()
            encoded = self.encoder.encode(one)
            lost.update(self.encoder.partial)
            if isinstance(encoded, Dropped):
                lost[encoded.reason] += 1
                details.setdefault(encoded.reason, encoded.detail)
                continue
            for _ in range(repeats):
                writer.add(encoded)
                self._count(encoded)
            kept += 1
        if not kept:
            reason = next(iter(details), "no_example")
            self._drop(reason, _detailed(place, details.get(reason)))
            return
        self.manifest.kept += 1
        self.manifest.sources[sample.source or Path(row.file).name] += 1
        self.manifest.parts.update(lost)
        for reason, count in lost.items():
            self._write({**_detailed(place, details.get(reason)), "reason": reason, "parts": count})

    def _drop(self, reason: str, place: dict[str, Any]) -> None:
        self.manifest.dropped[reason] += 1
        self._write({**place, "reason": reason})

    def _write(self, entry: dict[str, Any]) -> None:
        self.rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _count(self, encoded: EncodedSample) -> None:
        manifest = self.manifest
        manifest.samples += 1
        manifest.sequences += len(encoded.sequences)
        manifest.pairs += len(encoded.pairs)
        for sequence in encoded.sequences:
            manifest.tokens += len(sequence.tokens)
            manifest.target_tokens += int(sequence.target.sum())
            turns, terminated = self.encoder.terminators(sequence)
            manifest.turns += turns
            manifest.terminated += terminated
