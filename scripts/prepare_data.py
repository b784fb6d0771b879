"""Prepare token shards ahead of a run and print what they hold.

python scripts/prepare_data.py                                    the standard library, bytes, the cache
python scripts/prepare_data.py --files 'corpus/**/*.txt' --out data/corpus
python scripts/prepare_data.py --files input.txt --separator '\\n\\n'
"""

from __future__ import annotations

import argparse

from qtrain.data.prepare import prepare, rich_progress
from qtrain.data.sources import StdlibSource, TextFilesSource, TextSource
from qtrain.data.tokenizers import get_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenize documents into token shards.")
    parser.add_argument(
        "--files", nargs="+", metavar="PATH", help="text files, folders or globs (default: stdlib)"
    )
    parser.add_argument("--separator", help="cut files into documents at this string; \\n means a newline")
    parser.add_argument(
        "--include-tests", action="store_true", help="the standard library with its test folders"
    )
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument(
        "--out", metavar="DIR", help="holds prepared folders (default: $QTRAIN_CACHE, ~/.cache)"
    )
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of documents (default 0.05)")
    return parser.parse_args()


def make_source(arguments: argparse.Namespace) -> TextSource:
    if arguments.files is None:
        if arguments.separator is not None:
            raise SystemExit("--separator cuts --files; the standard library has one document a file")
        return StdlibSource(include_tests=arguments.include_tests)
    if arguments.include_tests:
        raise SystemExit("--include-tests belongs to the standard library; leave it out with --files")
    separator = arguments.separator
    return TextFilesSource(
        arguments.files, separator=separator.replace("\\n", "\n") if separator is not None else None
    )


def main() -> None:
    arguments = parse_arguments()
    source, tokenizer = make_source(arguments), get_tokenizer(arguments.tokenizer)
    with rich_progress() as progress:
        shards = prepare(
            source, tokenizer, arguments.out, val_fraction=arguments.val_fraction, progress=progress
        )
    print(shards.directory)
    for split in (shards.train, shards.val):
        info = split.info
        print(
            f"{split.name:>6}: {info.tokens:,} tokens, {info.documents:,} documents, {info.text_bytes:,} bytes"
        )
    sides = shards.manifest.source["sides"]
    print(
        f"left out: {sides['exact_duplicate']} duplicates, {sides['near_duplicate']} near-duplicates of "
        f"validation documents, {len(shards.manifest.source['undecodable'])} files that are no UTF-8"
    )


if __name__ == "__main__":
    main()
