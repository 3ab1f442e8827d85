"""`python -m jaxllm.generate MODEL`: completes text with a model, or talks with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.core.command import exit_status
from jaxllm.core.compilation_cache import keep_programs
from jaxllm.core.errors import UserError
from jaxllm.processes.environment import prepare_backends, without_torch

if TYPE_CHECKING:
    from jaxllm.generate.defaults import Defaults

NEW_TOKENS, NEW_TOKENS_OF_A_REPLY = 128, 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.generate",
        description="Completes prompts with a Hugging Face model, a run of jaxllm.train, or one of its checkpoints.",
        epilog="Options that are not given are taken from the model's generation_config.json, as transformers takes "
        "them: the most likely token without do_sample, and a top_k of 50 with do_sample and no top_k. --top-k 0, "
        " --top-p 1 and --min-p 0 switch the file's settings off.",
    )
    parser.add_argument(
        "model",
        help="a Hugging Face folder, a run's folder, <run>/checkpoints/<step> (or /best), a Hub model: owner/name, "
        "or the URL of a Hugging Face folder",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to complete; may be given many times. An empty one starts from the tokenizer's begin of text, if "
        "it has one. A single completion is printed as it comes",
    )
    what.add_argument(
        "--chat",
        action="store_true",
        help="a conversation by the tokenizer's chat template: each line of the standard input is a message. Ctrl-D "
        "ends it, Ctrl-C ends a reply",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message of a conversation")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens to add at most. Default: max_new_tokens of the model's file; otherwise as many as its max_length "
        f"leaves behind the prompt; otherwise {NEW_TOKENS}, or {NEW_TOKENS_OF_A_REPLY} for a reply of a conversation",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the most likely token; 1 samples as the model says"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens of joint probability P only"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="sample only from tokens at least P times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1 makes tokens that are there already less likely"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given many times"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 done, 2 wrong input, 130 interrupted."""

    def generate() -> None:
        options = _parser().parse_args(arguments)
        _check(options)
        _write(options)

    return exit_status(generate)


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for what is wrong with any model."""
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.seed < 1 << 32:
        raise UserError(f"--seed must be from 0 to {(1 << 32) - 1}, got {options.seed}")
    if "" in options.stop:
        raise UserError("--stop is empty; give the text that is to end a completion")
    if options.system is not None and not options.chat:
        raise UserError("--system begins a conversation; give --chat too, or write it into the --prompt")
    for text in [*(options.prompt or ()), *options.stop, options.system or ""]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{text!a} is not valid UTF-8") from None


def _write(options: argparse.Namespace) -> None:
    from jaxllm.core.finite import ANOTHER, check_finite
    from jaxllm.core.mesh import Layout
    from jaxllm.generate.chat import Conversation
    from jaxllm.generate.writer import Writer
    from jaxllm.runs.open import open_model

    model = open_model(options.model, Layout.single())
    tokenizer = model.tokenizer()
    defaults = _defaults(model.folder)
    sampling = defaults.sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
    )
    conversation = Conversation(tokenizer, options.system) if options.chat else None
    otherwise = NEW_TOKENS if conversation is None else NEW_TOKENS_OF_A_REPLY
    ends: list[Any] = defaults.eos_token_id or [tokenizer.eos_token_id]
    new_tokens = options.max_new_tokens or defaults.max_new_tokens or (None if defaults.max_length else otherwise)
    params = model.load()
    check_finite(params, f"{options.model}: the weights are not finite", ANOTHER)
    writer = Writer(
        model.lm,
        params,
        tokenizer,
        sampling=sampling,
        stop_ids=[token for token in ends if token is not None],
        stop=[*options.stop, *defaults.stop_strings],
        max_new_tokens=new_tokens,
        max_length=defaults.max_length,
        seed=options.seed,
    )
    if conversation is None:
        writer.complete(options.prompt)
    else:
        writer.talk(conversation)


def _defaults(folder: Path) -> Defaults:
    """What the model's files say, with the end of text from where transformers looks for it."""
    from jaxllm.generate.defaults import of_model_config, read_defaults
    from jaxllm.hf.config import read_config, read_json

    file, config = folder / "generation_config.json", read_config(folder)
    if file.is_file():
        raw = read_json(file)
    else:
        file, raw = folder / "config.json", of_model_config(config)
    if raw.get("eos_token_id") is None:
        raw["eos_token_id"] = config.get("eos_token_id")
    defaults, missing = read_defaults(raw, file)
    if missing:
        print(f"note: {file}: {', '.join(missing)} is not implemented, and left aside", file=sys.stderr)
    return defaults


if __name__ == "__main__":
    without_torch()
    prepare_backends()
    keep_programs()
    sys.exit(main(sys.argv[1:]))
