"""Regular expressions of modules' names: Python's meaning, within a limit of time."""

import re
import signal
import threading

import pytest

from jaxllm.core.errors import UserError
from jaxllm.peft import patterns
from jaxllm.peft.ia3 import Ia3
from jaxllm.peft.lora import Lora
from jaxllm.peft.patterns import ExpressionError, check, matching
from tests.support.families import draw_config, small_lm

NAMES = tuple(f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "norm"))
ENDLESS = "(([a-z_.0-9]+)+)+[A-Z]"


@pytest.mark.parametrize(
    "expression",
    [
        *("", "norm", "model.layers.3.norm", r".*layers\.[0-3]\..*_proj", r".*\.1?1\.norm", "(?i).*Q_PROJ"),
        *(r"(model)\.(layers).*\1", r".*(?<!up)_proj", r"model\.layers\.\d{2}\..+|.*norm$", r"(?:.*?\.)+?norm"),
    ],
)
def test_the_meaning_is_that_of_re(expression):
    assert matching(expression, NAMES) == {name for name in NAMES if re.fullmatch(expression, name)}
    if not expression.startswith("(?i)"):  # which must be at the start
        whole = rf"(.*\.)?({expression})$"
        assert matching(expression, NAMES, ends=True) == {name for name in NAMES if re.match(whole, name)}


@pytest.fixture
def short(monkeypatch):
    """A limit of one second."""
    code = patterns._MATCHER.replace(f"({patterns.SECONDS}, {patterns.SECONDS + 1})", "(1, 2)")
    assert code != patterns._MATCHER
    monkeypatch.setattr(patterns, "_MATCHER", code)
    yield
    patterns.matching.cache_clear()


def test_an_endless_one_is_refused_wherever_it_is(short):
    lm = small_lm(draw_config("llama", 1))
    sections = {
        "rank_pattern": Lora(type="lora", rank_pattern={ENDLESS: 2}),
        "feedforward_modules": Ia3(type="ia3", target_modules=".*_proj", feedforward_modules=ENDLESS),
    }
    for key, section in sections.items():
        with pytest.raises(UserError, match=f"peft.{key} .*takes more than .* seconds"):
            section.add(lm)


def test_ctrl_c_stops_it(heeded_ctrl_c):
    main = threading.get_ident()
    threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):  # and no ExpressionError after the limit
        matching(ENDLESS, NAMES)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(q_proj", "no regular expression: missing [)]"),
        ("*.q_proj", "no regular expression: nothing to repeat"),
        ("(" * 5000, "no regular expression: maximum recursion"),
        ("a{99999999999}", "no regular expression: the repetition number is too large"),
        ("x" * 20_000, "has 20,000 characters, and the most are 10,000"),
    ],
)
def test_what_is_no_expression(expression, message):
    with pytest.raises(ExpressionError, match=message):
        check(expression)
