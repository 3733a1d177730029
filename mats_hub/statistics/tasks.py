"""Tasks: how an example becomes model inputs, the model's own loss, and its score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mats_hub.errors import StatisticsError, unknown
from mats_hub.source import Source
from mats_hub.statistics.collect import IGNORED
from mats_hub.statistics.dataset import Columns, infer_columns, infer_role

GENERATED = "text that the model generated itself"
GENERATED_TASK = "generated"
GENERATED_AT_ONCE = 16

PHRASE = "a photo of a {}"
"""How a class's name is put in words for a model of images and texts (Radford et al. 2021, section 3.1.4)."""


@dataclass(frozen=True)
class Task:
    """One kind of task.

    Attributes:
        name: what it is called.
        suffixes: endings of the transformers classes that do it.
        roles: the columns it needs.
        encode: (task data, example) → features of one example.
        per_token: whether the loss of an example is a mean over its tokens, so that a batch's is computed from logits.
        mapping: transformers' table of the classes that do it, where their names do not tell.
        processor: the class that reads images or sounds, and the file it comes from.

    """

    name: str
    suffixes: tuple[str, ...]
    roles: tuple[str, ...]
    encode: Callable[[TaskData, dict[str, Any]], dict[str, Any]]
    per_token: bool = False
    mapping: str = ""
    processor: tuple[str, str] | None = None


