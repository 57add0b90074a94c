"""A folder of images: where captions may be, the order of the samples, and the messages for what is refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_jax.data.sources.folder import open_folder
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.errors import UserError
from tests.data.shards import jpeg


def write(folder: Path, *images: str, texts: dict[str, str] | None = None) -> Path:
    """Images (each another picture) and text files, by their names relative to the folder."""
    for number, name in enumerate(images):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    for name, text in (texts or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    source = open_folder(str(folder))
    samples = [source[i] for i in range(len(source))]
    return {os.path.relpath(sample.key, folder): sample.captions for sample in samples}


def refusal(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_folder(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_file_beside_each_image_is_its_caption(tmp_path):
    write(tmp_path, "dog.jpg", "cat.PNG", "deep/er/bird.webp")
    write(tmp_path, texts={"dog.txt": "a dog\n", "cat.txt": "  a cat", "deep/er/bird.txt": "a bird\nthat sings"})
    assert captions(tmp_path) == {
        "cat.PNG": ("a cat",),
        "deep/er/bird.webp": ("a bird\nthat sings",),
        "dog.jpg": ("a dog",),
    }


def test_a_sample_holds_the_bytes_of_the_file_and_no_label(tmp_path):
    write(tmp_path, "dog.jpg", texts={"dog.txt": "a dog"})
    source = open_folder(str(tmp_path))
    assert source[0] == Sample(
        image=(tmp_path / "dog.jpg").read_bytes(), captions=("a dog",), key=str(tmp_path / "dog.jpg"), label=-1
    )
    assert (source.name, source.class_names, len(source)) == (f"folder:{tmp_path}", (), 1)
    with pytest.raises(IndexError):
        source[1]


def test_order_is_that_of_names_whatever_the_order_of_writing_or_of_the_list(tmp_path):
    write(tmp_path, "c.jpg", "a/z.jpg", "b.jpg", "a/y.jpg", texts={"captions.csv": "file,caption\n"})
    with open(tmp_path / "captions.csv", "a") as file:
        file.writelines(f"{name},about {name}\n" for name in ("b.jpg", "a/z.jpg", "c.jpg", "a/y.jpg"))
    assert list(captions(tmp_path)) == ["a/y.jpg", "a/z.jpg", "b.jpg", "c.jpg"]


def test_sub_folders_without_captions_are_classes_and_the_class_name_is_the_caption(tmp_path):
    write(tmp_path, "tabby cat/2.jpg", "dog/1.jpg", "dog/puppies/3.jpg", texts={"README.txt": "Collected by Ada."})
    source = open_folder(str(tmp_path))
    assert source.class_names == ("dog", "tabby cat")
    assert [(source[i].captions, source[i].label) for i in range(3)] == [
        (("dog",), 0),
        (("dog",), 0),
        (("tabby cat",), 1),
    ]


def test_hidden_files_are_left_alone(tmp_path):
    write(tmp_path, "dog.jpg", "._dog.jpg", ".thumbnails/dog.jpg", texts={"dog.txt": "a dog", "._dog.txt": "junk"})
    assert list(captions(tmp_path)) == ["dog.jpg"]


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_caption_is_a_fault_of_its_sample_alone(tmp_path, text):
    write(tmp_path, "cat.jpg", "dog.jpg", texts={"dog.txt": "a dog", "cat.txt": text})
    source = open_folder(str(tmp_path))
    with pytest.raises(BadSampleError, match=r"cat\.jpg: empty caption"):
        source[0]
    assert source[1].captions == ("a dog",)


def test_an_empty_caption_among_others_is_dropped(tmp_path):
    lines = ['{"file": "a.jpg", "caption": ["", "a dog"]}', '{"file": "b.jpg", "caption": []}']
    write(tmp_path, "a.jpg", "b.jpg", texts={"captions.jsonl": "\n".join(lines)})
    source = open_folder(str(tmp_path))
    assert source[0].captions == ("a dog",)
    with pytest.raises(BadSampleError, match="empty caption"):
        source[1]


def test_an_image_that_vanishes_later_is_an_os_error_that_may_pass(tmp_path):
    write(tmp_path, "dog.jpg", texts={"dog.txt": "a dog"})
    source = open_folder(str(tmp_path))
    (tmp_path / "dog.jpg").unlink()
    with pytest.raises(OSError, match=r"dog\.jpg"):
        source[0]


def test_threads_read_what_one_thread_reads(tmp_path):
    names = [f"{i:02}" for i in range(40)]
    write(tmp_path, *(f"{n}.jpg" for n in names), texts={f"{n}.txt": f"number {n}" for n in names})
    source = open_folder(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, range(40))) == [source[i] for i in range(40)]


def test_the_fingerprint_is_of_names_content_and_captions_and_of_nothing_else(tmp_path):
    def make(name, images=("a.jpg", "b.jpg"), texts=("one", "two")):
        folder = write(tmp_path / name, *images)
        write(
            folder,
            texts={str(Path(image).with_suffix(".txt")): text for image, text in zip(images, texts, strict=True)},
        )
        return folder

    def fingerprint(folder):
        return open_folder(str(folder)).fingerprint

    one = make("one")
    known = fingerprint(one)
    assert fingerprint(make("copy")) == known
    listed = write(
        tmp_path / "listed", "a.jpg", "b.jpg", texts={"captions.csv": "file,caption\nb.jpg,two\na.jpg,one\n"}
    )
    assert fingerprint(listed) == known, "the same pairs, wherever the captions stand"
    assert fingerprint(make("renamed", images=("a.jpg", "c.jpg"))) != known
    assert fingerprint(make("retold", texts=("one", "three"))) != known
    assert fingerprint(make("more", images=("a.jpg", "b.jpg", "c.jpg"), texts=("one", "two", "three"))) != known
    content = bytearray((one / "a.jpg").read_bytes())
    content[len(content) // 2] ^= 255  # of the same size
    (one / "a.jpg").write_bytes(content)
    assert fingerprint(one) != known
    assert open_folder(str(one)).former_fingerprint == open_folder(str(listed)).former_fingerprint


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("no images here")
    assert "no images in it or below it; images end in .jpg" in refusal(tmp_path)
    assert "absent: no such folder; give a folder of images" in refusal(tmp_path / "absent")
    assert "notes.md: is a file; give a folder" in refusal(tmp_path / "notes.md")
    assert "folder:: no such folder" in refusal("")


def test_images_without_captions_are_counted_and_the_first_is_named(tmp_path):
    write(tmp_path, "a.jpg", "b.jpg", "c.jpg", texts={"a.txt": "an a"})
    message = refusal(tmp_path)
    assert f"{tmp_path}/b.jpg: 2 images have no caption" in message
    assert "write b.txt beside it" in message


@pytest.mark.parametrize(
    "images", [("a.jpg", "b.jpg"), ("all/a.jpg", "all/b.jpg"), ("dogs/a.jpg", "cats/b.jpg", "c.jpg")]
)
def test_loose_images_or_a_single_sub_folder_are_no_classes(tmp_path, images):
    assert "have no caption" in refusal(write(tmp_path, *images))


def test_texts_elsewhere_are_not_overlooked_and_folders_taken_for_classes(tmp_path):
    write(tmp_path, "images/a.jpg", "other/b.jpg", texts={"texts/a.txt": "an a"})
    assert "because of texts/a.txt, subfolders are not read as classes" in refusal(tmp_path)


def test_captions_in_two_places_are_refused(tmp_path):
    both = {"captions.csv": "file,caption\na.jpg,an a\n", "captions.jsonl": '{"file": "a.jpg", "caption": "an a"}'}
    assert "captions in captions.csv and in captions.jsonl" in refusal(write(tmp_path / "lists", "a.jpg", texts=both))
    both = {"captions.csv": "file,caption\na.jpg,an a\n", "a.txt": "another a"}
    assert "captions in captions.csv and in a.txt" in refusal(write(tmp_path / "texts", "a.jpg", texts=both))


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "a.txt"])
def test_captions_that_are_not_utf8_are_refused(tmp_path, name):
    write(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes("café".encode("latin-1"))
    assert f"{name}: not UTF-8 text (byte 3); save it as UTF-8" in refusal(tmp_path)


def test_split_folders_are_not_taken_for_classes(tmp_path):
    write(tmp_path, "train/dog/1.jpg", "train/cat/2.jpg", "val/dog/3.jpg")
    message = refusal(tmp_path)
    assert "train, val are splits, not classes" in message
    assert f"folder:{tmp_path}/train" in message
    assert open_folder(str(tmp_path / "train")).class_names == ("cat", "dog")


def test_numbered_split_folders_are_not_taken_for_classes(tmp_path):
    assert "train2017, val2017 are splits" in refusal(write(tmp_path, "train2017/1.jpg", "val2017/2.jpg"))


def test_a_class_without_images_is_refused_because_it_would_renumber_the_others(tmp_path):
    write(tmp_path, "cat/1.jpg", "dog/2.jpg", texts={"bird/.keep": ""})
    assert "bird: a class without images" in refusal(tmp_path)


def test_links_inside_the_folder_are_images_of_their_own(tmp_path):
    write(tmp_path, "a.jpg", texts={"a.txt": "an a", "b.txt": "a b"})
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    source = open_folder(str(tmp_path))
    assert (source[1].captions, source[1].image) == (("a b",), source[0].image)


@pytest.mark.parametrize("target", ["outside/a.jpg", "outside", "nowhere.jpg"])
def test_links_that_lead_out_of_the_folder_or_nowhere_are_refused(tmp_path, target):
    write(tmp_path / "outside", "a.jpg")
    folder = write(tmp_path / "inside", "a.jpg", texts={"a.txt": "an a"})
    link = folder / ("linked" if target == "outside" else "linked.jpg")
    link.symlink_to(tmp_path / target)
    assert refusal(folder).startswith(f"{link}: a link that is broken or leads out of {folder} (1 in all)")


def test_a_folder_that_is_itself_a_link_is_read(tmp_path):
    write(tmp_path / "real", "a.jpg", texts={"a.txt": "an a"})
    (tmp_path / "alias").symlink_to("real")
    assert captions(tmp_path / "alias") == {"a.jpg": ("an a",)}


def test_a_link_to_another_disk_is_followed_within_the_bound_that_the_message_names(tmp_path):
    write(tmp_path / "disk/deep", "a.jpg", "b.jpg"), write(tmp_path / "disk/more", "c.jpg")
    folder = write(tmp_path / "subset", texts={"a.txt": "an a", "sub/c.txt": "a c"})
    (folder / "a.jpg").symlink_to(tmp_path / "disk/deep/a.jpg")
    (folder / "sub/c.jpg").symlink_to(tmp_path / "disk/more/c.jpg")
    assert f"(2 in all); set config.data.links_to={tmp_path}/disk or copy the files there" in refusal(folder)
    source = open_folder(str(folder), links_to=f"{tmp_path}/disk")
    assert [source[i].captions for i in range(len(source))] == [("an a",), ("a c",)]
    with pytest.raises(UserError, match="leads out"):
        open_folder(str(folder), links_to=f"{tmp_path}/disk/deep")


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    write(tmp_path / "disk", "cats/a.jpg", texts={"cats/a.txt": "a cat"})
    folder = write(tmp_path / "subset", "own/b.jpg", texts={"own/b.txt": "a b"})
    (folder / "linked").symlink_to(tmp_path / "disk/cats")
    (folder / "own/up").symlink_to(folder)
    (tmp_path / "disk/cats/round").symlink_to(folder / "own")
    source = open_folder(str(folder), links_to=str(tmp_path))
    names = [os.path.relpath(source[i].key, folder) for i in range(len(source))]
    assert {"linked/a.jpg", "own/b.jpg"} <= set(names) and len(names) < 20


@pytest.mark.parametrize("ending", ["gif", "bmp", "tiff", "jfif", "avif", "JPE"])
def test_images_of_all_usual_endings_are_read(tmp_path, ending):
    write(tmp_path, f"x.{ending}", texts={"x.TXT": "an x"})
    assert captions(tmp_path) == {f"x.{ending}": ("an x",)}


def test_an_image_that_is_not_read_is_named_beside_its_text(tmp_path):
    write(tmp_path, "a.jpg", "b.heic", texts={"a.txt": "an a", "b.txt": "a b"})
    assert "b.txt: 1 text files have no image of the same name beside them, this is the first (b.heic is not read;" in (
        refusal(tmp_path)
    )


def test_a_few_without_their_other_half_are_left_out_and_reported(tmp_path):
    write(
        tmp_path, *(f"{i}.jpg" for i in range(12)), "clip.mov", texts={f"{i}.txt": f"number {i}" for i in range(2, 14)}
    )
    source = open_folder(str(tmp_path))
    assert len(source) == 10
    assert source.notes == (
        "left out: 2 captions without an image (first: 12.txt)",
        "left out: 2 images without a caption (first: 0.jpg)",
        "left out: 1 files that are not read, ending in .mov (first: clip.mov)",
    )
    with pytest.raises(UserError, match="2 images have no caption"):
        open_folder(str(tmp_path), max_bad_share=0.003)


def test_names_of_folders_as_captions_are_reported(tmp_path):
    write(tmp_path, "cat/1.jpg", "dog/2.jpg", "owl/3.jpg", "pig/4.jpg")
    assert open_folder(str(tmp_path)).notes == ("captions are the names of its 4 folders: cat, dog, owl, ...",)


def test_captions_from_another_place_than_the_setting_names_are_reported(tmp_path):
    """A caption setting may be that of another source; a mistyped one must not pass in silence."""
    table = write(tmp_path / "table", "a.jpg", texts={"captions.csv": "file,caption,de\na.jpg,an a,ein A\n"})
    assert open_folder(str(table), caption="de").notes == open_folder(str(table)).notes == ()
    for setting, column in (("captoin", "caption"), ("de=3,caption=1", "de")):
        assert open_folder(str(table), caption=setting).notes == (f"captions are the column {column} of captions.csv",)
    beside = write(tmp_path / "beside", "a.jpg", texts={"a.txt": "an a"})
    said = open_folder(str(beside), caption="de").notes
    assert said == ("captions are the .txt files: no image has a .json with de",)


def test_fields_beside_an_image_have_their_shares(tmp_path):
    about = json.dumps({"captions": {"de": ["ein A", "das A"], "en": "an A"}})
    write(tmp_path, "a.jpg", texts={"a.json": about, "a.txt": "A\nB"})
    found = open_folder(str(tmp_path), caption="captions.de=2,captions.en=2,txt_lines=4")
    assert found[0].captions == ("ein A", "das A", "an A", "A", "B")
    assert found[0].shares == (0.125, 0.125, 0.25, 0.25, 0.25)
    others = open_folder(str(tmp_path), caption="captions.de=2,captions.en=2,txt_lines=5")
    assert others.fingerprint != found.fingerprint
    # Two settings that are for other sources of a mixture.
    assert open_folder(str(tmp_path), caption="txt_lines=3,txt")[0].captions == ("A", "B", "A\nB")


def test_img2dataset_files_are_read_from_their_json_and_never_taken_for_classes(tmp_path):
    about = {f"0000{i}/{i}.json": json.dumps({"caption": f"number {i}", "url": f"http://{i}"}) for i in range(2)}
    write(tmp_path, "00000/0.jpg", "00001/1.jpg", texts=about | {"00000_stats.json": "{}"})
    assert "0.json: a .json beside each image" in refusal(tmp_path)
    assert "set config.data.caption to a field of it (caption, url)" in refusal(tmp_path)
    source = open_folder(str(tmp_path), caption="caption")
    assert [source[i].captions for i in range(2)] == [("number 0",), ("number 1",)] and source.class_names == ()
    with pytest.raises(UserError, match=r"captoin: .* \(nearest: caption\); with text there are caption, url"):
        open_folder(str(tmp_path), caption="captoin")


def test_a_text_may_have_a_caption_per_line(tmp_path):
    write(tmp_path, "x.jpg", texts={"x.txt": "an x\n\n a cross \n"})
    assert open_folder(str(tmp_path), caption="txt_lines")[0].captions == ("an x", "a cross")
    assert open_folder(str(tmp_path))[0].captions == ("an x\n\n a cross",)


def test_a_name_that_is_not_utf8_is_a_file_like_others_and_valid_in_messages(tmp_path):
    for ending, data in ((b"jpg", jpeg(1)), (b"txt", b"a cafe")):
        (tmp_path / os.fsdecode(b"caf\xe9." + ending)).write_bytes(data)
    source = open_folder(str(tmp_path))
    assert source[0] == Sample(image=jpeg(1), captions=("a cafe",), key=f"{tmp_path}/caf\\xe9.jpg", label=-1)
    write(tmp_path / "classes", os.fsdecode(b"caf\xe9/a.jpg"), "dog/b.jpg")
    assert refusal(tmp_path / "classes").endswith("caf\\xe9: the name of a class is not valid text; rename the folder")


def test_captions_are_valid_unicode(tmp_path):
    write(
        tmp_path, "a.jpg", texts={"captions.jsonl": r'{"file": "a.jpg", "caption": "half \ud83d, whole \ud83d\ude00"}'}
    )
    assert open_folder(str(tmp_path))[0].captions == ("half \ufffd, whole \U0001f600",)
