"""What was published, and how a run of ours differs from it."""

PUBLISHED = {  # accuracies in % of the paper's table (ICLR 2021)
    "omniglot": {"5way1shot": 94.92, "5way5shot": 97.09, "20way1shot": 82.21, "20way5shot": 90.61},
    "mimgnet": {"5way1shot": 42.82, "5way5shot": 55.73, "5way20shot": 63.14, "5way50shot": 68.26},
}
OTHERS = {  # published without labels; the last, the best one, is in README.md too
    "omniglot": {
        "PsCo (2023)": (96.37, 99.13, 89.60, 97.07),
        "UFLST (2020)": (97.03, 99.19, 91.28, 97.37),
        "best published without labels: LF2CS (2022)": (97.31, 99.32, 91.72, 97.65),
    },
    "mimgnet": {
        "SimCLR and nearest prototype, Conv4 (2022)": (40.91, 57.22, 65.74, 67.83),
        "PsCo, Conv5 (2023)": (46.70, 63.26, 72.22, 73.50),
        "best published without labels: CPNWCP, Conv4 (2022)": (47.93, 66.44, 75.69, 78.20),
    },
}
RECIPE = {  # the published one without its length: the defaults of main.py
    "unsupervised_em_iters": 10, "em_start": "samples", "fix_pi": False, "no_set_attention": False,
    "kl_warmup_iters": 0, "kl_weight": 1.0, "decode_samples": None,
    "ema_decay": 0.0, "lr_schedule": "constant",
    "semisupervised_em_iters": 10, "e_step": "unit", "eval_episodes": 1000, "query": 15,
}  # fmt: skip
OMNIGLOT = {
    "batch_size": 4, "lr": 1e-3, "weight_decay": 1e-6, "hidden_size": 64, "latent_size": 64,
    "train_mc_sample_size": 32, "test_mc_sample_size": 32, "target": "drawing", "warp": "none",
    "target_shape": 0.25,
}  # fmt: skip
MIMGNET = {
    "batch_size": 16, "lr": 1e-4, "weight_decay": 5e-2, "hidden_size": 512, "latent_size": 32,
    "train_mc_sample_size": 256, "test_mc_sample_size": 256,
}  # fmt: skip
RECIPES = {"omniglot": RECIPE | OMNIGLOT, "mimgnet": RECIPE | MIMGNET}
SET_SIZES = {("omniglot", 5): 200, ("omniglot", 20): 300, ("mimgnet", 5): 5}
STEPS, EPOCHS = {"omniglot": 60000, "mimgnet": 15000}, 400  # of SimCLR
SIMCLR = {
    "batch_size": 512, "view_size": 84, "crop_scale": 0.08, "jitter": 0.8, "hue": 0.2, "neighbours": 0,
    "feature_size": 84, "lda": 0,
}  # fmt: skip
# What the fast recipe changes.
FAST = {"train_mc_sample_size", "sample_size", "kl_warmup_iters", "lr_schedule", "ema_decay"}
# Larger sets: ours on Mini-ImageNet, on features with --lda.
LARGER_SETS = FAST | {"batch_size", "latent_size", "kl_weight", "weight_decay", "lr", "e_step"}
# Ours on Omniglot, whose decoder draws characters without their pose.
CANONICAL = FAST | {"lr", "target", "warp", "kl_weight", "e_step", "eval_episodes"}


def recipe(experiment, run):
    """Name the recipe: the published one, with what was shortened, or another with what differs."""
    args, features = run["args"], run.get("features", {})
    size = SET_SIZES.get((experiment, args["way"]))
    expected = RECIPES[experiment] | ({"sample_size": size} if size else {"way": 5})
    # A flag that is newer than the run had its default.
    changed = {flag: args[flag] for flag in expected if args.get(flag, expected[flag]) != expected[flag]}
    reading = f", {args['e_step']} E-step" if "e_step" in changed else ""
    if not changed:
        name = "published"
    elif changed.keys() == {"train_mc_sample_size"}:
        name = f"published, {changed['train_mc_sample_size']} Monte-Carlo samples"
    elif changed.keys() == {"decode_samples"}:
        name = f"published, {changed['decode_samples']} of {args['train_mc_sample_size']} samples decoded"
    elif args.get("target") == "canonical" and changed.keys() <= CANONICAL:
        name = f"ours: drawings without their pose{reading}"
    elif features.get("lda") and changed.keys() <= LARGER_SETS:
        sets = f"sets of {args['sample_size']}"
        name = f"ours: {reading[2:] or sets}"
    elif changed.keys() <= FAST:
        name = "fast"
    else:
        name = f"another: {', '.join(f'{flag} {value}' for flag, value in changed.items())}"
    steps, epochs = args["train_iters"], features.get("train_epochs", "?")
    if name.startswith("published") and steps != STEPS[experiment]:
        name += f", {steps:,} of {STEPS[experiment]:,} steps"
    if experiment != "mimgnet":
        return name
    if made_by := encoder(features):
        name = f"{name}; {made_by}" if name.startswith("ours") else f"{made_by}, else {name}"
    if features.get("loss") != "prototypical" and epochs != EPOCHS:
        name += f", {epochs} of {EPOCHS} SimCLR epochs"
    return name


def encoder(features):
    """Name the encoder that features.json describes; an empty string for the published one, of any length."""
    if features.get("loss") == "prototypical":
        near = " with neighbours" if features.get("neighbours") else ""
        if features.get("lda"):
            return f"prototypical encoder{near}, {features['lda']} directions"
        size = features.get("feature_size", SIMCLR["view_size"])
        of = "" if size == SIMCLR["view_size"] else f", {size} pixels"
        return f"prototypical encoder{near}, {features['batch_size']} x {features['views']} views{of}"
    found = {name: features.get(name, value) for name, value in SIMCLR.items()}  # older ones say less
    if found == SIMCLR:
        return ""
    sizes = f"SimCLR in batches of {found.pop('batch_size')} with views of {found.pop('view_size')} pixels"
    return ", ".join([sizes, *(f"{name} {value}" for name, value in found.items() if value != SIMCLR[name])])
