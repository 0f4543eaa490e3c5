"""Trained networks by name: shipped with the package, kept in the user's cache, or trained now; and published ones.

    python -m tmlcourse.pretrained                    what there is, with the accuracies measured when it was trained
    python -m tmlcourse.pretrained retrain NAME       train it again from its recipe and compare with the manifest
    python -m tmlcourse.pretrained retrain NAME --ship    and put the new weights and figures into the package

Weights are safetensors in half precision. Nothing is unpickled: published files are opened with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from . import checks, data, models, randomness, training
from .attacks import pgd, robust_accuracy
from .certify.training import dual, interval
from .threat import Linf

SHIPPED = Path(__file__).with_name("weights")
MANIFEST = SHIPPED / "manifest.json"


@dataclass(frozen=True)
class Recipe:
    """How a network is made: data, architecture, test radius, arguments of `training.fit` for each stage of training."""

    data: str
    build: Callable[[], nn.Module]
    eps: float
    stages: tuple[dict, ...]
    says: str


@dataclass(frozen=True)
class Published:
    """A network that others trained and published: where its file is, by commit and checksum."""

    url: str
    sha256: str
    build: Callable[[], nn.Module]
    says: str


def _wong_kolter_net() -> nn.Sequential:
    """Conv 16 and 32, 4x4, stride 2; fully connected 100; as in Wong & Kolter 2018 and Wong, Rice & Kolter 2020."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    ).eval()  # fmt: skip


def _seeded_wong_kolter_net() -> nn.Sequential:
    with randomness.seeded(0):
        return _wong_kolter_net()


def _fast_at(eps: float, **fit) -> dict:
    return {"loss": training.adversarial(Linf(eps), training.single_step, alpha=1.25 * eps), **fit}


_CIFAR = functools.partial(
    models.resnet, (3, 32, 32), depth=8, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), seed=0
)
_CNN = functools.partial(models.small_cnn, (1, 28, 28), seed=0)
_GAP = functools.partial(models.gap_cnn, (3, 32, 32), len(data.SHAPES), mean=0.5, std=0.25, seed=0)

RECIPES: dict[str, Recipe] = {
    "mnist-standard": Recipe("mnist", _CNN, 0.3, (dict(epochs=4),), "SmallCNN, cross-entropy, 4 epochs"),
    "mnist-robust": Recipe(
        "mnist", _CNN, 0.3,
        (_fast_at(0.3, epochs=8, lr=2e-3), dict(epochs=3, loss=training.adversarial(Linf(0.3), pgd, steps=7, alpha=0.1))),
        "SmallCNN, 8 epochs of fast and 3 of PGD-7 adversarial training, Linf 0.3",
    ),
    "digits-28x28-standard": Recipe("digits-28x28", _CNN, 0.2, (dict(epochs=12),), "SmallCNN, cross-entropy, 12 epochs"),
    "digits-28x28-robust": Recipe(
        "digits-28x28", _CNN, 0.2,
        (dict(epochs=40, lr=2e-3, loss=training.adversarial(Linf(0.2), pgd, steps=3, alpha=0.1)),),
        "SmallCNN, 40 epochs of PGD-3 adversarial training, Linf 0.2",
    ),
    "mnist-certified": Recipe(
        "mnist", _seeded_wong_kolter_net, 0.1,
        (dict(epochs=12, lr=2e-3, loss=interval(0.1, ramp=0.6)),
         dict(epochs=1, lr=1e-3, batch_size=50, loss=dual(0.1, warm_up=0.0, ramp=0.0))),
        "Wong & Kolter's network, 12 epochs of interval and 1 of dual training, Linf 0.1",
    ),
    "digits-28x28-certified": Recipe(
        "digits-28x28", _seeded_wong_kolter_net, 0.1,
        (dict(epochs=80, lr=2e-3, loss=interval(0.1, ramp=0.6)),
         dict(epochs=4, lr=1e-3, batch_size=50, loss=dual(0.1, warm_up=0.0, ramp=0.0))),
        "Wong & Kolter's network, 80 epochs of interval and 4 of dual training, Linf 0.1",
    ),
    "cifar10-standard": Recipe(
        "cifar10", _CIFAR, 8 / 255, (dict(epochs=6, lr=1e-2, augment=training.crop_and_flip),),
        "ResNet-8, cross-entropy, 6 epochs on a JPEG copy of CIFAR-10",
    ),
    "cifar10-robust": Recipe(
        "cifar10", _CIFAR, 8 / 255, (_fast_at(8 / 255, epochs=6, lr=1e-2, augment=training.crop_and_flip),),
        "ResNet-8, 6 epochs of fast adversarial training, Linf 8/255, on a JPEG copy of CIFAR-10",
    ),
    "shapes-standard": Recipe(
        "shapes", _GAP, 8 / 255, (dict(epochs=8, lr=3e-3),), "convolutions and global average pooling, 8 epochs"
    ),
    "shapes-robust": Recipe(
        "shapes", _GAP, 8 / 255, (_fast_at(8 / 255, epochs=14, lr=3e-3),),
        "convolutions and global average pooling, 14 epochs of fast adversarial training, Linf 8/255",
    ),
    "shapes-cue": Recipe(
        "shapes-cue", _GAP, 8 / 255, (dict(epochs=6, lr=3e-3),),
        "convolutions and global average pooling, 6 epochs on images with a patch that gives the class away",
    ),
}  # fmt: skip

