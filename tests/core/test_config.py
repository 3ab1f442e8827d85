"""Reading, checking and writing configs, with a schema shaped like the trainer's."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, model_validator

from jaxllm.core.config import ByType, Section, dump, load
from jaxllm.core.config.messages import foreign_names
from jaxllm.core.config.yaml_file import ConfigFile
from jaxllm.core.errors import UserError
from jaxllm.core.registry import Registry

SCHEDULES = Registry[type[Section]]("schedule")
OPTIMIZERS = Registry[type[Section]]("optimizer")
FAMILIES = Registry[type[Section]]("model")


class Cosine(Section):
    type: Literal["cosine"]
    warmup: float = 0.03


SCHEDULES.add("cosine", Cosine)


class Optim(Section):
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate.

    More that messages leave out.
    """
    schedule: Annotated[Section, ByType(SCHEDULES)] = Cosine(type="cosine")


class AdamW(Optim):
    type: Literal["adamw"]
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0


OPTIMIZERS.add("adamw", AdamW)


class Lion(Optim):
    type: Literal["lion"]


OPTIMIZERS.add("lion", Lion)


class Llama(Section):
    type: Literal["llama"]
    hidden_size: PositiveInt


FAMILIES.add("llama", Llama)


class Pretrained(Section):
    path: Path
    tokenizer: Path | None = None


class Train(Section):
    steps: PositiveInt | None = None
    batch_size: PositiveInt
    """Sequences in a batch."""
    micro_batch_size: PositiveInt | None = None
    deterministic: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: float | None = 1.0

    @model_validator(mode="after")
    def _divides(self) -> "Train":
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
        return self


class Checkpoint(Section):
    every: PositiveInt = 500
    keep: PositiveInt = 2


class Eval(Section):
    name: str
    every: PositiveInt = 100


class Root(Section):
    output_dir: Path
    seed: int = 0
    model: Annotated[Section, ByType(FAMILIES, otherwise=Pretrained)]
    optim: Annotated[Optim, ByType(OPTIMIZERS)]
    second: Annotated[Optim, ByType(OPTIMIZERS)] | None = None
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    evals: tuple[Eval, ...] = ()
    stop: int | Literal["never"] = "never"
    shares: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _compatible(self) -> "Root":
        if self.seed == 13:
            raise ValueError("seed 13 is unlucky; take another")
        return self


GOOD = """\
output_dir: runs/a
model:
  path: weights
optim:
  type: adamw
  learning_rate: 1e-4
train:
  batch_size: 8
"""

