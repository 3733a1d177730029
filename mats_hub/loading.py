"""Models as transformers objects: an expert with its head, or a merged body with the head of one of its tasks."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mats_hub.adapter import FoldedAdapter
from mats_hub.architecture import Architecture, describe, part_config, transformers_config
from mats_hub.bundle import BUNDLE_FILE, Bundle
from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import CheckpointError, IncompatibleExperts, SourceError, unknown
from mats_hub.expert import Expert
from mats_hub.source import Source, open_source

TASKS_FOLDER = "tasks"
HEAD_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How transformers spreads a model that is larger than a device over several."""


def load_expert(expert: Expert, base: Source | None = None, dtype: str = "float32", device: str = "cpu") -> Any:
    """Return the expert as a transformers model in eval mode; an adapter is merged into its base.

    Args:
        expert: what to load.
        base: the base of an adapter, when it is not the one the adapter names; or that of which the expert is a part, which is
            put into it.
        dtype: what to load the weights in.
        device: where to put it, or one of `DEVICE_MAPS`.

    Raises:
        SourceError: a model cannot be found.
        IncompatibleExperts: an adapter's tensors do not fit the base.

    """
    spread = _device_map(device)
    if base and expert.is_part_of(base.json(CONFIG_FILE)):
        model = _with_part(expert, base, dtype, spread)
    elif expert.adapter is None:
        model = _from_pretrained(_model_class(expert.auto_class), expert.source, _torch_dtype(dtype), device_map=spread)
    else:
        with quiet():
            model = _merged(_base_model(expert, base, dtype, spread), expert)
    return (model if spread else model.to(device)).eval()


def load_adapted(expert: Expert, base: Source | None = None, dtype: str = "float32", device: str = "cpu") -> Any:
    """Return an adapter's expert as a PEFT model in eval mode, the adapter beside its base; see `load_expert`."""
    with quiet():
        model = _with_adapter(_base_model(expert, base, dtype, _device_map(device)), expert)
    return (model if _device_map(device) else model.to(device)).eval()


def fold(expert: Expert, base: Source, folder: Path, dtype: str = "float32") -> None:
    """Have PEFT merge an adapter into its base, and keep in a file under `folder` what that changes as its deltas.

    The whole base is in memory meanwhile.

    Raises:
        CheckpointError: PEFT cannot merge this adapter.
        IncompatibleExperts: the adapter's tensors do not fit the base.

    """
    from safetensors.torch import save_file

    adapter = expert.adapter
    assert isinstance(adapter, FoldedAdapter)
    model = _base_model(expert, base, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in adapter.changed}
    try:
        with quiet():
            merged = _merged(model, expert)
    except (NotImplementedError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{expert.source.spec!r} is a {adapter.description}, which PEFT cannot merge into its base: {error}"
        ) from error
    after = merged.state_dict()
    target = folder / expert.name
    target.mkdir(parents=True)
    save_file({name: (after[name] - tensor).contiguous() for name, tensor in before.items()}, target / HEAD_FILE)
    adapter.deltas = Checkpoint(open_source(target))


def _base_of(expert: Expert, base: Source | None) -> Source:
    """Return the base of an adapter: the given one, else the one it names."""
    assert expert.adapter is not None
    try:
        return base or open_source(expert.adapter.base, expert.source.token)
    except SourceError as error:
        raise SourceError(
            f"the base of adapter {expert.source.spec!r} cannot be opened; name it with 'base'. {error}"
        ) from error


def _device_map(device: str) -> str | None:
    return device if device in DEVICE_MAPS else None


def _base_model(expert: Expert, base: Source | None, dtype: str, device_map: str | None = None) -> Any:
    """Return the model that an adapter was made for, with the head of its task if it has one (not yet its own)."""
    base = _base_of(expert, base)
    reference = Checkpoint(base)
    expert.align_to(reference)
    config = _config(expert.task_config(reference.config))
    model_class = _model_class(expert.auto_class or describe(reference.config).class_name or "AutoModel")
    return _from_pretrained(model_class, base, _torch_dtype(dtype), config=config, device_map=device_map)


