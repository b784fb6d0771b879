import json
from dataclasses import asdict

import numpy as np

from qtrain.data.manifest import Manifest, ShardInfo, SplitInfo, token_dtype


def test_dtype_boundary():
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")


def test_a_manifest_comes_back_from_its_json():
    shards = (ShardInfo("train-00000.bin", 3, 6, "ab"), ShardInfo("train-00001.bin", 1, 2, "cd"))
    splits = {"train": SplitInfo(4, 2, 9, shards), "val": SplitInfo(0, 0, 0, ())}
    tokenizer = {"name": "byte", "vocab_size": 257, "eot_token": 256}
    manifest = Manifest(tokenizer, "uint16", splits, {"name": "x"}, {"s": 1})
    assert Manifest.from_json(json.dumps(asdict(manifest))) == manifest
    assert manifest.vocab_size == 257
    assert manifest.format_version == 2
