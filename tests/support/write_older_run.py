"""Writes what a version of jaxllm leaves behind, for tests of later versions: `write_older_run.py FOLDER`.

FOLDER gets data, a run cut off after step 3 of 6, its model as a Hugging Face folder, a LoRA run on that model cut off
alike, the adapter that the whole LoRA run exported, the model that it is merged into, and the token stores of both
runs. The metrics.jsonl of each run has all six steps. The configs name paths relative to FOLDER, but checkpoints note
where they were written and a run notes the command: FOLDER and the checkout of jaxllm (PYTHONPATH) are best in a folder
of no meaning, such as /example.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

TRAIN: dict[str, Any] = {
    "optim": {
        "type": "adamw",
        "learning_rate": 2e-2,
        "weight_decay": 0.1,
        "schedule": {"type": "cosine", "warmup": 2},
    },
    "train": {
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "param_dtype": "float32",
        "compute_dtype": "float32",
    },
    "checkpoint": {"every": 3, "keep": 2},
    "evals": [{"name": "held_out", "every": 3}],
    "callbacks": [],
}
DATA: dict[str, Any] = {"seq_len": 48, "eval_fraction": 0.1}
RUN: dict[str, Any] = {
    "output_dir": "run",
    "model": {
        "type": "llama",
        "tokenizer": "tokenizer",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "tie_word_embeddings": True,
    },
    "data": {"sources": [{"path": "stories.jsonl"}], **DATA},
    **TRAIN,
}
LORA: dict[str, Any] = {
    "output_dir": "lora_run",
    "model": {"path": "model"},
    "data": {"sources": [{"path": "sums.jsonl"}], **DATA},
    "peft": {"type": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    **TRAIN,
}


def stories() -> list[dict[str, str]]:
    """Texts of one to three sentences."""
    rng = random.Random(0)
    words = [["cat", "dog", "bird", "fox"], ["saw", "met", "heard"], ["tree", "lake", "house", "hill"]]
    sentence = "the {} {} the {}. "
    count = [rng.randint(1, 3) for _ in range(60)]
    return [{"text": "".join(sentence.format(*map(rng.choice, words)) for _ in range(n)).strip()} for n in count]


def sums() -> list[dict[str, str]]:
    """Questions with answers."""
    rng = random.Random(1)
    pairs = [(rng.randint(1, 99), rng.randint(1, 99)) for _ in range(50)]
    return [{"prompt": f"what is {a} + {b}? ", "completion": str(a + b)} for a, b in pairs]


def write_tokenizer(texts: list[str], folder: Path) -> None:
    """A tokenizer whose tokens are the characters of the texts."""
    bos, eos, unknown = special = ["<begin>", "<end>", "<unknown>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(set("".join(texts)))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(folder: Path) -> None:
    """Writes the folder, which must not exist."""
    folder.mkdir(parents=True)
    for name, records in (("stories", stories()), ("sums", sums())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_tokenizer([text for record in stories() + sums() for text in record.values()], folder / "tokenizer")

    environment = {**os.environ, "JAXLLM_CACHE": "cache", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def jaxllm(module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", f"jaxllm.{module}", *arguments]
        subprocess.run(command, cwd=folder, env=environment, check=True)

    def train(config: dict[str, Any]) -> Path:
        path = folder / "config.yaml"
        path.write_text(json.dumps(config))
        jaxllm("train", path.name)
        path.unlink()
        run = folder / config["output_dir"]
        shutil.rmtree(run / "checkpoints" / "6")
        (run / "checkpoints" / "latest").write_text("3\n")
        return run

    run = train(RUN)
    shutil.rmtree(run / "export")
    jaxllm("convert", "to-hf", "run", "model")
    run = train(LORA)
    (run / "export" / "adapter").rename(folder / "adapter")
    (run / "export").rmdir()
    jaxllm("convert", "merge", "model", "adapter", "merged")
    (folder / "merged" / "model.safetensors").rename(folder / "merged.safetensors")
    for unneeded in ("merged", "cache/programs", "cache/locks"):
        shutil.rmtree(folder / unneeded)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
