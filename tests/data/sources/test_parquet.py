import pyarrow
import pyarrow.parquet
import pytest

from qtrain.data.sources import Document, ParquetSource


def write(path, columns, **more):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **more)


def test_rows_over_groups_and_files_in_order(tmp_path):
    texts = [f"text {i} \u2028" for i in range(7)]
    write(tmp_path / "a.parquet", {"id": list(range(7)), "text": texts}, row_group_size=3)
    write(tmp_path / "b.parquet", {"text": pyarrow.array(["last"], pyarrow.large_string())})
    found = list(ParquetSource(tmp_path).documents())
    assert found == [Document(f"a.parquet#{i}", t) for i, t in enumerate(texts)] + [
        Document("b.parquet#0", "last")
    ]


def test_a_group_is_decoded_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("qtrain.data.sources.parquet._BATCH_ROWS", 2)
    write(tmp_path / "a.parquet", {"text": list("abcde")})
    assert [d.id[-1] + d.text for d in ParquetSource(tmp_path).documents()] == ["0a", "1b", "2c", "3d", "4e"]


def test_nulls_are_counted_and_dictionaries_are_strings(tmp_path):
    write(tmp_path / "a.parquet", {"body": pyarrow.array(["x", None, "x"]).dictionary_encode()})
    source = ParquetSource(tmp_path, column="body")
    assert [d.text for d in source.documents()] == ["x", "x"]
    assert source.skipped == ("a.parquet#1",)


def test_columns_that_cannot_be_read(tmp_path):
    write(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; it has body, n"):
        list(ParquetSource(tmp_path).documents())
    with pytest.raises(ValueError, match="'n' holds int64, no strings"):
        list(ParquetSource(tmp_path, column="n").documents())


def test_a_cut_file(tmp_path):
    write(tmp_path / "a.parquet", {"text": ["x" * 100] * 50})
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        list(ParquetSource(tmp_path).documents())
