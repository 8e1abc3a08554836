"""The training data of a run: rows in a fixed order, tokenized before or during training, from any position."""

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
    """Rows in the order of training, and the position of the run in them.

    Attributes:
        dataset (`MixedRows` or `PackedStream`): training dataset of the trainer.
        fingerprint (`str`): fingerprint of everything that determines the order of rows.
        first_row (`int`): first row of optimizer step `first_step`.
        first_step (`int`): see `first_row`.
        sequences (`int`): rows per optimizer step.
    """

    dataset: MixedRows | PackedStream
    fingerprint: str
    first_row: int
    first_step: int
    sequences: int

    def position(self, step: int) -> dict:
        """The data position after `step` optimizer steps, as plain JSON values."""
        row = self.first_row + (step - self.first_step) * self.sequences
        place = {"fingerprint": self.fingerprint, "row": row}
        if isinstance(self.dataset, PackedStream):
            place["stream"] = self.dataset.state(row)
        return place


def training_data(
    data: DataArguments,
    args: PretrainingArguments,
    tokenizer,
    anneal_position: dict | None = None,
    resume_position: dict | None = None,
    step: int = 0,
) -> TrainingData:
    """Open the rows that a run trains on, at its position.

    Args:
        data ([`DataArguments`]): the datasets.
        args ([`PretrainingArguments`]): length of rows and of the run.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer with an end-of-text token.
        anneal_position (`dict`, *optional*): data position of the checkpoint `anneal_from`. If the run uses other data,
            it starts with the first row instead.
        resume_position (`dict`, *optional*): data position of the checkpoint that the run resumes from.
        step (`int`): optimizer step of that checkpoint.

    Raises:
        ValueError: if data is missing, malformed or too short, or `resume_position` does not match `step`.
    """
    data.check()
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-text token (eos_token), which separates documents. Set one and save the "
            "tokenizer."
        )
    fingerprint = data_fingerprint(data, args, tokenizer)
    if resume_position is not None and resume_position["fingerprint"] != fingerprint:
        raise ValueError(
            f"The checkpoints in {args.output_dir!r} were saved with other data, tokenizer, sequence_length or seed, "
            "so the run cannot resume from them. Restore these settings and files, or choose another output_dir."
        )
    same = anneal_position is not None and anneal_position["fingerprint"] == fingerprint
    if anneal_position is not None and not same:
        logger.warning("The data differs from that of the checkpoint anneal_from, so it is read from its first row.")
    first_row = anneal_position["row"] if same else 0
    row = first_row + (step - args.first_step) * args.sequences
    if resume_position is not None and resume_position["row"] != row:
        raise ValueError(
            f"The checkpoints in {args.output_dir!r} were saved with another global_batch_size: they have used "
            f"{resume_position['row']} rows in {step} steps, not {row}. Restore global_batch_size, or choose another "
            "output_dir."
        )
    rows = (args.max_steps - args.first_step) * args.sequences
    sources = [TextSource(spec, data.text_column, data.dataset_split) for spec in data.datasets]
    weights = data.dataset_weights or [1.0] * len(sources)
    mixture = Mixture(weights, data.block_rows, args.seed)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    common = {
        "length": args.sequence_length,
        "padding": padding,
        "document_mask": args.document_mask,
        "mask_repetitive": data.mask_repetitive_rows,
    }
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
        place = resume_position or (anneal_position if same else None)
        if place is not None:
            dataset.load_state(place["stream"])
    else:
        for source in sources:
            source.open(streaming=True)  # fail early: the first source may be tokenized for hours
        with args.main_process_first(desc="tokenization"):
            parts = [
                PackedRows(tokenized(source, tokenizer, data.preprocessing_num_workers), **common) for source in sources
            ]
        # `Trainer` skips the rows of the steps before `first_step`, which are not part of this run.
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
                f"The training data {source.name!r} has at most {most:,} tokens (one per byte), but the run takes "
                f"{round(share * tokens):,} of it. Lower train_tokens, raise num_train_epochs (maximum number of "
                "passes), or add data."
            )


def data_fingerprint(data: DataArguments, args: PretrainingArguments, tokenizer) -> str:
    """Fingerprint of everything that determines the order of rows: names and sizes of files, tokenizer, settings."""
    content = [
        *(data.datasets, data.dataset_weights, data.dataset_split, data.text_column, data.streaming, data.block_rows),
        *(args.sequence_length, args.seed),
        *(len(tokenizer), tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items())),
        *(local_files(spec) for spec in data.datasets),
    ]
    return fingerprint(content)
