import pytest

from qtrain.data.sources import Document, StdlibSource, TextFilesSource, fingerprint_documents


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def library(tmp_path):
    """A miniature standard library with everything that must be left out."""
    root = tmp_path / "python3"
    for name in (
        "os.py",
        "json/decoder.py",
        "test/test_os.py",
        "idlelib/idle_test/t.py",
        "lib2to3/tests/t.py",
        "site-packages/numpy.py",
        "json/__pycache__/x.py",
        "testing.py",
    ):
        write(root / name, f"# {name}\n")
    write(root / "zz_latin1.py", b"# caf\xe9\n")
    write(root / "notes.txt", "no source")
    return root


def test_stdlib_leaves_out_tests_and_foreign_folders(library):
    source = StdlibSource(root=library)
    assert [d.id for d in source.documents()] == ["json/decoder.py", "os.py", "testing.py"]
    assert source.skipped == ("zz_latin1.py",)
    with_tests = StdlibSource(root=library, include_tests=True)
    assert [d.id for d in with_tests.documents()] == [
        "idlelib/idle_test/t.py",
        "json/decoder.py",
        "lib2to3/tests/t.py",
        "os.py",
        "test/test_os.py",
        "testing.py",
    ]
    assert with_tests.name != source.name


def test_the_running_library_is_a_usable_corpus():
    source = StdlibSource()
    ids, size = [], 0
    for document in source.documents():
        ids.append(document.id)
        size += len(document.text)
    assert ids == sorted(ids)
    assert len(ids) > 300
    assert size > 5e6
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(i.split("/")[:-1]) for i in ids)
    assert source.fingerprint() == StdlibSource().fingerprint()


def test_a_folder_without_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.py files.*TextFilesSource"):
        StdlibSource(root=tmp_path).fingerprint()


def test_fingerprint_sees_ids_texts_order_and_boundaries():
    documents = [Document("a", "x"), Document("b", "y")]
    changed = [
        [Document("a", "x"), Document("b", "z")],
        [Document("a", "x"), Document("c", "y")],
        documents[::-1],
        documents[:1],
        [Document("ax", ""), Document("b", "y")],
        [Document("a", "xb"), Document("", "y")],
    ]
    digests = {fingerprint_documents(d) for d in [documents, *changed]}
    assert len(digests) == len(changed) + 1
    assert fingerprint_documents(iter(documents)) in digests


def test_text_files_by_file_folder_and_glob(tmp_path):
    for name in ("a.txt", "sub/b.md", "sub/deep/c.txt", "sub/code.py"):
        write(tmp_path / name, name)
    everything = [d.id for d in TextFilesSource(tmp_path).documents()]
    assert everything == ["a.txt", "sub/b.md", "sub/deep/c.txt"]
    assert [d.id for d in TextFilesSource(str(tmp_path / "**/*.txt")).documents()] == [
        "a.txt",
        "sub/deep/c.txt",
    ]
    assert [d.id for d in TextFilesSource([tmp_path / "sub/code.py"]).documents()] == ["code.py"]
    twice = TextFilesSource([tmp_path / "a.txt", tmp_path / "*.txt"])
    assert [d.text for d in twice.documents()] == ["a.txt"]
    with pytest.raises(FileNotFoundError, match=r"nothing\*.*glob"):
        list(TextFilesSource(str(tmp_path / "nothing*")).documents())


def test_the_id_does_not_depend_on_where_the_files_lie(tmp_path):
    for root in ("here", "there/far"):
        write(tmp_path / root / "a/x.txt", "x")
        write(tmp_path / root / "b/y.txt", "y")
    prints = {TextFilesSource(tmp_path / root).fingerprint() for root in ("here", "there/far")}
    assert len(prints) == 1


def test_line_ends_survive(tmp_path):
    write(tmp_path / "a.txt", b"one\r\ntwo\n")
    assert next(TextFilesSource(tmp_path).documents()).text == "one\r\ntwo\n"


def test_separator_cuts_a_file_into_documents(tmp_path):
    write(tmp_path / "a.txt", "one<|endoftext|>two<|endoftext|>  \n<|endoftext|>three")
    documents = list(TextFilesSource(tmp_path, separator="<|endoftext|>").documents())
    assert documents == [Document("a.txt#0", "one"), Document("a.txt#1", "two"), Document("a.txt#3", "three")]
    with pytest.raises(ValueError, match="separator ''"):
        TextFilesSource(tmp_path, separator="")


def test_files_that_are_no_utf8_are_skipped_and_listed(tmp_path):
    write(tmp_path / "bad.txt", b"\xff\xfe\x00")
    write(tmp_path / "good.txt", "good")
    source = TextFilesSource(tmp_path)
    assert [d.id for d in source.documents()] == ["good.txt"]
    assert source.skipped == ("bad.txt",)