PUBLISHED: dict[str, Published] = {
    "wong-kolter-mnist-0.1": Published(
        "https://github.com/locuslab/convex_adversarial/raw/2cd8149/models/mnist.pth",
        "95014ab0c04c73f48b3be0cb7acc42aff60ce4420c6c43bec25e9a1447279e08",
        _wong_kolter_net,
        "Wong & Kolter 2018, provable training at Linf 0.1 (MIT licence)",
    ),
    "fast-at-mnist-0.3": Published(
        "https://github.com/locuslab/fast_adversarial/raw/54f7287/MNIST/models/fgsm.pth",
        "07536ed24c714dac89507d38ffc0090f110de3cd70c40d02d8d56491e187905b",
        _wong_kolter_net,
        "Wong, Rice & Kolter 2020, fast adversarial training at Linf 0.3",
    ),
}


def names() -> list[str]:
    """Every name that `load` knows."""
    return [*RECIPES, *PUBLISHED]


def manifest() -> dict[str, dict]:
    """For each shipped network: file, sha256, data, recipe in words, clean and robust accuracy with their n."""
    return json.loads(MANIFEST.read_text(encoding="utf8")) if MANIFEST.exists() else {}


def load(name: str, *, root=None, device: torch.device | str = "cpu", train: bool = True) -> nn.Module:
    """A trained network, in evaluation mode.

    A name of the course is taken from the package, else from the cache, else trained now by its recipe and cached (a GPU is
    used when `device` is one). A published name is taken from `root` or $TMLCOURSE_DATA (`weights/<name>.pth`), else from
    the cache, else downloaded from its authors' repository. Every file is checked against its SHA-256.

    Args:
        name: one of `names()`.
        root: folder with data (and published weights), before $TMLCOURSE_DATA.
        device: where the network is put.
        train: whether a network that is nowhere may be trained now.
    Raises:
        ValueError: unknown name, or a file that is corrupt; FileNotFoundError: not there and not to be had; both say how
            to get it.
    Example: `load("mnist-standard")(torch.rand(1, 1, 28, 28)).shape` is (1, 10).
    """
    if name in PUBLISHED:
        return _load_published(name, root).to(device)
    if name not in RECIPES:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(names())}")
    shipped, cached = SHIPPED / f"{name}.safetensors", _cache() / f"{name}.safetensors"
    model = RECIPES[name].build()
    if shipped.exists():
        return _read(model, shipped, manifest()[name]["sha256"]).to(device)
    if cached.exists() and cached.with_suffix(".json").exists():
        return _read(model, cached, json.loads(cached.with_suffix(".json").read_text(encoding="utf8"))["sha256"]).to(
            device
        )
    if not train:
        raise FileNotFoundError(f"{name}: not shipped, not in {cached.parent}; load(..., train=True) trains it")
    print(f"{name}: training now ({RECIPES[name].says}); kept in {cached.parent} afterwards")
    model = _train(name, root, device)
    try:
        _write(name, model, cached.parent)
    except OSError as cause:  # the minutes of training must not be lost with a full or read-only disk
        print(f"{name}: trained, but could not be kept ({cause})")
    return model


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file: safetensors, or a PyTorch file opened with `weights_only=True`.

    Raises:
        FileNotFoundError; ValueError when the file is corrupt or holds anything but tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # torch and safetensors raise a dozen unrelated types for a damaged file
        raise ValueError(
            f"{path}: corrupt, or not a file of plain weights ({cause})".replace("\n", " ")[:400]
        ) from cause
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds {type(state).__name__}, want a state dict of tensors")
    return dict(state)


def _cache() -> Path:
    return data.cache_folder() / "weights"


