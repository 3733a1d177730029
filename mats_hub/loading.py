"""Models as transformers objects: an expert with its head, or a merged body with the head of one of its tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mats_hub.architecture import describe
from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import CheckpointError, IncompatibleExperts, SourceError, unknown
from mats_hub.expert import Expert
from mats_hub.source import Source, open_source

TASKS_FOLDER = "tasks"
HEAD_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def load_expert(expert: Expert, base: Source | None = None, dtype: str = "float32", device: str = "cpu") -> Any:
    """Return the expert as a transformers model in eval mode; an adapter is merged into its base.

    Args:
        expert: what to load.
        base: the base of an adapter, when it is not the one the adapter names.
        dtype: what to load the weights in.
        device: where to put it.

    Raises:
        SourceError: a model cannot be found.
        IncompatibleExperts: an adapter's tensors do not fit the base.

    """
    model_dtype = _torch_dtype(dtype)
    if expert.adapter is None:
        model = _model_class(expert.auto_class)
        return _from_pretrained(model, expert.source, model_dtype).to(device).eval()
    base = base or open_source(expert.adapter.base, expert.source.token)
    reference = Checkpoint(base)
    expert.align_to(reference)
    config = _config(expert.task_config(reference.config))
    model_class = _model_class(expert.auto_class or describe(reference.config).class_name or "AutoModel")
    with quiet():
        model = _from_pretrained(model_class, base, model_dtype, config=config)
        return _with_adapter(model, expert).to(device).eval()


def load(
    model: str | Path,
    task: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    token: str | None = None,
    base: str | Path | None = None,
) -> Any:
    """Return a merged model as a transformers object, with the head and the labels of one of its tasks.

    Args:
        model: a folder or Hub id of a merged model, or of an expert; an adapter is merged into its base.
        task: one of the tasks it was merged from; needed only when heads are kept per task.
        dtype: what to load the weights in; ``auto`` takes the stored one (of an adapter's base: float32).
        device: where to put it.
        token: Hub token; the one stored on this machine otherwise.
        base: an adapter's base, when it is not the one it names.

    Returns:
        A transformers model in eval mode.

    Raises:
        SourceError: there is no such model, or it has no such task.
        CheckpointError: body and head together do not fill the model.

    """
    source = open_source(model, token)
    adapter = Expert(source, source.name) if "adapter_config.json" in source.sizes else None
    dtype = "float32" if adapter and dtype == "auto" else dtype
    if task is not None:
        return _load_task(source, task, adapter, base, dtype).to(device).eval()
    if adapter:
        return load_expert(adapter, open_source(base, token) if base else None, dtype, device)
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
    body = open_source(base or adapter.adapter.base, source.token) if adapter and adapter.adapter else source
    model_class = _model_class((config.architectures or ["AutoModel"])[0])
    with quiet():
        built, info = _from_pretrained(model_class, body, _torch_dtype(dtype), config=config, info=True)
        built = _with_adapter(built, adapter) if adapter else built
    head_file = f"{folder}/{HEAD_FILE}"
    stored = load_file(source.path(head_file)) if head_file in source.sizes else {}
    in_model = {other: name for name, other in describe(content).stored_names.items()}
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
    """Return the class an Auto class stands for with this config; the name itself when it is no Auto class."""
    if not name.startswith("AutoModel"):
        return name
    mapping = _model_class(name)._model_mapping
    return str(mapping[type(_config(config))].__name__)


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
    from transformers import AutoConfig

    return AutoConfig.for_model(**content)


def _from_pretrained(model_class: Any, source: Source, dtype: Any, config: Any = None, info: bool = False) -> Any:
    where: dict[str, Any] = {"pretrained_model_name_or_path": source.folder or source.repo_id}
    if source.folder is None:
        where.update(revision=source.commit, token=source.token)
    if config is not None:
        where.update(config=config)
    with quiet():
        try:
            return model_class.from_pretrained(**where, dtype=dtype, use_safetensors=True, output_loading_info=info)
        except (RuntimeError, ValueError, OSError) as error:
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"{source.spec!r} cannot be loaded as {model_class.__name__}: {text[:300]}"
            ) from error


def _with_adapter(model: Any, expert: Expert) -> Any:
    from peft import PeftModel

    source = expert.source
    folder = source.path("adapter_config.json").parent
    source.path("adapter_model.safetensors")
    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        text = str(error).strip().splitlines()
        raise IncompatibleExperts(
            f"adapter {source.spec!r} does not fit its base: {text[-1].strip() if text else type(error).__name__}"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the note that a head is new: it is filled in, and checked, right after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
