"""How one example of each kind of task becomes a model's inputs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from mats_hub.errors import StatisticsError, unknown
from mats_hub.statistics.collect import IGNORED
from mats_hub.statistics.multiple_choice import choices_of, right_answer, right_choice
from mats_hub.statistics.task_data import TaskData, plain_name, predicts_numbers

SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles under other names."""

MASKED = 0.15
"""Of a text's tokens, what a masked language model is to tell."""


def _texts(data: TaskData, row: dict[str, Any]) -> list[str]:
    texts = [row[column] for column in data.columns.text]
    for column, given in zip(data.columns.text, texts, strict=True):
        if not isinstance(given, str):
            raise StatisticsError(
                f"column {column!r} holds {str(given)[:40]!r} where a text is to be; leave such examples out, or name another "
                "column (--text)"
            )
    return texts


def text(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a text's, or a pair of texts', tokens."""
    return dict(data.tokenizer(*_texts(data, row), truncation=data.max_length is not None, max_length=data.max_length))


def text_classification(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a text's, or a pair of texts', tokens and its label."""
    return {**text(data, row), **_label(data, row)}


def multiple_choice(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens of a question with each of its choices, a batch of one, and the place of the right one.

    Of two texts the first is what the question is about, and a choice stands behind the second (Zellers et al. 2018).
    """
    *about, asked = _texts(data, row)
    choices = choices_of(data.columns, row)
    seconds = [f"{asked} {choice}" if about else choice for choice in choices]
    firsts = [about[0] if about else asked] * len(choices)
    found = data.tokenizer(
        *(firsts, seconds), padding=True, truncation=data.max_length is not None, max_length=data.max_length,
        return_tensors="pt",
    )  # fmt: skip
    features = {name: values[None] for name, values in found.items()}
    return {**features, "labels": right_choice(data.columns, row)} if data.columns.label else features


def causal_lm(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a text's tokens, which are its labels, too."""
    features = text(data, row)
    return {**features, "labels": list(features["input_ids"])}


def chat(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Put a conversation through the tokenizer's chat template; only what the assistant says has labels."""
    return _cut(data, _answers(data, _conversation(row, data.columns.messages or "")))


def completion(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens of what is asked and what is said to it; only the latter has labels.

    A prompt and its completion, in columns of these names, are taken as they are, or as one conversation where they are lists of
    messages. Others are put through the chat template, or into two lines where there is none.
    """
    columns, said = data.columns, right_answer(data.columns, row)
    if isinstance(said, list):
        before = _conversation(row, columns.text[0])
        return _cut(data, _answers(data, [*before, *_conversation(row, columns.target or "")], len(before)))
    asked = [row[column] for column in columns.text]
    if not all(isinstance(part, str) for part in (said, *asked)):
        raise StatisticsError(
            f"columns {', '.join(map(repr, columns.text))} and {columns.target!r} have to hold texts; name others (--text, "
            "--target), or measure on the text alone (--task causal-lm)"
        )
    prompt, as_it_is = "\n".join(filter(None, asked)), (columns.text, columns.target) == (("prompt",), "completion")
    if data.tokenizer.chat_template and not as_it_is:
        return _cut(data, _answers(data, _asked_and_said(prompt, said)))
    prompt += "" if as_it_is else "\n"
    ids, end = list(data.tokenizer(prompt + said)["input_ids"]), data.tokenizer.eos_token_id
    ids += [] if end is None or ids[-1] == end else [end]
    begin = _shared(data.tokenizer(prompt)["input_ids"], ids)
    return _cut(data, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * begin + ids[begin:]})


def _cut(data: TaskData, features: dict[str, Any]) -> dict[str, Any]:
    return {name: values[: data.max_length] for name, values in features.items()}


def _asked_and_said(asked: str, said: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def _conversation(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation, each with its role and content, also where they are called from and value."""
    found = []
    for message in row[column] or []:
        if isinstance(message, dict) and {"from", "value"} <= message.keys():  # as ShareGPT has them
            message = {"role": SPEAKERS.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise StatisticsError(
                f"column {column!r} has to hold conversations: lists of messages with role and content"
            )
        found.append(message)
    return found


def _answers(data: TaskData, messages: list[dict[str, Any]], first: int = 0) -> dict[str, Any]:
    """Return the features of a conversation up to the assistant's last answer, and as labels the tokens that it says.

    With `first`, only from that message on.

    An answer begins where the conversation that has it departs from the one that asks for it: a prompt may open a thought that
    a stored answer does not have. Answers that the template writes otherwise once there are later ones (thoughts that it
    leaves out) are no longer what the assistant said, and have no labels.
    """
    features: dict[str, Any] = {"input_ids": []}
    labels: list[int] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant" or position < first:
            continue
        before, prompt = features["input_ids"], data.templated(messages[:position], add_generation_prompt=True)
        features = data.templated(messages[: position + 1])
        begin = _shared(prompt["input_ids"], features["input_ids"])
        if begin < len(prompt["input_ids"]):
            asked = data.templated(messages[:position])["input_ids"]
            if begin < len(asked):
                raise StatisticsError(
                    "the chat template changes what was asked when an answer is added, so that the assistant's tokens cannot be "
                    "told from the others; give the data as plain text"
                )
        kept = labels if len(before) == _shared(before, features["input_ids"][:begin]) else []
        labels = kept + [IGNORED] * (begin - len(kept)) + features["input_ids"][begin:]
    return {**features, "attention_mask": [1] * len(labels), "labels": labels}


def _shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def image_chat(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Put a conversation about images through the processor's chat template; only what the assistant says has labels.

    A question and its answer, in columns of their own, are such a conversation. Nothing is cut: an image's tokens stay whole.
    """
    columns = data.columns
    if columns.messages:
        messages = _conversation(row, columns.messages)
    else:
        asked = " ".join(row[column] for column in columns.text)
        messages = _asked_and_said(asked, right_answer(columns, row))
    images = row[columns.image or ""] or []
    return _answers(data, _with_images(messages, images if isinstance(images, list) else [images]))


def _with_images(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """Return messages whose contents are parts, with the images where they are named, or before the first of what is asked."""
    left, found = list(images), []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) and "type" in part for part in parts):
            raise StatisticsError("a message's content is neither a text nor a list of parts, each with its type")
        # A data set fills up parts of different kinds with fields that are empty.
        parts = [{k: v for k, v in part.items() if v is not None and k in ("type", "text")} for part in parts]
        for part in parts:
            if part["type"] == "image":
                if not left:
                    raise StatisticsError(f"a conversation names more images than the {len(images)} it has")
                part["image"] = left.pop(0)
        found.append({"role": message["role"], "content": parts})
    if len(left) == len(images):
        asked = next((message for message in found if message["role"] == "user"), found[0])
        asked["content"] = [*({"type": "image", "image": image} for image in left), *asked["content"]]
    elif left:
        raise StatisticsError(f"a conversation names {len(images) - len(left)} of the {len(images)} images it has")
    return found


def masked_lm(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a text's tokens with some masked (Devlin et al. 2019: 15 of 100), always the same ones, and those as labels."""
    if data.tokenizer.mask_token_id is None:
        raise StatisticsError("the tokenizer has no token to mask others with; name another task (--task)")
    features = text(data, row)
    ids = list(features["input_ids"])
    special = data.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    places = [place for place, is_special in enumerate(special) if not is_special]
    digest = hashlib.sha256(repr(ids).encode()).digest()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))
    labels = [IGNORED] * len(ids)
    for index in order[: max(1, round(MASKED * len(places)))].tolist():
        labels[places[index]], ids[places[index]] = ids[places[index]], data.tokenizer.mask_token_id
    return {**features, "input_ids": ids, "labels": labels}


def _told(data: TaskData, *given: Any, **options: Any) -> Any:
    """Return the tokens of words or texts, with where they are from."""
    if not data.tokenizer.is_fast:
        raise StatisticsError(
            "only a fast tokenizer tells where its tokens are from; push a tokenizer.json with the model"
        )
    try:
        return data.tokenizer(*given, **options)
    except Exception as error:  # the library behind it has no class of its own for that
        raise StatisticsError(f"the tokenizer does not take an example: {error}") from error


def words(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens of a list of words, and as labels the words' tags, each at the first token of its word."""
    column, tags = data.columns.text[0], row[data.columns.label] if data.columns.label else None
    given = row[column]
    if not isinstance(given, list) or (tags is not None and len(tags) != len(given)):
        raise StatisticsError(
            f"column {column!r} has to hold a list of words, and column {data.columns.label!r} a tag for each of them"
        )
    found = _told(
        data, given, is_split_into_words=True, truncation=data.max_length is not None, max_length=data.max_length
    )
    labels, before = [], None
    for word in found.word_ids():
        tag = 0 if tags is None or word is None else tags[word]
        begins = word is not None and word != before
        labels.append(_label_id(data, tag) if begins and tag != IGNORED else IGNORED)
        before = word
    return {**found, "labels": labels}


def span(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens of a question and its context, and as labels the first and the last token of the first answer.

    The first token of all stands for no answer, also for one that is cut off (Devlin et al. 2019, section 4.3).
    """
    if len(data.columns.text) != 2:
        raise StatisticsError(
            "a question is answered from a context; name both columns (--text question --text context)"
        )
    question, context = _texts(data, row)
    options = {"truncation": "only_second", "max_length": data.max_length} if data.max_length else {}
    found = _told(data, question, context, return_offsets_mapping=True, **options)
    offsets, sides = found.pop("offset_mapping"), found.sequence_ids()
    answers = row[data.columns.label] if data.columns.label else None
    if answers is not None and (not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys()):
        raise StatisticsError(f"column {data.columns.label!r} has to hold answers, each with its text and answer_start")
    labels = [0, 0]
    if answers and answers["text"]:
        first = answers["answer_start"][0]
        last = first + len(answers["text"][0]) - 1
        inside = [
            place
            for place, ((begin, end), side) in enumerate(zip(offsets, sides, strict=True))
            if side == 1 and begin <= last and end > first
        ]
        whole = inside and offsets[inside[0]][0] <= first and offsets[inside[-1]][1] > last
        labels = [inside[0], inside[-1]] if whole else labels
    return {**found, "labels": labels}


def seq2seq(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a text's tokens, and as labels those of the text that it becomes."""
    target = data.tokenizer(
        text_target=right_answer(data.columns, row),
        truncation=data.max_length is not None,
        max_length=data.max_length,
    )
    return {**text(data, row), "labels": list(target["input_ids"])}


def heard(data: TaskData, samples: Any) -> dict[str, Any]:
    """Return a sound's features."""
    found = data.processor(samples, sampling_rate=data.processor.sampling_rate, return_tensors="pt")
    name = data.processor.model_input_names[0]
    return {name: found[name][0]}


def _sound(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    sound = row[data.columns.audio or ""]
    bare = isinstance(sound, list | np.ndarray | torch.Tensor)
    samples, rate = (sound, None) if bare else (sound["array"], sound["sampling_rate"])
    wanted = data.processor.sampling_rate
    if rate not in (None, wanted):
        raise StatisticsError(
            f"column {data.columns.audio!r} has {rate} samples a second, but the model hears {wanted}; cast it with "
            f"datasets.Audio(sampling_rate={wanted})"
        )
    return heard(data, samples)


def audio_classification(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a sound's features and its label."""
    return {**_sound(data, row), **_label(data, row)}


def speech(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a sound's features, and as labels the tokens of what is said."""
    labels = list(data.tokenizer(text_target=row[data.columns.target or ""])["input_ids"])
    labels = labels[1:] if labels[:1] == [data.config.decoder_start_token_id] else labels  # the model puts it there
    return {**_sound(data, row), "labels": labels[: data.max_length]}


def ctc(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a sound's features, and as labels the tokens that its frames tell in this order."""
    return {**_sound(data, row), "labels": list(data.tokenizer(row[data.columns.target or ""])["input_ids"])}


def tokens(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return tokens as they are, which are the labels, too."""
    ids = row["input_ids"]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}


def pixels(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return an image's pixels."""
    image = row[data.columns.image or ""]
    channels = getattr(getattr(data.config, "vision_config", data.config), "num_channels", 3)
    return {
        "pixel_values": data.processor(image.convert("RGB") if channels == 3 else image, return_tensors="pt")[
            "pixel_values"
        ][0]
    }


def image_classification(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return an image's pixels and its label."""
    return {**pixels(data, row), **_label(data, row)}


def image_among_classes(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return an image's pixels, and as its label the number of its class among the classes' names."""
    if data.columns.label is None:
        return pixels(data, row)
    value, names = row[data.columns.label], data.class_names
    if value not in names and not (isinstance(value, int) and 0 <= value < len(names)):
        raise StatisticsError(unknown("class", str(value), names))
    return {**pixels(data, row), "labels": names.index(value) if value in names else value}


def _label(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    if data.columns.label is None:
        return {}
    value, config = row[data.columns.label], data.config
    if predicts_numbers(config):
        numbers = [float(v) for v in (value if isinstance(value, list) else [value])]
        if len(numbers) != config.num_labels:
            raise StatisticsError(
                f"label {value!r} in column {data.columns.label!r} is {len(numbers)} numbers, but the model predicts "
                f"{config.num_labels}"
            )
        return {"labels": numbers if len(numbers) > 1 else numbers[0]}
    if config.problem_type == "multi_label_classification":
        return {"labels": _indicators(data, value)}
    return {"labels": _label_id(data, value)}


def _indicators(data: TaskData, value: Any) -> list[float]:
    """Return zeros and ones for each label, from such a list or from a list of the labels that hold."""
    if not isinstance(value, list):
        raise StatisticsError(
            f"label {value!r} in column {data.columns.label!r} is no list, but the model gives an example several labels"
        )
    if len(value) == data.config.num_labels and all(v in (0, 1, 0.0, 1.0) for v in value):
        return [float(v) for v in value]
    held = {_label_id(data, v) for v in value}
    return [float(i in held) for i in range(data.config.num_labels)]


def _label_id(data: TaskData, value: Any) -> int:
    if isinstance(value, str):
        known = data.config.label2id or {}
        alike = [index for name, index in known.items() if plain_name(name) == plain_name(value)]
        if value not in known and len(alike) != 1:
            raise StatisticsError(unknown("label", value, known))
        return int(known.get(value, *alike))
    value = data.label_ids.get(value, value)
    if not isinstance(value, int) or not 0 <= value < data.config.num_labels:
        raise StatisticsError(
            f"label {value!r} in column {data.columns.label!r}, but the model has {data.config.num_labels} labels "
            f"(0 to {data.config.num_labels - 1}); is this the data set the expert was trained on?"
        )
    return int(value)
