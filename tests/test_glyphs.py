"""data/glyphs/prepare.py: the stand-in data set has Omniglot's form, is seeded, and can be told apart."""

import json
import subprocess
import sys

import numpy as np

from conftest import ROOT, fails, run, written


def glyphs(out, *args):
    return run("data/glyphs", "--out", out, *args, script="prepare.py")


def test_glyphs_have_omniglots_form(glyphs_dir):
    assert sorted(written(glyphs_dir)) == ["split.json", "test.npy", "train.npy", "val.npy"]
    split = json.loads((glyphs_dir / "split.json").read_text())
    for name, classes in (("train", 60), ("val", 25), ("test", 25)):
        array = np.load(glyphs_dir / f"{name}.npy", allow_pickle=False)
        assert array.shape == (classes, 20, 28, 28, 1) and array.dtype == np.uint8
        assert np.median(array) == 0 and array.max() == 255 and 0.06 < array.mean() / 255 < 0.11
        assert (array.max((2, 3, 4)) > 200).all()
        assert len(split[name]) == classes == len(set(split[name]))


def test_no_glyph_is_in_two_splits_and_no_two_drawings_are_equal(glyphs_dir):
    images = np.concatenate(
        [np.load(glyphs_dir / f"{name}.npy").reshape(-1, 784) for name in ("train", "val", "test")]
    )
    assert len(np.unique(images, axis=0)) == len(images) == 110 * 20


def test_drawings_of_a_glyph_resemble_each_other_more_than_other_glyphs(glyphs_dir):
    images = np.load(glyphs_dir / "train.npy").reshape(60, 20, 784).astype(float)
    images /= np.linalg.norm(images, axis=-1, keepdims=True)
    similar = np.einsum("aip,bjp->abij", images[:, :10], images[:, 10:]).mean((2, 3))
    own, others = similar.diagonal(), (similar.sum(1) - similar.diagonal()) / 59
    assert own.mean() > 1.3 * others.mean() and own.max() < 0.8  # but each is drawn anew
    assert (similar.argmax(1) == np.arange(60)).mean() > 0.8


def test_a_seed_gives_the_same_bytes_and_another_other_characters(glyphs_dir, tmp_path):
    sizes = ["--train", 60, "--val", 25, "--test", 25]
    assert (
        glyphs(tmp_path / "same", *sizes).returncode
        == glyphs(tmp_path / "other", *sizes, "--seed", 1).returncode
        == 0
    )
    assert written(tmp_path / "same") == written(glyphs_dir)
    assert not np.array_equal(np.load(tmp_path / "other/test.npy"), np.load(glyphs_dir / "test.npy"))


def test_more_glyphs_leave_the_first_as_they_were(glyphs_dir, tmp_path):
    assert glyphs(tmp_path, "--train", 70, "--val", 1, "--test", 30).returncode == 0
    for name in ("train", "test"):
        few = np.load(glyphs_dir / f"{name}.npy")
        assert np.array_equal(np.load(tmp_path / f"{name}.npy")[: len(few)], few)


def test_glyph_errors_are_one_line(tmp_path):
    for flag, value in (("--train", "0"), ("--val", "-3"), ("--test", "2.5"), ("--train", "many")):
        fails(
            glyphs(tmp_path / "out", f"{flag}={value}"),
            flag,
            f"{value} found, an integer from 1 to 100000 expected",
        )
    fails(glyphs(tmp_path / "out", "--seed=-1"), "--seed", "-1 found")
    fails(glyphs(tmp_path / "out", "--sead", "1"), "unrecognized arguments: --sead 1")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    fails(glyphs(tmp_path / "file", "--train", 1, "--val", 1, "--test", 1), tmp_path / "file")


def shell(before, after, *args):
    """The script within a shell: what stands before it in the line, and after."""
    command = f"{before} {sys.executable} prepare.py {' '.join(map(str, args))} {after}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT / "data/glyphs", capture_output=True, text=True)


def test_a_full_disk_is_named(tmp_path):
    """Played by the largest size of a file."""
    fails(shell("ulimit -f 100;", "", "--out", tmp_path / "out"), "prepare.py: error: --out: File too large")
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob(".prepare-*"))


def test_closed_output_changes_nothing(glyphs_dir, tmp_path):
    sizes = ["--train", 60, "--val", 25, "--test", 25]
    for i, after in enumerate(("2>&-", ">&-", ">&- 2>&-", "> >(true)", "> >(true) 2>&1", ">/dev/full 2>&1")):
        result = shell("", after, "--out", tmp_path / f"{i}", *sizes)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        assert written(tmp_path / f"{i}") == written(glyphs_dir)
    assert shell("", "2>&-", "--train", 0).returncode == 2


def test_a_home_after_an_equals_sign(tmp_path):
    result = shell(f"HOME={tmp_path}", "", "'--out=~/out'", "--train", 1, "--val", 1, "--test", 1)
    assert result.returncode == 0 and (tmp_path / "out/train.npy").exists(), result.stderr


def test_memory_does_not_grow_with_the_data(tmp_path):
    """2,000 characters are 31 MB."""
    most = []
    for count in (1, 2000):
        code = "import prepare, resource; prepare.main(); "
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        result = run(
            "data/glyphs", code, "--out", tmp_path, "--val", 1, "--test", 1, "--train", count, script="-c"
        )
        most.append(int(result.stdout.splitlines()[-1]) / 1024)  # MiB
    assert most[1] < most[0] + 12