def _with_part(expert: Expert, base: Source, dtype: str, device_map: str | None) -> Any:
    """Return the base with the expert in the place of the part that it is."""
    model_class = _model_class(describe(base.json(CONFIG_FILE)).class_name or "AutoModel")
    model = _from_pretrained(model_class, base, _torch_dtype(dtype), device_map=device_map)
    part = {name: expert.whole_tensor(own) for name, own in part_names(expert, base).items()}
    strange = model.load_state_dict(part, strict=False).unexpected_keys
    if strange or not part:
        raise CheckpointError(
            f"{expert.source.spec!r} cannot be put into {base.spec!r} as its part: "
            + (f"the model has no {strange[0]!r}" if strange else "they share no tensor name")
        )
    return model


def part_names(expert: Expert, base: Source) -> dict[str, str]:
    """Return, of an expert that is a part of its base, each weight's name in the base's model → its name in the expert."""
    reference = Checkpoint(base)
    expert.align_to(reference)
    in_model = describe(reference.config).model_names
    return {in_model.get(key, key): own for key, own in expert.names.items() if reference.headers[key].is_float}


def load(
    model: str | Path,
    task: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    token: str | bool | None = None,
    base: str | Path | None = None,
) -> Any:
    """Return a merged model as a transformers object, with the head and the labels of one of its tasks.

    Of experts that were compressed into one repository (`mats_hub.compress`) it is the task's own expert, rebuilt.

    Args:
        model: a folder or Hub id of a merged model, or of an expert; an adapter is merged into its base.
        task: one of the tasks it was merged from; needed only when heads are kept per task.
        dtype: what to load the weights in; ``auto`` takes the stored one (of an adapter's base: float32).
        device: where to put it.
        token: Hub token; the one stored on this machine otherwise.
        base: the base of an adapter or of compressed experts, when it is not the one they name; or that of which the model is a
            part, as the encoder of CLIP that sees, and into which it is put.

    Returns:
        A transformers model in eval mode.

    Raises:
        SourceError: there is no such model, or it has no such task.
        CheckpointError: body and head together do not fill the model.

    """
    source = open_source(model, token)
    if BUNDLE_FILE in source.sizes:
        bundle = Bundle(source, base)
        with tempfile.TemporaryDirectory(prefix="mats_hub-") as folder:
            bundle.expand(bundle.check_task(task), Path(folder))
            return _load_task(open_source(folder), bundle.check_task(task), None, None, dtype).to(device).eval()
    adapter = Expert(source, source.name) if "adapter_config.json" in source.sizes else None
    dtype = "float32" if adapter and dtype == "auto" else dtype
    if task is not None:
        return _load_task(source, task, adapter, base, dtype).to(device).eval()
    below = open_source(base, token) if base else None
    if adapter:
        return load_expert(adapter, below, dtype, device)
    if below and part_config(below.json(CONFIG_FILE), source.json(CONFIG_FILE)):
        return load_expert(Expert(source, source.name), below, dtype, device)
    name = (source.json(CONFIG_FILE).get("architectures") or ["AutoModel"])[0]
    return _from_pretrained(_model_class(name), source, _torch_dtype(dtype)).to(device).eval()


def _load_task(source: Source, task: str, adapter: Expert | None, base: str | Path | None, dtype: str) -> Any:
    """Return the body (of a merged adapter: the base with it merged in) with a task's head and labels."""
    from safetensors.torch import load_file

    tasks = task_names(source)
    if task not in tasks:
        raise SourceError(f"{source.spec!r}: {unknown('task', task, tasks) if tasks else 'it has no tasks of its own'}")
    folder = f"{TASKS_FOLDER}/{task}"
    content = source.json(f"{folder}/{CONFIG_FILE}")
    config = _config(content)
    body = _base_of(adapter, open_source(base, source.token) if base else None) if adapter else source
    model_class = _model_class((config.architectures or ["AutoModel"])[0])
    with quiet():
        built, info = _from_pretrained(model_class, body, _torch_dtype(dtype), config=config, info=True)
        built = _merged(built, adapter) if adapter else built
    head_file = f"{folder}/{HEAD_FILE}"
    stored = load_file(source.path(head_file)) if head_file in source.sizes else {}
    in_model = describe(content).model_names
    head = {in_model.get(name, name): tensor.to(built.dtype) for name, tensor in stored.items()}
    result = built.load_state_dict(head, strict=False)
    missing = sorted(set(info["missing_keys"]) - set(head))
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{source.spec!r}, task {task!r}: body and head do not fill the model; missing {missing[:5]}, "
            f"not in the model {result.unexpected_keys[:5]}. The repository is incomplete"
        )
    return built


