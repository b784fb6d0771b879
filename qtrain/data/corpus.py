"""What a run reads: a ``DataPlan`` is a checked configuration, a ``Corpus`` the data that it opens.

    PreparedText   texts, tokenized once into shards (``prepare``)
    PreparedFolder such shards by their folder's path or address (``prepared_folder``)
    TokenFiles     files that other programs tokenized, read in place (``token_files``)
    Mixture        several of these, by weight (``mixture``)
    StreamedText   a Hugging Face dataset, tokenized while the run goes on (``streamed_text``)

The plan costs milliseconds and finds wrong values before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from qtrain.data.cache import cache_root
from qtrain.data.manifest import MANIFEST
from qtrain.data.object_store import ObjectStore, check_address, is_address
from qtrain.data.prepare import open_prepared
from qtrain.data.progress import Progress, shown_progress
from qtrain.data.shard_windows import ShardWindows
from qtrain.data.shard_writer import DEFAULT_SHARD_TOKENS
from qtrain.data.shards import TokenShards
from qtrain.data.sources import TextSource
from qtrain.data.stored_shards import begin_fetching, fetched_shards, open_stored, prepare_in
from qtrain.data.stream import TokenWindows, ValidationWindows, Windows
from qtrain.data.tokenizers import BpeTraining, Tokenizer, get_tokenizer
from qtrain.data.validation import ValidationSet

# As a configuration has it, or one that is there already, as where a checkpoint brings it
TokenizerSpec = str | Mapping[str, Any] | Tokenizer | BpeTraining


class Corpus(Protocol):
    """Opened data of a run."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The one that made the ids; None where nobody named it."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to have read the same: ``shards`` (a name with a digest of all that
        decides the tokens), ``fingerprint``, ``tokenizer`` (its name, or None), ``tokenizer_digest``, ``order`` where the
        samples come in another than that of ``TokenWindows``, and more where a corpus has more."""

    def train_windows(self, sequence_tokens: int, seed: int) -> Windows:
        """Training samples. Raises ValueError where there are too few tokens for one."""

    def validation(self, sequence_tokens: int, max_windows: int | None) -> ValidationSet:
        """At most ``max_windows`` windows, None for all. Raises ValueError where there are too few tokens."""

    def check_unchanged(self) -> None:
        """Raises ShardError where what is read is not what was opened."""


class DataPlan(Protocol):
    """The data of a configuration, checked as far as that costs nothing."""

    @property
    def tokenizer(self) -> Tokenizer | BpeTraining | None:
        """It may be still to be trained. None: the files say no more than ids; nothing can be generated, and bits per
        byte are unknown."""

    @property
    def vocab_size(self) -> int:
        """Ids lie below it."""

    def open(self, recorded: Mapping[str, Any] | None = None) -> Corpus:
        """The data. recorded: the ``identity`` that they must have, as a checkpoint has it; what was prepared for it
        is found again. Raises ValueError where they are others now."""


def any_tokenizer(spec: TokenizerSpec) -> Tokenizer | BpeTraining:
    return spec if isinstance(spec, Tokenizer | BpeTraining) else get_tokenizer(spec)


def ready_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """For data that are tokenized already, or while they are read. Raises ValueError for one that is to be trained."""
    found = any_tokenizer(spec)
    if isinstance(found, BpeTraining):
        raise ValueError(
            f"data.tokenizer={found.name}: it is trained while texts are prepared, and these data are not; give one that is "
            "there, such as saved:FOLDER, hf:NAME or tiktoken:gpt2"
        )
    return found


def tokenizer_identity(tokenizer: Tokenizer | None) -> dict[str, str | None]:
    """``tokenizer`` and ``tokenizer_digest`` of a corpus' identity."""
    if tokenizer is None:
        return {"tokenizer": None, "tokenizer_digest": None}
    return {"tokenizer": tokenizer.name, "tokenizer_digest": tokenizer.digest}


