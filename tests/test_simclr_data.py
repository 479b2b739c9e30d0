"""SimCLR's program on data as a user has it: unprepared, other than before, real."""

import json
import shutil
import zipfile
import zlib

import numpy as np
import pytest

from conftest import ROOT, fails, needs_shared_data, run, shared_data
from test_simclr_cli import TINY, assert_same_run, read_features
from test_simclr_cli import data_dir, source_dir, whole_run  # noqa: F401


def test_the_original_layout_is_prepared_first(whole_run, source_dir, tmp_path):
    folder, features, _ = whole_run
    result = run(
        "simclr", "--data-dir", source_dir, *TINY, "--save-dir", tmp_path / "s", "--feature-save-dir",
        tmp_path / "f",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, features, tmp_path / "s", tmp_path / "f")
    assert (tmp_path / "s/data/classes.json").exists()


@pytest.fixture(scope="module")
def other_dir(source_dir, tmp_path_factory):
    """The data set of `source_dir` with two training images of one class changed for each other."""
    folder = shutil.copytree(source_dir, tmp_path_factory.mktemp("other") / "source")
    one, other = (folder / f"images/train0_{member}.jpg" for member in (0, 3))
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b), other.write_bytes(a)
    return folder


def test_arrays_of_other_images_are_not_used(source_dir, other_dir, tmp_path):
    folder, features = tmp_path / "s", tmp_path / "f"

    def start(source, *flags, place=folder):
        place = ["--save-dir", place, "--feature-save-dir", features]
        return run("simclr", "--data-dir", source, *TINY, "--train-epochs", 1, *place, *flags)

    def trained_on():
        return json.loads((folder / "config.json").read_text())["data"]["train"]["crc32"]

    # A start that ends before its first checkpoint leaves arrays that nothing depends on.
    fails(start(source_dir, "--lr", 1e38), "not finite")
    assert start(other_dir).returncode == 0
    arrays = np.load(folder / "data/train.npy")
    assert trained_on() == zlib.crc32(arrays)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for flags in (["--resume"], ["--export-only"], []):
        fails(
            start(source_dir, *flags),
            f"--source: other images found than those that {folder / 'data'} was made from",
        )
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert start(other_dir, "--resume").returncode == 0 and start(other_dir, "--export-only").returncode == 0
    exported = []
    for source in (other_dir, source_dir):
        result = start(
            source, "--export-only", "--checkpoint", folder / "encoder.pt", place=tmp_path / "export"
        )
        assert result.returncode == 0, result.stderr
        assert ("other train data than those of the run" in result.stdout) == (source == source_dir)
        exported.append(np.load(features / "train_features.npy"))
    assert (exported[0] != exported[1]).any()


def test_arrays_beside_other_images(source_dir, other_dir, data_dir, tmp_path):
    flags = [*TINY, "--train-epochs", 1, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    both = shutil.copytree(other_dir, tmp_path / "both")
    shutil.copytree(data_dir, both, dirs_exist_ok=True)
    fails(run("simclr", "--data-dir", both, *flags), "other images found than those that", both)
    assert not (tmp_path / "s").exists()
    arrays = (both / "train.npy").read_bytes()
    classes = json.loads((both / "classes.json").read_text())
    del classes["source_crc32"]
    (both / "classes.json").write_text(json.dumps(classes))
    result = run("simclr", "--data-dir", both, *flags)
    assert result.returncode == 0 and "arrays kept, not compared with the images" in result.stdout
    assert (both / "train.npy").read_bytes() == arrays
    shutil.copytree(source_dir / "images", both / "images", dirs_exist_ok=True)
    shutil.copytree(data_dir, both, dirs_exist_ok=True)
    assert run("simclr", "--data-dir", both, *flags, "--resume").returncode == 0


def test_a_copy_of_the_folder_runs_alone(data_dir, source_dir, tmp_path):
    copy = tmp_path / "mine"
    copy.mkdir()
    for path in (ROOT / "simclr").glob("*.py"):
        (copy / path.name).write_text(path.read_text())
    result = run(
        copy, "--data-dir", data_dir, "--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f",
        "--debug", "--way", 2, "--query", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    fails(
        run(copy, "--data-dir", source_dir, "--save-dir", tmp_path / "s2"),
        "data/imgnet/prepare.py",
        source_dir,
    )


@needs_shared_data
def test_the_chain_on_real_images(tmp_path):
    """A few hundred real images, as they lie in the zips: prepared, trained on for four steps, exported,
    probed."""
    source, members = tmp_path / "source", 20
    source.mkdir()
    archives = [zipfile.ZipFile(path) for path in sorted((shared_data / "imgnet").glob("*.zip"))]
    places = {name.split("/")[-1]: archive for archive in archives for name in archive.namelist()}
    with zipfile.ZipFile(source / "images.zip", "w") as out:
        for split in ("train", "val", "test"):
            lines = (shared_data / f"imgnet/{split}.csv").read_text().splitlines()
            rows = [line for c in range(5) for line in lines[1 + 600 * c : 1 + 600 * c + members]]
            (source / f"{split}.csv").write_text("\n".join([lines[0], *rows]) + "\n")
            for row in rows:
                name = "images/" + row.split(",")[0]
                out.writestr(name, places[name.split("/")[-1]].read(name))
    place = ["--save-dir", tmp_path / "s", "--feature-save-dir", tmp_path / "f"]
    result = run(
        "simclr", "--data-dir", source, *place, "--debug", "--view-size", 64, "--hidden-size", 16, "--probe",
        "--test-shot", 1, 5,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {split: array.shape for split, array in read_features(tmp_path / "f").items()} == dict.fromkeys(
        ("train", "val", "test"), (100, 64)
    )
    assert json.loads((tmp_path / "s/test.json").read_text())["5way5shot"]["accuracy"] > 20  # chance
