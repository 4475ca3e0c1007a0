"""The program that renders chat templates: a process that can open nothing and holds no secret.

Started by :mod:`alignlab.data.sandbox` with an empty environment; it imports the standard library and Jinja only.
Requests come on standard input, answers go to standard output, each a length (8 bytes, big endian) and UTF-8 JSON.
The environment for templates is transformers' own (``transformers.utils.chat_template_utils``), so that a template
writes here what ``tokenizer.apply_chat_template`` writes.
"""

from __future__ import annotations

import sys

sys.path += sys.argv[1:]  # the folders that hold jinja2 and markupsafe, which an isolated interpreter does not search

import json
import resource
import signal
import struct
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug  # imported by Jinja at the first error, when no file can be opened any more
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

TODAY = datetime(2024, 7, 26)
"""What templates that print today's date are told: the same rows must be the same tokens tomorrow."""
CPU_SECONDS = 2.0
"""Processor time of one rendering; the kernel ends the process behind it, whatever it is doing."""
MEMORY = 512 * 2**20
"""Address space of this process in bytes."""
OUTPUT = 4 * 2**20
"""Characters of one rendering; a conversation that is itself long may be written out ``GROWTH`` times."""
GROWTH = 4

WARM_UP = (
    "{{ 'a\\n' | trim | upper }}{{ [1] | tojson }}{{ strftime_now('%d %b %Y') }}{{ '{:d}'.format(1) }}{{ '%d' % 1 }}",
    "{{ [[2, 'x'], [1, 'y']] | sort | map('first') | join(',') }}{{ {'a': 1} | dictsort }}{{ 'é' | urlencode }}",
    "{{ {'a': [1]} | pprint }}{{ '<' | escape }}{{ 'a b' | wordwrap(1) }}{{ [1] | random }}{{ 'a' | indent }}",
    "{{ a.b.c }}",
    "{{ raise_exception('x') }}",
    "{% for",
)
"""Rendered before the doors close: what Python and Jinja import late (codecs, error reports) is imported by then."""


class TooMuch(Exception):
    """The rendered text is longer than any conversation of this size needs."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant writes; here its body is written like any other text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own class attribute

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> Any:
        return caller()


class Dictionary:
    """``dict(...)`` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` that takes no name with an underscore in front."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **values)
        for name in attributes:
            _public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore in front: {name!r}")


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return TODAY.strftime(pattern)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja's immutable sandbox with what transformers gives a chat template."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = Dictionary()
    made.globals["namespace"] = Namespace
    return made


def answer(template: Any, values: dict[str, Any], most: int) -> tuple[str, str]:
    """(``text``, the rendered conversation of at most ``most`` characters), or (the error's kind, what it says)."""
    try:
        pieces, length = [], 0
        for piece in template().generate(**values):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                raise TooMuch
        return "text", "".join(pieces)
    except TooMuch:
        return "limit", f"writes more than {OUTPUT // 2**20} million characters"
    except MemoryError:
        return "limit", f"needs more than {MEMORY // 2**20} MB"
    except jinja2.exceptions.TemplateError as error:
        kind = "refused" if type(error) is jinja2.exceptions.TemplateError else "error"
        return kind, str(error) if kind == "refused" else f"{type(error).__name__}: {error}"
    except TypeError as error:
        return "type", f"TypeError: {error}"
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


def _read(count: int) -> bytes:
    found = sys.stdin.buffer.read(count)
    if len(found) < count:
        raise SystemExit(0)
    return found


def _serve() -> None:
    jinja = environment()
    templates: dict[str, Any] = {}
    for source in WARM_UP:
        answer(partial(jinja.from_string, source), {}, OUTPUT)
    _lock()
    while True:
        (size,) = struct.unpack(">Q", _read(8))
        request = json.loads(_read(size))
        name = request["template"]

        def template(name: str = name, request: dict[str, Any] = request) -> Any:
            if name not in templates:
                templates[name] = jinja.from_string(request["source"])
            return templates[name]

        answers = []
        for values in request["values"]:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF is not handled: the kernel ends the process
            answers.append(answer(template, values, max(OUTPUT, GROWTH * size)))
        try:
            told = json.dumps(answers).encode()
        except MemoryError:
            told = json.dumps([["limit", f"needs more than {MEMORY // 2**20} MB"]] * len(answers)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.buffer.write(struct.pack(">Q", len(told)) + told)
        sys.stdout.buffer.flush()


def _lock() -> None:
    """From here on: no new file or socket, no bytes into a file, no core dump, no process, bounded memory."""
    # What a template could reach if the sandbox had a hole ends here: even a dynamic linker has to open its libraries.
    for name, limit in (
        ("RLIMIT_AS", MEMORY), ("RLIMIT_NOFILE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 0),
    ):  # fmt: skip
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (limit, limit))


if __name__ == "__main__":
    _serve()