class PreparedText:
    """Texts that are tokenized once, into shards of ``shard_tokens`` under ``folder``: None for ``cache_root()``, a path,
    or an address. shuffle: see ``PreparedCorpus``."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: TokenizerSpec = "byte",
        val_fraction: float = 0.05,
        num_workers: int | None = None,
        folder: str | None = None,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        shuffle: str = "windows",
    ) -> None:
        self.source, self._tokenizer = source, any_tokenizer(tokenizer)
        self.val_fraction, self.num_workers, self.folder = val_fraction, num_workers, folder
        self.shard_tokens, self.shuffle = shard_tokens, check_order(shuffle)

    @property
    def tokenizer(self) -> Tokenizer | BpeTraining:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def open(self, recorded: Mapping[str, Any] | None = None) -> PreparedCorpus:
        """From the cache, or newly written with a bar a stage. The recorded folder is taken from the cache though the
        source gives other data now."""
        name = None if recorded is None else str(recorded["shards"])
        shards = None if name is None else self._kept(name)
        if shards is None:
            shards = self._prepared()
        if name is not None and shards.directory.name != name:
            raise ValueError(
                f"the run was trained on {name}, and its source now gives {shards.directory.name}: the texts changed. "
                f"Put the folder {name} back under {self.folder or cache_root()}, or point data.folder to where it is"
            )
        if is_address(self.folder):
            begin_fetching(shards, self.shuffle)
        return PreparedCorpus(shards, self.shuffle, at_hand=not is_address(self.folder))

    def _kept(self, name: str) -> TokenShards | None:
        """The prepared folder of that name, where there is one."""
        if is_address(self.folder):
            address = f"{check_address(str(self.folder))}/{name}"
            return open_stored(address, fetched_shards()) if ObjectStore(address).has(MANIFEST) else None
        directory = (Path(self.folder) if self.folder is not None else cache_root()) / name
        return open_prepared(directory) if directory.is_dir() else None

    def _prepared(self) -> TokenShards:
        with ExitStack() as stack:
            bars: list[Progress] = []

            def progress(stage: str, done: int, total: int | None) -> None:
                if stage != "fingerprint":  # which is all that happens where the data are prepared already
                    if not bars:
                        bars.append(stack.enter_context(shown_progress()))
                    bars[0](stage, done, total)

            return prepare_in(
                self.folder,
                self.source,
                self.tokenizer,
                val_fraction=self.val_fraction,
                shard_tokens=self.shard_tokens,
                num_workers=self.num_workers,
                progress=progress,
            )


ORDERS = ("windows", "shards")


def check_order(shuffle: str) -> str:
    """Raises ValueError for an order of samples that there is not."""
    if shuffle not in ORDERS:
        raise ValueError(f"data.shuffle={shuffle!r}: allowed are {', '.join(ORDERS)}")
    return shuffle


class PreparedCorpus:
    """A prepared folder. shuffle: ``windows`` of all shards together (``TokenWindows``), or ``shards``, one after the
    other (``ShardWindows``). at_hand: it lies on this machine whole."""

    def __init__(self, shards: TokenShards, shuffle: str = "windows", at_hand: bool = True) -> None:
        self.shards, self.shuffle, self.at_hand = shards, shuffle, at_hand

    @property
    def tokenizer(self) -> Tokenizer:
        return self.shards.tokenizer

    def identity(self) -> dict[str, Any]:
        manifest = self.shards.manifest
        order = {} if self.shuffle == "windows" else {"order": self.shuffle}
        return {
            **order,
            "shards": self.shards.directory.name,
            "fingerprint": manifest.source.get("fingerprint"),
            "tokenizer": manifest.tokenizer["name"],
            "tokenizer_digest": manifest.tokenizer["digest"],
        }

    def train_windows(self, sequence_tokens: int, seed: int) -> Windows:
        kind = TokenWindows if self.shuffle == "windows" else ShardWindows
        return kind(self.shards.train, sequence_tokens, seed)

    def validation(self, sequence_tokens: int, max_windows: int | None) -> ValidationSet:
        windows = ValidationWindows(self.shards.val, sequence_tokens, max_windows)
        return ValidationSet.single(windows, self.shards.val.tokens_per_byte)

    def check_unchanged(self) -> None:
        self.shards.check_unchanged()


def check_recorded(recorded: Mapping[str, Any] | None, identity: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError where a run was trained on other data than ``identity``'s."""
    if recorded is not None and recorded["shards"] != identity["shards"]:
        raise ValueError(
            f"the run was trained on {recorded['shards']}, and the data are {identity['shards']} now: they changed. "
            f"{remedy}"
        )