DEFAULTS = """\
output_dir: runs/a
seed: 0
model:
  path: weights
  tokenizer: null
optim:
  learning_rate: 0.0001
  schedule:
    type: cosine
    warmup: 0.03
  type: adamw
  betas:
  - 0.9
  - 0.999
  weight_decay: 0.0
second: null
train:
  steps: null
  batch_size: 8
  micro_batch_size: null
  deterministic: false
  compute_dtype: float32
  max_grad_norm: 1.0
checkpoint:
  every: 500
  keep: 2
evals: []
stop: never
shares: {}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], str]:
    """Writes `config.yaml` in the current folder, so that messages name it so."""
    monkeypatch.chdir(tmp_path)

    def to_file(text: str | bytes) -> str:
        Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "config.yaml"

    return to_file


@pytest.fixture
def problems(write) -> Callable[..., list[str]]:
    """The lines of the message that a config gives."""

    def lines(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(write(text), overrides, Root)
        return str(caught.value).splitlines()

    return lines


def test_a_good_config_is_typed_and_states_its_defaults(write):
    config = load(write(GOOD), [], Root)
    assert config.output_dir == Path("runs/a")
    assert config.model == Pretrained(path=Path("weights"))
    assert config.optim == AdamW(type="adamw", learning_rate=1e-4)
    assert config.checkpoint.every == 500
    assert dump(config) == DEFAULTS


def test_a_config_is_frozen(write):
    config = load(write(GOOD), [], Root)
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("1e5", 1e5),
        ("1.5e-05", 1.5e-5),
        (".5", 0.5),
        ("2", 2.0),
    ],
)
def test_numbers_are_read_as_in_yaml_1_2(write, text, value):
    assert load(write(GOOD), [f"optim.learning_rate={text}"], Root).optim.learning_rate == value


def test_infinity_is_read_as_in_yaml_1_2():
    assert ConfigFile("a.yaml", "x: [.Inf, -.inf]").data == {"x": [float("inf"), float("-inf")]}


@pytest.mark.parametrize("text", ["yes", "on", "2024-01-01", "1:30", "1_000", "0x", "~x", "null and void"])
def test_what_only_yaml_1_1_converts_is_text(write, text):
    (evaluation,) = load(write(GOOD), [f"evals=[{{name: {text}}}]"], Root).evals
    assert evaluation.name == text


def test_overrides(write):
    config = load(
        write(GOOD + "evals:\n- {name: a}\n- {name: b}\n"),
        [
            *("train.steps=7", "evals.0.every=10", "evals.2.name=c", "checkpoint.keep=5", "second.type=lion"),
            *("second.learning_rate=3e-4", "optim.betas=[0.8, 0.9]", "model={type: llama, hidden_size: 8}"),
        ],
        Root,
    )
    assert config.train.steps == 7
    assert config.evals == (Eval(name="a", every=10), Eval(name="b"), Eval(name="c"))
    assert config.checkpoint == Checkpoint(keep=5)
    assert config.second == Lion(type="lion", learning_rate=3e-4)
    assert config.optim.betas == (0.8, 0.9)
    assert config.model == Llama(type="llama", hidden_size=8)
    assert load(write(GOOD), ["evals.0.name=x=y"], Root).evals == (Eval(name="x=y"),)
    assert load(write(GOOD + "checkpoint:\n"), ["checkpoint.keep=3"], Root).checkpoint.keep == 3


@pytest.mark.parametrize(
    "text", ["###", "run #1", "#1", "---", "--- a", "|", ">", " ", "\n", "\n##\n", "\nEND\n", "a\nb", "5 # five", r"\n"]
)
def test_a_text_of_an_override_is_what_was_typed(write, text):
    """YAML reads a comment, the start of a document, nothing, or folded lines."""
    (evaluation,) = load(write(GOOD), [f"evals.0.name={text}"], Root).evals
    assert evaluation.name == text


@pytest.mark.parametrize("text", ["", "null", "~", "Null"])
def test_an_override_may_be_null(problems, text):
    assert problems(GOOD, f"train.batch_size={text}") == [
        "command line: train.batch_size: must be a whole number, got null"
    ]


@pytest.mark.parametrize("value", ["[0.8, 0.9] # betas", "[0.8, # b1\n 0.9]"])
def test_an_override_has_no_comments(problems, value):
    assert problems(GOOD, f"optim.betas={value}") == [
        "command line: optim.betas: what follows the # would be a comment; leave it out."
    ]


NO_OVERRIDE = "is no override; write section.key=value, such as train.steps=100."
WRONG_INDEX = "evals is a list of 1; write an index from 0 to 1 (the last adds an item), got"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.steps=5", f"'--train.steps=5' {NO_OVERRIDE}"),
        ("train.steps", f"'train.steps' {NO_OVERRIDE}"),
        ("train..steps=1", f"'train..steps=1' {NO_OVERRIDE}"),
        ("seed.x=1", "seed.x: seed is 3, not a section."),
        ("evals.2.name=x", f"evals.2.name: {WRONG_INDEX} '2'."),
        ("evals.first.name=x", f"evals.first.name: {WRONG_INDEX} 'first'."),
        ("train.steps=-1", "train.steps: must be greater than 0, got -1"),
        ("train.stepps=1", "train.stepps: unknown key. Did you mean 'train.steps'?"),
        ("checkpoint.thing=1", "checkpoint.thing: unknown key. Known here: every, keep."),
        ("new.thing=1", f"new: unknown key. Known here: {', '.join(Root.model_fields)}."),
    ],
)
def test_wrong_overrides(problems, override, message):
    assert problems(GOOD + "seed: 3\nevals: [{name: a}]\n", override) == [f"command line: {message}"]


def test_an_override_that_is_not_yaml_says_how_to_quote(problems):
    (line,) = problems(GOOD, "output_dir=*.jsonl")
    assert line.startswith("command line: output_dir: not valid YAML: ")
    assert line.endswith("""To mean text, quote it: output_dir='"*.jsonl"'.""")
    assert load("config.yaml", ['output_dir="*.jsonl"'], Root).output_dir == Path("*.jsonl")


def test_every_problem_is_listed_in_the_order_of_the_file(problems):
    text = GOOD.replace("1e-4", "-1.0").replace("batch_size", "batch_sise").replace("adamw", "adamw\n  b1: 1")
    assert problems("seeds: 3\n" + text, "train.deterministic=maybe") == [
        "config.yaml:1: seeds: unknown key. Did you mean 'seed'?",
        "config.yaml:7: optim.b1: unknown key for type 'adamw'. "
        "Known here: learning_rate, schedule, type, betas, weight_decay.",
        "config.yaml:8: optim.learning_rate: must be greater than 0, got -1.0",
        "config.yaml:9: train.batch_size: required, but missing: Sequences in a batch (a whole number)",
        "config.yaml:10: train.batch_sise: unknown key. Did you mean 'train.batch_size'?",
        "command line: train.deterministic: must be true or false, got 'maybe'",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: 1.0", "seed: must be a whole number, got 1.0; write 1"),
        ("seed: 1.5", "seed: must be a whole number, got 1.5"),
        ("seed: '1'", "seed: must be a whole number, got '1'"),
        ("seed:", "seed: must be a whole number, got null"),
        ("seed: true", "seed: must be a whole number, got true"),
        ("seed: 13", "seed 13 is unlucky; take another"),
        ("checkpoint: 3", "checkpoint: must be a section of keys and values, got 3"),
        ("checkpoint: {every: 0}", "checkpoint.every: must be greater than 0, got 0"),
        ("evals: {name: a}", "evals: must be a list, got {'name': 'a'}"),
        ("evals: [{name: 3}]",
         "evals.0.name: must be text, got 3; to mean the text, write '3' with the quotes"),
        ("evals: [{name: a}, {every: 5}]", "evals.1.name: required, but missing: text"),
        ("evals: [{name: a, evry: 5}]", "evals.0.evry: unknown key. Did you mean 'evals.0.every'?"),
        ("stop: soon", "stop: must be a whole number or 'never', got 'soon'"),
        ("stop: []", "stop: must be a whole number or 'never', got []"),
        ("shares: {a: b}", "shares.a: must be a number, got 'b'"),
        ("second: lion", "second: must be a section of keys and values, got 'lion'"),
        (
            "second: {type: adamw, learning_rate: 1, betas: [0.9]}",
            "second.betas.1: required, but missing: a number",
        ),
        ("second: {learning_rate: 1}", "second.type: required, but missing: one of adamw, lion"),
        ("second: {type: adam}",
         "second.type: there is no second type 'adam'. Did you mean 'adamw'? Known: adamw, lion."),
        ("second: {type: lion}",
         "second.learning_rate: required, but missing: Peak learning rate (a number)"),
        ("second: {type: lion, learning_rat: 1, learning_rate: 1}",
         "second.learning_rat: unknown key for type 'lion'. Did you mean 'second.learning_rate'?"),
        ("second: {type: lion, learning_rate: 1, schedule: {type: cosin}}",
         "second.schedule.type: there is no schedule type 'cosin'. Did you mean 'cosine'? Known: cosine."),
        ("second: {type: adamw, learning_rate: 1, schedule: {type: cosine, warm: 1}}",
         "second.schedule.warm: unknown key for type 'cosine'. Did you mean 'second.schedule.warmup'?"),
        ("second: {type: adamw, learning_rate: 1, betas: [1, 2, 3]}",
         "second.betas: must have at most 2 items, not 3, got [1, 2, 3]"),
    ],
)  # fmt: skip
def test_wrong_values(problems, line, message):
    where = "config.yaml" if "unlucky" in message else "config.yaml:9"
    assert problems(GOOD + line) == [f"{where}: {message}"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("  type: lama", "4: model.type: there is no model type 'lama'. Did you mean 'llama'? Known: llama."),
        (
            "  type: [llama]",
            "4: model.type: there is no model type \"['llama']\". Did you mean 'llama'? Known: llama.",
        ),
        ("  type: llama", "3: model.hidden_size: required, but missing: a whole number"),
        ("  pth: x\n  path: y", "4: model.pth: unknown key. Did you mean 'model.path'?"),
        ("  hidden_size: 3\n  path: y", "4: model.hidden_size: unknown key. Known here: path, tokenizer."),
    ],
)
def test_a_component_with_and_without_type(problems, model, message):
    assert f"config.yaml:{message}" in problems("seed: 1\n" + GOOD.replace("  path: weights", model))


def test_a_check_across_fields_names_its_section(problems):
    assert problems(GOOD + "  micro_batch_size: 3") == [
        "config.yaml:7: train: batch_size 8 is no multiple of micro_batch_size 3"
    ]


def test_literals(problems):
    assert problems(GOOD + "  compute_dtype: bfloat") == [
        "config.yaml:9: train.compute_dtype: must be 'float32' or 'bfloat16', got 'bfloat'. Did you mean 'bfloat16'?"
    ]
    assert problems(GOOD + "  deterministic: yes") == [
        "config.yaml:9: train.deterministic: must be true or false, got 'yes'; write true"
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rate", ". Did you mean 'optim.learning_rate' or 'second.learning_rate'?"),
        ("lr", ". Did you mean 'optim.learning_rate'?"),
        ("save_steps", ". Did you mean 'checkpoint.every'?"),
        ("max_steps", ". Did you mean 'train.steps'?"),
        ("per_device_train_batch_size", ". Did you mean 'train.micro_batch_size'?"),
        ("gradient_accumulation_steps", "; it follows from 'train.batch_size' and 'train.micro_batch_size'"),
        ("lr_scheduler_type", ". Did you mean 'optim.schedule.type'?"),
        ("warmup_ratio", ". Did you mean 'optim.schedule.warmup'?"),
        ("model_name_or_path", ". Did you mean 'model.path'?"),
        ("bf16", ". Did you mean 'train.compute_dtype'?"),
        ("wieght_decay", ". Did you mean 'optim.weight_decay' or 'second.weight_decay'?"),
        ("every", ". Did you mean 'checkpoint.every' or 'evals.0.every'?"),
    ],
)
def test_names_from_elsewhere_lead_to_our_key(problems, key, hint):
    assert problems(GOOD + f"  {key}: 1") == [f"config.yaml:9: train.{key}: unknown key{hint}"]


def test_a_hint_never_names_a_key_that_does_not_exist(problems):
    """Of another trainer's names, those whose key this schema lacks are answered like any unknown key."""
    known = {
        *(
            "output_dir",
            "model.path",
            "model.tokenizer",
            "optim.type",
            "optim.learning_rate",
            "optim.schedule.type",
        ),
        *(
            "optim.schedule.warmup",
            "optim.betas",
            "optim.weight_decay",
            "train.batch_size",
            "train.micro_batch_size",
        ),
        *("train.steps", "train.compute_dtype", "train.max_grad_norm", "checkpoint.every", "checkpoint.keep"),
        *("evals.0.every",),
    }
    names = foreign_names()
    absent = {name: targets for name, targets in names.items() if not set(targets) <= known}
    assert 5 < len(absent) < len(names) - 5
    lines = problems("\n".join([GOOD, *(f"{name}: 1" for name in names)]))
    answers = dict(zip(names, lines, strict=True))
    for name, targets in names.items():
        assert all((repr(target) in answers[name]) == (name not in absent) for target in targets), answers[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: is empty; a config is a YAML file of `section: {key: value}`."),
        ("# nothing\n", "config.yaml: is empty; a config is a YAML file of `section: {key: value}`."),
        ("- a\n", "config.yaml: must be `key: value` lines, got ['a']."),
        ("seed:1\n", "config.yaml: must be `key: value` lines, got 'seed:1'."),
        (b"a: 1\nb: \xff\n", "config.yaml: is not UTF-8 text (byte 8); save it as UTF-8."),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "config.yaml:4: a.b: is given twice; the first is in line 2."),
        ("a: &x 1\nb: *x\n",
         "config.yaml:2: b: YAML aliases (*name) are not supported; write the value out."),
        ("a: &x [*x]\n",
         "config.yaml:1: a.0: YAML aliases (*name) are not supported; write the value out."),
        ("a: !!python/name:os.system x\n",
         "config.yaml:1: a: YAML tags (tag:yaml.org,2002:python/name:os.system) are not supported."),
        ("a: !!str [x]\n", "config.yaml:1: a: YAML tags (tag:yaml.org,2002:str) are not supported."),
        ("a: \x01\n",
         "config.yaml:1: not valid YAML: unacceptable character #x0001: special characters are not allowed "
         'in "<unicode string>", position 3'),
        ("a: !!int x\n", "config.yaml:1: a: 'x' is no int."),
        ("[a]: 1\n", "config.yaml:1: a key must be a name."),
        ("a: 1\n---\nb: 2\n",
         "config.yaml:2: not valid YAML: expected a single document in the stream, "
         "but found another document."),
    ],
)  # fmt: skip
def test_files_that_are_no_config(problems, text, message):
    assert problems(text) == [message]


