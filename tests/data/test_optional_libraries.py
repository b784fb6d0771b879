import sys

import pytest

from qtrain.data.optional_libraries import optional_library


def test_what_is_there_is_imported():
    assert optional_library("json.decoder", needed_for="x") is sys.modules["json.decoder"]


def test_what_is_missing_is_named_with_its_command():
    with pytest.raises(
        ImportError, match=r"the file x needs the library 'nothing_of_this'.*pip install nothing_of_this$"
    ):
        optional_library("nothing_of_this.part", needed_for="the file x")
    with pytest.raises(ImportError, match="pip install its-package"):
        optional_library("nothing_of_this", needed_for="x", package="its-package")


def test_a_library_that_is_broken_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("import something_else_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="something_else_missing"):
        optional_library("broken_library", needed_for="x")
