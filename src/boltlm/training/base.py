"""The stage `base`: pretrains a small Llama or takes a checkpoint, and adds the special tokens."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from boltlm import checkpoint
from boltlm.corpus.chunks import is_encodable
from boltlm.corpus.corpora import BASE_CORPUS, corpus_documents
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import Document
from boltlm.sequences import store
from boltlm.sequences.formatter import SequenceFormatter
from boltlm.sequences.mixing import SequenceSource
from boltlm.sequences.packing import pack_sequences
from boltlm.tokens import TextCoder
from boltlm.training.base_config import BaseSettings
from boltlm.training.base_model import add_special_tokens, create_model, load_checkpoint
from boltlm.training.config import CheckpointConfig, PretrainConfig
from boltlm.training.job import TrainingJob, train_and_publish
from boltlm.training.metrics_logger import TRAIN_COLUMNS
from boltlm.training.tokenizer import train_tokenizer


def run_base(
    settings: BaseSettings, *, work: Path, out: Path, csv_path: Path, timing_path: Path
) -> None:
    """Write the base model to `out`, and the log of its training to `csv_path`.

    For a checkpoint, which is not trained here, the log has only its header. `work`: the folder of
    unfinished work; `timing_path`: the log's wall-clock figures. Raises UserError where the
    checkpoint cannot be used, the corpus is too small, or the loss diverges.
    """
    if isinstance(settings.base, CheckpointConfig):
        _extend_checkpoint(settings.base, settings.data_seed, out, csv_path)
    else:
        _pretrain(settings, settings.base, work, out, csv_path, timing_path)


def _extend_checkpoint(config: CheckpointConfig, seed: int, out: Path, csv_path: Path) -> None:
    model, tokenizer = load_checkpoint(config.model)
    add_special_tokens(model, tokenizer, seed)
    tokenizer.save_pretrained(out)
    checkpoint.save_model(model, out, out, {"steps": 0, "tokens": 0})
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    csv_path.write_text(",".join(TRAIN_COLUMNS) + "\n", encoding="utf-8")


def _pretrain(
    settings: BaseSettings,
    config: PretrainConfig,
    work: Path,
    out: Path,
    csv_path: Path,
    timing_path: Path,
) -> None:
    """Train a tokenizer and a new Llama on the raw documents of the corpus `base`."""
    documents = [
        document
        for document in corpus_documents(settings.corpus, settings.data_seed, BASE_CORPUS)
        if document.text and is_encodable(document.text)
    ]
    tokenizer = train_tokenizer((document.text for document in documents), config.vocab_size)
    model = create_model(config, tokenizer, settings.data_seed)
    add_special_tokens(model, tokenizer, settings.data_seed)
    tokenizer.save_pretrained(out)
    checkpoint.save_model(model, out, out, {})
    facts = {
        "start": hash_path(out),
        "documents": _documents_digest(documents),
        "train": config.train.result_settings(),
        "epochs": config.epochs,
        "sequence_length": config.sequence_length,
        "seed": settings.data_seed,
        "code": hash_code("boltlm.training.base"),
    }
    job = TrainingJob(
        what="train base",
        config=config.train,
        seed=settings.data_seed,
        sequence_length=config.sequence_length,
        work=work / "train" / fingerprint(facts),
        tokenizer=out,
        out=out,
        csv=csv_path,
        timing=timing_path,
        facts={},
        publish_predecay=False,
    )
    train_and_publish(
        job,
        pack=lambda folder: _pack(config, settings.data_seed, documents, TextCoder(out), folder),
        load_model=lambda: model,
    )


def _pack(
    config: PretrainConfig, seed: int, documents: Sequence[Document], coder: TextCoder, folder: Path
) -> None:
    """Write the training sequences into `folder`: the documents as raw text."""
    formatter = SequenceFormatter(
        special_tokens=coder.special_tokens,
        sequence_format="raw",
        draws="selected",
        layout="document",
        context_loss=True,
        context_chunks=0,
        token_budget=coder.context_length,
        seed=seed,
    )

    def sources(scratch: Path) -> list[SequenceSource]:
        texts = ((document.doc_id, document.text) for document in documents)
        tokenized = store.tokenize_texts(texts, coder)
        return [SequenceSource(store.write_documents(scratch / "documents", tokenized), formatter)]

    pack_sequences(
        sources,
        folder,
        sequence_length=config.sequence_length,
        seed=seed,
        vocab_size=config.vocab_size,
        epochs=config.epochs,
        tokens=None,
    )


def _documents_digest(documents: Sequence[Document]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(f"{document.doc_id}\0{document.text}\0".encode())
    return digest.hexdigest()
