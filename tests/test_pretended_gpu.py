"""The programs on a pretended GPU (pretend.py): no devices mixed, no step that waits for the GPU."""

import re

import pytest

from conftest import ROOT, run
from test_mimgnet_cli import data  # noqa: F401
from test_simclr_cli import data_dir, source_dir  # noqa: F401

FLAGS = "--device cuda --precision fp32 --eval-episodes 4 --hidden-size 4"
GMVAE = "--latent-size 4 --batch-size 2 --sample-size 10 --freq-iters 12 --ema-decay 0.9"
LONGER = {
    "omniglot": (f"{GMVAE} --target canonical --warp elastic --e-step tied", "--train-iters", 4, 12),
    "mimgnet": (f"{GMVAE} --em-start images --e-step tied-full --query 4 --images-per-class 20 "
                "--decode-samples 2 --test-shot 1 5", "--train-iters", 4, 12),
    "simclr": ("--loss prototypical --views 4 --neighbours 2 --lda 3 --batch-size 8 --freq-epochs 3 "
               "--way 2 --query 1", "--train-epochs", 1, 3),
}  # fmt: skip


@pytest.mark.parametrize("folder", LONGER)
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits(
    folder, glyphs_dir, data, data_dir, tmp_path  # noqa: F811
):
    flags, length, *lengths = LONGER[folder]
    of = {"omniglot": glyphs_dir, "mimgnet": data, "simclr": data_dir}[folder]
    flags = [*FLAGS.split(), *flags.split(), "--data-dir", of, "--save-dir", tmp_path / "run", "--resume"]
    flags += ["--feature-save-dir", tmp_path / "features"] if folder == "simclr" else []
    waited = []
    for steps in lengths:  # the second run continues the first and takes twice as many steps
        result = run(folder, "main.py", *flags, length, steps, script=str(ROOT / "tests/pretend.py"))
        assert result.returncode == 0, result.stderr
        assert "a pretended GPU" in result.stdout
        places = re.findall(r"^waited (\d+) times: (\w+)\.py (.*)$", result.stdout, re.MULTILINE)
        of_steps = "main", "model", "mixture", "pose", "dataloader", "neighbours", "runtime"
        others = "train _to_copy", "restore", "flush"  # an epoch's order; at the start; not at every step
        waited.append([p for p in places if p[1] in of_steps and not p[2].startswith(others)])
    assert waited[0] == waited[1] != []