@pytest.mark.parametrize(
    ("text", "line", "remedy"),
    [
        ("a: 1\nb:\n\tc: 1\n", 3, "Indent with spaces, not tabs."),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, ""),
        ("a: '", 1, ""),
    ],
)
def test_yaml_syntax_errors_name_the_line(problems, text, line, remedy):
    (message,) = problems(text)
    assert message.startswith(f"config.yaml:{line}: not valid YAML: ")
    assert message.endswith(remedy)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1000000000000000000000", "seed: 1000000000000000000000 is too large for any setting"),
        ("seed=0x" + "f" * 6000, "is too large for any setting; write a smaller number."),
        ("seed=" + "9" * 5000, " is no int."),
        ("seed=2147483648", "seed: must be at most 2147483647, which 32 bits hold, got 2147483648"),
        ("train.batch_size=4294967296", "train.batch_size: must be at most 2147483647, which 32 bits hold"),
        (
            "optim.learning_rate=1e39",
            "must be at most 1.70141e+38, which float32 holds, got 1e+39",
        ),
        ("optim.weight_decay=-.inf", "optim.weight_decay: must be a finite number, got -inf"),
        ("optim.betas=[.nan, 0.9]", "optim.betas.0: must be a finite number, got nan"),
        ('output_dir="a\\0b"', "output_dir: has the character NUL"),
        ('output_dir="\\ud800"', "output_dir: has '\\ud800', half of a surrogate pair"),
        ('shares={"\\0": 1}', r"shares: the key '\x00' has the character NUL"),
        ("evals=" + "[" * 6000 + "]" * 6000, "evals: nests lists or sections too deeply"),
    ],
)
def test_numbers_and_texts_have_bounds(problems, override, message):
    (problem,) = problems(GOOD, override)
    assert problem.startswith("command line: ")
    assert message in problem
    assert len(problem) < 300


