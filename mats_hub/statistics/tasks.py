"""The kinds of tasks: which one a model does, and its examples made ready for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mats_hub.errors import StatisticsError, unknown
from mats_hub.source import Source
from mats_hub.statistics.dataset import Columns, infer_columns, infer_role, with_fields
from mats_hub.statistics.encoding import (
    audio_classification,
    causal_lm,
    chat,
    completion,
    ctc,
    heard,
    image_among_classes,
    image_chat,
    image_classification,
    masked_lm,
    multiple_choice,
    pixels,
    seq2seq,
    span,
    speech,
    text,
    text_classification,
    tokens,
    words,
)
from mats_hub.statistics.task_data import Task, TaskData

ASKED = {
    *("prompt", "question", "instruction", "query", "problem", "input", "source"),
    *("question_stem", "inputs_pretokenized"),
}
"""Columns that a language model is not measured on alone where another one has what is said to them."""

GENERATED = "text that the model generated itself"
GENERATED_TASK = "generated"
GENERATED_AT_ONCE = 16

TOKENIZER = ("AutoTokenizer", "tokenizer_config.json", "tokenizer.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
IMAGES = ("AutoImageProcessor", *PROCESSORS)
SOUNDS = ("AutoFeatureExtractor", *PROCESSORS)
TASKS: dict[str, Task] = {
    # First, for some of its classes' names end like those of texts.
    "audio-classification": Task(
        "audio-classification",
        ("ForAudioClassification",),
        ("audio", "label"),
        audio_classification,
        classifies=True,
        tokenizes=False,
        mapping="MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        processor=SOUNDS,
    ),
    "text-classification": Task(
        "text-classification", ("ForSequenceClassification",), ("text", "label"), text_classification, classifies=True
    ),
    "token-classification": Task(
        "token-classification",
        ("ForTokenClassification",),
        ("words", "tags"),
        words,
        per_token=True,
        in_place=True,
        classifies=True,
    ),
    "question-answering": Task(
        "question-answering",
        ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        ("text", "answers"),
        span,
        of_span=True,
    ),
    "multiple-choice": Task(
        "multiple-choice", ("ForMultipleChoice",), ("text", "choices", "right choice"), multiple_choice, batched=True
    ),
    "fill-mask": Task("fill-mask", ("ForMaskedLM",), ("text",), masked_lm, per_token=True, in_place=True),
    "causal-lm": Task(
        "causal-lm",
        ("ForCausalLM", "LMHeadModel", "WithLMHead", "GenerationDecoder"),
        ("text",),
        causal_lm,
        per_token=True,
    ),
    GENERATED_TASK: Task(GENERATED_TASK, (), (), tokens, per_token=True),
    "chat": Task("chat", (), ("messages",), chat, per_token=True),
    "completion": Task("completion", (), ("text", "target"), completion, per_token=True),
    "speech-recognition": Task(
        "speech-recognition",
        (),
        ("audio", "target"),
        speech,
        per_token=True,
        mapping="MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        processor=SOUNDS,
    ),
    "image-text-to-text": Task(
        "image-text-to-text",
        (),
        ("image", "text", "target"),
        image_chat,
        per_token=True,
        batched=True,
        mapping="MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        processor=("AutoProcessor", *PROCESSORS),
    ),
    "ctc": Task("ctc", ("ForCTC",), ("audio", "target"), ctc, of_path=True, processor=SOUNDS),
    "seq2seq": Task(
        "seq2seq",
        ("ForConditionalGeneration", "ForSeq2SeqLM"),
        ("text", "target"),
        seq2seq,
        per_token=True,
        mapping="MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ),
    "image-classification": Task(
        "image-classification",
        ("ForImageClassification", "ForImageClassificationWithTeacher"),
        ("image", "label"),
        image_classification,
        classifies=True,
        tokenizes=False,
        processor=IMAGES,
    ),
    "zero-shot-image-classification": Task(
        "zero-shot-image-classification",
        (),
        ("image", "label"),
        image_among_classes,
        classifies=True,
        mapping="MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        processor=IMAGES,
    ),
    "image-feature-extraction": Task(
        "image-feature-extraction",
        ("VisionModel", "VisionModelWithProjection"),
        ("image",),
        pixels,
        tokenizes=False,
        mapping="MODEL_FOR_IMAGE_MAPPING_NAMES",
        processor=IMAGES,
    ),
    # Last, for names of other classes end so, too.
    "feature-extraction": Task(
        "feature-extraction",
        ("Model", "ModelWithProjection", "QuestionEncoder", "ContextEncoder"),
        ("text",),
        text,
    ),
}
"""Every kind of task; a new one is a row here."""


def infer_task(class_name: str) -> Task:
    """Return the kind of task a transformers class does.

    Raises:
        StatisticsError: no known kind.

    """
    from transformers.models.auto import modeling_auto

    for task in TASKS.values():
        classes = getattr(modeling_auto, task.mapping).values() if task.mapping else ()
        if class_name.endswith(task.suffixes) or class_name in classes:
            return task
    raise StatisticsError(
        f"cannot tell the task of a {class_name or 'model without a class'}; name one of: {', '.join(TASKS)}"
    )


@torch.no_grad()
def generate(
    model: Any, files: Sequence[Source], count: int, length: int, seed: int, device: torch.device | str
) -> Any:
    """Return a data set of texts, as tokens, that a causal language model draws from its own predictions.

    Each begins with the tokenizer's first token and ends where the model ends it, or after `length` tokens.

    Raises:
        StatisticsError: the model does not generate, or the tokenizer has no token to begin with.

    """
    import datasets

    kind = infer_task(type(model).__name__).name
    if kind not in ("causal-lm", "image-text-to-text") or model.config.is_encoder_decoder:
        raise StatisticsError(
            f"a {type(model).__name__} generates no text to be measured on; name its task's data (dataset, --dataset)"
        )
    tokenizer = _load_processor(files, *TOKENIZER)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise StatisticsError("the tokenizer has no token to begin a text with; name a data set (dataset, --dataset)")
    last = tokenizer.eos_token_id
    texts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, count, GENERATED_AT_ONCE):
            begun = torch.full((min(GENERATED_AT_ONCE, count - start), 1), first, device=device)
            options = {"attention_mask": torch.ones_like(begun), "do_sample": True, "top_k": 0, "pad_token_id": first}
            drawn = model.generate(begun, max_new_tokens=length - 1, eos_token_id=last, **options)
            for row in drawn.tolist():
                end = row.index(last, 1) + 1 if last in row[1:] else len(row)
                texts.append(row[:end])
    return datasets.Dataset.from_dict({"input_ids": texts})


def open_task(
    model_class: str,
    config: Any,
    files: Sequence[Source],
    dataset: Any,
    columns: Columns,
    *,
    task: str | None = None,
    max_length: int | None = None,
    needs_labels: bool = True,
) -> TaskData:
    """Return a task's examples, ready for a model of this class and config.

    Args:
        model_class: the transformers class; it tells the task unless `task` names one.
        config: the model's config.
        files: sources to take the tokenizer or processor from; the first that has one.
        dataset: the examples.
        columns: the given columns; the others are inferred.
        task: the kind of task.
        max_length: tokens after which a text is cut; the tokenizer's own limit otherwise.
        needs_labels: whether a missing label column is an error.

    Raises:
        StatisticsError: the task or a column cannot be inferred, or no source has a tokenizer or processor.

    """
    import datasets

    if task is not None and task not in TASKS:
        raise StatisticsError(unknown("task", task, TASKS))
    dataset = with_fields(dataset, columns)
    kind = TASKS[task] if task else infer_task(model_class)
    kind, roles = _by_columns(kind, config, dataset.column_names, columns, given=task is not None)
    data = TaskData(kind, dataset, infer_columns(dataset, columns, roles, needs_labels), config, singly=kind.batched)
    if kind.processor:
        data.processor = _load_processor(files, *kind.processor)
    if kind.processor == SOUNDS:
        rate = data.processor.sampling_rate
        if hasattr(dataset.features.get(data.columns.audio), "sampling_rate"):  # stored as files
            data.dataset = dataset.cast_column(data.columns.audio, datasets.Audio(sampling_rate=rate))
        short, long = (next(iter(heard(data, [0.0] * length).values())).shape for length in (rate // 2, rate))
        data.singly = short != long
    if not kind.tokenizes:
        return data
    data.tokenizer = _load_processor(files, *TOKENIZER)
    data.singly |= kind.name == "text-classification" and data.pad_token is None
    if kind.name == "token-classification" and getattr(data.tokenizer, "add_prefix_space", None) is False:
        # As RoBERTa's: a word in a list is to have the tokens that it has inside of a text, behind a space.
        data.tokenizer = _load_processor(files, *TOKENIZER, add_prefix_space=True)
    data.max_length = max_length or _most_tokens(data.tokenizer, config)
    if kind.name == "zero-shot-image-classification":
        data.name_classes()
    return data


def _by_columns(
    kind: Task, config: Any, present: Sequence[str], columns: Columns, given: bool
) -> tuple[Task, tuple[str, ...]]:
    """Return the kind of task that the data set's columns are of, unless it is given, and the roles they play in it."""
    sees = kind.name == "image-text-to-text"
    if not given and sees and not (columns.image or infer_role("image", present)):
        kind, sees = TASKS["seq2seq" if config.is_encoder_decoder else "causal-lm"], False
    talks = columns.messages or (not columns.text and infer_role("messages", present))
    told = columns.label or (not columns.text and infer_role("right choice", present))
    chooses = columns.choices or (told and not (columns.target or talks) and infer_role("choices", present))
    if not given and kind.name == "causal-lm":
        asked = not columns.text and ASKED.issuperset(infer_role("text", present) or ("",))
        answered = columns.target or chooses or (asked and infer_role("target", present))
        kind = TASKS["chat" if talks else "completion" if answered else "causal-lm"]
    roles = ("image", "messages") if sees and talks else kind.roles
    if chooses and kind.encode in (completion, seq2seq, image_chat):  # what is said is one of the choices
        roles = (*(role for role in roles if role != "target"), "choices", "right choice")
    return kind, roles


def _most_tokens(tokenizer: Any, config: Any) -> int | None:
    """Return how many tokens tokenizer and model take at most; None for any number."""
    reads = getattr(config, "text_config", config)
    found = (getattr(reads, limit, None) for limit in ("max_position_embeddings", "max_target_positions"))
    positions = next((n for n in found if n and n > 0), 10**9)  # XLNet's are -1: any number
    # RoBERTa and its kin, whose padding is token 1, count positions from 2 on; for others two are not missed.
    reserved = 2 if getattr(reads, "pad_token_id", None) == 1 else 0
    limit = min(tokenizer.model_max_length, positions - reserved)
    return limit if limit < 10**6 else None


def _load_processor(files: Sequence[Source], auto_class: str, *names: str, **options: Any) -> Any:
    import transformers

    for source in files:
        if any(name in source.sizes for name in names):
            return getattr(transformers, auto_class).from_pretrained(**source.for_transformers, **options)
    raise StatisticsError(
        f"none of {', '.join(repr(source.spec) for source in files)} has a {names[0]}; push it beside the model"
    )
