"""``clip-jax inspect`` counts what is in a source, and shows it."""

from clip_jax.commands import main
from tests.data.shards import jpeg, sample, write_shard


def test_it_counts_sizes_captions_duplicates_and_faults(tmp_path, capsys):
    samples = [sample(i) for i in range(8)]
    samples[3] |= {"jpg": jpeg(3)[:200]}
    samples[4] |= {"txt": b" "}
    samples[5] |= {"jpg": jpeg(0, size=(100, 20)), "txt": b"<b>wide</b>"}
    samples[6] |= {"jpg": jpeg(1), "txt": b"picture number 2"}
    path, html = write_shard(tmp_path / "0.tar", samples), tmp_path / "page.html"
    assert main(["inspect", f"tar:{path}", f"--html={html}"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}
    assert shown["examples"] == "8, of which 8 were read"
    assert "1 undecodable image" in shown["unusable"] and "1 empty caption" in shown["unusable"]
    assert shown["captions"] == "6; 1 repeat another example's"
    assert shown["images"].startswith("1 repeat")
    assert shown["width (px)"].startswith("40 / 40 / 40 /") and shown["width (px)"].endswith("/ 100")
    assert shown["width / height"].endswith("/ 5")
    page = html.read_text()
    assert page.count("data:image/jpeg") == 6 and "&lt;b&gt;wide&lt;/b&gt;" in page and "0.tar/000000005" in page


def test_a_source_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["inspect", f"tar:{tmp_path}/none.tar"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["inspect", "shapes:train", "--examples=0"]) == 2
    assert main(["inspect", "shapes:heldout", "--examples=3", f"--html={tmp_path}/no/such/page.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err