@dataclass
class TaskData:
    """A task's examples, ready for a model.

    Attributes:
        task: the kind of task.
        dataset: the examples (`datasets.Dataset`).
        columns: the columns they are read from.
        config: the model's config.
        tokenizer: for text.
        processor: for images and sounds.
        max_length: tokens after which a text is cut.
        drawn: row → labels drawn from the model's predictions, in place of the data's.
        last_batch: number of the batch that was handed out last.
        classes: inputs that go with every example: the names of the classes that an image is told from.

    """

    task: Task
    dataset: Any
    columns: Columns
    config: Any
    tokenizer: Any = None
    processor: Any = None
    max_length: int | None = None
    drawn: dict[int, Any] = field(default_factory=dict)
    last_batch: int = -1
    classes: dict[str, Tensor] = field(default_factory=dict)

    def batches(
        self, size: int, device: torch.device | str = "cpu", first: int = 0, step: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Yield model inputs of `size` examples, padded to the longest of each batch, on `device`.

        With `first` and `step` only every `step`-th batch, from number `first` on.
        Texts without a single token (the empty lines of a language-model corpus) are left out.
        """
        for start in range(first * size, len(self.dataset), step * size):
            self.last_batch = start // size
            indices = range(start, min(start + size, len(self.dataset)))
            features = [f for f in map(self._features, indices) if f.get("input_ids") != []]
            if features:
                yield {key: value.to(device) for key, value in self._padded(features).items()}

    @property
    def class_names(self) -> list[str]:
        """The names of the classes that an image is told from: the label column's, or the different labels in it."""
        column = self.columns.label
        if column is None:
            return []
        feature = self.dataset.features[column]
        return list(getattr(feature, "names", None) or sorted({str(value) for value in self.dataset[column]}))

    def name_classes(self) -> None:
        """Put every class's name in words, in `PHRASE`, as inputs that go with every example."""
        if not self.class_names:
            raise StatisticsError(
                "an image is told from the classes by their names; name the label column with --label"
            )
        phrases = [PHRASE.format(name.replace("_", " ")) for name in self.class_names]
        self.classes = dict(
            self.tokenizer(phrases, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        )

    def _features(self, index: int) -> dict[str, Any]:
        features = self.task.encode(self, self.dataset[index])
        return {**features, "labels": self.drawn[index]} if index in self.drawn else features

    @torch.no_grad()
    def draw_labels(self, model: nn.Module, seed: int, device: torch.device | str = "cpu") -> None:
        """Take, from now on, labels drawn from the model's own predictions (of the true Fisher) for every example.

        Tokens are drawn for each place given the data's tokens before it. A draw depends on the seed and the example's
        place alone. A regression's label is drawn from a normal distribution of variance one about the prediction.
        """
        model.eval()
        for index in range(len(self.dataset)):
            features = self._features(index)
            if features.get("input_ids") == []:
                continue
            batch = {key: value.to(device) for key, value in self._padded([features]).items()}
            logits = self.logits(model, batch)[0].float().cpu()
            digest = hashlib.sha256(f"{seed}\0{index}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            self.drawn[index] = self._draw(logits, features.get("labels"), generator)

    def _draw(self, logits: Tensor, labels: Any, generator: torch.Generator) -> Any:
        if self.task.per_token:
            shift = 0 if self.config.is_encoder_decoder else 1
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
            moved = [IGNORED] * shift + tokens
            return [IGNORED if old == IGNORED else new for old, new in zip(labels, moved, strict=False)]
        if self.is_regression:
            drawn = logits + torch.randn(logits.shape, generator=generator)
            return float(drawn) if len(drawn) == 1 else drawn.tolist()
        if not self.classes and self.config.problem_type == "multi_label_classification":
            return torch.bernoulli(logits.sigmoid(), generator=generator).tolist()
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    def _padded(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        padding = {"labels": IGNORED, "input_ids": getattr(self.tokenizer, "pad_token_id", None) or 0}
        lengths = {k: max(len(f[k]) for f in features) for k, v in features[0].items() if isinstance(v, list)}
        if (
            self.task.per_token
            and self.config.is_encoder_decoder
            and lengths.get("labels")
            and lengths["labels"] == lengths.get("input_ids")
        ):
            lengths["labels"] += 1  # the two sides must differ in length, for their masks are told apart by shape
        for key in features[0]:
            values = [feature[key] for feature in features]
            if isinstance(values[0], Tensor):
                batch[key] = torch.stack(values)
            elif isinstance(values[0], list):
                fill = padding.get(key, 0)
                batch[key] = torch.tensor([v + [fill] * (lengths[key] - len(v)) for v in values])
            else:
                batch[key] = torch.tensor(values)
        return batch

    def templated(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        """Return the tokens of a conversation in the tokenizer's chat template."""
        if not self.tokenizer.chat_template:
            raise StatisticsError("the tokenizer has no chat template; give the data as plain text (--text)")
        return list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))

    def masks(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the masks ``[batch, length]`` of the tokens that count: the encoder's (or only) and the decoder's."""
        masks = []
        masked = {**batch, **self.classes}
        if "attention_mask" in masked:
            masks.append(masked["attention_mask"].bool())
        if self.task.per_token and self.config.is_encoder_decoder and "labels" in batch:
            masks.append(batch["labels"] != IGNORED)
        return masks

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Return the model's outputs for a batch."""
        classes = {key: value.to(next(iter(batch.values())).device) for key, value in self.classes.items()}
        left_out = ("labels",) if classes else ()
        return model(**{key: value for key, value in batch.items() if key not in left_out}, **classes)

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the model's logits for a batch, ``[batch, (tokens,) labels]``."""
        output = self.forward(model, batch)
        return output.logits_per_image if self.classes else output.logits

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the sum over the batch's examples of the model's own loss on each example alone."""
        if self.classes:  # of an image among the classes; the model's own loss is of pairs in a batch
            return nn.functional.cross_entropy(self.logits(model, batch).float(), batch["labels"], reduction="sum")
        output = self.forward(model, batch)
        if not self.task.per_token:
            return output.loss.float() * len(batch["labels"])
        logits, labels = self.shifted(output.logits, batch["labels"])
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        return (losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).sum()

    @torch.no_grad()
    def accuracy(self, model: nn.Module, batch_size: int = 64, device: torch.device | str = "cpu") -> float:
        """Return the share of labels (of tokens, for language models) that `model` predicts, in [0, 1].

        Raises:
            StatisticsError: the model predicts numbers, not labels.

        """
        if self.is_regression and not self.task.per_token:
            raise StatisticsError(
                "a regression head predicts numbers, of which there is no accuracy; compare them yourself"
            )
        several = not self.classes and self.config.problem_type == "multi_label_classification"
        model.eval()
        right = count = 0
        for batch in self.batches(batch_size, device):
            logits, labels = self.logits(model, batch), batch["labels"]
            if self.task.per_token:
                logits, labels = self.shifted(logits, labels)
            counted = labels != IGNORED
            predicted = (logits > 0).to(labels) if several else logits.argmax(-1)
            right += int((predicted == labels)[counted].sum())
            count += int(counted.sum())
        return right / max(count, 1)

    @property
    def is_regression(self) -> bool:
        """Whether the model predicts numbers."""
        return not self.classes and _is_regression(self.config)

    def shifted(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and labels of tokens, those of one place beside each other."""
        # A decoder alone predicts the next token; an encoder-decoder's logits already stand at their label's place.
        return (logits, labels) if self.config.is_encoder_decoder else (logits[:, :-1], labels[:, 1:])


def _encode_text(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    texts = [row[column] for column in data.columns.text]
    return dict(data.tokenizer(*texts, truncation=data.max_length is not None, max_length=data.max_length))


def _encode_text_classification(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    return {**_encode_text(data, row), **_label(data, row)}


def _encode_causal_lm(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    features = _encode_text(data, row)
    return {**features, "labels": list(features["input_ids"])}


def _encode_chat(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Put a conversation through the tokenizer's chat template; only what the assistant says has labels."""
    messages = row[data.columns.messages or ""]
    ids: list[int] = []
    labels: list[int] = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = data.templated(messages[:position], add_generation_prompt=True)
        turn = data.templated(messages[: position + 1])
        if turn[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
            raise StatisticsError(
                "the tokenizer's chat template changes earlier turns when one is added, so that the assistant's tokens cannot be "
                "told from the others; give the data as plain text, or conversations of one answer each"
            )
        labels += [IGNORED] * (len(prompt) - len(ids)) + turn[len(prompt) :]
        ids = turn
    cut = slice(0, data.max_length)
    return {"input_ids": ids[cut], "attention_mask": [1] * len(ids[cut]), "labels": labels[cut]}


def _encode_seq2seq(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    target = data.tokenizer(
        text_target=row[data.columns.target or ""], truncation=data.max_length is not None, max_length=data.max_length
    )
    return {**_encode_text(data, row), "labels": list(target["input_ids"])}


def _encode_speech(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    """Return a sound's features, and as labels the tokens of what is said."""
    sound = row[data.columns.audio or ""]
    samples, rate = (sound["array"], sound["sampling_rate"]) if isinstance(sound, dict) else (sound, None)
    wanted = data.processor.sampling_rate
    if rate not in (None, wanted):
        raise StatisticsError(
            f"column {data.columns.audio!r} has {rate} samples a second, but the model hears {wanted}; cast it with "
            f"datasets.Audio(sampling_rate={wanted})"
        )
    found = data.processor(samples, sampling_rate=wanted, return_tensors="pt")
    labels = list(data.tokenizer(text_target=row[data.columns.target or ""])["input_ids"])
    labels = labels[1:] if labels[:1] == [data.config.decoder_start_token_id] else labels  # the model puts it there
    return {"input_features": found["input_features"][0], "labels": labels[: data.max_length]}


def _encode_tokens(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    ids = row["input_ids"]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}


def _encode_image(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    image = row[data.columns.image or ""]
    channels = getattr(data.config, "vision_config", data.config).num_channels
    return {
        "pixel_values": data.processor(image.convert("RGB") if channels == 3 else image, return_tensors="pt")[
            "pixel_values"
        ][0]
    }


def _encode_image_classification(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    return {**_encode_image(data, row), **_label(data, row)}


def _encode_image_among_classes(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    if data.columns.label is None:
        return _encode_image(data, row)
    value, names = row[data.columns.label], data.class_names
    if value not in names and not (isinstance(value, int) and 0 <= value < len(names)):
        raise StatisticsError(unknown("class", str(value), names))
    return {**_encode_image(data, row), "labels": names.index(value) if value in names else value}


def _label(data: TaskData, row: dict[str, Any]) -> dict[str, Any]:
    if data.columns.label is None:
        return {}
    value, config = row[data.columns.label], data.config
    if _is_regression(config):
        return {"labels": [float(v) for v in value] if isinstance(value, list) else float(value)}
    if config.problem_type == "multi_label_classification":
        return {"labels": _indicators(data, value)}
    return {"labels": _label_id(data, value)}


def _is_regression(config: Any) -> bool:
    return config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)


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
        if value not in known:
            raise StatisticsError(unknown("label", value, known))
        value = known[value]
    if not isinstance(value, int) or not 0 <= value < data.config.num_labels:
        raise StatisticsError(
            f"label {value!r} in column {data.columns.label!r}, but the model has {data.config.num_labels} labels "
            f"(0 to {data.config.num_labels - 1}); is this the data set the expert was trained on?"
        )
    return int(value)


IMAGES = ("AutoImageProcessor", "preprocessor_config.json")
TASKS: dict[str, Task] = {
    "text-classification": Task(
        "text-classification", ("ForSequenceClassification",), ("text", "label"), _encode_text_classification
    ),
    "causal-lm": Task("causal-lm", ("ForCausalLM", "LMHeadModel"), ("text",), _encode_causal_lm, per_token=True),
    GENERATED_TASK: Task(GENERATED_TASK, (), (), _encode_tokens, per_token=True),
    "chat": Task("chat", (), ("messages",), _encode_chat, per_token=True),
    "speech-recognition": Task(
        "speech-recognition",
        (),
        ("audio", "target"),
        _encode_speech,
        per_token=True,
        mapping="MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        processor=("AutoFeatureExtractor", "preprocessor_config.json"),
    ),
    "seq2seq": Task(
        "seq2seq", ("ForConditionalGeneration", "ForSeq2SeqLM"), ("text", "target"), _encode_seq2seq, per_token=True
    ),
    "image-classification": Task(
        "image-classification",
        ("ForImageClassification",),
        ("image", "label"),
        _encode_image_classification,
        processor=IMAGES,
    ),
    "zero-shot-image-classification": Task(
        "zero-shot-image-classification",
        (),
        ("image", "label"),
        _encode_image_among_classes,
        mapping="MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        processor=IMAGES,
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

    if infer_task(type(model).__name__).name != "causal-lm":
        raise StatisticsError(
            f"a {type(model).__name__} generates no text to be measured on; name its task's data (dataset, --dataset)"
        )
    tokenizer = _load_processor(files, "AutoTokenizer", "tokenizer_config.json", "tokenizer.json")
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
    if task is not None and task not in TASKS:
        raise StatisticsError(unknown("task", task, TASKS))
    kind = TASKS[task] if task else infer_task(model_class)
    if task is None and kind.name == "causal-lm" and not columns.text and infer_role("messages", dataset.column_names):
        kind = TASKS["chat"]
    chosen = infer_columns(dataset, columns, kind.roles, needs_labels)
    data = TaskData(kind, dataset, chosen, config)
    if kind.processor:
        data.processor = _load_processor(files, *kind.processor)
    if kind.name == "image-classification":
        return data
    data.tokenizer = _load_processor(files, "AutoTokenizer", "tokenizer_config.json", "tokenizer.json")
    reads = getattr(config, "text_config", config)
    limits = ("max_position_embeddings", "max_target_positions")
    found = (getattr(reads, limit, None) for limit in limits)
    positions = next((n for n in found if n and n > 0), 10**9)  # XLNet's are -1: any number
    # RoBERTa and its kin, whose padding is token 1, count positions from 2 on; for others two are not missed.
    reserved = 2 if getattr(reads, "pad_token_id", None) == 1 else 0
    limit = min(data.tokenizer.model_max_length, positions - reserved)
    data.max_length = max_length or (limit if limit < 10**6 else None)
    if kind.name == "zero-shot-image-classification":
        data.name_classes()
    return data


def _load_processor(files: Sequence[Source], auto_class: str, *names: str) -> Any:
    import transformers

    for source in files:
        if any(name in source.sizes for name in names):
            where = {} if source.folder else {"revision": source.commit, "token": source.token}
            return getattr(transformers, auto_class).from_pretrained(source.folder or source.repo_id, **where)
    raise StatisticsError(
        f"none of {', '.join(repr(source.spec) for source in files)} has a {names[0]}; push it beside the model"
    )
