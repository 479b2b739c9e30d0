"""results/baselines.py: each classifier is the one that it names, on the features that it says."""

import json
import zlib

import numpy as np
import pytest
import torch

from conftest import fails, load, needs_shared_data, run
from test_results import RESULTS, read_json


def test_baselines_of_omniglot_need_omniglot(glyphs_dir):
    result = run("results", "omniglot", "--data-dir", glyphs_dir, script="baselines.py")
    fails(result, "--data-dir", "[25, 20, 28, 28, 1] found, Omniglot's [1292, 20, 28, 28, 1] expected")


def test_baselines_of_an_encoder_need_its_features(tmp_path):
    name, what = "simclr/prototypical-512/seed0", tmp_path / "features.json"
    fails(run("results", name, "--data-dir", tmp_path, script="baselines.py"), what, "not found")
    args = read_json(RESULTS / name / "config.json")["args"]
    for text, words in (
        ("{", "not readable"),
        ("{}", "None found"),
        (json.dumps(args | {"loss": "nt-xent"}), "loss nt-xent found"),
        (json.dumps(args), "train_features.npy: not a readable"),
    ):
        what.write_text(text)
        fails(run("results", name, "--data-dir", tmp_path, script="baselines.py"), tmp_path, words)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}_features.npy", np.zeros((600, 4), np.float32))
    result = run("results", name, "--data-dir", tmp_path, script="baselines.py")
    fails(result, "other features than features.json")
    g, arrays = np.random.default_rng(0), {}
    for split, size in (("train", 50), ("test", 1200)):
        arrays[split] = g.normal(3, 2, (size, 4)).astype(np.float32)
        np.save(tmp_path / f"{split}_features.npy", arrays[split])

    def describe(**more):
        crc32 = {split: zlib.crc32(np.load(tmp_path / f"{split}_features.npy")) for split in arrays}
        what.write_text(json.dumps(args | {"crc32": crc32} | more))

    describe()
    found = load("results", "baselines").load_features(tmp_path, name)
    expected = (arrays["test"] - arrays["train"].mean(0)) / arrays["train"].std(0, ddof=1)
    np.testing.assert_allclose(found, expected.reshape(2, 600, 4), rtol=1e-5, atol=1e-5)
    fails(run("results", name, "--data-dir", what, script="baselines.py"), what / what.name, "not readable")
    for each, size in ((150, 1200), (600, 1150)):  # own data, of other classes
        np.save(tmp_path / "test_features.npy", arrays["test"][:size])
        describe(images_per_class={"test": each})
        said = f"{size} test images, {each} a class found, 600 expected"
        fails(run("results", name, "--data-dir", tmp_path, script="baselines.py"), said)
    np.save(tmp_path / "test_features.npy", arrays["test"])
    describe(lda=4)  # coordinates keep their scales
    found = load("results", "baselines").load_features(tmp_path, name)
    assert np.array_equal(found, arrays["test"].reshape(2, 600, 4))
    kept = "simclr/neighbours/seed0"
    what.write_text(json.dumps(read_json(RESULTS / kept / "config.json")["args"]))
    fails(run("results", kept, "--data-dir", tmp_path, script="baselines.py"), "encoder_crc32 None found")
    fails(run("results", "omniglot/canonical/seed0", script="baselines.py"), "RUN")


def test_each_baseline_is_the_classifier_that_it_names(glyphs_dir, tmp_path, monkeypatch):
    baselines, used = load("results", "baselines"), []
    (tmp_path / "omniglot").mkdir()
    monkeypatch.setattr(baselines, "RESULTS", tmp_path)
    monkeypatch.setattr(baselines, "CELLS", {"omniglot": ([5], [1])})
    monkeypatch.setattr(baselines, "EPISODES", 20)
    monkeypatch.setattr("sys.argv", ["baselines.py", "omniglot", "--data-dir", str(glyphs_dir)])
    baselines.main()
    said = read_json(tmp_path / "omniglot/baselines.json")
    x = load("omniglot", "dataloader").as_float(torch.from_numpy(np.load(glyphs_dir / "test.npy"))).flatten(2)
    episodes = baselines.draw_episodes(x, 5, 1, 15, 20, baselines.TEST_SEED)
    expected = load("simclr", "fewshot").nearest_mean(x.flatten(0, 1), episodes, 1).mean().item()
    found = {name: cells["5way1shot"]["accuracy"] for name, cells in said.items()}
    assert found["nearest mean on the drawings"] == pytest.approx(expected)
    assert len(found) == len(set(found.values())) == 4
    monkeypatch.setattr(baselines, "classify", lambda *how: used.append(how[2:]) or torch.zeros(20, 75, 5))
    for how in baselines.CLASSIFIERS.values():
        baselines.accuracies(x, 5, 1, *how)
    assert used == [(0, "unit"), (10, "unit"), (10, "tied-full")]


@needs_shared_data
def test_the_drawings_themselves_score_what_the_baselines_say(omniglot_dir):
    baselines, pose = load("results", "baselines"), load("omniglot", "pose")
    x = load("omniglot", "dataloader").as_float(torch.from_numpy(np.load(omniglot_dir / "test.npy")))
    features = pose.canonical(x, pose.pose(x)).flatten(2)
    said = read_json(RESULTS / "omniglot/baselines.json")["EM on drawings without their pose"]["5way1shot"]
    assert abs(baselines.accuracies(features, 5, 1, 10).mean().item() - said["accuracy"]) < 0.02
