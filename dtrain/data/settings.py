"""Settings of the data: corpora, vocabulary, batches. Free of slow imports."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class CorpusSettings(BaseModel):
    """One parallel corpus: two text files, or a data set that `datasets.load_dataset` loads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = Field(None, description="text file, one sentence a line; may end in .gz")
    target: str | None = Field(None, description="its translation, line by line; may end in .gz")
    dataset: str | None = Field(None, description="hub name, or parquet, json, csv with data_files")
    name: str | None = Field(None, description="configuration of the data set, e.g. de-en")
    split: str = Field("train", description="split of the data set")
    revision: str | None = Field(None, description="commit or tag of the data set; pin it")
    data_files: str | list[str] | None = Field(None, description="local files of the data set")
    source_column: str | None = Field(
        None, description="column of source text; else the `translation` column's source_language"
    )
    target_column: str | None = Field(None, description="column of target text; likewise")
    weight: int = Field(1, ge=1, description="how often an epoch visits each of its sentences")

    @model_validator(mode="after")
    def _one_kind(self) -> "CorpusSettings":
        if self.dataset is None and (self.source is None or self.target is None):
            raise ValueError("a corpus needs both `source` and `target` files, or a `dataset`")
        if self.dataset is not None and (self.source or self.target):
            raise ValueError(
                "a corpus has either `source` and `target` files or a `dataset`, not both"
            )
        if (self.source_column is None) != (self.target_column is None):
            raise ValueError("`source_column` and `target_column` go together")
        return self


class DataSettings(BaseModel):
    """Which text is learned from, judged on, and where its tokens are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_language: str = Field("en", description="code of the language translated from")
    target_language: str = Field("de", description="code of the language translated to")
    train: list[CorpusSettings] = Field(default_factory=list, description="corpora to learn from")
    validation: CorpusSettings | None = Field(None, description="judged during training")
    test: CorpusSettings | None = Field(None, description="judged by `dtrain evaluate`")
    dir: str = Field("prepared/{fingerprint}", description="where prepared tokens are kept")
    max_length: int = Field(
        256, ge=2, description="tokens a side; longer pairs are dropped, counted"
    )


class VocabularySettings(BaseModel):
    """The sentencepiece vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(32000, ge=16, description="number of pieces, special tokens included")
    algorithm: Literal["unigram", "bpe"] = "unigram"
    shared: bool = Field(True, description="one vocabulary for both languages, or one a side")
    character_coverage: float = Field(0.9995, gt=0, le=1)


LEAST_SLOTS = 8


class BatchSettings(BaseModel):
    """Size of a step and of what one rank runs at once, in target-token slots."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_per_step: int = Field(25088, ge=1, description="slots of one optimizer step, all ranks")
    tokens_per_micro_batch: Literal["auto"] | Annotated[int, Field(ge=LEAST_SLOTS)] = Field(
        3136, description="slots run at once by one rank; auto: what fits, found at the first start"
    )

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "BatchSettings":
        if self.tokens_per_micro_batch != "auto" and self.tokens_per_step % self.target_slots:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} must be a multiple of "
                f"tokens_per_micro_batch {self.tokens_per_micro_batch}"
            )
        return self

    @property
    def micro_batches_per_step(self) -> int:
        """How many micro-batches all ranks together run in one step."""
        return self.tokens_per_step // self.target_slots

    @property
    def target_slots(self) -> int:
        """Give `tokens_per_micro_batch` as the number that it is once a run has begun.

        Raises:
            RuntimeError: while it is `auto`.
        """
        if self.tokens_per_micro_batch == "auto":
            raise RuntimeError("batch.tokens_per_micro_batch is `auto` where a number is needed")
        return self.tokens_per_micro_batch
