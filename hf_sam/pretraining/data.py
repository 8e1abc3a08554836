"""The training data of a run: the same order of rows, tokenized before or while training, from any place in it."""

from dataclasses import dataclass

from accelerate.logging import get_logger

from ..runtime.dataset_specs import local_files
from ..runtime.fingerprint import fingerprint
from .arguments import DataArguments, PretrainingArguments
from .documents import TextSource, TokenStream
from .packing import MixedRows, Mixture, PackedRows, tokenized
from .stream import PackedStream

logger = get_logger(__name__)


@dataclass
class TrainingData:
    """Rows in the order of training, and where in them the run stands.

    Attributes:
        dataset (`MixedRows` or `PackedStream`): what the trainer reads.
        fingerprint (`str`): hash of all that the order of rows depends on.
        first_row (`int`): row of the data that step `first_step` of the run begins with.
        first_step (`int`): see `first_row`.
        sequences (`int`): rows of an optimizer step.
    """

    dataset: MixedRows | PackedStream
    fingerprint: str
    first_row: int
    first_step: int
    sequences: int

    def position(self, step: int) -> dict:
        """Where the data stands after `step` optimizer steps: plain numbers, for JSON."""
        row = self.first_row + (step - self.first_step) * self.sequences
        place = {"fingerprint": self.fingerprint, "row": row}
        if isinstance(self.dataset, PackedStream):
            place["stream"] = self.dataset.state(row)
        return place


def training_data(
    data: DataArguments,
    args: PretrainingArguments,
    tokenizer,
    before: dict | None = None,
    now: dict | None = None,
    step: int = 0,
) -> TrainingData:
    """The rows that a run trains on.

    Args:
        data ([`DataArguments`]): the datasets.
        args ([`PretrainingArguments`]): length of rows and of the run.
        tokenizer (`PreTrainedTokenizerBase`): with an end-of-text token.
        before (`dict`, *optional*): position of the data in the checkpoint of `anneal_from`; data other than that
            begins at its beginning.
        now (`dict`, *optional*): position of the data in the checkpoint that this run goes on from.
        step (`int`): optimizer steps behind that checkpoint.

    Raises:
        ValueError: if data is missing, of another form, or too little, or if `now` is not the place of `step`.
    """
    data.check()
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token (eos_token), which stands between documents.")
    fingerprint = data_fingerprint(data, args, tokenizer)
    if now is not None and now["fingerprint"] != fingerprint:
        raise ValueError(
            f"The checkpoints in {args.output_dir!r} were made with other data, tokenizer, sequence_length or seed, so "
            "the run cannot go on where it was. Restore those (files too), or choose another output_dir."
        )
    same = before is not None and before["fingerprint"] == fingerprint
    if before is not None and not same:
        logger.warning("The data is not that of the checkpoint in anneal_from, so it begins at its beginning.")
    first_row = before["row"] if same else 0
    row = first_row + (step - args.first_step) * args.sequences
    if now is not None and now["row"] != row:
        raise ValueError(
            f"The checkpoints in {args.output_dir!r} were made with another global batch size: {now['row']} rows in "
            f"{step} steps, not {row}. Restore it (global_batch_size), or choose another output_dir."
        )
    rows = (args.max_steps - args.first_step) * args.sequences
    sources = [TextSource(spec, data.text_column, data.dataset_split) for spec in data.datasets]
    weights = data.dataset_weights or [1.0] * len(sources)
    mixture = Mixture(weights, data.block_rows, args.seed)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    common = {"length": args.sequence_length, "padding": padding, "document_mask": args.document_mask}
    passes = int(args.num_train_epochs)
    if data.streaming:
        _check_bound(sources, mixture, (first_row + rows) * args.sequence_length, passes)
        streams = [
            TokenStream(
                source, tokenizer, seed=args.seed + index, workers=data.preprocessing_num_workers, passes=passes
            )
            for index, source in enumerate(sources)
        ]
        dataset = PackedStream(streams, mixture, rows=first_row + rows, **common)
        place = now or (before if same else None)
        if place is not None:
            dataset.load_state(place["stream"])
    else:
        for source in sources:
            source.open(streaming=True)  # a wrong name should be told before the first is tokenized for hours
        with args.main_process_first(desc="tokenization"):
            parts = [
                PackedRows(tokenized(source, tokenizer, data.preprocessing_num_workers), **common) for source in sources
            ]
        # The host passes over the steps before `first_step`, which belong to other rows.
        skipped = args.first_step * args.sequences
        dataset = MixedRows(
            parts,
            mixture,
            first=first_row - skipped,
            rows=skipped + rows,
            passes=passes,
            names=[source.name for source in sources],
        )
    return TrainingData(dataset, fingerprint, first_row, args.first_step, args.sequences)


def _check_bound(sources: list[TextSource], mixture: Mixture, tokens: int, passes: int) -> None:
    for source, share in zip(sources, mixture.shares, strict=True):
        most = source.most_tokens()
        if most is not None and share * tokens > passes * most:
            raise ValueError(
                f"The training data {source.name!r} has at most {most:,} tokens (one a byte), but the run takes "
                f"{round(share * tokens):,} of it. Lower train_tokens, raise num_train_epochs (how many passes are "
                "allowed), or give more data."
            )


def data_fingerprint(data: DataArguments, args: PretrainingArguments, tokenizer) -> str:
    """Hash of all that the order of rows depends on: files by name and size, tokenizer, settings."""
    content = [
        *(data.datasets, data.dataset_weights, data.dataset_split, data.text_column, data.streaming, data.block_rows),
        *(args.sequence_length, args.seed),
        *(len(tokenizer), tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items())),
        *(local_files(spec) for spec in data.datasets),
    ]
    return fingerprint(content)
