"""What the flags of simclr/main.py say reaches the training; what is kept, and on what it is chosen."""

import torch

from conftest import load


FLAGS = "--loss prototypical --views 4 --neighbours 1 --batch-size 4 --train-epochs 5 --freq-epochs 5"
FLAGS += " --lr 0.1 --constant-epochs 0 --temperature 7 --crop-scale 0.3 --jitter 0.4 --hue 0.1"
FLAGS += " --view-size 64 --weight-decay 0.1 --hidden-size 4 --way 2 --query 1 --eval-episodes 2"


def test_what_a_simclr_training_does(tmp_path, monkeypatch):
    """Rates by fractions of an epoch, every image once an epoch, neighbours renewed, validation's split."""
    main = load("simclr", "main")
    args = main.parse_args([*FLAGS.split(), "--save-dir", str(tmp_path)])
    image = torch.arange(12, dtype=torch.uint8).view(2, 6, 1, 1, 1).expand(2, 6, 84, 84, 3)
    splits = {name: image + i for i, name in enumerate(("train", "val", "test"))}
    steps, views, found, tested, losses = [], [], [], [], []
    make, step, validate = main.training_views, main.train_step, main.validate

    def stepped(network, optimizer, x, rate, temperature, criterion, count):
        loss = step(network, optimizer, x, rate, temperature, criterion, count)
        losses.append((criterion.func, criterion.keywords, count))
        (group,) = optimizer.param_groups
        steps.append((rate, temperature, group["lr"], group["weight_decay"]))
        return loss

    def viewed(x, generator, *how):
        views.append((x[:, 0, 0, 0], how))
        return make(x, generator, *how)

    def near(encoder, images, *how):
        found.append(how)
        return torch.full((12, 1), -1)

    for name, of in {"training_views": viewed, "train_step": stepped, "find_neighbours": near}.items():
        monkeypatch.setattr(main, name, of)
    monkeypatch.setattr(main, "validate", lambda *how: tested.append(how[1]) or validate(*how))
    main.train(splits, torch.device("cpu"), False, {}, [], args)
    rates = [main.learning_rate(i / 3, args) for i in range(15)]
    assert steps == [(rate, 7, rate, 0.1) for rate in rates] and len(set(rates)) == 15
    assert losses == [(main.prototypical, {"views": 4}, 4)] * 15
    assert {how for _, how in views} == {(64, 2, (0.3, 0.4, 0.1))}
    epochs = torch.stack([x for x, _ in views[::2]]).view(5, 12)
    assert all(epoch.sort().values.equal(torch.arange(12).byte()) for epoch in epochs)
    assert len(epochs.unique(dim=0)) == 5
    assert found == [(1, (0.3, 0.4, 0.1))] * 2  # in the first epoch and the fifth
    assert len(tested) == 1 and tested[0].equal(splits["val"])


def test_precision_and_seed_reach_simclr(tmp_path):
    main, ends = load("simclr", "main"), []
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 6, 84, 84, 3), generator=g, dtype=torch.uint8)
    for bf16, flags in ((False, ""), (True, ""), (False, "--seed 1"), (False, "--lr 0")):
        name = str(len(ends))
        flags = f"--batch-size 12 --train-epochs 1 --view-size 64 {flags} --hidden-size 4 --way 2 --query 1"
        args = main.parse_args([*flags.split(), "--eval-episodes", "2", "--save-dir", str(tmp_path / name)])
        args.save_dir.mkdir()
        splits = {"train": images, "val": images, "test": images}
        main.train(splits, torch.device("cpu"), bf16, {}, [], args)
        ends.append(load("simclr", "runtime").load_checkpoint(args.save_dir / "last.pt"))
    first, rounded, other, _ = (end["model"]["blocks.0.conv.weight"] for end in ends)
    assert not first.equal(rounded) and not torch.allclose(first, other, atol=0.1)
    assert not ends[0]["generator"].equal(ends[2]["generator"])
    trained, start = (end["projection"] for end in (ends[0], ends[3]))
    assert not any(trained[name].equal(start[name]) for name in start if name.endswith("weight"))


def test_a_probe_standardises_features_but_not_coordinates(tmp_path, monkeypatch):
    export, tested = load("simclr", "export"), []
    monkeypatch.setattr(export, "evaluate", lambda features, *_: tested.append(features) or {})
    train, test = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    for directions in "03":
        args = load("simclr", "main").parse_args(["--lda", directions, "--save-dir", str(tmp_path)])
        export.probe({"train": train, "test": test}, args)
    assert tested[0].equal(export.standardise(test, train)) and tested[1].equal(test)


def test_the_best_encoder_is_kept(tmp_path, monkeypatch):
    main, encoder = load("simclr", "main"), load("simclr", "model").Encoder(4)
    args, history = main.parse_args(["--save-dir", str(tmp_path)]), []
    images = torch.zeros(1, 2, 84, 84, 3, dtype=torch.uint8)
    for step, (one, five) in enumerate([(50, 80), (40, 90), (60, 85)], start=1):
        scores = {"5way1shot": {"accuracy": one}, "5way5shot": {"accuracy": five}}
        monkeypatch.setattr(main, "evaluate", lambda *_: scores)
        history.append(main.validate(encoder, images, step, step, history, args))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 2
