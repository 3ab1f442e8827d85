"""Chat templates are code of strangers: each rendering has limits, wherever the template spends them."""

import datetime
import signal
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jaxllm.data.text import chat_rendering, chat_rendering_process
from jaxllm.data.text.chat_rendering import Conversation, Failure, Rendering, render

HELLO = [{"role": "user", "content": "Hi there, \ud800 🙂"}, {"role": "assistant", "content": "Hello"}]
PLAIN = (
    "{{ bos }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
DOUBLED = "{% set ns = namespace(t='x' * 1000) %}{% for i in range(40) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch):
    """A process with a limit of one second of processor time."""
    process = chat_rendering._Process(seconds=1)
    monkeypatch.setattr(chat_rendering, "_process", process)
    yield process
    process.stop()


def failure(template: str) -> str:
    (found,) = render(template, [Conversation(HELLO)])
    assert isinstance(found, Failure)
    return found.reason


def test_the_text_is_that_of_transformers():
    tools = [{"name": "weather", "parameters": {"b": 1, "a": [None, True, 1.5]}}]
    marked = PLAIN + "{% generation %}said{% endgeneration %}{% if add_generation_prompt %}>{% endif %}"
    found = render(marked, [Conversation(HELLO, tools, ask=True), Conversation(HELLO[:1])], variables={"bos": "<s>"})
    for rendered, (messages, given, ask) in zip(found, ((HELLO, tools, True), (HELLO[:1], None, False)), strict=True):
        texts, spans = render_jinja_template(
            [messages],
            given,
            chat_template=marked,
            return_assistant_tokens_mask=True,
            add_generation_prompt=ask,
            bos="<s>",
        )
        assert rendered == Rendering(texts[0], spans[0])


def test_the_moment_that_a_template_writes_can_be_fixed():
    (found,) = render("{{ strftime_now('%d %b %Y') }}", [Conversation(HELLO)], now="2024-07-26")
    assert found == Rendering("26 Jul 2024", [])
    (found,) = render("{{ strftime_now('%Y') }}", [Conversation(HELLO)])
    assert found == Rendering(str(datetime.datetime.now().year), [])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set n = 10 ** 9 %}{{ 7 ** n }}",  # one call in C
    ],
)
def test_a_template_that_takes_too_long_is_stopped(one_second, template: str):
    start = time.monotonic()
    assert "it takes more than 1 second" in failure(template)
    assert time.monotonic() - start < 60  # processor time is limited, and the machine may be busy
    assert render("{{ 1 }}", [Conversation(HELLO)]) == [Rendering("1", [])]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{% set n = 10 ** 10 %}{{ 'x' | center(n) }}",
        "{{ '%' ~ '10000000000d' | string }}{{ ('%10000000000d' % 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        DOUBLED,
        "{{ ([messages] * 10 ** 10) | length }}",
        "{% set t = 'x' * 10 ** 7 %}{% for i in range(11) %}{{ t }}{% endfor %}",  # more text than is allowed
    ],
)
def test_a_template_that_takes_too_much_memory_is_stopped(template: str):
    assert "it needs more than 2 GiB of memory, or writes more than 100,000,000 characters" in failure(template)


def test_endless_recursion_is_an_error_of_the_template():
    assert "recursion" in failure("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")


def test_of_many_conversations_the_one_that_never_ends_is_found(one_second):
    template = (
        "{% if messages | length > 1 %}" + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}" * 1
    )
    template += "{% endfor %}{% endif %}fine"
    first, second, third = render(template, [Conversation(HELLO[:1]), Conversation(HELLO), Conversation(HELLO[:1])])
    assert first == Rendering("fine", [])
    assert isinstance(second, Failure)
    assert third == second


def test_ctrl_c_ends_a_rendering_at_once(heeded_ctrl_c):
    main = threading.get_ident()
    threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    start = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        render("{% set n = 10 ** 9 %}{{ 7 ** n }}", [Conversation(HELLO)])
    assert time.process_time() - start < chat_rendering_process.SECONDS
    assert render("{{ 1 }}", [Conversation(HELLO)]) == [Rendering("1", [])]


def test_threads_forks_and_who_comes_after_a_killed_process_get_their_answers():
    found: dict[int, str] = {}

    def ask(n: int) -> None:
        for _ in range(20):
            (rendered,) = render("{{ n }}", [Conversation(HELLO)], variables={"n": n})
            assert isinstance(rendered, Rendering)
            found[n] = rendered.text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(4)}
    process = chat_rendering._process
    parents = process._child
    assert parents is not None
    process.forget()  # as in a fork
    ask(9)
    assert process._child is not parents
    assert parents.poll() is None
    parents.kill()
    parents.wait()
    assert process._child is not None
    process._child.kill()
    process._child.wait()
    ask(10)
    assert found[10] == "10"
