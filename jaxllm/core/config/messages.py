"""What is wrong with a config: pydantic's problems as lines that name place, key and remedy."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxllm.core.config.bounds import at_most
from jaxllm.core.config.yaml_file import ConfigFile, Loc, dotted, is_list, is_mapping, shown
from jaxllm.core.errors import did_you_mean, nearest

Node = dict[str, Any]  # a node of pydantic's core schema

# What other trainers call things. A name is explained only where every key that it points to exists.
FOREIGN_NAMES: dict[str, tuple[str, ...]] = {
    "adam_beta1": ("optim.b1",),
    "adam_beta2": ("optim.b2",),
    "adam_epsilon": ("optim.eps",),
    "additional_target": ("peft.modules_to_save",),
    "assistant_only_loss": ("data.sources.0.train_on",),
    "attn_implementation": ("train.attention",),
    "base_model": ("model.path",),
    "bnb_4bit_quant_type": ("model.quantize",),
    "bnb_4bit_use_double_quant": ("model.double_quant",),
    "beta1": ("optim.b1",),
    "beta2": ("optim.b2",),
    "bf16": ("train.compute_dtype",),
    "block_size": ("data.seq_len",),
    "clip_grad_norm": ("train.max_grad_norm",),
    "completion_only_loss": ("data.sources.0.train_on",),
    "cutoff_len": ("data.seq_len",),
    "data_files": ("data.sources.0.path",),
    "data_path": ("data.sources.0.path",),
    "dataset": ("data.sources",),
    "dataset_config_name": ("data.sources.0.subset",),
    "dataset_name": ("data.sources.0.path",),
    "dataset_path": ("data.sources.0.path",),
    "dataset_split": ("data.sources.0.split",),
    "dataset_text_field": ("data.sources.0.fields",),
    "dataset_train_split": ("data.sources.0.split",),
    "datasets": ("data.sources",),
    "double_quantization": ("model.double_quant",),
    "dtype": ("train.compute_dtype",),
    "eval_steps": ("evals.0.every",),
    "excess_length_strategy": ("data.long_samples",),
    "finetuning_type": ("peft.type",),
    "flash_attention": ("train.attention",),
    "flash_attn": ("train.attention",),
    "fp16": ("train.compute_dtype",),
    "global_batch_size": ("train.batch_size",),
    "gradient_accumulation_steps": ("train.batch_size", "train.micro_batch_size"),
    "gradient_checkpointing": ("train.remat",),
    "gradient_clipping": ("train.max_grad_norm",),
    "greater_is_better": ("checkpoint.best_mode",),
    "group_by_length": ("data.packing",),
    "hess_interval": ("optim.hessian_every",),
    "interleave_probs": ("data.sources.0.weight",),
    "label_smoothing_factor": ("train.label_smoothing",),
    "length_grouped_sampling": ("data.packing",),
    "lisa_activated_layers": ("peft.active_layers",),
    "lisa_interval_steps": ("peft.interval",),
    "lisa_n_layers": ("peft.active_layers",),
    "lisa_step_interval": ("peft.interval",),
    "load_in_4bit": ("model.quantize",),
    "load_in_8bit": ("model.quantize",),
    "load_best_model_at_end": ("checkpoint.best",),
    "lora_modules_to_save": ("peft.modules_to_save",),
    "lora_r": ("peft.r",),
    "lora_rank": ("peft.r",),
    "lora_target": ("peft.target_modules",),
    "lora_target_modules": ("peft.target_modules",),
    "loraplus_ratio": ("peft.loraplus_lr_ratio",),
    "lr": ("optim.learning_rate",),
    "lr_decay_iters": ("optim.schedule.steps",),
    "lr_scheduler": ("optim.schedule.type",),
    "lr_scheduler_type": ("optim.schedule.type",),
    "max_length": ("data.seq_len",),
    "max_seq_len": ("data.seq_len",),
    "max_seq_length": ("data.seq_len",),
    "max_steps": ("train.steps",),
    "metric_for_best_model": ("checkpoint.best",),
    "min_lr_ratio": ("optim.schedule.final",),
    "mixed_precision": ("train.compute_dtype",),
    "model_name_or_path": ("model.path",),
    "num_epochs": ("train.epochs",),
    "num_train_epochs": ("train.epochs",),
    "num_warmup_steps": ("optim.schedule.warmup",),
    "optimizer": ("optim.type",),
    "peft_type": ("peft.type",),
    "per_device_train_batch_size": ("train.micro_batch_size",),
    "pipeline_parallel_size": ("mesh.pipeline",),
    "pissa_init": ("peft.init_lora_weights",),
    "precision": ("train.compute_dtype",),
    "probabilities": ("data.sources.0.weight",),
    "quantization": ("model.quantize",),
    "quantization_bit": ("model.quantize",),
    "quantization_config": ("model.quantize",),
    "recompute": ("train.remat",),
    "remat_policy": ("train.remat",),
    "report_to": ("callbacks.0.type",),
    "resume_from_checkpoint": ("checkpoint.resume",),
    "roles_to_train": ("data.sources.0.train_on",),
    "rope_parameters": ("model.rope",),
    "rope_scaling": ("model.rope",),
    "rope_type": ("model.rope.type",),
    "sample_packing": ("data.packing",),
    "sampling_weight": ("data.sources.0.weight",),
    "save_every": ("checkpoint.every",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "scan_unroll": ("train.unroll",),
    "sequence_len": ("data.seq_len",),
    "sequence_parallel": ("mesh.rules",),
    "sync_each_batch": ("train.reduce",),
    "tensor_parallel_size": ("mesh.tensor",),
    "text_column": ("data.sources.0.fields",),
    "text_field": ("data.sources.0.fields",),
    "tokenizer_name": ("model.tokenizer",),
    "tokenizer_name_or_path": ("model.tokenizer",),
    "torch_dtype": ("train.compute_dtype",),
    "total_step": ("train.steps",),
    "train_batch_size": ("train.batch_size",),
    "train_file": ("data.sources.0.path",),
    "train_on_inputs": ("data.sources.0.train_on",),
    "train_on_prompt": ("data.sources.0.train_on",),
    "train_split": ("data.sources.0.split",),
    "truncation": ("data.long_samples",),
    "truncation_strategy": ("data.long_samples",),
    "use_peft": ("peft.type",),
    "val_set_size": ("data.eval_fraction",),
    "validation_file": ("evals.0.path",),
    "virtual_pipeline_model_parallel_size": ("train.virtual_stages",),
    "warmup_ratio": ("optim.schedule.warmup",),
    "warmup_steps": ("optim.schedule.warmup",),
    "z_loss_multiplier": ("train.z_loss",),
    "z_loss_weight": ("train.z_loss",),
}

_KINDS = {  # of pydantic's schema nodes; an error of type `int_type` means that an `int` was wanted
    "bool": "true or false",
    "dict": "a section of keys and values",
    "float": "a number",
    "int": "a whole number",
    "lax-or-strict": "a path",
    "list": "a list",
    "model": "a section of keys and values",
    "str": "text",
    "string": "text",
    "tagged-union": "a section of keys and values",
    "tuple": "a list",
}


def describe(error: ValidationError, schema: type[BaseModel], file: ConfigFile) -> list[str]:
    """One line for each wrong key of `file`, in the order of its lines."""
    known = _Schema(schema)
    problems: defaultdict[Loc, list[str]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        loc, what = _problem(detail, known, file.data)
        problems[loc].append(what)
    return [
        ": ".join(filter(None, (file.where(loc), dotted(loc), _joined(problems[loc]))))
        for loc in sorted(problems, key=file.line)
    ]


def _joined(whats: list[str]) -> str:
    """One sentence for a key: a field of several kinds (`int | str`) fails once for each."""
    if len(whats) == 1 or not all(what.startswith("must be ") for what in whats):
        return "; ".join(whats)
    wanted = [what.partition(", got ")[0].removeprefix("must be ") for what in whats]
    return f"must be {' or '.join(wanted)}, got {whats[0].partition(', got ')[2].partition('; ')[0]}"


def _problem(detail: ErrorDetails, known: "_Schema", data: Any) -> tuple[Loc, str]:
    """The place in the file and what is wrong there."""
    loc, nodes = known.resolve(detail["loc"])
    given, context = detail["input"], detail.get("ctx", {})
    kind = detail["type"].removesuffix("_type").removesuffix("_attributes")
    match detail["type"]:
        case "extra_forbidden":
            return loc, _unknown_key(loc, nodes[-2], known, data)
        case "missing":
            return loc, f"required, but missing: {known.meaning(nodes[-2], str(loc[-1]))}"
        case "union_tag_not_found":
            return (*loc, "type"), f"required, but missing: one of {', '.join(known.types(nodes[-1]))}"
        case "union_tag_invalid":
            name, types = context["tag"], known.types(nodes[-1])
            hint = did_you_mean(name, types)
            section = next(key for key in reversed(loc) if isinstance(key, str))  # of an item of a list, the list
            return (*loc, "type"), f"there is no {section} type {name!r}.{hint} Known: {', '.join(types)}."
        case "literal_error":
            values = [str(value) for value in nodes[-1].get("expected", ())]
            hint = did_you_mean(str(given), values)
            return loc, f"must be {context['expected']}, got {shown(given)}{hint and '.' + hint}"
        case "value_error":
            return loc, str(context["error"])
        case "less_than_equal":
            return loc, f"must be {at_most(context['le'])}, got {shown(given)}"
        case _ if kind in _KINDS:
            return loc, f"must be {_KINDS[kind]}, got {shown(given)}{_conversion(kind, given)}"
        case _:
            wanted = detail["msg"].partition(" should ")[2] or detail["msg"]
            return loc, f"must {wanted.replace(' after validation', '')}, got {shown(given)}"


def _conversion(kind: str, given: Any) -> str:
    """What to write instead, where it is plain."""
    if kind == "int" and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind == "bool" and str(given).lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if str(given).lower() in ('yes', 'on') else 'false'}"
    if kind == "string" and isinstance(given, int | float):
        return f"; to mean the text, write '{shown(given)}' with the quotes"
    return ""


def _unknown_key(loc: Loc, section: Node, known: "_Schema", data: Any) -> str:
    """Names the key that was meant: what another trainer calls so, the same name elsewhere, or a close name.

    An exact name says more than a close one: `save_steps` means `checkpoint.every`, not `train.steps`.
    """
    *outer, name = (str(key) for key in loc)
    given = data
    for key in loc[:-1]:
        given = given[key]
    what = f"unknown key for type {given['type']!r}" if "type" in given else "unknown key"
    keys = list(dict.fromkeys(known.keys(data)))
    last = {key: key.rpartition(".")[2] for key in keys}

    targets = FOREIGN_NAMES.get(name, ())
    if targets and set(targets) <= set(keys):
        if len(targets) > 1:
            return f"{what}; it follows from {' and '.join(repr(target) for target in targets)}"
        meant = list(targets)
    elif name in last.values():
        meant = [key for key in keys if last[key] == name]
    elif beside := nearest(name, _fields(section)):
        meant = [".".join((*outer, beside))]
    elif elsewhere := nearest(name, last.values(), cutoff=0.75):
        meant = [key for key in keys if last[key] == elsewhere]
    else:
        return f"{what}. Known here: {', '.join(_fields(section))}."
    return f"{what}. Did you mean {' or '.join(repr(key) for key in meant[:3])}?"


def _fields(model: Node) -> dict[str, Node]:
    """Name → node of the fields of a section, whose validators are wrapped around them."""
    while "fields" not in model:
        model = model["schema"]
    return model["fields"]


class _Schema:
    """The keys that a Section class knows, read from pydantic's core schema."""

    def __init__(self, schema: type[BaseModel]) -> None:
        root = cast(Node, schema.__pydantic_core_schema__)
        self._named: dict[str, Node] = {node["ref"]: node for node in root.get("definitions", ())}
        self._root = self._core(root)

    def _core(self, node: Node) -> Node:
        """The section, union, list or scalar inside wrappers such as defaults, validators and `| None`."""
        while node["type"] != "model":
            if node["type"] == "definition-ref":
                node = self._named[node["schema_ref"]]
            elif "schema" in node:
                node = node["schema"]
            else:
                break
        return node

    def _inner(self, node: Node, key: str | int) -> Node:
        """What the section, list or mapping `node` has at `key`."""
        match node["type"]:
            case "model":
                inner = _fields(node).get(str(key), {"type": "unknown"})
            case "list":
                inner = node["items_schema"]
            case "tuple":
                inner = node["items_schema"][min(int(key), len(node["items_schema"]) - 1)]
            case _:
                inner = node.get("values_schema", {"type": "unknown"})
        return self._core(inner)

    def resolve(self, loc: Loc) -> tuple[Loc, list[Node]]:
        """The keys of pydantic's `loc` without its names of union members; the nodes from root to last."""
        path: Loc = ()
        nodes = [self._root]
        for key in loc:
            match nodes[-1]["type"]:
                case "tagged-union":
                    nodes[-1] = self._core(nodes[-1]["choices"][key])
                case "union":
                    nodes[-1] = next(
                        (choice for choice in self._choices(nodes[-1]) if _has_label(choice, str(key))),
                        nodes[-1],
                    )
                case _ if key == "[key]":  # the key of a mapping, not its value, is wrong
                    pass
                case _:
                    path = (*path, key)
                    nodes.append(self._inner(nodes[-1], key))
        return path, nodes

    def _choices(self, union: Node) -> list[Node]:
        choices: Any = union["choices"]
        return [self._core(choice) for choice in (choices.values() if is_mapping(choices) else choices)]

    def types(self, union: Node) -> list[str]:
        """The values of `type:` in a union of components (the member without `type` has none)."""
        return sorted(name for name, node in union["choices"].items() if "type" in _fields(self._core(node)))

    def keys(self, data: Any, node: Node | None = None, prefix: str = "") -> Iterator[str]:
        """The dotted names of all keys; of a component, those of the type that `data` chooses, or all."""
        node = node or self._root
        match node["type"]:
            case "model":
                for name in _fields(node):
                    yield prefix + name
                    inner = data.get(name) if is_mapping(data) else None
                    yield from self.keys(inner, self._inner(node, name), f"{prefix}{name}.")
            case "list" | "tuple":
                inner = data[0] if is_list(data) and data else None
                yield from self.keys(inner, self._inner(node, 0), f"{prefix}0.")
            case "tagged-union":
                find = node["discriminator"]
                chosen: Any = None
                if is_mapping(data):
                    chosen = data.get(find) if isinstance(find, str) else find(data)
                choice = node["choices"].get(str(chosen))
                for inner in [self._core(choice)] if choice else self._choices(node):
                    yield from self.keys(data, inner, prefix)
            case "union":
                for inner in self._choices(node):
                    yield from self.keys(data, inner, prefix)
            case _:
                pass

    def meaning(self, section: Node, name: str) -> str:
        """What a key is: the docstring below its field, and the kind of its value."""
        in_model = section["type"] == "model"  # and not in a tuple, whose items have no names
        description = section["cls"].model_fields[name].description if in_model else None
        kind = _KINDS.get(self._inner(section, name)["type"])
        first = " ".join(description.partition("\n\n")[0].split()).rstrip(".") if description else ""
        return f"{first} ({kind})" if first and kind else first or kind or "it has no default"


def _has_label(node: Node, label: str) -> bool:
    """Whether pydantic calls this member of a plain union `label`, as in `int`, `list[str]`, `Schedule`."""
    return label.startswith(node["type"]) or (node["type"] == "model" and node["cls"].__name__ in label)
