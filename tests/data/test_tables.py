"""Captions in a table beside the images of a folder: captions.csv, captions.jsonl and those of other libraries."""

import json
import os
import unicodedata

import pytest

from clip_jax.data.sources.folder import open_folder
from tests.data.test_folder import captions, refusal, write


def test_captions_csv_gives_a_file_all_its_rows_and_may_have_other_columns(tmp_path):
    write(tmp_path, "dog.jpg", "pets/cat.jpg")
    rows = ["file,author,caption", "pets/cat.jpg,Ada,a cat", './dog.jpg,Bea,"a dog, wet"', "dog.jpg,Eve,a hound"]
    (tmp_path / "captions.csv").write_bytes("\r\n".join(rows).encode("utf-8-sig"))  # As spreadsheets write it.
    assert captions(tmp_path) == {"dog.jpg": ("a dog, wet", "a hound"), "pets/cat.jpg": ("a cat",)}


def test_captions_jsonl_gives_one_caption_or_a_list(tmp_path):
    lines = [
        {"file": "dog.jpg", "caption": ["a dog", "ein Hund"]},
        {"file": "cat.jpg", "caption": "a\u2028cat", "id": 3},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    write(tmp_path, "dog.jpg", "cat.jpg", texts={"captions.jsonl": text + "\n"})
    assert captions(tmp_path) == {"cat.jpg": ("a\u2028cat",), "dog.jpg": ("a dog", "ein Hund")}


def test_a_list_finds_a_file_whose_accents_the_file_system_spells_otherwise(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
    assert composed != decomposed
    write(tmp_path, decomposed, texts={"captions.csv": f"file,caption\n{composed},a café\n"})
    assert list(captions(tmp_path).values()) == [("a café",)]


def test_images_missing_from_the_list_are_refused(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg", texts={"captions.jsonl": '{"file": "a.jpg", "caption": "an a"}'})
    message = refusal(tmp_path)
    assert "b.jpg: 1 images have no caption" in message
    assert "because of captions.jsonl" in message


def test_a_caption_for_a_file_that_is_not_there_is_refused(tmp_path):
    folder = write(
        tmp_path / "csv", "a.jpg", texts={"captions.csv": "file,caption\na.jpg,an a\nb.jpg,a b\nc.gif,a c\n"}
    )
    assert f"captions.csv, line 3: b.jpg is not an image in {folder} (2 such lines)" in refusal(folder)
    folder = write(tmp_path / "outside", "a.jpg", texts={"captions.csv": "file,caption\n../csv/a.jpg,an a\n"})
    assert "line 2: ../csv/a.jpg is not an image" in refusal(folder)
    folder = write(tmp_path / "txt", "a.jpg", texts={"a.txt": "an a", "b.txt": "a b"})
    assert "b.txt: 1 text files have no image of the same name" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: the columns are none; it needs file and caption"),
        ("name,words\na.jpg,an a\n", "line 1: the columns are name, words; it needs file and caption"),
        ("file,caption\na.jpg,an a, red\n", 'line 2: not 2 fields; put a caption with commas in it between "quotes"'),
        ("file,caption\na.jpg\n", "line 2: not 2 fields"),
        ("file,caption\n\na.jpg,an a\n\na.jpg\n", "line 5: not 2 fields"),
        ('file,caption\na.jpg,an a\na.jpg,"a\nb\nc\n', "after line 2: unexpected end of data; close the quotes there"),
    ],
)
def test_a_malformed_csv_is_refused_with_its_line(tmp_path, text, said):
    assert f"captions.csv, {said}" in refusal(write(tmp_path, "a.jpg", texts={"captions.csv": text}))


@pytest.mark.parametrize(
    "line",
    ["{", '["a.jpg", "an a"]', '{"file": "a.jpg"}', '{"file": "a.jpg", "caption": 3}', '{"file": 1, "caption": "a"}'],
)
def test_a_malformed_jsonl_is_refused_with_its_line(tmp_path, line):
    text = '{"file": "a.jpg", "caption": "an a"}\n' + line
    said = refusal(write(tmp_path, "a.jpg", texts={"captions.jsonl": text}))
    assert 'captions.jsonl, line 2: not of the form {"file": "dog.jpg", "caption": "a dog"}' in said


def test_lines_of_a_table_without_a_file_are_left_out_and_reported(tmp_path):
    lines = "".join(f"{i}.jpg,number {i}\n" for i in range(8))
    write(tmp_path, *(f"{i}.jpg" for i in range(6)), texts={"captions.csv": f"file,caption\n{lines}"})
    source = open_folder(str(tmp_path))
    assert len(source) == 6
    assert source.notes == ("left out: 2 lines of captions.csv without an image (first: line 8)",)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("metadata.jsonl", '{"file_name": "deep/a.jpg", "text": "an a"}\n{"file_name": "b.jpg", "text": "a b"}\n'),
        ("metadata.csv", "file_name,text\nb.jpg,a b\ndeep/a.jpg,an a\n"),
        ("train.csv", "filepath\ttitle\n{root}/deep/a.jpg\tan a\n{root}/b.jpg\ta b\n"),
        ("pairs.tsv", "filepath\ttitle\n{cwd}/deep/a.jpg\tan a\n{cwd}/b.jpg\ta b\n"),
        ("captions.tsv", "file\tcaption\ndeep/a.jpg\tan a\nb.jpg\ta b\n"),
    ],
)
def test_the_tables_of_other_libraries_are_read(tmp_path, table, text):
    text = text.replace("{root}", str(tmp_path)).replace("{cwd}", os.path.relpath(tmp_path))
    write(tmp_path, "deep/a.jpg", "b.jpg", texts={table: text})
    assert captions(tmp_path) == {"b.jpg": ("a b",), "deep/a.jpg": ("an a",)}


def test_a_table_may_name_images_without_their_folder_where_only_one_has_that_name(tmp_path):
    text = "image,caption\na.jpg,an a\na.jpg,still an a\nb.jpg,a b\n"
    write(tmp_path, "Images/a.jpg", "Images/b.jpg", texts={"captions.txt": text})
    assert captions(tmp_path) == {"Images/a.jpg": ("an a", "still an a"), "Images/b.jpg": ("a b",)}
    write(tmp_path, "more/a.jpg")
    assert "captions.txt, line 2: a.jpg is not an image" in refusal(tmp_path)


def test_a_table_of_something_else_leaves_captions_where_they_are_and_is_reported(tmp_path):
    write(tmp_path, "cat/a.jpg", "dog/b.jpg", texts={"sizes.csv": "name,bytes\na.jpg,3\n"})
    source = open_folder(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert "left out: 1 tables that are not read (first: sizes.csv)" in source.notes
    both = write(tmp_path / "both", "a.jpg", texts={"a.txt": "an a", "credits.csv": "file,title\na.jpg,Sunset No. 3\n"})
    assert captions(both) == {"a.jpg": ("an a",)}
