"""Tables of images and captions, with the columns that other tools write."""

import csv
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.sources import BadSampleError, open_source, table
from clip_jax.errors import UserError
from tests.data.shards import jpeg


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


def write_csv(path, header, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def test_csv_and_tsv_tables_of_paths_as_openclip_takes_them(photos):
    rows = [[f"photos/{i}.jpg", f'a "photo", number {i}'] for i in range(4)]
    tabs = write_csv(photos / "a.csv", ["filepath", "title"], rows, "\t")
    commas = write_csv(photos / "b.csv", ["caption", "image"], [row[::-1] for row in rows])
    for path in (tabs, commas):
        source = open_source(f"csv:{path}", image_size=32)
        assert [(s.image, s.captions) for s in source] == [(jpeg(i), (f'a "photo", number {i}',)) for i in range(4)]
        assert source[2].key == f"{photos}/photos/2.jpg"
        assert open_source(f"csv:{path}", caption="txt_lines")[0].captions == source[0].captions, (
            "a column's usual name"
        )
    named = write_csv(photos / "c.csv", ["where", "de", "en"], [[str(photos / "photos/1.jpg"), "Bild", "picture"]])
    source = open_source(f"csv:{named}", image="where", caption="de=3,en=1")
    assert source[0].image == jpeg(1) and source[0].captions == ("Bild", "picture")
    assert source[0].shares == (0.75, 0.25)


@pytest.mark.parametrize("form", ["bytes", "hugging face", "path"])
def test_parquet_tables_of_bytes_or_paths_in_several_files(photos, form, monkeypatch):
    monkeypatch.setattr(table, "ROWS", 3)
    image = {
        "bytes": jpeg,
        "hugging face": lambda i: {"bytes": jpeg(i), "path": None},
        "path": lambda i: f"photos/{i}.jpg",
    }[form]
    for name, numbers in (("0", [0, 1]), ("1", [2, 3, 4])):
        rows = {
            "image": [image(i) for i in numbers],
            "text": [[f"one {i}", f"two {i}"] for i in numbers],
            "captions": [{"de": f"Bild {i}"} for i in numbers],
        }
        pq.write_table(pa.table(rows), photos / f"{name}.parquet", row_group_size=2)
    source = open_source(f"parquet:{photos}/{{0..1}}.parquet", caption="text")
    assert [(s.image, s.captions) for s in source] == [(jpeg(i), (f"one {i}", f"two {i}")) for i in range(5)]
    assert len(source) == 5 and source[4].key.endswith("photos/4.jpg" if form == "path" else "[4]")
    german = open_source(f"parquet:{photos}/0.parquet,{photos}/1.parquet", caption="captions.de")
    assert [s.captions for s in german] == [(f"Bild {i}",) for i in range(5)]
    assert german.fingerprint != source.fingerprint


def test_a_table_that_changed_is_read_again_and_is_other_data(photos):
    path = write_csv(photos / "a.csv", ["file", "caption"], [["photos/0.jpg", "one"], ["photos/1.jpg", "two"]])
    before = open_source(f"csv:{path}")
    (photos / "copy").mkdir()
    shutil.copy(path, photos / "copy")
    shutil.copytree(photos / "photos", photos / "copy" / "photos")
    assert open_source(f"csv:{photos}/copy/a.csv").fingerprint == before.fingerprint
    write_csv(path, ["file", "caption"], [["photos/0.jpg", "two"], ["photos/1.jpg", "one"]])
    after = open_source(f"csv:{path}")
    assert after[0].captions == ("two",) and after.fingerprint != before.fingerprint


def test_another_image_behind_a_path_is_other_data(photos):
    """Whether the paths are in a CSV or in Parquet; a table that holds the bytes has them in its own digest."""
    rows = [[f"photos/{i}.jpg", f"number {i}"] for i in range(5)]
    texts = [row[1] for row in rows]
    pq.write_table(pa.table({"image": [row[0] for row in rows], "caption": texts}), photos / "paths.parquet")
    within = [{"bytes": None, "path": row[0]} for row in rows]
    pq.write_table(pa.table({"image": within, "caption": texts}), photos / "hugging_face.parquet")
    names = [f"csv:{write_csv(photos / 'a.csv', ['file', 'caption'], rows)}"]
    names += [f"parquet:{photos}/{name}.parquet" for name in ("paths", "hugging_face")]
    before = [open_source(name) for name in names]
    assert [open_source(name).fingerprint for name in names] == [source.fingerprint for source in before]
    (photos / "photos" / "3.jpg").write_bytes(jpeg(99))
    after = [open_source(name) for name in names]
    assert all(new.fingerprint != old.fingerprint for new, old in zip(after, before, strict=True))
    # A run that recorded the table alone goes on.
    assert [source.former_fingerprint for source in after] == [source.former_fingerprint for source in before]
    (photos / "photos" / "3.jpg").unlink()
    assert open_source(names[0]).fingerprint != after[0].fingerprint


def test_bad_rows_are_faults_of_their_own_and_bad_tables_are_refused(photos):
    rows = [
        ["photos/0.jpg", "good"],
        ["photos/9.jpg", "absent"],
        ["", "none"],
        ["photos/1.jpg", " "],
        ["ftp://x/y", "x"],
    ]
    path = write_csv(photos / "a.csv", ["file", "caption"], rows)
    source = open_source(f"csv:{path}")
    assert source[0].captions == ("good",)
    for index, reason in enumerate(("no such file", "no image", "empty caption", "a URL that is none of"), 1):
        with pytest.raises(BadSampleError, match=reason):
            source[index]
    wrong = write_csv(photos / "b.csv", ["url", "alt"], [["x", "y"]])
    with pytest.raises(UserError, match=r"\(url, alt\) is called caption.*config.data.caption"):
        open_source(f"csv:{wrong}")
    with pytest.raises(UserError, match=r"no column captoin \(nearest: caption\)"):
        open_source(f"csv:{path}", caption="captoin")
    (photos / "short.csv").write_text("file,caption\na.jpg,one,more\n")
    with pytest.raises(UserError, match="row 2: 3 fields, not 2"):
        open_source(f"csv:{photos}/short.csv")
    (photos / "empty.csv").write_text("file,caption\n")
    with pytest.raises(UserError, match="no rows"):
        open_source(f"csv:{photos}/empty.csv")
    (photos / "no.parquet").write_text("no")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_source(f"parquet:{photos}/no.parquet")