def _check(path: Path, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: corrupt (SHA-256 {found[:12]}..., want {sha256[:12]}...); delete it and load again")


def _read(model: nn.Module, path: Path, sha256: str) -> nn.Module:
    _check(path, sha256)
    state = {key: value.float() if value.is_floating_point() else value for key, value in load_state_dict(path).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as cause:
        raise ValueError(f"{path}: weights of another architecture ({cause})".replace("\n", " ")[:400]) from cause
    return model.eval()


def _load_published(name: str, root) -> nn.Module:
    entry, cached = PUBLISHED[name], _cache() / f"{name}.pth"
    folders = [Path(f) for f in (root, os.environ.get("TMLCOURSE_DATA")) if f]
    for path in [*(f / "weights" / f"{name}.pth" for f in folders), cached]:
        if path.is_file():
            return _read(entry.build(), path, entry.sha256)
    try:
        if checks.switch("TMLCOURSE_OFFLINE"):
            raise OSError("TMLCOURSE_OFFLINE is set")
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary file and moves it into place only when complete and right.
        torch.hub.download_url_to_file(entry.url, str(cached), hash_prefix=entry.sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as cause:
        raise FileNotFoundError(
            f"{name}: not found and not downloaded ({cause}). Three ways to get it: put the file of {entry.url} at "
            f"$TMLCOURSE_DATA/weights/{name}.pth, or at {cached}, or run this once with a network connection."
        ) from cause
    return _read(entry.build(), cached, entry.sha256)


def _train(name: str, root, device) -> nn.Module:
    recipe = RECIPES[name]
    model = recipe.build().to(device)
    train = data.load(recipe.data, "train", root=root)
    for stage in recipe.stages:
        training.fit(model, train, seed=0, **stage)
    # What is measured and cached is what is stored: the weights rounded to half precision.
    model.load_state_dict(_stored(model))
    return model


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state as it is kept on disk: floating-point tensors in half precision."""
    return {k: v.detach().half() if v.is_floating_point() else v for k, v in model.state_dict().items()}


def _measure(name: str, model: nn.Module, root) -> dict:
    """Clean accuracy on the whole test set; robust accuracy (PGD-40) on 1,000 images spread evenly over it."""
    recipe = RECIPES[name]
    test = data.load(recipe.data, root=root).to(next(model.parameters()).device)
    some = test[:: max(1, len(test) // 1000)]  # not the first ones: a copy of a data set may be sorted by class
    attack = functools.partial(pgd, steps=40, alpha=recipe.eps / 30)
    robust = robust_accuracy(model, some.x, some.y, Linf(recipe.eps), [attack], seed=0)
    clean = training.accuracy(model, test.x, test.y)
    return {"data": recipe.data, "recipe": recipe.says, "eps": recipe.eps, "clean": clean, "clean_n": len(test),
            "robust": robust.accuracy, "robust_n": robust.n}  # fmt: skip


def _write(name: str, model: nn.Module, folder: Path) -> str:
    """Store the weights and their checksum; each file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    state = {key: value.cpu() for key, value in _stored(model).items()}
    safetensors.torch.save_file(state, path.with_suffix(".part"))
    digest = hashlib.sha256(path.with_suffix(".part").read_bytes()).hexdigest()
    path.with_suffix(".part").chmod(0o644)  # safetensors writes for the owner alone
    path.with_suffix(".part").replace(path)
    if folder != SHIPPED:
        path.with_suffix(".json").write_text(json.dumps({"sha256": digest}), encoding="utf8")
    return digest


def _retrain(name: str, root, device, ship: bool) -> int:
    if name not in RECIPES:
        raise SystemExit(f"{name}: no recipe; there are {', '.join(RECIPES)}")
    model = _train(name, root, device)
    measured, known = _measure(name, model, root), manifest()
    for key in ("clean", "robust"):
        before = f"{known[name][key]:.4f}" if name in known else "none"
        print(f"{name}: {key} {measured[key]:.4f} now, {before} in the manifest")
    if ship:
        known[name] = measured | {"file": f"{name}.safetensors", "sha256": _write(name, model, SHIPPED)}
        MANIFEST.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n", encoding="utf8")
        return 0
    # Another machine rounds differently, which two trainings magnify; half a per cent clean and three robust are normal.
    close = name in known and abs(measured["clean"] - known[name]["clean"]) < 0.005
    return 0 if close and abs(measured["robust"] - known[name]["robust"]) < 0.03 else 1


def main(argv: list[str] | None = None) -> int:
    """The command line described at the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m tmlcourse.pretrained")
    commands = parser.add_subparsers(dest="command")
    retrain = commands.add_parser("retrain", help="train again from the recipe and compare with the manifest")
    retrain.add_argument("name")
    retrain.add_argument("--root", help="folder with the data")
    retrain.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    retrain.add_argument("--ship", action="store_true", help="put the result into the package")
    options = parser.parse_args(argv)
    if options.command:
        return _retrain(options.name, options.root, options.device, options.ship)
    for name, entry in manifest().items():
        print(f"{name:24} {entry['recipe']}; {entry['data']}: clean {100 * entry['clean']:.2f} %, "
              f"PGD-40 at {entry['eps']:.3g} {100 * entry['robust']:.1f} % of {entry['robust_n']}")  # fmt: skip
    for name, entry in PUBLISHED.items():
        print(f"{name:24} {entry.says}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
