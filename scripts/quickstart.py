"""The quickstart: a tokenizer and a small Llama, trained on the source of the Python standard library."""

import io
import json
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterable
from pathlib import Path

from jaxllm.data.text.tokenizer import train_tokenizer
from jaxllm.generate.__main__ import main as generate
from jaxllm.processes.environment import prepare_backends
from jaxllm.train.__main__ import main as train

CONFIG = Path("configs/quickstart.yaml")
RUN = Path("runs/quickstart")
DATA = Path("runs/quickstart-data")
VOCAB_SIZE = 2048
HELD_OUT_EVERY = 100  # of so many files one is kept for evaluation

SNIPPETS = (
    "import os\nimport sys\n\ndef main(",
    "class Error(Exception):\n    ",
    "    def __init__(self, ",
)

# Installed packages, test suites, and tables of data that are Python only by name.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def stdlib_files() -> list[Path]:
    """The standard library's source files, sorted, without its test suites."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]


def read_source(path: Path) -> str:
    """The exact text of a Python file, in the encoding that it declares; line ends stay as they are."""
    content = path.read_bytes()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def write_documents(files: Iterable[Path], destination: Path) -> None:
    """Writes one line `{"text": …}` a file to the `.jsonl` file `destination`."""
    with destination.open("w", encoding="utf-8") as stream:
        for path in files:
            stream.write(json.dumps({"text": read_source(path)}, ensure_ascii=False) + "\n")


def prepare() -> None:
    """Writes the tokenizer, the training text and the held-out text into DATA."""
    files = stdlib_files()
    held_out = files[::HELD_OUT_EVERY]
    kept = [path for path in files if path not in set(held_out)]
    DATA.mkdir(parents=True, exist_ok=True)
    write_documents(kept, DATA / "train.jsonl")
    write_documents(held_out, DATA / "held_out.jsonl")
    start = time.monotonic()
    train_tokenizer((read_source(path) for path in kept), VOCAB_SIZE, DATA / "tokenizer")
    print(
        f"text      {len(kept)} files of the standard library, {len(held_out)} held out\n"
        f"tokenizer {VOCAB_SIZE} pieces, trained in {time.monotonic() - start:.1f} s"
    )


def main(overrides: list[str]) -> int:
    """Prepares the data, trains, and completes three snippets. Returns the exit status of the first that fails."""
    prepare()
    if status := train([str(CONFIG), *overrides]):
        return status
    print("\nThe trained model completes three snippets of Python:\n")
    prompts = [argument for snippet in SNIPPETS for argument in ("--prompt", snippet)]
    sampling = ["--max-new-tokens", "60", "--temperature", "0.6", "--top-p", "0.9"]
    folders = [override.removeprefix("output_dir=") for override in overrides if override.startswith("output_dir=")]
    run = folders[-1] if folders else str(RUN)
    if status := generate([run, *prompts, *sampling]):
        return status
    print(NEXT.format(run=run))
    return 0


NEXT = """
What to try next (after `source .venv/bin/activate`):
  python -m jaxllm.generate {run} --prompt "def "      complete something else
  less {run}/metrics.jsonl                             the loss and speed of every step
  ls {run}/export/hf                                   the model as a Hugging Face folder
  ./scripts/quickstart output_dir=runs/longer train.steps=2000          train longer, for a better model
  python -m jaxllm.train configs/finetune.yaml model.path=FOLDER …      fine-tune a pretrained model (see README.md)"""


if __name__ == "__main__":
    prepare_backends()
    sys.exit(main(sys.argv[1:]))
