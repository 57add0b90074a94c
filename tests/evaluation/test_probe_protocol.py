"""The probe of an evaluation: its curve ends with all images and meets zero-shot; features before the projection; the
training splits of CLIP_benchmark's layout."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation import datasets, probe, runner
from clip_jax.evaluation.probe_protocol import FewShot, few_shot, probes
from clip_jax.evaluation.subject import Subject
from clip_jax.models.resnet import ResNetTower
from tests.data.shards import jpeg, write_shard
from tests.evaluation.test_every_protocol import model, task_of
from tests.evaluation.test_probe import blobs
from tests.evaluation.test_protocols import evaluation, weights
from tests.models.test_clip import SMALL, computed, inputs, params_of


def test_the_curve_ends_with_all_images():
    train, test = blobs(36), blobs(40, seed=1)
    found = few_shot(train, test, 4)
    assert found.of_all == probe.ridge(*train, 4).accuracy(*test)
    assert list(found.curve) == [1, 2, 4, 8, 9] and found.curve[9] == [found.of_all]
    assert list(found.means()) == ["1_shot", "2_shot", "4_shot", "8_shot", "all_shot"]
    assert list(FewShot({1: [0.1], 2: [0.2]}, 2.0, 0.3).curve.values()) == [[0.1], [0.3]]  # all images are two shots


def test_the_result_has_the_shots_that_equal_zero_shot():
    task = task_of("probe")
    found = runner.run(task, [model(constant=False)])
    zero_shot = runner.run(task._replace(protocol="zero_shot"), [model(constant=False)]).metrics["top1"]
    curve = found.curves["few-shot"]
    assert [x for x, _ in curve] == [1, 2, 4, 8] and curve[-1][1] == found.metrics["all_shot"]
    expected = probe.shots_that_equal({x: [y] for x, y in curve}, zero_shot)
    assert found.metrics["shots_equal_zero_shot"] == expected
    assert found.prompts is not None
    assert "shots_equal_zero_shot" not in runner.run(task._replace(prompts=None), [model(constant=False)]).metrics


def test_the_features_before_the_projection_are_what_the_projection_takes():
    clip, image = computed(SMALL), inputs()[0]
    params = params_of(clip)
    pooled = clip.pool_image(params, image)
    assert pooled.shape == (4, 64)
    np.testing.assert_allclose(pooled @ params["image"]["projection"], clip.encode_image(params, image), atol=1e-5)
    without = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, projection=False), embed_dim=64)
    clip = computed(without)
    params = params_of(clip)
    assert jnp.array_equal(clip.pool_image(params, image), clip.encode_image(params, image))
    resnet = computed(dataclasses.replace(SMALL, image=ResNetTower(64, (1, 1, 1, 1), 8, 4)))
    with pytest.raises(UserError, match="a ResNet has no features before the projection"):
        resnet.pool_image({}, image)


@pytest.fixture
def benchmark(tmp_path):
    """A set in CLIP_benchmark's layout with a training split, and one without."""
    for name, split, count in (("wds_pets", "test", 6), ("wds_pets", "train", 12), ("wds_cars", "test", 6)):
        folder = tmp_path / name / split
        folder.mkdir(parents=True)
        write_shard(folder / "0.tar", [{"jpg": jpeg(i + count), "cls": str(i % 3).encode()} for i in range(count)])
        (folder / "nshards.txt").write_text("1")
        (tmp_path / name / "classnames.txt").write_text("cat\ndog\nbird\n")
    return tmp_path


def tasks(folder):
    return tuple(map(runner.task_of, datasets.open_dataset(str(folder))))


def test_a_set_with_a_training_split_is_probed_by_its_features(benchmark):
    (task,) = probes(tasks(benchmark), pooled=False)
    assert (task.name, task.protocol, len(task.source), len(task.train)) == ("pets_probe", "probe", 6, 12)
    (pooled,) = probes(tasks(benchmark), pooled=True)
    assert (pooled.name, pooled.protocol) == ("pets_probe_pooled", "probe_pooled")
    subject = Subject("m", evaluation("zero_shot", task.source).embedder, weights(), 1.0, "")
    assert subject.embed(task.train, texts=False).images.shape == (12, SMALL.embed_dim)
    features = subject.pooled().embed(task.train, texts=False).images
    assert features.shape == (12, SMALL.image.width) and not np.allclose(np.linalg.norm(features, axis=1), 1)
    for each in (task, pooled):
        found = runner.run(each, [subject])
        assert found.examples == 6 and {"lp_acc1", "1_shot", "4_shot", "all_shot"} <= found.metrics.keys()
    seen = []
    recorded = subject.embedder.encoders.pooled
    encoders = subject.embedder.encoders._replace(pooled=lambda *a: seen.append(1) or recorded(*a))
    runner.run(pooled, [Subject("m", subject.embedder._replace(encoders=encoders), weights(), 1.0, "")])
    assert seen


def test_what_is_missing_of_a_training_split_is_said(benchmark):
    with pytest.raises(UserError, match=r"no set has train/nshards.txt"):
        probes(tasks(benchmark / "wds_cars"), pooled=False)
    (benchmark / "wds_pets" / "train" / "nshards.txt").write_text("2")
    with pytest.raises(UserError, match="wds_pets/train: 1 of 2 shards are missing"):
        probes(tasks(benchmark), pooled=False)
