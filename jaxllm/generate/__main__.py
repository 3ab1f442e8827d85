"""`python -m jaxllm.generate MODEL --prompt TEXT`: completes text with a model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxllm.core.cache import keep_programs
from jaxllm.core.process import without_torch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.generate",
        description="Completes prompts with a Hugging Face model, a run of jaxllm.train, or one of its checkpoints.",
    )
    parser.add_argument(
        "model",
        help="a Hugging Face folder, a run's folder, <run>/checkpoints/<step> (or /best), or a Hub model: owner/name",
    )
    parser.add_argument("--prompt", action="append", required=True, help="text to complete; may be given many times")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to add at most (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most likely token (default); 1 samples"
    )
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens only")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens of this joint probability")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 done, 2 wrong input."""
    options = _parser().parse_args(arguments)

    # Imported after the help, which should be instant.
    from jaxllm.convert.load import open_model
    from jaxllm.core.errors import UserError
    from jaxllm.core.mesh import Layout
    from jaxllm.generate.decode import Decoder
    from jaxllm.generate.sample import Sampling

    try:
        if options.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
        if not 0 <= options.seed < 1 << 32:
            raise UserError(f"--seed must be from 0 to {(1 << 32) - 1}, got {options.seed}")
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        model = open_model(options.model, Layout.single())
        tokenizer = model.tokenizer()
        prompts = [tokenizer(prompt)["input_ids"] for prompt in options.prompt]
        completions = Decoder(model.lm)(
            model.load(),
            prompts,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            stop_ids=_stop_ids(model.folder, tokenizer),
            seed=options.seed,
        )
        whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        print(f"\n{'-' * 60}\n".join(str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in whole))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the model's own, as transformers finds them, else the tokenizer's end of text."""
    from jaxllm.hf.config import read_json

    files = [folder / name for name in ("generation_config.json", "config.json")]
    found = [read_json(file).get("eos_token_id") for file in files if file.is_file()]
    ids = next((ids for ids in [*found, tokenizer.eos_token_id] if ids is not None), [])
    return ids if isinstance(ids, list) else [ids]


if __name__ == "__main__":
    without_torch()
    keep_programs()
    sys.exit(main(sys.argv[1:]))