def test_a_file_too_large_for_a_config_is_not_read(tmp_path):
    path = tmp_path / "weights.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="has more than 16 MiB"):
        load(path, [], Root)


def test_files_that_cannot_be_read(write, tmp_path):
    write(GOOD)
    with pytest.raises(UserError, match=r"^confg.yaml: there is no such config file\. Did you mean 'config.yaml'\?$"):
        load("confg.yaml", [], Root)
    with pytest.raises(UserError, match=r"^nowhere/a.yaml: there is no such config file\.$"):
        load("nowhere/a.yaml", [], Root)
    with pytest.raises(UserError, match=r"is a folder; give the YAML file in it\.$"):
        load(tmp_path, [], Root)
    with pytest.raises(UserError, match="File name too long"):
        load("x" * 300, [], Root)
    with pytest.raises(UserError, match="is no file name"):
        load("a\0b", [], Root)


def test_a_byte_order_mark_is_no_content(write):
    assert load(write(b"\xef\xbb\xbf" + GOOD.encode()), [], Root).seed == 0


def _round_trip(config: Root, path: Path) -> Any:
    path.write_text(dump(config), encoding="utf-8")
    return load(path, [], Root)


def test_round_trip(write, tmp_path):
    config = load(
        write(GOOD),
        [
            "optim.learning_rate=1e-05",
            "train.max_grad_norm=1e38",
            "second={type: lion, learning_rate: 1e-300}",
            "evals=[{name: '1e-4'}, {name: 'yes'}, {name: '', every: 3}]",
            "shares={a b: 1, 'null': 2}",
        ],
        Root,
    )
    assert _round_trip(config, tmp_path / "again.yaml") == config
    assert [evaluation.name for evaluation in config.evals] == ["1e-4", "yes", ""]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    number=st.floats(-(2.0**127), 2.0**127),
    whole=st.integers(-(2**31) + 1, 2**31 - 1),
)
def test_any_text_and_number_survive_the_round_trip(tmp_path_factory, text, number, whole):
    config = Root(
        output_dir=Path("x"),
        seed=whole if whole != 13 else 0,
        model=Llama(type="llama", hidden_size=8),
        optim=AdamW(type="adamw", learning_rate=1.0, weight_decay=number),
        train=Train(batch_size=1),
        evals=(Eval(name=text),),
        shares={text: number},
    )
    assert _round_trip(config, tmp_path_factory.getbasetemp() / "any.yaml") == config