def _torch_dtype(name: str) -> Any:
    import torch

    return name if name == "auto" else getattr(torch, name)


def task_names(source: Source) -> list[str]:
    """Return the tasks a merged model keeps heads for."""
    parts = (filename.split("/") for filename in source.sizes)
    return sorted({p[1] for p in parts if len(p) == 3 and p[0] == TASKS_FOLDER and p[2] == CONFIG_FILE})


def concrete_class(name: str, config: dict[str, Any]) -> str:
    """Return the class an Auto class stands for with this config; the name itself when it is no Auto class, or not known."""
    if not name.startswith("AutoModel"):
        return name
    mapping = _model_class(name)._model_mapping
    try:
        return str(mapping[type(_config(config))].__name__)
    except (CheckpointError, KeyError):
        return name


def _model_class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise SourceError(
            f"transformers has no model class {name!r}: models with code of their own are not run. Load it yourself, "
            "or update transformers"
        )
    return found


def _config(content: dict[str, Any]) -> Any:
    try:
        return transformers_config(content)
    except Exception as error:  # each kind of model checks its config in its own way
        raise CheckpointError(
            f"transformers cannot make a config of model type {content.get('model_type')!r}: {str(error)[:200]}. Update "
            "transformers; models with code of their own are not run: load the merged weights with that code"
        ) from error


def _from_pretrained(
    model_class: Any, source: Source, dtype: Any, config: Any = None, info: bool = False, device_map: str | None = None
) -> Any:
    where = source.for_transformers
    if source.folder is None:
        for name in source.weight_files:  # their bytes are checked, as transformers does not
            source.path(name)
    if config is not None:
        where.update(config=config)
    if device_map is not None:
        where.update(device_map=device_map)
    with quiet():
        try:
            return model_class.from_pretrained(**where, dtype=dtype, use_safetensors=True, output_loading_info=info)
        except (RuntimeError, ValueError, OSError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{source.spec!r} cannot be loaded as {model_class.__name__}: {text[:300]}"
            ) from error


def _merged(model: Any, expert: Expert) -> Any:
    """Return a base model with an adapter merged into it, or into the part of it that the adapter is of."""
    part = _part_of(model, expert)
    adapted = _with_adapter(model.get_submodule(part) if part else model, expert, part)
    merged = adapted.merge_and_unload()
    return model if part else merged


def _part_of(model: Any, expert: Expert) -> str:
    """Return the module of a base model that an adapter of a part is of; '' for one of the whole."""
    facts = (
        describe({**model.config.to_dict(), "architectures": [type(model).__name__]}) if expert.part else Architecture()
    )
    in_model = facts.model_names
    pairs = ((f".{own}", in_model.get(stored, stored)) for own, stored in expert.part.items())
    return next((name.removesuffix(own) for own, name in pairs if name.endswith(own)), "")


def _with_adapter(model: Any, expert: Expert, part: str = "") -> Any:
    """Return the PEFT model of a base model, or of its `part`, and an adapter, every tensor of which has to find its place."""
    from peft import PeftModel

    source = expert.source
    folder = source.path("adapter_config.json").parent
    source.path("adapter_model.safetensors")
    mapping = {rf"^{re.escape(part)}\.": ""} if part else _into_body(model, expert)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder, key_mapping=mapping)
    except (RuntimeError, ValueError, KeyError) as error:
        text = str(error).strip().splitlines()
        raise IncompatibleExperts(
            f"adapter {source.spec!r} does not fit its base: {text[-1].strip() if text else type(error).__name__}"
        ) from error
    missing = [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]
    if missing:
        raise CheckpointError(f"{source.spec!r} is incomplete: {' '.join(missing[0].split())[:300]}; fetch it again")
    return adapted


def _into_body(model: Any, expert: Expert) -> dict[str, str] | None:
    """Return the renaming with which an adapter of a body fits a model that has a head as well; None for other adapters."""
    if model.base_model is model:
        return None
    parts = "|".join(name for name, _ in model.base_model.named_children())
    own = [name.removeprefix("base_model.model.") for name in expert.checkpoint.headers]
    if not any(re.match(rf"({parts})\.", name) for name in own):
        return None
    return {rf"^(?=({parts})\.)": f"{model.base_model_prefix}."}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the notes that a head is new (it is filled in, and checked, right after) and that tied weights were parted."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no longer tied", category=UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
